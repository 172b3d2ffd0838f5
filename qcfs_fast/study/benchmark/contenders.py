"""The contenders of a comparison: one network, with the same weights and thresholds, run in every usual way.

    qcfs_fast       the converted network with weights of 8, 16 and 24 bits, with offset neurons, and as an integer ANN;
                    as a stream, each call of which goes on from the membranes of the one before (as far as max_T
                    allows); on a GPU once per backend that can run
    ANN             the network itself, one pass. Once with its QCFS activation, and once with ReLU in its place, which
                    is cheaper and is what a user who wants no spikes would run
    T-loop          the plain simulator: the network with integrate-and-fire neurons, called T times
    SpikingJelly    its multi-step IFNode on [T, N, ...]. The layers between neurons see T * N images, the first one N.
                    The library chooses its own implementation for the device
    snnTorch        its Leaky with beta = 1, called T times

BatchNorm is folded into the convolutions and tensors are channels_last in all of them. The float ones run in float32
and in bfloat16, the ANN and the T-loop also under torch.compile.

Every neuron starts at theta/2 and subtracts theta. SpikingJelly compares v >= theta, as we do. snnTorch compares
v > theta, so its threshold is the next smaller float; the two comparisons are then the same. A spike is worth theta,
so where a library's spikes are worth 1 there is one multiplication behind the neuron.

Times mean little if contenders compute different things. `count_differences` therefore runs each neuron on our spikes
as input and counts where it fires otherwise.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ... import backend
from ...model.qcfs import is_qcfs
from ...network.snn import SNN
from .measure import describe_error

Call = Callable[[int], Tensor]
Make = Callable[[str, Any], nn.Module]  # from a QCFS site's name and module to what stands in its place
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PLAIN, STREAM = "qcfs_fast 16-bit", "qcfs_fast stream 16-bit"


class _Qcfs(nn.Module):
    """QCFS in five passes over the data, in place; the trainable one takes more."""

    def __init__(self, theta: float, levels: int) -> None:
        super().__init__()
        self.up, self.down, self.levels = levels / theta, theta / levels, levels

    def forward(self, x: Tensor) -> Tensor:
        return x.mul(self.up).add_(0.5).floor_().clamp_(0, self.levels).mul_(self.down)


class _Neuron(nn.Module):
    """What the wrappers share: a name, a threshold and a membrane that `restart` sets to theta/2."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = theta

    def restart(self, T: int) -> None:
        raise NotImplementedError


class _StepNeuron(_Neuron):
    """The simulator's neuron. Its membrane is always a tensor, so that the step compiles without a branch."""

    v: Tensor

    def __init__(self, theta: float) -> None:
        super().__init__(theta)
        self.register_buffer("v", torch.empty(0), persistent=False)

    def restart(self, T: int) -> None:
        self.v = torch.full_like(self.v, self.theta / 2)

    def forward(self, x: Tensor) -> Tensor:
        v = self.v + x
        spikes = (v >= self.theta).to(x.dtype) * self.theta
        self.v = v - spikes
        return spikes


class _SpikingJelly(_Neuron):
    """SpikingJelly's neuron. The first one of a network gets the image's current [N, ...] and repeats it T times."""

    def __init__(self, theta: float, first: bool) -> None:
        super().__init__(theta)
        neuron = importlib.import_module("spikingjelly.activation_based.neuron")
        self.node = neuron.IFNode(v_threshold=theta, v_reset=None, step_mode="m")
        self.node.set_reset_value("v", theta / 2)
        self.first, self.T = first, 1

    def restart(self, T: int) -> None:
        self.T = T
        self.node.reset()

    def forward(self, x: Tensor) -> Tensor:
        sequence = x.expand(self.T, *x.shape) if self.first else x.unflatten(0, (self.T, -1))
        return (self.node(sequence) * self.theta).flatten(0, 1).to(memory_format=_format(x))


class _SnnTorch(_Neuron):
    """snnTorch's neuron; its membrane gets a shape at the first call after `restart`."""

    def __init__(self, theta: float, dtype: torch.dtype) -> None:
        super().__init__(theta)
        snntorch = importlib.import_module("snntorch")
        below = torch.nextafter(torch.tensor(theta, dtype=dtype), torch.tensor(0.0, dtype=dtype))
        self.node = snntorch.Leaky(
            beta=1.0, threshold=below, reset_mechanism="subtract", init_hidden=True, surrogate_disable=True
        )
        self.started = False
        snntorch.SpikingNeuron.instances.clear()  # the library would keep every network alive

    def restart(self, T: int) -> None:
        self.started = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.started:
            self.node.mem, self.started = torch.full_like(x, self.theta / 2), True
        return (self.node(x) * self.theta).to(x.dtype)


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.dim() == 4 else torch.contiguous_format


def folded(model: nn.Module) -> nn.Module:
    """A copy in eval mode with every BatchNorm folded into the layer before it."""
    from torch.fx.experimental.optimization import fuse

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fuse(model.eval(), no_trace=True)


def activations(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if is_qcfs(m)}


def with_activation(base: nn.Module, make: Make, dtype: torch.dtype) -> nn.Module:
    """A copy of a folded network with every QCFS replaced by make(name, activation)."""
    network = copy.deepcopy(base)
    for name, module in activations(network).items():
        network.set_submodule(name, make(name, module))
    return channels_last(network.to(dtype)).eval()


def channels_last(network: nn.Module) -> nn.Module:
    moved: nn.Module = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def _theta(module: Any) -> float:
    if module.thresh.numel() != 1:
        raise ValueError("the contenders need one threshold per layer")
    return float(module.thresh.detach())


class Contenders:
    """Calls by name for one network and one batch of images; `errors` holds the reason where one cannot be made.

    Args:
        model: a prepared network with a threshold per layer.
        snns: the converted networks by name.
        images: [N, C, H, W] on the device to measure on.
        compiled: also under torch.compile.
    """

    def __init__(self, model: nn.Module, snns: Mapping[str, SNN], images: Tensor, compiled: bool = True) -> None:
        self.calls: dict[str, Call] = {}
        self.errors: dict[str, str] = {}
        self.ours: dict[str, SNN] = {}  # on the device; of a GPU's backends none stands out
        self.restart_streams: list[Callable[[], None]] = []
        self.networks: dict[str, nn.Module] = {}  # float networks with neurons or QCFS, for `count_differences`
        self.images = images
        self.base = folded(model)
        device = images.device
        self.inputs = {n: images.to(d).contiguous(memory_format=_format(images)) for n, d in DTYPES.items()}
        for name, snn in snns.items():
            for gpu in gpu_backends() if device.type == "cuda" else [None]:
                where = f" {gpu}" if gpu else ""
                self._attempt(name + where, partial(self._ours, name, snn, gpu))
                if name == PLAIN:
                    self._attempt(STREAM + where, partial(self._stream, name, gpu))
        self.first = next(iter(activations(self.base)))
        for label in DTYPES:
            for name, make in (("ReLU", _relu), ("QCFS", _qcfs)):
                self._eager_and_compiled(f"ANN {name} {label}", compiled, partial(self._ann, make, label))
            self._eager_and_compiled(f"T-loop {label}", compiled, partial(self._loop, _step_neuron, label))
        for label, dtype in DTYPES.items():
            self._attempt(f"SpikingJelly {label}", partial(self._multi_step, self._spikingjelly, label))
            self._attempt(f"snnTorch {label}", partial(self._loop, partial(_snntorch, dtype), label))

    def _spikingjelly(self, name: str, module: Any) -> nn.Module:
        return _SpikingJelly(_theta(module), name == self.first)

    def _attempt(self, name: str, make: Callable[[], Any]) -> None:
        try:
            made = make()
            self.calls[name] = made[0]
            if made[1] is not None:
                self.networks[name] = made[1]
        except Exception as error:  # a peer that is not installed, or does not run here, is a result
            self.errors[name] = describe_error(error)

    def _eager_and_compiled(self, name: str, compiled: bool, make: Callable[..., Any]) -> None:
        self._attempt(name, make)
        if compiled:
            self._attempt(f"{name} compiled", lambda: (make(compiled=True)[0], None))

    # The ways to run: each returns the call, and the float network to compare with ours (None for ours).

    def _ours(self, name: str, snn: SNN, gpu: str | None) -> tuple[Call, None]:
        self.ours[name] = placed = copy.deepcopy(snn).to(self.images.device)
        images = self.images

        def call(T: int) -> Tensor:
            with backend.force(gpu=gpu) if gpu else nullcontext():
                return placed(images, T)

        return call, None

    def _stream(self, name: str, gpu: str | None) -> tuple[Call, None]:
        snn, images = self.ours[name], self.images
        stream = snn.stream()
        self.restart_streams.append(stream.reset)

        def call(T: int) -> Tensor:
            if stream.steps + T > snn.max_T:
                stream.reset()
            with backend.force(gpu=gpu) if gpu else nullcontext():
                return cast(Tensor, stream(images, steps=T))

        return call, None

    def _place(self, make: Make, label: str) -> tuple[nn.Module, Tensor]:
        return with_activation(self.base, make, DTYPES[label]).to(self.images.device), self.inputs[label]

    def _ann(self, make: Make, label: str, compiled: bool = False) -> tuple[Call, nn.Module]:
        network, images = self._place(make, label)
        run: Any = torch.compile(network, dynamic=False) if compiled else network
        return (lambda T: run(images)), network

    def _loop(self, make: Make, label: str, compiled: bool = False) -> tuple[Call, nn.Module]:
        network, images = self._place(make, label)
        neurons = [m for m in network.modules() if isinstance(m, _Neuron)]
        _shape_membranes(network, images)
        run: Any = torch.compile(network, dynamic=False) if compiled else network

        def call(T: int) -> Tensor:
            for neuron in neurons:
                neuron.restart(T)
            total = run(images)
            for _ in range(T - 1):
                total = total + run(images)
            return total / T

        return call, network

    def _multi_step(self, make: Make, label: str) -> tuple[Call, nn.Module]:
        network, images = self._place(make, label)
        neurons = [m for m in network.modules() if isinstance(m, _Neuron)]

        def call(T: int) -> Tensor:
            for neuron in neurons:
                neuron.restart(T)
            return network(images).unflatten(0, (T, -1)).mean(0)

        return call, network


def _relu(name: str, module: Any) -> nn.Module:
    return nn.ReLU(inplace=True)


def _qcfs(name: str, module: Any) -> nn.Module:
    return _Qcfs(_theta(module), int(module.L))


def _step_neuron(name: str, module: Any) -> nn.Module:
    return _StepNeuron(_theta(module))


def _snntorch(dtype: torch.dtype, name: str, module: Any) -> nn.Module:
    return _SnnTorch(_theta(module), dtype)


def gpu_backends() -> list[str]:
    """Backends that can run here, the preferred one first."""
    return [name for name in ("cuda", "triton") if not backend.absence[name]()]


@contextmanager
def _removed_after(handles: Iterable[Any]) -> Iterator[None]:
    """Removes hooks when the block ends."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shape_membranes(network: nn.Module, images: Tensor) -> None:
    """Give every step neuron a membrane of its input's shape and layout."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        module.v = torch.zeros_like(args[0])

    neurons = [m for m in network.modules() if isinstance(m, _StepNeuron)]
    with _removed_after(m.register_forward_pre_hook(hook) for m in neurons), torch.no_grad():
        network(images)


def count_differences(call: Call, network: nn.Module, values: Mapping[str, Tensor], T: int) -> tuple[int, int]:
    """How many outputs of a float network's neurons differ from the given ones, and how many were compared.

    `values` are spikes as trace gives them, or for a network of QCFS activations the outputs of these. Each layer reads
    them instead of what the layer before it made, so that a difference does not spread.
    """
    different = total = 0

    def hook(name: str) -> Any:
        step = 0

        def run(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            nonlocal step, different, total
            if isinstance(module, _Qcfs):
                want = values[name].to(output)
                wrong = (output - want).abs() > module.down / 2
            else:
                fired = values[name].flatten(0, 1) if isinstance(module, _SpikingJelly) else values[name][step]
                want = fired.to(output) * module.theta
                wrong = (output > 0) != (want > 0)
                step += 1
            different += int(wrong.sum())
            total += wrong.numel()
            return want.contiguous(memory_format=_format(output))

        return run

    compared = {n: m for n, m in network.named_modules() if isinstance(m, (_Neuron, _Qcfs))}
    with _removed_after(m.register_forward_hook(hook(n)) for n, m in compared.items()):
        call(T)
    return different, total


def quantised(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The outputs of every QCFS activation of a prepared network."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def run(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            found[name] = output

        return run

    with _removed_after(m.register_forward_hook(hook(n)) for n, m in activations(model).items()):
        model.eval()(images)
    return found
