"""integer_program: the C file beside the header gives the network's bytes, and the .npz file holds the same program."""

import importlib.util
import json
import shutil
import subprocess

import networks
import numpy as np
import pytest
import torch
from torch import nn

import qcfs_fast
from qcfs_fast.exchange.integers import integer_program
from qcfs_fast.network.layers import SpikingLayer
from qcfs_fast.study import shipped
from qcfs_fast.study.command_line import main
from qcfs_fast.study.data import batches

NIR = importlib.util.find_spec("nir")
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
LISTS = ("products", "residuals", "terms")
FLAGS = ("-std=c99", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover")


def run_in_c(folder, x, flags=FLAGS):
    """What network.h and network.c of a folder make of images: float32 [N, ...]."""
    program = folder / "network"
    command = [COMPILER, *flags, '-DQCFS_HEADER="network.h"', "network.c", "-o", program, "-lm"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([program], input=x.numpy().tobytes(), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return torch.from_numpy(np.frombuffer(done.stdout, np.float32).copy())


def check(snn, x, folder):
    integer_program(snn, x.shape[1:]).c_header(folder / "network.h")
    assert torch.equal(run_in_c(folder, x), snn(x).flatten())


@needs_compiler
@pytest.mark.parametrize("kind", networks.SHAPES)
def test_c_gives_the_bytes_of_every_network(kind, tmp_path):
    check(*networks.converted(kind), tmp_path)


@needs_compiler
def test_c_gives_the_bytes_of_a_network_of_lines(tmp_path):
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2), nn.ReLU(), nn.Conv1d(4, 3, 3), nn.ReLU(), nn.MaxPool1d(2),
        nn.Flatten(), nn.Linear(24, 2),
    )  # fmt: skip
    model, x = networks.lively(networks.randomize(model), (2, 40)), networks.images((2, 40), 3)
    snn = qcfs_fast.convert(model, T=3, input_shape=(2, 40), progress=False)
    assert 0 < qcfs_fast.profile(snn, [x], progress=False).totals["rate"] < 1
    check(snn, x, tmp_path)


@pytest.mark.parametrize("shape", [(3, 10**6, 10**6), (3, -1, 5), (3, 0, 5), (3, 2**40, 1), ("a", 1, 2), (3, 10), 3])
def test_shapes_that_no_memory_holds_or_no_image_has(shape):
    snn, _ = networks.converted(networks.Small, T=2)
    for made in (integer_program, qcfs_fast.to_nir) if NIR and not isinstance(shape, int) else (integer_program,):
        with pytest.raises(
            ValueError, match=r"is none that the image input takes|cannot run on an image|invalid literal"
        ):
            made(snn, shape)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offset", "masked", "signed", "sum"])
@pytest.mark.parametrize(("kind", "bits"), [(networks.Branches, 8), (networks.Image, 24), (networks.Pools, 16)])
def test_c_gives_the_bytes_of_every_mode(kind, bits, mode, tmp_path):
    check(*networks.converted(kind, T=5, weight_bits=bits, neuron=mode), tmp_path)


@needs_compiler
@pytest.mark.parametrize("mode", ["plain", "signed"])
def test_c_adds_a_bias_for_each_step(mode, tmp_path):
    shape = networks.SHAPES[networks.Small]
    model = networks.lively(networks.randomize(networks.Small()), shape)
    biases = qcfs_fast.step_biases(model, [networks.images(shape, 8)], T=9, progress=False)
    snn = qcfs_fast.convert(model, T=9, step_bias=biases, neuron=mode)
    check(snn, networks.images(shape), tmp_path)


@needs_compiler
def test_c_gives_maps(tmp_path):
    model = networks.randomize(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3, 2)))
    prepared = networks.lively(model, (3, 11, 14), max_pool="keep")
    snn, x = qcfs_fast.convert(prepared, T=3), networks.images((3, 11, 14))
    assert snn(x).shape == (3, 4, 1, 2)
    check(snn, x, tmp_path)


@needs_compiler
def test_c_refuses_what_is_no_image(tmp_path):
    snn, x = networks.converted(networks.Perceptron)
    integer_program(snn).c_header(tmp_path / "network.h")
    run_in_c(tmp_path, x)
    for data, message in ((x[:1].numpy().tobytes()[:-4], b"needs images of 20 float32"), (x / 0, b"NaN or infinity")):
        raw = data if isinstance(data, bytes) else data.numpy().tobytes()
        done = subprocess.run([tmp_path / "network"], input=raw, capture_output=True, timeout=60)
        assert done.returncode == 1
        assert message in done.stderr


@needs_compiler
@pytest.mark.slow
def test_the_shipped_network_from_the_command_line(tmp_path, capsys):
    model, about = shipped.network()
    x, _ = next(batches(shipped.images(), 20, 20))
    snn = qcfs_fast.convert(model, T=4, input_shape=about.shape)
    snn.save(tmp_path / "snn.safetensors")
    header = tmp_path / "network.h"
    common = ["export", str(tmp_path / "snn.safetensors"), "--format", "c-header", "--output", str(header)]
    assert main([*common, "-T", "2", "--neuron", "offset"]) == 0
    assert "2, offset (window 4) neurons" in capsys.readouterr().out
    snn.neuron, snn.T = "offset", 2
    assert torch.equal(run_in_c(tmp_path, x, ("-std=c99", "-O2")), snn(x).flatten())


def test_npz_holds_the_program(tmp_path, capsys):
    snn, _ = networks.converted(networks.Small, weight_bits=8)
    snn.save(tmp_path / "snn.safetensors")
    out = tmp_path / "network.npz"
    options = ["--format", "npz", "--input-shape", "3", "10", "12", "--output", str(out), "--json"]
    assert main(["export", str(tmp_path / "snn.safetensors"), *options]) == 0
    said = json.loads(capsys.readouterr().out)
    with np.load(out) as file:
        found = json.loads(str(file["program"]))
        arrays = {name: file[name] for name in file.files if name != "program"}
    assert said["operations"] == len(found["operations"])
    assert said["parameter_bytes"] == sum(a.nbytes for a in arrays.values())
    fires = [o for o in found["operations"] if o["kind"] == "fire" and o["products"]]
    assert [o["layer"] for o in fires] == [name for name, m in snn.layers.items() if isinstance(m, SpikingLayer)]
    for operation in fires:
        layer = snn.layers[operation["layer"]]
        for product, source in zip(operation["products"], layer.sources(), strict=True):
            assert np.array_equal(arrays[product["weight"]], source.weight.numpy())
            assert product["unit"] == 256
        assert np.array_equal(arrays[operation["threshold"]], layer.threshold.numpy())


def test_maps_that_live_at_the_same_time_do_not_meet():
    """Whoever reads a map finds all of it as it was written."""
    snn, x = networks.converted(networks.Branches)
    program = integer_program(snn, x.shape[1:])
    owner = np.full((program.facts["arena"], 2), -1)  # of each byte: the map that was written there last
    for operation in program.operations:
        kind, counts = operation["kind"], operation.get("counts", False)
        reads = [p["x"] for p in [operation, *(v for k in LISTS for v in operation.get(k, []))] if "x" in p]
        for at, *sizes in reads:
            end = at + int(np.prod(sizes)) * (4 if counts or kind == "answer" else 1)
            assert (owner[at:end] == (at, end)).all()
        if "out" in operation:
            at, *sizes = operation["out"]
            end = at + int(np.prod(sizes)) * (4 if counts or kind == "count" else 1)
            owner[at:end] = at, end


def test_memory_does_not_grow_with_depth():
    layers = [m for _ in range(6) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    deep = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *layers, nn.Flatten(), nn.Linear(512, 4))
    snn = qcfs_fast.convert(networks.lively(networks.randomize(deep), (3, 8, 8)), T=4)
    a_map = 4 * 8 * 8 * 8
    assert integer_program(snn, (3, 8, 8)).facts["arena"] == 2 * a_map


def test_what_cannot_be_settled_is_refused(tmp_path, capsys):
    snn, _ = networks.converted(networks.AllConvolution)
    snn.input_shape = None
    with pytest.raises(ValueError, match="give input_shape"):
        integer_program(snn)
    with pytest.raises(ValueError, match=r"which is \[3, H, W\]"):
        integer_program(snn, (4, 8, 8))
    with pytest.raises(ValueError, match="name the header"):
        integer_program(snn, (3, 8, 8)).c_header(tmp_path / "network.c")
    snn.save(tmp_path / "snn.safetensors")
    common = ["export", str(tmp_path / "snn.safetensors"), "--output", str(tmp_path / "out"), "--format"]
    assert main([*common, "npz", "--neurons", "if"]) == 1
    assert main([*common, "nir", "-T", "3"]) == 1
    assert "go with integers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
