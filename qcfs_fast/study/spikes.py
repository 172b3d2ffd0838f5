"""Two figures of traced spikes (layer name -> bool [T, N, ...]): how often neurons fire, and how two traces differ."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def mean_rate(spikes: Mapping[str, Tensor]) -> float:
    """Share of neurons and steps with a spike, over all layers."""
    return sum(int(s.sum()) for s in spikes.values()) / sum(s.numel() for s in spikes.values())


def count_differing(spikes: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> tuple[int, int]:
    """How many spikes of two traces differ, and how many were compared."""
    return sum(int((s != others[k]).sum()) for k, s in spikes.items()), sum(s.numel() for s in spikes.values())
