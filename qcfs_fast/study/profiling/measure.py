"""profile(): runs a converted network on data and measures it, layer by layer.

Every batch runs twice, because counting costs time that must not be measured:

    counting run   reads which neurons fire at which step (exactly what `trace` returns), and from the running outputs
                   the answer after each step
    timed run      does nothing between two layers but read the clock

Synaptic operations follow from the spikes and the exact fan-out of every position (synapses.py). record.py says which
operations are charged.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ... import backend
from ...backend.information import info
from ...network import anytime
from ...network.layers import (
    EncodingLayer,
    ImageInput,
    Layer,
    Readout,
    Signed,
    SpikePool,
    SpikingLayer,
    max_pooled,
    signs,
)
from ...network.snn import SNN
from ...operators.masks import at_step
from ..data import check_labels
from . import synapses
from .record import ACCUMULATE_PJ, MULTIPLY_ACCUMULATE_PJ, RATE_BINS, LayerProfile
from .report import Profile
from .synapses import Plane, Shape

CONFIDENCES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0)
RASTER_IMAGES, RASTER_NEURONS = 8, 128

# ------------------------------------------------------------------------------------------ counting


class _Spikes:
    """Spikes of one plane, of both signs, added up over batches: per step and position, and per neuron."""

    def __init__(self, steps: int, shape: Shape, device: torch.device) -> None:
        self.positions = torch.zeros((steps, *shape[:2]), dtype=torch.int64, device=device)
        self.neurons = torch.zeros(shape, dtype=torch.int64, device=device)
        self.negative = 0

    def add(self, value: Any) -> None:
        steps = self.positions.shape[0]
        for masks in signs(value):
            for t in range(steps):
                fired = at_step(masks, t, steps).sum(0, dtype=torch.int64).reshape(self.neurons.shape)
                self.neurons += fired
                self.positions[t] += fired.sum(2)
        if isinstance(value, Signed):
            self.negative += sum(int(at_step(value.negative, t, steps).sum()) for t in range(steps))


def _node_shape(value: Any, layer: Layer) -> Shape:
    """Height, width and channels of a node's value."""
    value = value[0] if isinstance(value, Signed) else value
    if isinstance(layer, ImageInput):
        _, height, width, channels = value[0].shape
    elif value.dim() == 3:
        return 1, 1, int(value.shape[2])
    else:
        _, _, height, width, channels = value.shape
    return int(height), int(width), int(channels)


class _Measurement:
    """What the two runs of each batch add to, over all batches."""

    def __init__(self, snn: SNN, T: int, raster_layer: str) -> None:
        self.snn, self.T, self.raster_layer = snn, T, raster_layer
        self.neuron = snn.neuron
        self.steps = snn.neuron.steps(T)  # that layers compute
        self.is_ann = snn.neuron.mode == "sum"
        self.varying = False  # whether the images change with time
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
        snn.refuse_several_outputs("profile")
        readout = list(snn.layers.values())[-1]
        self.behind_max: list[tuple[str, tuple]] = []  # planes that only the readout sees
        assert isinstance(readout, Readout)
        for term in readout.terms():
            specs = tuple(s for s in term.pools if s.kind == "max")
            if specs:
                self.behind_max.append((term.node, specs))

    def counting_run(self, x: Tensor) -> Tensor:
        """Run a batch, add its spikes, and return the running outputs."""

        def watch(name: str, layer: Layer, value: Any) -> None:
            if isinstance(layer, Readout):
                self.outputs = tuple(value.shape[2:])
            else:
                self._add_node(name, layer, value)

        self.run = self.snn._settled_run(x, self.T, not self.is_ann, 0)
        self.varying |= self.run.varying
        out: Tensor = self.snn._execute(x, self.run, watch)
        self.images += out.shape[1]
        self.batches.append(out.shape[1])
        return out

    def _add_node(self, name: str, layer: Layer, value: Any) -> None:
        """Note a node's shape and add the spikes that synapses start from."""
        shape = _node_shape(value, layer)
        if self.shapes.setdefault(name, shape) != shape:
            raise ValueError(
                "profile: all images must have one size, since neurons are counted one by one; "
                f"batch {len(self.batches) + 1} differs from the first"
            )
        is_max_pool = isinstance(layer, SpikePool) and layer.spec.kind == "max"
        if is_max_pool or isinstance(layer, (EncodingLayer, SpikingLayer)):
            self._add_spikes(Plane(name), value, shape)
        for node, specs in self.behind_max:
            if node == name:
                masks, pooled_shape = value, shape
                for spec in specs:
                    masks = max_pooled(masks, spec, self.run)
                    pooled_shape = synapses.pooled(pooled_shape, spec)
                self._add_spikes(Plane(name, specs), masks, pooled_shape)
        if name == self.raster_layer and not self.raster:
            self.raster = self._raster(name, value)

    def _add_spikes(self, plane: Plane, value: Any, shape: Shape) -> None:
        if plane not in self.spikes:
            self.spikes[plane] = _Spikes(self.steps, shape, self.device)
        self.spikes[plane].add(value)

    def _raster(self, name: str, value: Any) -> dict[str, Any]:
        """Steps at which evenly spaced neurons send anything, for the first images."""
        sent = [
            sum(at_step(masks, t, self.steps)[:RASTER_IMAGES].flatten(1) for masks in signs(value))
            for t in range(min(self.T, self.steps))
        ]
        fired = torch.stack([torch.as_tensor(s) for s in sent]).cpu()
        neurons = fired.shape[2]
        shown = sorted({i * neurons // min(neurons, RASTER_NEURONS) for i in range(min(neurons, RASTER_NEURONS))})
        steps = [[fired[:, n, i].nonzero().flatten().tolist() for i in shown] for n in range(fired.shape[1])]
        return {"layer": name, "of_neurons": neurons, "neurons": shown, "steps": steps}

    def first_runs(self, t: int) -> int:
        """How often what arrives at step t is integrated before the run that counts."""
        return self.neuron.iterations if self.neuron.looks_ahead and t < self.neuron.window else 0

    def timed_run(self, x: Tensor) -> None:
        """Run a batch once more and add each node's seconds."""

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

    def record_answers(self, running: Tensor, targets: Tensor | None) -> None:
        """Keep margins and labels of a batch's running outputs [T, N, classes] (of an integer ANN [1, N, classes])."""
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
            check_labels(targets, running.shape[2], "profile")
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
        batches: an iterable of image batches as for ``snn(x)``, also over time [T, N, ...], or of (images, labels)
            tuples as a DataLoader gives; images of one size. They are moved to the network's device.
        T: time steps, default ``snn.T``, or those of the first batch where images change with time.
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
    steps = None if T is None else snn._checked_steps(T)
    names = list(snn.spiking_layers)
    if raster_layer is not None and raster_layer not in names:
        raise ValueError(f"profile: no spiking layer is called {raster_layer!r}; there are {', '.join(names)}")
    every_label = None if labels is None else torch.as_tensor(labels)
    m: _Measurement | None = None
    image_shape: tuple[int, ...] = ()
    with torch.no_grad():
        for batch in tqdm(
            [batches] if isinstance(batches, Tensor) else batches, desc="profiling", unit="batch", disable=not progress
        ):
            x, targets = _images_and_targets(batch)
            if x.numel() == 0:
                continue
            x = x.to(next(snn.buffers()).device)
            varying = snn._check_input(x)
            if m is None:
                m = _Measurement(snn, steps or (int(x.shape[0]) if varying else snn.T), raster_layer or names[-1])
            image_shape = tuple(x.shape[1 + varying :])
            if every_label is not None:
                if targets is not None:
                    raise ValueError("profile: the batches hold labels and labels= is given too; give one of them")
                targets = every_label[m.images : m.images + x.shape[int(varying)]]
            running = m.counting_run(x)
            m.record_answers(running, None if targets is None else torch.as_tensor(targets).to(m.device))
            m.timed_run(x)
    if m is None:
        raise ValueError("profile: batches is empty; give at least one batch of images")
    if every_label is not None and len(every_label) != m.images:
        raise ValueError(f"profile: {len(every_label)} labels for {m.images} images")
    if m.targets and len(m.targets) != len(m.batches):
        raise ValueError("profile: some batches have labels and some have none")
    return _profile(m, image_shape, analog_every_step)


def _images_and_targets(batch: Any) -> tuple[Tensor, Any]:
    """A batch as the user's iterable gives it: images alone, (images,) or (images, labels)."""
    x, targets = (batch[0], batch[1]) if isinstance(batch, (tuple, list)) and len(batch) > 1 else (batch, None)
    x = x[0] if isinstance(x, (tuple, list)) and len(x) == 1 else x
    if not isinstance(x, Tensor):
        raise TypeError(f"profile: expected tensors or (tensor, labels) tuples, got {type(x).__name__}")
    return x, targets


# ------------------------------------------------------------------------------- from sums to a Profile

_KINDS = {"ImageInput": "input", "EncodingLayer": "analog", "SpikePool": "pool", "SpikeConcat": "concat"}


def _engine(layer: Layer, device: torch.device) -> str:
    """What runs a layer: the layer's own statement, else the kernels that the backend chose for all."""
    kernels = backend.describe() if device.type == "cpu" else backend.gpu_backend(device.index or 0)
    named = getattr(layer, "engine", "")
    return f"{named}, {kernels}" if named else kernels


def _layer_profile(
    m: _Measurement, name: str, layer: Layer, found: synapses.Afferents | None, analog_runs: int
) -> LayerProfile:
    images = m.images
    kind = _KINDS.get(type(layer).__name__, "readout" if isinstance(layer, Readout) else "spiking")
    if isinstance(layer, Readout):
        shape = m.outputs
    else:
        height, width, channels = m.shapes[name]
        shape = (channels,) if getattr(layer.config, "vector", False) else (channels, height, width)
    row = LayerProfile(
        name=name,
        kind=kind,
        ann_layers=list(dict.fromkeys(n for n in getattr(layer.config, "layers", ()) if n)),
        shape=shape,
        engine=_engine(layer, m.device),
        seconds=m.seconds[name] / images,
    )
    if isinstance(layer, (EncodingLayer, SpikingLayer)):
        _fill_in_neurons(row, m.spikes[Plane(name)], m)
        detail = m.snn.details[name]
        row.max_T = m.snn.bound(name)
        row.threshold = int(detail["threshold_min"]), int(detail["threshold_max"])
    if found is not None:
        _fill_in_operations(row, found, m, analog_runs)
    return row


def _fill_in_neurons(row: LayerProfile, spikes: _Spikes, m: _Measurement) -> None:
    """Rates and counts of one layer's neurons."""
    by_neuron = spikes.neurons.cpu().flatten()
    slots = m.images * (m.T if m.is_ann else m.steps)  # spikes that a neuron can send
    row.neurons = by_neuron.numel()
    row.spikes_by_step = spikes.positions.sum((1, 2)).tolist()
    row.spikes = sum(row.spikes_by_step)
    row.negative_spikes = spikes.negative
    row.rate_by_step = [n * m.steps / (slots * row.neurons) for n in row.spikes_by_step]
    row.rate = row.spikes / (slots * row.neurons)
    first_runs = m.neuron.window * m.neuron.iterations if m.neuron.looks_ahead else 0
    row.updates = m.images * (m.steps + first_runs) * row.neurons
    row.dead = int((by_neuron == 0).sum())
    row.saturated = int((by_neuron == slots).sum())
    row.rate_histogram = torch.bincount(
        (by_neuron * RATE_BINS // slots).clamp(max=RATE_BINS - 1), minlength=RATE_BINS
    ).tolist()


def _fill_in_operations(row: LayerProfile, found: synapses.Afferents, m: _Measurement, analog_runs: int) -> None:
    """Synaptic operations of one layer, and the energy by convention."""
    row.synapses, row.synapses_with_padding = found.synapses, found.with_padding
    if m.is_ann:
        row.multiply_accumulates = found.synapses * m.images
    else:
        row.accumulates_by_step = [0] * m.steps
        for bundle in found.bundles:
            made = bundle.operations(m.spikes[bundle.plane].positions.cpu()).tolist()
            if row.kind != "readout":
                made = [n * (1 + m.first_runs(t)) for t, n in enumerate(made)]
            else:
                made[m.T :] = [0] * (m.steps - m.T)  # the answer is read after T steps
            row.accumulates_by_step = [a + b for a, b in zip(row.accumulates_by_step, made, strict=True)]
            row.residual_accumulates += sum(made) if bundle.residual else 0
        row.accumulates = sum(row.accumulates_by_step)
        row.multiply_accumulates = found.analog * m.images * analog_runs
    row.energy_pj = (row.accumulates * ACCUMULATE_PJ + row.multiply_accumulates * MULTIPLY_ACCUMULATE_PJ) / m.images
    row.ann_energy_pj = row.synapses * MULTIPLY_ACCUMULATE_PJ


def _totals(layers: Sequence[LayerProfile], m: _Measurement) -> dict[str, Any]:
    images, slots = m.images, m.T if m.is_ann else m.steps

    def total(name: str) -> Any:
        return sum(getattr(row, name) for row in layers)

    return {
        "neurons": total("neurons"),
        "rate": total("spikes") / (images * slots * total("neurons")),
        "spikes_per_image": total("spikes") / images,
        "negative_spikes_per_image": total("negative_spikes") / images,
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
        "max_T": m.snn.max_T,
    }


def _environment(m: _Measurement) -> dict[str, Any]:
    facts: Mapping[str, Any] = info()
    chosen = {k: facts[k] for k in ("qcfs_fast", "torch", "python", "processor", "threads")}
    if m.device.type == "cuda":
        chosen["device"] = torch.cuda.get_device_name(m.device)
    else:
        chosen["device"] = "cpu"
        chosen["kernels"] = backend.describe()
        chosen["instruction sets cap"] = facts["QCFS_FAST_MAX_ISA"]
    sizes = dict.fromkeys((min(m.batches), max(m.batches)))
    chosen["batches"] = f"{len(m.batches)} of {' to '.join(map(str, sizes))} images"
    return chosen


def _profile(m: _Measurement, image_shape: tuple[int, ...], analog_every_step: bool) -> Profile:
    found = synapses.afferents(m.snn, m.shapes)
    analog_runs = m.T if analog_every_step or m.varying else 1
    layers = [_layer_profile(m, name, layer, found.get(name), analog_runs) for name, layer in m.snn.layers.items()]
    accuracy = agreement = curve = None
    if m.answers:
        answers, margin = torch.cat(m.answers, 1), torch.cat(m.margins, 1)
        agreement = (answers == answers[-1]).to(torch.float64).mean(1).tolist()
        targets = torch.cat(m.targets) if m.targets else None
        if targets is not None:
            accuracy = (answers == targets).to(torch.float64).mean(1).tolist()
        curve = None if m.is_ann else anytime.trade_off(margin, answers, targets, CONFIDENCES)
    return Profile(
        T=m.T,
        images=m.images,
        image_shape=image_shape,
        weight_bits=m.snn.weight_bits,
        neuron=str(m.neuron),
        analog_every_step=analog_every_step,
        layers=layers,
        totals=_totals(layers, m),
        accuracy_by_step=accuracy,
        agreement_by_step=agreement,
        anytime=curve,
        raster=m.raster,
        environment=_environment(m),
    )
