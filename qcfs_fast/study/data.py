"""Images and labels: a data set by name, an .npz file, or a folder with one subfolder of images per class.

All kinds have a length, `batch(indices)` -> (images, int64 labels [n]), the attributes `path`, `mean` and `std`, and
`content()`, a checksum by which other data at the same place is told; these identify an evaluation. `labelled` says
whether the labels are real; otherwise they are zeros. Images are what a network takes: floats [n, C, H, W]; or, where
`steps` is not None, recordings over time, [steps, n, C, H, W].

Training sees images through `pixels(indices)` -> (images before normalisation, labels) and changes them at random
before they are normalised (training.py).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
# A file of a kilobyte can hold an image of gigabytes, or a line that becomes one when its short side is enlarged.
MAX_PIXELS, MAX_ASPECT = 2**26, 100
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
# A name says nothing of what is inside. Of the others that Pillow knows some start programs: PostScript is drawn by gs.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF")


KINDS = [np.dtype(kind) for kind in ("uint8", "float16", "float32", "float64")]  # in any order of bytes


class Arrays:
    """Images in memory.

    images: floats [N, C, H, W] (or [N, features]) are used as they are; uint8 [N, H, W, C] or [N, C, H, W] is divided
    by 255, and normalised if mean and std are given. Images with a time axis, [N, T, C, H, W], are used as they are:
    floats, or uint8, which are counts of events. `size` pads smaller uint8 images with zeros to so many pixels a side.
    """

    def __init__(
        self,
        path: Path,
        images: np.ndarray,
        labels: np.ndarray | None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | None = None,
    ) -> None:
        self.path, self.mean, self.std, self.size = path, mean, std, size
        self.images, self.labelled = images, labels is not None
        self.labels = np.zeros(len(images), np.int64) if labels is None else labels
        if self.labels.ndim != 1 or self.labels.dtype.kind not in "iu" or len(self.labels) != len(images):
            raise ValueError(
                f"{path}: labels must be {len(images)} integers, one per image, got {self.labels.dtype} "
                f"{list(self.labels.shape)}" + ("; images over time are [N, T, C, H, W]" if images.ndim == 5 else "")
            )
        if images.dtype.newbyteorder("=") not in KINDS or images.ndim not in (2, 4, 5):
            raise ValueError(
                f"{path}: images must be floats or uint8 [N, C, H, W] (or [N, features]; over time [N, T, C, H, W]), "
                f"got {images.dtype} {list(images.shape)}"
            )
        self.steps = int(images.shape[1]) if images.ndim == 5 else None
        if self.steps is not None and (mean is not None or std is not None):
            raise ValueError(f"{path}: images over time are used as they are; leave out mean and std (--mean, --std)")
        if images.dtype == np.uint8 and images.ndim == 4 and images.shape[1] not in (1, 3):
            self.images = images.transpose(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self.images)

    def content(self) -> int:
        return zlib.crc32(self.labels.tobytes(), zlib.crc32(np.ascontiguousarray(self.images).data))

    def pixels(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images as they are stored, padded to `size`, and their labels."""
        rows: Any = slice(indices.start, indices.stop) if isinstance(indices, range) else np.asarray(indices)
        # A copy: files in memory cannot be written to, and torch knows the machine's order of bytes alone.
        x = torch.from_numpy(np.array(self.images[rows], self.images.dtype.newbyteorder("="), order="C"))
        if self.size is not None and x.dtype == torch.uint8:
            x = padded(x, self.size)
        return x, torch.from_numpy(self.labels[rows].astype(np.int64))

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        x, labels = self.pixels(indices)
        if self.steps is not None:
            return (x if x.dtype == torch.uint8 else x.float()).transpose(0, 1), labels
        return normalised(x / 255, self.mean, self.std) if x.dtype == torch.uint8 else x.float(), labels


def padded(x: Tensor, size: int) -> Tensor:
    """Images [..., H, W] with zeros around them, at most one more behind than before, up to `size` pixels a side."""
    spare = [max(0, size - side) for side in (x.shape[-1], x.shape[-2])]
    return torch.nn.functional.pad(x, [p for s in spare for p in (s // 2, s - s // 2)])


class Npz(Arrays):
    """An .npz file with arrays `images` and `labels`, integers [N]; these may be absent where none are needed."""

    def __init__(
        self, path: Path, mean: Sequence[float] | None, std: Sequence[float] | None, labelled: bool = True
    ) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                needed = ["images", "labels"] if labelled else ["images"]
                missing = [k for k in needed if k not in file.files]
                if missing:
                    raise ValueError(
                        f"{path}: has no array {' or '.join(missing)}, only {', '.join(file.files) or 'none'}; save "
                        "it as numpy.savez(file, images=..., labels=...)"
                    )
                images, labels = file["images"], file["labels"] if "labels" in file.files else None
        except (OSError, EOFError, ValueError, KeyError) as error:
            if isinstance(error, ValueError) and str(error).startswith(str(path)):
                raise
            raise ValueError(f"{path}: not a complete .npz file ({str(error).splitlines()[0]})") from error
        except Exception as error:  # zipfile has its own exception
            raise ValueError(f"{path}: not a complete .npz file ({error})") from error
        if images.ndim == 0 or images.size == 0:
            raise ValueError(f"{path}: its array images, of shape {list(images.shape)}, holds no image; save some")
        super().__init__(path, images, labels, mean, std)


def class_folders(path: Path) -> list[str]:
    """The names of a folder's subfolders, in alphabetical order."""
    return sorted(p.name for p in path.iterdir() if p.is_dir())


class Folder:
    """A folder with one subfolder of images per class; classes are numbered in alphabetical order, or by `number_as`.

    Each image is resized so that its shorter side is 8/7 of `size`, cropped to the central square, scaled to 0..1 and
    normalised, by ImageNet's mean and standard deviation unless others are given.
    """

    steps: int | None = None

    def __init__(self, path: Path, size: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        self.path, self.size, self.labelled = path, size, True
        self.mean, self.std = mean or MEAN, std or STD
        self.classes = class_folders(path)
        self.files = [
            (file, label)
            for label, name in enumerate(self.classes)
            for file in sorted((path / name).rglob("*"))
            if file.suffix.lower() in SUFFIXES
        ]
        if not self.files:
            raise ValueError(f"{path}: has no images in class subfolders (such as {path / 'cat' / '1.jpg'})")

    def number_as(self, classes: Sequence[str] | None, outputs: int) -> list[str]:
        """Number the classes as a network does, by their names; without names, each output must have its folder.

        Returns the names that have no folder. Raises ValueError where a folder's number cannot be known.
        """
        if classes is None:
            if len(self.classes) != outputs:
                raise ValueError(
                    f"{self.path}: has {len(self.classes)} class folders for {outputs} outputs of the network, whose "
                    "file does not name its classes. Give a folder (it may be empty) per class, or store the names: "
                    "qcfs-fast convert --classes, or snn.save(path, metadata={'classes': [...]})"
                )
            return []
        number = {name: i for i, name in enumerate(classes)}
        unknown = [name for name in self.classes if name not in number]
        if unknown:
            others = f" (nor are {len(unknown) - 1} others)" if len(unknown) > 1 else ""
            raise ValueError(
                f"{self.path}: the folder {unknown[0]!r} is no class of the network{others}, which has "
                f"{', '.join(map(repr, classes[:10]))}{', ...' * (len(classes) > 10)}. Rename it, or take it away"
            )
        missing = sorted(number.keys() - self.classes, key=number.__getitem__)
        self.files = [(file, number[self.classes[label]]) for file, label in self.files]
        self.classes = list(classes)
        return missing

    def __len__(self) -> int:
        return len(self.files)

    def content(self) -> int:
        """Of the names and sizes of files: to read all would take as long as the evaluation."""
        listed = [(str(file.relative_to(self.path)), file.stat().st_size, label) for file, label in self.files]
        return zlib.crc32(repr(listed).encode(errors="surrogateescape"))

    def pixels(self, indices: Sequence[int], random: bool = False) -> tuple[Tensor, Tensor]:
        """uint8 images, and labels; `random` cuts each from a random part of its image (torch's generator)."""
        places = torch.rand((len(indices), 4)).tolist() if random else [None] * len(indices)
        with ThreadPoolExecutor(8) as readers:
            images = list(readers.map(lambda i, place: self._read(self.files[i][0], place), indices, places))
        return torch.stack(images), torch.tensor([self.files[i][1] for i in indices])

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        x, labels = self.pixels(indices)
        return normalised(x / 255, self.mean, self.std), labels

    def _read(self, source: Any, place: Sequence[float] | None, name: str = "") -> Tensor:
        """The image in a file, opened or by its path."""
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError("reading images needs Pillow: pip install pillow") from error
        try:
            with Image.open(source, formats=FORMATS) as file:
                width, height = file.size  # known before a pixel is decoded
                sound = width * height <= MAX_PIXELS and max(width, height) <= MAX_ASPECT * min(width, height)
                image = file.convert("RGB") if sound else None
        except Exception as error:  # whatever a decoder raises of a damaged file
            raise ValueError(f"{name or source}: cannot be read as an image ({error})") from error
        if image is None:
            raise ValueError(
                f"{name or source}: an image of {width} x {height} pixels; at most {MAX_PIXELS} are read, and sides of "
                f"1 : {MAX_ASPECT}"
            )
        if place is None:
            scale = round(self.size * 8 / 7) / min(image.size)
            image = image.resize([max(self.size, round(d * scale)) for d in image.size], Image.Resampling.BILINEAR)
            x, y = ((d - self.size) // 2 for d in image.size)
            image = image.crop((x, y, x + self.size, y + self.size))
        else:
            box = random_box(image.size, place)
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def random_box(size: tuple[int, int], place: Sequence[float]) -> tuple[float, float, float, float]:
    """A part of an image to train on: 8 to 100 % of its area, 3:4 to 4:3 in shape, anywhere (Szegedy et al., 2015).

    `place` are four numbers in [0, 1): area, shape, x and y. A part wider or higher than the image is cut to it.
    """
    width, height = size
    area = (0.08 + 0.92 * place[0]) * width * height
    ratio = (3 / 4) ** (1 - 2 * place[1])
    w, h = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
    x, y = place[2] * (width - w), place[3] * (height - h)
    return x, y, x + w, y + h


def normalised(x: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """(x - mean) / std per channel of [..., C, H, W]; what is None is left out."""
    shape = (-1, 1, 1)
    if mean is not None:
        x = x - torch.tensor(mean).reshape(shape)
    return x if std is None else x / torch.tensor(std).reshape(shape)


Dataset = Arrays | Folder


def check_labels(labels: Tensor, classes: int, where: str) -> None:
    """ValueError unless every label is the number of a class."""
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"{where}: labels run from {int(labels.min())} to {int(labels.max())}, but the network has {classes} "
            f"classes, counted from 0 to {classes - 1}; mend the labels"
        )


def check_steps(data: Dataset, T: int) -> None:
    """ValueError where images over time have fewer than T steps."""
    if data.steps is not None and data.steps < T:
        raise ValueError(
            f"{data.path}: its images have {data.steps} steps, but {T} are needed; ask for a smaller T or window"
        )


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
