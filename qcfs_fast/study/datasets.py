"""Data sets by name, read from the files in which they are published.

    fashion-mnist   60,000 + 10,000 images of 28x28 pixels, 10 classes; gzipped idx files. Debian has them in the
                    package dataset-fashion-mnist; they are padded to 32x32 pixels
    cifar10, -100   50,000 + 10,000 images of 32x32 pixels, 10 or 100 classes; the "python version", extracted

Each file's content is checked against its published checksum, so that a figure belongs to the data it names. CIFAR's
files are pickles: they are read by an unpickler that makes arrays and nothing else, so that a forged file runs no code.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .data import Arrays, Dataset, Folder, Npz

FASHION_CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


@dataclass(frozen=True)
class Named:
    """One data set. `files` holds, for training and testing, each file's name and the md5 of its content."""

    classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    read: Callable[[list[bytes]], tuple[np.ndarray, np.ndarray]]
    files: Mapping[str, Mapping[str, str]]
    folder: str  # its usual name
    augment: tuple[str, ...]  # see training.AUGMENTATIONS
    missing: str


def _idx(contents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of an idx pair: a magic number, the sizes (big endian, 32 bits each), the bytes."""
    images, labels = (np.frombuffer(content, np.uint8) for content in contents)
    count, height, width = (int(n) for n in images[4:16].view(">u4"))
    return images[16:].reshape(count, 1, height, width), labels[8:].astype(np.int64)


class _ArraysOnly(pickle.Unpickler):
    """Makes what NumPy's arrays are pickled as, and refuses every other global name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}:
            from numpy._core.multiarray import _reconstruct

            return _reconstruct
        if (module, name) == ("_codecs", "encode"):  # bytes, as Python 3 writes them for Python 2
            return lambda text, encoding: text.encode("latin1")
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise ValueError(f"a CIFAR file asks for {module}.{name}, which no such file needs; copy it again")


def _cifar(contents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    batches = [_ArraysOnly(io.BytesIO(content), encoding="bytes").load() for content in contents]
    images = np.concatenate([b[b"data"] for b in batches]).reshape(-1, 3, 32, 32)
    return images, np.concatenate([np.asarray(b.get(b"labels", b.get(b"fine_labels")), np.int64) for b in batches])


_CIFAR = "download its python version from https://www.cs.toronto.edu/~kriz/cifar.html and extract it"
NAMED: dict[str, Named] = {
    "fashion-mnist": Named(
        10,
        (1, 32, 32),
        (0.286,),
        (0.353,),
        _idx,
        {
            "train": {
                "train-images-idx3-ubyte.gz": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
                "train-labels-idx1-ubyte.gz": "9018921c3c673c538a1fc5bad174d6f9",
            },
            "test": {
                "t10k-images-idx3-ubyte.gz": "8181f5470baa50b63fa0f6fddb340f0a",
                "t10k-labels-idx1-ubyte.gz": "15d484375f8d13e6eb1aabb0c3f46965",
            },
        },
        "fashion-mnist",
        ("crop", "flip"),
        "Debian and Ubuntu have it: apt-get install dataset-fashion-mnist. Elsewhere download its four .gz files from "
        "https://github.com/zalandoresearch/fashion-mnist",
    ),
    # Means and deviations are those of the authors' published code.
    "cifar10": Named(
        10,
        (3, 32, 32),
        (0.4914, 0.4822, 0.4465),
        (0.2023, 0.1994, 0.2010),
        _cifar,
        {
            "train": {
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            },
            "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
        },
        "cifar-10-batches-py",
        ("crop", "flip", "autoaugment", "cutout"),
        _CIFAR,
    ),
    "cifar100": Named(
        100,
        (3, 32, 32),
        (129.3 / 255, 124.1 / 255, 112.4 / 255),
        (68.2 / 255, 65.4 / 255, 70.4 / 255),
        _cifar,
        {
            "train": {"train": "16019d7e3df5f24257cddd939b257f8d"},
            "test": {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        },
        "cifar-100-python",
        ("crop", "flip", "autoaugment", "cutout"),
        _CIFAR,
    ),
}


ROOT = "QCFS_FAST_DATA"


def roots() -> list[Path]:
    """Folders in which data sets are looked for: $QCFS_FAST_DATA, the user's cache, the system's, this one."""
    own = os.environ.get(ROOT)
    return [*([Path(own)] if own else []), Path("~/.cache/qcfs-fast").expanduser(), Path("/usr/share/datasets"), Path()]


def open_named(name: str, split: str, folder: Path | None = None) -> Arrays:
    """The training ("train") or test ("test") images of a data set, uint8, to be padded and normalised.

    Args:
        name: a key of NAMED.
        split: "train" or "test".
        folder: where its files lie; default: by its usual name in one of `roots()`.

    Raises:
        FileNotFoundError: it is in none of these folders; the message says where to get it.
        ValueError: a file's content is not the published one.
    """
    named = NAMED[name]
    folders = [folder] if folder is not None else [root / named.folder for root in roots()]
    files = named.files[split]
    found = next((f for f in folders if all((f / file).is_file() for file in files)), None)
    if found is None:
        raise FileNotFoundError(
            f"{name}: no {' and '.join(files)} in {' or '.join(map(str, folders))}. {named.missing}; then name the "
            f"folder that holds {named.folder}/ by the environment variable {ROOT}"
        )
    contents = []
    for file, md5 in files.items():
        content = (found / file).read_bytes()
        if file.endswith(".gz"):
            try:
                content = gzip.decompress(content)
            except (OSError, EOFError) as error:
                raise ValueError(f"{found / file}: is damaged ({error}); copy it again from its source") from error
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise ValueError(f"{found / file}: is not the published file (its checksum differs); copy it again")
        contents.append(content)
    images, labels = named.read(contents)
    return Arrays(Path(name), images, labels, named.mean, named.std, named.shape[1])


def folder_of(path: Path, split: str) -> Path:
    """The part of a folder with the images to train ("train") or to test on; the folder itself where it has none."""
    parts = [path / name for name in (("train",) if split == "train" else ("test", "val"))]
    return next((part for part in parts if part.is_dir()), path)


def open_data(
    path: Path,
    size: int = 224,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    labelled: bool = True,
    split: str = "test",
) -> Dataset:
    """Open a data set of NAMED, an image folder, or an .npz file.

    Args:
        path: a name, a folder or a file.
        size: side to which images of a folder are cut.
        mean: per channel; data sets by name have their own.
        std: per channel.
        labelled: whether an .npz file must have labels.
        split: "train" or "test": the images of a named data set to take. A folder that has one of that name (train/, or
            test/ or val/) is taken to mean it.
    """
    if str(path) in NAMED:
        return open_named(str(path), split)
    if path.is_dir():
        return Folder(folder_of(path, split), size, mean, std)
    if not path.exists():
        raise FileNotFoundError(
            f"no data at {path}; give a folder of class subfolders, an .npz file, or one of {', '.join(NAMED)}"
        )
    return Npz(path, mean, std, labelled)
