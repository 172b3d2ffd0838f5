"""Spike masks: one byte for up to eight steps of a neuron, bit t % 8 of plane t // 8 is the spike at step t.

Count planes hold one byte a step instead. The first dimension tells which: T planes are counts (at T = 1 the two are
the same), ceil(T/8) planes are masks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def planes(T: int) -> int:
    """Mask planes of T steps."""
    return (T + 7) // 8


def at_step(x: Tensor, t: int, T: int) -> Tensor:
    """Step t of masks or count planes [.., N, ...]: uint8 values [N, ...]."""
    return x[t] if x.shape[0] == T else (x[t // 8] >> (t % 8)) & 1


def unpack(x: Tensor, T: int) -> Tensor:
    """Masks or count planes [.., N, ...] -> int64 values per step [T, N, ...]."""
    return torch.stack([at_step(x, t, T) for t in range(T)]).to(torch.int64)


def pack(spikes: Tensor) -> Tensor:
    """Spikes [T, N, ...] (bool or 0/1) -> masks [ceil(T/8), N, ...]."""
    T = spikes.shape[0]
    masks = torch.zeros((planes(T), *spikes.shape[1:]), dtype=torch.uint8, device=spikes.device)
    for t in range(T):
        masks[t // 8] |= spikes[t].to(torch.uint8) << (t % 8)
    return masks
