"""from_spikingjelly and to_spikingjelly: networks of that library as converted ones, and back.

SpikingJelly (Fang et al., "SpikingJelly: An open-source machine learning infrastructure platform for spike-based
intelligence", Science Advances 2023) runs a network step by step on floats. Its IFNode with v_reset=None is our neuron
but for two things:

    a spike is 1, and here theta     the activation is multiplied by 1/theta, which conversion folds into weights
    v starts at 0, and here theta/2  a bias of v0 - theta/2 at the first step (none for HalfThresholdIFNode)

So each of its nodes becomes a QCFS activation, each of its layers the layer of torch whose subclass it is, and convert
does the rest. A neuron that is called twice in a step would integrate twice, which no converted neuron does; it is
refused, as all that is no integrate-and-fire with soft reset.
"""

from __future__ import annotations

import copy
import importlib
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..conversion.builder import convert
from ..errors import ConversionError
from ..model.qcfs import QCFS
from ..model.tracing import symbolic_trace
from ..network.snn import SNN
from .nir import to_nir
from .simulators import Simulation, in_simulator

LIBRARY = "spikingjelly"
CONTAINERS = ("SeqToANNContainer", "MultiStepContainer", "StepModeContainer")  # nn.Sequential, one step at a time
DROPOUTS = ("Dropout", "Dropout2d")
TABLE_STEPS = 32  # of first-step biases, where no max_T is asked for


def from_spikingjelly(
    net: nn.Module, T: int = 4, v_init: float | None = None, max_T: int | None = None, **options: Any
) -> SNN:
    """Convert a network of SpikingJelly to one that runs all T steps of a layer in one call.

    Args:
        net: of the library's layers and of torch's, whose forward is that of one time step, with IFNode
            (v_reset=None) or HalfThresholdIFNode as neurons; also what its RateCodingRecipe (ann2snn) makes of an ANN.
            It is not changed, and its membranes play no part: a call of the result starts from the beginning.
        T: time steps of a call that names none.
        v_init: potential before the first step, in thresholds (0.5 is half of one); default what each neuron's
            ``reset`` gives, which is 0 unless it was set. From 0 to 1.
        max_T: the largest T this network will be asked for; default max(T, 32).
        options: further arguments of :func:`qcfs_fast.convert`, such as weight_bits and input_shape.

    Returns:
        An :class:`qcfs_fast.SNN`; its layers have the names of the neurons. Its spikes are those of the library where
        weights and images lie on a binary grid; elsewhere as far as any two orders of summation agree. Its answer is
        the mean over T steps of the network's output.

    Raises:
        ConversionError: a neuron or layer has no exact counterpart; the message names it.
        ImportError: SpikingJelly is not installed.
    """
    base = _library("base")
    if not isinstance(net, nn.Module):
        raise TypeError(f"from_spikingjelly: expected a torch module, got {type(net).__name__}")
    if v_init is not None and not 0 <= v_init <= 1:
        raise ValueError(f"from_spikingjelly: v_init must be from 0 to 1 (thresholds), got {v_init!r}")
    ours = copy.deepcopy(net).eval()
    for module in ours.modules():
        if isinstance(module, base.MemoryModule):
            module.reset()
    starts: dict[str, float] = {}
    if _neuron(ours):
        raise ConversionError("from_spikingjelly: a neuron alone is no network; put it into one")
    _replace(ours, "", starts, v_init)
    if not starts:
        raise ConversionError("from_spikingjelly: the network has no IFNode")
    traced = symbolic_trace(ours)
    _scale_spikes(traced)
    steps = max(T, TABLE_STEPS) if max_T is None else max_T
    table: dict[str, Tensor] | None = None
    if any(starts.values()):
        table = {name: torch.zeros(steps, 1, dtype=torch.float64) for name in starts}
        for name, bias in starts.items():
            table[name][0] = bias
    return convert(traced, T=T, max_T=max_T, step_bias=table, **options)


def to_spikingjelly(snn: SNN, input_shape: Sequence[int] | None = None) -> Simulation:
    """A converted network as a network of SpikingJelly, with the same spikes.

    Args:
        snn: with plain neurons.
        input_shape: as of :func:`qcfs_fast.to_nir`.

    Returns:
        A module in float64 with the library's layers and IFNode, which count in the integers of the network. A call is
        one step, [N, ...] -> [N, classes]; after ``functional.set_step_mode(net, "m")`` it is all of them,
        [T, N, ...] -> [T, N, classes]. ``functional.reset_net(net)`` begins anew. The mean over steps is the answer of
        the network, before its ``tail`` where it has one (a softmax).

    Raises:
        ConversionError: there is no counterpart; the message names it (docs/nir.md).
        ImportError: SpikingJelly or nir is not installed.
    """
    _library("neuron")
    return in_simulator(to_nir(snn, input_shape), LIBRARY)


def _library(part: str) -> Any:
    try:
        return importlib.import_module(f"spikingjelly.activation_based.{part}")
    except ImportError as error:
        raise ImportError("this needs SpikingJelly: pip install spikingjelly") from error


def _neuron(module: nn.Module) -> bool:
    return isinstance(module, _library("neuron").BaseNode)


class _Scaler(nn.Module):
    """Multiplication by a number, as of ann2snn's VoltageScaler."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def _replace(parent: nn.Module, path: str, starts: dict[str, float], v_init: float | None) -> None:
    """Put a module of torch, or an activation, in the place of each of the library; `starts` gets first biases."""
    for name, child in list(parent.named_children()):
        full = f"{path}.{name}" if path else name
        if _neuron(child):
            made, starts[full] = _activation(full, child, v_init)
            setattr(parent, name, made)
            continue
        if type(child).__module__.startswith(LIBRARY):
            setattr(parent, name, child := _layer(full, child))
        _replace(child, full, starts, v_init)


def _activation(name: str, node: Any, v_init: float | None) -> tuple[QCFS, float]:
    """The activation of a neuron, and the bias of its first step (subtracted, as of step_biases)."""
    neuron = _library("neuron")
    kind = type(node)
    if kind not in (neuron.IFNode, neuron.HalfThresholdIFNode):
        raise ConversionError(
            f"{name}: {kind.__name__} has no exact counterpart; IFNode with v_reset=None and HalfThresholdIFNode have"
        )
    if node.v_reset is not None:
        raise ConversionError(
            f"{name}: its neurons are reset to {node.v_reset}, and what exceeded the threshold is lost; a soft reset "
            "(v_reset=None) has an exact counterpart, no other"
        )
    theta = float(node.v_threshold)
    start = node.v if v_init is None else v_init * theta
    if not (0 < theta < math.inf and isinstance(start, float) and 0 <= start <= theta):
        raise ConversionError(
            f"{name}: a threshold of {theta} and a first potential of {start}; the threshold must be positive, and the "
            "potential from 0 to the threshold"
        )
    made = QCFS(1)
    made.thresh.data = torch.tensor([theta], dtype=torch.float64)
    made.initial_threshold = math.nan  # it is not what QCFS began with
    return made, theta / 2 - start


def _layer(name: str, module: Any) -> nn.Module:
    """The same layer as torch knows it."""
    kind = type(module).__name__
    if kind == "VoltageScaler" or (kind == "ChannelVoltageScaler" and module.scale.numel() == 1):
        return _Scaler(float(module.scale))
    if kind == "ChannelVoltageScaler":
        raise ConversionError(f"{name}: scales each channel by its own number; convert without channel_wise")
    if kind in DROPOUTS:
        return nn.Identity()
    base = next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn"))
    if base.__name__ != kind and kind not in CONTAINERS:
        raise ConversionError(f"{name}: {kind} has no exact counterpart; use layers of torch.nn's names")
    made = copy.copy(module)
    made.__class__ = base
    return made


def _scale_spikes(traced: fx.GraphModule) -> None:
    """Spikes of 1: each activation is divided by its threshold. What scales by a number becomes a multiplication."""
    called: set[str] = set()
    for node in list(traced.graph.nodes):
        if node.op != "call_module":
            continue
        module = traced.get_submodule(node.target)
        if not isinstance(module, (QCFS, _Scaler)):
            continue
        if isinstance(module, QCFS) and node.target in called:
            raise ConversionError(f"{node.target}: is called twice in a step; give each call a neuron of its own")
        called.add(node.target)
        factor = module.factor if isinstance(module, _Scaler) else 1 / float(module.thresh.detach())
        with traced.graph.inserting_after(node):
            scaled = traced.graph.call_function(operator.mul, (node, factor))
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user, scaled=scaled: user is not scaled)
        if isinstance(module, _Scaler):
            scaled.args = (node.args[0], factor)
            traced.graph.erase_node(node)
    traced.recompile()
