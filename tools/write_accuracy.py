"""Write the tables and plots of docs/accuracy.md from the studies in docs/studies.

    python tools/write_accuracy.py

Each study is results.json of `qcfs-fast study` under its own name. The page has a place for each,
<!-- study NAME --> ... <!-- end -->; what stands between is replaced. Studies of networks that differ in their seed
alone have one together, <!-- seeds NAME NAME ... --> ... <!-- end -->: mean, lowest and highest.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from qcfs_fast.study import sweep_page

ROOT = Path(__file__).resolve().parent.parent
PLACE = r"(<!-- (study|seeds) ([\w -]+) -->\n).*?(<!-- end -->)"


def seeds(results: list[dict[str, Any]]) -> str:
    """Right answers in %: mean (lowest to highest) over studies, for what all of them have."""
    first = results[0]
    steps = [T for T in first["steps"] if all(T in r["steps"] for r in results)]
    names = [name for name in first["cells"] if all(name in r["cells"] for r in results)]

    def row(name: str, right: list[list[int]]) -> str:
        shares = [[100 * n / r["images"] for n, r in zip(column, results, strict=True)] for column in right]
        cells = [f"{sum(c) / len(c):.1f} ({min(c):.1f} to {max(c):.1f})" for c in shares]
        return f"| {name} | " + " | ".join(cells) + " |"

    lines = ["| neuron | " + " | ".join(f"T = {T}" for T in steps) + " |", "| --- |" + " ---: |" * len(steps)]
    for name in names:
        right = [[r["cells"][name]["right"][r["steps"].index(T)] for r in results] for T in steps]
        lines.append(row(name.removesuffix(", 16 bits"), right))
    ann = [100 * r["ann"]["fp32"]["right"] / r["images"] for r in results]
    return "\n".join([f"ANN {sum(ann) / len(ann):.1f} % ({min(ann):.1f} to {max(ann):.1f}).", "", *lines])


def written(page: str, folder: Path) -> str:
    """The page with its tables as the studies say."""

    def table(place: re.Match[str]) -> str:
        results = [json.loads((folder / f"{name}.json").read_text()) for name in place[3].split()]
        text = seeds(results) if place[2] == "seeds" else sweep_page.markdown(results[0])
        return f"{place[1]}\n{text}\n\n{place[4]}"

    return re.sub(PLACE, table, page, flags=re.S)


def main() -> None:
    page = ROOT / "docs" / "accuracy.md"
    page.write_text(written(page.read_text(), ROOT / "docs" / "studies"))
    for name in sys.argv[1:]:  # studies whose plots the pages show
        results = json.loads((ROOT / "docs" / "studies" / f"{name}.json").read_text())
        folder = ROOT / "docs" / "images"
        for path in sweep_page.write_plots(results, folder):
            path.replace(folder / f"{name}-{path.name}")


if __name__ == "__main__":
    main()
