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
from dataclasses import dataclass

from .limits import MAX_COUNT, MAX_ITERATIONS, MAX_WINDOW
from .masks import planes

MODES = ("plain", "offset", "masked", "signed", "sum")
PLAIN = (0, 0, 0)
LOOKS_AHEAD = ("offset", "masked")


@dataclass(frozen=True)
class Neuron:
    """The neuron that all layers of a network have.

    Args:
        mode: one of MODES.
        window: steps that offset and masked look ahead, 1 to 8. Other modes do not use it.
        iterations: first runs of offset, each from the initial potential that the one before it found.
    """

    mode: str = "plain"
    window: int = 4
    iterations: int = 1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"neuron must be one of {', '.join(MODES)}; got {self.mode!r}")
        for name, value, most in (("window", self.window, MAX_WINDOW), ("iterations", self.iterations, MAX_ITERATIONS)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"neuron: {name} must be an int, got {value!r}")
            if not 1 <= value <= most:
                raise ValueError(f"neuron: {name} must be from 1 to {most}, got {value}")
        if self.iterations != 1 and self.mode != "offset":
            raise ValueError(f"neuron: only offset mode takes several iterations, not {self.mode}")

    @property
    def looks_ahead(self) -> bool:
        return self.mode in LOOKS_AHEAD

    @property
    def causal(self) -> bool:
        """Whether a step depends on no later one: such a neuron has a state, from which a call can go on."""
        return self.mode in ("plain", "signed")

    @property
    def shift(self) -> tuple[int, int]:
        """Window and iterations of the first runs that shift the initial potential, for the overflow bound."""
        return (self.window, self.iterations) if self.mode == "offset" else (0, 0)

    def steps(self, T: int) -> int:
        """Steps that layers compute for an answer after T: a whole window, or one pass of totals."""
        if self.mode == "sum":
            return 1
        return max(T, self.window) if self.looks_ahead else T

    def operand(self, T: int) -> list[int]:
        """This neuron as an operand of conv2d_if."""
        more = (self.window, self.iterations) if self.looks_ahead else (T, 0) if self.mode == "sum" else (0, 0)
        return [MODES.index(self.mode), *more]

    def __str__(self) -> str:
        text = f"{self.mode} (window {self.window}" + (f", {self.iterations} iterations" if self.iterations > 1 else "")
        return text + ")" if self.looks_ahead else self.mode


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

    require(
        len(neuron) == 3 and 0 <= neuron[0] < len(MODES), f"neuron must be three ints, the first below {len(MODES)}"
    )
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
