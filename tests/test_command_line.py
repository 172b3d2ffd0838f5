"""qcfs-fast: each command's result, errors and exit codes; evaluation survives kills and counts alike in parallel."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
import torchvision_models  # noqa: F401 - makes torchvision importable here

import qcfs_fast
from qcfs_fast import files
from qcfs_fast.study import command_line, evaluation, zoo
from qcfs_fast.study.batch import Job, Predictor, _settle, _Worker
from qcfs_fast.study.datasets import open_data

COMMANDS = ("demo", "info", "selftest", "convert", "inspect", "export", "eval", "profile", "bench", "compare")
STEPS = (1, 2, 4, 8)
IMAGES = 300


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of a command in this process."""
    try:
        code = command_line.main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


def spawn(*arguments, launcher=()):
    command = [sys.executable, *launcher, "-m", "qcfs_fast", *map(str, arguments)]
    source = str(Path(qcfs_fast.__file__).parent.parent)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source}

    def interruptible():
        """Tests started in the background of a shell ignore SIGINT, and so would their children."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    here = Path(__file__).parent  # not the sources: the package in use must be the installed one
    return subprocess.Popen(command, cwd=here, **pipes, text=True, env=env, preexec_fn=interruptible)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A saved network, and images whose labels are its answers at T = 1, with every third spoiled."""
    folder = tmp_path_factory.mktemp("cli")
    g = torch.Generator().manual_seed(0)
    model = qcfs_fast.prepare(networks.randomize(networks.Small()), levels=4)
    images = torch.randn((IMAGES, 3, 10, 12), generator=g)
    qcfs_fast.calibrate(model, [images[:32]], progress=False)
    snn = qcfs_fast.convert(model, T=4)
    snn.save(folder / "net.safetensors")
    labels = snn(images, T=1).argmax(1)
    labels[::3] = (labels[::3] + 1) % 5
    np.savez(folder / "data.npz", images=images.numpy(), labels=labels.numpy())
    answers = snn(images, T=8, per_step=True).argmax(2)
    right = [int((answers[t - 1] == labels).sum()) for t in STEPS]
    assert len(set(right)) > 1  # else counts of a wrong T would pass
    return folder, right


def counts(text):
    found = json.loads(text)
    assert [r["T"] for r in found["accuracy"]] == list(STEPS)
    return [r["right"] for r in found["accuracy"]], found["images"], found["resumed"]


# ------------------------------------------------------------------------------------------- general


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_exit_codes(name, capsys):
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert f"example: qcfs-fast {name}" in out
    assert "exit codes: 0 done; 1" in out
    assert "--json" in out


def test_examples_in_help_parse(capsys):
    parser = command_line._parser()
    for name in COMMANDS:
        _, out, _ = run(capsys, name, "--help")
        examples = out.split("example:")[1].split("exit codes")[0].strip().splitlines()
        for line in examples:
            words = re.findall(r'"[^"]*"|\S+', line.split(f" {name} ", 1)[1] if f" {name} " in line else "")
            assert parser.parse_args([name, *(w.strip('"') for w in words)]).command == name


def test_usage_errors(capsys):
    for arguments in ([], ["dance"], ["eval"], ["demo", "--epochs", "0"], ["bench", "--networks", "resnet19"]):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, "")
        assert "error:" in err


def test_info_is_the_same_both_ways(capsys):
    _, text, _ = run(capsys, "info")
    _, data, _ = run(capsys, "info", "--json")
    for key, value in json.loads(data).items():
        assert re.search(rf"^{re.escape(key)}\s+", text, re.M), (key, value)


def test_traceback_on_request():
    with pytest.raises(FileNotFoundError):
        command_line.main(["eval", "nowhere", "nowhere", "--traceback"])


# ------------------------------------------------------------------------------------------- convert


def authors_state(model):
    """A model of tests/networks.py under the names of the published code."""
    return {re.sub(r"^stages\.(\d)", lambda m: f"conv{int(m[1]) + 2}_x", k): v for k, v in model.state_dict().items()}


def trained(model):
    networks.randomize(model)
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if name.endswith("thresh"):
            parameter.data.fill_(0.6 + 0.01 * i)
    return model


@pytest.mark.parametrize(
    "make",
    [lambda: networks.TheirVGG("vgg16"), lambda: networks.TheirResNet(18), lambda: networks.TheirResNet(20)],
    ids=["vgg16", "resnet18", "resnet20"],
)
@pytest.mark.parametrize("parallel", [False, True], ids=["plain", "DataParallel"])
@pytest.mark.parametrize("first", [False, True], ids=["", "first repository"])
def test_convert_authors_checkpoint(make, parallel, first, tmp_path, capsys):
    model = trained(make())
    state = authors_state(model)
    if first:  # the same networks with other names of thresholds
        state = {k.replace("act.thresh", "relu.up").replace(".thresh", ".up"): v for k, v in state.items()}
    torch.save({f"module.{k}": v for k, v in state.items()} if parallel else state, tmp_path / "net.pth")
    bits = 24 if parallel else 16
    options = ["--output", tmp_path / "net.safetensors", "--bits", bits]
    code, _, err = run(capsys, "convert", tmp_path / "net.pth", *options)
    assert code == 0, err
    x = torch.rand((2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    want = qcfs_fast.convert(model, weight_bits=bits, input_shape=(3, 32, 32))(x, per_step=True)
    assert torch.equal(qcfs_fast.load(tmp_path / "net.safetensors")(x, per_step=True), want)
    assert want.std() > 0


def test_convert_torchvision(tmp_path, capsys):
    model = zoo.prepared_torchvision("resnet18", classes=10, levels=4)
    images = torch.rand(2, 3, 32, 32)
    for name, parameter in model.named_parameters():
        if name.endswith("thresh"):
            parameter.data.fill_(1.5)
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "last.pt")
    common = ["convert", "resnet18", "--output", tmp_path / "net.safetensors", "--json", "-T", 6, "--bits", 8]
    code, out, err = run(capsys, *common, "--checkpoint", tmp_path / "last.pt")
    assert code == 0, err
    assert json.loads(out)["T"] == 6
    assert json.loads(out)["weight_bits"] == 8
    assert json.loads(out)["neuron"] == "plain"
    snn = qcfs_fast.load(tmp_path / "net.safetensors")
    assert torch.equal(snn(images), qcfs_fast.convert(model, T=6, weight_bits=8)(images))
    plain = dict(zoo.torchvision_network("resnet18", 10).state_dict())
    torch.save(plain, tmp_path / "relu.pt")
    np.savez(tmp_path / "images.npz", images=images.numpy())
    code, _, err = run(
        capsys, *common, "--quiet", "--checkpoint", tmp_path / "relu.pt", "--calibrate", tmp_path / "images.npz"
    )
    assert code == 0, err


def test_convert_with_modules_replaced(tmp_path, capsys):
    """Activations and gates by their classes' names, as the refusal says."""
    common = ["convert", "mobilenet_v3_small", "--classes", 4, "--calibrate", "random", "--size", 32, "--quiet"]
    common += ["--output", tmp_path / "net.safetensors"]
    code, _, err = run(capsys, *common)
    assert code == 1
    assert "Hardswish has no spiking counterpart" in err
    assert "prepare(model, replace={SqueezeExcitation}) leaves it out" in err
    code, _, err = run(capsys, *common, "--replace", "Hardswish", "SqueezeExcitation")
    assert code == 0, err
    assert qcfs_fast.load(tmp_path / "net.safetensors")(torch.rand(2, 3, 32, 32)).shape == (2, 4)
    code, _, err = run(capsys, *common, "--replace", "Hardswish", "Squeeze")
    assert (code, "no module of the network is a Squeeze; its classes are " in err) == (1, True)
    torch.save(authors_state(trained(networks.TheirResNet(20))), tmp_path / "net.pth")
    code, _, err = run(capsys, "convert", tmp_path / "net.pth", "--output", tmp_path / "o", "--replace", "SiLU")
    assert (code, "--replace go with a torchvision name" in err) == (1, True)


def test_convert_stores_classes_and_normalisation(tmp_path, capsys):
    torch.save(authors_state(trained(networks.TheirResNet(20))), tmp_path / "net.pth")
    names = ["tom cat", *(f"c{i}" for i in range(9, 0, -1))]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n\n")
    for name in names:
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
    net = tmp_path / "net.safetensors"
    common = ["convert", tmp_path / "net.pth", "--output", net, "--json"]
    for given, want in ((tmp_path / "names.txt", names), (tmp_path / "images", sorted(names))):
        code, _, err = run(capsys, *common, "--classes", given, "--mean", 0.5, "--std", 0.2, 0.25, 1)
        assert code == 0, err
        said = {"source": "net.pth", "mean": [0.5], "std": [0.2, 0.25, 1.0], "classes": want}
        assert qcfs_fast.load(net).metadata == said
    _, out, _ = run(capsys, "inspect", net)
    assert f"classes: {json.dumps(want)}\n" in out
    assert "std: [0.2, 0.25, 1.0]\n" in out
    (tmp_path / "few.txt").write_text("a\nb\n")
    (tmp_path / "twice.txt").write_text("a\na\n")
    net.unlink()
    for options, wrong, message in (
        (["--classes", tmp_path / "few.txt"], 1, "classes must be 10 different names, one per output, got 2: "),
        (["--mean", 0.5, 0.5], 1, "mean must be one number per channel, 3 or 1 for all"),
        (["--std", 0], 1, "std must be one positive number per channel"),
        (["--classes", tmp_path / "twice.txt"], 2, "each of them once"),
        (["--classes", tmp_path / "net.pth"], 2, "neither a number nor a file or folder of names"),
        (["--classes", tmp_path / "none"], 2, "neither a number nor a file or folder of names"),
        (["--classes", 0], 2, "must be at least 1"),
    ):
        code, out, err = run(capsys, *common, *options)
        assert (code, out, message in err) == (wrong, "", True), err
    assert not net.exists()


def test_convert_with_a_mode(tmp_path, capsys):
    model = trained(networks.TheirResNet(20))
    torch.save(authors_state(model), tmp_path / "net.pth")
    options = ["--neuron", "offset", "--window", 2, "--iterations", 3]
    code, _, err = run(capsys, "convert", tmp_path / "net.pth", "--output", tmp_path / "net.safetensors", *options)
    assert code == 0, err
    assert qcfs_fast.load(tmp_path / "net.safetensors").neuron == qcfs_fast.Neuron("offset", 2, 3)
    code, _, err = run(capsys, "convert", tmp_path / "net.pth", "--output", tmp_path / "o", "--window", 2)
    assert (code, "--window goes with offset or masked" in err) == (1, True)


def test_convert_errors(tmp_path, capsys):
    torch.save(networks.Small(), tmp_path / "object.pt")
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "other.pt")
    state = authors_state(trained(networks.TheirVGG("vgg11")))
    torch.save({**state, "classifier.7.bias": torch.zeros(3)}, tmp_path / "shape.pt")
    torch.save({k: v for k, v in state.items() if k != "layer2.1.bias"}, tmp_path / "missing.pt")
    torch.save(state, tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:5000])
    cases = {
        "object.pt": "reading one runs its code",
        "other.pt": "not named as in the authors'",
        "shape.pt": "classifier.7.bias",
        "missing.pt": "layer2.1.bias",
        "half.pt": "not a complete checkpoint",
        "absent.pt": "no checkpoint",
    }
    for name, message in cases.items():
        code, _, err = run(capsys, "convert", tmp_path / name, "--output", tmp_path / "o.safetensors")
        assert code == 1, name
        assert message in err
    code, _, err = run(capsys, "convert", "resnet18", "--output", tmp_path / "o.safetensors")
    assert (code, "Give --checkpoint" in err) == (1, True)
    code, _, err = run(capsys, "convert", "vit_b_16", "--calibrate", "random", "--output", tmp_path / "o.safetensors")
    assert (code, "no ReLU" in err) == (1, True)
    code, _, err = run(capsys, "convert", tmp_path / "whole.pt", "--output", tmp_path / "no" / "o.safetensors")
    assert (code, "does not exist" in err) == (1, True)
    assert not (tmp_path / "o.safetensors").exists()


# ---------------------------------------------------------------------------------------------- eval


def test_eval(place, capsys):
    folder, right = place
    common = ["eval", folder / "net.safetensors", folder / "data.npz", "--steps", *STEPS, "--quiet"]
    for batch in (7, 64, IMAGES):
        code, out, err = run(capsys, *common, "--json", "--batch", batch)
        assert (code, err) == (0, "")
        assert counts(out) == (right, IMAGES, 0)
    _, text, _ = run(capsys, *common)
    assert f"   4{right[2] / IMAGES:9.2%}\n" in text
    assert not list(folder.glob("*.eval"))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A saved network of two event channels, 60 recordings of six steps, their labels, and the file of both."""
    folder = tmp_path_factory.mktemp("events")
    g = torch.Generator().manual_seed(0)
    model = qcfs_fast.prepare(torch.nn.Sequential(
        torch.nn.Conv2d(2, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(8 * 6 * 6, 4),
    ), levels=4)  # fmt: skip
    networks.randomize(model)
    events = torch.randint(0, 4, (60, 6, 2, 6, 6), dtype=torch.uint8, generator=g)
    qcfs_fast.calibrate(model, [events.flatten(0, 1).float()], progress=False)
    snn = qcfs_fast.convert(model, T=4)
    snn.save(folder / "net.safetensors")
    labels = snn(events.transpose(0, 1)[:2]).argmax(1)
    np.savez(folder / "events.npz", images=events.numpy(), labels=labels.numpy())
    np.savez(folder / "currents.npz", images=events.numpy() * np.float32(0.75), labels=labels.numpy())
    return folder, snn, events, labels


@pytest.mark.parametrize("kind", ["events", "currents"])
def test_eval_of_recordings_in_several_modes(kind, recordings, capsys):
    """Each T is the answer after the first T steps, of counts and of floats; a look-ahead sees its window."""
    folder, snn, events, labels = recordings
    frames = (events if kind == "events" else events * 0.75).transpose(0, 1)
    neurons = [qcfs_fast.Neuron("plain"), qcfs_fast.Neuron("offset", 3, 2), qcfs_fast.Neuron("signed")]
    want = []
    for neuron in neurons:
        snn.neuron = neuron
        running = snn(frames, per_step=True)
        want += [int((running[t - 1].argmax(1) == labels).sum()) for t in (1, 2, 4, 6)]
    snn.neuron = "plain"
    assert len(set(want)) > 3
    options = ["--neuron", "plain", "offset", "signed", "--window", 3, "--iterations", 2, "--quiet", "--batch", 25]
    code, out, err = run(capsys, "eval", folder / "net.safetensors", folder / f"{kind}.npz", *options, "--json")
    assert code == 0, err
    rows = json.loads(out)["accuracy"]
    assert [row["right"] for row in rows] == want
    assert [row["neuron"] for row in rows[::4]] == [str(neuron) for neuron in neurons]
    code, out, err = run(capsys, "eval", folder / "net.safetensors", folder / f"{kind}.npz", *options, "--steps", 2)
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    assert out.splitlines()[-1].split() == ["2", *(f"{want[i] / 60:.2%}" for i in (1, 5, 9))]


def test_eval_in_every_mode(place, tmp_path, capsys):
    """Several modes in one table, sum by a pass for each T; batches that an earlier run did in all modes count."""
    folder, right = place
    snn = qcfs_fast.load(folder / "net.safetensors")
    with np.load(folder / "data.npz") as data:
        images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])
    want = []
    for mode in ("plain", "offset", "masked", "signed", "sum"):
        snn.neuron = mode
        want.append([int((snn(images, T).argmax(1) == labels).sum()) for T in STEPS])
    assert want[0] == right
    assert len({tuple(w) for w in want}) == 5
    net = folder / "net.safetensors"
    common = ["eval", net, folder / "data.npz", "--steps", *STEPS, "--quiet", "--state", tmp_path / "state"]
    modes = ["--neuron", "plain", "offset", "masked", "signed", "sum"]

    class StoppedError(Exception):
        pass

    real, calls = evaluation._right, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 13:  # in the third batch
            raise StoppedError
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_right", stopping)
        with pytest.raises(StoppedError):
            run(capsys, *common, *modes)
    code, _, err = run(capsys, *common)
    assert (code, "another neurons" in err) == (1, True)
    code, out, err = run(capsys, *common, *modes)
    assert code == 0, err
    assert "128 of 300 images were counted by earlier" in out
    assert max(map(len, out.splitlines())) <= 80
    for line, by_mode in zip(out.splitlines()[-len(STEPS) :], zip(*want, strict=True), strict=True):
        assert line.split()[1:] == [f"{r / IMAGES:.2%}" for r in by_mode]


def test_an_evaluation_goes_on_with_its_own_data_alone(place, tmp_path, capsys):
    """Images that were replaced meanwhile are as many as before, in a file of the same name."""
    folder, _ = place
    shutil.copy(folder / "data.npz", tmp_path / "data.npz")
    arguments = ["eval", folder / "net.safetensors", tmp_path / "data.npz", "--quiet", "--state", tmp_path / "state"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "remove_written", lambda *arguments: None)  # as if it had been cut off here
        assert run(capsys, *arguments)[0] == 0
    with np.load(folder / "data.npz") as file:
        images, labels = file["images"], file["labels"]
    for others in ({"images": images, "labels": np.roll(labels, 1)}, {"images": images[::-1], "labels": labels}):
        np.savez(tmp_path / "data.npz", **others)
        code, _, err = run(capsys, *arguments)
        assert (code, "belongs to an evaluation with another data" in err) == (1, True)
    shutil.copy(folder / "data.npz", tmp_path / "data.npz")
    code, out, _ = run(capsys, *arguments)
    assert (code, f"{IMAGES} of {IMAGES} images were counted by earlier" in out) == (0, True)


def test_recordings_are_used_as_they_are(recordings, tmp_path, capsys):
    """A stored normalisation is for images; counts of events have none."""
    folder, snn, _, _ = recordings
    snn.save(tmp_path / "net.safetensors", {"mean": [0.5], "std": [0.1]})
    found = [
        run(capsys, "eval", place / "net.safetensors", folder / "events.npz", "--steps", 2, "--quiet", "--json")
        for place in (folder, tmp_path)
    ]
    assert found[0] == found[1]
    assert found[0][0] == 0


def test_profile_of_recordings(recordings, capsys):
    folder, snn, events, _ = recordings
    files = ["profile", folder / "net.safetensors", folder / "events.npz", "--quiet", "--json"]
    for options, T in (([], 6), (["-T", 2], 2)):
        code, out, err = run(capsys, *files, *options)
        assert code == 0, err
        found = json.loads(out)
        spikes = qcfs_fast.trace(snn, events.transpose(0, 1)[:T])
        first = next(row for row in found["layers"] if row["kind"] == "analog")
        assert found["T"] == T
        assert first["spikes"] == int(next(iter(spikes.values())).sum())
        assert first["spikes"] > 0


def test_errors_of_recordings(recordings, tmp_path, capsys):
    folder, _, _, _ = recordings
    net, data = folder / "net.safetensors", folder / "events.npz"
    np.savez(tmp_path / "turned.npz", images=np.zeros((6, 40, 3, 4, 4)), labels=np.zeros(40, int))
    cases = [
        (["eval", net, data, "--steps", 2, 7], "its images have 6 steps, but 7 are needed"),
        (["eval", net, data, "--neuron", "plain", "sum"], "sum mode adds up the steps of one; leave it out"),
        (["eval", net, data, "--neuron", "offset", "--window", 8], "8 are needed; ask for a smaller T or window"),
        (["eval", net, tmp_path / "turned.npz"], "one per image, got int64 [40]; images over time are [N, T, C, H, W]"),
        (["eval", net, data, "--mean", 0.5], "leave out mean and std"),
        (["eval", net, data, "--window", 3], "--window goes with offset or masked"),
        (["eval", net, data, "--neuron", "masked", "--iterations", 2], "--iterations goes with offset"),
        (["eval", net, data, "--neuron", "offset", "--window", 9], "window must be from 1 to 8"),
        (["profile", net, data, "-T", 7], "its images have 6 steps, but 7 are needed"),
    ]
    for arguments, message in cases:
        code, out, err = run(capsys, *arguments, "--quiet")
        assert (code, out) == (1, ""), arguments
        assert message in err
    assert not list(folder.glob("*.eval"))


def test_eval_of_a_folder_of_images(tmp_path, place, capsys):
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(10):
        path = tmp_path / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    for empty in ("eel", "fox", "gnu"):
        (tmp_path / empty).mkdir()
    data = open_data(tmp_path, size=14)
    x, y = data.batch(range(10))
    assert x.shape == (10, 3, 14, 14)
    assert y.tolist() == [0] * 5 + [1] * 5
    snn = qcfs_fast.load(place[0] / "net.safetensors")
    code, out, err = run(
        capsys, "eval", place[0] / "net.safetensors", tmp_path, "--size", 14, "--json", "--quiet", "--batch", 3,
        "--steps", 4,
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["accuracy"][0]["right"] == int((snn(x, T=4).argmax(1) == y).sum())


NAMES = ["owl", "ant", "elk", "bee", "cow"]  # in the order of the outputs, which is not that of a folder


@pytest.fixture(scope="module")
def sorted_images(tmp_path_factory):
    """A network, images as it reads them, and a folder in which each lies under the name of the network's answer."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("sorted")
    model = qcfs_fast.prepare(networks.randomize(networks.Small()), levels=4)
    base = torch.randn((40, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    pixels = (torch.nn.functional.interpolate(base, 16) * 90 + 128).clamp(0, 255).byte()
    # As docs/command-line.md says: the shorter side is 8/7 of --size, here 14, and the centre is cut out.
    x = (pixels[..., 1:15, 1:15] / 255 - 0.5) / torch.tensor([0.2, 0.3, 0.4]).reshape(3, 1, 1)
    qcfs_fast.calibrate(model, [x], progress=False)
    with torch.no_grad():  # else all answers are one
        [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1].bias -= model(x).mean(0)
    snn = qcfs_fast.convert(model, T=4)
    answers = snn(x).argmax(1)
    kept = (answers != NAMES.index("bee")).nonzero().flatten()
    pixels, answers = pixels[kept], answers[kept].tolist()
    assert len(set(answers)) >= 3
    for i, answer in enumerate(answers):
        path = folder / "images" / NAMES[answer] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i].permute(1, 2, 0).numpy()).save(path)
    np.savez(folder / "images.npz", images=pixels[..., 1:15, 1:15].numpy(), labels=np.array(answers))
    return snn, folder


SAID = {"classes": NAMES, "mean": [0.5], "std": [0.2, 0.3, 0.4]}


def accuracy_of(capsys, net, data, *options):
    """The share of right answers at T = 4, and what stands on stderr; None where the command fails."""
    files = [net, data, "--size", 14, "--steps", 4, "--quiet", "--json", *options]
    code, out, err = run(capsys, "eval", *files)
    return (json.loads(out)["accuracy"][0]["accuracy"] if code == 0 else None), err


def test_a_folder_is_numbered_and_normalised_as_the_file_says(sorted_images, tmp_path, capsys):
    snn, folder = sorted_images
    net, images = tmp_path / "net.safetensors", folder / "images"
    snn.save(net, SAID)
    missing = set(NAMES) - {p.name for p in images.iterdir()}
    right, err = accuracy_of(capsys, net, images)
    assert right == 1
    assert f"has no folder for {len(missing)} of 5 classes: " in err
    assert all(name in err for name in missing)
    assert accuracy_of(capsys, net, folder / "images.npz") == (1, "")
    for data in (images, folder / "images.npz"):  # what is asked for wins
        assert accuracy_of(capsys, net, data, "--mean", 0.9)[0] < 1
        assert accuracy_of(capsys, net, data, "--std", 9)[0] < 1
    snn.save(net, {"classes": NAMES})
    assert accuracy_of(capsys, net, images)[0] < 1  # ImageNet's
    assert accuracy_of(capsys, net, images, "--mean", 0.5, "--std", 0.2, 0.3, 0.4)[0] == 1
    snn.save(net, {**SAID, "classes": sorted(NAMES)})
    assert accuracy_of(capsys, net, images)[0] < 1
    snn.save(net, SAID)
    files = [net, images, "--size", 14, "-T", 4, "--quiet"]
    code, out, err = run(capsys, "profile", *files, "--json")
    assert (code, json.loads(out)["accuracy_by_step"][-1]) == (0, 1)
    assert "has no folder for" in err


def test_predict_many_normalises_as_the_file_says(sorted_images, tmp_path):
    snn, folder = sorted_images
    snn.save(tmp_path / "net.safetensors", SAID)
    snn = qcfs_fast.load(tmp_path / "net.safetensors")
    for asked, want in (((None, None), ([0.5], [0.2, 0.3, 0.4])), (((0.1,), None), ((0.1,), [0.2, 0.3, 0.4]))):
        job = Job(str(tmp_path / "net.safetensors"), "", str(folder / "images"), "parts", 4, 14, *asked, None, None)
        data = job.images(snn)
        assert torch.equal(data.batch([3])[0], open_data(folder / "images", 14, *want).batch([3])[0])


def test_predict_many_goes_on_with_its_own_network_and_data_alone(sorted_images, tmp_path):
    """A worker that starts late, and a run that goes on, may find another network at its place, or other images."""
    snn, folder = sorted_images
    net, images = tmp_path / "net.safetensors", tmp_path / "images"
    shutil.copytree(folder / "images", images)
    snn.save(net, SAID)
    numbers = (4, 14, None, None, None, None)
    job = Job(str(net), Predictor(str(net)).checksum, str(images), str(tmp_path / "parts"), *numbers)
    _settle(job, job.images(snn))
    assert len(_Worker(job).data) == len(job.images(snn))
    _settle(job, job.images(snn))
    snn.save(net)
    with pytest.raises(ValueError, match=r"net.safetensors: is another network than when the job began"):
        _Worker(job)
    with pytest.raises(ValueError, match="holds parts of a job with another checksum"):
        _settle(replace(job, checksum=Predictor(str(net)).checksum), job.images(snn))
    snn.save(net, SAID)
    first = min(images.rglob("*.png"))
    shutil.move(first, first.with_name("z.png"))
    with pytest.raises(ValueError, match="holds parts of a job with another images"):
        _settle(job, job.images(snn))
    for text in ("[1]", "{broken"):
        (tmp_path / "parts" / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest.json: is no manifest of predict_many; remove the file"):
            _settle(job, job.images(snn))


def test_folders_that_do_not_match_the_network(sorted_images, tmp_path, capsys):
    snn, folder = sorted_images
    net = tmp_path / "net.safetensors"
    images = tmp_path / "images"
    shutil.copytree(folder / "images", images)
    for name in NAMES:
        (images / name).mkdir(exist_ok=True)
    snn.save(net)
    assert accuracy_of(capsys, net, images)[0] is not None
    (images / "zebra").mkdir()
    for command in ("eval", "profile"):
        code, out, err = run(capsys, command, net, images, "--size", 14, "--quiet")
        assert (code, out) == (1, "")
        assert "has 6 class folders for 5 outputs" in err
        assert "convert --classes" in err
    snn.save(net, SAID)
    for command in ("eval", "profile"):
        code, out, err = run(capsys, command, net, images, "--size", 14, "--quiet")
        assert (code, out) == (1, "")
        assert "the folder 'zebra' is no class of the network, which has 'owl', 'ant'" in err
        assert "Rename it, or take it away" in err
    assert not list(tmp_path.glob("*.eval"))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"classes": NAMES[:4]}, "classes must be 5 different names, one per output, got 4: "),
        ({"classes": [*NAMES[:4], "owl"]}, "classes must be 5 different names"),
        ({"classes": [*NAMES[:4], ["x"]]}, "classes must be 5 different names"),
        ({"classes": {"owl": 0}}, "classes must be 5 different names"),
        ({"classes": 5}, "classes must be 5 different names, one per output, got 5"),
        ({"mean": [0.5, 0.5]}, "mean must be one number per channel, 3 or 1 for all, got [0.5, 0.5]"),
        ({"mean": []}, "mean must be"),
        ({"mean": "0.5"}, "mean must be"),
        ({"mean": [True]}, "mean must be"),
        ({"mean": [10**400]}, "mean must be"),
        ({"std": [0.0]}, "std must be one positive number per channel"),
        ({"std": [0.2, 0.3, -0.4]}, "std must be"),
        ({"std": {}}, "std must be"),
    ],
)
def test_metadata_that_is_not_of_this_network(said, message, sorted_images, tmp_path, capsys):
    snn, folder = sorted_images
    net = tmp_path / "net.safetensors"
    snn.save(net, {**SAID, **said})
    right, err = accuracy_of(capsys, net, folder / "images")
    assert right is None
    assert f"{net}: in its metadata, {message}" in err
    assert "mend snn.metadata" in err
    if "classes" in said:  # which arrays with labels do not need
        assert accuracy_of(capsys, net, folder / "images.npz")[0] == 1
    else:
        assert accuracy_of(capsys, net, folder / "images", "--mean", 0.5, "--std", 0.2, 0.3, 0.4)[0] == 1


def interrupted(arguments, state, how):
    """Start an evaluation, stop it by a signal when some batches are done; its exit code and the batches kept."""
    process = spawn(*arguments)
    file = state / "0.json"
    deadline = time.monotonic() + 60
    while not (file.exists() and len(json.loads(file.read_text())["batches"]) >= 5):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    return process.returncode, err, len(json.loads(file.read_text())["batches"])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_eval_goes_on_after(how, place, tmp_path, capsys):
    folder, right = place
    arguments = [
        "eval", folder / "net.safetensors", folder / "data.npz", "--steps", *STEPS, "--batch", 1, "--json", "--state",
        tmp_path / "state",
    ]  # fmt: skip
    code, err, kept = interrupted(arguments, tmp_path / "state", how)
    assert code == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert ("every finished batch is kept" in err) == (how == signal.SIGINT)
    assert 5 <= kept < IMAGES
    code, _, err = run(capsys, *arguments, "--batch", 2)
    assert code == 1
    assert "another batch" in err
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert counts(out) == (right, IMAGES, kept)
    assert not (tmp_path / "state").exists()


def test_eval_removes_its_own_files_alone(place, tmp_path, capsys, monkeypatch):
    """Also where the state lies in a folder of other things, anew, and of a run that a dead process left."""
    folder, right = place
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis.json").write_text("{}")
    arguments = ["eval", folder / "net.safetensors", folder / "data.npz", "--steps", *STEPS, "--json", "--state", "."]
    for more in ([], ["--restart"], ["--batch", 2]):
        code, out, err = run(capsys, *arguments, *more)
        assert (code, counts(out)) == (0, (right, IMAGES, 0)), err
        assert os.listdir() == ["thesis.json"]
        (tmp_path / "0.json.0123456789abcdef.part").write_text("half")
    (tmp_path / "7.json").write_text("mine")
    code, _, err = run(capsys, *arguments, "--restart")
    assert (code, err) == (1, "qcfs-fast: error: 7.json: is no state of an evaluation; remove the file to start anew, "
        "or name another place\n")  # fmt: skip
    assert (tmp_path / "7.json").read_text() == "mine"


def test_two_evals_of_one_state(place, tmp_path, capsys):
    """The second names the first, which is not disturbed."""
    folder, _ = place
    with files.sole_user(tmp_path / "state", "--state"):
        arguments = ["eval", folder / "net.safetensors", folder / "data.npz", "--state", tmp_path / "state"]
        for more in ([], ["--restart"]):
            code, _, err = run(capsys, *arguments, *more)
            assert code == 1
            assert err.startswith(f"qcfs-fast: error: {tmp_path / 'state'}: process {os.getpid()} on ")
            assert err.endswith("wait for its end, or give another --state\n")


ABOUT = {"neurons": ["plain"], "steps": [1], "data": ["", 5], "batch": 4}
STATE = {"fingerprint": ABOUT, "batches": [0, 1], "seen": 5, "right": [1]}


@pytest.mark.parametrize(
    "text",
    ["{broken", "[1]", '{"a": 1}', "[" * 2000, json.dumps({**STATE, "right": [1, 2]}),
     *(json.dumps({**STATE, **part}) for part in (
         {"batches": 7}, {"seen": "x"}, {"batches": {}}, {"seen": 4}, {"batches": [0, 0]}, {"batches": [0, 2]},
         {"batches": [], "seen": 0}, {"right": [6]}, {"fingerprint": {**ABOUT, "data": ["", None]}},
     ))],
)  # fmt: skip
def test_a_damaged_state_is_refused(text, place, tmp_path, capsys):
    """Among them counts that its batches cannot have: each would be a wrong accuracy."""
    folder, _ = place
    assert evaluation._is_state(STATE)
    (tmp_path / "0.json").write_text(text)
    code, _, err = run(capsys, "eval", folder / "net.safetensors", folder / "data.npz", "--state", tmp_path)
    assert code == 1
    assert err.startswith(f"qcfs-fast: error: {tmp_path / '0.json'}: is no state of an evaluation; remove the file")
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.long
def test_eval_in_two_processes(place, tmp_path):
    """One process is killed, two go on: the counts are those of one that ran through."""
    folder, right = place
    arguments = [
        "eval", folder / "net.safetensors", folder / "data.npz", "--steps", *STEPS, "--batch", 4, "--json", "--quiet",
        "--state", tmp_path / "state",
    ]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    _, _, kept = interrupted(arguments, tmp_path / "state", signal.SIGKILL)
    process = spawn(*arguments, launcher=launcher)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert kept < IMAGES // 4 - 5  # both had work
    assert counts(out) == (right, IMAGES, 4 * kept)


def test_processes_share_the_batches(tmp_path):
    """Two ranks do disjoint batches that cover all, also after a run with three."""
    fingerprint = {**ABOUT, "data": ["", 9], "batch": 1}
    for rank, done in enumerate([[0, 3], [1, 4], [2]]):
        state = evaluation.State(tmp_path, fingerprint, rank)
        state.own.batches, state.own.seen = done, len(done)
        state.write()
    states = [evaluation.State(tmp_path, fingerprint, rank) for rank in range(2)]
    assert all(s.done() == {0, 1, 2, 3, 4} for s in states)
    left = [b for b in range(9) if b not in states[0].done()]
    assert sorted(left[0::2] + left[1::2]) == [5, 6, 7, 8]
    with pytest.raises(ValueError, match="another steps"):
        evaluation.State(tmp_path, {**fingerprint, "steps": [2]}, 0)


def test_eval_errors(place, tmp_path, capsys):
    folder, _ = place
    net = folder / "net.safetensors"
    (tmp_path / "half.safetensors").write_bytes(net.read_bytes()[:3000])
    (tmp_path / "half.npz").write_bytes((folder / "data.npz").read_bytes()[:3000])
    (tmp_path / "text.npz").write_text("nothing")
    (tmp_path / "empty").mkdir()
    x = np.zeros((4, 3, 10, 12), np.float32)
    np.savez(tmp_path / "keys.npz", x=x, y=np.zeros(4, int))
    np.savez(tmp_path / "labels.npz", images=x, labels=np.zeros(3, int))
    np.savez(tmp_path / "objects.npz", images=np.array([{}], dtype=object), labels=np.zeros(1, int))
    np.savez(tmp_path / "none.npz", images=x[:0], labels=np.zeros(0, int))
    np.savez(tmp_path / "scalars.npz", images=np.float32(3), labels=np.int64(3))
    for name, label in (("below", -1), ("above", 5), ("far", 1 << 62)):
        np.savez(tmp_path / f"{name}.npz", images=x, labels=np.array([0, 1, label, 4]))
    np.savez(tmp_path / "channels.npz", images=x[:, :2], labels=np.zeros(4, int))
    cases = [
        (tmp_path / "absent.safetensors", folder / "data.npz", "no file"),
        (tmp_path / "half.safetensors", folder / "data.npz", "not a complete safetensors file"),
        (net, tmp_path / "absent.npz", "no data at"),
        (net, tmp_path / "half.npz", "not a complete .npz file"),
        (net, tmp_path / "text.npz", "not a complete .npz file"),
        (net, tmp_path / "empty", "no images in class subfolders"),
        (net, tmp_path / "keys.npz", "has no array images or labels, only x, y"),
        (net, tmp_path / "labels.npz", "labels must be 4 integers"),
        (net, tmp_path / "objects.npz", "not a complete .npz file"),
        (net, tmp_path / "none.npz", "none.npz: its array images, of shape [0, 3, 10, 12], holds no image"),
        (net, tmp_path / "scalars.npz", "scalars.npz: its array images, of shape [], holds no image"),
        (
            net,
            tmp_path / "below.npz",
            "below.npz: labels run from -1 to 4, but the network has 5 classes, counted from 0 to 4; mend the labels",
        ),
        (net, tmp_path / "above.npz", "labels run from 0 to 5"),
        (net, tmp_path / "far.npz", f"labels run from 0 to {1 << 62}"),
        (
            net,
            tmp_path / "channels.npz",
            "expected an input of shape [N, 3, H, W], or [T, N, 3, H, W] over time; got [4, 2, 10, 12]",
        ),
    ]
    for network, data, message in cases:
        code, out, err = run(capsys, "eval", network, data, "--quiet", "--state", tmp_path / "state")
        assert (code, out) == (1, ""), data
        assert message in err
        assert "Traceback" not in err
    code, _, err = run(capsys, "eval", net, folder / "data.npz", "--steps", 1000)
    assert (code, "beyond this network's overflow bound" in err) == (1, True)


# ------------------------------------------------------------------------------------------- profile


def test_profile(place, tmp_path, capsys):
    folder, _ = place
    files = [folder / "net.safetensors", folder / "data.npz", "--html", tmp_path / "report.html"]
    code, out, err = run(capsys, "profile", *files, "--quiet", "--json", "--images", 20)
    assert code == 0, err
    assert isinstance(json.loads(out), dict)
    assert "<html" in (tmp_path / "report.html").read_text().lower()
