"""qcfs-fast eval and profile: what a saved network does on many images."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ...network.loading import load
from ...network.snn import SNN
from ...operators.neuron import MODES
from ..about_images import normalise, outputs_of, stored
from ..data import Dataset, Folder, batches, check_steps
from ..datasets import open_data
from ..evaluation import evaluate
from ..profiling.measure import profile
from .common import add_image_options, add_window_options, asked_neurons, command, number_classes, positive, stopped


def add_eval(commands: Any) -> None:
    c = command(
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
        help="a data set by name, a folder with a subfolder of images per class, or .npz (images, labels), also over "
        "time [N, T, C, H, W]",
    )
    c.add_argument(
        "--steps", type=positive, nargs="+", metavar="T", help="default: 1 2 4 ... 32; over time up to the data's steps"
    )
    c.add_argument("--neuron", choices=MODES, nargs="+", metavar="MODE", help=f"{', '.join(MODES)} (default: its own)")
    add_window_options(c)
    c.add_argument("--batch", type=positive, default=64, help="images per batch (default 64)")
    c.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    c.add_argument("--state", type=Path, help="folder for what is done (default: NETWORK.eval)")
    c.add_argument("--restart", action="store_true", help="forget an interrupted run")
    c.add_argument("--quiet", action="store_true", help="no progress bar")
    add_image_options(c)


def _images(o: argparse.Namespace, snn: SNN, labelled: bool = True) -> Dataset:
    """The data that is named, cut, normalised and numbered as asked, or else as the network's own images."""
    own = snn.input_shape[-1] if snn.input_shape is not None and len(snn.input_shape) == 3 else 224
    data = open_data(o.data, o.size or own, o.mean, o.std, labelled)
    normalise(data, snn, o.network, o.mean, o.std)
    if isinstance(data, Folder):
        number_classes(data, stored(snn, o.network, "classes"), outputs_of(snn))
    return data


def _default_steps(data: Dataset) -> list[int]:
    """Powers of two up to 32; of images over time up to their steps, and these."""
    last = data.steps or 32
    return [*(1 << i for i in range(6) if 1 << i < last), last]


def _eval(o: argparse.Namespace) -> int:
    snn = load(o.network)  # a damaged file is reported before the data is read
    own = snn.neuron
    data = _images(o, snn)
    neurons = asked_neurons(o, o.neuron or [own.mode], own)
    steps = o.steps or _default_steps(data)
    try:
        state = o.state or o.network.with_name(o.network.name + ".eval")
        found = evaluate(snn, data, steps, state, neurons, o.batch, o.restart, o.device, not o.quiet)
    except KeyboardInterrupt as stop:
        return stopped(stop, "; every finished batch is kept, and the same command goes on from there")
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


def add_profile(commands: Any) -> None:
    c = command(
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
    add_image_options(c)


def _profile(o: argparse.Namespace) -> int:
    snn = load(o.network)
    data = _images(o, snn, labelled=False)
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
