"""The whole journey on real data, from training to a plot, in about a minute on two cores.

First, in seconds, a network that ships (shipped.py) recognises clothing, by T and by mode of its neurons.

Then a small VGG-like network with a residual block and QCFS activations is trained on scikit-learn's digits (1797
scans of handwritten digits, 8x8, which ship inside that package) and converted, and compared by T: accuracy beside the
ANN's, agreement with the float64 simulation, firing rate, and time per image. A report (qcfs_fast.profile) adds
synaptic operations, energy and time by layer, and accuracy against mean steps when each image stops as soon as its
answer is clear.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .. import backend
from ..conversion.builder import convert
from ..files import written_atomically
from ..model.qcfs import QCFS
from ..model.simulation import simulate, step_network
from ..network.recording import trace
from ..network.snn import SNN
from . import shipped
from .benchmark.measure import medians
from .profiling.measure import profile
from .profiling.report import Profile
from .spikes import count_differing

STEPS = (1, 2, 4, 8, 16, 32)
LEVELS = 4
THRESHOLD = 2.0  # the paper starts at 8.0 and trains for 300 epochs; a short training starts lower
EPOCHS = 40
REPORT_STEPS = 16


class DigitsNet(nn.Module):
    """Five convolutions, the last two in a residual block; average pools; two linear layers."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()

        def block(cin: int, cout: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), QCFS(LEVELS, THRESHOLD)
            )

        self.stem = nn.Sequential(block(1, width), block(width, width), nn.AvgPool2d(2))
        self.widen = block(width, 2 * width)
        self.residual = nn.Sequential(
            block(2 * width, 2 * width),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
        )
        self.join = QCFS(LEVELS, THRESHOLD)
        self.pool = nn.AvgPool2d(2)
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(8 * width, 128), QCFS(LEVELS, THRESHOLD))
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.widen(self.stem(x))
        x = self.pool(self.join(self.residual(x) + x))
        return self.head(self.hidden(x))


@dataclass(frozen=True)
class Digits:
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits() -> Digits:
    """The scans as float images [N, 1, 8, 8] in 0..1, 1197 to train on and 600 to test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the demo needs scikit-learn, matplotlib and rich: pip install 'qcfs-fast[demo]'") from error
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:-600], order[-600:]
    return Digits(x[train], y[train], x[test], y[test])


def train(data: Digits, epochs: int = EPOCHS, progress: bool = True, seed: int = 0) -> DigitsNet:
    """SGD with momentum 0.9, weight decay 5e-4 and a cosine schedule, as in the paper."""
    torch.manual_seed(seed)
    model = DigitsNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    bar = tqdm(range(epochs), desc="training", unit="epoch", disable=not progress)
    for _ in bar:
        model.train()
        for index in torch.randperm(len(data.train_y)).split(64):
            loss = F.cross_entropy(model(data.train_x[index]), data.train_y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


@dataclass(frozen=True)
class Row:
    """One line of the demo's table; rates and agreements are shares of 1, times are seconds per image."""

    T: int
    accuracy: float
    ann_accuracy: float
    same_label: float
    differing_spikes: float
    firing_rate: float
    snn_time: float
    ann_time: float
    loop_time: float


def evaluate(
    model: nn.Module, snn: SNN, data: Digits, batch: int = 100, rounds: int = 7, progress: bool = True
) -> list[Row]:
    """Accuracy, agreement, firing rate and time for each T of STEPS."""
    x, y = data.test_x, data.test_y
    with torch.no_grad():
        ann_accuracy = float((model(x).argmax(1) == y).float().mean())
    ours = snn(x, T=max(STEPS), per_step=True)
    simulated = simulate(model, x, max(STEPS))  # in float64: the correct result
    assert isinstance(simulated, Tensor)
    loop, neurons = step_network(model, torch.float32)
    rows = []
    for T in tqdm(STEPS, desc="evaluating", unit="T", disable=not progress):
        different, total, fired = 0, 0, 0
        for images in x.split(batch):  # all at once would take gigabytes
            spikes = trace(snn, images, T)
            forced = simulate(model, images, T, spikes=True, force=spikes)
            assert not isinstance(forced, Tensor)
            counted = count_differing(spikes, forced.spikes)
            different, total = different + counted[0], total + counted[1]
            fired += sum(int(s.sum()) for s in spikes.values())

        def run_loop(T: int = T) -> Tensor:
            for neuron in neurons.values():
                neuron.reset()
            return torch.stack([loop(x[:batch]) for _ in range(T)]).mean(0)

        with torch.no_grad():
            calls: dict[str, Callable[[], Any]] = {
                "snn": functools.partial(snn, x[:batch], T),
                "ann": functools.partial(model, x[:batch]),
                "loop": run_loop,
            }
            times = medians(calls, rounds, x.device)
        rows.append(
            Row(
                T=T,
                accuracy=float((ours[T - 1].argmax(1) == y).float().mean()),
                ann_accuracy=ann_accuracy,
                same_label=float((ours[T - 1].argmax(1) == simulated[T - 1].argmax(1)).float().mean()),
                differing_spikes=different / total,
                firing_rate=fired / total,
                snn_time=times["snn"] / batch,
                ann_time=times["ann"] / batch,
                loop_time=times["loop"] / batch,
            )
        )
    return rows


def _table(rows: list[Row]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # ten columns in 80 characters
        pad_edge=False,
        title="Digits by time steps T",
        caption="same label, differing spikes: against the float64 simulation; us: per image, batches of 100",
        title_justify="left",
        caption_justify="left",
    )
    headings = "T SNN ANN same_label differing_spikes firing_rate SNN_us ANN_us loop_us loop/_SNN"
    for heading in headings.split():
        table.add_column(heading.replace("_", "\n"), justify="right")
    for r in rows:
        shares = (f"{r.accuracy:.2%}", f"{r.ann_accuracy:.2%}", f"{r.same_label:.2%}", f"{r.differing_spikes:.0e}")
        times = (f"{1e6 * t:.1f}" for t in (r.snn_time, r.ann_time, r.loop_time))
        table.add_row(str(r.T), *shares, f"{r.firing_rate:.1%}", *times, f"{r.loop_time / r.snn_time:.1f}")
    return table


def _plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot([r.T for r in rows], [100 * r.accuracy for r in rows], marker="o", label="SNN")
    axes.axhline(100 * rows[0].ann_accuracy, color="black", linestyle="--", label=f"ANN (QCFS, L = {LEVELS})")
    axes.set_xscale("log", base=2)
    axes.set_xticks([r.T for r in rows], [str(r.T) for r in rows])
    axes.set_xlabel("time steps T")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title("Digits: accuracy of the converted network by T")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with written_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def report(snn: SNN, data: Digits, T: int = REPORT_STEPS, progress: bool = True) -> Profile:
    """Profile a converted network on the test scans, in batches of 200."""
    batches = list(zip(data.test_x.split(200), data.test_y.split(200), strict=True))
    return profile(snn, batches, T, progress=progress)


def _anytime(p: Profile) -> str:
    """Accuracy against mean steps, as a few lines of text."""
    assert p.anytime is not None
    assert p.accuracy_by_step is not None
    lines = [f"Stopping each image when it is clear (snn.predict, at most {p.T} steps):"]
    for point in p.anytime:
        if point["confidence"] in (0.5, 0.9, 0.99, 0.999):
            lines.append(
                f"  confidence {point['confidence']:<5g}  {point['mean_steps']:5.2f} steps on average, "
                f"accuracy {point['accuracy']:.2%}"
            )
    return "\n".join(
        [*lines, f"  all steps         {p.T:5.2f}                   accuracy {p.accuracy_by_step[-1]:.2%}"]
    )


def demo(
    output: Path = Path("demo-output"), epochs: int = EPOCHS, progress: bool = True, as_json: bool = False
) -> list[Row]:
    """Train, convert and evaluate; print tables and write the network, a plot and a report into the folder `output`."""
    data = digits()
    output.mkdir(parents=True, exist_ok=True)
    if not as_json:
        labels, ann, found = shipped.answers()
        shipped.picture(labels, found, output / "fashion.png")
        print(shipped.table(labels, ann, found), end="\n\n")
        print(f"Wrote {output / 'fashion.png'}. Now from the start, on handwritten digits.", end="\n\n", flush=True)
    model = train(data, epochs, progress)
    snn = convert(model, T=4)
    rows = evaluate(model, snn, data, progress=progress)
    snn.save(output / "digits.safetensors")
    _plot(rows, output / "accuracy.png")
    profiled = report(snn, data, progress=progress)
    profiled.to_html(output / "report.html")
    if as_json:
        print(json.dumps([asdict(r) for r in rows], indent=2))
        return rows
    from rich.console import Console

    print(snn.report(), end="\n\n")
    Console().print(_table(rows))
    print("\n" + _anytime(profiled))
    spikes = trace(snn, data.test_x[:1], 4)
    neurons = sum(s[0].numel() for s in spikes.values())
    print(f"\nKernels: {backend.describe()}, {torch.get_num_threads()} threads.")
    print(f"At T = 4 the spikes of one image take {neurons} bytes as masks,")
    print(f"and {neurons * 4 * 4} as the float32 tensors of a step loop.")
    for name in ("accuracy.png", "report.html", "digits.safetensors"):
        print(f"Wrote {output / name}")
    return rows
