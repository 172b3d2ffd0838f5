"""The neuron's modes in floating point: what each of them means, in units of the threshold theta.

A layer hands over the input currents of all its steps and gets back the spikes of all steps. The modes differ in how
they come to the count that QCFS wants, clip(floor((sum_t I[t] + theta/2) / theta), 0, T). A plain neuron misses it
where current arrives unevenly: it fires early and cannot take the spike back, so its membrane potential ends below 0,
or it runs out of steps, so that it ends at theta or above.

    plain    Bu et al., ICLR 2022, equations 1 to 3, with the initial membrane potential theta/2 of section 4.3
    offset   an initial potential that makes the plain run gain or lose one spike (COS: Hao et al., ICLR 2023)
    masked   neurons that a first run leaves at 0 or below stay silent (SRP: Hao et al., AAAI 2023)
    signed   a neuron below 0 takes a spike back by a negative one
             (Fast-SNN: Hu et al., TPAMI 2023; SNM: Wang et al., IJCAI 2022)
    sum      all currents at once: the count itself. This is the QCFS network with T levels, not a spiking one

Offset and masked neurons look at the first `window` steps before the first one counts.

Currents are [S, ...] for S steps. The threshold is a tensor that broadcasts over one step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# As in operators/neuron.py and limits.py: this floor imports nothing of the integer network that it is compared with.
MODES = ("plain", "offset", "masked", "signed", "sum")
LOOKS_AHEAD = ("offset", "masked")
MAX_WINDOW = 8
MAX_ITERATIONS = 8


class Fired(NamedTuple):
    """What neurons did: spikes and membrane potentials before each reset [S, ...], and the potential at the end [...].

    Spikes are bool; of signed neurons int8 (-1, 0, 1); in sum mode int64 counts [1, ...].
    """

    spikes: Tensor
    membranes: Tensor
    end: Tensor


def fire(currents: Tensor, theta: Tensor, mode: str, window: int, iterations: int) -> Fired:
    """The spikes of every mode but sum, whose neurons count and do not fire."""
    if mode == "offset":
        return plain(currents, theta, offset_start(currents[:window], theta, iterations))
    if mode == "masked":
        keep = plain(currents[:window], theta).end > 0
        spikes, membranes, end = plain(currents, theta)
        return Fired(spikes & keep, membranes, end)
    return signed(currents, theta) if mode == "signed" else plain(currents, theta)


def plain(currents: Tensor, theta: Tensor, start: Tensor | None = None) -> Fired:
    """Integrate; fire at v >= theta; soft reset. From `start`, or from theta/2."""
    v = theta / 2 if start is None else start
    spikes, membranes = [], []
    for current in currents:
        v = v + current
        membranes.append(v)
        spikes.append(v >= theta)
        v = v - theta * spikes[-1]
    return Fired(torch.stack(spikes), torch.stack(membranes), v)


def offset_start(currents: Tensor, theta: Tensor, iterations: int) -> Tensor:
    """The initial potentials of offset neurons, from the currents of their window.

    What remains of the currents after a run, r = v_end - v_start + theta/2, should lie in [0, theta):

        r < 0, some spike       lower the start until the spike with the least potential A falls below theta
        r >= theta, some pause  raise the start until the pause with the largest potential B reaches theta

    but by theta at least, because a smaller shift might be made up for at another step. The integer network puts A one
    unit below theta, and B at it. Here both go one unit beyond theta, and the unit is theta times 2^-26 in float64,
    half of its bits: far above what sums round by and far below what currents differ by. So rounding undoes no shift.
    """
    bits = -int(math.log2(torch.finfo(theta.dtype).eps))
    unit = theta * 2.0 ** -(bits // 2)
    start = (theta / 2).expand(currents.shape[1:])
    for _ in range(iterations):
        spikes, membranes, end = plain(currents, theta, start)
        remainder = end - start + theta / 2
        lowest = membranes.where(spikes, torch.inf).amin(0)
        highest = membranes.where(~spikes, -torch.inf).amax(0)
        lower = (remainder < 0) & spikes.any(0)
        raised = (remainder >= theta) & ~spikes.all(0)
        start = torch.where(lower, start - torch.maximum(theta, lowest - theta + unit), start)
        start = torch.where(raised, start + torch.maximum(theta, theta - highest + unit), start)
    return start


def signed(currents: Tensor, theta: Tensor) -> Fired:
    """As plain; a neuron below 0 whose spikes so far have a positive sum sends -1, which adds theta."""
    v = theta / 2
    sent = torch.zeros(currents.shape[1:], dtype=torch.int64, device=currents.device)
    spikes, membranes = [], []
    for current in currents:
        v = v + current
        membranes.append(v)
        spikes.append((v >= theta).to(torch.int8) - ((v < 0) & (sent > 0)).to(torch.int8))
        sent = sent + spikes[-1]
        v = v - theta * spikes[-1]
    return Fired(torch.stack(spikes), torch.stack(membranes), v)


def count(mean: Tensor, theta: Tensor, T: int) -> Fired:
    """Sum mode: clip(floor((T * mean + theta/2) / theta), 0, T) for a mean current [1, ...] of T steps.

    The operations are those of :func:`qcfs`, in its order, so that even rounding is that of the QCFS network.
    """
    total = T * mean + theta / 2
    counts = torch.floor(torch.clamp(mean / theta, 0, 1) * T + 0.5)
    return Fired(counts.to(torch.int64), total, total[0] - theta * counts[0])
