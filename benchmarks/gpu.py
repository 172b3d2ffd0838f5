"""Latency on a GPU: the converted network against its ANN and against the usual loop over time steps.

    python benchmarks/gpu.py                         everything; prints tables and writes gpu.json
    python benchmarks/gpu.py --nets resnet18 --batches 1 256 --steps 4 --rounds 20

Each contender runs under its best conditions:

    ANN        the ReLU network in fp16 and bf16, channels_last; eager, compiled, and both as a CUDA graph
    T-loop     the spiking network simulated step by step (qcfs_fast.model.simulation) in fp16 and fp32, likewise
    qcfs_fast  this package in 16 and 8 bits, and in 8 bits with neurons of sum mode; eager and as a CUDA graph
    wgmma      with --wgmma the same by a second CUDA module, built with QCFS_FAST_WGMMA
    Triton     the same by the Triton kernels; eager

BatchNorm is folded into the convolutions of all, and cuDNN times its algorithms to choose one. Contenders take turns
within every round, and the median over rounds is reported, so that clocks and other users affect all alike. Every
spiking network is calibrated on the images it is timed on, and its firing rate is printed: a sparse, silent or
saturated network measures something else.

What is timed is what was compared. Before it is timed, each contender of ours answers the whole batch, by the call that
is timed (a graph by its replay), and the answer must equal, with ==, that of the CPU kernels on eight of the images and
that of the first contender on all.

Then each spiking layer is timed alone. Its rate is given as a share of what one large int8 product (torch._int_mm)
reaches in the same run, and the bytes it must move as a share of the bandwidth of a large copy. What fails is listed
with its error and counts as not measured.

Parts (a network, a batch, T) of the aims come first; with --budget none begins after so many seconds. The file is
written after each part, and a run that finds a file of the same device and the same kernels goes on where that ended.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.util
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import qcfs_fast
from qcfs_fast import backend
from qcfs_fast.backend import cuda as cuda_backend
from qcfs_fast.backend.information import processor
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


UNEQUAL = "another answer than the CPU's"


class Table:
    """The contenders of one table, of those that `only` (a regular expression) finds; errors of those that failed."""

    def __init__(self, clock: Clock, rounds: int, only: str = "") -> None:
        self.clock = clock
        self.only = only
        self.effort = Effort(rounds, seconds=math.inf, min_rounds=1, reading=0.02)
        self.contenders: dict[str, Callable[[], Any]] = {}
        self.errors: dict[str, str] = {}

    def attempt(
        self, name: str, make: Callable[[], Callable[[], Any]], equals: Callable[[Any], bool] = lambda out: True
    ) -> None:
        """Make a contender and call it once, so that what cannot run is found here and not tried again for every T."""
        if not re.search(self.only, name):
            return
        try:
            run = make()
            if not equals(run()):
                raise AssertionError(UNEQUAL)
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
    with torch.cuda.graph(graph, stream=side):
        out = run()

    def replay(keep: Any = run) -> Any:  # `keep`: the graph reads the weights and inputs that `run` holds
        graph.replay()
        return out

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
        if table.clock.events:
            table.attempt(f"{name}, CUDA graph", lambda contender=contender: graphed(contender()))


class Expected:
    """The answer to a whole batch: the CPU's on up to eight of its images, and on all that of whoever came first."""

    def __init__(self, snn: Any, images: Tensor, T: int) -> None:
        self.rows = torch.linspace(0, len(images) - 1, min(8, len(images))).long()
        some = images.cpu()[self.rows]
        self.on_cpu = copy.deepcopy(snn).cpu()(some, T)
        self.all: Tensor | None = None

    def equals(self, out: Tensor) -> bool:
        out = out.cpu()
        if self.all is None and torch.equal(out[self.rows], self.on_cpu):
            self.all = out
        return self.all is not None and torch.equal(out, self.all)


def on_triton() -> contextlib.AbstractContextManager[None]:
    """The Triton kernels; an operator raises, with the reason, where they cannot run."""
    return backend.force(gpu="triton")


@contextlib.contextmanager
def on_module(module: Any) -> Iterator[None]:
    """The kernels of another CUDA module; packed weights are the same."""
    before, cuda_backend.module = cuda_backend.module, module
    try:
        with backend.force(gpu="cuda"):
            yield
    finally:
        cuda_backend.module = before


def second_module(folder: Path) -> Any:
    """The CUDA module of a package in this folder, besides the one in use."""
    (path,) = folder.glob("qcfs_fast/_cuda*.so")
    spec = importlib.util.spec_from_file_location("second._cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def snn_contenders(table: Table, snns: dict[str, Any], images: Tensor, T: int, wgmma: Any = None) -> None:
    for form, snn in snns.items():
        expected = Expected(snn, images, T)

        def eager(kernels: Any, snn: Any = snn) -> Callable[[], Any]:
            def run() -> Any:
                with kernels():
                    return snn(images, T)

            return run

        def graph(kernels: Any, snn: Any = snn) -> Callable[[], Any]:
            with kernels():
                captured = qcfs_fast.cuda_graph(snn, images, T)

            def replay() -> Any:
                captured.graph.replay()
                return captured.output

            return replay

        named: dict[str, Any] = {"qcfs_fast": contextlib.nullcontext}
        if wgmma is not None:
            named["wgmma"] = functools.partial(on_module, wgmma)
        for name, kernels in named.items():
            table.attempt(f"{name} {form} eager", functools.partial(eager, kernels), expected.equals)
            if table.clock.events:
                table.attempt(f"{name} {form} CUDA graph", functools.partial(graph, kernels), expected.equals)
        if table.clock.events:
            table.attempt(f"Triton {form} eager", functools.partial(eager, on_triton), expected.equals)


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


def print_rows(title: str, rows: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, row in sorted(rows.items(), key=lambda r: r[1]["seconds"] if "error" not in r[1] else float("inf")):
        text = f"{NOT_MEASURED}: {row['error']}" if "error" in row else f"{1e3 * row['seconds']:9.3f} ms"
        print(f"  {name:36} {text}", flush=True)


def print_layers(form: str, rows: list[dict[str, Any]]) -> None:
    def share(x: Any) -> str:
        return f"{x:>12}" if isinstance(x, str) else f"{100 * x:10.1f} %"

    print(f"  {f'layer alone, {form}':36} {'ms':>9} {'int8 rate':>12} {'bandwidth':>12}")
    for r in rows:
        print(f"  {r['layer']:36} {1e3 * r['seconds']:9.4f} {share(r['int8_share'])} {share(r['byte_share'])}")


# What the project aims at with T = 4 on a Hopper GPU: network, batch, the ratio of the best of the first to the best of
# the second, and its bound.
ANN_GRAPH, ANN, LOOP = r"ANN fp16 .*CUDA graph", r"ANN fp16", r"T-loop"
OURS, OUR_GRAPH, OUR_SUM = r"qcfs_fast 16-bit (eager|CUDA)", r"qcfs_fast 16-bit CUDA graph", r"qcfs_fast 8-bit sum"
AIMS = (
    ("resnet18", 1, "ours / fp16 ANN, both as CUDA graphs", OUR_GRAPH, ANN_GRAPH, "<=", 0.6),
    ("resnet18", 256, "best T-loop / ours", LOOP, OURS, ">=", 7.0),
    ("resnet18", 256, "ours / fp16 ANN", OURS, ANN, "<=", 0.6),
    ("resnet18", 256, "fp16 ANN / ours in sum mode, 8 bits", ANN, OUR_SUM, ">=", 1.5),
    ("cifar-resnet20", 128, "best T-loop / ours", LOOP, OURS, ">=", 10.0),
)


def aims(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each aim: what was found, and whether it is met; "not measured" where a part is missing or failed."""
    tables = {(e["net"], e["batch"]): e["T=4"]["contenders"] for e in result["results"] if "T=4" in e}
    rows = []
    for net, batch, what, over, under, sign, bound in AIMS:
        table = {} if "note" in result else tables.get((net, batch), {})
        seconds = {n: r["seconds"] for n, r in table.items() if "error" not in r}
        a, b = ([s for n, s in seconds.items() if re.match(pattern, n)] for pattern in (over, under))
        row: dict[str, Any] = {"net": net, "batch": batch, "aim": f"{what} {sign} {bound}", "found": NOT_MEASURED}
        row["state"] = NOT_MEASURED
        if a and b:
            row["found"] = min(a) / min(b)
            row["state"] = "met" if (row["found"] <= bound if sign == "<=" else row["found"] >= bound) else "missed"
        rows.append(row)
    answers = [r.get("error", "") for e in result["results"] for r in ours(e)]
    equal = NOT_MEASURED if not answers or "note" in result else "missed" if any(map(unequal, answers)) else "met"
    return [*rows, {"net": "all", "batch": "all", "aim": "equal to the CPU kernels", "found": "", "state": equal}]


def ours(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of our contenders at every T."""
    tables = [found["contenders"] for T, found in entry.items() if T.startswith("T=")]
    return [row for table in tables for name, row in table.items() if not name.startswith(("ANN", "T-loop"))]


def unequal(error: str) -> bool:
    return UNEQUAL in error


def print_aims(rows: list[dict[str, Any]]) -> None:
    print("\naims at T = 4 on a Hopper GPU")
    for row in rows:
        found = row["found"] if isinstance(row["found"], str) else f"{row['found']:.2f}"
        print(f"  {row['net']:16} {row['batch']!s:>4}  {row['aim']:56} {found:>13}  {row['state']}")


def parts(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Networks and batches, those of the aims first."""
    first = [aim[:2] for aim in AIMS]
    return sorted(((n, b) for n in args.nets for b in args.batches), key=lambda part: part not in first)


def begun(args: argparse.Namespace, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of a run that ended before everything was measured, with the same facts."""
    if not args.output.exists():
        return []
    before = json.loads(args.output.read_text())
    alike = all(before.get(name) == value for name, value in facts.items())
    return [{k: v for k, v in e.items() if k != "error"} for e in before["results"]] if alike else []


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure every network and batch; the file is written after each T, in case the next one is interrupted."""
    end = time.monotonic() + args.budget
    torch.backends.cudnn.benchmark = True
    clock = Clock(device, events=True)
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if clock.events else processor(),
        "torch": torch.__version__,
        "qcfs_fast": qcfs_fast.__version__,
        "kernels": backend.describe_gpu() if clock.events else backend.describe(),
        "rounds": args.rounds,
    }
    peak = rates(device, clock)
    result: dict[str, Any] = {**facts, "measured rates": peak, "results": begun(args, facts)}
    if not clock.events:
        result["note"] = "a run on a CPU tries the script out; no figure in it is a measurement of the CUDA kernels"
        print(result["note"])
    print(f"{', '.join(map(str, facts.values()))}\nmeasured rates: {peak}")
    for name, batch in parts(args):
        known = [e for e in result["results"] if (e["net"], e["batch"]) == (name, batch)]
        entry: dict[str, Any] = known[0] if known else {"net": name, "batch": batch, "size": NETS[name][1]}
        wanted = [T for T in args.steps if f"T={T}" not in entry]
        if not wanted or time.monotonic() > end:
            continue
        if not known:
            result["results"].append(entry)
        try:
            for _ in measure_network(entry, args, device, clock, peak, wanted):
                result["aims"] = aims(result)
                write_text_atomically(args.output, json.dumps(result, indent=1))
                if time.monotonic() > end:
                    break
        except Exception as error:
            entry["error"] = describe_error(error)
            print(f"\n{name}, batch {batch}: {NOT_MEASURED}: {entry['error']}")
    result["aims"] = aims(result)
    print_aims(result["aims"])
    write_text_atomically(args.output, json.dumps(result, indent=1))
    return result


def measure_network(
    entry: dict[str, Any],
    args: argparse.Namespace,
    device: torch.device,
    clock: Clock,
    peak: dict[str, Any],
    steps: list[int],
) -> Iterator[int]:
    """Add to `entry` what one network at one batch size gives; yields after each T."""
    name, batch, size = entry["net"], entry["batch"], entry["size"]
    max_T = max(4, *args.steps)
    torch.manual_seed(0)
    net = fuse(NETS[name][0]().eval())
    images = torch.randn(batch, 3, size, size)
    model = qcfs_fast.prepare(net, levels=4).to(device)
    qcfs_fast.calibrate(model, [images[:8].to(device)], progress=False)
    model = model.cpu()
    convert = functools.partial(qcfs_fast.convert, model, max_T, input_shape=(3, size, size), progress=False)
    snns = {"16-bit": convert(weight_bits=16), "8-bit": convert(weight_bits=8)}
    snns["8-bit sum"] = convert(weight_bits=8, neuron="sum")
    snns = {form: snn.to(device) for form, snn in snns.items()}
    images = images.to(device)
    wgmma = second_module(args.wgmma) if args.wgmma else None
    anns = Table(clock, args.rounds, args.only)
    ann_contenders(anns, net, images)
    loops = loop_steps(model, images)
    for T in steps:
        table = Table(clock, args.rounds, args.only)
        table.contenders |= anns.contenders
        table.errors |= anns.errors
        loop_contenders(table, loops, T)
        snn_contenders(table, snns, images, T, wgmma)
        rows = table.measure()
        rate = mean_rate(qcfs_fast.trace(snns["16-bit"], images[:8], T))
        found: dict[str, Any] = {"firing rate": rate, "contenders": rows}
        title = f"{name} {size}x{size}, batch {batch}, T={T}, firing {100 * rate:.1f} %"
        entry[f"T={T}"] = found
        equal = "NOT EQUAL TO THE CPU" if any(unequal(r.get("error", "")) for r in ours(entry)) else "equal to the CPU"
        print_rows(f"{title}, {equal}", rows)
        for form in ("16-bit", "8-bit"):
            found[f"layers ({form})"] = layer_rows(snns[form], images, T, clock, args.rounds, peak)
            print_layers(form, found[f"layers ({form})"])
        yield T


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 128, 256])
    parser.add_argument("--steps", nargs="+", type=int, default=[4, 1, 2, 8], metavar="T")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="contenders whose names have it (a regular expression)"
    )
    parser.add_argument(
        "--wgmma", type=Path, metavar="FOLDER", help="of a package that was built with QCFS_FAST_WGMMA=ON"
    )
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="no part begins after them")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--device", default="cuda", help="cpu tries the script out; its figures mean nothing")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        print("torch sees no GPU here: nothing was measured")
        return 2
    with torch.no_grad():
        result = measure(args, torch.device(args.device))
    print(f"\nwritten to {args.output}")
    rows = [row.get("error", "") for e in result["results"] for row in ours(e)]
    return 1 if any("error" in e for e in result["results"]) or any(map(unequal, rows)) else 0


if __name__ == "__main__":
    sys.exit(main())
