"""qcfs-fast train and study: a network of QCFS activations, and what it is worth as a spiking network."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...files import content_of, remove_written
from ...model.calibration import calibrate
from ...operators.neuron import MODES, Neuron
from .. import training, zoo
from ..data import Dataset, Folder, batches
from ..datasets import NAMED, open_data
from ..networks import SMALL
from ..sweep import KIND, Plan, Study
from ..trained import Trained, load_trained, save_trained
from .common import add_replace, add_window_options, asked_neurons, command, number_classes, positive, stopped


def add_train(commands: Any) -> None:
    c = command(
        commands,
        "train",
        _train,
        "train a network of QCFS activations by the paper's recipe; an interrupted run goes on where it stopped",
        "qcfs-fast train fashion-mnist --network cifar-resnet20 --epochs 20 --output resnet20\n"
        "         qcfs-fast train cifar10 --network cifar-vgg16 --levels 4 --output vgg16\n"
        "         torchrun --nproc-per-node 8 -m qcfs_fast train imagenet --network resnet34 --levels 8 --output r34",
    )
    c.add_argument(
        "data", type=Path, help=f"{', '.join(NAMED)}, or a folder of train/ and val/ with a folder per class"
    )
    c.add_argument("--network", default="cifar-resnet20", help=f"{', '.join(SMALL)}, or a torchvision name")
    c.add_argument("--output", type=Path, required=True, help="folder for the network, the state and the log")
    c.add_argument("--levels", type=positive, default=4, help="L (default 4)")
    c.add_argument("--threshold", type=float, default=8.0, help="theta at the start (default 8; 2 for short runs)")
    c.add_argument("--width", type=float, default=1.0, help="factor on all channels of a cifar- network")
    c.add_argument("--epochs", type=positive, help="default: 300, or 120 for image folders")
    c.add_argument("--batch", type=positive, default=128, help="images per step, over all processes (default 128)")
    c.add_argument("--rate", type=float, default=0.1, help="learning rate at the start (default 0.1)")
    c.add_argument("--decay", type=float, default=5e-4, help="weight decay (default 5e-4)")
    c.add_argument("--augment", nargs="*", choices=training.AUGMENTATIONS, help="default: as the paper for this data")
    c.add_argument("--size", type=positive, default=224, help="side of the images of a folder (default 224)")
    c.add_argument("--max-pool", choices=("avg", "keep"), default="avg", help="see qcfs_fast.prepare")
    add_replace(c)
    c.add_argument("--weights", help="torchvision's own weights to start from, such as DEFAULT (downloads)")
    c.add_argument("--checkpoint", type=Path, help="state_dict to start from, of the ReLU network or the QCFS network")
    c.add_argument("--calibrate", type=positive, metavar="IMAGES", help="set thresholds from so many images first")
    c.add_argument("--seed", type=int, default=0, help="of weights, order and changes of images (default 0)")
    c.add_argument("--workers", type=int, default=0, help="processes that read images (default 0)")
    c.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    c.add_argument("--mixed", action="store_true", help="bfloat16 where it is exact enough (GPUs)")
    c.add_argument("--compile", action="store_true", help="torch.compile; worth its minute in longer runs")
    c.add_argument("--restart", action="store_true", help="forget an interrupted run")
    c.add_argument("--quiet", action="store_true", help="no progress bars")


def _train(o: argparse.Namespace) -> int:
    from ..evaluation import Processes, device_of

    if not 0 < o.threshold < float("inf"):
        raise ValueError(f"--threshold must be a positive number, got {o.threshold}")
    images, tests = (open_data(o.data, o.size, split=split) for split in ("train", "test"))
    about = _about(o, images)
    number_classes(tests, about.names, about.classes)
    recipe = training.Recipe(
        about.epochs, o.batch, o.rate, o.decay, _augmentations(o, images), o.seed, o.workers,
        mixed=o.mixed, compiled=o.compile,
    )  # fmt: skip
    processes = Processes()
    path = o.output / "model.safetensors"
    try:
        with processes.alone_in(o.output, "--output"):
            if o.restart and processes.rank == 0:
                remove_written(o.output, r"state\.pt|log\.jsonl|model\.safetensors|training\.png")
            processes.wait()
            torch.manual_seed(o.seed)
            model = _start(o, about).to(device_of(o.device, processes.local))
            if o.calibrate and not (o.output / "state.pt").exists():
                calibrate(model, batches(images, 100, o.calibrate), progress=not o.quiet)
            facts = {**_arguments(o), "shape": list(about.shape)}
            show = None if o.json else (lambda line: print(next(training.lines([line])), flush=True))
            log = training.train(model, images, recipe, tests, o.output, facts, not o.quiet, show)
            if processes.rank:
                return 0
            save_trained(path, model, replace(about, accuracy=log[-1]["test_accuracy"]))
            training.plot(log, o.output / "training.png", f"{about.network}, L = {about.levels}, {about.data}")
    except KeyboardInterrupt as stop:
        return stopped(stop, "; the same command goes on from the last state")
    if o.json:
        print(json.dumps({"network": str(path), "log": log}, indent=2))
    else:
        print(f"ANN: {log[-1]['test_accuracy']:.2%} of {len(tests)} test images\nwrote {path}")
    return 0


_NOT_OF_THE_RUN = ("run", "command", "json", "traceback", "output", "quiet", "restart", "workers", "device", "compile")


def _arguments(o: argparse.Namespace) -> dict[str, Any]:
    """What makes a training this one and no other."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(o).items() if k not in _NOT_OF_THE_RUN}


def _about(o: argparse.Namespace, images: Dataset) -> Trained:
    named, names = NAMED.get(str(o.data)), None
    if named is not None:
        classes, shape = named.classes, named.shape
    elif isinstance(images, Folder):
        classes, shape, names = len(images.classes), (3, o.size, o.size), tuple(images.classes)
    else:
        raise ValueError(f"{o.data}: train takes a folder with train/ and val/, or one of {', '.join(NAMED)}")
    if o.network not in SMALL and shape[0] != 3:
        raise ValueError(f"{o.network}: torchvision's networks read three channels, these images have {shape[0]}")
    given = [
        f"--{k.replace('_', '-')} {shlex.join(map(str, v if isinstance(v, list) else [v]))}"
        for k, v in _arguments(o).items()
        if k in _RECIPE and v
    ]
    return Trained(
        o.network, o.data.name, classes, shape, o.levels, o.width, o.max_pool,
        tuple(images.mean) if images.mean else None, tuple(images.std) if images.std else None,
        o.epochs or (300 if named else 120), o.seed, recipe=" ".join(["qcfs-fast train", o.data.name, *given]),
        names=names, replace=tuple(o.replace) if o.replace else None,
    )  # fmt: skip


_RECIPE = ("network", "replace", "levels", "threshold", "width", "epochs", "batch", "rate", "decay", "seed")


def _augmentations(o: argparse.Namespace, images: Dataset) -> tuple[str, ...]:
    if o.augment is not None:
        return tuple(o.augment)
    named = NAMED.get(str(o.data))
    return named.augment if named else ("crop", "flip")


def _start(o: argparse.Namespace, about: Trained) -> torch.nn.Module:
    """The network before its first step."""
    state = zoo.read_state(o.checkpoint) if o.checkpoint else None
    if about.network in SMALL:
        if o.weights or o.replace:
            raise ValueError(
                f"--weights and --replace go with a torchvision name; {about.network} has no published weights, and "
                "activations of QCFS alone"
            )
        model = about.build(o.threshold)
        return model if state is None else zoo.load_state(model, state, about.network)
    classes = None if o.weights else about.classes
    model = zoo.prepared_torchvision(
        about.network, classes, o.weights, state, about.levels, about.max_pool, o.threshold, about.replace
    ).train()
    outputs = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)][-1].weight.shape[0]
    if outputs != about.classes:
        raise ValueError(
            f"{about.network} with these weights has {outputs} outputs, but {o.data} {about.classes} classes"
        )
    return model


# ------------------------------------------------------------------------------------------------- study


def add_study(commands: Any) -> None:
    c = command(
        commands,
        "study",
        _study,
        "accuracy, agreement with the ANN, firing and latency by T and mode; an interrupted study goes on",
        "qcfs-fast study resnet20/model.safetensors fashion-mnist --neuron plain offset sum --bits 16 8 --output study",
    )
    c.add_argument("network", type=Path, help="model.safetensors, written by train")
    c.add_argument("data", type=Path, help="as for train, or an .npz file of labelled images")
    c.add_argument("--output", type=Path, required=True, help="folder for results, plots and the page")
    c.add_argument("--steps", type=positive, nargs="+", metavar="T", default=[1, 2, 4, 8, 16, 32, 64])
    c.add_argument(
        "--neuron", choices=MODES, nargs="+", metavar="MODE", default=["plain", "offset"], help=", ".join(MODES)
    )
    add_window_options(c)
    c.add_argument("--bits", type=int, choices=(16, 8, 24), nargs="+", default=[16], help="per weight (default 16)")
    c.add_argument("--rounding", type=int, default=512, metavar="IMAGES", help="to round 8-bit weights on (0: none)")
    c.add_argument("--images", type=positive, help="only so many test images")
    c.add_argument("--firing", type=positive, default=200, metavar="IMAGES", help="to count spikes on (default 200)")
    c.add_argument(
        "--latency", type=int, nargs="*", metavar="BATCH", default=[1], help="batch sizes to time (default 1)"
    )
    c.add_argument("--no-compile", action="store_true", help="leave out torch.compile's forms of the ANN and the loop")
    c.add_argument("--batch", type=positive, default=100, help="images per batch (default 100)")
    c.add_argument("--format", choices=("png", "svg"), nargs="+", default=["png"], help="of the plots (default png)")
    c.add_argument("--restart", action="store_true", help="forget an interrupted study")
    c.add_argument("--remeasure", action="store_true", help="time again, on this machine; the rest of a study stays")
    c.add_argument("--quiet", action="store_true", help="no progress bars")


def _study(o: argparse.Namespace) -> int:
    from .. import sweep_page

    model, about = load_trained(o.network)
    size = about.shape[-1]
    tests = open_data(o.data, size, about.mean, about.std)
    number_classes(tests, about.names, about.classes)
    named = str(o.data) in NAMED or o.data.is_dir()
    rounding = open_data(o.data, size, about.mean, about.std, split="train") if named and 8 in o.bits else None
    plan = Plan(
        tuple(sorted(set(o.steps))), tuple(asked_neurons(o, list(dict.fromkeys(o.neuron)), Neuron())),
        tuple(dict.fromkeys(o.bits)), o.images, o.rounding if rounding is not None else 0, o.firing,
        tuple(o.latency), not o.no_compile,
    )  # fmt: skip
    if o.restart:
        (o.output / "results.json").unlink(missing_ok=True)
    study = Study(model, about, tests, rounding, plan, o.output, o.batch, not o.quiet)
    if o.remeasure:
        study.forget_latency()
    try:
        results = study.run()
    except KeyboardInterrupt as stop:
        return stopped(stop, "; the same command goes on with what is missing")
    with content_of(study.path, KIND):
        written = sweep_page.write_plots(results, o.output, [f".{kind}" for kind in o.format])
        sweep_page.write_page(results, o.output / "study.html")
        print(json.dumps(results, indent=2) if o.json else sweep_page.text(results))
    for path in (*written, o.output / "study.html"):
        print(f"wrote {path}", file=sys.stderr)
    return 0
