"""How far a converted network is from the model it was made of: layer by layer, on the same spikes.

The spikes of the converted network are forced upon the float64 simulation of the model (model/simulation.py), so each
layer reads what it reads in the converted network, and no difference spreads. What a layer then fires otherwise is its
own rounding, about one spike in 1e5 with 16-bit weights; a fault of lowering moves whole channels.
"""

from __future__ import annotations

from typing import NamedTuple, cast

from torch import Tensor, nn

from ..model.simulation import Simulation, simulate
from ..network.recording import trace
from ..network.snn import SNN


class LayerDifference(NamedTuple):
    """Spikes of a layer that differ from float64 on the same inputs, spikes compared, and spikes fired."""

    differing: int
    compared: int
    fired: int


def layer_differences(model: nn.Module, snn: SNN, x: Tensor, T: int) -> dict[str, LayerDifference]:
    """The differences by layer, for images [N, ...] as `snn` takes them, in plain mode."""
    spikes = trace(snn, x, T)
    meant = cast(Simulation, simulate(model, x, T, spikes=True, force=spikes)).spikes
    return {k: LayerDifference(int((s != meant[k]).sum()), s.numel(), int(s.sum())) for k, s in spikes.items()}


def share(found: dict[str, LayerDifference]) -> float:
    """Of all spikes compared, those that differ."""
    return sum(d.differing for d in found.values()) / max(1, sum(d.compared for d in found.values()))
