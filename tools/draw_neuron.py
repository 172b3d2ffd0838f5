"""Draws docs/images/neuron.svg: the neuron over eight steps, and why its count is the QCFS activation.

    python tools/draw_neuron.py [FOLDER]

On the left the neuron is not sketched: its recursion is run on a constant current. On the right the spike counts over T
steps, for many currents, lie on the staircase of the activation with L = T.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RED, BLUE, GREY = "#c1121f", "#1d3557", "#8d99ae"


def run(current, T):
    """Membranes before the reset and spikes of one neuron with threshold 1."""
    v, before, spikes = 0.5, [], []
    for _ in range(T):
        v = v + current
        before.append(v)
        spikes.append(v >= 1)
        v = v - spikes[-1]
    return np.array(before), np.array(spikes)


def draw_membrane(axis, current, T):
    before, spikes = run(current, T)
    after = before - spikes
    start = np.concatenate([[0.5], after[:-1]])
    for t in range(T):
        axis.plot([t, t + 0.55], [start[t], before[t]], color=BLUE, linewidth=1.8, solid_capstyle="round")
        if spikes[t]:
            arrow = {"arrowstyle": "-|>", "color": RED, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
            axis.annotate("", (t + 0.55, after[t]), (t + 0.55, before[t]), arrowprops=arrow)
        axis.plot([t + 0.55, t + 1], [after[t]] * 2, color=BLUE, linewidth=1.8)
        axis.plot(t + 0.55, before[t], "o", color=RED if spikes[t] else BLUE, markersize=5, zorder=3)
        axis.text(t + 0.55, -0.21, "1" if spikes[t] else "0", ha="center", color=RED if spikes[t] else GREY,
                  family="monospace", weight="bold")  # fmt: skip
    axis.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axis.text(T, 1.02, r"threshold $\theta$", ha="right", va="bottom", color="#555555")
    axis.text(-0.08, 0.5, r"$\theta/2$", ha="right", va="center", color="#555555")
    byte = sum(1 << t for t in range(T) if spikes[t])
    axis.text(T / 2, -0.4, f"spikes: bits 0 to {T - 1} of one byte, 0x{byte:02x}", ha="center", color="#555555")
    axis.set_xlim(-0.1, T + 0.05)
    axis.set_ylim(-0.45, 1.5)
    axis.set_xticks(np.arange(T) + 0.55, [f"{t}" for t in range(T)])
    axis.tick_params(length=0)
    axis.set_yticks([])
    axis.set_title(rf"membrane $v$, current $I = {current:g}\,\theta$ at every step", loc="left", weight="bold")
    axis.set_xlabel("step t")


def draw_staircase(axis, T):
    z = np.linspace(-0.2, 1.3, 1501)
    staircase = np.clip(np.floor(z * T + 0.5) / T, 0, 1)
    axis.plot(z, np.clip(z, 0, 1), color=GREY, linewidth=1, linestyle="--", label="clipped ReLU")
    axis.plot(z, staircase, color=BLUE, linewidth=1.8, label=f"QCFS, L = {T}")
    some = np.linspace(-0.16, 1.26, 30)
    axis.plot(some, [run(c, T)[1].mean() for c in some], "o", color=RED, markersize=4.5, label=f"spikes / T, T = {T}")
    axis.set_xlabel(r"current $z / \theta$")
    axis.set_title(r"mean output over T steps, in $\theta$", loc="left", weight="bold")
    axis.legend(frameon=False, loc="upper left")
    axis.set_ylim(-0.06, 1.25)


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "docs" / "images"
    style = {"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False,
             "svg.hashsalt": "qcfs_fast"}  # fmt: skip
    with plt.rc_context(style):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(1.45, 1), layout="constrained")
        draw_membrane(left, 0.3, 8)
        draw_staircase(right, 4)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / "neuron.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
