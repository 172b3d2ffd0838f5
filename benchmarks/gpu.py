"""Latency on a GPU: the converted network against its ANN and against the usual loop over time steps.

    python benchmarks/gpu.py                         everything; prints tables and writes gpu.json
    python benchmarks/gpu.py --nets resnet18 --batches 1 256 --steps 4 --rounds 20

Each contender runs under its best conditions:

    ANN        the ReLU network in fp16 and bf16, channels_last; eager, compiled and as a CUDA graph
    T-loop     the spiking network simulated step by step (qcfs_fast.model.simulation) in fp16 and fp32; eager, compiled
    qcfs_fast  this package in 16 and 8 bits; eager and as a CUDA graph; its Triton kernels eager

Contenders take turns within every round, and the median over rounds is reported, so that clocks and other users affect
all alike. Every spiking network is calibrated on the images it is timed on, and its firing rate is printed: a sparse,
silent or saturated network measures something else. Before anything is timed, GPU results are compared with those of
the CPU kernels (==).

Then each spiking layer is timed alone. Its rate is given as a share of what one large int8 product (torch._int_mm)
reaches in the same run, and the bytes it must move as a share of the bandwidth of a large copy. What fails is listed
with its error and counts as not measured.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qcfs_fast
from qcfs_fast import backend
from qcfs_fast.files import write_text_atomically
from qcfs_fast.model.simulation import step_network
from qcfs_fast.network.layers import Run, SpikingLayer
from qcfs_fast.study.benchmark.measure import NOT_MEASURED, Clock, Effort, describe_error, take_turns
from qcfs_fast.study.spikes import mean_rate
from qcfs_fast.study.zoo import torchvision_models


class Block(nn.Module):
    """Residual block of the CIFAR ResNets; a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.b(self.a(x)) + self.short(x))


def cifar_resnet20() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    channels = 16
    for outputs in (16, 32, 64):
        for i in range(3):
            layers.append(Block(channels, outputs, 2 if i == 0 and outputs > 16 else 1))
            channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def cifar_vgg16() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.AvgPool2d(2))
    head = [nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers, *head)


def torchvision_net(name: str) -> nn.Module:
    return getattr(torchvision_models(), name)(weights=None)


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: torchvision_net("resnet18"), 224),
    "resnet34": (lambda: torchvision_net("resnet34"), 224),
    "resnet50": (lambda: torchvision_net("resnet50"), 224),
    "vgg16": (lambda: torchvision_net("vgg16"), 224),
    "cifar-resnet20": (cifar_resnet20, 32),
    "cifar-vgg16": (cifar_vgg16, 32),
}


class Table:
    """The contenders of one table, and the errors of those that could not be made."""

    def __init__(self, clock: Clock, rounds: int) -> None:
        self.clock = clock
        self.effort = Effort(rounds, seconds=math.inf, min_rounds=1, reading=0.02)
        self.contenders: dict[str, Callable[[], Any]] = {}
        self.errors: dict[str, str] = {}

    def attempt(self, name: str, make: Callable[[], Callable[[], Any]]) -> None:
        """Make a contender and call it once, so that what cannot run is found here and not tried again for every T."""
        try:
            run = make()
            self.clock(run)
            self.contenders[name] = run
        except Exception as error:  # whatever the compiler or the device raises is a result
            self.errors[name] = describe_error(error)

    def measure(self) -> dict[str, Any]:
        """Median, least and largest seconds of each contender; the error of each that failed."""
        times, failed = take_turns(self.contenders, self.effort, self.clock)
        rows: dict[str, Any] = {
            n: {"seconds": statistics.median(t), "least": min(t), "most": max(t), "rounds": len(t)}
            for n, t in times.items()
        }
        errors = self.errors | {n: describe_error(error) for n, error in failed.items()}
        return rows | {n: {"seconds": NOT_MEASURED, "error": e} for n, e in errors.items()}


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(keep: Any = run) -> None:  # `keep`: the graph reads the weights and inputs that `run` holds
        graph.replay()

    return replay


def ann_contenders(table: Table, net: nn.Module, images: Tensor) -> None:
    for dtype, name in ((torch.float16, "fp16"), (torch.bfloat16, "bf16")):

        def inputs(dtype: torch.dtype = dtype) -> tuple[nn.Module, Tensor]:
            model = copy.deepcopy(net).to(images.device, dtype, memory_format=torch.channels_last).eval()
            return model, images.to(dtype, memory_format=torch.channels_last)

        def eager(inputs: Any = inputs) -> Callable[[], Any]:
            model, x = inputs()
            return lambda: model(x)

        def compiled(inputs: Any = inputs) -> Callable[[], Any]:
            model, x = inputs()
            model = torch.compile(model)
            return lambda: model(x)

        table.attempt(f"ANN {name} eager", eager)
        table.attempt(f"ANN {name} compiled", compiled)
        if table.clock.events:
            table.attempt(f"ANN {name} CUDA graph", lambda eager=eager: graphed(eager()))
            table.attempt(f"ANN {name} compiled, CUDA graph", lambda compiled=compiled: graphed(compiled()))


def loop_steps(model: nn.Module, images: Tensor) -> dict[str, Callable[[], Callable[[int], Any]]]:
    """Makers of the usual loop over time steps, as functions of T; what is compiled is one step, whatever T."""

    def make(dtype: torch.dtype, compile_it: bool) -> Callable[[int], Any]:
        network, neurons = step_network(model, dtype)
        network = network.to(images.device, memory_format=torch.channels_last)
        x = images.to(dtype, memory_format=torch.channels_last)
        step: Any = torch.compile(network) if compile_it else network

        def run(T: int) -> Tensor:
            for neuron in neurons.values():
                neuron.reset()
            total = step(x)
            for _ in range(T - 1):
                total = total + step(x)
            return total / T

        return run

    return {
        f"T-loop {name} {how}": functools.cache(functools.partial(make, dtype, how == "compiled"))
        for dtype, name in ((torch.float16, "fp16"), (torch.float32, "fp32"))
        for how in ("eager", "compiled")
    }


def loop_contenders(table: Table, steps: dict[str, Callable[[], Callable[[int], Any]]], T: int) -> None:
    for name, make in steps.items():

        def contender(make: Any = make) -> Callable[[], Any]:
            run = make()
            return lambda: run(T)

        table.attempt(name, contender)


def on_triton(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same call through the Triton kernels; raises, with the reason, where they cannot run."""

    def call() -> Any:
        with backend.force(gpu="triton"):
            return run()

    return call


def snn_contenders(table: Table, snns: dict[int, Any], images: Tensor, T: int) -> None:
    for bits, snn in snns.items():
        table.attempt(f"qcfs_fast {bits}-bit eager", lambda snn=snn: lambda: snn(images, T))
        if table.clock.events:

            def graph(snn: Any = snn) -> Callable[[], Any]:
                captured = qcfs_fast.cuda_graph(snn, images, T)
                return lambda: captured.graph.replay()

            table.attempt(f"qcfs_fast {bits}-bit CUDA graph", graph)
            table.attempt(f"Triton {bits}-bit eager", lambda snn=snn: on_triton(lambda: snn(images, T)))


def rates(device: torch.device, clock: Clock) -> dict[str, Any]:
    """What a large int8 product and a large copy reach here."""
    found: dict[str, Any] = {"int8_macs_per_second": NOT_MEASURED, "bytes_per_second": NOT_MEASURED}
    try:
        n = 8192 if clock.events else 256
        a = torch.randint(-128, 128, (n, n), dtype=torch.int8, device=device)
        b = torch.randint(-128, 128, (n, n), dtype=torch.int8, device=device).t()
        torch._int_mm(a, b)
        found["int8_macs_per_second"] = n**3 / statistics.median(
            clock(lambda: torch._int_mm(a, b), 5) for _ in range(9)
        )
    except Exception as error:
        found["int8_error"] = describe_error(error)
    source = torch.empty(1 << (30 if clock.events else 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = statistics.median(clock(lambda: target.copy_(source), 5) for _ in range(9))
    found["bytes_per_second"] = 2 * source.numel() / seconds
    return found


def layer_rows(
    snn: Any, images: Tensor, T: int, clock: Clock, rounds: int, peak: dict[str, Any]
) -> list[dict[str, Any]]:
    """Each spiking layer alone, on the spikes it gets in this network."""
    values: dict[str, Any] = {}
    snn.run(images, T, watch=lambda name, layer, value: values.update({name: value}))
    values.setdefault("input", images)
    rows = []
    for name, layer in snn.spiking_layers.items():
        if not isinstance(layer, SpikingLayer):
            continue
        out = values[name]
        weights = [source.weight for source in layer.sources()]
        pixels = out[0].numel() // out.shape[-1]
        digits = sum(w.element_size() * w.numel() for w in weights)  # one int8 product per byte of weight
        macs = pixels * T * digits
        moved = sum(values[i].numel() for i in layer.inputs if isinstance(values[i], Tensor)) + out.numel() + digits

        def run(layer: SpikingLayer = layer) -> Any:
            return layer(values, Run(T))

        timed = graphed(run) if clock.events else run  # a replay: the kernels, without Python's launch overhead
        seconds = statistics.median(clock(timed, 20 if clock.events else 1) for _ in range(rounds))
        row: dict[str, Any] = {"layer": name, "seconds": seconds, "int8_macs": macs, "bytes": moved}
        for key, amount, rate in (
            ("int8_share", macs, "int8_macs_per_second"),
            ("byte_share", moved, "bytes_per_second"),
        ):
            measured = peak[rate]
            row[key] = NOT_MEASURED if isinstance(measured, str) else amount / seconds / measured
        rows.append(row)
    return rows


def check_equal(snn: Any, images: Tensor, T: int) -> bool:
    """GPU against the CPU kernels on two images."""
    some = images[:2].cpu()
    return torch.equal(snn(some.to(images.device), T).cpu(), copy.deepcopy(snn).cpu()(some, T))


def print_rows(title: str, rows: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, row in sorted(rows.items(), key=lambda r: r[1]["seconds"] if "error" not in r[1] else float("inf")):
        text = f"{NOT_MEASURED}: {row['error']}" if "error" in row else f"{1e3 * row['seconds']:9.3f} ms"
        print(f"  {name:36} {text}", flush=True)


def print_layers(bits: int, rows: list[dict[str, Any]]) -> None:
    def share(x: Any) -> str:
        return f"{x:>12}" if isinstance(x, str) else f"{100 * x:10.1f} %"

    print(f"  {f'layer alone, {bits}-bit':36} {'ms':>9} {'int8 rate':>12} {'bandwidth':>12}")
    for r in rows:
        print(f"  {r['layer']:36} {1e3 * r['seconds']:9.4f} {share(r['int8_share'])} {share(r['byte_share'])}")


def aims(entry: dict[str, Any]) -> dict[str, Any]:
    """The project's aims at T = 4 as ratios of what was measured, "not measured" where a part is missing."""
    found = entry.get("T=4")
    if found is None:
        return {}
    seconds = {n: r["seconds"] for n, r in found["contenders"].items() if "error" not in r}

    def ratio(over: str, under: str) -> Any:
        """Best time whose name starts with `over`, divided by the best that starts with `under`."""
        a, b = ([s for n, s in seconds.items() if n.startswith(start)] for start in (over, under))
        return min(a) / min(b) if a and b else NOT_MEASURED

    def shares(bits: int) -> list[float]:
        rows = found[f"layers ({bits}-bit)"]
        return [r["int8_share"] for r in rows if not isinstance(r["int8_share"], str)]

    if entry["batch"] == 1:
        return {"16-bit CUDA graph / ANN fp16 CUDA graph (aim <= 1.0)": ratio("qcfs_fast 16-bit CUDA", "ANN fp16 CUDA")}
    return {
        "best T-loop / 16-bit (aim >= 4)": ratio("T-loop", "qcfs_fast 16-bit"),
        "Triton 16-bit / 16-bit eager (aim <= 1.6)": ratio("Triton 16-bit", "qcfs_fast 16-bit eager"),
        "16-bit / 8-bit (aim >= 1.6 where compute-bound)": ratio("qcfs_fast 16-bit", "qcfs_fast 8-bit"),
        "largest share of the int8 rate, one layer (aim >= 0.5)": max(shares(16), default=NOT_MEASURED),
    }


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure every network and batch; the file is written after each, in case the next one is interrupted."""
    clock = Clock(device, events=True)
    peak = rates(device, clock)
    gpu = torch.cuda.get_device_name(device) if clock.events else platform.processor()
    kernels = backend.describe_gpu() if clock.events else backend.describe()
    result: dict[str, Any] = {
        "device": gpu,
        "torch": torch.__version__,
        "kernels": kernels,
        "measured rates": peak,
        "rounds": args.rounds,
        "results": [],
    }
    if not clock.events:
        result["note"] = "a run on a CPU tries the script out; no figure in it is a measurement of the CUDA kernels"
        print(result["note"])
    print(f"{gpu}, torch {torch.__version__}, kernels: {kernels}\nmeasured rates: {peak}")
    for name in args.nets:
        for batch in args.batches:
            entry: dict[str, Any] = {"net": name, "batch": batch, "size": NETS[name][1]}
            result["results"].append(entry)
            try:
                measure_network(entry, args, device, clock, peak)
            except Exception as error:
                entry["error"] = describe_error(error)
                print(f"\n{name}, batch {batch}: {NOT_MEASURED}: {entry['error']}")
            write_text_atomically(args.output, json.dumps(result, indent=1))
    return result


def measure_network(
    entry: dict[str, Any], args: argparse.Namespace, device: torch.device, clock: Clock, peak: dict[str, Any]
) -> None:
    """Add to `entry` what one network at one batch size gives, for every T."""
    name, batch, size = entry["net"], entry["batch"], entry["size"]
    max_T = max(args.steps)
    torch.manual_seed(0)
    net = NETS[name][0]().eval()
    images = torch.randn(batch, 3, size, size)
    model = qcfs_fast.prepare(net, levels=4).to(device)
    qcfs_fast.calibrate(model, [images[:8].to(device)], progress=False)
    model = model.cpu()
    shape = (3, size, size)
    snns = {b: qcfs_fast.convert(model, max_T, b, input_shape=shape).to(device) for b in (16, 8)}
    images = images.to(device)
    entry["equal to CPU"] = {b: check_equal(s, images, max_T) for b, s in snns.items()}
    if clock.events and not backend.absence["triton"]():
        for b, s in snns.items():
            same = on_triton(lambda s=s, images=images: check_equal(s, images, max_T))()
            entry["equal to CPU"][f"{b}, Triton"] = same
    anns = Table(clock, args.rounds)
    ann_contenders(anns, net, images)
    loops = loop_steps(model, images)
    for T in args.steps:
        table = Table(clock, args.rounds)
        table.contenders |= anns.contenders
        table.errors |= anns.errors
        loop_contenders(table, loops, T)
        snn_contenders(table, snns, images, T)
        rows = table.measure()
        rate = mean_rate(qcfs_fast.trace(snns[16], images[:8], T))
        layers = {b: layer_rows(snn, images, T, clock, args.rounds, peak) for b, snn in snns.items()}
        entry[f"T={T}"] = {"firing rate": rate, "contenders": rows}
        entry[f"T={T}"] |= {f"layers ({b}-bit)": found for b, found in layers.items()}
        equal = ", equal to the CPU" if all(entry["equal to CPU"].values()) else ", NOT EQUAL TO THE CPU"
        print_rows(f"{name} {size}x{size}, batch {batch}, T={T}, firing {100 * rate:.1f} %{equal}", rows)
        for bits, found in layers.items():
            print_layers(bits, found)
    entry["aims"] = aims(entry)
    for what, value in entry["aims"].items():
        print(f"  {what}: {value if isinstance(value, str) else f'{value:.2f}'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 256])
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4, 8], metavar="T")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--device", default="cuda", help="cpu tries the script out; its figures mean nothing")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        print("torch sees no GPU here: nothing was measured")
        return 2
    with torch.no_grad():
        result = measure(args, torch.device(args.device))
    print(f"\nwritten to {args.output}")
    unequal = [e for e in result["results"] if "error" in e or not all(e["equal to CPU"].values())]
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
