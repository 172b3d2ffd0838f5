"""The native CPU kernels (csrc/cpu, module _cpu) on torch tensors.

A spiking layer runs on one of several engines; csrc/cpu/engines.cpp chooses for each call. Two of them read weights in
an order of their own, as does the first layer: their plan asks for those (protocol.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operators.checks import fail
from ..operators.limits import MAX_LISTED
from ..operators.signature import (
    Conv2dCurrent,
    Conv2dEncode,
    Conv2dIf,
    Conv2dIfFrom,
    Count,
    MaxPool,
    Operator,
    Pool,
    PoolCounts,
    QuantizeInput,
    Readout,
)
from . import native
from .choice import ENGINES, settings
from .packing import Packed, Packing
from .protocol import Kernels, Plan

CPU = Kernels("cpu")


def _bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def _plan_spiking(a: Conv2dIf) -> Plan:
    for x in a.x:
        row = x.shape[3] * x.shape[4]
        if row * a.T >= MAX_LISTED:
            fail(
                "conv2d_if",
                f"{row} inputs in a row at T={a.T}; the CPU kernels take {(MAX_LISTED - 1) // a.T}; use smaller images",
            )
    wanted = settings()
    layer = native.module.SpikingLayer(a, wanted.isa, torch.get_num_threads(), ENGINES.index(wanted.engine))
    engine: str = layer.engine
    layout = f"{engine} {native.kernel_set(wanted.isa)}"

    def pack(product: int) -> Packed:
        packed = _bytes(layer.packed_bytes(product))
        layer.pack(product, packed)
        return (packed,)

    if engine == "dense":  # all weights of the layer in one
        return Plan(engine, (Packing(layout, a.keys, lambda: pack(0)),), layer)
    if engine in ("events", "table"):
        each = [Packing(layout, (key,), lambda i=i: pack(i)) for i, key in enumerate(a.keys)]  # type: ignore[misc]
        return Plan(engine, each, layer)
    return Plan(engine, (), layer)


@CPU.operator(Conv2dIf, _plan_spiking)
@CPU.operator(Conv2dIfFrom, _plan_spiking)
def _spiking(a: Conv2dIf, plan: Plan, packed: list[Packed]) -> Any:
    result = a.empty()
    out, state = result if isinstance(result, tuple) else (result, None)
    plan.detail.fire([p[0] for p in packed], out, state)
    return result


def _plan_analog(a: Conv2dCurrent) -> Plan:
    isa = settings().isa
    layer = native.module.AnalogLayer(a, isa, torch.get_num_threads())

    def pack() -> Packed:
        packed = _bytes(layer.packed_bytes())
        layer.pack(packed)
        return (packed,)

    layout = f"image {native.kernel_set(isa)} {a.geometry[8] > 1}"  # groups are packed in another way
    return Plan("", (Packing(layout, (a.key,), pack),), layer)


@CPU.operator(Conv2dCurrent, _plan_analog)
@CPU.operator(Conv2dEncode, _plan_analog)
def _analog(a: Conv2dCurrent, plan: Plan, packed: list[Packed]) -> Tensor:
    out: Tensor = a.empty()
    plan.detail.fire(packed[0][0], out)
    return out


def _filling(name: str) -> Any:
    """A kernel that fills the result and needs nothing besides the call."""

    def run(a: Operator) -> Any:
        out = a.empty()
        results = out if isinstance(out, tuple) else (out,)
        getattr(native.module, name)(a, *results, settings().isa, torch.get_num_threads())
        return out

    return run


for _kind, _name in (
    (QuantizeInput, "quantize_input"),
    (Pool, "pool"),
    (MaxPool, "pool"),
    (Count, "count"),
    (PoolCounts, "pool_counts"),
    (Readout, "readout"),
):
    CPU.operator(_kind)(_filling(_name))
