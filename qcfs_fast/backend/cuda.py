"""Launches the native CUDA kernels (csrc/cuda, module _cuda) on torch tensors, and captures whole networks.

Each operator has the arguments of its namesake in reference.py and returns the same bytes; operands have been
checked in ops.py. Kernels are queued on torch's current stream of the operands' device; outputs and workspaces
are torch tensors, so a CUDA graph can capture all of it. Nothing here waits for the GPU, with two exceptions
that capture skips: packing a weight the first time it is seen, and asking whether an image held NaN or infinity.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..operators import reference
from ..operators.geometry import GEOMETRY, POINTWISE, convolution_size

NOT_FINITE = "quantize_input: the input holds NaN or infinity; clean the data before it enters the network"

module: Any = None


def unavailable() -> str:
    """Loads the module; returns why it cannot run here, or an empty string."""
    global module
    if module is None:
        try:
            module = importlib.import_module("qcfs_fast._cuda")
        except ImportError as error:
            return f"CUDA module absent ({error})"
    try:
        devices = int(module.device_count())
    except RuntimeError as error:
        return f"CUDA module built, but {error}"
    if devices == 0 or not torch.cuda.is_available():
        return "CUDA module built, but torch sees no GPU"
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        if not covers(module.ARCHITECTURES, capability):
            wanted = ".".join(map(str, capability))
            return (
                f"the CUDA module holds code for {module.ARCHITECTURES}, not for GPU {i} of compute capability "
                f"{wanted}; build again with TORCH_CUDA_ARCH_LIST={wanted}"
            )
    return ""


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code built for `architectures`, as in TORCH_CUDA_ARCH_LIST, runs on a GPU of this compute capability.

    Machine code serves later minor versions of its major one (with the suffix a only its own), PTX all later GPUs.
    """
    for entry in architectures.split():
        major, minor, specific, ptx = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry).groups()  # type: ignore[union-attr]
        built = (int(major), int(minor))
        if capability == built or (
            not specific and capability > built and (ptx is not None or capability[0] == built[0])
        ):
            return True
    return False


def _where(x: Tensor) -> tuple[int, int]:
    """Device index and stream that work on x is queued on."""
    stream = torch.cuda.current_stream(x.device)
    return int(stream.device.index), int(stream.cuda_stream)


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _dense(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for a result or a workspace: every element read later is written by a kernel first."""
    return torch.empty(tuple(shape), dtype=dtype, device=like.device)


def _map_size(x: Tensor, g: Sequence[int]) -> tuple[int, int]:
    """Height and width of a convolution's output; x is [.., H, W, C]."""
    height, width = x.shape[-3:-1]
    return convolution_size(height, width, g)


@contextlib.contextmanager
def _named(op: str, *operands: Tensor) -> Iterator[None]:
    """A CUDA error carries the operator's name and its operands' shapes."""
    try:
        yield
    except RuntimeError as error:
        shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in operands)
        raise RuntimeError(f"qcfs_fast::{op}: {error}; operands {shapes} on {operands[0].device}") from error


# --------------------------------------------------------------------------------------- packed weights
#
# The tensor cores read weights as int8 digit planes in an order of their own (csrc/cuda/kernels/layer.h). A weight is
# packed once and kept for as long as the tensor lives; an in-place change, seen by the tensor's version counter,
# packs again into the same memory, which captured graphs may be reading. Inference tensors have no such counter
# and are packed at every call. Writing through .data escapes the counter: do not.

_packed: dict[tuple[int, bool], tuple[weakref.ref[Tensor], int, Tensor]] = {}


def _packed_weight(weight: Tensor, image: bool = False) -> Tensor:
    """`image`: for the first layer, all of K as if it were the channels of one tap."""
    key, cacheable = (id(weight), image), not weight.is_inference()
    version = weight._version if cacheable else 0
    entry = _packed.get(key) if cacheable else None
    if entry is not None and entry[0]() is weight and entry[1] == version:
        return entry[2]
    kh, kw, channels, O = (1,) * (4 - weight.dim()) + tuple(weight.shape)
    if image:
        kh, kw, channels = 1, 1, kh * kw * channels
    geometry = (kh, kw, *POINTWISE[2:])
    width = weight.element_size()
    if entry is not None and entry[0]() is weight:
        packed = entry[2]
    else:
        packed = _empty(weight, (module.packed_bytes(geometry, channels, O, width),), torch.int8)
    dense = weight.contiguous()
    module.pack_weight(_where(weight), geometry, channels, O, width, dense.data_ptr(), packed.data_ptr())
    # A capture only records the packing: its result exists in replays, not yet for anyone else.
    if cacheable and not _capturing():
        if weight.is_cuda:  # other streams may use it from now on
            torch.cuda.current_stream(weight.device).synchronize()
        _packed[key] = (weakref.ref(weight, lambda _: _packed.pop(key, None)), version, packed)
    return packed


# --------------------------------------------------------------------------------------------- operators


def _fire(
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
) -> Tensor:
    """conv2d_if; weights as the caller holds them, [KH, KW, C, O] or [K, O]: they are the keys of the packed ones."""
    x, residual, amplitude = _dense(x), _dense(residual), _dense(amplitude)
    bias, threshold = _dense((bias, threshold))
    current = None if current is None else current.contiguous()
    split = [tuple(geometry[GEOMETRY * i : GEOMETRY * (i + 1)]) for i in range(len(x))]
    if x:
        size = (x[0].shape[1], *_map_size(x[0], split[0]))
    else:
        size = tuple(residual[0].shape[1:4] if residual else current.shape[:3])  # type: ignore[union-attr]
    where, shape = _where(threshold), (*size, threshold.shape[0], T)
    out = _empty(threshold, ((T + 7) // 8, *shape[:4]), torch.uint8)

    def products(weights: Sequence[Tensor] | None) -> list[tuple[Any, ...]]:
        return [
            (
                xi.data_ptr(),
                xi.shape[0] == T,
                *xi.shape[2:],
                0 if weights is None else weights[i].data_ptr(),
                weight[i].element_size(),
                split[i],
            )
            for i, xi in enumerate(x)
        ]

    with _named(op, *x, *weight, *residual, threshold):
        plan = module.plan_conv_if(where, products(None), shape)
        tensor_cores = plan[0] == module.TENSOR_CORES
        packed = [_packed_weight(w) for w in weight] if tensor_cores else []
        plain = None if tensor_cores else _dense(weight)
        workspace = _empty(out, (plan[4] + plan[5],), torch.uint8)
        module.conv_if(
            where,
            op,
            plan,
            [p.data_ptr() for p in packed],
            workspace.data_ptr(),
            products(plain),
            [(r.data_ptr(), r.shape[0] == T, a.data_ptr()) for r, a in zip(residual, amplitude, strict=True)],
            0 if current is None else current.data_ptr(),
            bias.data_ptr(),
            threshold.data_ptr(),
            out.data_ptr(),
            shape,
        )
    return out


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
) -> Tensor:
    if len(x) > module.MOST_PRODUCTS or len(residual) > module.MOST_RESIDUALS:
        return reference.conv2d_if(x, weight, geometry, residual, amplitude, current, bias, threshold, T)
    return _fire("conv2d_if", x, weight, geometry, residual, amplitude, current, bias, threshold, T)


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
    if len(x) > module.MOST_PRODUCTS or len(residual) > module.MOST_RESIDUALS:
        return reference.linear_if(x, weight, residual, amplitude, current, bias, threshold, T)
    maps = [t[:, :, None, None] for t in x]
    residual = [r[:, :, None, None] for r in residual]
    current = None if current is None else current[:, None, None]
    geometry = POINTWISE * len(x)
    return _fire("linear_if", maps, weight, geometry, residual, amplitude, current, bias, threshold, T).flatten(2)


def _analog(
    op: str,
    x: Tensor,
    exponent: Tensor,
    weight: Tensor,
    geometry: Sequence[int],
    vectors: Sequence[Tensor],
    threshold: Tensor | None,
    T: int,
) -> Tensor:
    """conv2d_encode, or with T = 0 conv2d_current."""
    x, exponent, *vectors = _dense((x, exponent, *vectors))
    threshold = None if threshold is None else threshold.contiguous()
    shape = (x.shape[0], *_map_size(x, geometry), weight.shape[3])
    out = _empty(x, ((T + 7) // 8, *shape) if T else shape, torch.uint8 if T else torch.int32)
    with _named(op, x, weight):
        tensor_cores = module.analog_on_tensor_cores(tuple(geometry), x.shape[3], weight.shape[3])
        packed = _packed_weight(weight, image=True) if tensor_cores else None
        plain = None if tensor_cores else weight.contiguous()
        module.analog(
            _where(x),
            x.data_ptr(),
            exponent.data_ptr(),
            0 if plain is None else plain.data_ptr(),
            0 if packed is None else packed.data_ptr(),
            tuple(geometry),
            *(v.data_ptr() for v in vectors),
            0 if threshold is None else threshold.data_ptr(),
            *((out.data_ptr(), 0) if T else (0, out.data_ptr())),
            *x.shape,
            *shape[1:],
            T,
        )
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
    return _analog("conv2d_current", x, exponent, weight, geometry, (gain, offset, low, high), None, 0)


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
    return _analog("conv2d_encode", x, exponent, weight, geometry, (gain, offset, low, high), threshold, T)


def encode(current: Tensor, threshold: Tensor, T: int) -> Tensor:
    current, threshold = _dense((current, threshold))
    channels = threshold.shape[0]
    out = _empty(current, ((T + 7) // 8, *current.shape), torch.uint8)
    with _named("encode", current):
        module.encode(
            _where(current),
            current.data_ptr(),
            threshold.data_ptr(),
            out.data_ptr(),
            current.numel() // channels,
            channels,
            T,
        )
    return out


@functools.cache
def _window_table(windows: tuple[int, ...], device: torch.device) -> Tensor:
    """Windows on the device, one copy for each layer shape, kept: captured graphs read them."""
    return torch.tensor(windows, dtype=torch.int64, device=device)


def _tables(x: Tensor, rows: Sequence[int], cols: Sequence[int]) -> tuple[int, int, int, int]:
    """Addresses of both tables and the output's height and width."""
    r, c = _window_table(tuple(rows), x.device), _window_table(tuple(cols), x.device)
    return r.data_ptr(), c.data_ptr(), len(rows) // 3, len(cols) // 3


def _pool(op: str, out: Tensor, x: Tensor, rows: Sequence[int], cols: Sequence[int], multiple: int, T: int) -> Tensor:
    x = x.contiguous()
    with _named(op, x):
        module.pool(
            _where(x),
            x.data_ptr(),
            x.shape[0] == T,
            op == "max_pool",
            *_tables(x, rows, cols),
            multiple,
            out.data_ptr(),
            *x.shape[1:],
            T,
        )
    return out


def pool(x: Tensor, rows: Sequence[int], cols: Sequence[int], multiple: int, T: int) -> Tensor:
    out = _empty(x, (T, x.shape[1], len(rows) // 3, len(cols) // 3, x.shape[4]), torch.uint8)
    return _pool("pool", out, x, rows, cols, multiple, T)


def max_pool(x: Tensor, rows: Sequence[int], cols: Sequence[int]) -> Tensor:
    out = _empty(x, (*x.shape[:2], len(rows) // 3, len(cols) // 3, x.shape[4]), torch.uint8)
    return _pool("max_pool", out, x, rows, cols, 0, x.shape[0])


def count(x: Tensor, T: int, prefix: bool) -> Tensor:
    x = x.contiguous()
    out = _empty(x, (T if prefix else 1, *x.shape[1:]), torch.int32)
    with _named("count", x):
        module.count(_where(x), x.data_ptr(), x.shape[0] == T, prefix, out.data_ptr(), x[0].numel(), T)
    return out


def pool_counts(counts: Tensor, rows: Sequence[int], cols: Sequence[int], multiple: int) -> Tensor:
    counts = counts.contiguous()
    s, n, h, w, c = counts.shape
    out = _empty(counts, (s, n, len(rows) // 3, len(cols) // 3, c), torch.int32)
    with _named("pool_counts", counts):
        module.pool_counts(
            _where(counts),
            counts.data_ptr(),
            *_tables(counts, rows, cols),
            multiple,
            out.data_ptr(),
            s * n,
            h,
            w,
            c,
        )
    return out


def readout(
    counts: Sequence[Tensor],
    weight: Sequence[Tensor],
    geometry: Sequence[int],
    gain: Sequence[Tensor],
    multiple: Sequence[int],
    offset: Tensor,
    T: int,
) -> Tensor:
    if len(counts) > module.MOST_TERMS:
        return reference.readout(counts, weight, geometry, gain, multiple, offset, T)
    counts, weight, gain, offset = _dense(counts), _dense(weight), _dense(gain), offset.contiguous()
    split = [tuple(geometry[GEOMETRY * i : GEOMETRY * (i + 1)]) for i in range(len(counts))]
    first = counts[0]
    size = _map_size(first, split[0]) if weight[0].numel() else tuple(first.shape[2:4])
    out = _empty(offset, (*first.shape[:2], *size, offset.shape[0]), torch.float32)
    terms = [
        (c.data_ptr(), *c.shape[2:], w.data_ptr() if w.numel() else 0, g, a.data_ptr(), m)
        for c, w, g, a, m in zip(counts, weight, split, gain, multiple, strict=True)
    ]
    with _named("readout", *counts, *weight):
        module.readout(
            _where(offset),
            terms,
            offset.data_ptr(),
            out.data_ptr(),
            out.shape[0] * out.shape[1],
            *out.shape[1:],
            T,
        )
    return out


# Where a capture leaves the flags of its quantize_input calls, for CudaGraph.check().
_captured_flags: list[Tensor] | None = None


def quantize_input(x: Tensor, source: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    x = x.to(torch.float32)
    source, scale, shift = _dense((source, scale, shift))
    n, _, h, w = x.shape
    q, exponent = _empty(x, (n, h, w, source.shape[0]), torch.int16), _empty(x, (n,), torch.int32)
    workspace = _empty(x, (n + 1,), torch.int32)
    with _named("quantize_input", x):
        module.quantize(
            _where(x),
            x.data_ptr(),
            list(x.stride()),
            source.data_ptr(),
            scale.data_ptr(),
            shift.data_ptr(),
            q.data_ptr(),
            exponent.data_ptr(),
            workspace.data_ptr(),
            *q.shape,
        )
    if _capturing():
        if _captured_flags is not None:
            _captured_flags.append(workspace)
    elif int(workspace[-1]):
        raise ValueError(NOT_FINITE)
    return q, exponent


OPERATORS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        quantize_input, conv2d_current, conv2d_encode, encode, conv2d_if, linear_if, pool, max_pool, count,
        pool_counts, readout,
    )
}  # fmt: skip


# ------------------------------------------------------------------------------------------- CUDA graphs


class CudaGraph:
    """A network captured for one input shape; made by :func:`cuda_graph`.

    A call copies the input into a static buffer and replays. The result is a static buffer too: the next call
    overwrites it, so clone what must be kept.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], example: Tensor) -> None:
        global _captured_flags
        if not example.is_cuda:
            raise ValueError(
                f"cuda_graph: the example must be on a GPU, got {example.device}; move it with .to('cuda')"
            )
        self.run = run  # keeps the network, whose weights the graph reads
        self.graph = torch.cuda.CUDAGraph()
        self._flags: list[Tensor] = []
        with torch.cuda.device(example.device), torch.no_grad():
            self.input = example.detach().clone()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # packs weights, uploads window tables, fills the allocator
                for _ in range(2):
                    run(self.input)
            torch.cuda.current_stream().wait_stream(side)
            saved, _captured_flags = _captured_flags, self._flags
            try:
                with torch.cuda.graph(self.graph):
                    self.output = run(self.input)
            finally:
                _captured_flags = saved

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape != self.input.shape:
            raise ValueError(
                f"this graph was captured for inputs of shape {list(self.input.shape)}, got {list(x.shape)}"
            )
        with torch.cuda.device(self.input.device), torch.no_grad():
            self.input.copy_(x)
            self.graph.replay()
        return self.output

    def check(self) -> None:
        """Raise the ValueError of an eager call if the last input held NaN or infinity. Waits for the GPU.

        Replays cannot raise; a sample with such values is computed as if it were zero.
        """
        if any(int(flag[-1]) for flag in self._flags):
            raise ValueError(NOT_FINITE)


def cuda_graph(snn: Any, example: Tensor, T: int | None = None, per_step: bool = False) -> CudaGraph:
    """Capture a converted network as a CUDA graph, which launches all its kernels at once.

    Args:
        snn: the network, already on the GPU; it is kept alive by the graph. Capture again after changing it.
        example: an input of the shape, dtype and device that later calls have; its values do not matter, but
            must be finite.
        T: time steps, default ``snn.T``.
        per_step: as in a call of the network.
    """
    return CudaGraph(lambda x: snn(x, T, per_step), example)
