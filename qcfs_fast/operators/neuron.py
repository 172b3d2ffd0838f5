"""The modes of the neuron: what happens at the end of a layer, after its currents are known.

The products of a layer, the expensive part, are the same in every mode. In integers, for a neuron with threshold n and
currents I[0] .. I[T-1]; plain is the paper's own neuron, the other modes win back what it loses at few time steps.
QCFS wants the count clip(floor((sum I + n/2) / n), 0, T). A plain neuron misses it where current arrives unevenly: it
fires early and cannot take a spike back, or it runs out of steps.

    plain    v = n/2; at each step v += I[t], fire and subtract n where v >= n (Bu et al., ICLR 2022)
    offset   a first run over `window` steps finds what the plain neuron gets wrong; the run that counts starts from an
             initial potential shifted so that one spike more or fewer comes of it (COS: Hao et al., ICLR 2023)
    masked   a first run over `window` steps; a neuron that ends it at v <= 0 stays silent (SRP: Hao et al., AAAI 2023)
    signed   a neuron below 0 that has sent more positive spikes than negative ones sends a negative one and adds n
    sum      all currents at once: count = clip(floor((sum I + n/2) / n), 0, T). This is the QCFS network itself with T
             levels, as an integer network

The exact rules stand in csrc/core/contract.h. As an operand of an operator a mode is three ints: its index in MODES,
then window and iterations (offset, masked), or the number of levels (sum), or zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

from .limits import MAX_COUNT, MAX_ITERATIONS, MAX_WINDOW
from .masks import planes

MODES = ("plain", "offset", "masked", "signed", "sum")
PLAIN = (0, 0, 0)


def state_rows(mode: str) -> int:
    """int32 values that a neuron carries from call to call: its membrane potential, and what a signed one has sent.

    0 where the mode has no state: offset, masked and sum look at later steps before the first.
    """
    return {"plain": 1, "signed": 2}.get(mode, 0)


def mask_planes(mode: str, T: int) -> int:
    """Planes of a layer's result."""
    return 2 * planes(T) if mode == "signed" else planes(T)


def checked_neuron(op: str, neuron: Sequence[int], T: int) -> str:
    """The mode of an operand; ValueError where its ints do not fit."""

    def require(condition: bool, what: str) -> None:
        if not condition:
            raise ValueError(f"qcfs_fast::{op}: {what}, got neuron={list(neuron)} at T={T}")

    require(len(neuron) == 3 and 0 <= neuron[0] < len(MODES), f"neuron must be three ints, the first below {len(MODES)}")
    mode, (_, window, iterations) = MODES[neuron[0]], neuron
    if mode in ("offset", "masked"):
        require(1 <= window <= min(T, MAX_WINDOW), f"the window must have 1 to {MAX_WINDOW} steps and no more than T")
        most = MAX_ITERATIONS if mode == "offset" else 1
        require(1 <= iterations <= most, f"{mode} takes 1 to {most} iterations")
    elif mode == "sum":
        require(1 <= window <= MAX_COUNT and iterations == 0, f"sum takes 1 to {MAX_COUNT} levels")
        require(T == 1, "in sum mode inputs are totals, one plane of counts (T=1)")
    else:
        require(window == iterations == 0, f"{mode} takes no window")
    return mode
