"""SECURITY.md, besides files and operators: no network, no code of a checkpoint's author, no pixel bombs."""

import importlib.metadata
import importlib.util
import io
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import lively, randomize
from torch import nn

import qcfs_fast
from qcfs_fast import FormatError
from qcfs_fast.backend import native
from qcfs_fast.network import loading, saving
from qcfs_fast.operators.limits import MAX_HELD
from qcfs_fast.study import command_line, data, datasets, training, zoo

OFFLINE = """
import socket
def refuse(*arguments, **named):
    raise AssertionError("a socket was asked for")
class Refused(socket.socket):
    __init__ = refuse
socket.socket, socket.create_connection, socket.getaddrinfo = Refused, refuse, refuse
import torch, qcfs_fast
from qcfs_fast.study import shipped
model, about = shipped.network()
snn = qcfs_fast.convert(model, T=2, progress=False)
x = shipped.images().batch(range(4))[0]
out = snn(x)
snn.save("net")
assert torch.equal(qcfs_fast.load("net")(x), out)
try:
    socket.socket()
except AssertionError:
    print("done")
"""


def test_nothing_asks_for_the_network(tmp_path):
    here = {**os.environ, "PYTHONPATH": str(Path(qcfs_fast.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], cwd=tmp_path, env=here, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize(
    ("kind", "alter", "message"),
    [
        ("EncodingLayer", lambda c: c["geometry"].__setitem__(slice(4, 6), [2**15, 2**15]), "would compute"),
        (
            "SpikingLayer",
            lambda c: c["geometry"].__setitem__(slice(4, 6), [2**15, 2**15]),
            "would compute",
        ),
        ("SpikingLayer", lambda c: c["geometry"].__setitem__(slice(4, 6), [2**24, 2**24]), "elements|too large"),
        ("SpikePool", lambda c: c["pool"].__setitem__("padding", [2**24, 2**24]), "windows along an axis"),
        ("Readout", lambda c: c["pools"][0][0].update(kernel=None, output=[2**24, 1]), "windows along an axis"),
        (
            "SpikePool",
            lambda c: c["pool"].update(kernel=None, output=[2**16, 2**16], multiple=16),
            "would compute|its peak",
        ),
    ],
)
def test_a_small_file_cannot_ask_for_gigabytes(kind, alter, message, tmp_path):
    """Of a network whose file states the images' shape, refused at load by Python and by the native reader."""
    path = tmp_path / "net"
    end = [nn.AdaptiveAvgPool2d(1)] if kind == "Readout" else []
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(2, 2, 1), nn.ReLU(), *end, nn.Conv2d(2, 2, 1)
    )
    snn = qcfs_fast.convert(lively(randomize(model), (1, 8, 8)), T=2, input_shape=(1, 8, 8), progress=False)
    snn.input_shape = (1, 8, 8)
    snn.save(path)
    text, tensors = saving.read(path)
    header = json.loads(text)
    del header["crc32"]
    alter(next(n for n in header["graph"] if n["type"] == kind)["config"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=message):
        loading.network_of(json.dumps(header), tensors)
    with pytest.raises(native.module.NetworkError, match=message):
        native.module.Network(json.dumps(header), tensors)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 500_000  # kilobytes


class Waiting(nn.Module):
    """Six maps that wait until all are there."""

    def __init__(self):
        super().__init__()
        self.stem, self.out = nn.Conv2d(1, 1, 1), nn.Linear(2, 2)
        self.branches = nn.ModuleList(nn.Conv2d(1, 8, 1) for _ in range(6))
        self.ends = nn.ModuleList(nn.Conv2d(8, 2, 1, 16) for _ in range(6))

    def forward(self, x):
        x = torch.relu(self.stem(x))
        maps = [torch.relu(branch(x)) for branch in self.branches]
        x = sum(end(y) for end, y in zip(self.ends, maps, strict=True))
        return self.out(torch.relu(x).mean((2, 3)))


@pytest.mark.parametrize(("neuron", "pixel"), [("plain", 49), ("signed", 97), ("sum", 49)])
def test_a_small_file_cannot_ask_for_the_same_gigabytes_often(neuron, pixel):
    """Python and the native reader refuse from the same size of image on, though none of the results is too large.

    Of each pixel wait six branches of eight bytes, or of twice eight, and the stem, which sends nothing negative.
    """
    model = lively(randomize(Waiting()), (1, 64, 64))
    snn = qcfs_fast.convert(model, T=2, neuron=neuron, input_shape=(1, 64, 64), progress=False, check=False)
    snn.input_shape = (1, 64, 64)
    text, tensors = snn.saved()

    def refusal(make, width):
        header = json.loads(text)
        header["input_shape"] = [1, 256, width]
        try:
            make(json.dumps(header), tensors)
        except ValueError as error:
            return str(error)

    width = MAX_HELD // (256 * pixel)  # the largest that fits
    for make in (loading.network_of, native.module.Network):
        assert refusal(make, width) is None
        assert "would wait for their readers" in refusal(make, width + 1)


EVIL = "b\x1b[31m\nforged  row\x9b\u202e\x07$\\frac{"
SHOWN = r"b\x1b[31m\nforged  row\x9b\u202e\x07$\frac{"


def test_names_are_shown_as_text(tmp_path, capsys):
    """No table gets another row, no escape is obeyed, no formula drawn; what programs read has names as they are."""
    names = {"a": nn.Conv2d(1, 2, 3), "b": nn.ReLU(), "c": nn.Conv2d(2, 2, 1), "d": nn.ReLU(), "p": nn.MaxPool2d(2)}
    layers = OrderedDict({**names, "f": nn.Flatten(), "e": nn.Linear(18, 2)})
    model = lively(randomize(nn.Sequential(layers)), (1, 8, 8))
    text, tensors = qcfs_fast.convert(model, T=2, input_shape=(1, 8, 8), progress=False).saved()
    renamed = {name.replace("b/", f"{EVIL}/"): t for name, t in tensors.items()}
    snn = loading.network_of(text.replace('"b"', json.dumps(EVIL)), renamed)
    assert EVIL in snn.layers
    net, images = tmp_path / "net", tmp_path / "images.npz"
    snn.save(net, metadata={EVIL: EVIL})
    np.savez(images, images=np.ones((2, 1, 8, 8), np.float32))
    profiled = qcfs_fast.profile(qcfs_fast.load(net), torch.ones(2, 1, 8, 8), progress=False)
    qcfs_fast.integer_program(snn).c_header(tmp_path / "net.h")
    texts = [str(snn), repr(snn.layers["d"]), snn.report(), profiled.table(), (tmp_path / "net.h").read_text("utf-8")]
    if importlib.util.find_spec("matplotlib"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of characters that no font has
            profiled.to_html(tmp_path / "page.html")
        texts.append((tmp_path / "page.html").read_text("utf-8"))
    for command in (["inspect", net], ["profile", net, images, "--quiet"]):
        assert command_line.main(list(map(str, command))) == 0
        texts.append(capsys.readouterr().out)
    assert command_line.main(["profile", str(net), str(images), "--quiet", "--raster-layer", "none"]) == 1
    texts.append(capsys.readouterr().err)
    for text in texts[:1] + texts[2:]:
        assert SHOWN in text
    for text in texts:
        assert all(line.isprintable() for line in text.split("\n"))
        assert "\nforged" not in text
    assert command_line.main(["inspect", str(net), "--json"]) == 0
    assert EVIL in {node["name"] for node in json.loads(capsys.readouterr().out)["nodes"]}


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("the-code-of-a-checkpoint-ran",)


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_the_code_of_a_checkpoint_does_not_run(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = {"fc.weight": torch.zeros(1), "more": Hostile()}
    if kind == "torch":
        torch.save(state, "net.pt")
    else:
        Path("net.pt").write_bytes(pickle.dumps(state))
    with pytest.raises(FormatError, match=r"holds objects other than tensors|not a complete checkpoint"):
        zoo.read_state(Path("net.pt"))
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt"]
    for module in (zoo, training):  # every other reader of a pickle in the package
        text = Path(module.__file__).read_text()
        assert text.count("torch.load(") == text.count("weights_only=True)") > 0
    sources = Path(qcfs_fast.__file__).parent.rglob("*.py")
    assert {p.name for p in sources if "torch.load(" in p.read_text()} == {"zoo.py", "training.py"}


@pytest.mark.parametrize("size", [(1, 60000), (9000, 9000), (14000, 14000)])
def test_pixel_bombs(size, tmp_path):
    """Small files that would be gigabytes: as pixels, or as pixels of an image that is resized by its shorter side."""
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "a").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.new("1", size).save(tmp_path / "a" / "bomb.png")
        assert (tmp_path / "a" / "bomb.png").stat().st_size < 10**5
        with pytest.raises(ValueError, match=r"bomb.png: an image of \d+ x \d+ pixels|bomb.png: cannot be read"):
            datasets.open_data(tmp_path, 32).batch([0])


def encoded(kind, **options):
    """A small image as a file of this kind."""
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 255, (21, 17, 3), dtype=np.uint8)
    written = io.BytesIO()
    image.fromarray(pixels).save(written, kind, **options)
    return written.getvalue()


def one_image(folder, name, content):
    (folder / "a").mkdir(exist_ok=True)
    (folder / "a" / name).write_bytes(content)
    return datasets.open_data(folder, 8)


def test_what_is_no_image_starts_no_program(tmp_path, monkeypatch):
    """Pillow goes by the content and not by the name, and gives PostScript to an interpreter of its own."""
    eps = pytest.importorskip("PIL.EpsImagePlugin")
    drawn = []
    monkeypatch.setattr(eps, "Ghostscript", lambda *arguments, **options: drawn.append(1))
    with pytest.raises(ValueError, match=r"x.png: cannot be read as an image"):
        one_image(tmp_path, "x.png", encoded("EPS")).batch([0])
    assert not drawn


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", [k for k in data.FORMATS if k != "WEBP"])
def test_damaged_images_are_named(kind, tmp_path):
    """Decoders raise whatever they like. Of what is damaged beyond reading the file is told."""
    whole, numbers, refused = encoded(kind), random.Random(1), []
    name = "x.tiff" if kind == "TIFF" else f"x.{kind.lower()}"
    images = one_image(tmp_path, name, whole)
    assert images.batch([0])[0].shape == (1, 3, 8, 8)
    for _ in range(150):
        damaged = bytearray(whole[: numbers.randrange(len(whole))] if numbers.random() < 0.3 else whole)
        for _ in range(numbers.choice([1, 2, 8])) if damaged else ():
            damaged[numbers.randrange(min(len(damaged), 200))] = numbers.randrange(256)
        (tmp_path / "a" / name).write_bytes(damaged)
        try:
            images.batch([0])
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert all(text.startswith(f"{tmp_path / 'a' / name}: ") for text in refused)


def test_licences_are_listed_and_travel():
    root = Path(__file__).resolve().parent.parent
    listed = (root / "SECURITY.md").read_text()
    licences = sorted(p.relative_to(root).as_posix() for p in (root / "LICENSES").iterdir())
    assert licences
    assert all(f"({name})" in listed for name in ["LICENSE", *licences])
    assert '"LICENSES/*.txt"' in (root / "pyproject.toml").read_text()
    assert all(name.endswith(".txt") for name in licences)
    pytest.importorskip("pybind11")
    pybind = importlib.metadata.distribution("pybind11")
    (own,) = [f for f in pybind.files or () if f.name == "LICENSE"]
    assert (root / "LICENSES" / "pybind11.txt").read_text() == Path(pybind.locate_file(own)).read_text()
