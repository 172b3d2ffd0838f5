"""A NIR graph of to_nir in the neurons of snnTorch, sinabs, Norse or SpikingJelly, set so that they spike as ours.

The readers of these packages take the same IF node for different neurons: snnTorch makes a Leaky of beta 0.9, sinabs
allows several spikes a step and bounds the membrane from below, Norse resets to a value, SpikingJelly wants r = 1 / dt
and resets to a value. None looks at an initial potential. So the graph is walked here, its convolutions become torch's,
and each IF becomes a neuron of the package with what its metadata says:

                    starts at       v >= n                                  v - n after a spike
    snnTorch        mem = n/2       fires where mem - n + 1/2 > 0           Leaky, beta = 1, "subtract" (a step later)
    sinabs          v_mem = n/2     SingleSpike compares so                 MembraneSubtract, no min_v_mem
    Norse           state v = n/2   its threshold, strict, of v - n + 1/2   its reset_subtract, in a cell of its kind;
                                                                            its own integrate-and-fire neuron lacks it
    SpikingJelly    reset value     IFNode compares so                      v_reset = None

Half a unit makes a strict comparison an inclusive one, since membranes are whole numbers. Everything is float64, in
which the sums of a converted network are exact (below 2^31), so the spikes are those of `qcfs_fast.trace`, to the last.
The composite of Threshold, Scale and I runs on torch alone, whatever the library; an edge back takes one step.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConversionError
from .nir import NEURON

LIBRARIES = ("torch", "snntorch", "sinabs", "norse", "spikingjelly")


class _Neuron(nn.Module):
    """One step of integrate-and-fire neurons: thresholds and first potentials of one sample's shape."""

    threshold: Tensor
    first: Tensor

    def __init__(self, threshold: Tensor, first: Tensor) -> None:
        super().__init__()
        self.register_buffer("threshold", threshold)
        self.register_buffer("first", first)
        self.reset()

    def reset(self) -> None:
        """Begin anew at the next step."""
        self.v: Any = None

    def start(self, x: Tensor) -> Tensor:
        return self.first.expand(x.shape).clone()


class _Plain(_Neuron):
    """The rule in plain torch."""

    def forward(self, x: Tensor) -> Tensor:
        v = (self.start(x) if self.v is None else self.v) + x
        spikes = (v >= self.threshold).to(x.dtype)
        self.v = v - spikes * self.threshold
        return spikes


class _SnnTorch(_Neuron):
    def __init__(self, threshold: Tensor, first: Tensor) -> None:
        super().__init__(threshold, first)
        snntorch: Any = importlib.import_module("snntorch")
        atan = importlib.import_module("snntorch.surrogate").atan()
        self.neuron = snntorch.Leaky(
            beta=1.0,
            threshold=threshold,
            spike_grad=lambda x: atan(x + 0.5),
            reset_mechanism="subtract",
            init_hidden=True,
        )
        snntorch.SpikingNeuron.instances.clear()  # the package would keep every network alive

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.neuron.mem = self.start(x)
        self.v = True
        found: Tensor = self.neuron(x)
        return found.to(x.dtype)


class _Sinabs(_Neuron):
    def __init__(self, threshold: Tensor, first: Tensor) -> None:
        super().__init__(threshold, first)
        layers, activation = (importlib.import_module(f"sinabs.{part}") for part in ("layers", "activation"))
        self.neuron = layers.IAF(
            spike_threshold=threshold,
            spike_fn=activation.SingleSpike,
            reset_fn=activation.MembraneSubtract(),
            min_v_mem=None,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.neuron.v_mem = self.start(x)
        self.v = True
        found: Tensor = self.neuron(x[:, None])[:, 0]  # it takes [N, T, ...]
        return found.to(x.dtype)


class _Norse(_Neuron):
    def __init__(self, threshold: Tensor, first: Tensor) -> None:
        super().__init__(threshold, first)
        iaf = importlib.import_module("norse.torch.functional.iaf")
        self.fires = importlib.import_module("norse.torch.functional.threshold").threshold
        self.subtract = importlib.import_module("norse.torch.functional.reset").reset_subtract
        self.state = iaf.IAFFeedForwardState
        cell = importlib.import_module("norse.torch.module.snn").SNNCell
        parameters = iaf.IAFParameters(v_th=threshold)
        self.neuron = cell(self.step, lambda x: self.state(v=self.start(x)), parameters)

    def step(self, x: Tensor, state: Any, p: Any, dt: float) -> tuple[Tensor, Any]:
        v = state.v + x
        z = self.fires(v - p.v_th + 0.5, p.method, p.alpha)
        return z, self.state(v=self.subtract(z, v, p.v_reset, p.v_th))

    def forward(self, x: Tensor) -> Tensor:
        z, self.v = self.neuron(x, self.v)
        found: Tensor = z
        return found


def _spikingjelly(threshold: Tensor, first: Tensor) -> nn.Module:
    """SpikingJelly's own node, on which its functions work (reset_net, step modes).

    It takes one threshold and one potential for all neurons. Where channels differ, a subclass holds them.
    """
    base: Any = importlib.import_module("spikingjelly.activation_based.neuron").IFNode
    if threshold.unique().numel() == 1:
        node: Any = base(v_threshold=float(threshold.flatten()[0]), v_reset=None)
        node.set_reset_value("v", float(first.flatten()[0]))
        node.reset()
        return node

    class IFNodeByChannel(base):
        def materialize_states(self, inputs: Any, states: Any, step_mode: str) -> Any:
            x = inputs[0][0] if step_mode == "m" else inputs[0]
            v = states[0]  # the reset value, a float, before the first step
            return (v if isinstance(v, Tensor) and v.shape == x.shape else self.first.expand(x.shape), *states[1:])

    node = IFNodeByChannel(v_reset=None)
    del node.v_threshold
    node.register_buffer("v_threshold", threshold)
    node.register_buffer("first", first)
    return node


_NEURONS: dict[str, Callable[[Tensor, Tensor], nn.Module]] = {
    "torch": _Plain,
    "snntorch": _SnnTorch,
    "sinabs": _Sinabs,
    "norse": _Norse,
    "spikingjelly": _spikingjelly,
}


class _Threshold(nn.Module):
    """1 where the input is above the threshold: NIR's Threshold."""

    def __init__(self, threshold: Tensor) -> None:
        super().__init__()
        self.threshold: Tensor
        self.register_buffer("threshold", threshold)

    def forward(self, x: Tensor) -> Tensor:
        return (x > self.threshold).to(x.dtype)


class _Integrator(nn.Module):
    """NIR's I: the sum of all inputs so far."""

    v: Any = None

    def reset(self) -> None:
        self.v = None

    def forward(self, x: Tensor) -> Tensor:
        self.v = x if self.v is None else self.v + x
        return self.v


class _Scale(nn.Module):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale: Tensor
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class _SumPool(nn.Module):
    def __init__(self, kernel: Any, stride: Any, padding: Any) -> None:
        super().__init__()
        self.settings = tuple(tuple(int(v) for v in pair) for pair in (kernel, stride, padding))

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride, (ph, pw) = self.settings
        lead = x.shape[:-3]  # SpikingJelly gives [T, N, ...] to a layer in its multi-step mode
        # A border of zeros is wider than half of the kernel where a network only pads, which avg_pool2d refuses.
        padded = F.pad(x.flatten(0, -4), (pw, pw, ph, ph))
        flat = F.avg_pool2d(padded, kernel, stride, divisor_override=1)
        return flat.unflatten(0, lead)


class Simulation(nn.Module):
    """A NIR graph whose neurons are those of one package.

    A call is one time step: x [N, ...] -> the current of the last layer [N, classes]. `reset` begins anew; a batch of
    another shape needs it (ValueError). `neurons` maps the names of the network's layers to their neurons, which are
    submodules, as are convolutions.
    """

    def __init__(self, graph: Any, library: str) -> None:
        super().__init__()
        inputs: dict[str, list[str]] = {name: [] for name in graph.nodes}
        for source, target in graph.edges:
            inputs[target].append(source)
        # What a Scale sends back to its integrator arrives at the next step; else the order would have no beginning.
        self._late = {
            (source, target)
            for source, target in graph.edges
            if type(graph.nodes[source]).__name__ == "Scale" and type(graph.nodes[target]).__name__ == "I"
        }
        known = {name: [s for s in found if (s, name) not in self._late] for name, found in inputs.items()}
        try:
            self._order = [
                name for name in TopologicalSorter(known).static_order() if type(graph.nodes[name]).__name__ != "Input"
            ]
        except CycleError as error:
            raise ConversionError(f"the graph has a circle: {' -> '.join(error.args[1])}") from error
        self._inputs = inputs
        self._before: dict[str, Tensor] = {}
        self._shape: torch.Size | None = None
        self.neurons: Mapping[str, nn.Module]
        neurons = {}
        for name in self._order:
            node = graph.nodes[name]
            module = _module(name, node, library)
            if type(node).__name__ in ("IF", "Threshold"):
                neurons[name] = module
            self.add_module(_attribute(name), module)
        self.__dict__["neurons"] = neurons
        self.input_name = next(name for name, node in graph.nodes.items() if type(node).__name__ == "Input")

    def reset(self) -> None:
        """Begin anew: all membranes at their first potentials."""
        self._before, self._shape = {}, None
        for module in self.children():
            if (reset := getattr(module, "reset", None)) is not None:
                reset()

    def forward(self, x: Tensor) -> Tensor:
        if self._shape not in (None, x.shape):  # the packages would begin at 0, or at what other samples left
            raise ValueError(
                f"a run of {list(self._shape or ())} cannot go on with {list(x.shape)}; call reset() first"
            )
        self._shape = x.shape
        values = {self.input_name: x.to(torch.float64)}
        for name in self._order:
            late = [self._before.get(s) for s in self._inputs[name] if (s, name) in self._late]
            terms = [values[s] for s in self._inputs[name] if (s, name) not in self._late]
            terms += [v for v in late if v is not None]
            values[name] = self.get_submodule(_attribute(name))(sum(terms[1:], terms[0]))
        self._before = {s: values[s] for s, _ in self._late}
        return values[self._order[-1]]

    def spikes(self, x: Tensor, T: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The answer and all spikes of a run from the start.

        Args:
            x: images [N, ...], shown at every step.
            T: time steps.

        Returns:
            float64 [N, classes], the mean over T; by name of the layer bool [T, N, ...], as of ``qcfs_fast.trace``.
        """
        found: dict[str, list[Tensor]] = {name: [] for name in self.neurons}
        handles = [
            m.register_forward_hook(lambda _m, _i, out, name=name: found[name].append(out.detach() != 0))
            for name, m in self.neurons.items()
        ]
        try:
            self.reset()
            with torch.no_grad():
                total = torch.stack([self(x) for _ in range(T)]).mean(0)
        finally:
            for handle in handles:
                handle.remove()
        return total, {name: torch.stack(steps) for name, steps in found.items()}


def in_simulator(graph: Any, library: str) -> Simulation:
    """A graph of :func:`qcfs_fast.to_nir` as a network with the neurons of a package.

    Args:
        graph: a nir.NIRGraph, or the path of a file of one.
        library: "snntorch", "sinabs", "norse" or "spikingjelly"; "torch" needs none of them.

    Returns:
        A module of one time step a call, in float64; see :class:`Simulation`.

    Raises:
        ConversionError: a node has no counterpart, or an IF does not say how it starts, compares and resets.
        ImportError: the package is not installed.
        ValueError: the library is unknown.
    """
    if library not in LIBRARIES:
        raise ValueError(f"in_simulator: library must be one of {', '.join(LIBRARIES)}, got {library!r}")
    if isinstance(graph, (str, bytes)) or hasattr(graph, "__fspath__"):
        graph = importlib.import_module("nir").read(graph)
    return Simulation(graph, library).eval()


def _attribute(name: str) -> str:
    """The name of a module's attribute, which holds no dot."""
    return name.replace(".", "_")


def _tensor(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float64).copy())


def _module(name: str, node: Any, library: str) -> nn.Module:
    kind = type(node).__name__
    if kind in ("Affine", "Conv2d"):
        made = _linear(node, library)
        made.weight.data, made.bias.data = _tensor(node.weight), _tensor(node.bias)
        return made
    if kind == "IF":
        said = {key: node.metadata.get(key) for key in NEURON}
        if said != NEURON or "v_init" not in node.metadata:
            raise ConversionError(
                f"in_simulator: {name} is an IF that does not say how it starts, compares and resets "
                f"(metadata: v_init, {', '.join(NEURON)}); each package would run it otherwise. Use a graph of to_nir"
            )
        return _NEURONS[library](_tensor(node.v_threshold), _tensor(node.metadata["v_init"]))
    if kind == "Flatten":
        return _Flatten(len(node.input_type["input"]))
    makers: dict[str, Callable[[], nn.Module]] = {
        "Output": nn.Identity,
        "SumPool2d": lambda: _SumPool(node.kernel_size, node.stride, node.padding),
        "Threshold": lambda: _Threshold(_tensor(node.threshold)),
        "I": _Integrator,
        "Scale": lambda: _Scale(_tensor(node.scale)),
    }
    if kind not in makers:
        raise ConversionError(f"in_simulator: {name} is a {kind}, which to_nir never writes")
    return makers[kind]()


class _Flatten(nn.Module):
    """All dimensions of a sample become one; what stands before them (batch, steps) stays."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(x.dim() - self.dims)


def _linear(node: Any, library: str) -> Any:
    """A layer of torch, or the same of SpikingJelly, which knows its step modes."""
    layers: Any = importlib.import_module("spikingjelly.activation_based.layer") if library == "spikingjelly" else nn
    if type(node).__name__ == "Affine":
        return layers.Linear(node.weight.shape[1], node.weight.shape[0])
    stride, padding, dilation = (tuple(int(v) for v in pair) for pair in (node.stride, node.padding, node.dilation))
    O, C, *kernel = node.weight.shape
    return layers.Conv2d(C, O, kernel, stride, padding, dilation)
