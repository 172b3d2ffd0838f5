"""The shapes of a traced network's values, found without computing any."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..model.hooks import made_parameters_kept
from ..model.tracing import evaluating, is_normalize, symbolic_trace, without_values
from .values import (
    Image,
)

Shapes = dict[fx.Node, tuple[int, ...]]
LAST_SHAPE = "_qcfs_fast_input_shape"  # where a prepared model notes the shape of the images it last saw


class ShapeRecorder(fx.Interpreter):
    """Runs a graph and notes the shape of every tensor, without the batch."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.shapes: Shapes = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_normalize(self.fetch_attr(target)):  # which looks at values
            return args[0]
        return super().call_module(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(int(d) for d in value.shape[1:])
        return value


def propagate_shapes(gm: fx.GraphModule, input_shape: Sequence[int]) -> Shapes:
    """Run the graph on a batch of 1 without values: a copy of it whose tensors are on the meta device."""
    with made_parameters_kept(gm), torch.no_grad():
        copied = without_values(gm)
        recorder = ShapeRecorder(copied)
        first = next(iter((*gm.parameters(), *gm.buffers())), None)
        x = torch.zeros((1, *input_shape), dtype=None if first is None else first.dtype)
        try:
            with torch.device("meta"):
                recorder.run(x.to("meta"))
        except Exception as error:
            if "meta" not in str(error):
                raise
            copied, recorder = gm, ShapeRecorder(gm)  # it asks for the values of its parameters, as item() does
            recorder.run(x.to(None if first is None else first.device))
    own = dict(zip(copied.graph.nodes, gm.graph.nodes, strict=True))  # names may differ
    return {own[node]: shape for node, shape in recorder.shapes.items()}


def usable_shape(model: nn.Module, image: Image, known: Sequence[int] | None) -> tuple[int, ...] | None:
    """The shape of an image that the model runs on: the one given or last seen, or a small one; None: none found."""
    known = known or model.__dict__.get(LAST_SHAPE)
    if known is not None:
        return tuple(known)
    if image.vector:
        return (image.channels,)
    with evaluating(model):
        gm = symbolic_trace(model)
        for side in (32, 28, 64, 96, 224):
            shape = (image.channels, side, side)[: 2 if image.line else 3]
            with contextlib.suppress(Exception):  # whatever the model's own code raises
                propagate_shapes(gm, shape)
                return shape
    return None
