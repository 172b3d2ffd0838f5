"""How a backend runs an operator: plan, pack, run.

    plan    chooses the kernel for this call and says in which layouts it wants the weights
    pack    packing.py finds those weights, or makes them
    run     fills and returns the result

On a GPU whatever outlives a call is made in the first two: packed weights and tables of windows. A walk through a
network `getting_ready` stops behind them, so that no later call allocates what it keeps (network/rehearsal.py).

A call is an `Operator` of signature.py that has been checked. A backend is a `Kernels`: one function for each kind of
operator, which takes the call. An operator that keeps nothing has nothing to plan and is a `run` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..operators.signature import LinearIf, Operator
from .packing import Packed, Packing, packed_weights


@dataclass(slots=True)
class Plan:
    """What `plan` settled: the engine's name, the weights it wants, and whatever `run` needs besides.

    A plan may hold addresses of the call's tensors, so it does not outlive the call.
    """

    engine: str
    packings: Sequence[Packing] = ()
    detail: Any = None


# Whether calls end before `run`, with a result that nobody has filled.
_getting_ready: ContextVar[bool] = ContextVar("qcfs_fast_getting_ready", default=False)


@contextmanager
def getting_ready() -> Iterator[None]:
    """Operators that are called in this block plan and pack, and run nothing."""
    token = _getting_ready.set(True)
    try:
        yield
    finally:
        _getting_ready.reset(token)


# Name of the engine of the spiking layer that ran last in this context, where its plan names one.
last_engine: ContextVar[str] = ContextVar("qcfs_fast_last_engine", default="")


class Kernels:
    """A backend. Calling it with a checked call runs it."""

    def __init__(self, name: str, dense: bool = True) -> None:
        """`dense`: the kernels know no strides, so operands are made contiguous first."""
        self.name = name
        self.dense = dense
        self.by_kind: dict[type[Operator], Callable[[Any], Any]] = {}

    def operator(
        self, kind: type[Operator], plan: Callable[[Any], Plan] | None = None
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator of the function that runs an operator: run(a), or with a plan run(a, plan, packed)."""

        def register(run: Callable[..., Any]) -> Callable[..., Any]:
            def call(a: Any) -> Any:
                if plan is None:
                    return a.empty() if _getting_ready.get() else run(a)
                settled = plan(a)
                packed: list[Packed] = [packed_weights.get(p) for p in settled.packings]
                last_engine.set(settled.engine)
                return a.empty() if _getting_ready.get() else run(a, settled, packed)

            self.by_kind[kind] = call
            return run

        return register

    def __call__(self, a: Operator) -> Any:
        if isinstance(a, LinearIf):
            result = self(a.checked_maps())
            return result.flatten(2) if isinstance(result, Tensor) else tuple(t.flatten(2) for t in result)
        if self.dense:
            a.make_dense()
        return self.by_kind[type(a)](a)


class GpuKernels(Kernels):
    """A backend on a GPU, whose launches go to the current device: that of the operands, until the operator is queued.

    A device is made current only where another one is, and torch puts that one back without a context on it: a process
    that uses the second GPU has none on the first.
    """

    def __call__(self, a: Operator) -> Any:
        index = a.device.index  # None: on the CPU, interpreted or emulated
        if index is None or index == torch.cuda.current_device():
            return super().__call__(a)
        with torch.cuda.device(index):
            return super().__call__(a)
