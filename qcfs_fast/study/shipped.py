"""What comes along with the package: a small trained network and test images of Fashion-MNIST (10 kinds of clothing).

They serve the demo, the pages and the tests, so that these show a real task in seconds and without a download. The
folder fashion/ holds model.safetensors (written by `qcfs-fast train`), images.npz (the first test images, uint8) and
provenance.json: the command, the source, the licence and the checksums of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..conversion.builder import convert
from ..files import written_atomically
from ..network.snn import SNN
from .data import Arrays
from .datasets import FASHION_CLASSES
from .html import drawing
from .trained import Trained, load_trained

FOLDER = Path(__file__).with_name("fashion")
STEPS = (1, 2, 4, 8)
MODES = ("plain", "offset", "sum")


def network() -> tuple[nn.Module, Trained]:
    """The trained network, in eval mode, and what its file says of it."""
    return load_trained(FOLDER / "model.safetensors")


def images() -> Arrays:
    """The test images, as the network takes them."""
    about = network()[1]
    with np.load(FOLDER / "images.npz", allow_pickle=False) as file:
        return Arrays(Path("fashion-mnist"), file["images"], file["labels"], about.mean, about.std, about.shape[-1])


def answers() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Labels [N], the ANN's answers [N], and by mode the spiking network's answers after each of STEPS [steps, N]."""
    model, _ = network()
    data = images()
    x, labels = data.batch(range(len(data)))
    with torch.no_grad():
        ann = model(x).argmax(1)
    found = {}
    for mode in MODES:
        snn = convert(model, T=max(STEPS), neuron=mode, progress=False)
        found[mode] = torch.stack([_answer(snn, x, T) for T in STEPS])
    return labels, ann, found


def _answer(snn: SNN, x: Tensor, T: int) -> Tensor:
    return torch.cat([snn(part, T).argmax(1) for part in x.split(100)])


def table(labels: Tensor, ann: Tensor, found: Mapping[str, Tensor]) -> str:
    """Right answers by T and mode, beside the ANN's; less than 80 columns."""
    about = network()[1]
    lines = [
        f"Fashion-MNIST, {len(labels)} test images; {about.network}, width {about.width:g}, L = {about.levels}.",
        f"The ANN is right on {_share(ann == labels)}. The spiking network, converted without more training:",
        "",
        f"{'T':>3}" + "".join(f"{mode:>10}" for mode in found),
    ]
    for i, T in enumerate(STEPS):
        lines.append(f"{T:3}" + "".join(f"{_share(a[i] == labels):>10}" for a in found.values()))
    return "\n".join([*lines, "", "plain: the paper's neuron; offset: initial potentials shifted; sum: integer ANN"])


def _share(right: Tensor) -> str:
    return f"{float(right.float().mean()):.1%}"


def picture(labels: Tensor, found: Mapping[str, Tensor], path: Path, shown: Sequence[int] | None = None) -> None:
    """Images with the answers of plain and offset neurons after each of STEPS; wrong ones are red."""
    data = images()
    plain = found["plain"]
    if shown is None:  # those on which steps matter most, and no class twice
        changes = (plain != labels).sum(0) + (plain[-1] == labels) + (found["offset"] == labels).sum(0)
        seen: set[int] = set()
        order, shown = changes.argsort(descending=True, stable=True).tolist(), []
        for i in order:
            if int(labels[i]) not in seen and len(seen) < 8:
                seen.add(int(labels[i]))
                shown.append(i)
    rows = [(mode, T) for mode in ("plain", "offset") for T in STEPS]
    with drawing("the picture"):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(1.25 * len(shown) + 1, 4.6))
        axes: Any = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(-1, len(shown)), ylim=(-len(rows) * 0.24 - 0.45, 1.25))
        axes.axis("off")
        for column, i in enumerate(shown):
            axes.imshow(
                data.images[i, 0], cmap="gray_r", extent=(column + 0.05, column + 0.95, 0.1, 1.0), aspect="auto"
            )
            axes.text(column + 0.5, 1.1, FASHION_CLASSES[int(labels[i])], ha="center", fontsize=9, weight="bold")
        for row, (mode, T) in enumerate(rows):
            y = -0.1 - 0.24 * row - (0.2 if mode == "offset" else 0)
            axes.text(-0.06, y, f"{mode}, T = {T}", ha="right", va="center", fontsize=9)
            for column, i in enumerate(shown):
                answer = int(found[mode][STEPS.index(T), i])
                colour = "#1a7f37" if answer == int(labels[i]) else "#c62828"
                axes.text(column + 0.5, y, FASHION_CLASSES[answer], ha="center", va="center", fontsize=8, color=colour)
        axes.set_xlim(-1, len(shown))
        axes.set_ylim(-len(rows) * 0.24 - 0.45, 1.25)
        with written_atomically(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
