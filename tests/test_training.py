"""train: the loop follows its recipe, learns, and ends with the same weights however often it is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcfs_fast
from qcfs_fast import QCFS, files
from qcfs_fast.study import training
from qcfs_fast.study.command_line import main
from qcfs_fast.study.data import MEAN, STD, Arrays, batches
from qcfs_fast.study.datasets import open_data
from qcfs_fast.study.networks import SMALL, small_network
from qcfs_fast.study.trained import Trained, load_trained, save_trained, trained_about
from qcfs_fast.study.training import Epoch, Recipe, train


def bars(count=200, size=12, seed=0):
    """Images of a bright bar, upright or lying, and noise; uint8 [N, 1, size, size]."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    images = rng.integers(0, 90, (count, 1, size, size))
    for image, label, place in zip(images, labels, rng.integers(2, size - 3, count), strict=True):
        view = image[0].T if label else image[0]
        view[place : place + 2] += 150
    return Arrays(Path("bars"), images.astype(np.uint8), labels, (0.3,), (0.3,))


def network(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), QCFS(4, 2.0), nn.AvgPool2d(2), nn.Flatten(),
        nn.Dropout(dropout), nn.Linear(6 * 36, 2),
    )  # fmt: skip


def test_it_learns_and_converts(tmp_path):
    model = network()
    data, test = bars(), bars(100, seed=1)
    log = train(model, data, Recipe(epochs=6, batch=20, rate=0.02), test, tmp_path, progress=False)
    assert [line["epoch"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert log[-1]["test_accuracy"] > 0.95 > log[0]["loss"]
    assert log[-1]["test_accuracy"] == training.accuracy(model, test)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == log
    assert not model.training
    x, y = test.batch(range(100))
    snn = qcfs_fast.convert(model, T=4, neuron="sum")
    assert float((snn(x).argmax(1) == y).float().mean()) == log[-1]["test_accuracy"]
    training.plot(log, tmp_path / "training.png", "bars")
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_one_step_is_sgd_with_momentum_and_decay():
    data, model, other = bars(20), network(), network()
    recipe = Recipe(epochs=1, batch=10, rate=0.3, decay=0.01, augment=())
    train(model, data, recipe, progress=False)
    velocity = [torch.zeros_like(p) for p in other.parameters()]
    epoch = Epoch(data, recipe, 0, 0)
    for x, y in (epoch[0], epoch[1]):
        other.zero_grad()
        F.cross_entropy(other(x), y).backward()
        for p, v in zip(other.parameters(), velocity, strict=True):
            with torch.no_grad():
                v.mul_(0.9).add_(p.grad + 0.01 * p)
                p -= 0.3 * v
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_the_rate_follows_a_cosine():
    log = train(network(), bars(20), Recipe(epochs=4, batch=10, rate=0.2), progress=False)
    assert [line["rate"] for line in log] == pytest.approx([0.1 * (1 + np.cos(np.pi * e / 4)) for e in range(4)])


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    data = bars(60)
    recipe = Recipe(epochs=2, batch=20, augment=())

    def seen(epoch, **share):
        found = Epoch(data, recipe, epoch, 0, **share)
        return [found[i][0].sum((1, 2, 3)).tolist() for i in range(len(found))]

    every = sorted(data.batch(range(60))[0].sum((1, 2, 3)).tolist())
    assert sorted(value for batch in seen(0) for value in batch) == pytest.approx(every)
    assert seen(0) == seen(0) != seen(1)
    halves = [seen(0, rank=r, world=2) for r in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(b) for b in seen(0)]


def test_augmentations():
    x = torch.randint(1, 256, (40, 3, 9, 7), dtype=torch.uint8)
    torch.manual_seed(0)
    moved = training._shifted(x, 2)
    places = set()
    for before, after in zip(x, moved, strict=True):
        padded = F.pad(before, (2, 2, 2, 2))
        found = [(i, j) for i in range(5) for j in range(5) if torch.equal(padded[:, i : i + 9, j : j + 7], after)]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 15
    flipped = training._flipped(x)
    same = [torch.equal(a, b) for a, b in zip(x, flipped, strict=True)]
    assert all(s or torch.equal(a.flip(2), b) for s, a, b in zip(same, x, flipped, strict=True))
    assert 5 < sum(same) < 35
    cut = training._cut_out(torch.ones(50, 3, 32, 32))
    for image in cut:
        rows, columns = (image[0] == 0).nonzero().unbind(1)
        assert torch.equal(image[0], image[1])
        area = int((rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1))
        assert 8 * 8 <= area == len(rows) <= 16 * 16
    policy = training._auto_augmented(torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8))
    assert (policy.dtype, policy.shape) == (torch.uint8, (6, 3, 32, 32))


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from pathlib import Path
from test_training import bars, network
from qcfs_fast.study.training import Recipe, train
recipe = Recipe(epochs=6, batch=10, rate=0.05, save_minutes=1e-9)
model = network(dropout=0.3)
train(model, bars(150), recipe, bars(50, seed=1), Path(sys.argv[1]), progress=False)
torch.save(model.state_dict(), sys.argv[1] + "/end.pt")
"""


@pytest.mark.slow
@pytest.mark.long
def test_killed_at_random_moments_it_ends_with_the_same_weights(tmp_path):
    def start(folder):
        (tmp_path / folder).mkdir(exist_ok=True)
        script = SCRIPT.format(tests=str(Path(__file__).parent))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-c", script, str(tmp_path / folder)], cwd=tmp_path, env=environment)

    assert start("whole").wait() == 0
    rng, kills, folder = np.random.default_rng(0), 0, tmp_path / "killed"
    for _ in range(4):
        process = start("killed")
        before = (folder / "state.pt").stat().st_mtime_ns if (folder / "state.pt").exists() else 0
        while process.poll() is None:
            if (folder / "state.pt").exists() and (folder / "state.pt").stat().st_mtime_ns != before:
                time.sleep(float(rng.uniform(0, 0.15)))  # then it is in the middle of something
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        if process.wait() == 0:
            break
        kills += 1
    assert kills >= 2
    assert start("killed").wait() == 0
    want, got = (torch.load(tmp_path / f / "end.pt", weights_only=True) for f in ("whole", "killed"))
    assert all(torch.equal(want[k], got[k]) for k in want)
    logs = [
        [json.loads(line) for line in (tmp_path / f / "log.jsonl").read_text().splitlines()]
        for f in ("whole", "killed")
    ]
    for a, b in zip(*logs, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_a_state_of_another_training_is_refused(tmp_path):
    train(network(), bars(40), Recipe(epochs=1, batch=20), output=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"another rate"):
        train(network(), bars(40), Recipe(epochs=1, batch=20, rate=0.5), output=tmp_path, progress=False)
    whole = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"is no state of a training"):
        train(network(), bars(40), Recipe(epochs=1, batch=20), output=tmp_path, progress=False)


def test_a_damaged_state_is_refused(tmp_path):
    recipe = Recipe(epochs=1, batch=20)
    train(network(), bars(40), recipe, output=tmp_path, progress=False)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    damaged = [{k: v for k, v in state.items() if k != lost} for lost in ("epoch", "optimizer", "facts")]
    damaged += [{**state, **part} for part in (
        {"log": 7}, {"log": [7]}, {"model": {}}, {"schedule": {}}, {"epoch": 3}, {"sums": [0.0]}, {"batch": "x"},
    )]  # fmt: skip
    for kept in [*damaged, [1], 7]:
        torch.save(kept, tmp_path / "state.pt")
        with pytest.raises(ValueError, match=r"state\.pt: is no state of a training \(.*remove it to start anew"):
            train(network(), bars(40), recipe, output=tmp_path, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1"),
        ({"batch": 1}, "batch must be an integer of at least 2"),
        ({"rate": float("nan")}, "rate must be a positive number"),
        ({"decay": -1.0}, "decay must be a number of at least 0"),
        ({"augment": ("mirror",)}, "augment has 'mirror'"),
        ({"seed": True}, "seed must be an integer"),
    ],
)
def test_wrong_recipes(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**change)


def test_a_loss_that_is_not_finite_stops_it():
    model = network()
    model[6].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"the loss became nan in epoch 1, batch 1; lower the rate"):
        train(model, bars(40), Recipe(epochs=1, batch=20), progress=False)


def test_thresholds_stay_positive():
    model = network()
    model[2].thresh.data.fill_(0.01)
    train(model, bars(100), Recipe(epochs=2, batch=10, rate=5.0, decay=0.1), progress=False)
    assert float(model[2].thresh) >= training.SMALLEST_THRESHOLD


# ------------------------------------------------------------------------------- networks and trained files


@pytest.mark.filterwarnings("ignore:convert. no threshold")
@pytest.mark.parametrize("name", SMALL)
def test_small_networks_convert(name):
    torch.manual_seed(0)
    model = small_network(name, 7, channels=1, levels=4, threshold=1.0, width=0.0625).eval()
    x = torch.rand(2, 1, 32, 32)
    assert qcfs_fast.convert(model, T=2)(x).shape == model(x).shape == (2, 7)
    depth = int(name[-2:])
    layers = sum(
        isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)) for m in model.modules()
    )
    assert layers == depth if name != "cifar-resnet20" else layers == 20


def test_small_networks_refuse():
    with pytest.raises(ValueError, match=r"no network 'vgg16' for small images; known: cifar-vgg11"):
        small_network("vgg16", 10)
    with pytest.raises(ValueError, match="must have 32 pixels or more, got 28"):
        small_network("cifar-vgg16", 10, size=28)


ABOUT = Trained("cifar-resnet20", "fashion-mnist", 3, (1, 32, 32), 4, 0.25, mean=(0.3,), std=(0.3,), epochs=2)


@pytest.mark.filterwarnings("ignore:convert. no threshold")
def test_a_trained_file_goes_round(tmp_path, capsys):
    torch.manual_seed(0)
    model = ABOUT.build(1.0).eval()
    save_trained(tmp_path / "model.safetensors", model, ABOUT)
    again, about = load_trained(tmp_path / "model.safetensors")
    assert about == ABOUT
    x = torch.rand(2, 1, 32, 32)
    assert torch.equal(again(x), model(x))
    assert main(["convert", str(tmp_path / "model.safetensors"), "--output", str(tmp_path / "snn.safetensors")]) == 0
    assert torch.equal(qcfs_fast.load(tmp_path / "snn.safetensors")(x), qcfs_fast.convert(model)(x))
    assert qcfs_fast.load(tmp_path / "snn.safetensors").input_shape == (1, 32, 32)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("classes", 0, "classes must be an integer from 1"),
        ("classes", 1 << 40, "classes must be an integer from 1"),
        ("levels", True, "levels must be an integer"),
        ("shape", [1, 32], "shape must be three integers"),
        ("shape", [1, -3, 3], "shape must be an integer from 1"),
        ("width", 1e9, "width must be in"),
        ("network", "../x", "network must be a name"),
        ("names", ["a", "b"], "classes must be 3 different names"),
        ("names", "abc", "classes must be 3 different names"),
        ("mean", [0.1, 0.2], "mean must be one number"),
        ("std", [0], "std must be one positive number"),
        ("replace", "SiLU", "replace must be names"),
        ("replace", [1], "replace must be names"),
        ("extra", 1, "other fields"),
    ],
)
def test_damaged_metadata_is_refused(tmp_path, field, value, message):
    from dataclasses import asdict

    from safetensors.torch import save_file

    about = json.dumps({**asdict(ABOUT), field: value})
    save_file({"a": torch.zeros(1)}, str(tmp_path / "m.safetensors"), {"qcfs_fast_trained": about})
    with pytest.raises(qcfs_fast.FormatError, match=message):
        load_trained(tmp_path / "m.safetensors")


def test_files_that_are_not_trained_ones(tmp_path):
    (tmp_path / "half").write_bytes(b"1234")
    assert trained_about(tmp_path / "half") is None
    with pytest.raises(qcfs_fast.FormatError, match="no file of qcfs-fast train"):
        load_trained(tmp_path / "half")
    with pytest.raises(FileNotFoundError, match="make one by qcfs-fast train"):
        load_trained(tmp_path / "none")


# --------------------------------------------------------------------------------------------- command line


@pytest.fixture
def folder(tmp_path):
    """A folder of coloured images: train/ and val/, red ones and blue ones."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 5)):
        for channel, kind in ((0, "red"), (2, "blue")):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 130
                Image.fromarray(pixels).save(tmp_path / "data" / split / kind / f"{i}.png")
    return tmp_path


def test_restart_removes_its_own_files_alone(folder, capsys):
    options = ["--network", "cifar-resnet20", "--width", "0.25", "--epochs", "1", "--batch", "8", "--size", "32"]
    out = folder / "run"
    arguments = ["train", str(folder / "data"), *options, "--threshold", "2", "--output", str(out), "--quiet"]
    assert main(arguments) == 0
    written = {"state.pt", "log.jsonl", "model.safetensors", "training.png"}
    assert {p.name for p in out.iterdir()} == written
    (out / "thesis.tex").write_text("mine")
    with files.sole_user(out, "--output"):
        assert main([*arguments, "--restart"]) == 1
        assert "works in it; wait for its end, or give another --output" in capsys.readouterr().err
    assert main([*arguments, "--restart", "--threshold", "0"]) == 1
    assert {p.name for p in out.iterdir()} == written | {"thesis.tex"}
    before = (out / "state.pt").stat().st_mtime_ns
    assert main([*arguments, "--restart"]) == 0
    assert {p.name for p in out.iterdir()} == written | {"thesis.tex"}
    assert (out / "state.pt").stat().st_mtime_ns != before


def test_train_then_study(folder, capsys):
    data, run = str(folder / "data"), str(folder / "run")
    options = ["--network", "cifar-resnet20", "--width", "0.25", "--epochs", "3", "--batch", "8", "--size", "32"]
    arguments = ["train", data, *options, "--threshold", "2", "--rate", "0.02", "--output", run, "--quiet"]
    assert main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 5
    assert out[0].startswith("epoch   1   loss")
    assert all(len(line) <= 80 for line in out[:4])
    _, about = load_trained(folder / "run" / "model.safetensors")
    assert (about.classes, about.shape, about.epochs, about.data) == (2, (3, 32, 32), 3, "data")
    assert (about.names, about.mean, about.std) == (("blue", "red"), MEAN, STD)
    assert "--width 0.25" in about.recipe
    assert main([*arguments, "--json"]) == 0  # goes on from the end: nothing is left to do
    assert json.loads(capsys.readouterr().out)["log"][-1]["test_accuracy"] == about.accuracy
    assert main([*arguments[:-1], "--levels", "8"]) == 1
    assert "another levels" in capsys.readouterr().err
    study = ["study", run + "/model.safetensors", data, "--output", str(folder / "study"), "--quiet", "--no-compile"]
    assert main([*study, "--steps", "1", "4", "--neuron", "plain", "sum", "--firing", "4"]) == 0
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines())
    assert {p.name for p in (folder / "study").iterdir()} == {
        "results.json",
        "accuracy.png",
        "latency.png",
        "study.html",
    }


def test_a_network_is_trained_without_its_gates(folder, capsys):
    run, net = folder / "run", folder / "net.safetensors"
    options = ["--network", "mobilenet_v3_small", "--epochs", "1", "--batch", "8", "--size", "32", "--rate", "0.001"]
    arguments = ["train", str(folder / "data"), *options, "--calibrate", "8", "--output", str(run), "--quiet"]
    assert main(arguments) == 1
    assert "replace={SqueezeExcitation}) leaves it out" in capsys.readouterr().err
    assert main([*arguments, "--replace", "Hardswish", "SqueezeExcitation"]) == 0
    model, about = load_trained(run / "model.safetensors")
    assert about.replace == ("Hardswish", "SqueezeExcitation")
    assert "--replace Hardswish SqueezeExcitation" in about.recipe
    assert main(["convert", str(run / "model.safetensors"), "--output", str(net)]) == 0
    x, _ = next(batches(open_data(folder / "data", 32), 5))
    assert torch.equal(qcfs_fast.load(net)(x), qcfs_fast.convert(model)(x))


def test_classes_go_from_train_to_eval(folder, capsys):
    """What train knows stands in its file and in that of convert; folders are numbered by name, before any training."""
    data, run, net = folder / "data", str(folder / "run"), str(folder / "net.safetensors")
    options = ["--network", "cifar-resnet20", "--width", "0.25", "--epochs", "1", "--size", "32", "--threshold", "2"]
    arguments = ["train", str(data), *options, "--output", run, "--quiet"]
    (data / "val" / "green").mkdir()
    assert main(arguments) == 1
    assert "the folder 'green' is no class of the network, which has 'blue', 'red'" in capsys.readouterr().err
    (data / "val" / "green").rmdir()
    (data / "val" / "blue").rename(folder / "blue")
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert "has no folder for 1 of 2 classes: blue" in err
    assert main(["convert", run + "/model.safetensors", "--output", net]) == 0
    said = qcfs_fast.load(net).metadata
    assert (said["classes"], said["mean"], said["std"]) == (["blue", "red"], list(MEAN), list(STD))
    capsys.readouterr()
    model, about = load_trained(folder / "run" / "model.safetensors")
    assert main(["eval", net, str(data), "--steps", "32", "--quiet", "--json"]) == 0
    reds, _ = next(batches(open_data(data, 32), 5))
    right = int((qcfs_fast.load(net)(reds, 32).argmax(1) == 1).sum())  # not 0, as if it were the only class
    assert json.loads(capsys.readouterr().out)["accuracy"][0]["right"] == right
    assert json.loads(out)["log"][-1]["test_accuracy"] == int((model(reds).argmax(1) == 1).sum()) / 5
    (data / "val" / "green").mkdir()
    study = ["study", run + "/model.safetensors", str(data), "--output", str(folder / "study"), "--quiet"]
    assert main(study) == 1
    assert "the folder 'green' is no class" in capsys.readouterr().err
    save_trained(folder / "run" / "model.safetensors", model, replace(about, names=None))  # as before files had names
    (data / "val" / "blue").mkdir()
    assert main(study) == 1
    assert "has 3 class folders for 2 outputs" in capsys.readouterr().err


def test_train_refuses(folder, capsys):
    data = str(folder / "data")
    cases = {
        ("--network", "resnet99"): "'resnet99' is no torchvision network",
        ("--threshold", "-1"): "--threshold must be a positive number",
        ("--weights", "DEFAULT"): "has no published weights",
        ("--replace", "SiLU"): "activations of QCFS alone",
        ("--width", "1", "--rate", "0"): "rate must be a positive number",
    }
    for options, message in cases.items():
        assert main(["train", data, "--size", "32", "--output", str(folder / "o"), "--quiet", *options]) == 1
        assert message in capsys.readouterr().err
    assert main(["train", str(folder / "none"), "--output", str(folder / "o")]) == 1
    assert "no data at" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.long
def test_several_processes(folder):
    """Two processes of torchrun: gradients are averaged, one of them writes, and the run goes on by itself."""
    run = folder / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "qcfs_fast", "train"]
    options = ["--network", "cifar-resnet20", "--width", "0.25", "--size", "32", "--batch", "8", "--device", "cpu"]
    common = [*options, "--threshold", "2", "--rate", "0.02", "--quiet", "--output", str(run), "--calibrate", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, str(folder / "data"), *common, "--epochs", "2"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ANN: ") == 1
    assert len((run / "log.jsonl").read_text().splitlines()) == 2
    _, about = load_trained(run / "model.safetensors")
    assert about.epochs == 2
    again = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0
    assert f"ANN: {about.accuracy:.2%}" in again.stdout
