"""The figures of a profile: its fields, the conventions behind them, and their form as text.

Which operations are charged differs between publications. Here:

    accumulate            A spike costs one for each synapse it reaches. An average pool has no neurons: a spike goes
                          on to the synapses behind the pool, once for every window that covers it, so a count of v
                          on a count plane costs v accumulates a synapse. A spike on a residual connection costs one;
                          these are also listed separately.
    multiply-accumulate   The layer that reads the image is charged once per image, because its current is the same
                          at every step and this library computes it once. On demand it is charged T times, as in a
                          step-by-step simulator, and so it is for images that change with time.
    modes                 Negative spikes cost what positive ones do. Neurons that look ahead (offset, masked) compute
                          at least the steps of their window, and what arrives in the window is integrated once more
                          for each first run, though this library keeps the currents and does not add them up again.
                          An integer ANN (sum) is charged its multiply-accumulates.
    readout               A spike costs one accumulate per class, as on event-driven hardware. (This library runs the
                          readout once per image, on spike counts.)
    ANN                   The same graph, run densely once, costs one multiply-accumulate per synapse.
    not charged           Biases, pools and memory traffic, in either network. In the SNN also the membrane updates
                          (neurons times steps), which `updates` counts.

Energy figures are those of 32-bit floating point at 45 nm: 0.9 pJ per addition, 3.7 + 0.9 pJ per multiply-accumulate;
M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, figure 1.1.9.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...network.schema import printable

ACCUMULATE_PJ = 0.9
MULTIPLY_ACCUMULATE_PJ = 4.6
RATE_BINS = 20
UNBOUNDED_T = 2**31 - 1  # LayerProfile.max_T of a layer that no T can overflow

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


@dataclass
class LayerProfile:
    """One node of the network. Counts are sums over all images (and steps) unless they say otherwise.

    kind: "input", "analog" (reads the image), "spiking", "pool", "concat" or "readout".
    shape: the shape of one image's value, (C, H, W) or (features,).
    seconds: time per image.
    synapses: multiply-accumulates of the ANN per image; synapses_with_padding also counts the taps that fall into
        the padding, as the usual counters do.
    accumulates: synaptic operations of the arriving spikes; residual_accumulates is the part on residual connections.
    multiply_accumulates: those of the layer that reads the image.
    negative_spikes: the part of the spikes that signed neurons took back.
    updates: membrane updates, those of first runs over a window among them.
    energy_pj, ann_energy_pj: picojoules per image.
    dead: neurons that never fired; saturated: neurons that fired at every step of every image.
    rate_histogram: number of neurons by firing rate, in 20 equal bins from 0 to 1.
    max_T: largest T for which no membrane can overflow.
    threshold: smallest and largest threshold of the layer, in integer units.
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
    negative_spikes: int = 0
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
class Record:
    """What one profile measured, as plain data.

    accuracy_by_step: share of right answers after each step; None without labels.
    agreement_by_step: share of images whose label after t steps is that after T.
    anytime: mean_steps, accuracy and agreement of ``snn.predict`` by confidence. This and agreement_by_step are None
        if the output is not class scores.
    raster: the firing steps of some neurons of one layer for the first images.
    neuron: the mode of the neurons. Lists by step have an entry for each step that layers compute: those of a window
        where that is longer than T, and one for an integer ANN (sum mode), whose neurons have counts.
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
    neuron: str = "plain"

    def to_dict(self) -> dict[str, Any]:
        """Plain data: every field, and what the figures mean."""
        return {
            "format": "qcfs_fast profile 1",
            **asdict(self),
            "picojoules": {"accumulate": ACCUMULATE_PJ, "multiply_accumulate": MULTIPLY_ACCUMULATE_PJ},
            "caveats": list(CAVEATS),
        }

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Headings and cells of the table by layer; the last row holds the totals. Counts are per image."""
        headings = [
            "layer", "kind", "shape", "rate", "spikes", "accumulates", "MACs", "ANN MACs", "energy", "ANN energy",
            "dead", "saturated", "max T", "time", "engine",
        ]  # fmt: skip
        t = self.totals
        total = [
            "total", "", "", f"{t['rate']:.1%}", format_count(t["spikes_per_image"]),
            format_count(t["accumulates_per_image"]), format_count(t["multiply_accumulates_per_image"]),
            format_count(t["synapses"]), format_energy(t["energy_pj"]), format_energy(t["ann_energy_pj"]),
            str(t["dead"]), str(t["saturated"]), format_max_T(t["max_T"]), format_duration(t["seconds"]), "",
        ]  # fmt: skip
        return headings, [*(self._cells(row) for row in self.layers), total]

    def _cells(self, row: LayerProfile) -> list[str]:
        """One layer's line of the table. A cell stays empty where the layer has no such figure."""

        def if_any(present: Any, text: str) -> str:
            return text if present else ""

        arriving = row.accumulates_by_step
        return [
            printable(row.name),
            row.kind,
            "x".join(map(str, row.shape)),
            "" if row.rate is None else f"{row.rate:.1%}",
            if_any(row.neurons, format_count(row.spikes / self.images)),
            if_any(arriving, format_count(row.accumulates / self.images)),
            if_any(row.multiply_accumulates, format_count(row.multiply_accumulates / self.images)),
            if_any(row.synapses, format_count(row.synapses)),
            if_any(arriving, format_energy(row.energy_pj)),
            if_any(row.synapses, format_energy(row.ann_energy_pj)),
            if_any(row.neurons, str(row.dead)),
            if_any(row.neurons, str(row.saturated)),
            "" if row.max_T is None else format_max_T(row.max_T),
            format_duration(row.seconds),
            row.engine,
        ]


def is_left_aligned(column: int, columns: int) -> bool:
    """Whether a column of `Record.rows` holds words (the first three and the last) and not numbers."""
    return column < 3 or column == columns - 1


# -------------------------------------------------------------------------------------- figures as text


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """Three digits, in the largest unit that is not above the value."""
    scale, unit = next(((s, u) for s, u in units if value >= s), units[-1])
    shown = value / scale
    digits = 0 if shown >= 100 else 1 if shown >= 10 else 2
    return f"{shown:.{digits}f}{unit}"


def format_count(value: float) -> str:
    """A number of operations with three digits: 1.23M."""
    return f"{value:.0f}" if value < 1000 else _scaled(value, [(1e9, "G"), (1e6, "M"), (1e3, "k")])


def format_energy(picojoules: float) -> str:
    return _scaled(picojoules, [(1e9, " mJ"), (1e6, " uJ"), (1e3, " nJ"), (1, " pJ")])


def format_duration(seconds: float) -> str:
    return _scaled(seconds, [(1, " s"), (1e-3, " ms"), (1e-6, " us")])


def format_max_T(max_T: int) -> str:  # noqa: N802 - T is the field's name
    return "any" if max_T == UNBOUNDED_T else str(max_T)
