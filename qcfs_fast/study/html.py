"""What the HTML pages share: one self-contained file, its style and its figures (SVG) inside.

A page has no script and makes no request, so it can be mailed and archived.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape as without_tags
from typing import Any

from ..network.schema import printable

BLUE, ORANGE, GREY, INK, FAINT = "#2166c4", "#d4680f", "#9aa4b2", "#1c2430", "#e3e7ed"
WIDTH = 5.0  # inches of a figure in a column of the page
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "path.simplify": False,
    "svg.hashsalt": "qcfs_fast",
}


def escape(text: str) -> str:
    """Text of others, such as a layer's name, in a page: it makes no tag, and nothing in it is invisible."""
    return without_tags(printable(text))


def new_figure(height: float, width: float = WIDTH) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


@contextmanager
def drawing(what: str) -> Iterator[None]:
    """Matplotlib in the style of the pages; ImportError says that `what` needs it."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"{what} draws its figures with matplotlib: pip install 'qcfs-fast[report]'") from error
    with matplotlib.rc_context(STYLE):
        yield


def percent_axis(axes: Any) -> None:
    """No room above 100 %."""
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, min(top, 100 + 0.04 * (100 - bottom)))


def image(name: str, figure: Any, alt: str) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    data = base64.b64encode(out.getvalue()).decode("ascii")
    return f'<img id="{name}" alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}">'


CSS = """
:root { --ink: #1c2430; --quiet: #5a6675; --line: #dfe4ea; --paper: #ffffff; --ground: #f4f6f9; --accent: #2166c4; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 48px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 16px; margin: 0 0 4px; }
p { margin: 0 0 8px; }
.quiet, figcaption { color: var(--quiet); font-size: 13px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin: 20px 0; }
.card, figure, section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; }
.card { padding: 14px 16px; }
.card b { display: block; font-size: 24px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card span { color: var(--quiet); font-size: 13px; display: block; }
.figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px; align-items: start; }
figure { margin: 0; padding: 14px 16px; }
figure.wide { grid-column: 1 / -1; }
figure img { display: block; width: 100%; height: auto; margin-top: 8px; }
section { padding: 14px 16px; margin-top: 12px; }
.scroll { overflow-x: auto; margin-top: 8px; }
table { border-collapse: collapse; font-size: 12px; white-space: nowrap; font-variant-numeric: tabular-nums; }
.layers, .rows { width: 100%; }
th, td { padding: 4px 5px; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--quiet); }
.left { text-align: left; }
.layers tbody tr:last-child td { font-weight: 600; border-bottom: 0; }
.layers tbody tr:hover td { background: var(--ground); }
.layers th:first-child, .layers td:first-child { position: sticky; left: 0; background: var(--paper); }
.plain td:first-child { color: var(--quiet); }
.plain td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
ul { margin: 0; padding-left: 20px; }
li { margin-bottom: 6px; }
@media (max-width: 760px) {
  main { padding: 20px 12px 32px; }
  .figures { grid-template-columns: minmax(0, 1fr); }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px; }
  .card { padding: 10px 12px; }
  .card b { font-size: 19px; }
  figure, section { padding: 12px; }
}
@media print { body { background: none; } figure, section, .card { break-inside: avoid; } }
"""


def framed(name: str, figure: Any, title: str, caption: str, kind: str = "") -> str:
    """A figure with title and caption; kind "wide" takes the page's whole width."""
    return (
        f'<figure class="{kind}"><h2>{escape(title)}</h2><figcaption>{escape(caption)}</figcaption>'
        f"{image(name, figure, title)}</figure>"
    )


def document(title: str, facts: Sequence[str], body: str) -> str:
    """The whole page; `body` is HTML already."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{CSS}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="quiet">{" &middot; ".join(map(escape, facts))}</p>
{body}
</main>
</body>
</html>
"""
