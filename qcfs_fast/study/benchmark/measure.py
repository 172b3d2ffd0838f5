"""The one timing harness: contenders are called in turns, so that a change of the machine's speed hits all alike.

    round 1    A B C
    round 2    A B C      ... each contender's figure is the median over its rounds
    round 3    A B

A slow contender takes part in fewer rounds, spread evenly over all. Each is called three times before the first round:
the first call compiles and allocates, the others tell how many rounds fit the effort. A call that is short against what
the contender before leaves behind (caches full of other weights, threads that spin or sleep) is repeated unread before
it is read: its figure is that of a call in a loop. What fails is reported as a result.

Beside time stand memory, the processor's peak rate, and the facts of the machine without which figures mean nothing.
"""

from __future__ import annotations

import importlib
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import backend
from ...backend.information import processor, version_of
from ...network.layers import Layer
from ...network.snn import SNN
from ...version import __version__

NOT_MEASURED = "not measured"
MAX_SECONDS = 20.0  # of one call; slower contenders are not measured
TAIL = {"p90": 90, "p99": 99}


@dataclass(frozen=True)
class Effort:
    """How long to measure each contender.

    rounds: the most readings of the clock.
    seconds: about how long all of them may take together.
    min_rounds: the fewest readings, however slow the contender is.
    reading: a reading takes at least about so many seconds; a shorter call is repeated within it, up to 50 times.
    lead: about so many seconds of calls go unread before a reading, up to 50 of them; none where one call takes longer.
        At most a two-hundredth of `seconds`.
    """

    rounds: int = 15
    seconds: float = 1.0
    min_rounds: int = 3
    reading: float = 0.0
    lead: float = 5e-3

    def rounds_of(self, once: float) -> int:
        """Rounds of a contender whose call takes `once` seconds."""
        fitting = min(self.rounds, self.seconds / max(once, 1e-6))
        return max(self.min_rounds, int(fitting))

    def calls_of(self, once: float) -> tuple[int, int]:
        """Calls before a reading, and within it."""
        lead = min(self.lead, self.seconds / 200)
        unread, read = (min(50, int(seconds / max(once, 1e-6))) for seconds in (lead, self.reading))
        return unread, max(1, read)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; nothing elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Seconds per call, read over one or several calls.

    By default the host's clock until the device is idle again: what a caller waits for. With `events` a GPU's own clock
    between the calls, without the way to the device and back; the host's clock where there is no GPU.
    """

    def __init__(self, device: torch.device, events: bool = False) -> None:
        self.device = device
        self.events = events and device.type == "cuda"

    def __call__(self, call: Callable[[], Any], calls: int = 1) -> float:
        if self.events:
            return self._by_events(call, calls)
        synchronize(self.device)  # calls that went unread may still run there
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(self.device)
        return (time.perf_counter() - start) / calls

    def _by_events(self, call: Callable[[], Any], calls: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        synchronize(self.device)
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls


def take_turns(
    contenders: Mapping[str, Callable[[], Any]], effort: Effort, clock: Clock
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Seconds per call of each contender, one entry a round; and the error of each that failed.

    The order is another one in each round: whoever comes behind a large network finds the caches cold, and behind one
    of torch's its threads still spinning.
    """
    rounds: dict[str, int] = {}
    calls: dict[str, tuple[int, int]] = {}
    errors: dict[str, Exception] = {}
    for name, contender in contenders.items():
        try:
            clock(contender)  # compiles, allocates
            once = min(clock(contender) for _ in range(2))
        except Exception as error:  # whatever a library, a compiler or a device raises is a result
            errors[name] = error
        else:
            rounds[name], calls[name] = effort.rounds_of(once), effort.calls_of(once)
    seconds: dict[str, list[float]] = {name: [] for name in rounds}
    all_rounds = max(rounds.values(), default=0)
    for i in range(all_rounds):
        for name, n in random.Random(i).sample(list(rounds.items()), len(rounds)):
            takes_part = (i + 1) * n // all_rounds > i * n // all_rounds
            if takes_part and name not in errors:
                unread, read = calls[name]
                try:
                    for _ in range(unread):
                        contenders[name]()
                    seconds[name].append(clock(contenders[name], read))
                except Exception as error:
                    errors[name] = error
    return {name: found for name, found in seconds.items() if name not in errors}, errors


def medians(contenders: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each contender over so many rounds; raises what a contender raises."""
    seconds, errors = take_turns(contenders, Effort(rounds, math.inf, min_rounds=1), Clock(device))
    for error in errors.values():
        raise error
    return {name: statistics.median(found) for name, found in seconds.items()}


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """The percentiles of TAIL that so many readings can tell: those with a reading or more above them."""
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {name: cuts[p - 1] for name, p in TAIL.items() if len(seconds) * (100 - p) >= 100}


def interleaved(
    contenders: Mapping[str, Callable[[], Any]], effort: Effort, device: torch.device, expected: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Each contender's row of a result: seconds (median), quartiles, percentiles, least, rounds; or the error.

    `expected` holds seconds of one call where they are known beforehand.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name in contenders:
        if (once := expected.get(name, 0)) > MAX_SECONDS:
            rows[name] = {"error": f"one call would take about {once:.0f} s, above the limit of {MAX_SECONDS:.0f} s"}
    seconds, errors = take_turns({n: c for n, c in contenders.items() if n not in rows}, effort, Clock(device))
    rows |= {name: {"error": describe_error(error)} for name, error in errors.items()}
    for name, found in seconds.items():
        low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
        spread = {"quartiles": [low, high], **percentiles(found), "least": min(found)}
        rows[name] = {"seconds": middle, **spread, "rounds": len(found)}
    return rows


def share_outside(snn: SNN, call: Callable[[], Any], readings: int) -> float | None:
    """The median share of a network's call that is spent outside of the native one: before it and behind it, in Python.

    None where a call is no native one: operators ran (docs/architecture.md), as on a GPU.
    """
    call()  # the native form is made
    shares = []
    with snn._executor.clocked() as inside:
        for _ in range(readings):
            inside.clear()
            start = time.perf_counter()
            call()
            took = time.perf_counter() - start
            if len(inside) != 1:
                return None
            shares.append(1 - inside[0] / took)
    return statistics.median(shares)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """So many threads for torch, for what it compiles, and for our kernels."""
    inductor: Any = importlib.import_module("torch._inductor.config")  # its code has the number in it, and its cache
    usual = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with inductor.patch({"cpp.threads": count}):
            yield
    finally:
        torch.set_num_threads(usual)


def describe_error(error: BaseException) -> str:
    """One line of at most 300 characters."""
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"[:300]


# --------------------------------------------------------------------------------------- memory


def live_bytes(snn: SNN, images: Tensor, T: int) -> dict[str, int]:
    """The largest number of bytes of activations that live at once: ours, and float32 tensors [T, N, ...] instead.

    A value lives while it is written and while a later layer still has to read it. Float simulators also keep membranes
    and currents, which are not counted.
    """
    last = {source: name for name, layer in snn.layers.items() for source in layer.inputs}
    ours: dict[str, int] = {}
    floats: dict[str, int] = {}
    peaks = {"qcfs_fast": 0, "float32": 0}

    def watch(name: str, layer: Layer, value: Any) -> None:
        tensors = value if isinstance(value, tuple) else (value,)
        ours[name] = sum(t.numel() * t.element_size() for t in tensors)
        per_step = tensors[0].numel() // (tensors[0].shape[0] if tensors[0].dtype == torch.uint8 else 1)
        floats[name] = 4 * per_step * (T if tensors[0].dtype == torch.uint8 else 1)
        peaks["qcfs_fast"] = max(peaks["qcfs_fast"], sum(ours.values()))
        peaks["float32"] = max(peaks["float32"], sum(floats.values()))
        for source in layer.inputs:
            if last[source] == name and source != name:
                ours.pop(source, None)
                floats.pop(source, None)

    snn.run(images, T, watch=watch)
    return peaks


def allocated_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The largest number of bytes that one call holds through torch's allocator, without weights and inputs.

    The first of two calls is not counted: what it packs is kept with the weights.
    """
    if device.type == "cuda":
        call()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints lines of its own
    for _ in range(2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# -------------------------------------------------------------------------------------- machine


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and the software; results are comparable only where these are equal."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "kernels": backend.describe_gpu() if cuda else backend.describe(),
        "torch sees": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "versions": {
            "qcfs_fast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{p: version_of(p) or "not installed" for p in ("torchvision", "spikingjelly", "snntorch", "triton")},
        },
    }


def matrix_peak() -> float | str:
    """Multiply-accumulates per second of the processor's best int8 instruction in a loop of nothing else."""
    if backend.native.module is None:
        return NOT_MEASURED
    return float(backend.native.module.measure_peak(backend.settings().isa, torch.get_num_threads()))
