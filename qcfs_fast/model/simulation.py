"""simulate: the SNN step by step in plain PyTorch, as the usual simulators run it.

In float64 it defines the correct result, with which the integer network is compared: the prepared model itself, its
activations replaced by integrate-and-fire neurons, called T times. Source: Bu et al., ICLR 2022, equations 1 to 3, with
the initial membrane potential theta/2 of its section 4.3.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .graph import call_sites, evaluating, symbolic_trace
from .qcfs import is_qcfs, over_channels


class Simulation(NamedTuple):
    """output [T, N, classes]; spikes per site, bool [T, N, C, H, W]; membranes before reset, same shape."""

    output: Tensor
    spikes: OrderedDict[str, Tensor]
    membranes: OrderedDict[str, Tensor]


class IF(nn.Module):
    """Integrate-and-fire neuron with soft reset; starts at theta/2, fires at v >= theta, amplitude theta."""

    def __init__(self, threshold: Tensor, record: bool) -> None:
        super().__init__()
        self.threshold: Tensor
        self.register_buffer("threshold", threshold)
        self.record = record
        self.forced: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        self.v: Tensor | None = None
        self.spikes: list[Tensor] = []
        self.membranes: list[Tensor] = []
        self.t = 0

    def forward(self, x: Tensor) -> Tensor:
        theta = over_channels(self.threshold, x)
        v = theta / 2 + x if self.v is None else self.v + x
        fired = v >= theta
        if self.record:
            self.spikes.append(fired)
            self.membranes.append(v)
        self.v = v - theta * fired
        out = fired if self.forced is None else self.forced[self.t]
        self.t += 1
        return theta * out


def step_network(
    model: nn.Module, dtype: torch.dtype = torch.float64, record: bool = False
) -> tuple[nn.Module, dict[str, IF]]:
    """A copy of the model in eval mode with every QCFS call site its own IF neuron, and the neurons by name.

    Call it T times on the same input and average; reset the neurons before the next input.
    """
    with evaluating(model):
        gm = copy.deepcopy(symbolic_trace(model)).to(dtype)
    gm._forward_pre_hooks.clear()
    neurons: dict[str, IF] = {}
    for i, (name, node, module) in enumerate(list(call_sites(gm))):
        if not is_qcfs(module):
            continue
        neurons[name] = IF(module.thresh.detach().reshape(-1).clone(), record)
        gm.add_submodule(f"_if_{i}", neurons[name])
        node.target = f"_if_{i}"
    gm.delete_all_unused_submodules()
    gm.recompile()
    return gm.eval(), neurons


def simulate(
    model: nn.Module,
    x: Tensor,
    T: int,
    dtype: torch.dtype = torch.float64,
    spikes: bool = False,
    force: Mapping[str, Tensor] | None = None,
) -> Tensor | Simulation:
    """Simulate the spiking network of a prepared model, one step at a time.

    Args:
        model: the model that convert() takes. It is not changed.
        x: images [N, C, H, W] (or [N, features]), presented as the same current at every step.
        T: time steps.
        dtype: arithmetic of the simulation; float64 defines the correct result, float32 is what simulators usually run.
        spikes: also return spikes and membranes per layer.
        force: spikes by site name, as :func:`qcfs_fast.trace` returns them. Each layer then reads these instead
            of what its neighbours fired, so that layers can be compared one by one on the same input.

    Returns:
        [T, N, classes]: running means of the output after each step, as ``snn(x, per_step=True)``; with
        ``spikes`` a :class:`Simulation`.
    """
    if isinstance(T, bool) or not isinstance(T, int) or T < 1:
        raise ValueError(f"simulate: T must be a positive int (time steps), got {T!r}")
    network, neurons = step_network(model, dtype, record=spikes)
    if force is not None:
        missing = sorted(set(neurons) - set(force))
        if missing:
            raise ValueError(f"simulate: force has no spikes for {', '.join(missing)}")
        for name, neuron in neurons.items():
            neuron.forced = force[name].to(dtype).contiguous()  # models may call view
    x = x.to(dtype)
    outputs = []
    with torch.no_grad():
        total: Tensor | None = None
        for t in range(T):
            y = network(x)
            total = y if total is None else total + y
            outputs.append(total / (t + 1))
    output = torch.stack(outputs)
    if not spikes:
        return output
    return Simulation(
        output,
        OrderedDict((n, torch.stack(m.spikes)) for n, m in neurons.items()),
        OrderedDict((n, torch.stack(m.membranes)) for n, m in neurons.items()),
    )
