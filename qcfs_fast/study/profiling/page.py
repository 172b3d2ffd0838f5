"""A profile as one self-contained HTML page: the style and the figures (SVG) stand in the file.

The page has no script and makes no request, so it can be mailed and archived. `page(record)` puts together what the
functions before it draw. Each of those takes a record and returns a matplotlib figure, or None where the record has no
data for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import nan
from typing import Any

from ...network.schema import printable
from ..html import BLUE, GREY, INK, ORANGE, WIDTH, document, drawing, escape, framed, new_figure, percent_axis
from .record import (
    CAVEATS,
    RATE_BINS,
    LayerProfile,
    Record,
    format_count,
    format_duration,
    format_energy,
    is_left_aligned,
)

KIND_COLOURS = {"analog": "#0f8b8d", "spiking": BLUE, "readout": "#7b4bb3"}  # input, pools, concatenations: grey


def _whole_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=9, min_n_ticks=1))


def _steps(n: int) -> str:
    return f"{n} step{'' if n == 1 else 's'}"


def accuracy_by_step(p: Record) -> Any:
    """Accuracy after each step; without labels, agreement with the final labels."""
    if p.agreement_by_step is None:
        return None
    figure, axes = new_figure(3.1)
    steps = range(1, len(p.agreement_by_step) + 1)
    marker = "o" if p.T <= 32 else None
    if p.accuracy_by_step is not None:
        axes.plot(steps, [100 * a for a in p.accuracy_by_step], color=BLUE, marker=marker, ms=4, label="accuracy")
    axes.plot(
        steps, [100 * a for a in p.agreement_by_step], color=GREY, marker=marker, ms=3, lw=1, ls="--",
        label=f"same label as after {_steps(p.T)}",
    )  # fmt: skip
    axes.set_xlabel("time steps")
    axes.set_ylabel("images (%)")
    axes.set_xlim(1 - 0.04 * p.T, p.T + 0.04 * p.T)
    percent_axis(axes)
    _whole_ticks(axes.xaxis)
    axes.legend(loc="lower right")
    return figure


def anytime_curve(p: Record) -> Any:
    """Accuracy (or agreement) against mean steps over confidence levels, beside stopping all images together."""
    if p.anytime is None or p.agreement_by_step is None:
        return None
    key = "agreement" if p.accuracy_by_step is None else "accuracy"
    together = p.agreement_by_step if p.accuracy_by_step is None else p.accuracy_by_step
    figure, axes = new_figure(3.1)
    mean_steps, share = [q["mean_steps"] for q in p.anytime], [100 * q[key] for q in p.anytime]
    axes.plot(range(1, p.T + 1), [100 * a for a in together], color=GREY, lw=1, ls="--", label="all stop together")
    axes.plot(mean_steps, share, color=ORANGE, marker="o", ms=4, label="each stops when clear")
    end = max(2.0, 1.12 * max(x for q, x in zip(p.anytime, mean_steps, strict=True) if q["confidence"] < 1))
    shown_at = -1.0
    for q, x, y in reversed(list(zip(p.anytime, mean_steps, share, strict=True))):
        if q["confidence"] in (0.5, 0.9, 0.99, 0.999) and abs(x - shown_at) > 0.06 * end:
            axes.annotate(
                f"{q['confidence']:g}", (x, y), (4, -11), textcoords="offset points", fontsize=8, color=ORANGE
            )
            shown_at = x
    axes.set_xlim(1 - 0.04 * end, end)
    axes.set_xlabel("mean time steps per image (numbers: confidence)")
    axes.set_ylabel("accuracy (%)" if key == "accuracy" else f"same label as after {_steps(p.T)} (%)")
    percent_axis(axes)
    axes.legend(loc="lower right")
    return figure


def _rows_height(n: int) -> float:
    return max(2.0, 0.9 + 0.21 * n)


def _name_rows(axes: Any, rows: Sequence[LayerProfile]) -> None:
    axes.set_yticks(range(len(rows)), [_short(printable(r.name)) for r in rows], parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def _short(name: str, max_length: int = 26) -> str:
    return name if len(name) <= max_length else "..." + name[3 - max_length :]


def time_by_layer(p: Record) -> Any:
    """Microseconds per image, a bar per layer."""
    from matplotlib.patches import Patch

    figure, axes = new_figure(_rows_height(len(p.layers)))
    colours = [KIND_COLOURS.get(r.kind, GREY) for r in p.layers]
    bars = axes.barh(range(len(p.layers)), [1e6 * r.seconds for r in p.layers], color=colours, height=0.7)
    axes.bar_label(bars, [f"{r.seconds / p.totals['seconds']:.0%}" for r in p.layers], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.01)
    _name_rows(axes, p.layers)
    axes.set_xlabel("microseconds per image")
    kinds = [k for k in KIND_COLOURS if any(r.kind == k for r in p.layers)]
    patches = [Patch(color=KIND_COLOURS[k], label=k) for k in kinds] + [Patch(color=GREY, label="input, pool")]
    figure.legend(handles=patches, loc="outside upper right", ncols=4, fontsize=8, handlelength=1)
    return figure


def energy_by_layer(p: Record) -> Any:
    """Picojoules by convention, SNN beside ANN, for the layers that have synapses."""
    rows = [r for r in p.layers if r.accumulates_by_step]
    figure, axes = new_figure(_rows_height(len(rows)))
    places = range(len(rows))
    axes.barh(
        [i - 0.19 for i in places], [r.energy_pj / 1e3 for r in rows], color=BLUE, height=0.36, label=f"SNN, T = {p.T}"
    )
    axes.barh([i + 0.19 for i in places], [r.ann_energy_pj / 1e3 for r in rows], color=GREY, height=0.36, label="ANN")
    axes.invert_yaxis()
    axes.margins(y=0.01)
    _name_rows(axes, rows)
    axes.set_xlabel("arithmetic at 45 nm, nanojoules per image")
    figure.legend(loc="outside upper right", ncols=2, fontsize=8, handlelength=1)
    return figure


def rate_by_layer_and_step(p: Record) -> Any:
    """A map of firing rates: a row per layer, a column per step."""
    rows = [r for r in p.layers if r.neurons]
    figure, axes = new_figure(_rows_height(len(rows)))
    image = axes.imshow(
        [[100 * v for v in r.rate_by_step] for r in rows], aspect="auto", cmap="Blues", vmin=0,
        extent=(0.5, len(rows[0].rate_by_step) + 0.5, len(rows) - 0.5, -0.5), interpolation="nearest",
    )  # fmt: skip
    axes.grid(visible=False)
    _name_rows(axes, rows)
    axes.set_xlabel("time step")
    _whole_ticks(axes.xaxis)
    figure.colorbar(image, ax=axes, label="neurons that fire (%)", pad=0.02)
    return figure


def rate_histogram(p: Record) -> Any:
    """Neurons by firing rate, with those that never or always fire in colours of their own."""
    figure, axes = new_figure(3.1)
    total = p.totals["neurons"]
    bins = [sum(r.rate_histogram[i] for r in p.layers if r.neurons) / total for i in range(RATE_BINS)]
    left = [100 * i / RATE_BINS for i in range(RATE_BINS)]
    wide = 100 / RATE_BINS
    axes.bar(left, [100 * b for b in bins], width=wide, align="edge", color=BLUE, edgecolor="white", lw=0.8)
    dead, saturated = p.totals["dead"] / total, p.totals["saturated"] / total
    axes.bar([0], [100 * dead], width=wide, align="edge", color=GREY, edgecolor="white", label=f"never: {dead:.1%}")
    axes.bar(
        [100 - wide], [100 * saturated], width=wide, align="edge", color=ORANGE, edgecolor="white",
        label=f"at every step of every image: {saturated:.1%}",
    )  # fmt: skip
    axes.set_xlim(0, 100)
    axes.set_xlabel("firing rate of a neuron over all images and steps (%)")
    axes.set_ylabel("neurons (%)")
    axes.legend(loc="upper right", title="fire", alignment="left")
    return figure


def raster(p: Record) -> Any:
    """Spikes of some neurons of one layer, image after image; each step is one dash wide."""
    steps = p.raster["steps"]
    neurons = len(p.raster["neurons"])
    figure, axes = new_figure(min(4.2, 1.2 + 0.035 * neurons), 2 * WIDTH + 0.3)
    x: list[float] = []  # one line with gaps: compact as SVG
    y: list[float] = []
    for n, image in enumerate(steps):
        for i, fired in enumerate(image):
            for t in fired:
                at = n * (p.T + 1) + t
                x += (at + 0.08, at + 0.92, nan)
                y += (i, i, nan)
    axes.plot(x, y, color=INK, lw=1.6 if neurons <= 64 else 1.1, solid_capstyle="butt")
    for n in range(1, len(steps)):
        axes.axvline(n * (p.T + 1) - 0.5, color=GREY, lw=0.8)
    axes.grid(visible=False)
    axes.set_xlim(-0.5, len(steps) * (p.T + 1) - 0.5)
    axes.set_ylim(neurons - 0.2, -0.8)
    axes.set_xticks([n * (p.T + 1) + p.T / 2 for n in range(len(steps))], [f"image {n + 1}" for n in range(len(steps))])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("neuron")
    _whole_ticks(axes.yaxis)
    return figure


# ---------------------------------------------------------------------------------------------- page


def _cards(p: Record) -> str:
    """The main figures, large, at the top."""
    t = p.totals
    cards = []
    if p.accuracy_by_step is not None:
        cards.append((f"{p.accuracy_by_step[-1]:.2%}", f"accuracy after {_steps(p.T)}"))
    cards += [
        (f"{t['rate']:.1%}", f"of {format_count(t['neurons'])} neurons fire per step"),
        (
            format_count(t["accumulates_per_image"]),
            f"accumulates and {format_count(t['multiply_accumulates_per_image'])} MACs per image; the ANN takes "
            f"{format_count(t['synapses'])} MACs",
        ),
        (
            f"{t['energy_pj'] / t['ann_energy_pj']:.2f}",
            f"of the ANN's energy: {format_energy(t['energy_pj'])} to {format_energy(t['ann_energy_pj'])}, arithmetic "
            "alone",
        ),
        (format_duration(t["seconds"]), "per image, the sum over layers"),
        (f"{t['dead']:,}", f"neurons never fired; {t['saturated']:,} fired at every step"),
    ]
    return "".join(f'<div class="card"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in cards)


def _figures(p: Record) -> str:
    """All figures with title and caption."""
    r = p.raster
    labelled = p.accuracy_by_step is not None
    neurons, layer = len(r["neurons"]), r["layer"]
    some = f"{neurons} of {r['of_neurons']} neurons, evenly spaced" if neurons < r["of_neurons"] else "all neurons"
    plots: list[tuple[str, Callable[[Record], Any], str, str, str]] = [
        (
            "figure-accuracy", accuracy_by_step, "",
            "Accuracy by time steps" if labelled else "Settling of the labels",
            "The running answer after each step, all from one pass."
            + ("" if labelled else " No labels were given, so accuracy is not known."),
        ),
        (
            "figure-anytime", anytime_curve, "", "Anytime use",
            "snn.predict stops an image once its softmax margin reaches the confidence.",
        ),
        ("figure-time", time_by_layer, "", "Time by layer", f"Sum {format_duration(p.totals['seconds'])} per image."),
        (
            "figure-energy", energy_by_layer, "", "Energy by layer, as published",
            "0.9 pJ an accumulate, 4.6 pJ a multiply-accumulate; no measurement (see below).",
        ),
        (
            "figure-rates", rate_by_layer_and_step, "", "Firing rate by layer and step",
            "Share of a layer's neurons that fire, over all images.",
        ),
        ("figure-histogram", rate_histogram, "", "Firing rates of single neurons", "All layers together."),
        (
            "figure-raster", raster, "wide", f"Raster of {layer}",
            f"{some[0].upper() + some[1:]}, for the first {len(r['steps'])} images, {_steps(p.T)} each.",
        ),
    ]  # fmt: skip
    parts = []
    for name, draw, kind, title, caption in plots:
        figure = draw(p)
        if figure is not None:
            parts.append(framed(name, figure, title, caption, kind))
    return "".join(parts)


def _layer_table(p: Record) -> str:
    headings, body = p.rows()

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=left' if is_left_aligned(i, len(row)) else ''}>{escape(cell)}</{tag}>"
            for i, cell in enumerate(row)
        )

    rows = "".join(f"<tr>{cells('td', row)}</tr>" for row in body)
    return f'<table class="layers"><thead><tr>{cells("th", headings)}</tr></thead><tbody>{rows}</tbody></table>'


def _method(p: Record) -> list[str]:
    """What each figure means, as sentences."""
    t = p.totals
    once = f"{p.T} times per image" if p.analog_every_step else "once per image, since the image does not change"
    return [
        "Rate: spikes by neurons, steps and images. Spikes and operations are counted from the exact masks of every "
        "image and step, none estimated.",
        "Accumulates: one per spike and synapse it reaches, with borders, strides, groups and dilation as they are. A "
        "spike passes an average pool into every window that covers it. Residual spikes make one each, "
        f"{format_count(t['residual_accumulates_per_image'])} per image in all. The readout is charged per spike.",
        f"MACs: multiply-accumulates of the layer that reads the image, charged {once}. ANN MACs: the same synapses "
        f"visited once; {format_count(t['synapses_with_padding'])} if taps into the padding count, as usual counters "
        "do.",
        f"Membrane updates, not part of the figures: {format_count(t['updates_per_image'])} per image.",
        "Dead and saturated: neurons that never fired, or fired at every step, over all images of this profile.",
        "max T: steps up to which no 32-bit membrane of the layer can overflow, whatever the input.",
        "Time: each batch runs once to count and once more with nothing between two layers but a reading of the "
        "clock; sums by number of images.",
    ]


def page(p: Record) -> str:
    """The whole page as a string.

    Raises:
        ImportError: matplotlib is not installed.
    """
    e = p.environment
    facts = [
        f"T = {p.T}", f"{p.neuron} neurons",
        f"{p.images} images of {'x'.join(map(str, p.image_shape))}", f"{p.weight_bits}-bit weights",
        f"qcfs_fast {e['qcfs_fast']}", str(e.get("kernels", e["device"])), f"{e['threads']} threads",
    ]  # fmt: skip
    with drawing("the HTML report"):
        figures = _figures(p)
    notes = "".join(f"<li>{escape(note)}</li>" for note in _method(p))
    caveats = "".join(f"<li>{escape(note)}</li>" for note in CAVEATS)
    environment = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in e.items())
    return document(
        "Profile of a spiking network",
        facts,
        f"""<div class="cards">{_cards(p)}</div>
<div class="figures">{figures}</div>
<section><h2>Layers</h2><p class="quiet">Counts and energy per image.</p>
<div class="scroll">{_layer_table(p)}</div></section>
<section><h2>How it was counted</h2><ul>{notes}</ul></section>
<section><h2>What the energy figures do not mean</h2><ul>{caveats}</ul>
<p class="quiet">Source of the costs: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC
2014, figure 1.1.9, doi:10.1109/ISSCC.2014.6757323.</p></section>
<section><h2>Environment</h2><table class="plain">{environment}</table></section>""",
    )
