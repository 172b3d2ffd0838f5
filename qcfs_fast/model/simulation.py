"""simulate: the spiking network in plain PyTorch, in float64, with which the integer network is compared.

The prepared model itself runs, its activations replaced by neurons (neurons.py). Some neurons look at later steps
before they fire, so a layer needs its currents of all steps at once. Therefore time is folded into the batch: the model
runs once on [S * N, ...]. Its other layers treat samples one by one, so to them steps are further images. Only neurons
unfold them.

`step_network` is the usual other way, a network of stateful neurons that is called once for each step. It is what the
benchmarks measure.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from .graph import CASTS, call_sites, reads_lines, without_tails
from .hooks import made_parameters_kept
from .neurons import LOOKS_AHEAD, MAX_ITERATIONS, MAX_WINDOW, MODES, count, fire
from .qcfs import is_qcfs, over_channels
from .tracing import evaluating, symbolic_trace

BLOCK = 1 << 22  # weights of a linear layer converted at once

Module = TypeVar("Module", bound=nn.Module)


class Simulation(NamedTuple):
    """output [T - skip, N, classes]; spikes per site [T, N, C, H, W]; membrane potentials before reset, same shape.

    Spikes are bool, of signed neurons int8 (-1, 0, 1). In sum mode they are int64 counts [1, N, C, H, W], the
    membrane potential is the sum of all currents and theta/2, and the output is [1, N, classes].
    """

    output: Any
    spikes: OrderedDict[str, Tensor]
    membranes: OrderedDict[str, Tensor]


class IF(nn.Module):
    """Integrate-and-fire neuron with soft reset; starts at theta/2, fires at v >= theta, amplitude theta."""

    def __init__(self, threshold: Tensor) -> None:
        super().__init__()
        self.threshold: Tensor
        self.register_buffer("threshold", threshold)
        self.reset()

    def reset(self) -> None:
        self.v: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        theta = over_channels(self.threshold, x)
        v = theta / 2 + x if self.v is None else self.v + x
        fired = v >= theta
        self.v = v - theta * fired
        return theta * fired


class _Layer(nn.Module):
    """The neurons of one call site: currents [S * N, C, ...] of S steps -> amplitudes of the same shape.

    In sum mode there is one step, the mean of T.
    """

    def __init__(self, threshold: Tensor, mode: str, window: int, iterations: int, T: int, steps: int) -> None:
        super().__init__()
        self.threshold = threshold
        self.mode, self.window, self.iterations, self.T, self.steps = mode, window, iterations, T, steps
        self.bias: Tensor | None = None
        self.forced: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        theta = over_channels(self.threshold, x)
        currents = x.unflatten(0, (self.steps, x.shape[0] // self.steps))
        if self.mode == "sum":
            self.fired = count(currents, theta, self.T)
        else:
            if self.bias is not None:
                if self.bias.shape[1] not in (1, x.shape[1]):
                    raise ValueError(
                        f"simulate: step_bias has {self.bias.shape[1]} channels for an activation of {x.shape[1]}; "
                        "call step_biases on this model"
                    )
                currents = currents - self.bias.reshape(self.steps, 1, -1, *([1] * (x.dim() - 2)))
            self.fired = fire(currents, theta, self.mode, self.window, self.iterations)
        spikes = self.fired.spikes if self.forced is None else self.forced
        if spikes.dim() > 3 and spikes.flatten(2).shape == currents.shape:  # the model flattened a map before it
            spikes = spikes.flatten(2)
        if spikes.shape != currents.shape:
            raise ValueError(
                f"simulate: force has spikes of shape {tuple(spikes.shape)} for an activation of "
                f"{tuple(currents.shape)}; give those of this model and these images"
            )
        amplitude = spikes.flatten(0, 1).to(x.dtype).contiguous()  # models may call view
        return theta * (amplitude / self.T if self.mode == "sum" else amplitude)


class _Converted(nn.Module):
    """A layer of the model in another precision: copies of its weights live for one call, those of a large linear layer
    block by block. A model in float64 takes twice its own memory, and most of that can be one layer.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer, dtype = self.layer, self.dtype
        if type(layer) is nn.Linear and layer.weight.numel() > BLOCK and not kwargs:
            rows = BLOCK // layer.in_features + 1
            biases = [None] * layer.out_features if layer.bias is None else layer.bias.to(dtype).split(rows)
            parts = zip(layer.weight.split(rows), biases, strict=False)
            return torch.cat([F.linear(args[0], w.to(dtype), b) for w, b in parts], -1)
        own = [*layer.named_parameters(), *layer.named_buffers()]
        return functional_call(layer, {name: t.to(dtype) for name, t in own if t.is_floating_point()}, args, kwargs)


def _shared(model: nn.Module, dtype: torch.dtype) -> fx.GraphModule:
    """A copy of the model that computes in `dtype` with the model's own tensors."""
    traced = symbolic_trace(model)
    gm = copy.deepcopy(traced, {id(t): t for t in (*traced.parameters(), *traced.buffers())})
    for i, node in enumerate(gm.graph.nodes):
        if node.op == "call_module":
            layer = gm.get_submodule(str(node.target))
            if not is_qcfs(layer) and any(True for _ in (*layer.parameters(), *layer.buffers())):
                gm.add_submodule(f"_converted_{i}", _Converted(layer, dtype))
                node.target = f"_converted_{i}"
        elif node.op == "call_method" and _casts(node):
            node.replace_all_uses_with(node.args[0])
        elif node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            module = gm.get_submodule(owner)
            for table in (module._parameters, module._buffers):
                t = table.get(name)
                if t is not None and t.is_floating_point():
                    table[name] = nn.Parameter(t.detach().to(dtype), False)
    gm.recompile()
    return gm


def _casts(node: fx.Node) -> bool:
    """Whether a node makes floats of another precision, as x.float() and x.to(torch.float32) do."""
    given = (*node.args[1:], *node.kwargs.values())
    return node.target in CASTS or any(isinstance(v, torch.dtype) and v.is_floating_point for v in given)


def _with_neurons(
    model: nn.Module, dtype: torch.dtype, neuron: Callable[[Tensor], Module], shared: bool
) -> tuple[fx.GraphModule, OrderedDict[str, Module]]:
    """A copy of the model in eval mode with every QCFS call site its own neuron, made from its thresholds.

    `shared`: with the tensors of the model, which must not change while it is used.
    """
    with evaluating(model), made_parameters_kept(model):
        gm = _shared(model, dtype) if shared else copy.deepcopy(symbolic_trace(model)).to(dtype)
    gm._forward_pre_hooks.clear()
    neurons: OrderedDict[str, Module] = OrderedDict()
    for i, (name, node, module) in enumerate(list(call_sites(gm))):
        neurons[name] = neuron(module.thresh.detach().reshape(-1).to(dtype, copy=True))
        gm.add_submodule(f"_if_{i}", neurons[name])
        node.target = f"_if_{i}"
    gm.delete_all_unused_submodules()
    gm.recompile()
    gm.eval()
    return gm, neurons


def step_network(model: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, OrderedDict[str, IF]]:
    """A copy of the model in eval mode with every QCFS call site its own IF neuron, and the neurons by name.

    Call it T times on the same input and average; reset the neurons before the next input.
    """
    return _with_neurons(model, dtype, IF, shared=False)


def simulate(
    model: nn.Module,
    x: Tensor,
    T: int,
    dtype: torch.dtype = torch.float64,
    spikes: bool = False,
    force: Mapping[str, Tensor] | None = None,
    neuron: str = "plain",
    window: int = 4,
    iterations: int = 1,
    step_bias: Mapping[str, Tensor] | None = None,
    skip: int = 0,
) -> Any:
    """Simulate the spiking network of a prepared model.

    Args:
        model: the model that convert() takes. It is not changed.
        x: images [N, C, H, W] (or [N, C, L], or [N, features]), presented as the same current at every step; or input
            that changes with time, [T, N, C, H, W] and so on, one image for each step. Floating point or uint8.
        T: time steps. In sum mode the number of levels.
        dtype: arithmetic of the simulation; float64 defines the correct result, float32 is what simulators usually run.
        spikes: also return spikes and membrane potentials per layer.
        force: spikes by site name, as :func:`qcfs_fast.trace` returns them. Each layer then reads these instead
            of what its neighbours fired, so that layers can be compared one by one on the same input.
        neuron: the mode of all neurons: plain, offset, masked, signed or sum (qcfs_fast/model/neurons.py says what each
            does and where it was published).
        window: steps that offset and masked neurons look at before they fire, 1 to 8. With fewer time steps the
            network runs `window` steps inside and the output is of the first T.
        iterations: how often offset neurons correct their initial potential, 1 to 8.
        step_bias: what each layer subtracts from its currents, by site name, as :func:`qcfs_fast.step_biases` returns
            it: [at least T, channels]. For plain and signed neurons.
        skip: steps that the output leaves out (delayed readout), below T.

    Returns:
        [T - skip, N, classes]: means of the last layer's output over the steps skip .. t for each t, and what the model
        makes of them (a softmax), as ``snn(x, per_step=True)``; in sum mode
        [1, N, classes]. With ``spikes`` a :class:`Simulation`. Of a model that returns a tuple, list or dict, one of
        such tensors.

    Raises:
        ValueError: an argument is out of range, or does not fit the mode or the input.
        TypeError: x is not a tensor of floating point or uint8.
    """
    if not _is_int(T, 1):
        raise ValueError(f"simulate: T must be a positive int (time steps), got {T!r}")
    if neuron not in MODES:
        raise ValueError(f"simulate: neuron must be one of {', '.join(MODES)}, got {neuron!r}")
    if not _is_int(window, 1, MAX_WINDOW):
        raise ValueError(f"simulate: window must be an int of 1 to {MAX_WINDOW} steps, got {window!r}")
    if not _is_int(iterations, 1, MAX_ITERATIONS if neuron == "offset" else 1):
        raise ValueError(
            f"simulate: iterations must be an int of 1 to {MAX_ITERATIONS} for offset neurons and 1 for all others, "
            f"got {iterations!r} for {neuron}"
        )
    if not _is_int(skip, 0, 0 if neuron == "sum" else T - 1):
        raise ValueError(f"simulate: skip must be an int of 0 to T - 1 steps, and 0 in sum mode, got {skip!r}")
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.dtype == torch.uint8):
        raise TypeError(
            f"simulate: x must be a tensor of floating point or uint8, got "
            f"{x.dtype if isinstance(x, Tensor) else type(x).__name__}; use x.float()"
        )
    steps = 1 if neuron == "sum" else max(T, window) if neuron in LOOKS_AHEAD else T
    x = _over_time(x, T, neuron, steps, reads_lines(symbolic_trace(model))).to(dtype)

    def neurons(theta: Tensor) -> _Layer:
        return _Layer(theta, neuron, window, iterations, T, steps)

    whole, layers = _with_neurons(model, dtype, neurons, shared=True)
    network, finish = without_tails(whole)
    if step_bias is not None:
        if neuron not in ("plain", "signed"):
            raise ValueError(f"simulate: {neuron} neurons take no step_bias; use neuron='plain' or 'signed'")
        for name, layer in layers.items():
            layer.bias = _step_bias(name, step_bias, layer.threshold, T)
    forced = {} if force is None else {name: _forced(name, force, steps, x.shape[1]) for name in layers}

    # Time in the batch takes `steps` times the memory, so `steps` times fewer images run together.
    outputs, parts = [], []
    together = max(1, x.shape[1] // steps)
    with torch.no_grad():
        for first in range(0, max(1, x.shape[1]), together):
            here = slice(first, first + together)
            for name in forced:
                layers[name].forced = forced[name][:, here]
            part = x[:, here]
            found = network(part.flatten(0, 1))  # some may be tuples, as of chunk
            outputs.append(pytree.tree_map(lambda y, n=part.shape[:2]: y.unflatten(0, n)[:T], found))
            if spikes:
                parts.append([layer.__dict__.pop("fired") for layer in layers.values()])  # not kept with the network
    means = pytree.tree_map(lambda *y: _running_mean(torch.cat(y, 1)[skip:]), *outputs)
    with torch.no_grad():
        last = T - skip if neuron != "sum" else 1
        by_step = [finish(*pytree.tree_map(lambda mean, t=t: mean[t], means)) for t in range(last)]
    output = pytree.tree_map(lambda *y: torch.stack(y), *by_step)
    if not spikes:
        return output
    fired_by = {name: [part[i] for part in parts] for i, name in enumerate(layers)}
    return Simulation(
        output,
        OrderedDict((name, torch.cat([f.spikes[:T] for f in fired], 1)) for name, fired in fired_by.items()),
        OrderedDict((name, torch.cat([f.membranes[:T] for f in fired], 1)) for name, fired in fired_by.items()),
    )


def _running_mean(x: Tensor) -> Tensor:
    """The means over the first 1, 2, ... steps."""
    steps = torch.arange(1, len(x) + 1, dtype=x.dtype, device=x.device)
    return x.cumsum(0) / steps.reshape(-1, *[1] * (x.dim() - 1))


def _is_int(value: object, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _over_time(x: Tensor, T: int, neuron: str, steps: int, lines: bool) -> Tensor:
    """The input of every step, [steps, N, ...]."""
    images, known = ((3,), "lines [N, C, L]") if lines else ((2, 4), "images [N, C, H, W] or vectors [N, features]")
    if x.dim() in images:
        return x.expand(steps, *x.shape)
    if x.dim() - 1 not in images:
        raise ValueError(f"simulate: x must be {known}, or such with time first, got shape {tuple(x.shape)}")
    if neuron == "sum":
        raise ValueError(
            "simulate: sum mode has no time steps, so its input cannot change with time; give one image, for example "
            "x.mean(0), or use another neuron"
        )
    if x.shape[0] != T:
        raise ValueError(f"simulate: x has {x.shape[0]} steps (its first dimension), so T must be that, got {T}")
    if steps > T:
        raise ValueError(
            f"simulate: {neuron} neurons look at {steps} steps (window), and x has {T}; use window={T} or longer input"
        )
    return x


def _named(what: str, name: str, given: Mapping[str, Tensor]) -> Tensor:
    if name not in given:
        raise ValueError(f"simulate: {what} for {name}; give one for each activation of the model")
    return given[name]


def _step_bias(name: str, step_bias: Mapping[str, Tensor], threshold: Tensor, T: int) -> Tensor:
    """The biases of one layer for T steps, [T, C]; whether C fits shows when the layer runs."""
    bias = _named("step_bias has no biases", name, step_bias)
    if bias.dim() != 2 or bias.shape[0] < T:
        raise ValueError(
            f"simulate: step_bias of {name} must be [at least T = {T}, channels], got {tuple(bias.shape)}; "
            f"call step_biases with T={T} or more"
        )
    return bias[:T].to(threshold)


def _forced(name: str, force: Mapping[str, Tensor], steps: int, images: int) -> Tensor:
    spikes = _named("force has no spikes", name, force)
    if spikes.dim() < 3 or spikes.shape[0] < steps or spikes.shape[1] != images:
        raise ValueError(
            f"simulate: force must hold {steps} steps and {images} images, got shape {tuple(spikes.shape)} for {name}"
        )
    return spikes[:steps]
