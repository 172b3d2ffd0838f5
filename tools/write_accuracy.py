"""Write the tables and plots of docs/accuracy.md, and the README's three numbers, from the studies in docs/studies.

    python tools/write_accuracy.py

Each study is results.json of `qcfs-fast study` under its own name. The page has a place for each,
<!-- study NAME --> ... <!-- end -->; what stands between is replaced. Studies of networks that differ in their seed
alone have one together, <!-- seeds NAME NAME ... --> ... <!-- end -->: mean, lowest and highest. The README's place is
<!-- numbers NAME --> ... <!-- end -->; it stays as it is where that study has not been timed.
"""

import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from qcfs_fast.study import sweep_page

ROOT = Path(__file__).resolve().parent.parent
PLACE = r"(<!-- (study|seeds|numbers) ([\w -]+) -->\n).*?(<!-- end -->)"


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


def numbers(name: str, results: dict[str, Any]) -> str:
    """Accuracy kept, and speed at batch 1 against the loop over T and against the ANN, of one network and machine."""
    timed, cells, images = results["latency"]["1"], results["cells"], results["images"]
    seconds, where = timed["seconds"], timed["machine"]
    plain, offset = (next(n for n in cells if n.startswith(mode)) for mode in ("plain", "offset"))

    def right(cell: str) -> str:
        return " / ".join(f"{100 * count / images:.1f}" for count in cells[cell]["right"])

    def faster(other: str, cell: str, T: int) -> str:
        least = min(s for n, s in seconds.items() if re.fullmatch(other, n))
        return f"{least / seconds[f'{cell}, T = {T}']:.1f}"

    about, ann = results["network"], 100 * results["ann"]["fp32"]["right"] / images
    loop, network = "T-loop fp32( compiled)?, T = 4", "ANN QCFS fp32( compiled)?"
    steps = " / ".join(map(str, results["steps"]))
    points = [
        f"**Accuracy kept.** The network that ships ({about['network']} x {about['width']:g}, L = {about['levels']}) "
        f"on all {images:,} test images of Fashion-MNIST, ANN {ann:.1f} %: plain neurons give {right(plain)} % at T = "
        f"{steps}, offset neurons {right(offset)} % ([accuracy](docs/accuracy.md)).",
        f"**Against the loop over T** in PyTorch, T = 4, batch 1: plain neurons are {faster(loop, plain, 4)} times as "
        f"fast, offset neurons {faster(loop, offset, 4)} times.",
        f"**Against the ANN itself**, batch 1: offset neurons at T = 2 are {faster(network, offset, 2)} times as fast, "
        f"plain neurons at T = 4 {faster(network, plain, 4)} times.",
    ]
    times = (
        f"Times: {where['device']}, {where['threads']} threads, kernels {where['kernels']}, torch "
        f"{where['versions']['torch']}, all in turns; loop and ANN in float32, eager or compiled, whichever is faster; "
        "weights of 16 bits. Command: `make study-latency`. Larger networks: [how fast](#how-fast)."
    )
    wrap = {"width": 119, "break_long_words": False, "break_on_hyphens": False}
    bullets = [textwrap.fill(point, initial_indent="* ", subsequent_indent="  ", **wrap) for point in points]
    picture = f"![Accuracy against time per image, at batch 1](docs/images/{name}-latency.png)"
    return "\n".join([*bullets, "", textwrap.fill(times, **wrap), "", picture])


def written(page: str, folder: Path) -> str:
    """The page with its tables as the studies say."""

    def table(place: re.Match[str]) -> str:
        results = [json.loads((folder / f"{name}.json").read_text()) for name in place[3].split()]
        if place[2] == "numbers":
            if not results[0]["latency"]:
                return place[0]
            text = numbers(place[3], results[0])
        else:
            text = seeds(results) if place[2] == "seeds" else sweep_page.markdown(results[0])
        return f"{place[1]}\n{text}\n\n{place[4]}"

    return re.sub(PLACE, table, page, flags=re.S)


def main() -> None:
    for page in (ROOT / "docs" / "accuracy.md", ROOT / "README.md"):
        page.write_text(written(page.read_text(), ROOT / "docs" / "studies"))
    for name in sys.argv[1:]:  # studies whose plots the pages show
        results = json.loads((ROOT / "docs" / "studies" / f"{name}.json").read_text())
        folder = ROOT / "docs" / "images"
        for path in sweep_page.write_plots(results, folder):
            path.replace(folder / f"{name}-{path.name}")


if __name__ == "__main__":
    main()
