"""State: what a run of a network leaves for the one that goes on from it.

A layer leaves its neurons' membrane potentials, the one that reads the image also the image's current, and the readout
the spikes counted so far. Two ways of running a network want that in two forms. Operators take and give tensors, by
layer and name. The native call replaces everything in place, in one buffer, whose layout its plan tells. A state has
the form in which the last run left it, and takes the other when a run wants that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn


class State:
    """What layers left.

    Attributes:
        shape: of the images, [N, ...].
        memory: a buffer that nobody reads any more, in which the native call may leave a state of the same size; new
            memory costs the first run more than it takes to write there.
    """

    def __init__(self, shape: Sequence[int], memory: Tensor | None = None) -> None:
        self.shape, self.memory = tuple(shape), memory
        self._held: dict[nn.Module, dict[str, Tensor]] = {}
        # Instead of that, where the native call left it: int32, the plan that tells what lies where, nodes by name.
        self._buffer: Tensor | None = None
        self._plan: Any = None
        self._layers: Mapping[str, nn.Module] = {}
        self._same_image = True

    def before(self, same_image: bool) -> State:
        """That of a run to come, which operators change in copies; without the image's current if another one comes."""
        made = State(self.shape)
        made._buffer, made._plan, made._layers, made._same_image = self._buffer, self._plan, self._layers, same_image
        made._held = {layer: dict(held) for layer, held in self._held.items()}
        for held in () if same_image else made._held.values():
            held.pop("current", None)
        return made

    def of(self, layer: nn.Module) -> dict[str, Tensor]:
        """What a layer left, by name, to be replaced."""
        return self._by_layer().setdefault(layer, {})

    def buffer(self, plan: Any, layers: Mapping[str, nn.Module]) -> Tensor:
        """What all layers left, as a native plan wants it: int32, to be replaced in place."""
        self._plan, self._layers, self._same_image = plan, layers, True
        if self._buffer is None:
            size, buffer = plan.kept_bytes // 4, self.memory
            if buffer is None or buffer.numel() != size:
                buffer = torch.empty(size, dtype=torch.int32)
            if self._held:
                for node, what, shape, start in plan.kept:
                    left = self._held[layers[node]].get(what)
                    if left is not None:
                        buffer[start : start + left.numel()].view(shape).copy_(left)
            self._buffer, self._held, self.memory = buffer, {}, None
        return self._buffer

    def abandoned(self) -> Tensor | None:
        """The buffer of a state that nobody needs any more."""
        return self.memory if self._buffer is None else self._buffer

    def chosen(self, index: Tensor) -> State:
        """That of some samples only."""
        made = State((index.numel(), *self.shape[1:]))
        for layer, held in self._by_layer().items():
            made._held[layer] = {
                what: t.index_select(0 if what == "current" else 1, index.to(t.device)) for what, t in held.items()
            }
        return made

    def _by_layer(self) -> dict[nn.Module, dict[str, Tensor]]:
        if self._buffer is not None:
            for node, what, shape, start in self._plan.kept:
                if self._same_image or what != "current":
                    left = self._buffer[start : start + prod(shape)].view(shape)
                    self._held.setdefault(self._layers[node], {})[what] = left
            self._buffer = None
        return self._held
