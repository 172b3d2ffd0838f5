"""Launches the native CUDA kernels (csrc/cuda, module _cuda) on torch tensors.

Kernels are queued on torch's current stream of the operands' device; results and workspaces are torch tensors, so a
CUDA graph can capture all of it (cuda_graph.py). Nothing here waits for the GPU, with two exceptions that capture
skips: packing a weight the first time it is seen, and asking whether an image held NaN or infinity.

The tensor cores read weights as int8 digit planes in an order of their own (csrc/cuda/kernels); a layer's plan says
whether they run.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..operators import reference
from ..operators.finite import refuse_not_finite
from ..operators.signature import (
    Conv2dCurrent,
    Conv2dEncode,
    Conv2dIf,
    Conv2dIfFrom,
    Count,
    LinearIf,
    MaxPool,
    Operator,
    Pool,
    PoolCounts,
    QuantizeInput,
    Readout,
)
from .packing import Packed, Packing, window_table
from .protocol import GpuKernels, Plan

module: Any = None


def unavailable(index: int = 0) -> str:
    """Loads the module; returns why it cannot run on this GPU, or an empty string."""
    global module
    if module is None:
        try:
            module = importlib.import_module("qcfs_fast._cuda")
        except ImportError as error:
            return f"CUDA module absent ({error})"
    if not torch.cuda.is_available():
        return "CUDA module built, but torch sees no GPU"
    try:
        module.device_count()
    except RuntimeError as error:
        return (
            f"CUDA module built, but {error}; update the driver, or build again with an nvcc of CUDA "
            f"{torch.version.cuda}, as torch was"
        )
    capability = torch.cuda.get_device_capability(index)
    if not covers(module.ARCHITECTURES, capability):
        wanted = ".".join(map(str, capability))
        return (
            f"the CUDA module holds code for {module.ARCHITECTURES}, not for GPU {index} of compute capability "
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


class _CudaKernels(GpuKernels):
    def __call__(self, a: Operator) -> Any:
        """A CUDA error carries the operator's name and its operands' shapes."""
        if isinstance(a, LinearIf):  # comes again as a Conv2dIf
            return super().__call__(a)
        try:
            return super().__call__(a)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            operands = a.tensors()
            shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in operands)
            where = operands[0].device
            op = getattr(a, "caller", a.name)
            raise RuntimeError(f"qcfs_fast::{op}: {error}; operands {shapes} on {where}") from error


KERNELS = _CudaKernels("cuda")


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for a workspace or a packed weight."""
    return torch.empty(tuple(shape), dtype=dtype, device=like.device)


def _packing(weight: Tensor, dense: Tensor, image: bool = False) -> Packing:
    """Digit planes of a weight; `image`: of the first layer's, in pieces of four channels instead of sixteen."""

    def pack() -> Packed:
        packed = _empty(dense, (module.packed_bytes(dense, image),), torch.int8)
        module.pack_weight(_where(dense), dense, image, packed)
        return (packed,)

    return Packing("cuda image" if image else "cuda", (weight,), pack, in_place=True)


# -------------------------------------------------------------------------------------- spiking layers


def _plan_spiking(a: Conv2dIf) -> Plan:
    if len(a.x) > module.MAX_PRODUCTS or len(a.residual) > module.MAX_RESIDUALS:
        return Plan("")
    layer = module.SpikingLayer(_where(a.threshold), a)
    packings = [_packing(k, w) for k, w in zip(a.keys, a.weight, strict=True)] if layer.on_tensor_cores else []
    return Plan("", packings, layer)


@KERNELS.operator(Conv2dIf, _plan_spiking)
@KERNELS.operator(Conv2dIfFrom, _plan_spiking)
def _spiking(a: Conv2dIf, plan: Plan, packed: list[Packed]) -> Any:
    if plan.detail is None:  # more sources than the kernels' structs hold
        return getattr(reference, a.name)(a)
    result = a.empty()
    out, state = result if isinstance(result, tuple) else (result, None)
    workspace = _empty(out, (plan.detail.workspace_bytes,), torch.uint8)
    plan.detail.fire(a.caller, [p[0] for p in packed], workspace, out, state)
    return result


def _plan_analog(a: Conv2dCurrent) -> Plan:
    return Plan("", [_packing(a.key, a.weight, image=True)] if module.analog_on_tensor_cores(a) else [])


@KERNELS.operator(Conv2dCurrent, _plan_analog)
@KERNELS.operator(Conv2dEncode, _plan_analog)
def _analog(a: Conv2dCurrent, plan: Plan, packed: list[Packed]) -> Tensor:
    out: Tensor = a.empty()
    module.analog(_where(a.x), a, packed[0][0] if packed else None, out)
    return out


# -------------------------------------------------------------------------------- pooling and counting


def _plan_windows(a: Pool | MaxPool | PoolCounts) -> Plan:
    return Plan("", detail=[window_table(tuple(w), a.device, torch.int64) for w in (a.rows, a.cols)])


@KERNELS.operator(Pool, _plan_windows)
@KERNELS.operator(MaxPool, _plan_windows)
@KERNELS.operator(PoolCounts, _plan_windows)
def _pool(a: Pool | MaxPool | PoolCounts, plan: Plan, packed: list[Packed]) -> Tensor:
    out: Tensor = a.empty()
    launch = module.pool_counts if isinstance(a, PoolCounts) else module.pool
    launch(_where(out), a, *plan.detail, out)
    return out


@KERNELS.operator(Count)
def _count(a: Count) -> Tensor:
    out: Tensor = a.empty()
    module.count(_where(out), a, out)
    return out


# --------------------------------------------------------------------------------- last and first layer


@KERNELS.operator(Readout)
def _readout(a: Readout) -> Tensor:
    if len(a.counts) > module.MAX_TERMS:
        return reference.readout(a)
    out: Tensor = a.empty()
    module.readout(_where(out), a, out)
    return out


@KERNELS.operator(QuantizeInput)
def _quantize_input(a: QuantizeInput) -> tuple[Tensor, Tensor]:
    q, exponent = a.empty()
    workspace = _empty(q, (q.shape[0] + 1,), torch.int32)
    module.quantize_input(_where(q), a, workspace, q, exponent)
    refuse_not_finite(workspace[-1:])
    return q, exponent
