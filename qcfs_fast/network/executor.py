"""The whole network as one native call (csrc/network), in place of an operator for each node.

Between two operators a network spends its time in Python: looking up tensors, checks, dispatch, allocation. The native
executor has done all of that once for a shape and T, and a call walks through its steps without Python. It reads the
graph as a saved file describes it and calls the kernels that the operators call, so the bytes are the same.

The operators stay for all that has to see them: torch.compile and torch.export, tracing, torch's modes, transforms and
profiler, hooks, whoever looks at the values between nodes (trace, profile), and every device but the CPU. What the
native reader refuses takes that way too, and gets its messages. A run that goes on from another one (stream, predict)
may take another way than that did (state.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from operator import is_
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor

from ..backend import native
from ..backend.choice import ENGINES, cpu_backend, settings
from ..backend.protocol import last_engine
from ..operators.neuron import MODES
from .layers import Layer, Readout, Run

NATIVE = "one native call"
_C: Any = torch._C
_VERSION: Any = Tensor._version.__get__  # type: ignore[attr-defined]


class Executor:
    """A network's native form: made at the first call that can use it, and again when its tensors have changed.

    `path` says which way the last call took, "" before the first.
    """

    def __init__(self) -> None:
        self.path = ""
        self._native: _Native | None = None

    @contextmanager
    def clocked(self) -> Iterator[list[float]]:
        """The seconds of every native call until the end of the `with`; none where operators run."""
        seconds: list[float] = []
        held, network = self._native, getattr(self._native, "_network", None)
        if held is not None and network is not None:
            held._network = _Clocked(network, seconds)
        try:
            yield seconds
        finally:
            if held is not None and network is not None:
                held._network = network

    def __reduce__(self) -> Any:
        return Executor, ()  # a copy of a network makes its own

    def answer(
        self, program: list[tuple[str, Layer]], describe: Callable[[], str], x: Any, run: Run, watched: bool
    ) -> Tensor | None:
        """The network's answer as its readout gives it; None where the operators must run.

        Args:
            program: the nodes by name.
            describe: gives the header of a saved file of them.
            x: a checked image; None in a run that goes on with the last one.
            run: how to run.
            watched: somebody looks at the values between nodes.
        """
        before, self.path = self.path, "operators"
        if watched or not (x is None or _plain(x)) or not _alone():
            return None
        held = self._native
        if held is None or not held.fresh():
            held = self._native = _Native(program, describe)
        plan = held.plan(x, run)
        if plan is None:
            self.path = f"operators: {held.reason}"
            return None
        self.path = NATIVE
        return held.run(plan, x, run, told=before == NATIVE)


class _Clocked:
    """A native network that notes how long its runs take."""

    def __init__(self, network: Any, seconds: list[float]) -> None:
        self._network, self._seconds = network, seconds
        self.prepare = network.prepare

    def run(self, *arguments: Any) -> bytes:
        start = perf_counter()
        engines: bytes = self._network.run(*arguments)
        self._seconds.append(perf_counter() - start)
        return engines


def _plain(x: Tensor) -> bool:
    """Whether this is a plain image on the CPU."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.is_cpu
        and x.layout is torch.strided
        and not x.is_neg()
        and not x._is_zerotensor()
    )


def _alone() -> bool:
    """Whether nothing but the answer is wanted, and of the CPU."""
    return (
        _C._len_torch_dispatch_stack() == 0
        and _C._len_torch_function_stack() == 0
        and _C._functorch.peek_interpreter_stack() is None
        and _C._get_tracing_state() is None
        and not _C._autograd._profiler_enabled()
        and not torch.nn.modules.module._has_any_global_hook()
        and cpu_backend() == "cpu"
    )


class _Native:
    """The native form of a network's tensors as they were when it was made."""

    def __init__(self, program: list[tuple[str, Layer]], describe: Callable[[], str]) -> None:
        # The dictionaries themselves: a buffer that is replaced and a hook that is added later are seen.
        self._buffers = [layer._buffers for _, layer in program]
        self._hooks = [h for _, layer in program for h in (layer._forward_hooks, layer._forward_pre_hooks)]
        self._tensors, self._state = self._now()
        self._refused = ""
        self.reason = ""  # why the last plan could not be made
        self._engine_names: list[str] = native.module.engines()
        image = program[0][1].config
        self._vector, self._line, self._readout = image.vector, image.line, cast(Readout, program[-1][1])
        self._engines = b""  # of the last run
        self._layers = dict(program)
        named = {f"{name}/{key}": t for name, layer in program for key, t in layer.tensors()}
        try:
            self._network = native.module.Network(describe(), named)
        except native.module.NetworkError as error:
            self._refused = str(error)
            return
        self._told: list[Any] = [self._layers[name] for name in self._network.layers]

    def _now(self) -> tuple[list[Any], list[int]]:
        """The tensors, and numbers that change when one is written to or gets other memory.

        Every call asks, so no line of Python runs for a tensor.
        """
        tensors: list[Any] = list(chain.from_iterable(map(dict.values, self._buffers)))
        try:
            return tensors, [*map(_VERSION, tensors), *map(Tensor.data_ptr, tensors)]
        except RuntimeError:  # made under torch.inference_mode(): nobody counts its versions
            return tensors, []

    def fresh(self) -> bool:
        """Whether the tensors are still those of which this was made."""
        tensors, state = self._now()
        return state == self._state and len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors))

    def plan(self, x: Tensor | None, run: Run) -> Any:
        """What the network does at this shape, or None and a `reason`."""
        if self._refused or not self._state or any(self._hooks):
            self.reason = self._refused or ("hooks" if self._state else "tensors made under inference_mode")
            return None
        if run.state is not None:
            shape: Any = run.state.shape
        else:
            assert x is not None
            shape = x.shape[1:] if run.varying else x.shape
        height, width = (1, 1) if self._vector else (1, *shape[2:])[-2:]
        neuron = (MODES.index(run.neuron.mode), run.neuron.window, run.neuron.iterations)
        try:
            return self._network.prepare(
                shape[0], height, width, run.T, neuron, run.per_step, run.skip, run.varying, run.state is not None
            )
        except (native.module.NetworkError, MemoryError) as error:
            self.reason = str(error)
            return None

    def run(self, plan: Any, x: Tensor | None, run: Run, told: bool) -> Tensor:
        """The answer; `told`: the layers know the engines of the last run."""
        if x is not None and x.dtype is not torch.float32:
            x = x.to(torch.float32)
        if x is not None and self._line:
            x = x.unsqueeze(-2)
        stride = (0,) * 5 if x is None else x.stride() if run.varying else (0, *x.stride())
        if x is not None and self._vector:
            stride = (*stride, 0, 0)
        kept = 0 if run.state is None else run.state.buffer(plan, self._layers).data_ptr()
        asked = settings()
        out = torch.empty(plan.shape, dtype=torch.float32, device="cpu")
        engines: bytes = self._network.run(
            plan,
            0 if x is None else x.data_ptr(),
            stride,
            out.data_ptr(),
            asked.isa,
            torch.get_num_threads(),
            ENGINES.index(asked.engine),
            kept,
            run.before,
        )
        names = self._engine_names
        last_engine.set(names[engines[-1]] if engines else "")
        if not told or engines != self._engines:  # assigning to modules takes long
            for layer, engine in zip(self._told, engines, strict=True):
                layer.engine = names[engine]
            self._engines = engines
        # As a vector it has its shape already: another operator would cost as much as all checks.
        return out if self._readout.config.vector else self._readout.arranged(out)
