"""How far a converted network is from the model it was made of: layer by layer, on the same spikes.

The spikes of the converted network are forced upon the float64 simulation of the model (model/simulation.py), so each
layer reads what it reads in the converted network, and no difference spreads. What a layer then fires otherwise is its
own rounding, about one spike in 1e5 with 16-bit weights; a fault of lowering moves whole channels.

convert ends with `self_check`, which compares more than spikes. The membrane potential of a plain neuron that started
at theta/2 and the spikes that it fired give the current that it integrated over all steps,

    sum_t I[t]  =  v[T-1] + theta * count - theta/2

and so does the simulation, for the same inputs. In each channel both must agree up to the rounding of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..backend.packing import packed_weights
from ..errors import ConversionError
from ..model.simulation import Simulation, simulate
from ..network.layers import EncodingLayer, Layer, Run, SpikingLayer, pieces
from ..network.recording import trace
from ..network.snn import SNN
from ..network.state import State
from ..operators import masks
from ..operators.limits import IMAGE_RANGE, MAX_WEIGHT

STEPS = 2  # of the self-check
SIGMAS = 16.0  # a sum of rounding errors, over that of as many independent ones: weights of a channel may be alike
SHARE = 0.02  # a current may be off by this much of its layer's whatever the rounding says


class LayerDifference(NamedTuple):
    """Spikes of a layer that differ from float64 on the same inputs, spikes compared, and spikes fired."""

    differing: int
    compared: int
    fired: int


def layer_differences(model: nn.Module, snn: SNN, x: Tensor, T: int) -> dict[str, LayerDifference]:
    """The differences by layer, for images [N, ...] as `snn` takes them, in plain mode."""
    spikes = trace(snn, x, T)
    meant = cast(Simulation, simulate(model, x, T, spikes=True, force=spikes)).spikes
    return {
        k: LayerDifference(int((s != meant[k].reshape(s.shape)).sum()), s.numel(), int(s.sum()))
        for k, s in spikes.items()
    }


def share(found: dict[str, LayerDifference]) -> float:
    """Of all spikes compared, those that differ."""
    return sum(d.differing for d in found.values()) / max(1, sum(d.compared for d in found.values()))


def self_check(
    model: nn.Module,
    snn: SNN,
    shape: Sequence[int],
    step_bias: Mapping[str, Tensor] | None,
    errors: Mapping[str, np.ndarray],
) -> None:
    """Raise ConversionError where a channel of any layer integrates something else than in the model.

    Args:
        model: what was converted.
        snn: what came of it.
        shape: of an image, without the batch, that both take.
        step_bias: as convert takes it.
        errors: of the layers whose weights were rounded to make up for the errors of others, and not each to its
            nearest (QuantizedLayer.error).
    """
    steps = min([STEPS, *(int(d["max_T"]) for d in snn.details.values())])
    x = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
    spikes: dict[str, Tensor] = {}
    state = State(x.shape)
    run = Run(steps, state=state)

    def watch(name: str, layer: Layer, value: Any) -> None:
        if pieces(name, layer) or isinstance(layer, (EncodingLayer, SpikingLayer)):
            spikes[name] = snn.as_given(_channels_first(masks.unpack(value, steps)[:steps]))
        packed_weights.forget(layer.buffers())

    answer = snn.answered(snn._execute(x, run, watch), x.shape, False)
    snn.forget_runs()
    device = next((t.device for t in model.parameters()), x.device)
    meant = simulate(
        model,
        x.to(device),
        steps,
        spikes=True,
        force={name: s.to(device) for name, s in spikes.items()},
        step_bias=step_bias,
    )
    assert isinstance(meant, Simulation)
    while meant.membranes:  # let go one by one
        name, before_reset = meant.membranes.popitem(last=False)
        own = meant.spikes[name][:-1].sum(0).cpu()  # the simulation's own; its last potential is not reset
        own, last = (t.reshape(spikes[name].shape[1:]) for t in (own, before_reset[-1].cpu()))  # a map, if flattened
        layers = {part: snn.layers[part] for part in pieces(name, snn.layers[name]) or [name]}
        theta = torch.tensor([v for part in layers for v in snn.details[part]["theta"]], dtype=torch.float64)
        exact = _by_channel(last / _over(theta, own) + own)
        at = 0
        for part, layer in layers.items():
            left = snn.as_given(_channels_first(state.of(layer)["state"]))[0]
            found = _by_channel(left / _over(layer.threshold, left) + spikes[part].sum(0))
            here = exact[at : at + len(found)]
            off = _beyond_rounding(layer, found, here, steps, float(x.abs().max()), errors.get(part))
            if bool((off > 0).any()):
                c = int(off.argmax())
                raise _fault(f"{part}: channel {c} integrates {off[c]:.2g} thresholds too much or too little")
            at += len(found)
    for found, by_step in zip(pytree.tree_leaves(answer), pytree.tree_leaves(meant.output), strict=True):
        wanted = by_step[-1].cpu().to(found.dtype)  # where it may be too large
        off = torch.tensor(torch.inf)
        if found.shape == wanted.shape:
            off = torch.where(found == wanted, 0.0, (found - wanted).abs()).max()
        if not bool(off <= SHARE * (1e-3 + wanted.abs().max())):
            raise _fault(f"an output is off by {off:.2g}, for answers of up to {wanted.abs().max():.2g}")


def _beyond_rounding(
    layer: Layer, found: Tensor, exact: Tensor, steps: int, brightest: float, error: np.ndarray | None
) -> Tensor:
    """By how much the currents [C, values] of a layer differ beyond what their rounding explains, in thresholds [C]."""
    if cast(Any, layer).analog is not None:  # which is cut far away
        found, exact = (t.clamp(-IMAGE_RANGE // 2, IMAGE_RANGE // 2) for t in (found, exact))
    allowed, coarse = _rounding(layer, brightest, error)
    usual = (exact - 0.5).square().mean().sqrt()
    bound = torch.maximum(SIGMAS * steps * allowed, (SHARE + 8 * coarse) * usual) + 1e-9
    return (found - exact).square().mean(1).sqrt() - bound


def _fault(what: str) -> ConversionError:
    return ConversionError(
        f"{what}. This is a fault of qcfs_fast, not of the model: please report it, with the model's forward. "
        "convert(..., check=False) leaves this check out"
    )


def _channels_first(x: Tensor) -> Tensor:
    """[.., N, H, W, C] -> [.., N, C, H, W]; [.., N, C] stays."""
    return x.movedim(-1, -3) if x.dim() == 5 else x


def _over(channels: Tensor, x: Tensor) -> Tensor:
    return channels.cpu().to(torch.float64).reshape(-1, *[1] * (x.dim() - 2))


def _by_channel(x: Tensor) -> Tensor:
    """[N, C, ...] -> [C, values]."""
    return x.transpose(0, 1).flatten(1)


def _rounding(layer: Layer, brightest: float, error: np.ndarray | None) -> tuple[Tensor, Tensor]:
    """What a step's rounding errors add up to if they are independent, in thresholds, and the grid's step as a share of
    the largest weight; both [C]. `brightest` is the largest pixel.
    """
    n = layer.threshold.to(torch.float64)
    square, largest, step = torch.full_like(n, 0.25), torch.zeros_like(n), 1.0

    def add(weight: Tensor, error: float | Tensor) -> None:
        nonlocal square
        square = square + weight[..., 0].numel() * (error / 2) ** 2

    if isinstance(layer, SpikingLayer):
        for source in layer.sources():
            step = 256.0 if source.weight.dtype == torch.int8 else 1.0
            add(source.weight, step * source.peak)
            low, high = source.weight.reshape(-1, n.numel()).aminmax(dim=0)
            largest = torch.maximum(largest, torch.maximum(high.double(), -low.double()) * step)
        for residual in layer.residuals():
            add(residual.amplitude[None], float(residual.peak))
    if error is not None:
        square = torch.from_numpy(error).square()
    analog = cast(Any, layer).analog
    if analog is not None:
        add(analog.weight, layer.gain * brightest)
    return square.sqrt() / n, step / torch.where(largest > 0, largest, float(MAX_WEIGHT))
