"""qcfs-fast convert: a torchvision network or a checkpoint becomes a saved spiking network. qcfs-fast zoo: which do."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...conversion.builder import convert
from ...files import require_folder_of
from ...model.calibration import calibrate
from ...network.schema import printable
from ...operators.neuron import MODES, Neuron
from .. import zoo, zoo_table
from ..about_images import checked_classes, checked_numbers, outputs_of
from ..data import batches, class_folders
from ..datasets import folder_of, open_data
from ..trained import load_trained, trained_about
from .common import add_image_options, add_replace, add_window_options, asked_neurons, command, positive


def add_convert(commands: Any) -> None:
    c = command(
        commands,
        "convert",
        _convert,
        "convert a torchvision network or a checkpoint to a saved spiking network",
        "qcfs-fast convert resnet20/model.safetensors --neuron offset --output resnet20.safetensors\n"
        "         qcfs-fast convert resnet18 --checkpoint my-resnet18.pth --output resnet18.safetensors\n"
        "         qcfs-fast convert vgg16-cifar10.pth --output vgg16.safetensors",
    )
    c.add_argument("source", help="a file of train, a torchvision name, timm:NAME, or the authors' VGG or ResNet")
    c.add_argument("--output", type=Path, required=True, help="file to write (safetensors)")
    c.add_argument("--checkpoint", type=Path, help="state_dict for a torchvision name, QCFS-trained or plain")
    c.add_argument("--weights", help="torchvision's own weights, such as DEFAULT (downloads)")
    c.add_argument(
        "--classes",
        type=_classes,
        metavar="NAMES",
        help="names to store: a file with one per line, or a folder with a subfolder per class; or how many outputs "
        "(default: as in the checkpoint, or 1000)",
    )
    c.add_argument("--levels", type=positive, default=8, help="L of the training (default 8)")
    c.add_argument("--max-pool", choices=("avg", "keep"), default="avg", help="see qcfs_fast.prepare")
    add_replace(c)
    c.add_argument(
        "--calibrate",
        type=Path,
        metavar="DATA",
        help="set thresholds from a data set, a folder, an .npz file, or random noise",
    )
    c.add_argument("--calibration-images", type=positive, default=256, help="images to calibrate on (default 256)")
    c.add_argument("-T", type=positive, default=4, help="time steps of a call that names none (default 4)")
    c.add_argument("--max-T", type=positive, help="largest T it will be asked for (default 32)")
    c.add_argument("--bits", type=int, choices=(16, 8, 24), default=16, help="bits per weight (default 16)")
    c.add_argument(
        "--round-on", type=Path, metavar="DATA", help="round weights so that errors compensate on these images"
    )
    c.add_argument("--rounding-images", type=positive, default=512, help="images to round on (default 512)")
    c.add_argument("--neuron", choices=MODES, default="plain", help="mode of the neurons (default plain)")
    add_window_options(c)
    c.add_argument("--input-shape", type=positive, nargs=3, metavar=("C", "H", "W"), help="see qcfs_fast.convert")
    c.add_argument("--quiet", action="store_true", help="no progress bars")
    add_image_options(c)


def _classes(text: str) -> int | list[str]:
    """How many classes, or their names in the order of the outputs."""
    if text.isdecimal():
        return positive(text)
    path = Path(text)
    try:
        if path.is_dir():
            names = class_folders(folder_of(path, "train"))
        else:
            names = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"neither a number nor a file or folder of names: {error}") from error
    if not names or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{path} must hold class names, each of them once; it holds {len(names)}")
    return names


def add_zoo(commands: Any) -> None:
    c = command(
        commands,
        "zoo",
        _zoo,
        "torchvision's classifiers: the names that convert, or a page on which do and why others do not",
        "qcfs-fast zoo --check --output zoo.md",
    )
    c.add_argument("names", nargs="*", metavar="NAME", help="with --check: these only (default: every classifier)")
    c.add_argument("--check", action="store_true", help="try each network; takes minutes to hours and can be resumed")
    c.add_argument("--timm", action="store_true", help="with --check: timm's networks with ReLU too")
    c.add_argument("--output", type=Path, default=Path("zoo.md"), help="page to write; results go to .json beside it")


def _zoo(o: argparse.Namespace) -> int:
    if not o.check:
        names = zoo.classifiers()
        print(json.dumps(names) if o.json else "\n".join(names))
        return 0
    every = zoo.every_classifier()
    every += zoo_table.of_timm() if o.timm else []
    unknown = [n for n in o.names if n not in every and not n.startswith("timm:")]
    if unknown:
        raise ValueError(f"torchvision has no classifier {unknown[0]!r}; known: {', '.join(every)}")
    require_folder_of(o.output)
    results = zoo_table.check_zoo(
        o.output, o.names or every, lambda line: print(printable(line), file=sys.stderr, flush=True)
    )
    print(json.dumps(results, indent=2) if o.json else f"wrote {o.output}")
    return 0


def _calibration_batches(o: argparse.Namespace, channels: int) -> Iterator[Tensor]:
    if str(o.calibrate) == "random":
        g = torch.Generator().manual_seed(0)
        yield torch.rand((4, channels, o.size or 224, o.size or 224), generator=g)
        return
    yield from _frames(o, o.calibrate, o.calibration_images, o.size or 224)


def _frames(o: argparse.Namespace, path: Path, count: int, size: int) -> Iterator[Tensor]:
    """Batches of training images, one frame at a time."""
    data = open_data(path, size, o.mean, o.std, labelled=False, split="train")
    for images, _ in batches(data, 32, count):
        yield images if data.steps is None else images.flatten(0, 1).float()  # the ANN sees one frame at a time


def _convert(o: argparse.Namespace) -> int:
    neuron = asked_neurons(o, [o.neuron], Neuron())[0]
    source = Path(o.source)
    is_file = source.suffix != "" or source.exists()
    if is_file and (o.checkpoint or o.replace):
        raise ValueError(
            "--checkpoint and --replace go with a torchvision name; a file alone is written by train, or the authors'"
        )
    require_folder_of(o.output)
    about = trained_about(source) if is_file else None
    names = o.classes if isinstance(o.classes, list) else about.names if about else None
    if about is not None:
        model = load_trained(source)[0]
        o.mean, o.std = o.mean or about.mean, o.std or about.std
    elif is_file:
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
        classes = o.classes if names is None else len(names)
        model = zoo.prepared_torchvision(o.source, classes, o.weights, state, o.levels, o.max_pool, replace=o.replace)
    if o.calibrate is not None:
        calibrate(model, _calibration_batches(o, 3), progress=not o.quiet)
    size = o.size or (about.shape[-1] if about else 224)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        snn = convert(
            model,
            T=o.T,
            weight_bits=o.bits,
            max_T=o.max_T,
            input_shape=o.input_shape or (about.shape if about else None),
            neuron=neuron.mode,
            window=neuron.window,
            iterations=neuron.iterations,
            data=_frames(o, o.round_on, o.rounding_images, size) if o.round_on else None,
            progress=not o.quiet,
        )
    for warning in caught:
        print(f"qcfs-fast: warning: {printable(str(warning.message))}", file=sys.stderr)
    snn.metadata = {"source": source.name}
    if about is not None:
        snn.metadata |= {"network": about.network, "trained by": about.recipe, "accuracy of the ANN": about.accuracy}
    channels = snn.layers["input"].config.channels
    said: dict[str, Any] = {name: checked_numbers(name, getattr(o, name), channels) for name in ("mean", "std")}
    said["classes"] = None if names is None else checked_classes(names, outputs_of(snn))
    snn.metadata |= {name: values for name, values in said.items() if values is not None}
    snn.save(o.output)
    if o.json:
        shape = None if snn.input_shape is None else list(snn.input_shape)
        facts = {"output": str(o.output), "T": snn.T, "max_T": snn.max_T, "weight_bits": snn.weight_bits}
        facts["neuron"] = str(snn.neuron)
        print(json.dumps({**facts, "input_shape": shape, "layers": snn.details}, indent=2))
    else:
        print(f"{snn.report()}\nwrote {o.output}")
    return 0
