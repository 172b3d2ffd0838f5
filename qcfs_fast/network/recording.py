"""trace: the spikes of a converted network, layer by layer."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from ..operators import masks
from .layers import EncodingLayer, Layer, Signed, SpikingLayer, is_constant, pieces
from .snn import SNN


def trace(snn: SNN, x: Tensor, T: int | None = None) -> OrderedDict[str, Tensor]:
    """Run the network and return its spikes.

    Args:
        snn: a converted network.
        x: images as for ``snn(x)``.
        T: time steps, default ``snn.T``, or those that x has.

    Returns:
        Ordered mapping from layer name (the path of its activation) to a bool tensor [T, N, C, H, W], [T, N, C, L] or
        [T, N, C] for a linear layer, in order of execution. Spikes of signed neurons are int8: -1, 0 and 1. In sum
        mode there are uint8 counts [1, N, ...], the activations of an integer ANN.
    """
    if not isinstance(snn, SNN):
        raise TypeError(f"trace: expected a converted network (SNN), got {type(snn).__name__}")
    found: OrderedDict[str, Tensor] = OrderedDict()
    run = snn._settled_run(x, T, False, 0)

    def spikes_of(value: Any) -> Tensor:
        if run.neuron.mode == "sum":
            return value
        if isinstance(value, Signed):
            signs = [masks.unpack(v, run.steps) for v in value]
            return (signs[0] - signs[1]).to(torch.int8)
        spikes = masks.unpack(value, run.steps)[: run.T]
        return spikes.to(torch.int8 if run.neuron.mode == "signed" else torch.bool)

    def watch(name: str, layer: Layer, value: Any) -> None:
        parts = pieces(name, layer)
        for part in parts:
            del found[part]
        if parts or (isinstance(layer, (EncodingLayer, SpikingLayer)) and not is_constant(name)):
            spikes = spikes_of(value)
            found[name] = snn.as_given(spikes.permute(0, 1, 4, 2, 3)) if spikes.dim() == 5 else spikes

    snn._execute(x, run, watch)
    return found
