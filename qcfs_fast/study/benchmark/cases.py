"""The benchmark: contenders measured in turns, in one run, and written to one JSON file.

A case is a network (or a layer), a batch and a number of time steps T. Its contenders (contenders.py) take turns
within every round, so that a change of the machine's speed hits all alike; reported are the median and the
quartiles. Slow contenders get fewer rounds, and none whose single call is expected to take more than LONGEST seconds:
these, and those that fail, stand in the result with the reason. Before anything is timed the answers are compared:
ours spike by spike with the float64 simulation, every simulator spike by spike with ours, each ANN with the prepared
network.

Networks have random weights, and thresholds calibrated and then scaled so that the mean firing rate is TARGET (trained
QCFS networks fire at 5 to 15 % a step): silent or saturated networks measure something else. The rate is part of the
result.

The result file grows: a run replaces the cases it measured and keeps the others, so that a long benchmark can be cut
into parts. All in a file must come from one machine and one version of the software; anything else is refused.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import backend
from ...backend.information import processor, version_of
from ...conversion.builder import convert
from ...conversion.preparation import prepare
from ...model.calibration import calibrate
from ...model.simulation import simulate
from ...network.layers import Layer as Node
from ...network.layers import SpikingLayer
from ...network.recording import trace
from ...network.snn import SNN
from ...operators import masks, reference
from ...operators.signature import Conv2dIf
from ...version import __version__
from ..zoo import torchvision_network
from .contenders import DTYPES, Contenders, activations, apart, channels_last, describe_error, quantised

NOT_MEASURED = "not measured"
FORMAT = "qcfs_fast benchmark"
FORMAT_VERSION = 1
LONGEST = 20.0  # seconds of one call
TARGET, LOWEST, HIGHEST = 0.169, 0.08, 0.18  # mean firing rate; at T = 1 random networks fire at half of it
CLASSES = 100
NETWORKS = {"resnet18 224": ("resnet18", 224), "vgg16_bn 32": ("vgg16_bn", 32), "vgg16_bn 224": ("vgg16_bn", 224)}
BATCHES = (1, 8, 32)
STEPS = (1, 2, 4, 8, 16)
QUICK = {("resnet18 224", 1): STEPS, ("resnet18 224", 8): (4,), ("vgg16_bn 32", 1): STEPS, ("vgg16_bn 32", 32): (4,)}


@dataclass(frozen=True)
class Effort:
    """How long to measure: at most `rounds` calls, and about `seconds`, per contender; never fewer than three calls."""

    rounds: int = 15
    seconds: float = 1.0


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(
    calls: Mapping[str, Callable[[], Any]], effort: Effort, device: torch.device, expected: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Seconds of each call, in turns: median, quartiles, least, rounds; or the error.

    `expected` holds seconds of one call where they are known beforehand.
    """
    rows: dict[str, dict[str, Any]] = {}
    rounds: dict[str, int] = {}
    for name, call in calls.items():
        if expected.get(name, 0) > LONGEST:
            rows[name] = {
                "error": f"one call would take about {expected[name]:.0f} s, above the limit of {LONGEST:.0f} s"
            }
            continue
        try:
            timed(call, device)  # compiles, allocates
            once = timed(call, device)
        except Exception as error:
            rows[name] = {"error": describe_error(error)}
            continue
        rounds[name] = max(3, min(effort.rounds, int(effort.seconds / max(once, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in rounds}
    most = max(rounds.values(), default=0)
    for i in range(most):
        for name, n in rounds.items():
            if (i + 1) * n // most > i * n // most:  # n of `most` rounds, spread evenly
                times[name].append(timed(calls[name], device))
    for name, seconds in times.items():
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
        rows[name] = {
            "seconds": middle,
            "quartiles": [low, high],
            "least": min(seconds),
            "rounds": len(seconds),
        }
    return rows


# --------------------------------------------------------------------------------------- what is known


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what; results are comparable only where this is equal."""
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
    """Multiply-accumulates per second of the processor's best int8 instruction, by a loop of nothing else."""
    if backend.native.module is None:
        return NOT_MEASURED
    return float(backend.native.module.measure_peak(backend.settings().isa, torch.get_num_threads()))


def live_bytes(snn: SNN, images: Tensor, T: int) -> dict[str, int]:
    """The most bytes of activations that live at once: of ours, and of float32 tensors [T, N, ...] in their place.

    What lives is what a later layer still reads, and the output being written. Float simulators keep membranes and
    currents besides, which are not counted.
    """
    last = {source: name for name, layer in snn.layers.items() for source in layer.inputs}
    ours: dict[str, int] = {}
    floats: dict[str, int] = {}
    most = [0, 0]

    def watch(name: str, layer: Node, value: Any) -> None:
        tensors = value if isinstance(value, tuple) else (value,)
        ours[name] = sum(t.numel() * t.element_size() for t in tensors)
        per_step = tensors[0].numel() // (tensors[0].shape[0] if tensors[0].dtype == torch.uint8 else 1)
        floats[name] = 4 * per_step * (T if tensors[0].dtype == torch.uint8 else 1)
        most[0], most[1] = max(most[0], sum(ours.values())), max(most[1], sum(floats.values()))
        for source in layer.inputs:
            if last[source] == name and source != name:
                ours.pop(source, None)
                floats.pop(source, None)

    snn.run(images, T, watch=watch)
    return {"qcfs_fast": most[0], "float32": most[1]}


def allocated_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most that one call allocates through torch at once, weights and inputs not counted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes lines of its own otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def products(snn: SNN, images: Tensor, T: int) -> dict[str, int]:
    """Dense multiply-accumulates of the spiking layers for all T steps, one per weight and output (per digit: times two
    in 16 bits)."""
    total = 0

    def watch(name: str, layer: Node, value: Any) -> None:
        nonlocal total
        if isinstance(layer, SpikingLayer):
            pixels = value[0].numel() // value.shape[-1]
            weights = [getattr(layer, f"weight_{i}") for i in layer.config["weight_index"]]
            total += T * pixels * sum(w.numel() for w in weights)

    snn.run(images, T, watch=watch)
    return {"macs": total}


# ------------------------------------------------------------------------------------------ networks


def mean_rate(spikes: Mapping[str, Tensor]) -> float:
    return sum(int(s.sum()) for s in spikes.values()) / sum(s.numel() for s in spikes.values())


def firing_network(name: str, size: int) -> nn.Module:
    """A torchvision network with random weights whose layers fire at TARGET on uniform noise, over four steps."""
    torch.manual_seed(0)
    model = prepare(torchvision_network(name, CLASSES), levels=4)
    images = torch.rand(4, 3, size, size)
    calibrate(model, [images], progress=False)
    thresholds = [m.thresh for m in activations(model).values()]
    start = [t.detach().clone() for t in thresholds]
    low, high = 0.5, 4.0
    for _ in range(12):
        factor = (low * high) ** 0.5
        with torch.no_grad():
            for t, s in zip(thresholds, start, strict=True):
                t.copy_(s * factor)
        found = simulate(model, images[:1], 4, torch.float32, spikes=True)
        assert not isinstance(found, Tensor)
        if abs(mean_rate(found.spikes) - TARGET) < 0.003:
            break
        low, high = (factor, high) if mean_rate(found.spikes) > TARGET else (low, factor)
    return model


class Network:
    """One network under test, converted; contenders are made per batch."""

    def __init__(self, label: str, device: torch.device, compiled: bool = True) -> None:
        self.label = label
        name, self.size = NETWORKS[label]
        self.device, self.compiled = device, compiled
        self.model = firing_network(name, self.size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # VGG's first linear layer, repeated 49-fold at 32 pixels, has 13 bits
            self.snns = {bits: convert(self.model, T=4, weight_bits=bits, max_T=max(STEPS)) for bits in (16, 8)}

    def ours(self, batch: int, T: int) -> Callable[[], Tensor]:
        """The call of the 16-bit network alone."""
        snn, images = copy.deepcopy(self.snns[16]).to(self.device), torch.rand(batch, 3, self.size, self.size)
        images = images.to(self.device)
        return lambda: snn(images, T)

    def check_ours(self) -> float:
        """Share of spikes apart from the float64 simulation, layer by layer; raises if they are many."""
        image = torch.rand(1, 3, self.size, self.size)
        spikes = trace(self.snns[16], image, 4)
        forced = simulate(self.model, image, 4, spikes=True, force=spikes)
        assert not isinstance(forced, Tensor)
        wrong = sum(int((spikes[k] != forced.spikes[k]).sum()) for k in spikes)
        return few(f"{self.label}: ours and float64", wrong, sum(s.numel() for s in spikes.values()), 1e-4)

    def cases(self, batch: int, steps: tuple[int, ...], effort: Effort, only: str = "") -> Iterator[dict[str, Any]]:
        """One result per T. `only` keeps the contenders whose name contains it."""
        torch.manual_seed(batch)
        if self.compiled:
            torch._dynamo.reset()  # or the next batch is compiled for sizes in general
        images = torch.rand(batch, 3, self.size, self.size)
        peers = Contenders(self.model, self.snns, images.to(self.device), self.compiled)
        peers.calls = {n: c for n, c in peers.calls.items() if only in n}
        checks = self.check(peers, images)
        anns: dict[str, float] = {}
        loops: dict[str, float] = {}
        for T in steps:
            spikes = trace(self.snns[16], images[:2], T)
            rate = mean_rate(spikes)
            if not LOWEST <= rate <= HIGHEST:
                raise AssertionError(f"{self.label}, T={T}: firing rate {rate:.1%} is not in 8 to 18 %")
            calls = {n: partial(c, T) for n, c in peers.calls.items()}
            expected = anns | {n: per_step * T for n, per_step in loops.items()}
            rows = interleaved(calls, effort, self.device, expected)
            for name, row in rows.items():
                if "error" in row:
                    continue
                if name.startswith("ANN"):
                    anns[name] = row["seconds"]
                else:
                    loops[name] = row["seconds"] / T
                if row["seconds"] < 2:
                    row["allocated"] = allocated_bytes(calls[name], self.device)
            yield {
                "kind": "network",
                "name": self.label,
                "batch": batch,
                "T": T,
                "firing rate": rate,
                "check": checks,
                "live bytes": live_bytes(self.snns[16], images, T),
                **products(self.snns[16], images, T),
                "contenders": {**rows, **{n: {"error": e} for n, e in peers.errors.items() if only in n}},
            }
            gc.collect()

    def check(self, peers: Contenders, images: Tensor, T: int = 4) -> dict[str, float]:
        """Each contender against what it should compute; raises where it computes something else.

        Spikes (of simulators) and levels (of QCFS networks) are compared layer by layer, compiled networks by their
        logits with the eager ones: in networks with random weights one flip spreads, so logits are close only
        loosely.
        """
        found = {"qcfs_fast 16-bit, spikes apart from float64": self.check_ours()}
        spikes = trace(self.snns[16], images, T)
        levels = quantised(self.model, images)
        logits: dict[str, Tensor] = {}
        for name, call in list(peers.calls.items()):
            try:
                out = logits[name] = call(T).float().cpu()
            except Exception as error:
                peers.errors[name] = describe_error(error)
                del peers.calls[name]
                continue
            eager = name.removesuffix(" compiled")
            if name.startswith("qcfs_fast") and self.device.type == "cuda":
                if not torch.equal(out, self.snns[16 if "16-bit" in name else 8](images, T)):
                    raise AssertionError(f"{name}: differs from the CPU kernels")
                continue
            if name in peers.networks and "ReLU" not in name:
                wanted = levels if name.startswith("ANN") else spikes
                wrong, total = apart(call, peers.networks[name], wanted, T)
                limit = 0.05 if "bf16" in name else 1e-4
                found[f"{name}, apart"] = few(f"{self.label}: {name}, apart", wrong, total, limit)
            elif eager != name and eager in logits:
                found[f"{name}, logits"] = distance(out, logits[eager])
                if not found[f"{name}, logits"] <= 0.5:
                    raise AssertionError(f"{self.label}: {name}: logits unlike the eager ones ({found})")
        return found


def few(what: str, wrong: int, total: int, limit: float) -> float:
    """The share that differs; raises if it is beyond the limit (three are allowed in any case)."""
    if wrong > 3 + limit * total:
        raise AssertionError(f"{what}: {wrong} of {total} differ")
    return wrong / total


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# -------------------------------------------------------------------------------------------- layers

LAYERS: dict[str, tuple[int, int, int, int]] = {  # kernel, size, channels in and out
    "3x3 56x56 64->64": (3, 56, 64, 64),
    "3x3 28x28 128->128": (3, 28, 128, 128),
    "3x3 14x14 256->256": (3, 14, 256, 256),
    "3x3 7x7 512->512": (3, 7, 512, 512),
    "linear 25088->4096": (1, 1, 25088, 4096),
}


class Layer:
    """One spiking layer alone at batch 1, on random spikes of a trained network's rate; CPU."""

    def __init__(self, label: str, T: int = 4, rate: float = 0.12) -> None:
        self.label, self.T = label, T
        self.kernel, self.size, self.inputs, self.outputs = LAYERS[label]
        k, g = self.kernel, torch.Generator().manual_seed(0)
        self.spikes = torch.rand((T, 1, self.size, self.size, self.inputs), generator=g) < rate
        self.x = masks.pack(self.spikes)
        self.geometry = [k, k, 1, 1, k // 2, k // 2, 1, 1, 1]
        wide = torch.randint(-32639, 32640, (k, k, self.inputs, self.outputs), dtype=torch.int16, generator=g)
        self.weights = {16: wide, 8: (wide // 256).clamp(-127, 127).to(torch.int8)}
        self.unit = 2 * int(32639 * (k * k * self.inputs * rate) ** 0.5 / 2)
        self.bias = torch.zeros(self.outputs, dtype=torch.int32)
        self.threshold = torch.full_like(self.bias, self.unit)
        self.linear = self.kernel == self.size == 1
        # Kept: packed weights belong to a tensor, and a view made for each call would be packed for each call.
        self.matrices = {bits: w.flatten(0, 2) for bits, w in self.weights.items()}

    def ours(self, bits: int) -> Tensor:
        tail: Any = ([], [], None, self.bias, self.threshold, self.T)
        if self.linear:
            return torch.ops.qcfs_fast.linear_if([self.x.flatten(2)], [self.matrices[bits]], *tail)
        return torch.ops.qcfs_fast.conv2d_if([self.x], [self.weights[bits]], self.geometry, *tail)

    def fired(self) -> Tensor:
        """Spikes [T, 1, O, ...] by the plain-torch reference, with which ours must agree."""
        tail: Any = ([], [], None, self.bias, self.threshold, self.T)
        want = reference.conv2d_if(Conv2dIf.checked([self.x], [self.weights[16]], self.geometry, *tail))
        if not torch.equal(self.ours(16).reshape(want.shape), want):
            raise AssertionError(f"{self.label}: differs from the reference")
        spikes = masks.unpack(want, self.T).bool().permute(0, 1, 4, 2, 3)
        if not 0.01 < float(spikes.float().mean()) < 0.95:
            raise AssertionError(f"{self.label}: the layer fires at {float(spikes.float().mean()):.1%}")
        return spikes.flatten(2) if self.linear else spikes

    def floats(self, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
        """The float layer in units of the threshold, and the spikes [T, ...] it gets."""
        weight = self.weights[16].float() / self.unit
        if self.linear:
            layer: nn.Module = nn.Linear(self.inputs, self.outputs, bias=False)
            layer.weight.data = weight.reshape(self.inputs, self.outputs).t().contiguous()
            return layer.to(dtype), self.spikes.flatten(0, 1).flatten(1).to(dtype)
        layer = nn.Conv2d(self.inputs, self.outputs, self.kernel, padding=self.kernel // 2, bias=False)
        layer.weight.data = weight.permute(3, 2, 0, 1)
        layer = channels_last(layer.to(dtype))
        return layer, self.spikes.flatten(0, 1).to(dtype).permute(0, 3, 1, 2)

    def case(self, effort: Effort) -> dict[str, Any]:
        T, fired, check = self.T, self.fired(), {}
        calls: dict[str, Callable[[], Any]] = {f"qcfs_fast {b}-bit": partial(self.ours, b) for b in self.weights}
        for name, dtype in DTYPES.items():
            layer, steps = self.floats(dtype)
            image = steps[:1].contiguous(memory_format=torch.contiguous_format if self.linear else torch.channels_last)

            def loop(layer: nn.Module = layer, steps: Tensor = steps) -> Tensor:
                currents = layer(steps).unflatten(0, (T, 1))
                v, spikes = torch.full_like(currents[0], 0.5), []
                for current in currents:
                    v = v + current
                    spikes.append((v >= 1).to(v.dtype))
                    v = v - spikes[-1]
                return torch.stack(spikes)

            check[f"T-loop {name}, apart"] = float((loop().bool() != fired).float().mean())
            calls[f"ANN {name}"] = partial(layer, image)
            calls[f"T-loop {name}"] = loop
        if check["T-loop fp32, apart"] > 1e-3:
            raise AssertionError(
                f"{self.label}: {check['T-loop fp32, apart']:.1e} of the loop's spikes differ from ours"
            )
        return {
            "kind": "layer",
            "name": self.label,
            "batch": 1,
            "T": T,
            "firing rate": float(self.spikes.float().mean()),
            "check": check,
            "macs": T * self.size**2 * self.weights[16].numel(),
            "contenders": interleaved(calls, effort, torch.device("cpu"), {}),
        }


# -------------------------------------------------------------------------------------------- results


class Results:
    """The result file: opened (or begun) for one machine, a case added at a time, written atomically each time."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        here = machine(device)
        if path.exists():
            self.data = read(path)
            there = self.data["machine"]
            differing = [k for k in here if here[k] != there.get(k)]
            if differing:
                raise ValueError(
                    f"{path} holds results of other conditions ({', '.join(differing)} differ); give another file, or "
                    "remove this one"
                )
        else:
            self.data = {"format": FORMAT, "version": FORMAT_VERSION, "machine": here, "peak": {}, "cases": []}
        if not isinstance(self.data["peak"].get("int8 macs per second"), float):
            self.data["peak"]["int8 macs per second"] = matrix_peak()

    def add(self, case: Mapping[str, Any]) -> None:
        keep = [c for c in self.data["cases"] if case_key(c) != case_key(case)]
        self.data["cases"] = sorted([*keep, dict(case)], key=case_key)
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name, suffix=".part")
        with os.fdopen(handle, "w") as f:
            json.dump(self.data, f, indent=1)
            f.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, self.path)


def case_key(case: Mapping[str, Any]) -> tuple[Any, ...]:
    return (case["kind"], case["name"], case["batch"], case["T"])


def read(path: Path) -> dict[str, Any]:
    """A result file, checked for its form."""
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path}: not a result file of qcfs-fast bench")
    if data.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: written in version {data.get('version')} of the result format, need {FORMAT_VERSION}"
        )
    return data


def summary(case: Mapping[str, Any]) -> str:
    """One line: times, and how many times as long each contender takes as ours in 16 bits."""
    rows = case["contenders"]
    ours = next((r["seconds"] for n, r in rows.items() if n.startswith("qcfs_fast 16-bit") and "error" not in r), None)
    cells = []
    for name, row in rows.items():
        if "error" in row:
            cells.append(f"{name} {NOT_MEASURED} ({row['error']})")
        else:
            ratio = f" (x{row['seconds'] / ours:.2f})" if ours and not name.startswith("qcfs_fast 16-bit") else ""
            cells.append(f"{name} {1e3 * row['seconds']:.3f} ms{ratio}")
    return f"{case['name']}, batch {case['batch']}, T={case['T']}, firing rate {case['firing rate']:.1%}: " + ", ".join(
        cells
    )
