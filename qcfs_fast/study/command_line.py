"""The commands `qcfs-fast NAME` (or `python -m qcfs_fast NAME`). Each does one thing and prints its result.

    demo      train, convert and evaluate a network on real scans
    info      versions, instruction sets and the kernels in use
    convert   a torchvision network or a checkpoint -> a saved spiking network
    eval      accuracy by T and mode of a saved network on a folder of images or an .npz file
    profile   firing rates, synaptic operations, energy and time of a saved network
    bench     measure latencies against the usual simulators
    compare   table and plots of what bench measured

Results go to stdout (as JSON with --json), progress and errors to stderr. Exit codes: 0 done; 1 it could not be done,
for the reason printed; 2 the command was not understood; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backend.information import info
from ..conversion.builder import convert
from ..errors import ConversionError, FormatError
from ..model.calibration import calibrate
from ..network.loading import load
from ..operators.neuron import MODES, Neuron
from . import zoo
from .benchmark import comparison
from .benchmark.cases import BATCHES, LAYERS, NETWORKS, QUICK, STEPS, LayerCase, NetworkCases
from .benchmark.measure import Effort
from .benchmark.results import Results, read, summary
from .data import Dataset, batches, check_steps, open_data
from .demo import demo
from .evaluation import evaluate
from .profiling.measure import profile

EXIT_CODES = (
    "exit codes: 0 done; 1 it could not be done, for the reason printed; 2 the command was not understood; "
    "130 interrupted"
)
USER_ERRORS = (ConversionError, FormatError, ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError)


# --------------------------------------------------------------------------- what commands have in common


def positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


class _Parser(argparse.ArgumentParser):
    """A parser whose help shows text as written, line breaks included."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)


def _command(
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


def _add_image_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--size", type=positive, default=224, help="side of the images in pixels (default 224)")
    made.add_argument("--mean", type=float, nargs="+", help="per channel; folders: ImageNet's by default")
    made.add_argument("--std", type=float, nargs="+", help="per channel; folders: ImageNet's by default")


def _add_window_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--window", type=positive, metavar="STEPS", help="steps that offset and masked look ahead")
    made.add_argument("--iterations", type=positive, help="first runs of offset")


def _neurons(o: argparse.Namespace, modes: Sequence[str], default: Neuron) -> list[Neuron]:
    """Neurons of these modes with the window and iterations asked for; what is not asked for is the default's."""
    window, iterations = o.window or default.window, o.iterations or default.iterations
    found = [Neuron(mode, window, iterations if mode == "offset" else 1) for mode in modes]
    if o.window and not any(neuron.looks_ahead for neuron in found):
        raise ValueError("--window goes with offset or masked neurons; name one of them by --neuron")
    if o.iterations and "offset" not in modes:
        raise ValueError("--iterations goes with offset neurons; name them by --neuron")
    return found


# ---------------------------------------------------------------------------------------- demo and info


def _add_demo(commands: Any) -> None:
    c = _command(
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
    _command(
        commands, "info", _info, "print versions, instruction sets and the kernels in use", "qcfs-fast info --json"
    )


def _info(o: argparse.Namespace) -> int:
    facts = info()
    if o.json:
        print(json.dumps(facts, indent=2))
        return 0
    width = max(len(k) for k in facts)
    for key, value in facts.items():
        print(f"{key.ljust(width)}  {', '.join(value) if isinstance(value, list) else value}")
    return 0


# ---------------------------------------------------------------------------------------------- convert


def _add_convert(commands: Any) -> None:
    c = _command(
        commands,
        "convert",
        _convert,
        "convert a torchvision network or a checkpoint to a saved spiking network",
        "qcfs-fast convert resnet18 --checkpoint qcfs-run/last.pt --output resnet18.safetensors\n"
        "         qcfs-fast convert vgg16-cifar10.pth --output vgg16.safetensors",
    )
    c.add_argument("source", help="a torchvision name, or a checkpoint of the authors' VGG or ResNet")
    c.add_argument("--output", type=Path, required=True, help="file to write (safetensors)")
    c.add_argument("--checkpoint", type=Path, help="state_dict for a torchvision name, QCFS-trained or plain")
    c.add_argument("--weights", help="torchvision's own weights, such as DEFAULT (downloads)")
    c.add_argument("--classes", type=positive, help="outputs of the network (default: as in the checkpoint, or 1000)")
    c.add_argument("--levels", type=positive, default=8, help="L of the training (default 8)")
    c.add_argument("--max-pool", choices=("avg", "keep"), default="avg", help="see qcfs_fast.prepare")
    c.add_argument(
        "--calibrate", type=Path, metavar="DATA", help="set thresholds from a folder, an .npz file, or random noise"
    )
    c.add_argument("--calibration-images", type=positive, default=256, help="images to calibrate on (default 256)")
    c.add_argument("-T", type=positive, default=4, help="time steps of a call that names none (default 4)")
    c.add_argument("--max-T", type=positive, help="largest T it will be asked for (default 32)")
    c.add_argument("--bits", type=int, choices=(16, 8, 24), default=16, help="bits per weight (default 16)")
    c.add_argument("--neuron", choices=MODES, default="plain", help="mode of the neurons (default plain)")
    _add_window_options(c)
    c.add_argument("--input-shape", type=positive, nargs=3, metavar=("C", "H", "W"), help="see qcfs_fast.convert")
    c.add_argument("--quiet", action="store_true", help="no progress bars")
    _add_image_options(c)


def _calibration_batches(o: argparse.Namespace, channels: int) -> Iterator[Tensor]:
    if str(o.calibrate) == "random":
        g = torch.Generator().manual_seed(0)
        yield torch.rand((4, channels, o.size, o.size), generator=g)
        return
    data = open_data(o.calibrate, o.size, o.mean, o.std, labelled=False)
    for images, _ in batches(data, 32, o.calibration_images):
        yield images if data.steps is None else images.flatten(0, 1).float()  # the ANN sees one frame at a time


def _convert(o: argparse.Namespace) -> int:
    neuron = _neurons(o, [o.neuron], Neuron())[0]
    source = Path(o.source)
    is_file = source.suffix != "" or source.exists()
    if is_file and o.checkpoint:
        raise ValueError("--checkpoint goes with a torchvision name; a file alone is one of the authors' checkpoints")
    if not o.output.parent.is_dir():
        raise FileNotFoundError(f"the folder {o.output.parent} does not exist; create it first")
    if is_file:
        model = zoo.authors_network(zoo.read_state(source), o.levels)
    else:
        state = zoo.read_state(o.checkpoint) if o.checkpoint else None
        trained = state is not None and any(k.endswith(".thresh") for k in state)
        if not trained and o.calibrate is None:
            raise ValueError(
                f"{o.source} as torchvision has it is a ReLU network without thresholds. Give --checkpoint with the "
                "state_dict of its QCFS-trained form, or --calibrate with images to set thresholds from (or "
                '"random", to try latencies only)'
            )
        model = zoo.prepared_torchvision(o.source, o.classes, o.weights, state, o.levels, o.max_pool)
    if o.calibrate is not None:
        calibrate(model, _calibration_batches(o, 3), progress=not o.quiet)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        snn = convert(
            model,
            T=o.T,
            weight_bits=o.bits,
            max_T=o.max_T,
            input_shape=o.input_shape,
            neuron=neuron.mode,
            window=neuron.window,
            iterations=neuron.iterations,
        )
    for warning in caught:
        print(f"qcfs-fast: warning: {warning.message}", file=sys.stderr)
    snn.save(o.output)
    if o.json:
        shape = None if snn.input_shape is None else list(snn.input_shape)
        facts = {"output": str(o.output), "T": snn.T, "max_T": snn.max_T, "weight_bits": snn.weight_bits}
        facts["neuron"] = str(snn.neuron)
        print(json.dumps({**facts, "input_shape": shape, "layers": snn.details}, indent=2))
    else:
        print(f"{snn.report()}\nwrote {o.output}")
    return 0


# ------------------------------------------------------------------------------------------------- eval


def _add_eval(commands: Any) -> None:
    c = _command(
        commands,
        "eval",
        _eval,
        "accuracy by T and mode of a saved network; an interrupted run goes on where it stopped",
        "qcfs-fast eval resnet18.safetensors imagenet/val --steps 1 2 4 8 --neuron plain offset\n"
        "         torchrun --nproc-per-node 4 -m qcfs_fast eval resnet18.safetensors imagenet/val",
    )
    c.add_argument("network", type=Path, help="file written by convert or snn.save")
    c.add_argument(
        "data",
        type=Path,
        help="folder with a subfolder of images per class, or .npz (images, labels), also over time [N, T, C, H, W]",
    )
    c.add_argument(
        "--steps", type=positive, nargs="+", metavar="T", help="default: 1 2 4 ... 32; over time up to the data's steps"
    )
    c.add_argument("--neuron", choices=MODES, nargs="+", metavar="MODE", help=f"{', '.join(MODES)} (default: its own)")
    _add_window_options(c)
    c.add_argument("--batch", type=positive, default=64, help="images per batch (default 64)")
    c.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    c.add_argument("--state", type=Path, help="folder for what is done (default: NETWORK.eval)")
    c.add_argument("--restart", action="store_true", help="forget an interrupted run")
    c.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_image_options(c)


def _default_steps(data: Dataset) -> list[int]:
    """Powers of two up to 32; of images over time up to their steps, and these."""
    last = data.steps or 32
    return [*(1 << i for i in range(6) if 1 << i < last), last]


def _eval(o: argparse.Namespace) -> int:
    own = load(o.network).neuron  # a damaged file is reported before the data is read
    data = open_data(o.data, o.size, o.mean, o.std)
    neurons = _neurons(o, o.neuron or [own.mode], own)
    steps = o.steps or _default_steps(data)
    try:
        found = evaluate(o.network, data, steps, neurons, o.batch, o.state, o.restart, o.device, not o.quiet)
    except KeyboardInterrupt:
        print(
            "qcfs-fast: interrupted; every finished batch is kept, and the same command goes on from there",
            file=sys.stderr,
        )
        return 130
    if found is None:
        return 0
    if o.json:
        rows = [
            {"neuron": str(neuron), "T": T, "right": right, "accuracy": right / found.images}
            for neuron, by_steps in zip(found.neurons, found.right, strict=True)
            for T, right in zip(found.steps, by_steps, strict=True)
        ]
        print(json.dumps({"images": found.images, "resumed": found.resumed, "accuracy": rows}, indent=2))
        return 0
    if found.resumed:
        print(f"{found.resumed} of {found.images} images were counted by earlier, interrupted runs")
    print(f"Accuracy by T, {found.images} images.\nNeurons: {', '.join(map(str, found.neurons))}")
    print(f"{'T':>4}" + "".join(f"{neuron.mode:>9}" for neuron in found.neurons))
    for T, *right in zip(found.steps, *found.right, strict=True):
        print(f"{T:4}" + "".join(f"{r / found.images:9.2%}" for r in right))
    return 0


# ---------------------------------------------------------------------------------------------- profile


def _add_profile(commands: Any) -> None:
    c = _command(
        commands,
        "profile",
        _profile,
        "firing rates, synaptic operations, energy and time of a saved network, layer by layer",
        "qcfs-fast profile digits.safetensors digits.npz --html report.html",
    )
    c.add_argument("network", type=Path, help="file written by convert or snn.save")
    c.add_argument("data", type=Path, help="folder of images or .npz file, as for eval; labels may be absent")
    c.add_argument("-T", type=positive, help="time steps (default: the network's; over time, the data's)")
    c.add_argument("--html", type=Path, help="also write a self-contained page")
    c.add_argument("--raster-layer", help="layer whose spikes the page shows")
    c.add_argument("--analog-every-step", action="store_true", help="count the first layer's products T times")
    c.add_argument("--images", type=positive, default=256, help="images to profile on (default 256)")
    c.add_argument("--batch", type=positive, default=32, help="images per batch (default 32)")
    c.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_image_options(c)


def _profile(o: argparse.Namespace) -> int:
    snn = load(o.network)
    data = open_data(o.data, o.size, o.mean, o.std, labelled=False)
    if o.T is not None:
        check_steps(data, o.T)
    parts = ((x if data.steps is None else x[: o.T], y) for x, y in batches(data, o.batch, o.images))
    found = profile(
        snn,
        parts if data.labelled else (x for x, _ in parts),
        T=o.T,
        raster_layer=o.raster_layer,
        analog_every_step=o.analog_every_step,
        progress=not o.quiet,
    )
    if o.html is not None:
        found.to_html(o.html)
        print(f"wrote {o.html}", file=sys.stderr)
    print(json.dumps(found.to_dict(), indent=2) if o.json else found.table())
    return 0


# -------------------------------------------------------------------------------------- bench and compare


def _add_bench(commands: Any) -> None:
    c = _command(
        commands,
        "bench",
        _bench,
        "measure latencies against the ANN, the step loop, SpikingJelly and snnTorch",
        'qcfs-fast bench --networks "resnet18 224" --batches 1 --steps 4 --output results.json',
    )
    c.add_argument("--networks", nargs="*", metavar="NAME", help="resnet18 224, vgg16_bn 32, vgg16_bn 224 (quoted)")
    c.add_argument("--batches", type=positive, nargs="+", help="1, 8 and 32, or some of them")
    c.add_argument("--steps", type=positive, nargs="+", metavar="T", help="1 to 16")
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
    wanted = {label: {b: steps for b in BATCHES if (steps := _steps_to_measure(o, label, b))} for label in networks}
    with torch.no_grad():
        for label in LAYERS if o.layers else ():
            _add_case(results, LayerCase(label).case(effort))
        for label, per_batch in wanted.items():
            if not per_batch:
                continue
            network = NetworkCases(label, device, compiled=not o.no_compile)
            for batch, steps in per_batch.items():
                for case in network.cases(batch, steps, effort, o.only):
                    _add_case(results, case)
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


def _add_case(results: Results, case: Mapping[str, Any]) -> None:
    results.add(case)
    print(summary(case), file=sys.stderr, flush=True)


def _add_compare(commands: Any) -> None:
    c = _command(
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
        for table in comparison.tables(data):
            console.print(table)
        for line in comparison.unmeasured(data):
            console.print(line, markup=False, highlight=False)
    if o.plots is not None:
        for path in comparison.plots(data, o.plots, [f".{kind}" for kind in o.format]):
            print(f"wrote {path}", file=sys.stderr)
    if o.readme is not None:
        folder = os.path.relpath(o.plots or "docs/images", o.readme.parent)
        comparison.write_readme(o.readme, comparison.markdown(data, Path(folder).as_posix()))
        print(f"wrote {o.readme}", file=sys.stderr)
    return 0


# ------------------------------------------------------------------------------------------------- main


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qcfs-fast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_demo, _add_info, _add_convert, _add_eval, _add_profile, _add_bench, _add_compare):
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
        return int(options.run(options))
    except KeyboardInterrupt:
        print("qcfs-fast: interrupted", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if options.traceback:
            raise
        print(f"qcfs-fast: error: {str(error) or type(error).__name__}", file=sys.stderr)
        return 1
