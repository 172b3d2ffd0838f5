"""Images and labels from files: an .npz file, or a folder with one subfolder of images per class.

Both kinds have a length, `batch(indices)` -> (images, int64 labels [n]), and the attributes `path`, `mean` and `std`,
which identify an evaluation. `labelled` says whether the labels are real; otherwise they are zeros. Images are what a
network takes: floats [n, C, H, W]; or, where `steps` is not None, recordings over time, [steps, n, C, H, W].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


class Npz:
    """An .npz file with arrays `images` and `labels`.

    images: floats [N, C, H, W] (or [N, features]) are used as they are; uint8 [N, H, W, C] or [N, C, H, W] is divided
    by 255, and normalised if mean and std are given. Images with a time axis, [N, T, C, H, W], are used as they are:
    floats, or uint8, which are counts of events. labels: integers [N]; may be absent where none are needed.
    """

    def __init__(
        self, path: Path, mean: Sequence[float] | None, std: Sequence[float] | None, labelled: bool = True
    ) -> None:
        self.path, self.mean, self.std = path, mean, std
        try:
            with np.load(path, allow_pickle=False) as file:
                needed = ["images", "labels"] if labelled else ["images"]
                missing = [k for k in needed if k not in file.files]
                if missing:
                    raise ValueError(
                        f"{path}: has no array {' or '.join(missing)}, only {', '.join(file.files) or 'none'}; save "
                        "it as numpy.savez(file, images=..., labels=...)"
                    )
                self.images = file["images"]
                self.labelled = "labels" in file.files
                self.labels = file["labels"] if self.labelled else np.zeros(len(self.images), np.int64)
        except (OSError, EOFError, ValueError, KeyError) as error:
            if isinstance(error, ValueError) and str(error).startswith(str(path)):
                raise
            raise ValueError(f"{path}: not a complete .npz file ({str(error).splitlines()[0]})") from error
        except Exception as error:  # zipfile has its own exception
            raise ValueError(f"{path}: not a complete .npz file ({error})") from error
        if self.labels.ndim != 1 or self.labels.dtype.kind not in "iu" or len(self.labels) != len(self.images):
            raise ValueError(
                f"{path}: labels must be {len(self.images)} integers, one per image, got {self.labels.dtype} "
                f"{list(self.labels.shape)}"
            )
        if self.images.dtype.kind not in "fu" or self.images.ndim not in (2, 4, 5):
            raise ValueError(
                f"{path}: images must be floats or uint8 [N, C, H, W] (or [N, features]; over time [N, T, C, H, W]), "
                f"got {self.images.dtype} {list(self.images.shape)}"
            )
        self.steps = int(self.images.shape[1]) if self.images.ndim == 5 else None
        if self.steps is not None and (mean is not None or std is not None):
            raise ValueError(f"{path}: images over time are used as they are; leave out mean and std (--mean, --std)")
        if self.images.dtype == np.uint8 and self.images.ndim == 4 and self.images.shape[1] not in (1, 3):
            self.images = self.images.transpose(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: range) -> tuple[Tensor, Tensor]:
        part = self.images[indices.start : indices.stop]
        counts = part.dtype == np.uint8 and self.steps is not None
        x = torch.from_numpy(np.ascontiguousarray(part, dtype=np.uint8 if counts else np.float32))
        if self.steps is not None:
            x = x.transpose(0, 1)
        elif part.dtype == np.uint8:
            x = normalised(x / 255, self.mean, self.std)
        return x, torch.from_numpy(self.labels[indices.start : indices.stop].astype(np.int64))


class Folder:
    """A folder with one subfolder of images per class; classes are numbered in alphabetical order.

    Each image is resized so that its shorter side is 8/7 of `size`, cropped to the central square, scaled to 0..1 and
    normalised, by ImageNet's mean and standard deviation unless others are given.
    """

    steps: int | None = None

    def __init__(self, path: Path, size: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        self.path, self.size, self.labelled = path, size, True
        self.mean, self.std = mean or MEAN, std or STD
        self.classes = sorted(p.name for p in path.iterdir() if p.is_dir())
        self.files = [
            (file, label)
            for label, name in enumerate(self.classes)
            for file in sorted((path / name).rglob("*"))
            if file.suffix.lower() in SUFFIXES
        ]
        if not self.files:
            raise ValueError(f"{path}: has no images in class subfolders (such as {path / 'cat' / '1.jpg'})")

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: range) -> tuple[Tensor, Tensor]:
        with ThreadPoolExecutor(8) as readers:
            images, labels = zip(*readers.map(lambda i: self._read(*self.files[i]), indices), strict=True)
        return torch.stack(images), torch.tensor(labels)

    def _read(self, path: Path, label: int) -> tuple[Tensor, int]:
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError("reading images needs Pillow: pip install pillow") from error
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise ValueError(f"{path}: cannot be read as an image ({error})") from error
        scale = round(self.size * 8 / 7) / min(image.size)
        image = image.resize([max(self.size, round(d * scale)) for d in image.size], Image.Resampling.BILINEAR)
        x, y = ((d - self.size) // 2 for d in image.size)
        pixels = np.array(image.crop((x, y, x + self.size, y + self.size)), dtype=np.float32)
        return normalised(torch.from_numpy(pixels).permute(2, 0, 1) / 255, self.mean, self.std), label


def normalised(x: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """(x - mean) / std per channel of [..., C, H, W]; what is None is left out."""
    shape = (-1, 1, 1)
    if mean is not None:
        x = x - torch.tensor(mean).reshape(shape)
    return x if std is None else x / torch.tensor(std).reshape(shape)


Dataset = Npz | Folder


def open_data(
    path: Path,
    size: int = 224,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    labelled: bool = True,
) -> Dataset:
    """Open an image folder or an .npz file; `labelled` asks for labels in the latter."""
    if path.is_dir():
        return Folder(path, size, mean, std)
    if not path.exists():
        raise FileNotFoundError(f"no data at {path}; give a folder of class subfolders, or an .npz file")
    return Npz(path, mean, std, labelled)


def check_steps(data: Dataset, T: int) -> None:
    """ValueError where images over time have fewer than T steps."""
    if data.steps is not None and data.steps < T:
        raise ValueError(f"{data.path}: its images have {data.steps} steps, but {T} are needed; ask for a smaller T")


def batch_count(data: Dataset, size: int) -> int:
    return -(-len(data) // size)


def batch_range(data: Dataset, number: int, size: int) -> range:
    """The images of batch `number`."""
    return range(number * size, min((number + 1) * size, len(data)))


def batches(data: Dataset, size: int, max_images: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels) in order, at most `max_images` images."""
    count = len(data) if max_images is None else min(max_images, len(data))
    for start in range(0, count, size):
        yield data.batch(range(start, min(start + size, count)))
