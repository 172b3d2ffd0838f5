"""Data sets by name: their files are read as published, and nothing else is."""

import dataclasses
import gzip
import hashlib
import pickle

import numpy as np
import pytest
import torch

from qcfs_fast.study import datasets
from qcfs_fast.study.data import Arrays, Folder, random_box
from qcfs_fast.study.datasets import NAMED, open_data, open_named


def published(monkeypatch, name, split, contents):
    """Declare these contents to be a data set's published ones."""
    named = NAMED[name]
    sums = {file: hashlib.md5(content).hexdigest() for file, content in zip(named.files[split], contents, strict=True)}
    monkeypatch.setitem(NAMED, name, dataclasses.replace(named, files={**named.files, split: sums}))


def idx(array):
    head = (0x0800 + array.ndim).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.tobytes()


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """Two images in Fashion-MNIST's files, in a folder of data sets."""
    images = np.arange(2 * 28 * 28, dtype=np.int64).reshape(2, 28, 28).astype(np.uint8)
    contents = [idx(images), idx(np.array([9, 3], np.uint8))]
    published(monkeypatch, "fashion-mnist", "test", contents)
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for file, content in zip(NAMED["fashion-mnist"].files["test"], contents, strict=True):
        (folder / file).write_bytes(gzip.compress(content))
    monkeypatch.setenv(datasets.ROOT, str(tmp_path))
    return folder, images


def test_fashion_mnist(fashion):
    data = open_data(datasets.Path("fashion-mnist"))
    x, y = data.batch(range(2))
    assert y.tolist() == [9, 3]
    assert x.shape == (2, 1, 32, 32)
    want = torch.zeros(2, 1, 32, 32)
    want[:, 0, 2:30, 2:30] = torch.from_numpy(fashion[1]) / 255
    assert torch.equal(x, (want - torch.tensor(0.286)) / torch.tensor(0.353))
    assert torch.equal(data.batch([1])[0], x[1:])


def test_a_file_that_is_not_the_published_one(fashion):
    file = fashion[0] / "t10k-labels-idx1-ubyte.gz"
    whole = file.read_bytes()
    file.write_bytes(gzip.compress(gzip.decompress(whole)[:-1] + b"\0"))
    with pytest.raises(ValueError, match=r"t10k-labels.*its checksum differs"):
        open_named("fashion-mnist", "test")
    for length in range(0, len(whole), 5):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"t10k-labels.*(damaged|checksum)"):
            open_named("fashion-mnist", "test")


def test_missing_files_are_explained(fashion, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images.*apt-get install dataset-fashion-mnist.*QCFS_FAST_DATA"):
        open_named("fashion-mnist", "train", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"cifar10: no test_batch.*python version"):
        open_named("cifar10", "test", tmp_path)
    with pytest.raises(FileNotFoundError, match="one of fashion-mnist, cifar10, cifar100"):
        open_data(tmp_path / "none")


@pytest.mark.parametrize(("name", "key"), [("cifar10", b"labels"), ("cifar100", b"fine_labels")])
def test_cifar(tmp_path, monkeypatch, name, key):
    rows = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    content = pickle.dumps({b"data": rows, key: [1, 2, 0]}, protocol=2)
    published(monkeypatch, name, "test", [content])
    (tmp_path / next(iter(NAMED[name].files["test"]))).write_bytes(content)
    data = open_named(name, "test", tmp_path)
    assert data.labels.tolist() == [1, 2, 0]
    assert np.array_equal(data.images, rows.reshape(3, 3, 32, 32))


class Hostile:
    def __reduce__(self):
        import os

        return os.system, ("echo ran > hostile",)


def test_a_forged_pickle_runs_nothing(tmp_path, monkeypatch):
    content = pickle.dumps({b"data": Hostile(), b"labels": [0]}, protocol=2)
    published(monkeypatch, "cifar10", "test", [content])  # even with the right checksum
    (tmp_path / "test_batch").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"asks for .*system, which no such file needs"):
        open_named("cifar10", "test", tmp_path)
    assert not (tmp_path / "hostile").exists()


def test_split_folders_and_random_parts(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for kind in ("cat", "dog"):
            (tmp_path / split / kind).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / kind / f"{i}.png")
    training = open_data(tmp_path, 24, split="train")
    assert (len(training), len(open_data(tmp_path, 24))) == (6, 4)
    assert isinstance(training, Folder)
    torch.manual_seed(0)
    x, y = training.pixels([5, 0], random=True)
    assert (x.dtype, tuple(x.shape), y.tolist()) == (torch.uint8, (2, 3, 24, 24), [1, 0])
    torch.manual_seed(0)
    assert torch.equal(training.pixels([5, 0], random=True)[0], x)
    assert not torch.equal(training.pixels([5, 0], random=True)[0], x)


def test_random_boxes_lie_in_the_image():
    for place in np.random.default_rng(0).random((500, 4)).tolist():
        left, top, right, bottom = random_box((40, 30), place)
        assert 0 <= left < right <= 40.0001
        assert 0 <= top < bottom <= 30.0001
        assert (right - left) * (bottom - top) >= 0.079 * 1200 * 0.75  # cut where wider than the image


def test_arrays_refuse_what_they_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="labels must be 2 integers"):
        Arrays(tmp_path, np.zeros((2, 1, 4, 4), np.uint8), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="images must be floats or uint8"):
        Arrays(tmp_path, np.zeros((2, 4, 4), np.uint8), None)
    for kind in ("uint16", "uint32", "uint64", "longdouble"):  # of which nobody says what is white
        with pytest.raises(ValueError, match=f"images must be floats or uint8 .* got {np.dtype(kind).name}"):
            Arrays(tmp_path, np.zeros((2, 1, 4, 4), kind), None)
    for shape in ((0, 1, 4, 4), (2, 1, 0, 4), (2, 0, 1, 4, 4), ()):
        np.savez(tmp_path / "none.npz", images=np.zeros(shape, np.float32))
        with pytest.raises(ValueError, match=r"none.npz: its array images, of shape .*, holds no image"):
            open_data(tmp_path / "none.npz", labelled=False)


@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
def test_numbers_of_other_machines(kind, tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 1, 4, 4)).astype(kind)
    for order in "<>":
        np.savez(tmp_path / "images.npz", images=values.astype(order + kind), labels=np.arange(3, dtype=f"{order}i4"))
        x, labels = open_data(tmp_path / "images.npz").batch(range(3))
        assert np.array_equal(x.numpy(), values.astype(np.float32))
        assert labels.tolist() == [0, 1, 2]
