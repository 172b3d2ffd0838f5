"""trace: the spikes of a converted network, layer by layer."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from ..operators import masks
from .layers import EncodingLayer, Layer, SpikingLayer
from .snn import SNN


def trace(snn: SNN, x: Tensor, T: int | None = None) -> OrderedDict[str, Tensor]:
    """Run the network and return its spikes.

    Args:
        snn: a converted network.
        x: images as for ``snn(x)``.
        T: time steps, default ``snn.T``.

    Returns:
        Ordered mapping from layer name (the path of its activation) to a bool tensor [T, N, C, H, W], or
        [T, N, C] for a linear layer, in order of execution.
    """
    if not isinstance(snn, SNN):
        raise TypeError(f"trace: expected a converted network (SNN), got {type(snn).__name__}")
    steps = snn.T if T is None else T
    found: OrderedDict[str, Tensor] = OrderedDict()

    def watch(name: str, layer: Layer, value: Any) -> None:
        if isinstance(layer, (EncodingLayer, SpikingLayer)):
            spikes = masks.unpack(value, steps).to(torch.bool)
            found[name] = spikes.permute(0, 1, 4, 2, 3) if spikes.dim() == 5 else spikes

    snn.run(x, steps, False, watch)
    return found
