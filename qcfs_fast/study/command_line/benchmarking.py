"""qcfs-fast bench and compare: latencies against other simulators, and their tables and plots."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...files import content_of, replace_between
from ...network.schema import printable
from ..benchmark import comparison
from ..benchmark.cases import LAYERS, NETWORKS, QUICK, STEPS, LayerCase, NetworkCases, batches
from ..benchmark.measure import Effort, on_threads
from ..benchmark.results import KIND, Results, read, summary
from .common import command, positive


def add_bench(commands: Any) -> None:
    c = command(
        commands,
        "bench",
        _bench,
        "measure latencies against the ANN, the step loop, SpikingJelly and snnTorch",
        'qcfs-fast bench --networks "resnet18 224" --batches 1 --steps 4 --output results.json',
    )
    c.add_argument("--networks", nargs="*", metavar="NAME", help="resnet18 224, vgg16_bn 32, resnet20 32, ... (quoted)")
    c.add_argument("--batches", type=positive, nargs="+", help="some of 1, 8, 32 and, for small images, 128")
    c.add_argument("--steps", type=positive, nargs="+", metavar="T", help="1 to 16")
    c.add_argument("--threads", type=positive, nargs="+", metavar="N", help="each case with so many, e.g. 1 2")
    c.add_argument("--layers", action="store_true", help="single layers; with --networks also these")
    c.add_argument("--only", default="", metavar="TEXT", help="only contenders whose name contains this")
    c.add_argument("--full", action="store_true", help="all networks, batches and T (hours on two cores)")
    c.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    c.add_argument("--rounds", type=positive, default=15, help="at most so many calls per contender (default 15)")
    c.add_argument("--seconds", type=float, default=1.0, help="per contender and case (default 1)")
    c.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto takes a GPU where there is one")
    c.add_argument("--output", type=Path, default=Path("benchmark-results.json"), help="result file to add to")


def _bench(o: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() and o.device != "cpu" else "cpu")
    if o.layers and device.type == "cuda":
        raise ValueError("single layers are measured on the CPU: add --device cpu and another --output")
    results = Results(o.output, device)
    effort = Effort(o.rounds, o.seconds)
    networks = o.networks if o.networks is not None else [] if o.layers else list(NETWORKS)
    wanted = {
        label: {b: steps for b in batches(label) if (steps := _steps_to_measure(o, label, b))} for label in networks
    }
    usual = torch.get_num_threads()
    each = dict.fromkeys(o.threads or [usual])
    with torch.no_grad():
        for label in LAYERS if o.layers else ():
            layer = LayerCase(label)
            for threads in each:
                with on_threads(threads):
                    _add_case(results, layer.case(effort), threads, usual)
        for label, per_batch in wanted.items():
            if not per_batch:
                continue
            network = NetworkCases(label, device, compiled=not o.no_compile)
            for threads, (batch, steps) in itertools.product(each, per_batch.items()):
                with on_threads(threads):
                    for case in network.cases(batch, steps, effort, o.only):
                        _add_case(results, case, threads, usual)
    if o.json:
        print(json.dumps(results.data, indent=2))
    else:
        print(f"wrote {o.output}; show it with: qcfs-fast compare {o.output}")
    return 0


def _steps_to_measure(o: argparse.Namespace, label: str, batch: int) -> tuple[int, ...]:
    """The T to measure: those asked for, or all, or those of the selection that takes minutes."""
    if o.batches is not None and batch not in o.batches:
        return ()
    if o.steps is not None:
        return tuple(o.steps)
    if o.full or o.batches is not None:
        return STEPS
    return QUICK.get((label, batch), ())


def _add_case(results: Results, case: Mapping[str, Any], threads: int, usual: int) -> None:
    case = {**case, **({} if threads == usual else {"threads": threads})}
    results.add(case)
    print(summary(case), file=sys.stderr, flush=True)


def add_compare(commands: Any) -> None:
    c = command(
        commands,
        "compare",
        _compare,
        "table and plots of what bench measured",
        "qcfs-fast compare benchmark-results.json --plots plots",
    )
    c.add_argument("results", type=Path, help="file written by bench or by pytest benchmarks")
    c.add_argument("--plots", type=Path, metavar="FOLDER", help="write plots there")
    c.add_argument("--format", choices=("png", "svg"), nargs="+", default=["png", "svg"], help="default: both")
    c.add_argument("--readme", type=Path, metavar="FILE", help="replace the benchmark section of this Markdown file")


def _compare(o: argparse.Namespace) -> int:
    data = read(o.results)
    if o.json:
        print(json.dumps(data, indent=2))
    else:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 200)
        with content_of(o.results, KIND):
            tables, unmeasured = comparison.tables(data), comparison.unmeasured(data)
        for table in tables:
            console.print(table)
        for line in unmeasured:
            console.print(printable(line), markup=False, highlight=False)
    if o.plots is not None:
        with content_of(o.results, KIND):
            written = comparison.plots(data, o.plots, [f".{kind}" for kind in o.format])
        for path in written:
            print(f"wrote {path}", file=sys.stderr)
    if o.readme is not None:
        folder = os.path.relpath(o.plots or "docs/images", o.readme.parent)
        with content_of(o.results, KIND):
            text = comparison.markdown(data, Path(folder).as_posix())
        replace_between(o.readme, comparison.MARK, text)
        print(f"wrote {o.readme}", file=sys.stderr)
    return 0
