"""Profile: a record that writes itself as a table, as JSON or as one HTML page."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ...files import write_text_atomically
from ...network.anytime import doubling
from .page import page
from .record import Record, format_count, format_energy, is_left_aligned


@dataclass
class Profile(Record):
    """What :func:`profile` returns: the fields of :class:`Record`, and their forms for people and programs."""

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict` to a file."""
        write_text_atomically(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained page with tables and figures.

        Raises:
            ImportError: matplotlib is not installed (pip install 'qcfs-fast[report]').
        """
        write_text_atomically(path, page(self))

    def summary(self) -> str:
        """The main figures in a few sentences."""
        t = self.totals
        mode = "" if self.neuron == "plain" else f", {self.neuron} neurons"
        lines = [
            f"{self.images} images, T = {self.T}{mode}: {t['neurons']} neurons fire at {t['rate']:.1%} of the steps; "
            f"{t['dead']} never fired, {t['saturated']} always did.",
            f"Per image: {format_count(t['accumulates_per_image'])} accumulates and "
            f"{format_count(t['multiply_accumulates_per_image'])} multiply-accumulates, "
            f"{format_energy(t['energy_pj'])}; the ANN {format_count(t['synapses'])} multiply-accumulates, "
            f"{format_energy(t['ann_energy_pj'])} (arithmetic alone, 45 nm; no statement about a CPU or GPU).",
        ]
        shares = self.agreement_by_step if self.accuracy_by_step is None else self.accuracy_by_step
        if shares is not None:
            what = "Accuracy" if self.accuracy_by_step is not None else "Images with their final label (none was given)"
            if len(shares) < self.T:
                lines.append(f"{what} as an integer ANN: {shares[0]:.2%}.")
            else:
                by_step = ", ".join(f"{t}: {shares[t - 1]:.2%}" for t in doubling(self.T))
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
        lines = [
            "  ".join(
                c.ljust(w) if is_left_aligned(i, len(row)) else c.rjust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
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
        table.add_column(heading, justify="left" if is_left_aligned(i, len(headings)) else "right", no_wrap=i == 0)
    for i, row in enumerate(body):
        table.add_row(
            *(Text(c) for c in row), style="bold" if i == len(body) - 1 else "", end_section=i == len(body) - 2
        )
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=max(Console().width, 150)).print(table)
    return out.getvalue()
