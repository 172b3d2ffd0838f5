"""profile: firing rates, synaptic operations, energy and time of a converted network, layer by layer.

Every batch runs twice. The first run counts: which neurons fire at which step (exactly what `trace` returns), and
from the running outputs accuracy by T. The second has nothing between two layers but a reading of the clock.
Synaptic operations follow from the spikes and the exact fan-out of every position (synapses.py).

What is charged, and by which convention:

    accumulate            one per spike and synapse it reaches. Average pools have no neurons: a spike goes on to the
                          synapses behind the pool, once for every window that covers it, so a count of v on a count
                          plane makes v accumulates. Residual spikes make one each, listed separately as well.
    multiply-accumulate   the layer that reads the image, once per image, as this library computes it; T times
                          on demand, as a step-by-step simulator does.
    readout               one accumulate per spike and class, as event-driven hardware would. (This library runs it
                          once per image on spike counts.)
    ANN                   one multiply-accumulate per synapse: the same graph run densely, once.
    not charged           in either network: biases, pools, memory traffic. In the SNN: the membrane updates,
                          which `updates` counts (neurons times steps).

Energy figures: 45 nm, 32-bit floating point, 0.9 pJ per addition and 3.7 + 0.9 pJ per multiply-accumulate; M. Horowitz,
"Computing's energy problem (and what we can do about it)", ISSCC 2014, figure 1.1.9.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ... import backend
from ...backend.information import info
from ...network import anytime
from ...network.layers import EncodingLayer, ImageInput, Layer, Readout, SpikePool, SpikingLayer
from ...network.snn import SNN
from ...operators.windows import spec_from
from . import synapses
from .synapses import Plane, Shape

ACCUMULATE_PJ = 0.9
MULTIPLY_ACCUMULATE_PJ = 4.6
RATE_BINS = 20
CONFIDENCES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0)
RASTER_IMAGES, RASTER_NEURONS = 8, 128

CAVEATS = (
    "Energy figures count arithmetic only, at the published 45 nm costs of 32-bit floating-point operations. They "
    "leave out memory, which costs more: in the same source a 64-bit read takes 10 pJ from an 8 KiB cache and 1.3 to "
    "2.6 nJ from DRAM. They say nothing about the energy this or any CPU or GPU uses, where an operation skipped is "
    "not an operation saved; measure that at the power supply. They serve to compare with publications that use the "
    "same convention.",
    "A QCFS-trained ANN is quantised and could run in integers too (0.1 pJ per 32-bit addition, 3.1 pJ per "
    "multiplication in the same source); the comparison with 32-bit floats flatters the SNN.",
    "Synaptic operations leave out biases and the update, comparison and reset of each membrane at every step "
    "('membrane updates'), as publications do. At low firing rates behind small fan-outs these can outweigh them.",
)


def _engine(layer: Layer, device: torch.device) -> str:
    """What runs a layer: the layer's own statement, else the kernels that the backend chose for all."""
    kernels = backend.describe() if device.type == "cpu" else backend.gpu_backend()
    named = getattr(layer, "engine", "")
    return f"{named}, {kernels}" if named else kernels


@dataclass
class LayerProfile:
    """One node of the network. Counts are sums over all images (and steps) unless they say otherwise.

    kind: "input", "analog" (reads the image), "spiking", "pool", "concat" or "readout".
    shape: of one image's value, (C, H, W) or (features,).
    synapses: per image, the multiply-accumulates of the ANN; synapses_with_padding as the usual counters count.
    accumulates: synaptic operations of arriving spikes; residual_accumulates is the part on residual connections.
    multiply_accumulates: of the image. updates: membrane updates.
    energy_pj, ann_energy_pj: picojoules per image.
    dead: neurons that never fired; saturated: neurons that fired at every step of every image.
    rate_histogram: neurons by firing rate, in 20 equal bins from 0 to 1.
    seconds: per image. max_T: largest T for which no membrane can overflow; threshold: smallest and largest, in units.
    """

    name: str
    kind: str
    ann_layers: list[str]
    shape: tuple[int, ...]
    engine: str
    seconds: float
    neurons: int = 0
    synapses: int = 0
    synapses_with_padding: int = 0
    spikes: int = 0
    spikes_by_step: list[int] = field(default_factory=list)
    rate: float | None = None
    rate_by_step: list[float] = field(default_factory=list)
    accumulates: int = 0
    accumulates_by_step: list[int] = field(default_factory=list)
    residual_accumulates: int = 0
    multiply_accumulates: int = 0
    updates: int = 0
    energy_pj: float = 0.0
    ann_energy_pj: float = 0.0
    dead: int = 0
    saturated: int = 0
    rate_histogram: list[int] = field(default_factory=list)
    max_T: int | None = None  # noqa: N815 - the field's name
    threshold: tuple[int, int] | None = None


@dataclass
class Profile:
    """What :func:`profile` returns.

    accuracy_by_step is None without labels; agreement_by_step is the share of images whose label after t steps is
    that after T. anytime lists mean_steps, accuracy and agreement of ``snn.predict`` by confidence. Both are None
    if the output is not class scores. raster: the firing steps of some neurons of one layer for the first images.
    """

    T: int
    images: int
    image_shape: tuple[int, ...]
    weight_bits: int
    analog_every_step: bool
    layers: list[LayerProfile]
    totals: dict[str, Any]
    accuracy_by_step: list[float] | None
    agreement_by_step: list[float] | None
    anytime: list[dict] | None
    raster: dict[str, Any]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: every field, and what the figures mean."""
        return {
            "format": "qcfs_fast profile 1",
            **asdict(self),
            "picojoules": {"accumulate": ACCUMULATE_PJ, "multiply_accumulate": MULTIPLY_ACCUMULATE_PJ},
            "caveats": list(CAVEATS),
        }

    def to_json(self, path: Any) -> None:
        """Write :meth:`to_dict` to a file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def to_html(self, path: Any) -> None:
        """Write one self-contained page with tables and figures.

        Raises:
            ImportError: matplotlib is not installed (pip install 'qcfs-fast[report]').
        """
        from .page import page

        Path(path).write_text(page(self), encoding="utf-8")

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Headings and cells of the table by layer; the last row holds the totals. Counts are per image."""
        headings = [
            "layer", "kind", "shape", "rate", "spikes", "accumulates", "MACs", "ANN MACs", "energy", "ANN energy",
            "dead", "saturated", "max T", "time", "engine",
        ]  # fmt: skip
        body = []
        for row in self.layers:
            spiking = row.neurons > 0
            body.append(
                [
                    row.name,
                    row.kind,
                    "x".join(map(str, row.shape)),
                    f"{row.rate:.1%}" if row.rate is not None else "",
                    count(row.spikes / self.images) if spiking else "",
                    count(row.accumulates / self.images) if row.accumulates_by_step else "",
                    count(row.multiply_accumulates / self.images) if row.multiply_accumulates else "",
                    count(row.synapses) if row.synapses else "",
                    energy(row.energy_pj) if row.accumulates_by_step else "",
                    energy(row.ann_energy_pj) if row.synapses else "",
                    str(row.dead) if spiking else "",
                    str(row.saturated) if spiking else "",
                    _bound(row.max_T) if row.max_T else "",
                    duration(row.seconds),
                    row.engine,
                ]
            )
        t = self.totals
        body.append(
            [
                "total", "", "", f"{t['rate']:.1%}", count(t["spikes_per_image"]), count(t["accumulates_per_image"]),
                count(t["multiply_accumulates_per_image"]), count(t["synapses"]), energy(t["energy_pj"]),
                energy(t["ann_energy_pj"]), str(t["dead"]), str(t["saturated"]), _bound(t["max_T"]),
                duration(t["seconds"]), "",
            ]
        )  # fmt: skip
        return headings, body

    def summary(self) -> str:
        """The main figures in a few sentences."""
        t = self.totals
        lines = [
            f"{self.images} images, T = {self.T}: {t['neurons']} neurons fire at {t['rate']:.1%} of the steps; "
            f"{t['dead']} never fired, {t['saturated']} always did.",
            f"Per image: {count(t['accumulates_per_image'])} accumulates and "
            f"{count(t['multiply_accumulates_per_image'])} multiply-accumulates, {energy(t['energy_pj'])}; the ANN "
            f"{count(t['synapses'])} multiply-accumulates, {energy(t['ann_energy_pj'])} (arithmetic alone, 45 nm; no "
            "statement about a CPU or GPU).",
        ]
        shares = self.agreement_by_step if self.accuracy_by_step is None else self.accuracy_by_step
        if shares is not None:
            what = "Accuracy" if self.accuracy_by_step is not None else "Images with their final label (none was given)"
            by_step = ", ".join(f"{t}: {shares[t - 1]:.2%}" for t in anytime.doubling(self.T))
            lines.append(f"{what} by time steps: {by_step}.")
        return "\n".join(lines)

    def table(self) -> str:
        """The table by layer and a summary: coloured by rich, where installed, on a terminal; else plain text."""
        headings, body = self.rows()
        if sys.stdout.isatty():
            try:
                return _rich_table(headings, body) + self.summary()
            except ImportError:
                pass
        widths = [max(len(r[i]) for r in [headings, *body]) for i in range(len(headings))]
        left = {0, 1, 2, len(headings) - 1}
        lines = [
            "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in [headings, *body]
        ]
        return "\n".join([*(line.rstrip() for line in lines), self.summary()])


def _rich_table(headings: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, header_style="bold", title="Per image, by layer", title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i in (0, 1, 2, len(headings) - 1) else "right", no_wrap=i == 0)
    for i, row in enumerate(body):
        table.add_row(
            *(Text(c) for c in row), style="bold" if i == len(body) - 1 else "", end_section=i == len(body) - 2
        )
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=max(Console().width, 150)).print(table)
    return out.getvalue()


def _bound(max_T: int) -> str:
    return "any" if max_T == 2**31 - 1 else str(max_T)


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    scale, unit = next(((s, u) for s, u in units if value >= s), units[-1])
    shown = value / scale
    digits = 0 if shown >= 100 else 1 if shown >= 10 else 2
    return f"{shown:.{digits}f}{unit}"


def count(value: float) -> str:
    """A number of operations with three digits: 1.23M."""
    return f"{value:.0f}" if value < 1000 else _scaled(value, [(1e9, "G"), (1e6, "M"), (1e3, "k")])


def energy(picojoules: float) -> str:
    return _scaled(picojoules, [(1e9, " mJ"), (1e6, " uJ"), (1e3, " nJ"), (1, " pJ")])


def duration(seconds: float) -> str:
    return _scaled(seconds, [(1, " s"), (1e-3, " ms"), (1e-6, " us")])


# ------------------------------------------------------------------------------------------ counting


def _bits(masks: Tensor, t: int, T: int) -> Tensor:
    """The spikes of step t, uint8 0/1 [N, ...]. At T = 1 masks and counts coincide."""
    return masks[t] if masks.shape[0] == T else (masks[t // 8] >> (t % 8)) & 1


class _Spikes:
    """Spikes of one plane, added up over batches: per step and position, and per neuron."""

    def __init__(self, T: int, shape: Shape, device: torch.device) -> None:
        self.positions = torch.zeros((T, *shape[:2]), dtype=torch.int64, device=device)
        self.neurons = torch.zeros(shape, dtype=torch.int64, device=device)

    def add(self, masks: Tensor) -> None:
        T = self.positions.shape[0]
        for t in range(T):
            fired = _bits(masks, t, T).sum(0, dtype=torch.int64).reshape(self.neurons.shape)
            self.neurons += fired
            self.positions[t] += fired.sum(2)


def _node_shape(value: Any, layer: Layer) -> Shape:
    if isinstance(layer, ImageInput):
        _, height, width, channels = value[0].shape
    elif value.dim() == 3:
        return 1, 1, int(value.shape[2])
    else:
        _, _, height, width, channels = value.shape
    return int(height), int(width), int(channels)


class _Run:
    """State of one profile: what the two runs of each batch add to."""

    def __init__(self, snn: SNN, T: int, raster_layer: str) -> None:
        self.snn, self.T, self.raster_layer = snn, T, raster_layer
        self.device = next(snn.buffers()).device
        self.shapes: dict[str, Shape] = {}
        self.spikes: dict[Plane, _Spikes] = {}
        self.outputs: tuple[int, ...] = ()
        self.seconds = dict.fromkeys(snn.layers, 0.0)
        self.images = 0
        self.batches: list[int] = []
        self.raster: dict[str, Any] = {}
        self.margins: list[Tensor] = []
        self.answers: list[Tensor] = []
        self.targets: list[Tensor] = []
        readout = list(snn.layers.values())[-1]
        self.behind_max: list[tuple[str, tuple]] = []  # planes that only the readout sees
        for node, pools in zip(readout.inputs, readout.config["pools"], strict=True):
            specs = tuple(s for s in map(spec_from, pools) if s.kind == "max")
            if specs:
                self.behind_max.append((node, specs))

    def count(self, x: Tensor) -> Tensor:
        """The counting run of a batch; returns the running outputs."""

        def add(plane: Plane, masks: Tensor, shape: Shape) -> None:
            if plane not in self.spikes:
                self.spikes[plane] = _Spikes(self.T, shape, self.device)
            self.spikes[plane].add(masks)

        def watch(name: str, layer: Layer, value: Any) -> None:
            if isinstance(layer, Readout):
                self.outputs = tuple(value.shape[2:])
                return
            shape = _node_shape(value, layer)
            if self.shapes.setdefault(name, shape) != shape:
                raise ValueError(
                    "profile: all images must have one size, since neurons are counted one by one; "
                    f"batch {len(self.batches) + 1} differs from the first"
                )
            if isinstance(layer, (EncodingLayer, SpikingLayer)) or (
                isinstance(layer, SpikePool) and layer.spec.kind == "max"
            ):
                add(Plane(name), value, shape)
            for node, specs in self.behind_max:
                if node == name:
                    masks, behind = value, shape
                    for spec in specs:
                        rows, cols = spec.windows(behind[0], 0), spec.windows(behind[1], 1)
                        masks = torch.ops.qcfs_fast.max_pool(masks, rows, cols)
                        behind = synapses.pooled(behind, spec)
                    add(Plane(name, specs), masks, behind)
            if name == self.raster_layer and not self.raster:
                self.raster = self._raster(name, value)

        out = self.snn.run(x, self.T, True, watch)
        self.images += x.shape[0]
        self.batches.append(x.shape[0])
        return out

    def _raster(self, name: str, masks: Tensor) -> dict[str, Any]:
        """Firing steps of evenly spaced neurons for the first images."""
        fired = torch.stack([_bits(masks, t, self.T)[:RASTER_IMAGES].flatten(1) for t in range(self.T)]).cpu()
        neurons = fired.shape[2]
        shown = sorted({i * neurons // min(neurons, RASTER_NEURONS) for i in range(min(neurons, RASTER_NEURONS))})
        steps = [[fired[:, n, i].nonzero().flatten().tolist() for i in shown] for n in range(fired.shape[1])]
        return {"layer": name, "of_neurons": neurons, "neurons": shown, "steps": steps}

    def time(self, x: Tensor) -> None:
        """The timed run of a batch: adds each node's seconds."""

        def clock() -> float:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return time.perf_counter()

        last = clock()

        def watch(name: str, layer: Layer, value: Any) -> None:
            nonlocal last
            now = clock()
            self.seconds[name] += now - last
            last = now

        self.snn.run(x, self.T, False, watch)

    def judge(self, running: Tensor, targets: Tensor | None) -> None:
        """Keep margins and labels of a batch's running outputs [T, N, classes]."""
        if running.dim() != 3 or running.shape[2] < 2:
            if targets is not None:
                raise ValueError(
                    "profile: labels were given, but the network's output is not a list of at least two class scores "
                    f"but of shape {list(running.shape[1:])}; leave the labels out"
                )
            return
        self.margins.append(anytime.margins(running).cpu())
        self.answers.append(running.argmax(2).cpu())
        if targets is not None:
            if targets.shape != (running.shape[1],) or targets.is_floating_point():
                raise ValueError(
                    f"profile: labels must be {running.shape[1]} whole numbers, one per image of the batch, got "
                    f"{targets.dtype} of shape {list(targets.shape)}"
                )
            if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < running.shape[2]:
                raise ValueError(
                    f"profile: labels run from {int(targets.min())} to {int(targets.max())}, but the network has "
                    f"{running.shape[2]} classes, counted from 0"
                )
            self.targets.append(targets.cpu())


def profile(
    snn: SNN,
    batches: Iterable[Any],
    T: int | None = None,
    labels: Any = None,
    raster_layer: str | None = None,
    analog_every_step: bool = False,
    progress: bool = True,
) -> Profile:
    """Measure a converted network on data: firing rates, synaptic operations, energy, accuracy by T, time by layer.

    Args:
        snn: a converted network.
        batches: an iterable of image batches as for ``snn(x)``, or of (images, labels) tuples as a DataLoader gives;
            images of one size. They are moved to the network's device.
        T: time steps, default ``snn.T``.
        labels: whole numbers, one for each image of all batches in order, where `batches` has none.
        raster_layer: spiking layer whose spikes to keep for the raster plot; default the last one.
        analog_every_step: charge the layer that reads the image T times instead of once.
        progress: show a progress bar.

    Returns:
        A :class:`Profile`: ``.table()``, ``.to_dict()``, ``.to_json(path)``, ``.to_html(path)``. Time per layer is
        the mean over all images of a second run of each batch in which only the clock is read between layers; on a
        GPU the device is synchronised there, so launch latencies count.

    Raises:
        TypeError: not a converted network, or a batch that is not a tensor.
        ValueError: no images, images of several sizes, labels that do not fit, an unknown raster_layer.
    """
    if not isinstance(snn, SNN):
        raise TypeError(f"profile: expected a converted network (SNN), got {type(snn).__name__}")
    steps = snn.T if T is None else snn._checked_steps(T)
    names = list(snn.spiking_layers)
    if raster_layer is not None and raster_layer not in names:
        raise ValueError(f"profile: no spiking layer is called {raster_layer!r}; there are {', '.join(names)}")
    every_label = None if labels is None else torch.as_tensor(labels)
    run = _Run(snn, steps, raster_layer or names[-1])
    image_shape: tuple[int, ...] = ()
    with torch.no_grad():
        for batch in tqdm(
            [batches] if isinstance(batches, Tensor) else batches, desc="profiling", unit="batch", disable=not progress
        ):
            x, targets = (batch[0], batch[1]) if isinstance(batch, (tuple, list)) and len(batch) > 1 else (batch, None)
            x = x[0] if isinstance(x, (tuple, list)) and len(x) == 1 else x
            if not isinstance(x, Tensor):
                raise TypeError(f"profile: expected tensors or (tensor, labels) tuples, got {type(x).__name__}")
            if x.shape[:1] == (0,):
                continue
            if every_label is not None:
                if targets is not None:
                    raise ValueError("profile: the batches hold labels and labels= is given too; give one of them")
                targets = every_label[run.images : run.images + x.shape[0]]
            x = x.to(run.device)
            image_shape = tuple(x.shape[1:])
            running = run.count(x)
            run.judge(running, None if targets is None else torch.as_tensor(targets).to(run.device))
            run.time(x)
    if run.images == 0:
        raise ValueError("profile: batches is empty; give at least one batch of images")
    if every_label is not None and len(every_label) != run.images:
        raise ValueError(f"profile: {len(every_label)} labels for {run.images} images")
    if run.targets and len(run.targets) != len(run.batches):
        raise ValueError("profile: some batches have labels and some have none")
    return _evaluate(run, image_shape, analog_every_step)


# ---------------------------------------------------------------------------------------- evaluation

_KINDS = {"ImageInput": "input", "EncodingLayer": "analog", "SpikePool": "pool", "SpikeConcat": "concat"}


def _layer(run: _Run, name: str, layer: Layer, found: synapses.Afferents | None, analog_runs: int) -> LayerProfile:
    T, images = run.T, run.images
    kind = _KINDS.get(type(layer).__name__, "readout" if isinstance(layer, Readout) else "spiking")
    if isinstance(layer, Readout):
        shape = run.outputs
    else:
        height, width, channels = run.shapes[name]
        shape = (channels,) if layer.config.get("vector") else (channels, height, width)
    row = LayerProfile(
        name=name,
        kind=kind,
        ann_layers=list(dict.fromkeys(n for n in layer.config.get("layers", ()) if n)),
        shape=shape,
        engine=_engine(layer, run.device),
        seconds=run.seconds[name] / images,
    )
    if isinstance(layer, (EncodingLayer, SpikingLayer)):
        spikes = run.spikes[Plane(name)]
        by_neuron = spikes.neurons.cpu().flatten()
        row.neurons = by_neuron.numel()
        row.spikes_by_step = spikes.positions.sum((1, 2)).tolist()
        row.spikes = sum(row.spikes_by_step)
        row.rate_by_step = [n / (images * row.neurons) for n in row.spikes_by_step]
        row.rate = row.spikes / (images * T * row.neurons)
        row.updates = images * T * row.neurons
        row.dead = int((by_neuron == 0).sum())
        row.saturated = int((by_neuron == images * T).sum())
        row.rate_histogram = torch.bincount(
            (by_neuron * RATE_BINS // (images * T)).clamp(max=RATE_BINS - 1), minlength=RATE_BINS
        ).tolist()
        detail = run.snn.details[name]
        row.max_T = int(detail["max_T"])
        row.threshold = int(detail["threshold_min"]), int(detail["threshold_max"])
    if found is not None:
        row.synapses, row.synapses_with_padding = found.synapses, found.with_padding
        row.accumulates_by_step = [0] * T
        for bundle in found.bundles:
            made = bundle.operations(run.spikes[bundle.plane].positions.cpu()).tolist()
            row.accumulates_by_step = [a + b for a, b in zip(row.accumulates_by_step, made, strict=True)]
            row.residual_accumulates += sum(made) if bundle.residual else 0
        row.accumulates = sum(row.accumulates_by_step)
        row.multiply_accumulates = found.analog * images * analog_runs
        row.energy_pj = (row.accumulates * ACCUMULATE_PJ + row.multiply_accumulates * MULTIPLY_ACCUMULATE_PJ) / images
        row.ann_energy_pj = row.synapses * MULTIPLY_ACCUMULATE_PJ
    return row


def _totals(layers: Sequence[LayerProfile], images: int, T: int, max_T: int) -> dict[str, Any]:
    def total(name: str) -> Any:
        return sum(getattr(row, name) for row in layers)

    return {
        "neurons": total("neurons"),
        "rate": total("spikes") / (images * T * total("neurons")),
        "spikes_per_image": total("spikes") / images,
        "accumulates_per_image": total("accumulates") / images,
        "residual_accumulates_per_image": total("residual_accumulates") / images,
        "multiply_accumulates_per_image": total("multiply_accumulates") / images,
        "updates_per_image": total("updates") / images,
        "synapses": total("synapses"),
        "synapses_with_padding": total("synapses_with_padding"),
        "energy_pj": total("energy_pj"),
        "ann_energy_pj": total("ann_energy_pj"),
        "dead": total("dead"),
        "saturated": total("saturated"),
        "seconds": total("seconds"),
        "max_T": max_T,
    }


def _environment(run: _Run) -> dict[str, Any]:
    facts: Mapping[str, Any] = info()
    chosen = {k: facts[k] for k in ("qcfs_fast", "torch", "python", "processor", "threads")}
    if run.device.type == "cuda":
        chosen["device"] = torch.cuda.get_device_name(run.device)
    else:
        chosen["device"] = "cpu"
        chosen["kernels"] = backend.describe()
        chosen["instruction sets cap"] = facts["QCFS_FAST_MAX_ISA"]
    sizes = dict.fromkeys((min(run.batches), max(run.batches)))
    chosen["batches"] = f"{len(run.batches)} of {' to '.join(map(str, sizes))} images"
    return chosen


def _evaluate(run: _Run, image_shape: tuple[int, ...], analog_every_step: bool) -> Profile:
    found = synapses.afferents(run.snn, run.shapes)
    analog_runs = run.T if analog_every_step else 1
    layers = [_layer(run, name, layer, found.get(name), analog_runs) for name, layer in run.snn.layers.items()]
    accuracy = agreement = curve = None
    if run.answers:
        answers, margin = torch.cat(run.answers, 1), torch.cat(run.margins, 1)
        agreement = (answers == answers[-1]).to(torch.float64).mean(1).tolist()
        targets = torch.cat(run.targets) if run.targets else None
        if targets is not None:
            accuracy = (answers == targets).to(torch.float64).mean(1).tolist()
        curve = anytime.trade_off(margin, answers, targets, CONFIDENCES)
    return Profile(
        T=run.T,
        images=run.images,
        image_shape=image_shape,
        weight_bits=run.snn.weight_bits,
        analog_every_step=analog_every_step,
        layers=layers,
        totals=_totals(layers, run.images, run.T, run.snn.max_T),
        accuracy_by_step=accuracy,
        agreement_by_step=agreement,
        anytime=curve,
        raster=run.raster,
        environment=_environment(run),
    )
