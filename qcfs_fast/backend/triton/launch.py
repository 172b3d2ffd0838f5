"""Triton launchers: the operators of ops.py on CUDA or ROCm tensors, without a compiler of ours.

Each function has the arguments of its namesake in reference.py and returns the same bytes; operands have been
checked there. The kernels and their layouts are in triton_kernels.py. This file plans the launches: it prepares
weights once, groups a layer's sources and steps, chooses tiles (triton_tiles.py) and allocates.

Triton is imported here and nowhere else in the package, when the first operator needs it. In its interpreter
(TRITON_INTERPRET=1) the same launchers run on CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import kernels, tiles

GROUP = 8  # steps a launch holds in registers, the bits of a mask byte
INTERPRETED = not isinstance(kernels.encode, triton.JITFunction)
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
MOST_ROWS = 2**31 - 1024
MOST_REGISTERS = 255  # a CUDA thread can have; left to choose, ptxas spills a few to fit one more block on a processor


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel; double arithmetic must round after every operation, so contraction is off."""
    if min(grid) == 0:
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    limit = {} if HIP else {"maxnreg": MOST_REGISTERS}
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, enable_fp_fusion=False, **limit, **options)


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _rows(op: str, *sizes: int) -> int:
    """Number of output pixels (or samples) of a launch; kernels count them in 32 bits, to the end of the last tile."""
    rows = math.prod(sizes)
    if rows > MOST_ROWS:
        raise ValueError(
            f"qcfs_fast::{op}: {rows} output pixels are more than the {MOST_ROWS} of one call; use smaller batches"
        )
    return rows


def _power(size: int, least: int, most: int) -> int:
    """The power of two that covers `size`, within limits."""
    return max(least, min(most, 1 << max(size - 1, 0).bit_length()))


# ------------------------------------------------------------------------------------------ weights


@dataclass(frozen=True)
class Packed:
    """A weight as the matrix units want it: digits int8 [digits, KH, KW, O, KP], sums = 128 * sum of w, int32 [O]."""

    digits: Tensor
    sums: Tensor


def pack_weight(w: Tensor) -> Packed:
    """int16 or int8 [KH, KW, K, O] -> base-256 digits (high first), K innermost and padded to 16."""
    if w.dtype == torch.int8:
        planes = [w]
    else:
        low = (w & 255).to(torch.uint8).view(torch.int8)
        planes = [((w - low) >> 8).to(torch.int8), low]
    padding = -w.shape[2] % 16
    digits = torch.nn.functional.pad(torch.stack(planes).transpose(3, 4), (0, padding)).contiguous()
    sums = (w.to(torch.int64).sum((0, 1, 2)) * 128).to(torch.int32)
    return Packed(digits, sums)


def _kernel(w: Tensor) -> Tensor:
    """The weight of a linear layer as that of a 1x1 convolution."""
    return w.detach() if w.dim() == 4 else w.detach()[None, None]


_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def packed_weight(w: Tensor) -> Packed:
    """pack_weight, remembered for as long as the weight lives unchanged."""
    if w.is_inference():  # no version counter: changes could not be noticed
        return pack_weight(_kernel(w))
    state = (w._version, w.data_ptr())
    found = _packed.get(w)
    if found is None or found[0] != state:
        found = (state, pack_weight(_kernel(w)))
        if _capturing(w):  # only recorded so far: the digits exist in replays, not yet for anyone else
            return found[1]
        if w.is_cuda:  # other streams may use it from now on
            torch.cuda.current_stream(w.device).synchronize()
        _packed[w] = found
    packed: Packed = found[1]
    return packed


@functools.lru_cache(maxsize=512)
def _window_table(windows: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(windows, dtype=torch.int32, device=device)


# ----------------------------------------------------------------------------------- spiking layers


@dataclass(frozen=True)
class Product:
    x: Tensor
    weight: Tensor
    source: Tensor  # the tensor the caller holds, the key of the packed weight
    geometry: tuple[int, ...]
    count: bool

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
            if p.geometry[8] == first.geometry[8]
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
class _Group:
    """Up to 8 consecutive steps of a layer, and the tensors that pass between its launches."""

    first: int
    steps: int
    v_in: Tensor | None
    v_out: Tensor | None
    out: Tensor

    def start(self, count: bool) -> int:
        """The plane at which a spike tensor's bytes for these steps begin."""
        return self.first if count else self.first // GROUP


def _spiking_launch(
    launch: Launch,
    group: _Group,
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
            scale = 256 if p.weight.dtype == torch.int8 else 1
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
    for p in launch.products:
        packed = packed_weight(p.source)
        x, size, window = p.operands(group.start(p.count))
        digits, padded = packed.digits, packed.digits.shape[-1]
        operands += [x, digits, packed.sums, p.x.stride(0), digits.stride(0), *size, p.inputs, padded, *window]
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


def conv2d_if(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    geometry: Sequence[int],
    residual: Sequence[Tensor],
    amplitude: Sequence[Tensor],
    current: Tensor | None,
    bias: Tensor,
    threshold: Tensor,
    T: int,
    keys: Sequence[Tensor] | None = None,
) -> Tensor:
    """`keys` are the tensors under which prepared weights are remembered, if `weight` are views made for the call."""
    products = [
        Product(xi.contiguous(), wi.contiguous(), key, tuple(geometry[9 * i : 9 * i + 9]), xi.shape[0] == T)
        for i, (xi, wi, key) in enumerate(zip(x, weight, weight if keys is None else keys, strict=True))
    ]
    residuals = [
        Residual(r.contiguous(), a.contiguous(), r.shape[0] == T) for r, a in zip(residual, amplitude, strict=True)
    ]
    bias, threshold = bias.contiguous(), threshold.contiguous()
    current = None if current is None else current.contiguous()
    if products:
        g = products[0].geometry
        _, N, H, W, _ = products[0].x.shape
        OH, OW = ((s + 2 * g[4 + i] - g[6 + i] * (g[i] - 1) - 1) // g[2 + i] + 1 for i, s in enumerate((H, W)))
    else:
        N, OH, OW = residuals[0].x.shape[1:4] if residuals else current.shape[:3]  # type: ignore[union-attr]
    shape = (N, OH, OW, threshold.shape[0])
    out = threshold.new_empty(((T + GROUP - 1) // GROUP, *shape), dtype=torch.uint8)
    launches = plan(products, residuals, _matrix_units(threshold.device))
    v: Tensor | None = None
    for plane in range(out.shape[0]):
        first = plane * GROUP
        steps = min(GROUP, T - first)
        v_out = threshold.new_empty(shape) if first + steps < T else None
        group = _Group(first, steps, v, v_out, out[plane])
        partial: Tensor | None = None
        for launch in launches[:-1]:
            # A new tensor each time: a launch that reads what it writes could not be repeated for timing.
            sums = threshold.new_empty((steps, *shape))
            _spiking_launch(launch, group, partial, sums, None, bias, threshold)
            partial = sums
        _spiking_launch(launches[-1], group, partial, None, current, bias, threshold)
        v = v_out
    return out


def linear_if(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    residual: Sequence[Tensor],
    amplitude: Sequence[Tensor],
    current: Tensor | None,
    bias: Tensor,
    threshold: Tensor,
    T: int,
) -> Tensor:
    """A 1x1 convolution whose pixels are the samples."""
    return conv2d_if(
        [t[:, :, None, None] for t in x],
        [w[None, None] for w in weight],
        [1, 1, 1, 1, 0, 0, 1, 1, 1] * len(x),
        [r[:, :, None, None] for r in residual],
        amplitude,
        None if current is None else current[:, None, None],
        bias,
        threshold,
        T,
        keys=weight,
    ).flatten(2)


# ---------------------------------------------------------------------------------------- first layer


def encode(current: Tensor, threshold: Tensor, T: int) -> Tensor:
    current, threshold = current.contiguous(), threshold.contiguous()
    out = current.new_empty(((T + 7) // 8, *current.shape), dtype=torch.uint8)
    C = threshold.shape[0]
    M = _rows("encode", current.numel() // C)
    tile = tiles.plain(C, 2, INTERPRETED)
    _launch(
        kernels.encode, (_blocks(M, tile.m), _blocks(C, tile.n)), current, threshold, out, M, C, M * C, T,
        BM=tile.m, BN=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    return out


def _analog(
    x: Tensor,
    exponent: Tensor,
    weight: Tensor,
    geometry: Sequence[int],
    vectors: Sequence[Tensor],
    T: int,
) -> Tensor:
    N, H, W, C = x.shape
    kh, kw, sh, sw, ph, pw, dh, dw, groups = geometry
    OH, OW = (H + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (W + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    O = weight.shape[3]
    M = _rows("conv2d_current", N, OH, OW)
    shape = (N, OH, OW, O)
    out = x.new_empty(((T + 7) // 8, *shape), dtype=torch.uint8) if T else x.new_empty(shape, dtype=torch.int32)
    tile = tiles.plain(O, 8, INTERPRETED)  # in 64 bits, with an operand each
    _launch(
        kernels.analog, (_blocks(M, tile.m), _blocks(O, tile.n)),
        x.contiguous(), exponent.contiguous(), weight.contiguous(), *(t.contiguous() for t in vectors), out,
        M, OH, OW, O, O // groups, M * O, H, W, C, C // groups, kw, kh * kw, sh, sw, ph, pw, dh, dw, T,
        GROUPED=groups > 1, FIRE=T > 0, BM=tile.m, BN=tile.n, num_warps=tile.warps,
    )  # fmt: skip
    return out


def conv2d_current(
    x: Tensor,
    exponent: Tensor,
    weight: Tensor,
    geometry: Sequence[int],
    gain: Tensor,
    offset: Tensor,
    low: Tensor,
    high: Tensor,
) -> Tensor:
    return _analog(x, exponent, weight, geometry, (gain, offset, low, high, low), 0)


def conv2d_encode(
    x: Tensor,
    exponent: Tensor,
    weight: Tensor,
    geometry: Sequence[int],
    gain: Tensor,
    offset: Tensor,
    low: Tensor,
    high: Tensor,
    threshold: Tensor,
    T: int,
) -> Tensor:
    return _analog(x, exponent, weight, geometry, (gain, offset, low, high, threshold), T)


NOT_FINITE = 0x7F800000  # bits of infinity; NaN lies above


def quantize_input(x: Tensor, source: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    x = x.to(torch.float32)
    source, scale, shift = source.contiguous(), scale.contiguous(), shift.contiguous()
    N, _, H, W = x.shape
    C = source.shape[0]
    q = x.new_empty((N, H, W, C), dtype=torch.int16)
    exponent, most = x.new_zeros((N,), dtype=torch.int32), x.new_zeros((N,), dtype=torch.int32)
    size, block = _rows("quantize_input", H, W, C), 1024
    operands = (x, source, scale, shift, most)
    grid = (N * _blocks(size, block),)
    _launch(kernels.largest_input, grid, *operands, size, C, W, *x.stride(), BLOCK=block)
    # The check needs the result on the host; a graph under capture cannot wait for it.
    if not _capturing(x) and most.numel() and int(most.max()) >= NOT_FINITE:
        raise ValueError("quantize_input: the input holds NaN or infinity; clean the data before it enters the network")
    _launch(kernels.quantize, grid, *operands, q, exponent, size, C, W, *x.stride(), BLOCK=block)
    return q, exponent


# -------------------------------------------------------------------------------- pooling and counting


def _windows(x: Tensor, rows: Sequence[int], cols: Sequence[int]) -> tuple[Tensor, Tensor, int, int]:
    tables = [_window_table(tuple(w), x.device) for w in (rows, cols)]
    return tables[0], tables[1], len(rows) // 3, len(cols) // 3


def pool(x: Tensor, rows: Sequence[int], cols: Sequence[int], multiple: int, T: int) -> Tensor:
    x = x.contiguous()
    _, N, H, W, C = x.shape
    row_table, col_table, OH, OW = _windows(x, rows, cols)
    out = x.new_empty((T, N, OH, OW, C))
    block = _power(C, 16, 128)
    _launch(
        kernels.pool, (_rows("pool", N, OH, OW), _blocks(C, block), _blocks(T, 8)),
        x, row_table, col_table, out, H, W, C, OH, OW, x.stride(0), out.stride(0), T, multiple,
        COUNT=x.shape[0] == T, BC=block, num_warps=1 if block < 64 else 2,
    )  # fmt: skip
    return out


def max_pool(x: Tensor, rows: Sequence[int], cols: Sequence[int]) -> Tensor:
    x = x.contiguous()
    planes, N, H, W, C = x.shape
    row_table, col_table, OH, OW = _windows(x, rows, cols)
    out = x.new_empty((planes, N, OH, OW, C))
    block = _power(C, 32, 256)
    _launch(
        kernels.max_pool, (_rows("max_pool", N, OH, OW), _blocks(C, block), planes),
        x, row_table, col_table, out, H, W, C, OH, OW, x.stride(0), out.stride(0), BC=block, num_warps=1,
    )  # fmt: skip
    return out


def count(x: Tensor, T: int, prefix: bool) -> Tensor:
    x = x.contiguous()
    out = x.new_empty((T if prefix else 1, *x.shape[1:]), dtype=torch.int32)
    elements, block = x[0].numel(), 512
    _launch(
        kernels.count, (_blocks(elements, block),), x, out, elements, T,
        COUNT=x.shape[0] == T, PREFIX=prefix, BLOCK=block,
    )  # fmt: skip
    return out


def pool_counts(counts: Tensor, rows: Sequence[int], cols: Sequence[int], multiple: int) -> Tensor:
    counts = counts.contiguous()
    S, N, H, W, C = counts.shape
    row_table, col_table, OH, OW = _windows(counts, rows, cols)
    out = counts.new_empty((S, N, OH, OW, C))
    block = _power(C, 32, 128)
    _launch(
        kernels.pool_counts, (_rows("pool_counts", S, N, OH, OW), _blocks(C, block)),
        counts, row_table, col_table, out, H, W, C, OH, OW, multiple, BC=block, num_warps=1,
    )  # fmt: skip
    return out


# --------------------------------------------------------------------------------------------- readout


def readout(
    counts: Sequence[Tensor],
    weight: Sequence[Tensor],
    geometry: Sequence[int],
    gain: Sequence[Tensor],
    multiple: Sequence[int],
    offset: Tensor,
    T: int,
) -> Tensor:
    O = offset.shape[0]
    offset = offset.contiguous()
    out = total = offset
    for i, (c, w, g, m) in enumerate(zip(counts, weight, gain, multiple, strict=True)):
        S, N, H, W, C = c.shape
        kh, kw, sh, sw, ph, pw, dh, dw, groups = geometry[9 * i : 9 * i + 9]
        identity = w.numel() == 0
        OH, OW = H, W
        if identity:
            groups = 1
        else:
            OH, OW = (H + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (W + 2 * pw - dw * (kw - 1) - 1) // sw + 1
        if i == 0:
            out = offset.new_empty((S, N, OH, OW, O), dtype=torch.float32)
            total = offset.new_empty(out.shape if len(counts) > 1 else (0,))
        inputs = C // groups
        bn, bk = (16, 16) if INTERPRETED else (64, 32 if inputs >= 32 else _power(inputs, 1, 32))
        _launch(
            kernels.readout, (_rows("readout", S, N, OH, OW), _blocks(O, bn)),
            c.contiguous(), offset if identity else w.contiguous(), g.contiguous(), offset, total, out,
            OH, OW, O, O // groups, H, W, C, inputs, kw, kh * kw, sh, sw, ph, pw, dh, dw, T,
            0 if S == 1 else N * OH * OW, m,
            IDENTITY=identity, GROUPED=groups > 1, FIRST=i == 0, LAST=i == len(counts) - 1, BN=bn, BK=bk,
        )  # fmt: skip
    return out


OPERATORS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        quantize_input, conv2d_current, conv2d_encode, encode, conv2d_if, linear_if,
        pool, max_pool, count, pool_counts, readout,
    )
}  # fmt: skip
