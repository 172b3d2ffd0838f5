"""The QCFS activation and everything that recognises one.

QCFS (quantization clip-floor-shift) is the activation an ANN is trained with so that a spiking network
of integrate-and-fire neurons reproduces it: Bu et al., ICLR 2022, section 4.2.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import nn

from ..errors import ConversionError


class _RoundDown(torch.autograd.Function):
    """floor with the straight-through gradient (identity)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.floor(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def qcfs(z: torch.Tensor, threshold: torch.Tensor, levels: int) -> torch.Tensor:
    """theta * clip(floor(z * L / theta + 1/2) / L, 0, 1), halves rounding up.

    The gradient passes floor unchanged: d/dz is 1 inside [0, theta] and 0 outside; d/dtheta follows from
    the formula (0 below 0, quantised minus exact z/theta inside, 1 above theta).
    """
    clipped = torch.clamp(z / threshold, 0, 1)
    return threshold * (_RoundDown.apply(clipped * levels + 0.5) / levels)


class QCFS(nn.Module):
    """Trainable quantised activation that converts to an integrate-and-fire neuron.

    Args:
        levels: L, the number of steps of the staircase used in training (a positive int).
        threshold: initial theta, in units of the input (a positive float); it is learned.
        channels: with a number of channels, theta is learned per channel (dimension 1 of the input).

    Shape: any; with ``channels`` the input is [N, channels, ...].

    The state-dict key of theta is ``thresh`` (shape [1] or [channels]), as in the authors' checkpoints.
    """

    def __init__(self, levels: int = 8, threshold: float = 8.0, channels: int | None = None) -> None:
        super().__init__()
        if isinstance(levels, bool) or not isinstance(levels, int) or levels < 1:
            raise ValueError(f"QCFS: levels must be a positive integer, got {levels!r}")
        if not 0 < float(threshold) < float("inf"):
            raise ValueError(f"QCFS: threshold must be a positive finite number, got {threshold!r}")
        if channels is not None and (not isinstance(channels, int) or channels < 1):
            raise ValueError(f"QCFS: channels must be None or a positive integer, got {channels!r}")
        self.L = levels
        self.ceiling = float("inf")  # of the ReLU whose place it takes, 6 for ReLU6; calibrate stays below
        self.initial_threshold = float(threshold)
        self.thresh = nn.Parameter(torch.full((channels or 1,), float(threshold)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return qcfs(x, over_channels(self.thresh, x), self.L)

    def extra_repr(self) -> str:
        theta = f"{self.thresh.item():.4g}" if self.thresh.numel() == 1 else f"[{self.thresh.numel()} channels]"
        return f"levels={self.L}, threshold={theta}"


def over_channels(threshold: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Shape a [1] or [C] threshold so that it broadcasts over x of shape [N, C, ...]."""
    if threshold.numel() == 1:
        return threshold.reshape(())
    if x.dim() < 2 or x.shape[1] != threshold.numel():
        raise ValueError(f"QCFS: {threshold.numel()} thresholds do not fit an input of shape {tuple(x.shape)}")
    return threshold.reshape(-1, *([1] * (x.dim() - 2)))


def is_qcfs(module: nn.Module) -> bool:
    """Whether a module is a QCFS activation: ours, or any with a ``thresh`` tensor and a level count ``L``."""
    # Looked up in the dictionaries: while torch.fx traces, getattr returns proxies.
    thresh = module._parameters.get("thresh", module._buffers.get("thresh"))
    return thresh is not None and isinstance(module.__dict__.get("L"), int)


def refuse_other_formula(module: Any, name: str) -> None:
    """ConversionError where the forward of an activation that is not of this package is no QCFS of its thresholds."""
    theta = module.thresh.detach().reshape(-1)
    if type(module) is QCFS or not bool(theta.isfinite().all() and (theta > 0).all()):
        return
    inside = torch.tensor([0.25, 0.75])  # of a step: not where the staircase jumps
    steps = (torch.arange(-2, module.L + 2)[:: 1 + module.L // 64, None] + inside).flatten() / module.L
    for shape in ((len(steps), len(theta), 1, 1), (len(steps), len(theta))):  # it may know the rank of what it takes
        x = (steps.to(theta)[:, None] * theta).reshape(shape)
        with contextlib.suppress(Exception), torch.no_grad():
            found = module(x)
            break
    else:
        return
    if not torch.allclose(found, qcfs(x, over_channels(theta, x), module.L), 1e-3):
        raise ConversionError(
            f"{name}: has a thresh and levels L, and its forward computes something else than QCFS of them, "
            "thresh / L * floor(x L / thresh + 1/2), cut to 0 and thresh. Remedy: qcfs_fast.QCFS in its place"
        )


def thresholds(module: Any, name: str, channels: int) -> torch.Tensor:
    """The thresholds of an activation as float64 [channels]; raises ConversionError naming the site."""
    theta = module.thresh.detach().to("cpu", torch.float64).reshape(-1)
    if theta.numel() not in (1, channels):
        raise ConversionError(
            f"{name}: {theta.numel()} thresholds for {channels} channels; use one, or one per channel"
        )
    if not bool(torch.isfinite(theta).all()) or not bool((theta > 0).all()):
        bad = theta[~(torch.isfinite(theta) & (theta > 0))][0].item()
        what = (
            "is not finite: the training diverged"
            if not math.isfinite(bad)
            else "divides by zero in the ANN itself"
            if bad == 0
            else "lets negative inputs alone pass in the ANN, and no neuron fires on these"
        )
        raise ConversionError(
            f"{name}: its trained threshold {bad:.4g} {what}; train further from a larger threshold (the paper's "
            "is 8.0), or set it with qcfs_fast.calibrate and train on"
        )
    return theta.expand(channels).clone()
