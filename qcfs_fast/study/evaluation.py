"""evaluate: accuracy by T of a saved network on many images, in one or several processes, interruptible.

    images -> batches 0, 1, 2, ...         fixed by the data and the batch size, whoever works on them
    rank r of w takes every w-th batch     of those not yet done
    after each batch                       the rank's state file is replaced: batches done, images seen, right by T
    at the end                             sums over all state files; then the state is removed

A state file is written beside its target, synchronised and renamed, so a process killed at any moment leaves the state
after some whole batch. The next run, with the same or another number of processes, does the remaining batches.
All T come from one pass of the largest (SNN.forward with per_step).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..network.loading import load
from ..network.snn import SNN

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


# -------------------------------------------------------------------------------------------------- data


class Npz:
    """An .npz file with arrays `images` and `labels`.

    images: floats [N, C, H, W] (or [N, features]) are used as they are; uint8 [N, H, W, C] or [N, C, H, W] is divided
    by 255, and normalised if mean and std are given. labels: integers [N]; may be absent where none are needed.
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
                self.labels = file["labels"] if "labels" in file.files else np.zeros(len(self.images), np.int64)
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
        if self.images.dtype.kind not in "fu" or self.images.ndim not in (2, 4):
            raise ValueError(
                f"{path}: images must be floats or uint8 [N, C, H, W] (or [N, features]), got {self.images.dtype} "
                f"{list(self.images.shape)}"
            )
        if self.images.dtype == np.uint8 and self.images.ndim == 4 and self.images.shape[1] not in (1, 3):
            self.images = self.images.transpose(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: range) -> tuple[Tensor, Tensor]:
        part = self.images[indices.start : indices.stop]
        x = torch.from_numpy(np.ascontiguousarray(part, dtype=np.float32))
        if part.dtype == np.uint8:
            x = normalised(x / 255, self.mean, self.std)
        return x, torch.from_numpy(self.labels[indices.start : indices.stop].astype(np.int64))


class Folder:
    """A folder with one subfolder of images per class; classes are numbered in alphabetical order.

    Each image is resized so that its shorter side is 8/7 of `size`, cut to the central square, scaled to 0..1 and
    normalised (by ImageNet's mean and deviation unless told otherwise).
    """

    def __init__(self, path: Path, size: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        self.path, self.size = path, size
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
    shape = (-1, *([1] * 2))
    if mean is not None:
        x = x - torch.tensor(mean).reshape(shape)
    return x if std is None else x / torch.tensor(std).reshape(shape)


def open_data(
    path: Path,
    size: int = 224,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    labelled: bool = True,
) -> Npz | Folder:
    """An image folder or an .npz file."""
    if path.is_dir():
        return Folder(path, size, mean, std)
    if not path.exists():
        raise FileNotFoundError(f"no data at {path}; give a folder of class subfolders, or an .npz file")
    return Npz(path, mean, std, labelled)


def batches(data: Npz | Folder, size: int, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels) in order, at most `most` images."""
    count = len(data) if most is None else min(most, len(data))
    for start in range(0, count, size):
        yield data.batch(range(start, min(start + size, count)))


# ------------------------------------------------------------------------------------------------- state


@dataclass
class Progress:
    """What one process has done, over all its runs."""

    batches: list[int]
    seen: int
    right: list[int]


class State:
    """A folder of state files, one per process, all of one evaluation."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any], rank: int) -> None:
        self.folder, self.fingerprint, self.rank = folder, fingerprint, rank
        folder.mkdir(parents=True, exist_ok=True)
        self.others: dict[int, Progress] = {}
        for path in folder.glob("*.json"):
            self.others[int(path.stem)] = self._read(path)
        self.before = sorted({b for p in self.others.values() for b in p.batches})  # done by earlier runs
        self.own = self.others.pop(rank, Progress([], 0, [0] * len(fingerprint["steps"])))

    def _read(self, path: Path) -> Progress:
        data = json.loads(path.read_text())
        differing = [k for k, v in self.fingerprint.items() if data["fingerprint"].get(k) != v]
        if differing:
            raise ValueError(
                f"{self.folder}: belongs to an evaluation with another {', '.join(differing)}; finish that one, or "
                "start anew with --restart"
            )
        return Progress(data["batches"], data["seen"], data["right"])

    def done(self) -> set[int]:
        return {b for p in (self.own, *self.others.values()) for b in p.batches}

    def write(self) -> None:
        own = self.own
        text = json.dumps(
            {"fingerprint": self.fingerprint, "batches": own.batches, "seen": own.seen, "right": own.right}
        )
        handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".part")
        with os.fdopen(handle, "w") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, self.folder / f"{self.rank}.json")

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


# --------------------------------------------------------------------------------------------- processes


class Processes:
    """The processes of torchrun, or this one alone. Counts are summed over gloo, on the CPU."""

    def __init__(self) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        if self.world > 1:
            torch.distributed.init_process_group("gloo")

    def sum(self, counts: list[int]) -> list[int]:
        if self.world == 1:
            return counts
        total = torch.tensor(counts)
        torch.distributed.all_reduce(total)
        return [int(c) for c in total]

    def wait(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        if self.world > 1:
            torch.distributed.destroy_process_group()


def device_of(name: str, local_rank: int) -> torch.device:
    """ "auto" is this process's GPU where there is one."""
    if name == "auto":
        name = f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no GPU here")
    return device


@dataclass(frozen=True)
class Accuracy:
    """Right answers by T among `images`; `resumed` of them were counted by earlier, interrupted runs."""

    steps: list[int]
    right: list[int]
    images: int
    resumed: int

    def shares(self) -> list[float]:
        return [r / self.images for r in self.right]


def evaluate(
    network: Path,
    data: Npz | Folder,
    steps: Sequence[int],
    batch: int = 64,
    state: Path | None = None,
    restart: bool = False,
    device: str = "auto",
    progress: bool = True,
) -> Accuracy | None:
    """Accuracy by T of a saved network.

    Args:
        network: file written by snn.save.
        data: see open_data.
        steps: the T to report; the network runs once, for the largest.
        batch: images per batch.
        state: folder for the state; default: the network's path with ".eval" appended.
        restart: forget an interrupted run.
        device: "auto", "cpu", "cuda", ...
        progress: a progress bar on stderr.

    Returns:
        The counts, on rank 0; None on the others.

    Raises:
        ValueError: the data does not fit the network, or the state belongs to another evaluation.
        KeyboardInterrupt: interrupted; the state holds every finished batch.
    """
    steps = sorted(set(steps))
    snn = load(network)
    snn._checked_steps(max(steps))
    processes = Processes()
    place = device_of(device, processes.local)
    snn = snn.to(place)
    folder = state or network.with_name(network.name + ".eval")
    if restart and processes.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    processes.wait()
    fingerprint = {
        "network": hashlib.sha256(network.read_bytes()).hexdigest(),
        "data": [str(data.path.resolve()), len(data)],
        "steps": steps,
        "batch": batch,
        "preprocessing": [getattr(data, "size", None), data.mean and list(data.mean), data.std and list(data.std)],
    }
    try:
        kept = State(folder, fingerprint, processes.rank)
        processes.wait()  # everyone has read before anyone writes
        _work(snn, data, kept, processes, batch, steps, place, progress)
        counts = [kept.own.seen, *kept.own.right]
        if processes.rank == 0:
            for other, done in kept.others.items():
                if other >= processes.world:  # left by a run with more processes
                    counts = [a + b for a, b in zip(counts, [done.seen, *done.right], strict=True)]
        resumed = sum(len(data_range(data, b, batch)) for b in kept.before)
        counts = processes.sum(counts)
        if processes.rank:
            return None
        kept.remove()
        return Accuracy(list(steps), counts[1:], counts[0], resumed)
    finally:
        processes.close()


def data_range(data: Npz | Folder, number: int, batch: int) -> range:
    return range(number * batch, min((number + 1) * batch, len(data)))


def _work(
    snn: SNN,
    data: Npz | Folder,
    kept: State,
    processes: Processes,
    batch: int,
    steps: Sequence[int],
    place: torch.device,
    progress: bool,
) -> None:
    """This process's share of the batches that nobody has done."""
    count = -(-len(data) // batch)
    done = kept.done()
    mine = [b for b in range(count) if b not in done][processes.rank :: processes.world]
    bar = tqdm(total=count if processes.world == 1 else len(mine), initial=len(done) if processes.world == 1 else 0,
               desc="evaluating", unit="batch", disable=not progress or processes.rank > 0)  # fmt: skip
    with bar, torch.no_grad():
        for number in mine:
            x, y = data.batch(data_range(data, number, batch))
            out = snn(x.to(place), T=max(steps), per_step=True)
            labels = out.argmax(2).cpu()
            kept.own.right = [r + int((labels[t - 1] == y).sum()) for r, t in zip(kept.own.right, steps, strict=True)]
            kept.own.seen += len(y)
            kept.own.batches.append(number)
            kept.write()
            bar.update()
            bar.set_postfix({f"T={steps[-1]}": f"{kept.own.right[-1] / kept.own.seen:.1%}"})
