"""A run without memory: what a network would ask and compute on an image, before it is loaded, saved or run for one.

The image and all tensors have shapes and no values (torch's device meta). So every operator checks its operands, and
what it would compute is bound.

And a run without kernels, on a GPU: each operator packs its weights and makes its tables, and computes nothing. What
lives on after a call is then made before the first one. A call that torch.compile records into a CUDA graph
(mode="reduce-overhead") may not make such a thing: its memory belongs to the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..backend.protocol import getting_ready
from ..errors import FormatError
from ..operators.limits import MAX_HELD, MAX_STATED
from .layers import IMAGE, PIXELS, Layer, Run, SpikePool, signs
from .schema import require, whole


def rehearsed(
    layers: Sequence[tuple[str, Layer]], input_shape: Any, run: Run
) -> tuple[list[int], dict[str, tuple[int, int]]]:
    """Run a network on nothing but the shape of one image, [C, H, W]; a line may be [C, 1, L].

    Returns:
        The shape as the model has it (a line is [C, L]), and height and width of what each pool reads.

    Raises:
        FormatError: no image has this shape, the network cannot run on it, or it would ask for too much memory.
    """
    image = layers[0][1].config
    sound = isinstance(input_shape, (list, tuple)) and all(whole(1).fits(d) for d in input_shape)
    shape = list(input_shape) if sound else []
    if image.line and len(shape) == 3 and shape[1] == 1:
        del shape[1]
    fits = len(shape) == image.dims - 1 and shape[0] == image.channels
    wanted = f"[{image.channels}{PIXELS[image.dims]}]"
    require(fits, f"input_shape {input_shape!r} is none that the image input takes, which is {wanted}")
    values: dict[str, Any] = {IMAGE: torch.empty((1, *shape), device="meta")}
    sizes = {}
    last = {node: name for name, layer in layers for node in layer.inputs}
    held = 0
    for name, layer in layers:
        twin = copy(layer)
        twin.__dict__["_buffers"] = {key: t.to("meta") for key, t in layer.tensors()}
        if isinstance(layer, SpikePool):
            height, width = signs(values[layer.inputs[0]])[0].shape[2:4]
            sizes[name] = (height, width)
        try:
            with _Bound():
                values[name] = twin(values, run)
        except (ValueError, RuntimeError) as error:
            raise FormatError(f"{name}: cannot run on an image of the shape {shape} stated: {error}") from error
        held += _bytes_of(values[name])
        require(held <= MAX_HELD, f"{name}: spikes of more than {MAX_HELD} bytes would wait for their readers")
        held -= sum(_bytes_of(values[node]) for node in set(layer.inputs) if last[node] == name)
    return shape, sizes


def get_ready(layers: Sequence[tuple[str, Layer]], input_shape: Sequence[int], run: Run, device: torch.device) -> None:
    """Pack the weights of a network that has come to a GPU, and make the tables for images of this shape."""
    values: dict[str, Any] = {IMAGE: torch.empty((1, *input_shape), device=device)}
    with getting_ready():
        for name, layer in layers:
            values[name] = layer(values, run)


def _bytes_of(value: Any) -> int:
    """Of what a node sends; the image does not count, of which one run has one."""
    return sum(t.numel() * t.element_size() for t in signs(value) if isinstance(t, Tensor) and t.dtype is torch.uint8)


class _Bound(TorchDispatchMode):
    """Refuses an operator whose result would take more memory than a file may ask for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(result):
            if isinstance(t, Tensor) and t.numel() * t.element_size() > MAX_STATED:
                raise ValueError(f"a node would compute {t.numel() * t.element_size()} bytes, more than {MAX_STATED}")
        return result
