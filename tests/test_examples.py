"""The examples, made short: training on a tiny generated folder, interrupted and resumed; recordings of events."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision_models  # noqa: F401 - makes torchvision importable here
from PIL import Image

import qcfs_fast

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    """As a script's own folder is searched."""
    monkeypatch.syspath_prepend(EXAMPLES)


def example(name):
    path = EXAMPLES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return example("train_qcfs")


@pytest.fixture(scope="module")
def events():
    pytest.importorskip("sklearn")
    return example("event_stream")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for label, colour in (("red", 0), ("blue", 2)):
            place = tmp_path / part / label
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (40, 50, 3), dtype=np.uint8)
                pixels[..., colour] += 150
                Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path


def test_train_convert_and_resume(script, folder, capsys):
    options = "--model resnet18 --size 32 --epochs 2 --rate 0.01 --levels 4 --steps 1 4"
    common = [str(folder), *options.split(), "--output", str(folder / "run")]
    script.main(common)
    script.main(common)  # trained already
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 6
    assert out[:3] == out[3:]
    assert re.fullmatch(r"plain   T = 1: \S+%   T = 4: \S+%", out[1])
    assert re.fullmatch(r"offset  T = 1: \S+%   T = 4: \S+%", out[2])
    snn = qcfs_fast.load(folder / "run" / "offset.safetensors")
    assert snn(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


def test_the_network_of_ones_own(script, folder, capsys):
    script.main([str(folder), "--size", "32", "--epochs", "1", "--output", str(folder / "run"), "--steps", "2"])
    assert "offset  T = 2: " in capsys.readouterr().out


def test_sums_of_events_hide_the_rotation(events, monkeypatch):
    """A way and its reverse: increases are decreases, frame by frame from the end; all frames together are the same."""
    monkeypatch.setattr(events, "NOISE", 0.0)
    scans = events.digits().test_x[:20]
    one, other = (
        events.record(scans, torch.full((20,), way), torch.Generator().manual_seed(1)).long() for way in (True, False)
    )
    assert one.shape == (12, 20, 2, 16, 16)
    assert 0.05 < (one > 0).float().mean() < 0.5
    assert (one - other.flip(0, 2)).abs().sum() < 0.5 * one.sum() < (one - other).abs().sum()
    sums = one.sum(0)
    for same in (one.flip(2).sum(0), other.sum(0)):
        assert (sums - same).abs().sum() < 0.05 * sums.sum()


def test_answers_leg_by_leg(events):
    """The mean of the logits of all steps, each leg from a fresh start."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(2, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 14 * 14, 5)]
    model = qcfs_fast.prepare(torch.nn.Sequential(*layers), levels=4)
    qcfs_fast.calibrate(model, [4 * torch.rand(8, 2, 16, 16)], progress=False)
    snn = qcfs_fast.convert(model)
    frames = torch.randint(0, 5, (12, 6, 2, 16, 16), dtype=torch.uint8)
    answers = events.leg_by_leg(snn, frames)
    assert torch.allclose(answers[2], snn(frames[:3]))
    assert torch.allclose(answers[5], (4 * snn(frames[:4]) + 2 * snn(frames[4:6])) / 6)
    assert torch.allclose(answers[11], (snn(frames[:4]) + snn(frames[4:8]) + snn(frames[8:])) / 3)
    assert not torch.allclose(answers[11], snn(frames))


def test_mean_iou():
    pytest.importorskip("sklearn")
    script = example("segmentation")
    wanted = torch.tensor([[0, 0, 1, 1]])
    assert script.mean_iou(wanted, wanted) == 1
    assert script.mean_iou(torch.tensor([[0, 1, 1, 1]]), wanted) == pytest.approx((1 / 2 + 2 / 3) / 2)
    images, classes = script.labelled(8, test=True, seed=0)
    assert images.shape == (8, 1, 32, 32)
    background = classes == script.CLASSES - 1
    assert 0.5 < background.float().mean() < 0.95
    assert images[:, 0][background].max() <= 0.2 + 0.8 * 0.25
    assert images[:, 0][~background].min() > 0.8 * 0.25


@pytest.mark.slow
@pytest.mark.long
def test_segmentation(capsys):
    pytest.importorskip("sklearn")
    example("segmentation").main(["--train", "1000", "--test", "40", "--epochs", "8", "--steps", "1", "8"])
    ann, first, last = (float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines())
    assert ann > 0.15  # 0.08 for all background
    assert last > max(first, 0.8 * ann)


def test_average_precision():
    pytest.importorskip("sklearn")
    script = example("detection")
    images, digits = script.canvases(6, test=True, seed=0, largest=script.LARGEST)
    sizes = {d.pixels.shape[0] for of_canvas in digits for d in of_canvas}
    assert min(sizes) < 12 < max(sizes) <= 16
    for image, of_canvas in zip(images[:, 0], digits, strict=True):
        for d in of_canvas:
            assert image[d.place].shape == d.pixels.shape
            assert (image[d.place] >= 0.8 * d.pixels).all()
    # What training asks for, decoded, are the digits' boxes.
    wanted = [script.targets(digits, i, 32 // stride) for i, stride in enumerate(script.STRIDES)]
    assert [w[0].sum() for w in wanted] > [0, 0]
    perfect = [torch.cat((20 * classes - 10, edges), 1) for classes, edges in wanted]
    found = script.decoded(perfect)
    assert [len(f.scores) for f in found] == [len(of_canvas) for of_canvas in digits]
    assert script.average_precision(found, digits) == 1
    # One more of low score in front of none costs nothing; one of high score does; the same box twice is one.
    edges = torch.tensor([[0.0, 0.0, 3.0, 3.0]])
    for score, area in ((0.0, 1.0), (2.0, 0.5)):
        extra = [
            script.Boxes(torch.cat((f.edges, edges)), torch.cat((f.scores, torch.tensor([score]))), c)
            for f in found
            for c in [torch.cat((f.classes, f.classes[:1] if len(f.classes) else torch.tensor([0])))]
        ]
        assert area <= script.average_precision(extra, digits) <= (1 if score == 0 else 0.95)
    assert script.average_precision([script.Boxes(*(v[:0] for v in f)) for f in found], digits) == 0


@pytest.mark.slow
@pytest.mark.long
def test_detection(capsys):
    pytest.importorskip("sklearn")
    example("detection").main(["--train", "1800", "--test", "40", "--epochs", "12", "--steps", "1", "32"])
    ann, first, last = (float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines())
    assert ann > 0.05
    assert last > max(first, 0.7 * ann)


@pytest.mark.slow
def test_event_stream(events, capsys):
    events.main(["--epochs", "1", "--copies", "1"])
    out = capsys.readouterr().out.splitlines()
    assert max(map(len, out)) <= 80
    rows = [[float(share.rstrip("%")) for share in line.split()] for line in out[-len(events.SHOWN) :]]
    assert [row[0] for row in rows] == list(events.SHOWN)
    assert min(rows[-1][1:4]) > 30  # of 20 classes
    by_leg, by_sum = (float(re.search(r"rotation ([\d.]+)%", line)[1]) for line in out[:2])
    assert by_leg > 80
    assert 35 < by_sum < 65
