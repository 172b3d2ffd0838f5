"""Lowering of what stands behind the last layer: the tail of floats (network/tail.py) of an Answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..network.tail import OF_NUMBERS, RESIZE_MODES
from ..operators.geometry import POINTWISE
from .arithmetic import Arithmetic
from .sizes import whole
from .symbolic import zeros
from .values import (
    Answer,
    Current,
    Image,
    Laid,
    Row,
    Signal,
    composed,
    identity_current,
    without_choices,
)


class Ends(Arithmetic):
    """What follows the last layer: tails and the output's form."""

    def _tail(self, x: Any, name: str, dim: Any) -> Answer:
        """A step of the tail; its dimension is counted from the batch."""
        answer = self._answer(x)
        if name in OF_NUMBERS:
            return replace(answer, steps=(*answer.steps, (name,)))
        if name != "squeeze" and dim is None:
            dim = 1  # as PyTorch takes it for [N, classes] and [N, C, H, W]
        if not isinstance(dim, int) or not -answer.dims < dim < answer.dims or dim == 0:
            raise self.fail(
                f"{name} over dimension {dim} takes in the batch, or several dimensions. Remedy: name one dimension "
                f"from 1 to {answer.dims - 1}"
            )
        dim %= answer.dims
        if name != "squeeze":
            return replace(answer, steps=(*answer.steps, (name, dim)))
        size = answer.current.channels if x is not answer and dim == 1 and answer.current.vector else None
        size = self._shape(x)[dim] if size is None else size
        if not isinstance(size, int):
            raise self._shape_needed("squeezes a dimension whose size is not known")
        return answer if size != 1 else Answer(answer.current, answer.dims - 1, (*answer.steps, (name, dim)))

    def _answer(self, x: Any) -> Answer:
        """A value as an output."""
        if isinstance(x, Answer):
            return x
        if isinstance(x, Laid):  # a map whose height or width of one pixel was squeezed
            if not whole(x.size):
                raise self._shape_needed("ends with a map whose shape is not known")
            if 1 not in x.size:
                raise self.fail("the model's output is a map whose pixels stand in one dimension. Remedy: a map")
            return Answer(self._answered(x.value), 3, (("squeeze", 2 + x.size.index(1)),))
        if isinstance(x, Row):
            return Answer(self._answered(x.value), 2 + x.ones, (("unsqueeze", 1),) * x.ones)
        current = self._answered(x)
        return Answer(current, self._rank(current))

    def _answered(self, x: Any) -> Current:
        """The value as what a readout gives."""
        if isinstance(x, Signal) and (x.index is not None or len(x.parts) > 1) and not x.vector:
            choice = torch.eye(x.channels, dtype=torch.float64)[:, :, None, None]
            x = composed(Current(zeros(x.channels), (), (x,)), choice, POINTWISE, zeros(x.channels), "channels")
        if isinstance(x, Signal):
            x = replace(identity_current(replace(x, vector=False)), flattened=x.vector)
        if not isinstance(x, Current):
            raise self.fail(
                "the model's output, or one of them, is not a layer's output. Remedy: return these alone, and not "
                "None, constants or the image beside them"
            )
        return without_choices(x)

    def _resized(self, x: Any, mode: str, size: Any, scale: Any, align_corners: Any) -> Answer:
        """A resize behind the last layer, of the mean over the steps: linear, but not behind a softmax."""
        if mode not in RESIZE_MODES:
            raise self.fail(f"resizes with mode={mode!r}. Remedy: one of {', '.join(RESIZE_MODES)}")
        if isinstance(x, Image):
            raise self.fail("resizes the image itself. Remedy: resize images before they enter")
        answer = self._answer(x)
        if any(name in OF_NUMBERS or name in ("softmax", "log_softmax") for name, *_ in answer.steps):
            raise self.fail("resizes behind a softmax or the like. Remedy: resize first")
        if answer.dims != 4:
            raise self.fail("resizes what is no map")
        if scale is not None:
            scale = [float(f) for f in (scale if isinstance(scale, (tuple, list)) else [scale] * 2)]
        elif any(isinstance(n, fx.Node) for n in self.node.all_input_nodes[1:]):
            image = self._image_shape()
            sizes = list(size) if isinstance(size, (tuple, list)) else [size] * 2
            if image is None or not whole(sizes):
                raise self._shape_needed("resizes to a size that is not known")
            if sizes != list(image[-2:]):
                raise self.fail("resizes to a size that is neither the image's nor a number. Remedy: scale_factor")
            size = "image"
        else:
            size = list(size) if isinstance(size, (tuple, list)) else [size] * 2
        how = {"mode": mode, "size": size, "scale": scale, "align_corners": align_corners}
        return replace(answer, steps=(*answer.steps, ("resize", how)))
