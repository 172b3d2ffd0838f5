"""A study's results as a table, as plots and as one HTML page; all from results.json (sweep.py).

accuracy.*    right answers by T, a line for each mode, the ANN dashed
latency.*     right answers against time per image, the ANN's forms as points: what a line has to beat lies up left
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_text_atomically, written_atomically
from ..network.schema import printable
from .html import BLUE, GREY, INK, ORANGE, document, drawing, escape, framed, new_figure, percent_axis
from .profiling.record import format_count, format_duration
from .sweep import interval

COLOURS = {"plain": GREY, "offset": BLUE, "masked": "#0f8b8d", "signed": "#7b4bb3", "sum": ORANGE}
STYLES = {16: "-", 8: "--", 24: ":"}
Results = Mapping[str, Any]
HEADINGS = ("T", "neurons", "bits", "right", "+-", "as ANN", "firing", "SynOps", "time", "x ANN")


def _cells(results: Results) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, cell in results["cells"].items():
        if "error" not in cell:
            yield name, cell


def _latencies(results: Results) -> tuple[str, Mapping[str, float]]:
    """The smallest batch that was timed, and seconds per image by contender."""
    if not results["latency"]:
        return "", {}
    size = min(results["latency"], key=int)
    return size, results["latency"][size]["seconds"]


def fastest_ann(seconds: Mapping[str, float]) -> float | None:
    """Seconds per image of the fastest float32 form of the ANN."""
    found = [s for name, s in seconds.items() if name.startswith("ANN QCFS fp32")]
    return min(found, default=None)


def rows(results: Results) -> list[list[str]]:
    """The table, a row for each cell and T, in the order of HEADINGS."""
    images, seconds = results["images"], _latencies(results)[1]
    ann = fastest_ann(seconds)
    table = []
    for name, right in ((n, r["right"]) for n, r in results["ann"].items()):
        time = ann if name == "fp32" else seconds.get(f"ANN QCFS {name}")
        table.append(
            [
                "",
                f"ANN {name}",
                "",
                *_share(right, images),
                _percent(results["ann"][name]["agree"], images),
                "",
                "",
                *_time(time, ann),
            ]
        )
    for name, cell in _cells(results):
        for i, T in enumerate(results["steps"]):
            time = seconds.get(f"{name}, T = {T}")
            operations = cell["accumulates"][i] + cell["multiply_accumulates"][i]
            table.append(
                [
                    str(T), cell["mode"], str(cell["bits"]), *_share(cell["right"][i], images),
                    _percent(cell["agree"][i], images), f"{cell['rate'][i]:.1%}", format_count(operations),
                    *_time(time, ann),
                ]
            )  # fmt: skip
    return table


def _percent(count: int, images: int) -> str:
    return f"{count / images:.2%}"


def _share(right: int, images: int) -> tuple[str, str]:
    low, high = interval(right, images)
    return _percent(right, images), f"{50 * (high - low):.2f}"


def _time(seconds: float | None, ann: float | None) -> tuple[str, str]:
    if seconds is None:
        return "", ""
    return format_duration(seconds), "" if ann is None else f"{seconds / ann:.2f}"


def facts(results: Results) -> list[str]:
    """What the figures are of, for a headline."""
    about = results["network"]
    width = "" if about["width"] == 1 else f" x {about['width']:g}"
    found = [
        f"{about['network']}{width}, L = {about['levels']}, {about['epochs']} passes of training, seed {about['seed']}",
        f"{results['images']} test images of {results['data']}, {'x'.join(map(str, about['shape']))}",
    ]
    if results["latency"]:
        size = _latencies(results)[0]
        where = results["latency"][size]["machine"]
        found.append(f"time at batch {size}: {where['device']}, {where['threads']} threads, {where['kernels']}")
    return found


def text(results: Results) -> str:
    """The table as text of at most 80 columns."""
    body = rows(results)
    widths = [max(len(row[i]) for row in [HEADINGS, *body]) for i in range(len(HEADINGS))]
    lines = []
    for i, row in enumerate([list(HEADINGS), *body]):
        new = i > 0 and row[0] == str(results["steps"][0])
        cells = [c.ljust(w) if j == 1 else c.rjust(w) for j, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append(("\n" if new else "") + "  ".join(cells).rstrip())
    errors = [
        printable(f"{cell['mode']}, {cell['bits']} bits: {line}")
        for cell in results["cells"].values()
        for line in str(cell.get("error", "")).splitlines()
    ]
    notes = [
        "right: share of right answers, +- half its 95 % interval in points; as ANN: same",
        "label as the ANN in float32; SynOps: synaptic operations per image; time: per",
        "image; x ANN: of the fastest float32 form of the ANN",
    ]
    return "\n".join([*map(printable, facts(results)), "", *lines, "", *notes, *errors])


# -------------------------------------------------------------------------------------------- figures


def accuracy_figure(results: Results) -> Any:
    """Right answers by T; of the first number of bits alone, where others would lie on the same lines."""
    figure, axes = new_figure(3.8)
    images, steps = results["images"], results["steps"]
    first = next((cell["bits"] for _, cell in _cells(results)), None)
    for cell in (c for _, c in _cells(results) if c["bits"] == first):
        bounds = [interval(right, images) for right in cell["right"]]
        colour = COLOURS[cell["mode"]]
        axes.plot(
            steps, [100 * r / images for r in cell["right"]], color=colour, ls=STYLES[cell["bits"]], marker="o", ms=3.5,
            label=_label(cell, False),
        )  # fmt: skip
        axes.fill_between(steps, *([100 * b[i] for b in bounds] for i in (0, 1)), color=colour, alpha=0.12, lw=0)
    axes.axhline(100 * results["ann"]["fp32"]["right"] / images, color=INK, ls="--", lw=1, label="ANN")
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [str(T) for T in steps])
    axes.minorticks_off()
    axes.set_xlabel("time steps T")
    axes.set_ylabel("right answers (%)")
    percent_axis(axes)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def latency_figure(results: Results) -> Any:
    """Right answers against time per image; None where nothing was timed."""
    size, seconds = _latencies(results)
    if not seconds:
        return None
    figure, axes = new_figure(3.8)
    images, several = results["images"], len({cell["bits"] for _, cell in _cells(results)}) > 1
    for name, cell in _cells(results):
        points = [
            (1e3 * seconds[f"{name}, T = {T}"], 100 * right / images, T)
            for T, right in zip(results["steps"], cell["right"], strict=True)
            if f"{name}, T = {T}" in seconds
        ]
        colour = COLOURS[cell["mode"]]
        axes.plot(
            [p[0] for p in points], [p[1] for p in points], color=colour, ls=STYLES[cell["bits"]], marker="o", ms=3.5,
            label=_label(cell, several),
        )  # fmt: skip
        if cell["bits"] == 16 and cell["mode"] in ("plain", "offset"):
            for x, y, T in points:
                axes.annotate(str(T), (x, y), (0, 5), textcoords="offset points", fontsize=7, color=colour, ha="center")
    for dtype, marker in (("fp32", "s"), ("bf16", "D")):
        times = [s for n, s in seconds.items() if n.startswith(f"ANN QCFS {dtype}")]
        if times and dtype in results["ann"]:
            share = 100 * results["ann"][dtype]["right"] / images
            axes.plot([1e3 * min(times)], [share], marker, color=INK, ms=5, ls="none", label=f"ANN {dtype}")
            if dtype == "fp32":
                axes.axvline(1e3 * min(times), color=INK, ls="--", lw=0.8)
                axes.axhline(share, color=INK, ls="--", lw=0.8)
    axes.set_xscale("log")
    for write in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        write(lambda value, _: f"{value:g}")
    axes.set_xlabel(f"ms per image at batch {size} (numbers: T)")
    axes.set_ylabel("right answers (%)")
    percent_axis(axes)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _label(cell: Mapping[str, Any], several: bool) -> str:
    """A line's name, with the bits of its weights where a figure has several."""
    mode = "sum (integer ANN)" if cell["mode"] == "sum" else cell["mode"]
    return f"{mode}, {cell['bits']} bits" if several else mode


def write_plots(results: Results, folder: Path, suffixes: Sequence[str] = (".png",)) -> list[Path]:
    """The plots as files; returns their paths."""
    written = []
    with drawing("a study"):
        for name, figure in (("accuracy", accuracy_figure(results)), ("latency", latency_figure(results))):
            for suffix in suffixes if figure is not None else ():
                path = folder / f"{name}{suffix}"
                with written_atomically(path) as temporary:
                    figure.savefig(temporary, format=suffix[1:], dpi=150)
                written.append(path)
    return written


def write_page(results: Results, path: Path) -> None:
    """One self-contained HTML page."""
    with drawing("the HTML page of a study"):
        figures = framed(
            "figure-accuracy", accuracy_figure(results), "Accuracy by T", "Bands: 95 % confidence intervals."
        )
        if (latency := latency_figure(results)) is not None:
            figures += framed(
                "figure-latency", latency, "Accuracy against time per image",
                "Dashed: the ANN in float32, its fastest form. What lies up left of the crossing beats it.",
            )  # fmt: skip

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=left' if i == 1 else ''}>{escape(c)}</{tag}>" for i, c in enumerate(row))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows(results))
    table = f'<table class="rows"><thead><tr>{cells("th", HEADINGS)}</tr></thead><tbody>{body}</tbody></table>'
    reasons = [str(c["error"]).split("\n") for c in results["cells"].values() if "error" in c]
    errors = "".join(f"<li>{'<br>'.join(map(escape, lines))}</li>" for lines in reasons)
    about = "".join(
        f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>"
        for k, v in {**results["network"], "weights (sha256)": results["weights"]}.items()
    )
    write_text_atomically(
        path,
        document(
            "Accuracy and latency of a spiking network",
            facts(results),
            f"""<div class="figures">{figures}</div>
<section><h2>All figures</h2><p class="quiet">right: share of right answers, with half of its 95 % confidence interval
(Wilson) in points; as ANN: same label as the ANN in float32; SynOps: synaptic operations per image; time: per image;
x ANN: of the fastest float32 form of the ANN.</p>
<div class="scroll">{table}</div>
{f"<ul>{errors}</ul>" if errors else ""}</section>
<section><h2>The network</h2><table class="plain">{about}</table></section>""",
        ),
    )


def markdown(results: Results) -> str:
    """Right answers (and agreement with the ANN) in %, a row for each mode and bits, a column for each T."""
    images, steps = results["images"], results["steps"]
    lines = [
        "| neuron, bits | " + " | ".join(f"T = {T}" for T in steps) + " |",
        "| --- |" + " ---: |" * len(steps),
    ]
    for _, cell in _cells(results):
        shares = zip(cell["right"], cell["agree"], strict=True)
        cells = [f"{100 * right / images:.1f} ({100 * agree / images:.1f})" for right, agree in shares]
        lines.append(f"| {cell['mode']}, {cell['bits']} | " + " | ".join(cells) + " |")
    right = results["ann"]["fp32"]["right"]
    low, high = (100 * bound for bound in interval(right, images))
    return "\n".join([f"ANN {100 * right / images:.1f} % ({low:.1f} to {high:.1f}).", "", *lines])
