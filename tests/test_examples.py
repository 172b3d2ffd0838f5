"""The training script on a tiny generated folder of images, interrupted and resumed."""

import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision_models  # noqa: F401 - makes torchvision importable here
from PIL import Image

import qcfs_fast

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "train_qcfs.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_qcfs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    options = "--model resnet18 --image-size 32 --batch 6 --workers 0 --lr 0.01 --threshold 2 --levels 4 --steps 1 4"
    common = [*options.split(), "--data", str(folder), "--output", str(folder / "run")]
    script.main([*common, "--epochs", "1"])
    script.main([*common, "--epochs", "2", "--calibrate"])
    out = capsys.readouterr().out
    assert "going on after epoch 1" in out
    assert "SNN, T =   4:" in out
    snn = qcfs_fast.load(folder / "run" / "snn.safetensors")
    assert snn(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


@pytest.mark.slow
def test_cifar10(script, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        batch = {b"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), b"labels": list(range(4))}
        (tmp_path / name).write_bytes(pickle.dumps(batch))
    options = "--format cifar10 --model vgg11_bn --image-size 32 --epochs 1 --batch 10 --workers 0 --lr 0.001 --steps 2"
    script.main([*options.split(), "--data", str(tmp_path), "--output", str(tmp_path / "run")])
    assert "SNN, T =   2:" in capsys.readouterr().out


def test_clear_errors(script, tmp_path):
    with pytest.raises(SystemExit, match="does not exist; --data needs train/"):
        script.main(["--data", str(tmp_path)])
    with pytest.raises(SystemExit, match="torchvision has no model"):
        script.main(["--data", str(tmp_path), "--model", "resnet19"])
    with pytest.raises(SystemExit, match="cifar-10-batches-py"):
        script.main(["--data", str(tmp_path), "--format", "cifar10"])
