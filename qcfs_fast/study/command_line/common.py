"""What the commands have in common: their parser, options of images and of neurons, and which errors are the user's."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ...errors import ConversionError, FormatError
from ...network.schema import printable
from ...operators.neuron import Neuron
from ..data import Dataset, Folder

EXIT_CODES = (
    "exit codes: 0 done; 1 it could not be done, for the reason printed; 2 the command was not understood; "
    "130 interrupted; 143 terminated"
)
USER_ERRORS = (ConversionError, FormatError, ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError)


class Terminated(KeyboardInterrupt):
    """SIGTERM: it ends a command as Ctrl-C does, so that no half of a file stays behind."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises Terminated meanwhile. Signals are the main thread's; called in another, nothing changes."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stopped(by: KeyboardInterrupt, rest: str = "") -> int:
    """Says that a command was stopped, and what becomes of it; the exit code."""
    terminated = isinstance(by, Terminated)
    print(f"qcfs-fast: {'terminated' if terminated else 'interrupted'}{rest}", file=sys.stderr)
    return 143 if terminated else 130


def positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


class Parser(argparse.ArgumentParser):
    """A parser whose help shows text as written, line breaks included."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)


def command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], description: str, example: str
) -> argparse.ArgumentParser:
    """A command with the options that all have; its help ends with an example and the exit codes."""
    made: argparse.ArgumentParser = commands.add_parser(
        name, help=description, description=description, epilog=f"example: {example}\n\n{EXIT_CODES}"
    )
    made.set_defaults(run=run)
    made.add_argument("--json", action="store_true", help="print the result as JSON")
    made.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    return made


def add_image_options(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--size", type=positive, help="side of a folder's images in pixels (default: the network's, or 224)"
    )
    usual = "per channel (default: as the network's file says; else of a data set its own, of a folder ImageNet's)"
    made.add_argument("--mean", type=float, nargs="+", help=usual)
    made.add_argument("--std", type=float, nargs="+", help=usual)


def number_classes(data: Dataset, classes: Sequence[str] | None, outputs: int) -> None:
    """Number a folder's classes as the network does, and say which of them it lacks."""
    missing = data.number_as(classes, outputs) if isinstance(data, Folder) else []
    if missing:
        names = ", ".join(missing[:10]) + ", ..." * (len(missing) > 10)
        about = f"{data.path} has no folder for {len(missing)} of {outputs} classes: {names}"
        print(f"qcfs-fast: {printable(about)}", file=sys.stderr)


def add_replace(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--replace",
        nargs="+",
        metavar="CLASS",
        help="modules to replace, such as SiLU and SqueezeExcitation: see qcfs_fast.prepare, and train then",
    )


def add_window_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--window", type=positive, metavar="STEPS", help="steps that offset and masked look ahead")
    made.add_argument("--iterations", type=positive, help="first runs of offset")


def asked_neurons(o: argparse.Namespace, modes: Sequence[str], default: Neuron) -> list[Neuron]:
    """Neurons of these modes with the window and iterations asked for; what is not asked for is the default's."""
    window, iterations = o.window or default.window, o.iterations or default.iterations
    found = [Neuron(mode, window, iterations if mode == "offset" else 1) for mode in modes]
    if o.window and not any(neuron.looks_ahead for neuron in found):
        raise ValueError("--window goes with offset or masked neurons; name one of them by --neuron")
    if o.iterations and "offset" not in modes:
        raise ValueError("--iterations goes with offset neurons; name them by --neuron")
    return found
