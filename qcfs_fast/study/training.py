"""train: the paper's recipe, as a loop that can be killed at any moment.

    optimiser   SGD with momentum 0.9 and weight decay 5e-4, thresholds included; a cosine schedule over the epochs
    start       learning rate 0.1, theta 8.0, L = 4 or 8; 300 epochs for CIFAR, 120 for ImageNet
    images      crops and flips at random; AutoAugment and Cutout for CIFAR (Bu et al., ICLR 2022, section 6)

Everything random in batch b of epoch e follows from (seed, e, b): the order of the images from (seed, e), changes of
images and dropout from all three. So a run that goes on from its last state takes the same steps as one that was never
interrupted. The state (weights, optimiser, position) is replaced atomically after each epoch and, in long epochs, every
few minutes.

Under torchrun each process takes its share of every batch and gradients are averaged; the first process alone writes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..files import write_text_atomically, written_atomically
from ..model.qcfs import is_qcfs
from ..network.schema import printable
from .data import Arrays, Dataset, Folder, batches, normalised

AUGMENTATIONS = ("crop", "flip", "autoaugment", "cutout")
SMALLEST_THRESHOLD = 1e-3  # a threshold that training drives to zero or below has no neuron


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are the paper's for CIFAR.

    epochs: passes over the images. batch: images per step, over all processes. rate: learning rate at the start.
    decay: weight decay. augment: of AUGMENTATIONS; for image folders "crop" cuts a random part to the network's size.
    seed: of the order and the changes of images. save_minutes: time between states within an epoch. mixed: bfloat16
    where it is exact enough, on GPUs. compiled: torch.compile, worth its minute from a few minutes of training on.
    """

    epochs: int = 300
    batch: int = 128
    rate: float = 0.1
    decay: float = 5e-4
    augment: tuple[str, ...] = ("crop", "flip")
    seed: int = 0
    workers: int = 0
    save_minutes: float = 5.0
    mixed: bool = False
    compiled: bool = False

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch", 2), ("seed", 0), ("workers", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
                raise ValueError(f"train: {name} must be an integer of at least {least}, got {value!r}")
        for name in ("rate", "save_minutes"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"train: {name} must be a positive number, got {getattr(self, name)!r}")
        if not 0 <= self.decay < float("inf"):
            raise ValueError(f"train: decay must be a number of at least 0, got {self.decay!r}")
        unknown = set(self.augment) - set(AUGMENTATIONS)
        if unknown:
            raise ValueError(f"train: augment has {unknown.pop()!r}; known: {', '.join(AUGMENTATIONS)}")


# ------------------------------------------------------------------------------------------------ images


def _shifted(x: Tensor, most: int = 4) -> Tensor:
    """Each image moved by up to `most` pixels either way, zeros behind it."""
    n, _, height, width = x.shape
    rows, columns = torch.randint(2 * most + 1, (2, n, 1))
    x = F.pad(x, (most, most, most, most))
    rows, columns = rows + torch.arange(height), columns + torch.arange(width)
    return x.permute(0, 2, 3, 1)[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def _flipped(x: Tensor) -> Tensor:
    """Half of the images mirrored."""
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)


def _auto_augmented(x: Tensor) -> Tensor:
    """Each image changed by a policy found for CIFAR-10 (Cubuk et al., CVPR 2019)."""
    from .zoo import torchvision_models

    torchvision_models()
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy

    policy = AutoAugment(AutoAugmentPolicy.CIFAR10)
    return torch.stack([policy(image) for image in x])


def _cut_out(x: Tensor, side: int = 16) -> Tensor:
    """A square of each normalised image set to zero, parts of it outside (DeVries and Taylor, 2017)."""
    n, _, height, width = x.shape
    row, column = torch.randint(height, (n, 1)), torch.randint(width, (n, 1))
    inside_rows = (torch.arange(height) - row + side // 2).div(side, rounding_mode="floor") == 0
    inside_columns = (torch.arange(width) - column + side // 2).div(side, rounding_mode="floor") == 0
    return x.masked_fill((inside_rows[:, :, None] & inside_columns[:, None])[:, None], 0)


class Epoch(torch.utils.data.Dataset):
    """The batches of one epoch that are left from number `first` on; of each, this process's share."""

    def __init__(self, data: Dataset, recipe: Recipe, epoch: int, first: int, rank: int = 0, world: int = 1) -> None:
        self.data, self.recipe, self.epoch, self.first = data, recipe, epoch, first
        self.rank, self.world = rank, world
        order = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
        self.order = torch.randperm(len(data), generator=order)
        self.count = max(1, len(data) // recipe.batch)  # what is left over waits for the next epoch's order

    def __len__(self) -> int:
        return self.count - self.first

    def seed(self, number: int) -> int:
        """The seed of batch `number`."""
        return ((self.recipe.seed * 1_000_003 + self.epoch) * 1_000_003 + number) * self.world + self.rank

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        number = self.first + index
        if index >= len(self):
            raise IndexError(number)
        augment = self.recipe.augment
        wanted = self.order[number * self.recipe.batch : (number + 1) * self.recipe.batch][
            self.rank :: self.world
        ].tolist()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed(number))
            if isinstance(self.data, Folder):
                x, labels = self.data.pixels(wanted, random="crop" in augment)
            else:
                x, labels = self.data.pixels(wanted)
                x = _shifted(x) if "crop" in augment else x
            x = _flipped(x) if "flip" in augment else x
            x = _auto_augmented(x) if "autoaugment" in augment else x
            x = normalised(x / 255, self.data.mean, self.data.std) if x.dtype == torch.uint8 else x.float()
            return _cut_out(x) if "cutout" in augment else x, labels


# ---------------------------------------------------------------------------------------------- the loop


class _Run:
    """The state of one training: what a file holds so that it goes on."""

    def __init__(self, model: nn.Module, recipe: Recipe, facts: dict[str, Any]) -> None:
        self.model, self.facts = model, facts
        self.optimizer = torch.optim.SGD(model.parameters(), lr=recipe.rate, momentum=0.9, weight_decay=recipe.decay)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, recipe.epochs)
        self.epoch, self.batch = 0, 0
        self.sums = [0.0, 0.0, 0.0]  # of this epoch so far: loss, right answers, images
        self.log: list[dict[str, Any]] = []

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}

    def save(self, path: Path) -> None:
        state = {name: part.state_dict() for name, part in self._parts().items()}
        place = {"epoch": self.epoch, "batch": self.batch, "sums": self.sums, "log": self.log, "facts": self.facts}
        written = io.BytesIO()  # torch's own writer does not say that a disk is full
        torch.save({**state, **place}, written)
        with written_atomically(path) as temporary:
            temporary.write_bytes(written.getbuffer())

    def restore(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            differing = [k for k, v in self.facts.items() if state["facts"].get(k) != v]
            if not differing:
                self._take(state)
        except Exception as error:  # whatever a damaged file raises
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{path}: is no state of a training ({reason}); remove it to start anew") from error
        if differing:
            raise ValueError(
                f"{path}: belongs to a training with another {', '.join(differing)}; give the same arguments, another "
                "output folder, or start anew with --restart"
            )

    def _take(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.epoch, self.batch, self.sums, self.log = (state[k] for k in ("epoch", "batch", "sums", "log"))
        done = [line["epoch"] for line in self.log]
        if done != list(range(1, self.epoch + 1)) or self.schedule.last_epoch != self.epoch:
            raise ValueError("its parts are of different epochs")
        if self.batch < 0 or len(self.sums) != 3:
            raise ValueError("its place within the epoch is damaged")


def train(
    model: nn.Module,
    data: Dataset | tuple[Tensor, Tensor],
    recipe: Recipe = Recipe(),
    test: Dataset | None = None,
    output: Path | None = None,
    about: dict[str, Any] | None = None,
    progress: bool = True,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Train a network of QCFS activations in place; it ends in eval mode, ready for convert.

    Args:
        model: the network, on the device to train on; or any network of torch.
        data: the training images: a data set of this package, or (images, labels) in memory, which are not augmented
            unless the images are uint8 [N, C, H, W].
        recipe: epochs, batch size, learning rate and the like.
        test: images whose accuracy the log gets after each epoch.
        output: folder for state.pt and log.jsonl. Where it holds a state, the training goes on from there.
        about: what else must be equal for a state to fit (name of the network, levels, ...).
        progress: progress bars on stderr.
        on_epoch: is called with each new line of the log.

    Returns:
        The log, a line for each epoch: epoch, rate, loss, accuracy (of the training images as they were changed),
        test_accuracy, threshold (mean over layers), seconds.

    Raises:
        ValueError: a wrong recipe, a loss that is not finite, or a state of another training.
    """
    if isinstance(data, tuple):
        images, labels = (t.detach().cpu().numpy() for t in data)
        data = Arrays(Path("images in memory"), images, labels)
        if data.images.dtype.kind == "f":
            recipe = _without_augmentation(recipe)
    if len(data) == 0 or not data.labelled:
        raise ValueError(f"train: {data.path} has no {'labels' if len(data) else 'images'} to train on")
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    first = next(model.parameters())
    facts = {**(about or {}), **{k: v for k, v in vars(recipe).items() if k not in _FREE}, "images": len(data)}
    facts = json.loads(json.dumps(facts))
    run = _Run(model, recipe, facts)
    state = None if output is None else output / "state.pt"
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    if state is not None and state.exists():
        run.restore(state)
    network = _parallel(model, first.device, world)
    step = torch.compile(network) if recipe.compiled else network
    while run.epoch < recipe.epochs:
        started = time.perf_counter()
        _epoch(run, step, data, recipe, state if rank == 0 else None, first.device, rank, world, progress and rank == 0)
        line = {
            "epoch": run.epoch + 1,
            "rate": run.schedule.get_last_lr()[0],
            "loss": run.sums[0] / run.sums[2],
            "accuracy": run.sums[1] / run.sums[2],
            "test_accuracy": None if test is None else accuracy(model, test, recipe.batch),
            "threshold": _mean_threshold(model),
            "seconds": round(time.perf_counter() - started, 3),
        }
        run.schedule.step()
        run.log.append(line)
        run.epoch, run.batch, run.sums = run.epoch + 1, 0, [0.0, 0.0, 0.0]
        if output is not None and state is not None and rank == 0:
            run.save(state)
            write_text_atomically(output / "log.jsonl", "".join(json.dumps(line) + "\n" for line in run.log))
        if on_epoch is not None and rank == 0:
            on_epoch(line)
    model.eval()
    return run.log


_FREE = ("workers", "save_minutes", "compiled")  # may differ between the runs of one training


def _without_augmentation(recipe: Recipe) -> Recipe:
    from dataclasses import replace

    return replace(recipe, augment=())


def _parallel(model: nn.Module, device: torch.device, world: int) -> nn.Module:
    """The network, its gradients averaged over the processes of torchrun."""
    if world == 1:
        return model
    if not torch.distributed.is_initialized():
        raise RuntimeError(
            "train: torchrun's processes are not joined; call torch.distributed.init_process_group first"
        )
    return nn.parallel.DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)


def _epoch(
    run: _Run,
    network: Any,
    data: Dataset,
    recipe: Recipe,
    state: Path | None,
    device: torch.device,
    rank: int,
    world: int,
    progress: bool,
) -> None:
    """The batches of run.epoch from run.batch on."""
    epoch = Epoch(data, recipe, run.epoch, run.batch, rank, world)
    run.model.train()
    loader = torch.utils.data.DataLoader(epoch, batch_size=None, num_workers=recipe.workers)
    bar = tqdm(loader, f"epoch {run.epoch + 1}/{recipe.epochs}", total=epoch.count, initial=run.batch, leave=False,
               unit="batch", disable=not progress, dynamic_ncols=True)  # fmt: skip
    saved = time.monotonic()
    for x, labels in bar:
        torch.manual_seed(epoch.seed(run.batch))  # dropout
        x, labels = x.to(device), labels.to(device)
        with torch.autocast(device.type, torch.bfloat16) if recipe.mixed else contextlib.nullcontext():
            outputs = network(x)
            loss = F.cross_entropy(outputs, labels)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        with torch.no_grad():
            for threshold in _thresholds(run.model):
                threshold.clamp_(min=SMALLEST_THRESHOLD)
        value = float(loss.detach())
        if not value < float("inf"):
            raise ValueError(
                f"train: the loss became {value} in epoch {run.epoch + 1}, batch {run.batch + 1}; lower the rate"
            )
        right = int((outputs.detach().argmax(1) == labels).sum())
        run.sums = [a + b for a, b in zip(run.sums, (value * len(labels), right, len(labels)), strict=True)]
        run.batch += 1
        bar.set_postfix(loss=f"{run.sums[0] / run.sums[2]:.3f}", right=f"{run.sums[1] / run.sums[2]:.1%}")
        if state is not None and time.monotonic() - saved > 60 * recipe.save_minutes:
            run.save(state)
            saved = time.monotonic()


def accuracy(model: nn.Module, data: Dataset, batch: int = 128) -> float:
    """Share of right answers of a network that takes one frame at a time; in eval mode meanwhile."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(x.to(device)).argmax(1).cpu() == labels).sum()) for x, labels in batches(data, max(batch, 100))
        )
    model.train(was_training)
    return right / len(data)


def _thresholds(model: nn.Module) -> Iterator[Tensor]:
    """The threshold of every QCFS activation."""
    for module in model.modules():
        if is_qcfs(module):
            yield module.get_parameter("thresh")


def _mean_threshold(model: nn.Module) -> float:
    """Mean over the layers; 0 where there is none."""
    means = [float(threshold.detach().mean()) for threshold in _thresholds(model)]
    return sum(means) / len(means) if means else 0.0


def plot(log: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Loss and accuracy by epoch, as PNG or SVG by the path's suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    epochs = [line["epoch"] for line in log]
    left.plot(epochs, [line["loss"] for line in log], color="black")
    left.set_ylabel("training loss")
    right.plot(epochs, [100 * line["accuracy"] for line in log], color="0.6", label="training images, as changed")
    if log and log[-1]["test_accuracy"] is not None:
        right.plot(epochs, [100 * line["test_accuracy"] for line in log], color="tab:blue", label="test images")
    right.set_ylabel("right answers (%)")
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    figure.suptitle(printable(title), parse_math=False)
    with written_atomically(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:] or "png", dpi=150)
    plt.close(figure)


def lines(log: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The log as text, a line for each epoch."""
    for line in log:
        test = "" if line["test_accuracy"] is None else f"   test {line['test_accuracy']:.2%}"
        yield (
            f"epoch {line['epoch']:3}   loss {line['loss']:.3f}   right {line['accuracy']:.2%}{test}   "
            f"theta {line['threshold']:.2f}   {line['seconds']:.0f} s"
        )
