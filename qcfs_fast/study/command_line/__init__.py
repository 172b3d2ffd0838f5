"""The commands `qcfs-fast NAME` (or `python -m qcfs_fast NAME`). Each does one thing and prints its result.

    demo      train, convert and evaluate a network on real scans
    info      versions, instruction sets and the kernels in use
    selftest  every kernel that this machine can run, against the reference
    train     a network of QCFS activations, on a data set by name or on your images
    convert   a torchvision network or a checkpoint -> a saved spiking network
    zoo       which of torchvision's networks convert, and why others do not
    eval      accuracy by T and mode of a saved network on a folder of images or an .npz file
    inspect   what stands in a saved network's file
    export    a saved network in a format of other programs
    profile   firing rates, synaptic operations, energy and time of a saved network
    study     accuracy, firing and latency by T and mode, beside the ANN: tables, plots, a page
    bench     measure latencies against the usual simulators
    compare   table and plots of what bench measured

Results go to stdout (as JSON with --json), progress and errors to stderr. Exit codes: 0 done; 1 it could not be done,
for the reason printed; 2 the command was not understood; 130 interrupted; 143 terminated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...backend.information import info
from ...errors import ConversionError
from ...network.schema import printable
from ..benchmark.cases import NETWORKS
from ..demo import demo
from ..selftest import selftest
from .benchmarking import add_bench, add_compare
from .common import USER_ERRORS, Parser, command, positive, stopped, terminable
from .converting import add_convert, add_zoo
from .evaluating import add_eval, add_profile
from .exporting import add_export
from .inspecting import add_inspect
from .training import add_study, add_train


def _add_demo(commands: Any) -> None:
    c = command(
        commands,
        "demo",
        _demo,
        "train, convert and evaluate a network on scikit-learn's digits",
        "qcfs-fast demo --output /tmp/digits",
    )
    c.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the plot and the network")
    c.add_argument("--epochs", type=positive, default=40, help="training epochs (default 40)")
    c.add_argument("--quiet", action="store_true", help="no progress bars")


def _demo(o: argparse.Namespace) -> int:
    demo(o.output, o.epochs, progress=not o.quiet, as_json=o.json)
    return 0


def _add_info(commands: Any) -> None:
    command(commands, "info", _info, "print versions, instruction sets and the kernels in use", "qcfs-fast info --json")


def _info(o: argparse.Namespace) -> int:
    facts = info()
    if o.json:
        print(json.dumps(facts, indent=2))
        return 0
    width = max(len(k) for k in facts)
    for key, value in facts.items():
        print(f"{key.ljust(width)}  {', '.join(value) if isinstance(value, list) else value}")
    return 0


def _add_selftest(commands: Any) -> None:
    command(
        commands,
        "selftest",
        _selftest,
        "run every kernel that this machine can run, and compare with the reference (seconds)",
        "qcfs-fast selftest",
    )


def _selftest(o: argparse.Namespace) -> int:
    lines: list[str] = []
    passed = selftest(lines.append if o.json else print)
    if o.json:
        print(json.dumps({"passed": passed, "report": lines}, indent=2))
    return 0 if passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="qcfs-fast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_demo,
        _add_info,
        _add_selftest,
        add_train,
        add_convert,
        add_zoo,
        add_inspect,
        add_export,
        add_eval,
        add_profile,
        add_study,
        add_bench,
        add_compare,
    ):
        add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if getattr(options, "networks", None):
        unknown = [n for n in options.networks if n not in NETWORKS]
        if unknown:
            parser.error(f"unknown network {unknown[0]!r}; known: {', '.join(map(repr, NETWORKS))}")
    try:
        with terminable():
            code = int(options.run(options))
            sys.stdout.flush()  # a full disk is an error like others
            return code
    except KeyboardInterrupt as stop:
        return stopped(stop)
    except USER_ERRORS as error:
        if options.traceback:
            raise
        text = str(error) or type(error).__name__
        lines = text.split("\n") if isinstance(error, ConversionError) else [text]  # a line for each obstacle
        print("qcfs-fast: error: " + "\n".join(map(printable, lines)), file=sys.stderr)
        return 1
