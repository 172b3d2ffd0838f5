"""Triton launchers: the operators on CUDA or ROCm tensors, without a compiler of ours.

The kernels and their layouts are in kernels.py. This file plans the launches: it groups a layer's sources and steps,
says which weights the matrix units want repacked, chooses tiles (tiles.py) and allocates.

Triton is imported here and nowhere else in the package, when the first operator needs it. In its interpreter
(TRITON_INTERPRET=1) the same launchers run on CPU tensors.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ...operators.finite import refuse_not_finite
from ...operators.geometry import split
from ...operators.neuron import MODES
from ...operators.signature import (
    Conv2dCurrent,
    Conv2dEncode,
    Conv2dIf,
    Conv2dIfFrom,
    Count,
    MaxPool,
    Pool,
    PoolCounts,
    QuantizeInput,
    Readout,
)
from ..packing import Packed, Packing, window_table
from ..protocol import GpuKernels, Plan
from . import kernels, tiles

MAX_STEPS = 8  # that a launch holds in registers: the bits of a mask byte
KERNELS = GpuKernels("triton")
INTERPRETED = not isinstance(kernels.count, triton.JITFunction)
HIP = torch.version.hip is not None

MATRIX_HIP = ("gfx90a", "gfx942", "gfx950")
MATRIX_SM120 = (3, 3, 1)  # the first Triton that can


def unavailable() -> str:
    """Why this module, though loaded, cannot run; empty if it can."""
    if INTERPRETED:
        return ""
    if not torch.cuda.is_available():
        return "Triton is installed, but torch sees no GPU"
    try:  # the first use of Triton's driver compiles a few lines of C
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"Triton cannot use the GPU ({type(error).__name__}: {error})"
    return ""


def triton_version() -> tuple[int, ...]:
    return tuple(int(v) for v in re.findall(r"\d+", triton.__version__)[:3])


def has_matrix_units(backend: str, arch: int | str, version: tuple[int, ...]) -> bool:
    """Whether this Triton turns an int8 tl.dot into matrix instructions there (elsewhere it may not even compile)."""
    if backend == "hip":
        return arch in MATRIX_HIP
    if int(arch) >= 120:
        return version >= MATRIX_SM120
    return int(arch) >= 80


@functools.lru_cache(maxsize=64)
def _matrix_units(device: torch.device) -> bool:
    if INTERPRETED:
        return True
    if HIP:
        arch = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return has_matrix_units("hip", arch, triton_version())
    major, minor = torch.cuda.get_device_capability(device)
    return has_matrix_units("cuda", 10 * major + minor, triton_version())


# Matrix units pay from this many inputs per group and tap on; below, most of a tile would be padding.
MATRIX_INPUTS = 8
# Sums of digit products fit 32 bits for any data below these depths (inputs x taps over all products of a launch):
# masks 2^31 / (32768 + 128), one digit of counts 2^31 / (128 * 128), one digit of masks 2^31 / 128.
HORNER_DEPTH = 65281
COUNT_DEPTH = 131072
MASK_DEPTH = 16777216
MAX_ROWS = 2**31 - 1024
MAX_REGISTERS = 255  # a CUDA thread can have; left to choose, ptxas spills a few to fit one more block on a processor


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel; double arithmetic must round after every operation, so contraction is off."""
    if min(grid) == 0:
        return
    limit = {} if HIP else {"maxnreg": MAX_REGISTERS}
    kernel[grid](*args, enable_fp_fusion=False, **limit, **options)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _rows(op: str, *sizes: int) -> int:
    """Number of output pixels (or samples) of a launch; kernels count them in 32 bits, to the end of the last tile."""
    rows = math.prod(sizes)
    if rows > MAX_ROWS:
        raise ValueError(
            f"qcfs_fast::{op}: {rows} output pixels are more than the {MAX_ROWS} of one call; use smaller batches"
        )
    return rows


def _power(size: int, least: int, most: int) -> int:
    """The power of two that covers `size`, within limits."""
    return max(least, min(most, 1 << max(size - 1, 0).bit_length()))


# ------------------------------------------------------------------------------------------ weights


def pack_weight(w: Tensor) -> Packed:
    """int16 or int8 [KH, KW, K, O] -> what the matrix units want.

    Base-256 digits, high first, int8 [digits, KH, KW, O, KP] with K innermost and padded to 16; and 128 * sum of w,
    int32 [O].
    """
    if w.dtype == torch.int8:
        digit_planes = [w]
    else:
        low = (w & 255).to(torch.uint8).view(torch.int8)
        digit_planes = [((w - low) >> 8).to(torch.int8), low]
    padding = -w.shape[2] % 16
    digits = torch.nn.functional.pad(torch.stack(digit_planes).transpose(3, 4), (0, padding)).contiguous()
    sums = (w.to(torch.int64).sum((0, 1, 2)) * 128).to(torch.int32)
    return digits, sums


# ----------------------------------------------------------------------------------- spiking layers


@dataclass(frozen=True)
class Product:
    x: Tensor
    weight: Tensor
    key: Tensor  # the tensor the caller holds, under which the packed weight is kept
    geometry: tuple[int, ...]
    count: bool
    scale: int

    @property
    def inputs(self) -> int:
        return self.weight.shape[2]

    @property
    def depth(self) -> int:
        return self.inputs * self.geometry[0] * self.geometry[1]

    @property
    def fits_matrix(self) -> bool:
        """Whether matrix units pay and their 32-bit sums cannot saturate."""
        return self.inputs >= MATRIX_INPUTS and self.depth < (COUNT_DEPTH if self.count else MASK_DEPTH)

    def operands(self, first: int) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
        """x from plane `first` on, its size and the geometry as the kernels take them."""
        _, _, h, w, c = self.x.shape
        kh, kw, sh, sw, ph, pw, dh, dw, _ = self.geometry
        return self.x[first], (h, w, c), (kw, kh * kw, sh, sw, ph, pw, dh, dw)


@dataclass(frozen=True)
class Residual:
    x: Tensor
    amplitude: Tensor
    count: bool


@dataclass(frozen=True)
class Launch:
    """Sources that one launch sums; the last launch of a layer also fires."""

    products: tuple[Product, ...]
    residuals: tuple[Residual, ...]
    direct: bool


def plan(products: Sequence[Product], residuals: Sequence[Residual], matrix_units: bool) -> list[Launch]:
    """Cover all sources: direct products one by one, the others in pairs, two residuals with the last launch."""
    launches = [Launch((p,), (), True) for p in products if not (matrix_units and p.fits_matrix)]
    waiting = [p for p in products if matrix_units and p.fits_matrix]
    while waiting:
        first, *rest = waiting
        fits = [
            p
            for p in rest
            if (p.geometry[8], p.scale) == (first.geometry[8], first.scale)
            and first.depth + p.depth < (COUNT_DEPTH if first.count or p.count else MASK_DEPTH)
        ]
        pair = (first, fits[0]) if fits else (first,)
        waiting = [p for p in rest if p is not pair[-1]]
        launches.append(Launch(pair, (), False))
    if not launches:
        launches = [Launch((), (), True)]
    last = launches.pop()
    launches += [Launch((), (r,), True) for r in residuals[2:]]
    launches.append(Launch(last.products, tuple(residuals[:2]), last.direct))
    return launches


@dataclass
class _StepGroup:
    """Up to 8 consecutive steps of a layer, and the tensors that pass between its launches.

    Membranes are [rows, N, OH, OW, O]; v_in is None where the layer begins, v_out where nothing follows.
    """

    first: int
    steps: int
    v_in: Tensor | None
    v_out: Tensor | None
    out: Tensor
    negative: Tensor | None  # masks of negative spikes

    def start(self, count: bool) -> int:
        """The plane at which a spike tensor's bytes for these steps begin."""
        return self.first if count else self.first // MAX_STEPS


def _spiking_launch(
    launch: Launch,
    packed: Sequence[Packed],
    group: _StepGroup,
    partial_in: Tensor | None,
    partial_out: Tensor | None,
    current: Tensor | None,
    bias: Tensor,
    threshold: Tensor,
) -> None:
    N, OH, OW, O = group.out.shape
    M = _rows("conv2d_if", N, OH, OW)
    none = threshold  # stands in for absent operands, which no kernel touches
    residuals: list[Tensor] = []
    for r in launch.residuals:
        residuals += [r.x[group.start(r.count)], r.amplitude]
    coding = [r.count for r in launch.residuals] + [False, False]
    state = [current, bias, threshold, group.v_in, group.v_out, partial_in, partial_out, group.out]
    shared = [*residuals, *([none] * (4 - len(residuals))), *(none if t is None else t for t in state)]
    fire = partial_out is None
    flags = {
        "STEPS": group.steps,
        "R": len(launch.residuals),
        "RCOUNT0": coding[0],
        "RCOUNT1": coding[1],
        "CURRENT": fire and current is not None,
        "PARTIAL": partial_in is not None,
        "FIRE": fire,
        "CONTINUED": fire and group.v_in is not None,
        "CONTINUES": fire and group.v_out is not None,
    }
    if launch.direct:
        product: list[Any] = [none, none, 0, *[1] * 12]
        outputs, scale, count, grouped = O, 1, False, False
        if launch.products:
            (p,) = launch.products
            x, size, window = p.operands(group.start(p.count))
            product = [x, p.weight, p.x.stride(0), *size, p.inputs, *window]
            outputs, count, grouped = O // p.geometry[8], p.count, p.geometry[8] > 1
            scale = p.scale
        tile = tiles.plain(O, group.steps, INTERPRETED)
        _launch(
            kernels.spiking_direct,
            (_blocks(M, tile.m), _blocks(O, tile.n)),
            *product,
            *shared,
            M, OH, OW, O, outputs, M * O,
            PRODUCTS=len(launch.products), SCALE=scale, GROUPED=grouped, COUNT=count, **flags,
            BM=tile.m, BN=tile.n, num_warps=tile.warps,
        )  # fmt: skip
        return
    operands: list[Any] = []
    for p, (digits, sums) in zip(launch.products, packed, strict=True):
        x, size, window = p.operands(group.start(p.count))
        operands += [x, digits, sums, p.x.stride(0), digits.stride(0), *size, p.inputs, digits.shape[-1], *window]
    first, second = launch.products[0], launch.products[1:]
    if not second:
        operands += [none, none, none, 0, 0, *[1] * 13]
    groups = first.geometry[8]
    outputs = O // groups
    counts = [p.count for p in launch.products]
    depth = sum(p.depth for p in launch.products)
    digits_used = 1 if first.weight.dtype == torch.int8 else 2
    horner = digits_used == 1 or (not any(counts) and depth < HORNER_DEPTH)
    flags |= {
        "PRODUCTS": len(launch.products),
        "DIGITS": digits_used,
        "SCALE": first.scale,
        "HORNER": horner,
        "COUNT0": counts[0],
        "COUNT1": bool(counts[1:]) and counts[1],
        "PTX": not INTERPRETED and not HIP,
    }

    def run(tile: tiles.Tile) -> None:
        _launch(
            kernels.spiking_dot,
            (_blocks(M, tile.m) * _blocks(outputs, tile.n), groups),
            *operands,
            *shared,
            M, OH, OW, O, outputs, M * O,
            **flags,
            BM=tile.m, BN=tile.n, BK=tile.k, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    problem = tiles.Problem(
        rows=M,
        outputs=outputs,
        groups=groups,
        inputs=max(p.inputs for p in launch.products),
        depth=depth,
        steps=group.steps,
        accumulators=group.steps * (1 if horner else 2),
        variant="".join(f"{k}{int(v)}" for k, v in sorted(flags.items())),
    )
    run(tiles.choose(problem, run, first.x.device, INTERPRETED))


def _neurons_launch(a: Conv2dIf, group: _StepGroup, sums: Tensor | None) -> None:
    """The end of a layer in any mode, from the sums [steps, N, OH, OW, O] of its products and residuals."""
    none = a.threshold
    code, more, iterations = a.neuron
    mode = MODES[code]
    plane = group.out.numel()
    by_step = [t is not None and t.dim() == d for t, d in ((a.current, 5), (a.bias, 2))]
    current = a.current[group.first] if a.current is not None and by_step[0] else a.current
    bias = a.bias[group.first] if by_step[1] else a.bias
    state = [none if t is None else t for t in (group.v_in, group.v_out, group.out, group.negative)]
    looks_ahead = mode in ("offset", "masked") and group.first == 0
    block = 128
    _launch(
        kernels.neurons, (_blocks(plane, block),),
        none if sums is None else sums, none if current is None else current, bias, a.threshold, *state,
        a.threshold.numel(), plane, plane * by_step[0], a.threshold.numel() * by_step[1], more if mode == "sum" else 1,
        MODE=code, WINDOW=more if looks_ahead else 0, ITERATIONS=iterations, STEPS=group.steps,
        PARTIAL=sums is not None, CURRENT=current is not None, ALONE=not a.x and not a.residual and mode != "sum",
        CONTINUED=group.v_in is not None, CONTINUES=group.v_out is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip


def _plan_spiking(a: Conv2dIf) -> Plan:
    products = [
        Product(x, w, key, g, x.shape[0] == a.T, scale)
        for x, w, key, g, scale in zip(a.x, a.weight, a.keys, split(a.geometry), a.scales, strict=True)
    ]
    residuals = [Residual(r, m, r.shape[0] == a.T) for r, m in zip(a.residual, a.amplitude, strict=True)]
    launches = plan(products, residuals, _matrix_units(a.threshold.device)) if products or residuals else []
    packings = [
        Packing("triton", (p.key,), functools.partial(pack_weight, p.weight.detach()), in_place=True)
        for launch in launches
        if not launch.direct
        for p in launch.products
    ]
    return Plan("", packings, launches)


@KERNELS.operator(Conv2dIf, _plan_spiking)
@KERNELS.operator(Conv2dIfFrom, _plan_spiking)
def _spiking(a: Conv2dIf, settled: Plan, packed: list[Packed]) -> Any:
    result = a.empty()
    out, state_out = result if isinstance(result, tuple) else (result, None)
    shape, mode = a.shape[1:], MODES[a.neuron[0]]
    supply = iter(packed)
    launches = [(step, [] if step.direct else [next(supply) for _ in step.products]) for step in settled.detail]
    # Plain neurons whose bias and current are the same at every step fire in the kernel that has the sums.
    fused = bool(launches) and mode == "plain" and a.bias.dim() == 1 and (a.current is None or a.current.dim() == 4)
    rows = 2 if mode in ("masked", "signed") else 1
    planes = out.shape[0] // (2 if mode == "signed" else 1)
    v = a.state
    for plane in range(planes):
        first = plane * MAX_STEPS
        steps = min(MAX_STEPS, a.T - first)
        v_out = a.threshold.new_empty((rows, *shape)) if first + steps < a.T else state_out
        group = _StepGroup(first, steps, v, v_out, out[plane], out[planes + plane] if mode == "signed" else None)
        partial: Tensor | None = None
        for launch, weights in launches[:-1] if fused else launches:
            # A new tensor each time: a launch that reads what it writes could not be repeated for timing.
            sums = a.threshold.new_empty((steps, *shape))
            _spiking_launch(launch, weights, group, partial, sums, None, a.bias, a.threshold)
            partial = sums
        if fused:
            _spiking_launch(*launches[-1], group, partial, None, a.current, a.bias, a.threshold)
        else:
            _neurons_launch(a, group, partial)
        v = v_out
    return result


# ---------------------------------------------------------------------------------------- first layer


@KERNELS.operator(Conv2dCurrent)
@KERNELS.operator(Conv2dEncode)
def _analog(a: Conv2dCurrent) -> Tensor:
    fires = isinstance(a, Conv2dEncode)
    T, threshold = (a.T, a.threshold) if isinstance(a, Conv2dEncode) else (0, a.low)
    _, H, W, C = a.x.shape
    kh, kw, sh, sw, ph, pw, dh, dw, groups = a.geometry
    N, OH, OW, O = a.shape[-4:]
    M = _rows("conv2d_current", N, OH, OW)
    out: Tensor = a.empty()
    tile = tiles.plain(O, 8, INTERPRETED)  # in 64 bits, with an operand each
    _launch(
        kernels.analog, (_blocks(M, tile.m), _blocks(O, tile.n)),
        a.x, a.exponent, a.weight, a.gain, a.offset, a.low, a.high, threshold, out,
        M, OH, OW, O, O // groups, M * O, H, W, C, C // groups, kw, kh * kw, sh, sw, ph, pw, dh, dw, T,
        GROUPED=groups > 1, FIRE=fires, BM=tile.m, BN=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    return out


@KERNELS.operator(QuantizeInput)
def _quantize_input(a: QuantizeInput) -> tuple[Tensor, Tensor]:
    x = a.x
    q, exponent = a.empty()
    exponent.zero_()
    largest = torch.zeros_like(exponent)
    N, H, W, C = q.shape
    size, block = _rows("quantize_input", H, W, C), 1024
    operands = (x, a.source, a.scale, a.shift, largest)
    grid = (N * _blocks(size, block),)
    _launch(kernels.largest_input, grid, *operands, size, C, W, *x.stride(), BLOCK=block)
    refuse_not_finite(largest, kernels.INFINITY.value)
    limit = (2 ** (a.bits - 1) - 1) << (54 - a.bits)
    _launch(kernels.quantize, grid, *operands, q, exponent, limit, a.bits, size, C, W, *x.stride(), BLOCK=block)
    return q, exponent


# -------------------------------------------------------------------------------- pooling and counting


def _plan_windows(a: Pool | MaxPool | PoolCounts) -> Plan:
    return Plan("", detail=[window_table(tuple(w), a.device, torch.int32) for w in (a.rows, a.cols)])


@KERNELS.operator(Pool, _plan_windows)
def _pool(a: Pool, settled: Plan, packed: list[Packed]) -> Tensor:
    x, T = a.x, a.T
    _, N, H, W, C = x.shape
    out: Tensor = a.empty()
    OH, OW = out.shape[2:4]
    block = _power(C, 16, 128)
    _launch(
        kernels.pool, (_rows("pool", N, OH, OW), _blocks(C, block), _blocks(T, 8)),
        x, *settled.detail, out, H, W, C, OH, OW, x.stride(0), out.stride(0), T, a.multiple,
        COUNT=x.shape[0] == T, BC=block, num_warps=1 if block < 64 else 2,
    )  # fmt: skip
    return out


@KERNELS.operator(MaxPool, _plan_windows)
def _max_pool(a: MaxPool, settled: Plan, packed: list[Packed]) -> Tensor:
    x = a.x
    _, N, H, W, C = x.shape
    out: Tensor = a.empty()
    OH, OW = out.shape[2:4]
    block = _power(C, 32, 256)
    _launch(
        kernels.max_pool, (_rows("max_pool", N, OH, OW), _blocks(C, block), x.shape[0]),
        x, *settled.detail, out, H, W, C, OH, OW, x.stride(0), out.stride(0), LARGEST=a.counts,
        BC=block, num_warps=1,
    )  # fmt: skip
    return out


@KERNELS.operator(Count)
def _count(a: Count) -> Tensor:
    out: Tensor = a.empty()
    elements, block = a.x[0].numel(), 512
    _launch(
        kernels.count, (_blocks(elements, block),), a.x, out, elements, a.first, a.last,
        COUNT=a.x.shape[0] == a.T, PREFIX=a.prefix, BLOCK=block,
    )  # fmt: skip
    return out


@KERNELS.operator(PoolCounts, _plan_windows)
def _pool_counts(a: PoolCounts, settled: Plan, packed: list[Packed]) -> Tensor:
    S, N, H, W, C = a.counts.shape
    out: Tensor = a.empty()
    OH, OW = out.shape[2:4]
    block = _power(C, 32, 128)
    _launch(
        kernels.pool_counts, (_rows("pool_counts", S, N, OH, OW), _blocks(C, block)),
        a.counts, *settled.detail, out, H, W, C, OH, OW, a.multiple, BC=block, num_warps=1,
    )  # fmt: skip
    return out


# --------------------------------------------------------------------------------------------- readout


@KERNELS.operator(Readout)
def _readout(a: Readout) -> Tensor:
    S, N, OH, OW, O = a.shape
    terms = len(a.counts)
    out: Tensor = a.empty()
    total = a.offset.new_empty(out.shape if terms > 1 else (0,))
    for i, (c, w, gain, g, multiple) in enumerate(
        zip(a.counts, a.weight, a.gain, split(a.geometry), a.multiple, strict=True)
    ):
        _, _, H, W, C = c.shape
        kh, kw, sh, sw, ph, pw, dh, dw, groups = g
        identity = w.numel() == 0
        groups = 1 if identity else groups
        inputs = C // groups
        bn, bk = (16, 16) if INTERPRETED else (64, 32 if inputs >= 32 else _power(inputs, 1, 32))
        _launch(
            kernels.readout, (_rows("readout", S, N, OH, OW), _blocks(O, bn)),
            c, a.offset if identity else w, gain, a.offset, total, out,
            OH, OW, O, O // groups, H, W, C, inputs, kw, kh * kw, sh, sw, ph, pw, dh, dw, a.T,
            0 if S == 1 else N * OH * OW, multiple,
            IDENTITY=identity, GROUPED=groups > 1, FIRST=i == 0, LAST=i == terms - 1, BN=bn, BK=bk,
        )  # fmt: skip
    return out
