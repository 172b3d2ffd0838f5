"""What every operator checks before a kernel runs: each failure names the operator, the operand and the remedy.

A kernel gets addresses and sizes and believes them, so no shape may pass here that it could not read. The values in a
tensor are not looked at: that would read it once more, and wait for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from .geometry import GEOMETRY, convolution_size, split
from .limits import MAX_COUNT, MAX_ELEMENTS, MAX_EXACT, MAX_EXTENT, MAX_SUM
from .masks import planes
from .windows import largest_value

# Sizes in the shape that an operand must have. Only a batch may be empty.
ANY = -1
BATCH = -2


def fail(op: str, what: str) -> NoReturn:
    raise ValueError(f"qcfs_fast::{op}: {what}")


def check_steps(op: str, T: int) -> None:
    if T < 1:
        fail(op, f"T must be at least 1 time step, got {T}")
    if T > MAX_SUM:
        fail(op, f"T must be at most {MAX_SUM} time steps, got {T}")


def check_elements(op: str, name: str, shape: Sequence[int]) -> None:
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        fail(op, f"{name} of shape {list(shape)} has more than {MAX_ELEMENTS} elements; use a smaller batch or image")


def check_multiple(op: str, name: str, multiple: int, least: int, most: int = MAX_EXACT) -> None:
    """The common multiple of the divisors of a pool."""
    if not least <= multiple <= most:
        fail(op, f"{name} must be from {least} to {most}, got {multiple}")


def check_tensor(
    op: str, name: str, x: Tensor, dtype: torch.dtype | tuple[torch.dtype, ...], shape: Sequence[int] | None
) -> None:
    """Dtype, and shape where given: sizes, ANY for one from 1, BATCH for one from 0."""
    if x.dtype != dtype and (not isinstance(dtype, tuple) or x.dtype not in dtype):
        wanted = dtype if isinstance(dtype, tuple) else (dtype,)
        fail(op, f"{name} must be {' or '.join(str(d) for d in wanted)}, got {x.dtype}")
    if shape is None:
        return
    fits = x.dim() == len(shape)
    if not fits or any(w not in (s, BATCH) and (w != ANY or s == 0) for w, s in zip(shape, x.shape, strict=True)):
        words = ", ".join({ANY: "from 1", BATCH: "from 0"}.get(size, str(size)) for size in shape)
        fail(op, f"{name} must have shape [{words}], got {list(x.shape)}")


def check_no_grad(op: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(
            f"qcfs_fast::{op}: an input requires grad, but spiking inference has no gradient; "
            "pass x.detach() or run under torch.no_grad()"
        )


def check_devices(op: str, first: Tensor, *others: Tensor | None) -> None:
    device = first.device
    for t in others:
        if t is not None and t.device != device:
            fail(op, f"all tensors must be on one device, got {device} and {t.device}; move the network with .to()")


def check_coding(op: str, name: str, x: Tensor, T: int) -> None:
    """Spikes are counts (T planes) or masks (ceil(T/8) planes)."""
    if x.shape[0] not in (T, planes(T)):
        fail(op, f"{name} must have {planes(T)} mask planes or {T} count planes for T={T}, got {x.shape[0]}")


def checked_geometries(op: str, geometry: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """The geometry of each of `count` convolutions."""
    if len(geometry) != GEOMETRY * count:
        fail(op, f"geometry must hold {GEOMETRY} ints for each of {count} sources, got {len(geometry)}")
    parts = split(geometry)
    for g in parts:
        if min(g[0:4]) < 1 or min(g[4:6]) < 0 or min(g[6:9]) < 1:
            fail(op, f"geometry {list(g)}: kernel, stride, dilation and groups must be positive, padding not negative")
        if max(g) > MAX_EXTENT:
            fail(op, f"geometry {list(g)}: no integer may exceed {MAX_EXTENT}")
    return parts


def checked_convolution(op: str, x: Tensor, weight: Tensor, g: Sequence[int]) -> tuple[int, int]:
    """Check one convolution's weight against its input [.., H, W, C]; returns the output's height and width."""
    height, width, channels = x.shape[-3:]
    shape = weight.shape
    if len(shape) != 4 or shape[0] != g[0] or shape[1] != g[1]:
        fail(op, f"weight must be [{g[0]}, {g[1]}, C/groups, O], got {list(shape)}")
    if shape[2] * g[8] != channels or shape[3] % g[8] != 0:
        fail(op, f"weight {list(shape)} with {g[8]} groups does not fit {channels} input channels")
    oh, ow = convolution_size(height, width, g)
    if oh < 1 or ow < 1:
        fail(op, f"the input of {height}x{width} is smaller than the kernel; use larger images")
    return oh, ow


def checked_windows(
    op: str, x: Tensor, rows: Sequence[int], cols: Sequence[int], multiple: int, counts: bool = False
) -> tuple[int, int]:
    """Check pooling windows against x [.., H, W, C]; returns the output's height and width.

    `counts`: the values go to count planes, one byte each.
    """
    height, width = x.shape[-3:-1]
    if len(rows) % 3 or len(cols) % 3 or not rows or not cols:
        fail(op, "rows and cols must hold three ints (first, last + 1, divisor) per output")
    for name, windows, size in (("rows", rows, height), ("cols", cols, width)):
        for first, end, divisor in zip(windows[0::3], windows[1::3], windows[2::3], strict=True):
            if not (0 <= first <= end <= size and 1 <= divisor <= MAX_SUM):
                fail(op, f"{name}: window ({first}, {end}, {divisor}) does not lie in 0..{size}")
    check_multiple(op, "multiple", multiple, 0, MAX_SUM)
    if multiple != 0:
        for h in set(rows[2::3]):
            for w in set(cols[2::3]):
                if multiple % (h * w):
                    fail(
                        op,
                        f"multiple={multiple} is not divisible by the window's {h}x{w}; "
                        "convert again with input_shape= set to this image size",
                    )
    if counts and (largest := largest_value(rows, cols, multiple)) > MAX_COUNT:
        fail(op, f"a window value can reach {largest}, but count planes hold at most {MAX_COUNT}; pool in two stages")
    return len(rows) // 3, len(cols) // 3
