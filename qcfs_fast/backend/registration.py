"""torch.ops.qcfs_fast: the operators a converted network is made of.

Every operator has a schema, a native CPU kernel (csrc/, reached by address), a fake kernel for torch.compile and
torch.export, and a plain-torch reference (reference.py). On CUDA and ROCm tensors the backend that backend.py
chooses runs (docs/backends.md). There is no autograd: an input that requires grad raises. All operators return
the same bytes on every backend.

Layouts: spikes are uint8, masks [ceil(T/8), N, H, W, C] (bit t%8 of plane t//8 is the spike at step t) or
count planes [T, N, H, W, C]; the first dimension tells which. At T = 1 the two coincide. Linear layers use
[.., N, K]. Weights are int16 (or int8, each worth 256 units) [KH, KW, C/groups, O]. A geometry is nine ints:
kernel, stride, padding and dilation (each height, width) and groups. A window is three ints per output row or
column: first input index, last + 1, divisor.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..operators import reference
from ..operators.geometry import GEOMETRY, POINTWISE, convolution_size
from ..operators.windows import largest_value
from .packing import PackedWeights

MOST_LISTED = 2**29  # inputs in a row times T; an entry takes up to five places of a list, counted in 32 bits

library = torch.library.Library("qcfs_fast", "FRAGMENT")
library.define("quantize_input(Tensor x, Tensor source, Tensor scale, Tensor shift) -> (Tensor, Tensor)")
_ANALOG = (
    "Tensor x, Tensor exponent, Tensor weight, int[] geometry, Tensor gain, Tensor offset, Tensor low, Tensor high"
)
library.define(f"conv2d_current({_ANALOG}) -> Tensor")
library.define(f"conv2d_encode({_ANALOG}, Tensor threshold, int T) -> Tensor")
library.define("encode(Tensor current, Tensor threshold, int T) -> Tensor")
_SOURCES = "Tensor[] residual, Tensor[] amplitude, Tensor? current, Tensor bias, Tensor threshold, int T"
library.define(f"conv2d_if(Tensor[] x, Tensor[] weight, int[] geometry, {_SOURCES}) -> Tensor")
library.define(f"linear_if(Tensor[] x, Tensor[] weight, {_SOURCES}) -> Tensor")
library.define("pool(Tensor x, int[] rows, int[] cols, int multiple, int T) -> Tensor")
library.define("max_pool(Tensor x, int[] rows, int[] cols) -> Tensor")
library.define("count(Tensor x, int T, bool prefix) -> Tensor")
library.define("pool_counts(Tensor counts, int[] rows, int[] cols, int multiple) -> Tensor")
library.define(
    "readout(Tensor[] counts, Tensor[] weight, int[] geometry, Tensor[] gain, int[] multiple, Tensor offset, int T) "
    "-> Tensor"
)


# ------------------------------------------------------------------------------------------- checks


def _fail(op: str, what: str) -> None:
    raise ValueError(f"qcfs_fast::{op}: {what}")


def _check_steps(op: str, T: int) -> None:
    if T < 1:
        _fail(op, f"T must be at least 1 time step, got {T}")


def _check(
    op: str, name: str, x: Tensor, dtype: torch.dtype | tuple[torch.dtype, ...], shape: Sequence[int] | None
) -> None:
    """Dtype, and shape where given (-1 matches any size)."""
    wanted = dtype if isinstance(dtype, tuple) else (dtype,)
    if x.dtype not in wanted:
        _fail(op, f"{name} must be {' or '.join(str(d) for d in wanted)}, got {x.dtype}")
    if shape is not None and (
        x.dim() != len(shape) or any(w not in (-1, s) for w, s in zip(shape, x.shape, strict=True))
    ):
        _fail(op, f"{name} must have shape {list(shape)} (-1 is any), got {list(x.shape)}")


def _check_no_grad(op: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(
            f"qcfs_fast::{op}: an input requires grad, but spiking inference has no gradient; "
            "pass x.detach() or run under torch.no_grad()"
        )


def _check_devices(op: str, first: Tensor, *others: Tensor | None) -> None:
    for t in others:
        if t is not None and t.device != first.device:
            _fail(
                op, f"all tensors must be on one device, got {first.device} and {t.device}; move the network with .to()"
            )


def _split_geometry(op: str, geometry: Sequence[int], products: int) -> list[Sequence[int]]:
    if len(geometry) != GEOMETRY * products:
        _fail(op, f"geometry must hold {GEOMETRY} ints for each of {products} sources, got {len(geometry)}")
    parts = [geometry[GEOMETRY * i : GEOMETRY * (i + 1)] for i in range(products)]
    for g in parts:
        if min(g[0:4]) < 1 or min(g[4:6]) < 0 or min(g[6:9]) < 1:
            _fail(op, f"geometry {list(g)}: kernel, stride, dilation and groups must be positive, padding not negative")
    return parts


def _conv_shape(op: str, x: Tensor, weight: Tensor, g: Sequence[int], spatial: Sequence[int]) -> tuple[int, int]:
    """Check one convolution's weight against its input [.., H, W, C]; returns the output's height and width."""
    channels, height, width = x.shape[-1], spatial[0], spatial[1]
    if weight.dim() != 4 or weight.shape[0] != g[0] or weight.shape[1] != g[1]:
        _fail(op, f"weight must be [{g[0]}, {g[1]}, C/groups, O], got {list(weight.shape)}")
    if weight.shape[2] * g[8] != channels or weight.shape[3] % g[8] != 0:
        _fail(op, f"weight {list(weight.shape)} with {g[8]} groups does not fit {channels} input channels")
    oh, ow = convolution_size(height, width, g)
    if oh < 1 or ow < 1:
        _fail(op, f"the input of {height}x{width} is smaller than the kernel; use larger images")
    return oh, ow


def _is_count(op: str, name: str, x: Tensor, T: int) -> bool:
    """Whether x holds counts (T planes) or masks (ceil(T/8) planes)."""
    if x.shape[0] == T:
        return True
    if x.shape[0] != (T + 7) // 8:
        _fail(op, f"{name} must have {(T + 7) // 8} mask planes or {T} count planes for T={T}, got {x.shape[0]}")
    return False


def _if_shape(
    op: str,
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    geometry: Sequence[int],
    residual: Sequence[Tensor],
    amplitude: Sequence[Tensor],
    current: Tensor | None,
    bias: Tensor,
    threshold: Tensor,
    T: int,
) -> tuple[int, ...]:
    """Check a spiking layer's operands; returns the shape of its masks, [ceil(T/8), N, OH, OW, O]."""
    _check_steps(op, T)
    if len(x) != len(weight):
        _fail(op, f"{len(x)} inputs but {len(weight)} weights")
    if len(residual) != len(amplitude):
        _fail(op, f"{len(residual)} residuals but {len(amplitude)} amplitudes")
    if not x and not residual and current is None:
        _fail(op, "a layer needs at least one source")
    if max(len(x), len(residual)) > 64:
        _fail(op, f"at most 64 inputs and 64 residuals can be summed in one layer, got {len(x)} and {len(residual)}")
    _check(op, "threshold", threshold, torch.int32, [-1])
    O = threshold.shape[0]
    _check(op, "bias", bias, torch.int32, [O])
    shape: tuple[int, ...] | None = None
    source = "input 0"

    def agree(name: str, found: tuple[int, ...]) -> None:
        nonlocal shape, source
        if shape is None:
            shape, source = found, name
        elif shape != found:
            _fail(op, f"{name} gives an output of shape {list(found[1:])}, {source} one of {list(shape[1:])}")

    planes = (T + 7) // 8
    for i, (xi, wi, g) in enumerate(zip(x, weight, _split_geometry(op, geometry, len(x)), strict=True)):
        _check(op, f"input {i}", xi, torch.uint8, [-1] * 5)
        _check(op, f"weight {i}", wi, (torch.int16, torch.int8), [-1, -1, -1, O])
        if wi.dtype != weight[0].dtype:
            _fail(op, "all weights of a layer must have one dtype")
        _is_count(op, f"input {i}", xi, T)
        agree(f"input {i}", (planes, xi.shape[1], *_conv_shape(op, xi, wi, g, xi.shape[2:4]), O))
    for i, (r, a) in enumerate(zip(residual, amplitude, strict=True)):
        _check(op, f"residual {i}", r, torch.uint8, [-1, -1, -1, -1, O])
        _check(op, f"amplitude {i}", a, torch.int32, [O])
        _is_count(op, f"residual {i}", r, T)
        agree(f"residual {i}", (planes, *r.shape[1:]))
    if current is not None:
        _check(op, "current", current, torch.int32, [-1, -1, -1, O])
        agree("current", (planes, *current.shape))
    assert shape is not None
    _check_devices(op, threshold, bias, current, *x, *weight, *residual, *amplitude)
    return shape


def _analog_shape(
    op: str,
    x: Tensor,
    exponent: Tensor,
    weight: Tensor,
    geometry: Sequence[int],
    vectors: dict[str, tuple[Tensor, torch.dtype]],
) -> tuple[int, int, int, int]:
    _check(op, "x", x, torch.int16, [-1] * 4)
    _check(op, "exponent", exponent, torch.int32, [x.shape[0]])
    _check(op, "weight", weight, torch.int16, [-1] * 4)
    (g,) = _split_geometry(op, geometry, 1)
    oh, ow = _conv_shape(op, x, weight, g, x.shape[1:3])
    O = weight.shape[3]
    for name, (tensor, dtype) in vectors.items():
        _check(op, name, tensor, dtype, [O])
    _check_devices(op, x, exponent, weight, *(t for t, _ in vectors.values()))
    return x.shape[0], oh, ow, O


def _check_windows(
    op: str, rows: Sequence[int], cols: Sequence[int], height: int, width: int, multiple: int
) -> tuple[int, int]:
    """Check pooling windows against the input's size; returns the output's height and width."""
    if len(rows) % 3 or len(cols) % 3 or not rows or not cols:
        _fail(op, "rows and cols must hold three ints (first, last + 1, divisor) per output")
    for name, windows, size in (("rows", rows, height), ("cols", cols, width)):
        for first, end, divisor in zip(windows[0::3], windows[1::3], windows[2::3], strict=True):
            if not 0 <= first <= end <= size or divisor < 1:
                _fail(op, f"{name}: window ({first}, {end}, {divisor}) does not lie in 0..{size}")
    if multiple != 0:
        for h in set(rows[2::3]):
            for w in set(cols[2::3]):
                if multiple % (h * w):
                    _fail(
                        op,
                        f"multiple={multiple} is not divisible by the window's {h}x{w}; "
                        "convert again with input_shape= set to this image size",
                    )
    return len(rows) // 3, len(cols) // 3


def _pool_shape(op: str, x: Tensor, rows: Sequence[int], cols: Sequence[int], multiple: int, T: int) -> tuple[int, ...]:
    _check_steps(op, T)
    _check(op, "x", x, torch.uint8, [-1] * 5)
    _is_count(op, "x", x, T)
    oh, ow = _check_windows(op, rows, cols, x.shape[2], x.shape[3], multiple)
    most = largest_value(rows, cols, multiple)
    if most > 255:
        _fail(op, f"a window value can reach {most}, but count planes hold at most 255; pool in two stages")
    return (T, x.shape[1], oh, ow, x.shape[4])


def _flat_to_map(x: Tensor) -> Tensor:
    return x.unsqueeze(2).unsqueeze(2)


def _as_conv(
    x: Sequence[Tensor], weight: Sequence[Tensor], residual: Sequence[Tensor], current: Tensor | None
) -> tuple[list[Tensor], list[Tensor], list[int], list[Tensor], Tensor | None]:
    """A linear layer's operands as those of a 1x1 convolution on 1x1 maps."""
    for name, tensors in (("input", x), ("residual", residual)):
        for i, t in enumerate(tensors):
            _check("linear_if", f"{name} {i}", t, torch.uint8, [-1] * 3)
    for i, w in enumerate(weight):
        _check("linear_if", f"weight {i}", w, (torch.int16, torch.int8), [-1, -1])
    if current is not None:
        _check("linear_if", "current", current, torch.int32, [-1, -1])
        current = current.unsqueeze(1).unsqueeze(1)
    return (
        [_flat_to_map(t) for t in x],
        [w.unsqueeze(0).unsqueeze(0) for w in weight],
        list(POINTWISE) * len(x),
        [_flat_to_map(r) for r in residual],
        current,
    )


def _readout_shape(
    counts: Sequence[Tensor],
    weight: Sequence[Tensor],
    geometry: Sequence[int],
    gain: Sequence[Tensor],
    multiple: Sequence[int],
    offset: Tensor,
    T: int,
) -> tuple[int, ...]:
    op = "readout"
    _check_steps(op, T)
    _check(op, "offset", offset, torch.float64, [-1])
    O = offset.shape[0]
    n = len(counts)
    if not (n == len(weight) == len(gain) == len(multiple)):
        _fail(op, "counts, weight, gain and multiple must have one entry per term")
    if n == 0:
        _fail(op, "a readout needs at least one term")
    shape: tuple[int, ...] | None = None
    for i, (c, w, g, geo, m) in enumerate(
        zip(counts, weight, gain, _split_geometry(op, geometry, n), multiple, strict=True)
    ):
        _check(op, f"counts {i}", c, torch.int32, [-1] * 5)
        _check(op, f"weight {i}", w, torch.int16, None)
        _check(op, f"gain {i}", g, torch.float64, [O])
        if c.shape[0] not in (1, T):
            _fail(op, f"counts {i} must hold 1 total or {T} running counts, got {c.shape[0]}")
        if m < 1:
            _fail(op, f"multiple {i} must be positive, got {m}")
        spatial = tuple(c.shape[2:4]) if w.numel() == 0 else _conv_shape(op, c, w, geo, c.shape[2:4])
        if (c.shape[4] if w.numel() == 0 else w.shape[3]) != O:
            _fail(op, f"term {i} does not give {O} channels")
        found = (c.shape[0], c.shape[1], *spatial, O)
        if shape is not None and found != shape:
            _fail(op, f"term {i} gives shape {list(found)}, the terms before {list(shape)}")
        shape = found
    assert shape is not None
    _check_devices(op, offset, *counts, *weight, *gain)
    return shape


# ------------------------------------------------------------------------------------ native kernels
#
# Each takes the output made by the fake kernel (which has checked the operands) and fills it.


_packed = PackedWeights()


def _common() -> tuple[int, int]:
    return backend.isa, torch.get_num_threads()


def _module() -> Any:
    assert backend.native is not None
    return backend.native


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _dense(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def _native_quantize_input(out: tuple[Tensor, Tensor], x: Tensor, source: Tensor, scale: Tensor, shift: Tensor) -> None:
    q, exponent = out
    x = x.to(torch.float32)
    source, scale, shift = _dense((source, scale, shift))
    _module().quantize(
        x.data_ptr(),
        list(x.stride()),
        source.data_ptr(),
        scale.data_ptr(),
        shift.data_ptr(),
        q.data_ptr(),
        exponent.data_ptr(),
        *q.shape,
        *_common(),
    )


def _native_conv2d_current(
    out: Tensor,
    x: Tensor,
    exponent: Tensor,
    weight: Tensor,
    geometry: Sequence[int],
    gain: Tensor,
    offset: Tensor,
    low: Tensor,
    high: Tensor,
    threshold: Tensor | None = None,
    T: int = 0,
) -> None:
    operands = _dense((x, exponent, weight, gain, offset, low, high, *(() if threshold is None else (threshold,))))
    x, exponent, dense, *vectors = operands
    shape = (tuple(geometry), x.shape[3], weight.shape[3])
    kind = f"analog {backend.kernel_set()} {geometry[8] > 1}"
    packed = _packed.find(kind, (weight,))
    if packed is None:

        def pack() -> Tensor:
            out = torch.empty(_module().packed_analog_bytes(*shape, backend.isa), dtype=torch.uint8)
            _module().pack_analog(dense.data_ptr(), *shape, backend.isa, out.data_ptr())
            return out

        packed = _packed.make(kind, (weight,), pack)
    addresses = [t.data_ptr() for t in vectors] + ([] if T else [0])
    outputs = (out.data_ptr(), 0) if T else (0, out.data_ptr())
    _module().analog(
        x.data_ptr(),
        exponent.data_ptr(),
        dense.data_ptr(),
        packed.data_ptr(),
        tuple(geometry),
        *addresses,
        *outputs,
        *x.shape,
        *out.shape[-3:],
        T,
        *_common(),
    )


_native_conv2d_encode = _native_conv2d_current


def _native_encode(out: Tensor, current: Tensor, threshold: Tensor, T: int) -> None:
    current, threshold = _dense((current, threshold))
    channels = threshold.shape[0]
    _module().encode(
        current.data_ptr(), threshold.data_ptr(), out.data_ptr(), current.numel() // channels, channels, T, *_common()
    )


def _native_conv2d_if(
    out: Tensor,
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
) -> None:
    """`keys` are the tensors that packed weights belong to, where `weight` holds views of them."""
    keys = weight if keys is None else keys
    for xi in x:
        row = xi.shape[3] * xi.shape[4]
        if row * T >= MOST_LISTED:
            _fail(
                "conv2d_if",
                f"{row} inputs in a row at T={T}; the CPU kernels take {(MOST_LISTED - 1) // T}; use smaller images",
            )
    x, weight, residual, amplitude = _dense(x), _dense(weight), _dense(residual), _dense(amplitude)
    current = None if current is None else current.contiguous()
    bias, threshold = _dense((bias, threshold))
    products = [
        (
            xi.data_ptr(),
            xi.shape[0] == T,
            *xi.shape[2:],
            wi.data_ptr(),
            wi.element_size(),
            tuple(geometry[GEOMETRY * i : GEOMETRY * (i + 1)]),
        )
        for i, (xi, wi) in enumerate(zip(x, weight, strict=True))
    ]
    residuals = [(r.data_ptr(), r.shape[0] == T, a.data_ptr()) for r, a in zip(residual, amplitude, strict=True)]
    forms = {name: f"{name} {backend.kernel_set()}" for name in ("events", "dense")}
    events = [_packed.find(forms["events"], (k,)) for k in keys]
    dense = _packed.find(forms["dense"], keys)
    wanted = backend.ENGINES.index(backend.engine)

    def run() -> int:
        packed = [(_address(e), _address(dense)) for e in events]
        return int(
            _module().conv_if(
                products,
                packed,
                residuals,
                _address(current),
                bias.data_ptr(),
                threshold.data_ptr(),
                out.data_ptr(),
                *out.shape[1:],
                T,
                *_common(),
                wanted,
            )
        )

    def pack(product: int, engine: int) -> Tensor:
        layer = (products, out.shape[-1], product, engine, backend.isa)
        packed = torch.empty(_module().packed_bytes(*layer), dtype=torch.uint8)
        _module().pack(*layer, packed.data_ptr())
        return packed

    ran = run()
    if ran < 0:
        chosen = -ran
        if backend.ENGINES[chosen] == "dense":
            dense = _packed.make(forms["dense"], keys, lambda: pack(0, chosen))
        else:
            events = [
                e if e is not None else _packed.make(forms["events"], (k,), functools.partial(pack, i, chosen))
                for i, (e, k) in enumerate(zip(events, keys, strict=True))
            ]
        wanted = chosen
        ran = run()
    backend.last_engine = backend.ENGINES[ran]


def _native_linear_if(
    out: Tensor,
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    residual: Sequence[Tensor],
    amplitude: Sequence[Tensor],
    current: Tensor | None,
    bias: Tensor,
    threshold: Tensor,
    T: int,
) -> None:
    maps = _as_conv(x, weight, residual, current)
    _native_conv2d_if(_flat_to_map(out), *maps[:4], amplitude, maps[4], bias, threshold, T, keys=weight)


def _native_pool(
    out: Tensor, x: Tensor, rows: Sequence[int], cols: Sequence[int], multiple: int, T: int, largest: bool = False
) -> None:
    x = x.contiguous()
    _module().pool(
        x.data_ptr(),
        x.shape[0] == T,
        largest,
        list(rows),
        list(cols),
        multiple,
        out.data_ptr(),
        *x.shape[1:],
        T,
        *_common(),
    )


def _native_max_pool(out: Tensor, x: Tensor, rows: Sequence[int], cols: Sequence[int]) -> None:
    _native_pool(out, x, rows, cols, 0, x.shape[0], largest=True)


def _native_count(out: Tensor, x: Tensor, T: int, prefix: bool) -> None:
    x = x.contiguous()
    _module().count(x.data_ptr(), x.shape[0] == T, prefix, out.data_ptr(), x[0].numel(), T, *_common())


def _native_pool_counts(out: Tensor, counts: Tensor, rows: Sequence[int], cols: Sequence[int], multiple: int) -> None:
    counts = counts.contiguous()
    s, n, h, w, c = counts.shape
    _module().pool_counts(
        counts.data_ptr(), list(rows), list(cols), multiple, out.data_ptr(), s * n, h, w, c, *_common()
    )


def _native_readout(
    out: Tensor,
    counts: Sequence[Tensor],
    weight: Sequence[Tensor],
    geometry: Sequence[int],
    gain: Sequence[Tensor],
    multiple: Sequence[int],
    offset: Tensor,
    T: int,
) -> None:
    counts, weight, gain = _dense(counts), _dense(weight), _dense(gain)
    offset = offset.contiguous()
    terms = [
        (
            c.data_ptr(),
            *c.shape[2:],
            w.data_ptr() if w.numel() else 0,
            tuple(geometry[GEOMETRY * i : GEOMETRY * (i + 1)]),
            g.data_ptr(),
            m,
        )
        for i, (c, w, g, m) in enumerate(zip(counts, weight, gain, multiple, strict=True))
    ]
    _module().readout(
        terms, offset.data_ptr(), out.data_ptr(), out.shape[0] * out.shape[1], *out.shape[1:], T, *_common()
    )


# -------------------------------------------------------------------------------------- fake kernels


def _fake_quantize_input(x: Tensor, source: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    op = "quantize_input"
    _check_no_grad(op, x)
    _check(op, "x", x, (torch.float32, torch.float64, torch.float16, torch.bfloat16), [-1] * 4)
    _check(op, "source", source, torch.int64, [-1])
    _check(op, "scale", scale, torch.float32, [source.shape[0]])
    _check(op, "shift", shift, torch.float32, [source.shape[0]])
    _check_devices(op, x, source, scale, shift)
    n, _, h, w = x.shape
    return x.new_empty((n, h, w, source.shape[0]), dtype=torch.int16), x.new_empty((n,), dtype=torch.int32)


def _fake_conv2d_current(
    x: Tensor,
    exponent: Tensor,
    weight: Tensor,
    geometry: Sequence[int],
    gain: Tensor,
    offset: Tensor,
    low: Tensor,
    high: Tensor,
) -> Tensor:
    vectors = {
        "gain": (gain, torch.float64),
        "offset": (offset, torch.float64),
        "low": (low, torch.int32),
        "high": (high, torch.int32),
    }
    _check_no_grad("conv2d_current", gain, offset)
    return x.new_empty(_analog_shape("conv2d_current", x, exponent, weight, geometry, vectors), dtype=torch.int32)


def _fake_conv2d_encode(
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
    _check_steps("conv2d_encode", T)
    _check_no_grad("conv2d_encode", gain, offset)
    vectors = {
        "gain": (gain, torch.float64),
        "offset": (offset, torch.float64),
        "low": (low, torch.int32),
        "high": (high, torch.int32),
        "threshold": (threshold, torch.int32),
    }
    shape = _analog_shape("conv2d_encode", x, exponent, weight, geometry, vectors)
    return x.new_empty(((T + 7) // 8, *shape), dtype=torch.uint8)


def _fake_encode(current: Tensor, threshold: Tensor, T: int) -> Tensor:
    _check_steps("encode", T)
    _check("encode", "threshold", threshold, torch.int32, [-1])
    _check("encode", "current", current, torch.int32, None)
    if current.dim() < 2 or current.shape[-1] != threshold.shape[0] or threshold.shape[0] == 0:
        _fail("encode", f"current must be [N, .., {threshold.shape[0]}], got {list(current.shape)}")
    _check_devices("encode", current, threshold)
    return current.new_empty(((T + 7) // 8, *current.shape), dtype=torch.uint8)


def _fake_conv2d_if(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    geometry: Sequence[int],
    residual: Sequence[Tensor],
    amplitude: Sequence[Tensor],
    current: Tensor | None,
    bias: Tensor,
    threshold: Tensor,
    T: int,
) -> Tensor:
    shape = _if_shape("conv2d_if", x, weight, geometry, residual, amplitude, current, bias, threshold, T)
    return threshold.new_empty(shape, dtype=torch.uint8)


def _fake_linear_if(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    residual: Sequence[Tensor],
    amplitude: Sequence[Tensor],
    current: Tensor | None,
    bias: Tensor,
    threshold: Tensor,
    T: int,
) -> Tensor:
    maps, kernels, geometry, residual, current = _as_conv(x, weight, residual, current)
    shape = _if_shape("linear_if", maps, kernels, geometry, residual, amplitude, current, bias, threshold, T)
    return threshold.new_empty((shape[0], shape[1], shape[4]), dtype=torch.uint8)


def _fake_pool(x: Tensor, rows: Sequence[int], cols: Sequence[int], multiple: int, T: int) -> Tensor:
    return x.new_empty(_pool_shape("pool", x, rows, cols, multiple, T), dtype=torch.uint8)


def _fake_max_pool(x: Tensor, rows: Sequence[int], cols: Sequence[int]) -> Tensor:
    _check("max_pool", "x", x, torch.uint8, [-1] * 5)
    oh, ow = _check_windows("max_pool", rows, cols, x.shape[2], x.shape[3], 0)
    return x.new_empty((x.shape[0], x.shape[1], oh, ow, x.shape[4]), dtype=torch.uint8)


def _fake_count(x: Tensor, T: int, prefix: bool) -> Tensor:
    _check_steps("count", T)
    _check("count", "x", x, torch.uint8, None)
    if x.dim() < 2:
        _fail("count", f"x must be masks or count planes, got shape {list(x.shape)}")
    _is_count("count", "x", x, T)
    return x.new_empty((T if prefix else 1, *x.shape[1:]), dtype=torch.int32)


def _fake_pool_counts(counts: Tensor, rows: Sequence[int], cols: Sequence[int], multiple: int) -> Tensor:
    _check("pool_counts", "counts", counts, torch.int32, [-1] * 5)
    oh, ow = _check_windows("pool_counts", rows, cols, counts.shape[2], counts.shape[3], multiple)
    return counts.new_empty((*counts.shape[:2], oh, ow, counts.shape[4]), dtype=torch.int32)


def _fake_readout(
    counts: Sequence[Tensor],
    weight: Sequence[Tensor],
    geometry: Sequence[int],
    gain: Sequence[Tensor],
    multiple: Sequence[int],
    offset: Tensor,
    T: int,
) -> Tensor:
    _check_no_grad("readout", *gain, offset)
    shape = _readout_shape(counts, weight, geometry, gain, multiple, offset, T)
    return offset.new_empty(shape, dtype=torch.float32)


NAMES = (
    "quantize_input",
    "conv2d_current",
    "conv2d_encode",
    "encode",
    "conv2d_if",
    "linear_if",
    "pool",
    "max_pool",
    "count",
    "pool_counts",
    "readout",
)


def _register(name: str) -> None:
    native, fake = globals()[f"_native_{name}"], globals()[f"_fake_{name}"]
    plain = getattr(reference, name)

    def run_reference(*args: Any) -> Any:
        fake(*args)
        return plain(*args)

    def run_gpu(*args: Any) -> Any:
        chosen = backend.gpu_backend()
        if chosen == "reference":
            return run_reference(*args)
        fake(*args)
        return backend.operators(chosen)[name](*args)

    def run_native(*args: Any) -> Any:
        if backend.triton_on_cpu():
            return run_gpu(*args)
        if backend.use_reference:
            return run_reference(*args)
        out = fake(*args)
        native(out, *args)
        return out

    library.impl(name, run_native, "CPU")
    library.impl(name, run_gpu, "CUDA")
    torch.library.register_fake(f"qcfs_fast::{name}", fake, lib=library)


for _name in NAMES:
    _register(_name)
