"""calibrate: thresholds from data, so that a prepared ReLU network starts well before fine-tuning.

The network runs as a ReLU network (each QCFS passes max(z, 0), cut at 6 where it stands for a ReLU6) while positive
inputs of each site are sampled; then theta is chosen per site:

    percentile   the given percentile of the positive inputs (robust maximum; Rueckauer et al., Frontiers in
                 Neuroscience 2017, section 2.2.2, use 99.9)
    mse          the theta that minimises the mean of (relu(z) - qcfs(z; theta, L))^2 on the sample
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import ConversionError
from .qcfs import is_qcfs, qcfs

METHODS = ("percentile", "mse")
SAMPLES = 1 << 17  # kept per threshold site (per channel: divided among the channels)
PER_BATCH = 1 << 14
CANDIDATES = 80


class _Sampler:
    """Random sample of a site's positive inputs, per channel when the site has thresholds per channel."""

    def __init__(self, module: Any, seed: int) -> None:
        self.channels = module.thresh.numel()
        self.ceiling = float(getattr(module, "ceiling", float("inf")))
        self.generator = torch.Generator().manual_seed(seed)
        self.kept: list[list[Tensor]] = [[] for _ in range(self.channels)]

    def add(self, z: Tensor) -> None:
        rows = z.detach().transpose(0, 1).reshape(self.channels, -1) if self.channels > 1 else z.detach().reshape(1, -1)
        limit = max(256, PER_BATCH // self.channels)
        for i, row in enumerate(rows):
            positive = row[row > 0].clamp(max=self.ceiling).to("cpu", torch.float32)
            if positive.numel() > limit:
                positive = positive[torch.randint(positive.numel(), (limit,), generator=self.generator)]
            self.kept[i].append(positive)

    def sample(self, channel: int) -> Tensor:
        values = torch.cat(self.kept[channel]) if self.kept[channel] else torch.empty(0)
        limit = max(1024, SAMPLES // self.channels)
        if values.numel() > limit:
            values = values[torch.randint(values.numel(), (limit,), generator=self.generator)]
        return values


def _best_theta(sample: Tensor, levels: int) -> float:
    """The threshold with the least mean squared quantisation error on the sample."""
    top = float(torch.quantile(sample, 0.9999))
    candidates = top * torch.linspace(1.2 / CANDIDATES, 1.2, CANDIDATES)
    errors = torch.stack([torch.mean((sample - qcfs(sample, theta, levels)) ** 2) for theta in candidates])
    return float(candidates[int(torch.argmin(errors))])


def images_of(batches: Iterable[Any], caller: str) -> Iterator[Tensor]:
    """The image tensors of batches that may be tuples with labels; `caller` is named in errors."""
    seen = False
    for batch in batches:
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, Tensor):
            raise TypeError(f"{caller}: expected tensors or (tensor, ...) tuples, got {type(x).__name__}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{caller}: a batch holds NaN or infinity; clean the data first")
        seen = True
        yield x
    if not seen:
        raise ValueError(f"{caller}: batches is empty; give at least one batch of images")


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    method: str = "mse",
    percentile: float = 99.9,
    progress: bool = True,
    seed: int = 0,
) -> nn.Module:
    """Set the thresholds of every QCFS of a model from data, in place.

    Args:
        model: a prepared network (weights of the ReLU network it was made from).
        batches: an iterable of image batches, or of (images, ...) tuples as a DataLoader gives; a few hundred
            images are enough. Labels are not used.
        method: "mse" (least squared quantisation error) or "percentile".
        percentile: for "percentile", in (0, 100].
        progress: show a progress bar.
        seed: of the sampling of activations.

    Returns:
        The model. A site that never receives a positive input keeps its threshold, with a warning.
    """
    if method not in METHODS:
        raise ValueError(f"calibrate: method must be one of {', '.join(METHODS)}, got {method!r}")
    if not 0 < percentile <= 100:
        raise ValueError(f"calibrate: percentile must be in (0, 100], got {percentile}")
    sites = [(name, m) for name, m in model.named_modules() if is_qcfs(m)]
    if not sites:
        raise ConversionError("calibrate: the model has no QCFS activation; call qcfs_fast.prepare(model) first")
    samplers = {name: _Sampler(m, seed) for name, m in sites}

    def hook(name: str) -> Any:
        def run(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            samplers[name].add(args[0])
            return torch.clamp(args[0], 0, samplers[name].ceiling)

        return run

    first = next(model.parameters())
    was_training = model.training
    model.eval()
    handles = [m.register_forward_hook(hook(name)) for name, m in sites]
    try:
        with torch.no_grad():
            for x in images_of(tqdm(batches, desc="calibrating", unit="batch", disable=not progress), "calibrate"):
                model(x.to(first.device, first.dtype))
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    for name, module in tqdm(sites, desc="thresholds", unit="layer", disable=not progress):
        theta = module.thresh.detach().clone().reshape(-1)
        silent = 0
        for c in range(theta.numel()):
            sample = samplers[name].sample(c)
            if sample.numel() == 0:
                silent += 1
            elif method == "percentile":
                theta[c] = float(torch.quantile(sample, percentile / 100))
            else:
                theta[c] = _best_theta(sample, int(module.L))
        if silent:
            warnings.warn(
                f"calibrate: {name} received no positive input"
                f"{f' in {silent} channels' if theta.numel() > 1 else ''}; its threshold is unchanged",
                stacklevel=2,
            )
        with torch.no_grad():
            theta.clamp_(max=samplers[name].ceiling)  # a spike too many would stand for more than the ReLU lets pass
            module.initial_threshold = float("nan")  # no longer what it began with, even where the two are equal
            module.thresh.copy_(theta.reshape(module.thresh.shape))
    return model
