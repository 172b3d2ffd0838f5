"""What a result file of the benchmark says: tables, plots, and the part of the README that holds both.

A table has a line per contender and a column per case. The plots are latency by T, by batch and by network, and memory
by T. Only what was measured is drawn; contenders that did not run are listed with their reason.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...files import written_atomically
from ...network.schema import printable
from .measure import NOT_MEASURED, TAIL
from .results import on_other_threads

Case = Mapping[str, Any]

# The curves of the plots: name, the contenders of which the fastest counts, colour, marker. The ANN's is the fastest of
# its forms, with either activation, eager or compiled. A peer's is the faster of float32 and bfloat16.
SERIES: tuple[tuple[str, str, str, str], ...] = (
    ("qcfs_fast 16-bit", r"qcfs_fast 16-bit.*", "#c1121f", "o"),
    ("qcfs_fast 8-bit", r"qcfs_fast 8-bit.*", "#f4845f", "o"),
    ("qcfs_fast 24-bit", r"qcfs_fast 24-bit.*", "#780000", "o"),
    ("qcfs_fast offset 16-bit", r"qcfs_fast offset 16-bit.*", "#7b2cbf", "o"),
    ("qcfs_fast offset 8-bit", r"qcfs_fast offset 8-bit.*", "#9d4edd", "o"),
    ("integer ANN 8-bit", r"qcfs_fast integer ANN 8-bit.*", "#c77dff", "o"),
    ("ANN fp32, fastest form", r"ANN .*fp32.*", "#6c757d", "s"),
    ("ANN bf16, fastest form", r"ANN .*bf16.*", "#adb5bd", "s"),
    ("T-loop fp32", r"T-loop fp32.*", "#1d3557", "^"),
    ("T-loop bf16", r"T-loop bf16.*", "#457b9d", "^"),
    ("SpikingJelly", r"SpikingJelly.*", "#2a9d8f", "D"),
    ("snnTorch", r"snnTorch.*", "#8ab17d", "v"),
)
README_COLUMNS = {  # what the README shows of them
    "ours, 16-bit": r"qcfs_fast 16-bit.*",
    "ours, 8-bit": r"qcfs_fast 8-bit.*",
    "ours, offset 16-bit": r"qcfs_fast offset 16-bit.*",
    "ours, integer ANN": r"qcfs_fast integer ANN 8-bit.*",
    "ANN fp32": r"ANN .*fp32.*",
    "ANN bf16": r"ANN .*bf16.*",
    "T-loop": r"T-loop.*",
    "SpikingJelly": r"SpikingJelly.*",
    "snnTorch": r"snnTorch.*",
}
MEMORY = "most memory allocated in a call (MiB)"
MARK = "<!-- benchmark: written by `make readme-figures` -->", "<!-- end of benchmark -->"


def title(case: Case) -> str:
    """A case in words."""
    if case["kind"] == "layer":
        return f"{case['name']}, T = {case['T']}{on_other_threads(case)}"
    named = ", ".join((*_network_and_size(case["name"]), f"batch {case['batch']}", f"T = {case['T']}"))
    return named + on_other_threads(case)


def _network_and_size(name: str) -> tuple[str, str]:
    network, size = name.rsplit(" ", 1)
    return network, f"{size} px"


def fastest(case: Case, pattern: str, key: str = "seconds") -> float | None:
    """The least figure among the contenders whose names match; None if none was measured."""
    rows = [r for n, r in case["contenders"].items() if re.fullmatch(pattern, n) and r.get(key) is not None]
    return min((float(r[key]) for r in rows), default=None)


def utilisation(data: Mapping[str, Any], case: Case, bits: int) -> str:
    """Dense int8 products per second of ours as a share of the processor's measured peak."""
    peak = data["peak"]["int8 macs per second"]
    seconds = fastest(case, rf"qcfs_fast {bits}-bit.*")
    if isinstance(peak, str) or seconds is None or "threads" in case:  # the peak is that of the machine's threads
        return NOT_MEASURED
    return f"{case['macs'] * (bits // 8) / seconds / peak:.0%}"


def conditions(data: Mapping[str, Any]) -> str:
    """The machine and the versions, in one line."""
    m = data["machine"]
    v = m["versions"]
    kernels = m["kernels"] if isinstance(m["kernels"], str) else m["kernels"].get("in use")
    return (
        f"{m['device']}, {m['threads']} threads, kernels {kernels}; torch {v['torch']}, SpikingJelly "
        f"{v['spikingjelly']}, snnTorch {v['snntorch']}"
    )


def unmeasured(data: Mapping[str, Any]) -> list[str]:
    """One line per contender and reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for case in data["cases"]:
        for name, row in case["contenders"].items():
            if "error" in row:
                reasons.setdefault((name, re.sub(r"about \d+ s", "too long", row["error"])), []).append(title(case))
    return [f"{name}: {NOT_MEASURED} ({reason}); {len(where)} cases" for (name, reason), where in reasons.items()]


# ------------------------------------------------------------------------------------------------ table


def tables(data: Mapping[str, Any]) -> list[Any]:
    """A rich table per network, one for all layers, and one of the latencies at batch 1."""
    cases = data["cases"]
    names = dict.fromkeys(c["name"] for c in cases if c["kind"] == "network")
    groups = [[c for c in cases if c["kind"] == "network" and c["name"] == n] for n in names]
    layers = [c for c in cases if c["kind"] == "layer"]
    alone = [
        c
        for g in groups
        for c in g
        if (c["batch"], c["T"]) == (1, 4) and max(map(len, _spread(c).values()), default=0) > 1
    ]
    return [_table(data, group) for group in [*groups, layers] if group] + ([_latencies(alone)] if alone else [])


def _text(name: str) -> str:
    """A text of the file as rich shows it: without its markup, and as one line."""
    from rich.markup import escape

    return escape(printable(name))


def _table(data: Mapping[str, Any], cases: Sequence[Case]) -> Any:
    """Milliseconds (median), and how many times as long as ours in 16 bits."""
    from rich.table import Table

    kind, name = cases[0]["kind"], title(cases[0]).split(", batch")[0]
    result = Table(
        title=f"{_text(name) if kind == 'network' else 'single layers, batch 1'}: milliseconds, and times our 16-bit "
        "weights",
        title_justify="left",
        caption=f"medians of calls in turns; - not measured; {_text(conditions(data))}",
        caption_justify="left",
    )
    result.add_column("contender", no_wrap=True)
    for case in cases:
        text = (
            f"batch {case['batch']}\nT = {case['T']}" if kind == "network" else _text(case["name"]).replace(" ", "\n")
        )
        result.add_column(text + on_other_threads(case).replace(", ", "\n"), justify="right")
    names = list(dict.fromkeys(n for c in cases for n in c["contenders"]))
    best = [min((r["seconds"] for r in c["contenders"].values() if "seconds" in r), default=0) for c in cases]
    for name in names:
        cells = []
        for case, least in zip(cases, best, strict=True):
            row, ours = case["contenders"].get(name, {}), fastest(case, r"qcfs_fast 16-bit.*")
            if "seconds" not in row:
                cells.append("-")
                continue
            text = _milliseconds(row["seconds"])
            if ours is not None and not name.startswith("qcfs_fast 16-bit"):
                text += f" x{row['seconds'] / ours:.2f}"
            cells.append(f"[bold]{text}[/]" if row["seconds"] == least else text)
        result.add_row(_text(name), *cells)
    result.add_section()
    result.add_row("firing rate", *(f"{c['firing rate']:.1%}" for c in cases))
    for bits in (16, 8):
        result.add_row(f"share of int8 peak, {bits}-bit", *(utilisation(data, c, bits) for c in cases))
    for bits in (16, 8):
        shares = [c["contenders"].get(f"qcfs_fast {bits}-bit", {}).get("outside") for c in cases]
        if any(share is not None for share in shares):
            result.add_row(f"outside the native call, {bits}-bit", *("-" if s is None else f"{s:.1%}" for s in shares))
    if kind == "network":
        live = [c["live bytes"] for c in cases]
        result.add_row("activations, float32 / ours", *(f"{b['float32'] / b['qcfs_fast']:.0f}" for b in live))
    return result


def _spread(case: Case) -> dict[str, list[float]]:
    """By contender the median and the percentiles that its readings can tell."""
    rows = {n: r for n, r in case["contenders"].items() if "seconds" in r}
    return {n: [r[key] for key in ("seconds", *TAIL) if key in r] for n, r in rows.items()}


def _latencies(cases: Sequence[Case]) -> Any:
    """Latencies at batch 1 and T = 4: a line per contender, a column per network."""
    from rich.table import Table

    heading = f"batch 1, T = 4: milliseconds, {' / '.join(('median', *TAIL))}"
    result = Table(
        title=heading,
        title_justify="left",
        min_width=len(heading),
        caption="a percentile is shown where a hundredth (p99) or a tenth (p90) of the readings is one at least",
        caption_justify="left",
    )
    result.add_column("contender", no_wrap=True)
    for case in cases:
        text = "\n".join(map(_text, _network_and_size(case["name"]))) + on_other_threads(case).replace(", ", "\n")
        result.add_column(text, justify="right")
    spreads = [_spread(case) for case in cases]
    for name in dict.fromkeys(n for found in spreads for n in found):
        result.add_row(_text(name), *(" / ".join(map(_milliseconds, found.get(name, []))) or "-" for found in spreads))
    return result


def _milliseconds(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


# ------------------------------------------------------------------------------------------------ plots


def plots(data: Mapping[str, Any], folder: Path, suffixes: Sequence[str] = (".png", ".svg")) -> list[Path]:
    """Draw what the file has cases for; returns the files written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: Any = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "grid.color": "#e5e5e5",
        "axes.axisbelow": True,
        "svg.hashsalt": "qcfs_fast",  # the same figures make the same file
    }
    cases = [c for c in data["cases"] if c["kind"] == "network" and "threads" not in c]
    written: list[Path] = []
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(style):
        for name, draw in (
            ("latency-by-T", partial(_along, along="T", what="latency (ms)", scale=1e3)),
            ("latency-by-batch", partial(_along, along="batch", what="time per image (ms)", scale=1e3, per="batch")),
            ("latency-by-network", _latency_by_network),
            ("memory-by-T", partial(_along, along="T", what=MEMORY, scale=2.0**-20, key="allocated")),
        ):
            figure = draw(plt, cases)
            if figure is None:
                continue
            figure.text(0.01, 0.005, conditions(data), fontsize=6.5, color="#777777", va="bottom")
            for suffix in suffixes:
                path = folder / f"{name}{suffix}"
                metadata = {"Date": None} if suffix == ".svg" else {"Software": None}
                with written_atomically(path) as temporary:
                    figure.savefig(temporary, format=suffix.removeprefix("."), dpi=160, metadata=metadata)
                written.append(path)
            plt.close(figure)
    return written


def _panels(plt: Any, titles: Sequence[str], what: str, height: float = 3.4) -> tuple[Any, list[Any]]:
    """A figure of panels, three in a row, with room for the conditions below."""
    columns = min(3, len(titles))
    rows = -(-len(titles) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(5.2, 3.7 * columns), 0.5 + height * rows), squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(rect=(0, 0.035 / rows, 1, 1 - 0.035 / rows))
    panels = list(axes.flat)
    for axis in panels[len(titles) :]:
        axis.remove()
    for axis, text in zip(panels, titles, strict=False):
        axis.set_title(text)
        axis.grid(axis="y")
    for row in axes:
        row[0].set_ylabel(what)
    return figure, panels[: len(titles)]


def _curves(axis: Any, points: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """One curve per contender, on logarithmic axes."""
    for name, _, colour, marker in SERIES:
        if points.get(name):
            x, y = zip(*points[name], strict=True)
            wide = 2.2 if name.startswith("qcfs_fast") else 1.3
            axis.plot(x, y, color=colour, marker=marker, markersize=4.5, linewidth=wide, label=name,
                      zorder=3 if wide > 2 else 2)  # fmt: skip
    axis.set_yscale("log")
    values = sorted({x for p in points.values() for x, _ in p})
    axis.set_xscale("log", base=2)
    axis.set_xticks(values, [f"{v:g}" for v in values])
    axis.xaxis.minorticks_off()
    _plain_ticks(axis.yaxis)


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10, ... on a logarithmic axis."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(10, (1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False, fontsize=8)


def _series(cases: Sequence[Case], along: str, scale: float, key: str = "seconds", per: str = "") -> dict[str, Any]:
    """Points (case[along], figure) of each contender; `per` divides a figure by that entry of its case."""
    points: dict[str, list[tuple[float, float]]] = {}
    for name, pattern, _, _ in SERIES:
        for case in cases:
            value = fastest(case, pattern, key)
            if value is not None:
                points.setdefault(name, []).append((case[along], scale * value / (case[per] if per else 1)))
    return points


def _along(
    plt: Any, cases: Sequence[Case], along: str, what: str, scale: float, key: str = "seconds", per: str = ""
) -> Any:
    """A panel per network: curves along T at batch 1, or along the batch at T = 4."""
    fixed, value, tail, label = {
        "T": ("batch", 1, "batch 1", "time steps T"),
        "batch": ("T", 4, "T = 4", "images per batch"),
    }[along]
    panels: dict[str, list[Case]] = {}
    for case in cases:
        if case[fixed] == value:
            panels.setdefault(case["name"], []).append(case)
    panels = {n: sorted(group, key=lambda c: c[along]) for n, group in panels.items() if len(group) > 1}
    if not panels:
        return None
    titles = [", ".join((*_network_and_size(name), tail)) for name in panels]
    figure, axes = _panels(plt, titles, what)
    for axis, group in zip(axes, panels.values(), strict=True):
        _curves(axis, _series(group, along, scale, key, per))
        axis.set_xlabel(label)
    _legend(figure, axes[0])
    return figure


def _latency_by_network(plt: Any, cases: Sequence[Case]) -> Any:
    """One row per network and batch, one mark per contender; ours is the line at 1."""
    chosen = [c for c in cases if c["T"] == 4 and fastest(c, r"qcfs_fast 16-bit.*")]
    if not chosen:
        return None
    figure, (axis,) = _panels(plt, ["Latency at T = 4, as a multiple of qcfs_fast 16-bit"], "", 1.9 + 0.5 * len(chosen))
    figure.set_figwidth(7.4)
    axis.grid(axis="y", color="#bbbbbb", linewidth=0.8)
    axis.grid(axis="x")
    for name, pattern, colour, marker in SERIES:
        found = [(fastest(c, pattern), fastest(c, SERIES[0][1]), row) for row, c in enumerate(chosen)]
        points = [(value / ours, row) for value, ours, row in found if value is not None and ours is not None]
        if points:
            x, y = zip(*points, strict=True)
            axis.scatter(
                x, y, s=46, color=colour, marker=marker, label=name, zorder=3, edgecolor="white", linewidth=0.6
            )
    axis.axvline(1, color=SERIES[0][2], linewidth=1.2, zorder=1)
    axis.set_xscale("log")
    _plain_ticks(axis.xaxis)
    times = [f"{_milliseconds(fastest(c, SERIES[0][1]) or 0)} ms" for c in chosen]
    labels = [f"{title(c).removesuffix(', T = 4')} ({t})" for c, t in zip(chosen, times, strict=True)]
    axis.set_yticks(range(len(chosen)), labels)
    axis.set_ylim(len(chosen) - 0.5, -0.5)
    axis.set_xlabel("left of 1: faster than qcfs_fast 16-bit (whose time is in brackets)")
    _legend(figure, axis)
    return figure


# ----------------------------------------------------------------------------------------------- README


def markdown(data: Mapping[str, Any], images: str) -> str:
    """The README's section: a table at T = 4 with the smallest and the largest batch of each network, and a picture."""
    networks = [c for c in data["cases"] if c["kind"] == "network" and c["T"] == 4 and "threads" not in c]
    batches: dict[str, list[int]] = {}
    for case in networks:
        batches.setdefault(case["name"], []).append(case["batch"])
    cases = [c for c in networks if c["batch"] in (min(batches[c["name"]]), max(batches[c["name"]]))]
    lines = [
        f"| milliseconds at T = 4 | {' | '.join(README_COLUMNS)} |",
        "|" + " --- |" + " ---: |" * len(README_COLUMNS),
    ]
    for case in cases:
        times = {name: fastest(case, pattern) for name, pattern in README_COLUMNS.items()}
        ours = times["ours, 16-bit"]
        cells = [title(case).replace(", T = 4", "").replace(" px, batch", ", batch")]
        for name, value in times.items():
            text = NOT_MEASURED if value is None else _milliseconds(value)
            if value is not None and ours is not None and name != "ours, 16-bit":
                text += f" (x{value / ours:.2f})"
            cells.append(text)
        lines.append(f"| {' | '.join(cells)} |")
    rates = sorted(case["firing rate"] for case in cases)
    notes = (
        f"Measured on {conditions(data)}. In brackets: times our 16-bit network. Firing rates are {rates[0]:.1%} to "
        f"{rates[-1]:.1%}. Medians of calls in turns; weights random, thresholds calibrated; BatchNorm folded, "
        "channels_last. The fastest form of each contender counts: the ANN with ReLU or QCFS, eager or under "
        "torch.compile; the T-loop in float32 or bfloat16, eager or compiled; the peers in float32 or bfloat16. "
        "[docs/benchmarks.md](docs/benchmarks.md) has the method and more figures."
    )
    wrapped = textwrap.fill(notes, 119, break_long_words=False, break_on_hyphens=False)
    return "\n".join([*lines, "", wrapped, "", f"![Latency by time steps T]({images}/latency-by-T.png)", ""])
