"""The nodes of a converted network: modules that hold integers.

A node names the nodes that it reads (`inputs`), holds its integers as buffers, and everything else in a frozen
configuration, so that a network can be printed, moved, compiled, exported and saved. Each class stands behind the
configuration that describes it (schema.py); a node is checked when it is made, whoever makes it. Spikes travel as
uint8 masks or count planes (operators/masks.py), those of signed neurons as a pair of them (Signed). How the network is
run (steps, mode of the neuron, states) comes with each call (Run).

Several weights of one node are buffers weight_0, weight_1, ...; `sources()`, `residuals()` and `terms()` put them
together with the nodes they belong to. A forward call looks up buffers by names that the constructor settled: moving a
module replaces its buffers, so tensors themselves cannot be kept.

A weight of 24 bits is several buffers, its signed digits of base 256 (`weight_bits`). A spiking layer reads three int8
digits as three products, whose scales are 65536, 256 and 1. Where the image or counts are read, int16 holds the upper
two digits and a second int16 the last, and each is convolved by itself. `whole` puts the digits together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..backend.protocol import last_engine
from ..operators.geometry import POINTWISE
from ..operators.limits import ANALOG_RANGE, IMAGE_RANGE, MAX_COUNT, MAX_IMAGE_THRESHOLD, MAX_SUM, overflow_free_steps
from ..operators.masks import planes
from ..operators.neuron import Neuron
from ..operators.windows import BORDERS, PoolSpec
from .schema import (
    Bits,
    Config,
    Flag,
    Flags,
    Geometries,
    Geometry,
    Indices,
    Long,
    Moves,
    Names,
    Peaks,
    Pool,
    Pools,
    Size,
    TensorKind,
    check_weight,
    per_channel,
    printable,
    require,
)
from .state import State

IMAGE = "<image>"  # the float image, among the values of a run
INPUT = "input"  # the node that quantises it
DIGITS = ("", "_middle", "_low")  # what is added to a weight's name: the buffers of its digits, base 256

PLAIN = Neuron()

Values = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """How a network is run.

    Attributes:
        T: the steps that the answer stands for.
        neuron: of all layers.
        per_step: answers after every step, not only the last.
        skip: the steps before this one are left out of the answer (delayed readout).
        varying: the image has a time axis.
        state: what layers begin with and leave, in a run that goes on from another one; None: from the start.
        before: the steps that were run before this one.
    """

    T: int
    neuron: Neuron = PLAIN
    per_step: bool = False
    skip: int = 0
    varying: bool = False
    state: State | None = None
    before: int = 0

    @property
    def steps(self) -> int:
        """The steps that layers compute."""
        return self.neuron.steps(self.T)


class Signed(NamedTuple):
    """What signed neurons send: masks or count planes of positive spikes, and of negative ones."""

    positive: Tensor
    negative: Tensor


class Source(NamedTuple):
    """A product of a spiking layer: the integers of `node`, at most `peak` each, convolved with `weight`.

    `shared`: a source before this one has the same weight (an average pool can be cut into sections, whose sums add
    up to the pool's).
    """

    node: str
    weight: Tensor
    geometry: Geometry
    peak: int
    shared: bool


class Residual(NamedTuple):
    """Spikes or counts of `node`, at most `peak` each, added to the current times `amplitude`, one per channel."""

    node: str
    amplitude: Tensor
    peak: int


class Analog(NamedTuple):
    """The convolution of the quantised image that a layer integrates as a current."""

    node: str
    weight: Tensor
    geometry: Geometry


class Term(NamedTuple):
    """A term of the readout: the pooled counts of `node` convolved with `weight` (empty: taken as they are)."""

    node: str
    weight: Tensor
    gain: Tensor
    geometry: Geometry
    pools: tuple[PoolSpec, ...]
    vector: bool  # flattened to [N, features] after the pools


@dataclass(frozen=True)
class Channels:
    """What a node sends: how many channels, as a vector or as maps of a size not known here; or it is the image."""

    count: int
    vector: bool = False
    image: bool = False

    def check(self, read: int, flat: bool, name: str, image: bool = False) -> None:
        """FormatError unless a weight for `read` channels can read this; `flat`: as a vector, maps flattened."""
        require(self.image == image, f"{name} reads {'spikes' if image else 'the image'}")
        fits = read % self.count == 0 if flat and not self.vector else read == self.count
        require(fits, f"{name} takes {read} channels, but its input has {self.count}")


class Layer(nn.Module):
    """A node: `inputs` are the nodes it reads, `config` what else it needs besides its buffers."""

    config_type: ClassVar[type[Config]]

    def __init__(self, inputs: Sequence[str], config: Any, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.inputs = list(inputs)
        self.config = config
        config.check(self.inputs)
        config.check_tensors(tensors)
        for name in sorted(tensors):
            # Kernels want dense tensors: a copy now, or one at every call.
            self.register_buffer(name, tensors[name].contiguous())
            digit = next((d for d in DIGITS[1:] if name.endswith(d)), "")
            same = tensors[name].shape == tensors[name.removesuffix(digit)].shape
            require(same, f"{name} has another shape than the upper digit")
        self.check()

    if TYPE_CHECKING:  # buffers by name

        def __getattr__(self, name: str) -> Any: ...

    def __repr__(self) -> str:
        return printable(super().__repr__())  # names of other nodes, and of layers of the model

    def check(self) -> None:
        """Raises FormatError where the numbers of the tensors are none that this layer can have."""

    def check_channels(self, sent: Sequence[Channels]) -> Channels:
        """What the node sends, given what its inputs send; FormatError where these do not fit its weights."""
        raise NotImplementedError

    def forward(self, values: Values, run: Run) -> Any:
        raise NotImplementedError

    def buffer(self, name: str) -> Tensor:
        found = self._buffers[name]
        assert found is not None
        return found

    def tensors(self) -> list[tuple[str, Tensor]]:
        """The buffers by name."""
        return [(name, self.buffer(name)) for name in self._buffers]

    def whole(self, name: str) -> Tensor:
        """A weight in units of its last digit: the buffer, or int32 where it has several digits."""
        first, *rest = (self.buffer(name + digit) for digit in DIGITS if name + digit in self._buffers)
        for digit in rest:
            first = first.to(torch.int32).mul_(256).add_(digit)  # in a copy: a buffer has fewer bits
        return first

    def settled(self, run: Run, name: str, make: Callable[[], Any]) -> Any:
        """What stays the same while a run goes on from another on one image (`name`); made once."""
        if run.state is None:
            return make()
        held = run.state.of(self)
        if name not in held:
            held[name] = make()
        return held[name]

    def indexed(self, prefix: str) -> list[Tensor]:
        """Buffers prefix_0, prefix_1, ..."""
        names = (f"{prefix}_{i}" for i in range(len(self._buffers)))
        return [self.buffer(name) for name in names if name in self._buffers]


def word_digits(weight_bits: int | None) -> tuple[str, ...]:
    """What is added to the name of a weight that is int16, and of 24 bits a second int16 for the last digit."""
    return DIGITS[:1] if weight_bits is None else DIGITS[::2]


def _check_thresholds(threshold: Tensor) -> None:
    sound = threshold.numel() > 0 and bool((threshold >= 2).all()) and bool((threshold % 2 == 0).all())
    require(sound, "thresholds must be even and positive")


# ---------------------------------------------------------------------------------------------- input


@dataclass(frozen=True)
class ImageConfig(Config):
    channels_of = "source"
    channels: Size  # of the image that the user gives
    vector: Flag  # the image is a vector [N, features]
    bits: Bits | None = None  # of a pixel, with its sign; 16 where a file does not say
    line: Flag | None = None  # the image is a line [N, channels, L], a map of one row
    moves: Moves | None = None  # what pads, crops or enlarges it: windows of one pixel or none

    def check(self, inputs: Sequence[str]) -> None:
        require(list(inputs) == [IMAGE], "the image input reads the image and nothing else")
        require(not (self.line and self.vector), "an image is a line or a vector")
        sound = all(spec.moves for spec in self.moves or ())
        require(sound and not (self.moves and self.vector), "moves are damaged")

    @property
    def dims(self) -> int:
        """The dimensions of a batch of images."""
        return 2 if self.vector else 3 if self.line else 4

    def tensors(self) -> dict[str, TensorKind]:
        return {
            "source": per_channel(torch.int64),
            "scale": per_channel(torch.float32),
            "shift": per_channel(torch.float32),
        }


PIXELS = {2: "", 3: ", L", 4: ", H, W"}  # of a batch of images of so many dimensions, in words


def _moved_along(q: Tensor, spec: PoolSpec, axis: int) -> Tensor:
    """Integers [N, H, W, C] whose rows (0) or columns (1) go where the windows of one or none say.

    No index is copied to a device: a captured CUDA graph could not, and a cached one might be gone when it is replayed.
    """
    dim, size = 1 + axis, q.shape[1 + axis]
    spec.windows(size, axis)  # raises where the image is too small
    if spec.spreads:
        q = q.repeat_interleave(spec.spread[axis], dim)
        at = torch.arange(q.shape[dim], device=q.device) % spec.spread[axis]
        there = at == spec.phase[axis] if spec.phase is not None else None
    elif spec.padding != (0, 0):
        # Without a border the nearest pixel stands in the padding, times zero.
        i = torch.arange(-spec.padding[axis], size + spec.padding[axis], device=q.device)
        at = BORDERS[spec.border or "replicate"](i, size)
        q, there = q.index_select(dim, at), at == i if spec.border is None else None
    else:
        first, parts = spec.section[2 * axis : 2 * axis + 2]
        places = slice(first, size - (parts - 1 - first), spec.stride[axis])
        return q[:, places] if axis == 0 else q[:, :, places]
    return q if there is None else q * there.reshape(-1, *[1] * (3 - dim))


class ImageInput(Layer):
    """float image -> integers with one binary exponent per sample: x = q * 2^e, |q| < 2^(bits - 1).

    An image with a time axis gets one exponent for all steps of a sample, and steps and samples become one axis [T*N].
    """

    config_type = ImageConfig

    def check(self) -> None:
        inside = bool((self.source >= 0).all()) and bool((self.source < self.config.channels).all())
        require(inside and self.source.numel() > 0, "source is damaged")

    def forward(self, values: Values, run: Run) -> Any:
        x = values[IMAGE]
        if self.config.vector:
            x = x[..., None, None]
        if self.config.line:
            x = x.unsqueeze(-2)
        if not run.varying:
            q, exponent = torch.ops.qcfs_fast.quantize_input(x, self.source, self.scale, self.shift, self.bits)
            return self._moved(q), exponent
        T, N, C, H, W = x.shape
        x = x.to(torch.float32).permute(1, 2, 0, 3, 4).reshape(N, C, T * H, W)
        q, exponent = torch.ops.qcfs_fast.quantize_input(x, self.source, self.scale, self.shift, self.bits)
        q = q.reshape(N, T, H, W, q.shape[-1]).transpose(0, 1).flatten(0, 1).contiguous()
        return self._moved(q), exponent.repeat(T)

    def _moved(self, q: Tensor) -> Tensor:
        """The integers [N, H, W, C] padded, cropped or enlarged."""
        for spec in self.config.moves or ():
            q = _moved_along(_moved_along(q, spec, 0), spec, 1)
        return q.contiguous()

    def check_channels(self, sent: Sequence[Channels]) -> Channels:
        return Channels(self.source.numel(), image=True)

    @property
    def bits(self) -> int:
        return self.config.bits or 16

    @property
    def scales_bytes(self) -> bool:
        """Whether the network itself makes small numbers of bytes 0 to 255, as x / 255 does."""
        return bool((self.scale.abs() <= 1 / 16).all())

    def batch_shape(self, before: str = "") -> str:
        """The shape of a batch for this network, in words."""
        return f"[{before}N, {self.config.channels}{PIXELS[self.config.dims]}]"

    def extra_repr(self) -> str:
        return f"channels={self.source.numel()}, {self.bits} bits per sample"


# ---------------------------------------------------------------------------------------- spiking layers

_CURRENT = {  # of an analog current: value = weight sum * gain + offset, clipped to low..high
    "gain": per_channel(torch.float64),
    "offset": per_channel(torch.float64),
    "low": per_channel(torch.int32),
    "high": per_channel(torch.int32),
}


@dataclass(frozen=True)
class EncodingConfig(Config):
    channels_of = "threshold"
    geometry: Geometry
    vector: Flag  # spikes are [planes, N, C], not maps
    layers: Names  # names of the model's layers, for people
    bias_steps: Size | None = None  # a bias for each of so many steps
    weight_bits: Long | None = None  # 24, where the weight has so many

    def check(self, inputs: Sequence[str]) -> None:
        require(len(inputs) == 1, "inputs do not match the weights")

    def tensors(self) -> dict[str, TensorKind]:
        return {
            "threshold": per_channel(torch.int32),
            **{f"weight{d}": TensorKind((torch.int16,), 4) for d in word_digits(self.weight_bits)},
            **_CURRENT,
            **({} if self.bias_steps is None else {"bias": TensorKind((torch.int32,), 2)}),
        }


def _by_step(bias: Tensor, run: Run) -> Tensor:
    """The bias of a run's steps, where there is one for each."""
    return bias if bias.dim() == 1 else bias[run.before : run.before + run.T]


class EncodingLayer(Layer):
    """First layer: an integer convolution of the image, then T steps of integrate-and-fire.

    An image that stays the same is convolved once. Its current can be clipped to 0..theta, which changes no spike of a
    plain neuron and leaves nothing for offset, signed or sum to mend: such neurons are plain ones on it. Where currents
    differ from step to step, by the image, by biases or because a later call may bring another image, they are only
    clipped far away (limits.py). On an image that stays the same both ways give the same spikes.
    """

    config_type = EncodingConfig

    def __init__(self, inputs: Sequence[str], config: EncodingConfig, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(inputs, config, tensors)
        self._geometry, self._vector = list(config.geometry), config.vector

    def check(self) -> None:
        _check_thresholds(self.threshold)
        require(bool((self.threshold <= MAX_IMAGE_THRESHOLD).all()), f"a threshold exceeds {MAX_IMAGE_THRESHOLD}")
        ordered = bool((self.low <= self.high).all())
        inside = bool((self.low >= 0).all()) and bool((self.high <= self.threshold).all())
        require(ordered and inside, "the current's range is damaged")

        bias = self._buffers.get("bias")
        if bias is not None:
            require(bias.shape[0] == self.config.bias_steps, "bias has other steps than bias_steps")
            small = bool((bias.to(torch.int64).abs() <= self.threshold // 2).all())
            require(small, "a bias of the first layer exceeds half a threshold")

    def check_channels(self, sent: Sequence[Channels]) -> Channels:
        sent[0].check(check_weight("weight", self.weight, self.config.geometry), False, "weight", image=True)
        return Channels(self.threshold.numel(), self.config.vector)

    def overflow_free_steps(self, neuron: Neuron) -> int:
        """The largest T: no integer can overflow (limits.py), but biases by step come to an end."""
        return MAX_SUM if self.config.bias_steps is None else self.config.bias_steps

    @property
    def analog(self) -> Analog:
        return Analog(self.inputs[0], self.whole("weight"), self.config.geometry)

    def forward(self, values: Values, run: Run) -> Any:
        mode = run.neuron.mode
        if run.state is not None or run.varying or mode == "masked" or "bias" in self._buffers:
            return self._fired(values, run)
        spikes = self._encoded(values, run.T if mode == "sum" else run.steps)
        return torch.ops.qcfs_fast.count(spikes, run.T, False).to(torch.uint8) if mode == "sum" else spikes

    def _encoded(self, values: Values, steps: int) -> Any:
        """The spikes of plain neurons on an image that stays the same."""
        if self.config.weight_bits is not None:
            return self._fired(values, Run(steps, PLAIN))
        q, exponent = values[self.inputs[0]]
        masks = torch.ops.qcfs_fast.conv2d_encode(
            q, exponent, self.weight, self._geometry, self.gain, self.offset, self.low, self.high, self.threshold, steps
        )
        return masks.flatten(2) if self._vector else masks

    def _fired(self, values: Values, run: Run) -> Any:
        """The spikes of any neurons on any image."""
        high = self.threshold * IMAGE_RANGE
        current = _image_current(self, values[self.inputs[0]], "weight", self._geometry, -high, high, run)
        bias = _by_step(self.bias, run) if "bias" in self._buffers else torch.zeros_like(self.threshold)
        if self._vector:
            return _fire(self, run, True, [], [], [], [], current.flatten(-3), bias)
        return _fire(self, run, False, [], [], [], [], [], current, bias)

    def extra_repr(self) -> str:
        return _describe(self.config.layers, [self.whole("weight")], [self.config.geometry], self.config.vector)


def _image_current(
    layer: Layer, image: Any, weight: str, geometry: list[int], low: Tensor, high: Tensor, run: Run
) -> Tensor:
    """The current of the image, [N, OH, OW, O] or, of one with a time axis, [T, N, OH, OW, O]."""

    def convolved(name: str, gain: Tensor, offset: Tensor, low: Tensor, high: Tensor) -> Tensor:
        found: Tensor = torch.ops.qcfs_fast.conv2d_current(
            *image, layer.buffer(name), geometry, gain, offset, low, high
        )
        return found

    def current() -> Tensor:
        if layer.config.weight_bits is None:
            found = convolved(weight, layer.gain, layer.offset, low, high)
        else:
            # The last digit's share is the error of 16-bit weights. Half a threshold is far beyond it, and leaves the
            # sum in 32 bits.
            half = layer.threshold // 2
            found = convolved(weight, layer.gain * 256, layer.offset, low, high)
            found = found + convolved(weight + DIGITS[2], layer.gain, torch.zeros_like(layer.offset), -half, half)
            found = torch.minimum(torch.maximum(found, low), high)
        return found.unflatten(0, (run.T, -1)) if run.varying else found

    found: Tensor = current() if run.varying else layer.settled(run, "current", current)
    return found


def _fire(layer: Layer, run: Run, linear: bool, *operands: Any, scales: Sequence[int] = ()) -> Any:
    """Integrate-and-fire on the operands of conv2d_if or linear_if before T; in a run that goes on, from its state."""
    ops = torch.ops.qcfs_fast
    settings = (layer.threshold, run.steps, scales, run.neuron.operand(run.T))
    if run.state is None:
        spikes = (ops.linear_if if linear else ops.conv2d_if)(*operands, *settings)
    else:
        held = run.state.of(layer)
        operator = ops.linear_if_from if linear else ops.conv2d_if_from
        spikes, held["state"] = operator(*operands, *settings, held.get("state"))
    if run.neuron.mode != "signed":
        return spikes
    half = planes(run.steps)
    return Signed(spikes[:half], spikes[half:])


@dataclass(frozen=True)
class SpikingConfig(Config):
    channels_of = "threshold"
    weight_index: Indices  # source i has weight_{weight_index[i]}
    geometry: Geometries  # of each source
    vector: Flag  # a linear layer: spikes are [planes, N, C], weights [C, O]
    layers: Names  # names of the model's layers, one per weight, for people
    peaks: Peaks  # largest integer of each source, then residual
    analog_geometry: Geometry | None = None  # where the image adds a current
    bias_steps: Size | None = None  # a bias for each of so many steps
    weight_bits: Long | None = None  # 24, where the weights have so many

    @property
    def digits(self) -> tuple[str, ...]:
        """What is added to a weight's name: its buffers, from the upper digit to the last."""
        return DIGITS[:1] if self.weight_bits is None else DIGITS

    @property
    def weights(self) -> int:
        return len(set(self.weight_index))

    @property
    def residuals(self) -> int:
        return len(self.peaks) - len(self.weight_index)

    def check(self, inputs: Sequence[str]) -> None:
        count = len(self.weight_index)
        require(set(self.weight_index) == set(range(self.weights)), "weight_index is damaged")
        require(len(self.geometry) == count, "geometry is damaged")
        require(self.residuals >= 0, "peaks are damaged")
        expected = count + self.residuals + (self.analog_geometry is not None)
        require(0 < len(inputs) == expected, "inputs do not match the weights")

    def tensors(self) -> dict[str, TensorKind]:
        dtypes = (torch.int16, torch.int8) if self.weight_bits is None else (torch.int8,)
        weight = TensorKind(dtypes, 2 if self.vector else 4)
        found = {
            "threshold": per_channel(torch.int32),
            "bias": TensorKind((torch.int32,), 1 if self.bias_steps is None else 2),
            **{f"weight_{i}{d}": weight for d in self.digits for i in range(self.weights)},
            **{f"amplitude_{i}": per_channel(torch.int32) for i in range(self.residuals)},
        }
        if self.analog_geometry is not None:
            found |= {f"analog_weight{d}": TensorKind((torch.int16,), 4) for d in word_digits(self.weight_bits)}
            found |= _CURRENT
        return found


class SpikingLayer(Layer):
    """Integrate-and-fire over the sum of convolutions (or linear layers) of its inputs and of residual spikes.

    inputs: first the nodes of the sources, then those of the residuals, last the image's if it adds a current.
    `engine` names how the last call ran on the CPU (events, dense, table, ..; docs/backends.md), "" before
    that and on other devices.
    """

    config_type = SpikingConfig
    engine = ""

    def __init__(self, inputs: Sequence[str], config: SpikingConfig, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(inputs, config, tensors)
        count = len(config.weight_index)
        self._source_nodes = self.inputs[:count]
        self._residual_nodes = self.inputs[count : count + config.residuals]
        # One product for each digit of each source, the upper digits of all sources first.
        self._product_nodes = self._source_nodes * len(config.digits)
        self._weight_names = [f"weight_{i}{digit}" for digit in config.digits for i in config.weight_index]
        self._scales = [] if config.weight_bits is None else [s for s in (65536, 256, 1) for _ in range(count)]
        self._amplitude_names = [f"amplitude_{i}" for i in range(config.residuals)]
        self._geometries = [list(g) for g in config.geometry] * len(config.digits)
        self._geometry = [v for g in self._geometries for v in g]
        self._analog_geometry = None if config.analog_geometry is None else list(config.analog_geometry)
        self._vector = config.vector

    def check(self) -> None:
        _check_thresholds(self.threshold)
        if self.config.analog_geometry is not None:
            limit = ANALOG_RANGE * self.threshold.to(torch.int64)
            inside = bool((self.low <= self.high).all()) and bool((self.high <= limit).all())
            inside = inside and bool((self.low >= -limit).all())
            require(inside, "the analog current's range is damaged")
        steps = self.config.bias_steps
        require(steps is None or self.bias.shape[0] == steps, "bias has other steps than bias_steps")

    def check_channels(self, sent: Sequence[Channels]) -> Channels:
        config, flat, O = self.config, self.config.vector, self.threshold.numel()
        for given, k, g in zip(sent, config.weight_index, config.geometry, strict=False):
            name = f"weight_{k}"
            weight = self.buffer(name)
            require(not flat or tuple(g) == POINTWISE, f"{name} of a vector has the geometry {list(g)}")
            given.check(check_weight(name, weight[None, None] if flat else weight, g), flat, name)
        for given in sent[len(config.weight_index) : len(config.peaks)]:
            given.check(O, flat, "a residual")
        if config.analog_geometry is not None:
            read = check_weight("analog_weight", self.analog_weight, config.analog_geometry)
            sent[-1].check(read, False, "analog_weight", image=True)
        return Channels(O, flat)

    def sources(self) -> list[Source]:
        index = self.config.weight_index
        return [
            Source(node, self.whole(f"weight_{index[i]}"), geometry, peak, index[i] in index[:i])
            for i, (node, geometry, peak) in enumerate(
                zip(self._source_nodes, self.config.geometry, self.config.peaks, strict=False)
            )
        ]

    def residuals(self) -> list[Residual]:
        peaks = self.config.peaks[len(self._source_nodes) :]
        return [
            Residual(node, self.buffer(name), peak)
            for node, name, peak in zip(self._residual_nodes, self._amplitude_names, peaks, strict=True)
        ]

    def overflow_free_steps(self, neuron: Neuron) -> int:
        """The largest T for which no integer can overflow, from those that the layer holds.

        No membrane leaves 32 bits; no total of sum mode leaves its byte.
        """
        bounds: list[tuple[Any, int]] = [(r.amplitude.cpu().numpy(), r.peak) for r in self.residuals()]
        for i in range(self.config.weights):
            weight = self.whole(f"weight_{i}")
            # Sections of one pool share a weight, and all of them can be at their peaks.
            peak = sum(p for k, p in zip(self.config.weight_index, self.config.peaks, strict=False) if k == i)
            bounds.append((weight.cpu().numpy(), peak * (256 if weight.dtype == torch.int8 else 1)))
        analog = self.config.analog_geometry is not None
        bias = self.bias.abs().reshape(-1, self.threshold.numel()).amax(0)
        steps = overflow_free_steps(self.threshold.cpu().numpy(), bias.cpu().numpy(), bounds, analog, *neuron.shift)
        if neuron.mode == "sum":
            steps = min(steps, MAX_COUNT // max(self.config.peaks, default=1))
        return steps if self.config.bias_steps is None else min(steps, self.config.bias_steps)

    @property
    def analog(self) -> Analog | None:
        geometry = self.config.analog_geometry
        return None if geometry is None else Analog(self.inputs[-1], self.whole("analog_weight"), geometry)

    def forward(self, values: Values, run: Run) -> Any:
        if torch.compiler.is_compiling():
            return self._run(values, run)
        last_engine.set("")
        out = self._run(values, run)
        if self.engine != (engine := last_engine.get()):  # assigning to a module takes longer than a small operator
            self.engine = engine
        return out

    def _run(self, values: Values, run: Run) -> Any:
        buffers = self._buffers
        sources = [values[name] for name in self._product_nodes]
        weights: list[Any] = [buffers[name] for name in self._weight_names]
        residuals = [values[name] for name in self._residual_nodes]
        amplitudes: list[Any] = [buffers[name] for name in self._amplitude_names]
        geometry: list[int] = self._geometry
        scales: list[int] = self._scales
        if run.neuron.mode == "signed":
            sources, weights, geometry, scales = self._signed_products(sources, weights)
            residuals, amplitudes = _signed_residuals(residuals, amplitudes)
        current = None
        if self._analog_geometry is not None:
            current = _image_current(
                self, values[self.inputs[-1]], "analog_weight", self._analog_geometry, self.low, self.high, run
            )
        bias = _by_step(self.bias, run)
        if not self._vector:
            operands = (sources, weights, geometry, residuals, amplitudes, current, bias)
            return _fire(self, run, False, *operands, scales=scales)
        if any(r.dim() == 5 and r.shape[2:4] != (1, 1) for r in residuals):
            raise ValueError("a flattened feature map cannot be added to a linear layer's output")
        sources, residuals = [s.flatten(2) for s in sources], [r.flatten(2) for r in residuals]
        current = None if current is None else current.flatten(-3)
        return _fire(self, run, True, sources, weights, residuals, amplitudes, current, bias, scales=scales)

    def _signed_products(
        self, sources: list[Any], weights: list[Any]
    ) -> tuple[list[Any], list[Any], list[int], list[int]]:
        """Products of both signs: the negative spikes meet the same weights, with the opposite scale."""
        found = []
        scales = self._scales or [256 if w.dtype == torch.int8 else 1 for w in weights]
        for x, w, g, scale in zip(sources, weights, self._geometries, scales, strict=True):
            found += [(t, w, g, s) for t, s in zip(signs(x), (scale, -scale), strict=False)]
        xs, ws, gs, signed = (list(column) for column in zip(*found, strict=True)) if found else ([], [], [], [])
        return xs, ws, [v for g in gs for v in g], signed

    def extra_repr(self) -> str:
        own = [s for s in self.sources() if not s.shared]
        text = _describe(self.config.layers, [s.weight for s in own], [s.geometry for s in own], self.config.vector)
        text += "".join(f" + {r.node}" for r in self.residuals())
        return text + (f", {self.engine} engine" if self.engine else "")


def counted(x: Any, run: Run) -> Tensor:
    """What a node sends, counted over the steps of the answer: int32 [1 or T - skip, N, ...]."""
    span = [0, 1] if run.neuron.mode == "sum" else [run.skip, run.T]
    parts = [torch.ops.qcfs_fast.count(t, run.steps, run.per_step, span) for t in signs(x)]
    return parts[0] if len(parts) == 1 else parts[0] - parts[1]


def signs(x: Any) -> tuple[Tensor, ...]:
    """What a node sends: spikes, and negative ones where it can send them."""
    return x if isinstance(x, Signed) else (x,)


def _signed_residuals(residuals: list[Any], amplitudes: list[Any]) -> tuple[list[Any], list[Any]]:
    found = [
        (t, amplitude * sign)
        for x, amplitude in zip(residuals, amplitudes, strict=True)
        for t, sign in zip(signs(x), (1, -1), strict=False)
    ]
    return [r for r, _ in found], [a for _, a in found]


def _describe(names: Sequence[str], weights: Sequence[Tensor], geometry: Sequence[Geometry], vector: bool) -> str:
    parts = []
    for name, w, g in zip(names, weights, geometry, strict=False):
        if vector:
            parts.append(f"{name}: {w.shape[-2]} -> {w.shape[-1]}")
            continue
        text = f"{name}: {w.shape[2] * g[8]} -> {w.shape[3]}, kernel {g[0]}x{g[1]}"
        text += f", stride {g[2]}x{g[3]}" if (g[2], g[3]) != (1, 1) else ""
        text += f", padding {g[4]}x{g[5]}" if (g[4], g[5]) != (0, 0) else ""
        text += f", dilation {g[6]}x{g[7]}" if (g[6], g[7]) != (1, 1) else ""
        parts.append(text + (f", groups {g[8]}" if g[8] != 1 else ""))
    bits = {torch.int16: "16-bit", torch.int8: "8-bit", torch.int32: "24-bit"}
    return " + ".join(parts) + (f", {bits[weights[0].dtype]}" if weights else "identity")


# ------------------------------------------------------------------------------ nodes without neurons


@dataclass(frozen=True)
class PoolConfig(Config):
    pool: Pool

    def check(self, inputs: Sequence[str]) -> None:
        require(len(inputs) == 1, "a pool has one input")
        if self.pool.kind == "avg":
            known = set() if self.pool.depends_on_size else self.pool.divisors()
            sound = self.pool.multiple > 0 and all(self.pool.multiple % d == 0 for d in known)
            require(sound, f"multiple is {self.pool.multiple}, no common multiple of the windows' divisors")


class SpikePool(Layer):
    """Average pooling to count planes (window sums; the divisor sits in the next weights), or max to masks."""

    config_type = PoolConfig

    def __init__(self, inputs: Sequence[str], config: PoolConfig, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(inputs, config, tensors)
        self.spec = config.pool

    def check_channels(self, sent: Sequence[Channels]) -> Channels:
        require(not sent[0].image and not sent[0].vector, "a pool reads maps of spikes")
        return sent[0]

    def forward(self, values: Values, run: Run) -> Any:
        x = values[self.inputs[0]]
        if self.spec.kind == "max":
            return max_pooled(x, self.spec, run)
        parts = [
            torch.ops.qcfs_fast.pool(
                t, self.spec.windows(t.shape[2], 0), self.spec.windows(t.shape[3], 1), self.spec.multiple, run.steps
            )
            for t in signs(x)
        ]
        return Signed(*parts) if isinstance(x, Signed) else parts[0]

    def extra_repr(self) -> str:
        s = self.spec
        where = f"output {s.output}" if s.output else f"kernel {s.kernel}, stride {s.stride}, padding {s.padding}"
        return f"{self.inputs[0]}: {s.kind}, {where}"


def max_pooled(x: Any, spec: PoolSpec, run: Run) -> Any:
    """The largest value of each window: of spikes, whether any fired; of totals, the largest.

    A signed maximum is positive where any spike of the window is, and negative where all of them are: where in no place
    of the window the negative spike is missing. Where pixels are moved, a window has one spike or none, of either sign.
    """
    first = signs(x)[0]
    rows, cols = spec.windows(first.shape[2], 0), spec.windows(first.shape[3], 1)

    def pooled(values: Tensor) -> Tensor:
        found: Tensor = torch.ops.qcfs_fast.max_pool(values, rows, cols, run.neuron.mode == "sum")
        return found

    if not isinstance(x, Signed):
        return pooled(x)
    if spec.moves:
        return Signed(pooled(x.positive), pooled(x.negative))
    negative = ~pooled(~x.negative)
    if run.steps % 8:
        negative[-1] &= (1 << (run.steps % 8)) - 1
    return Signed(pooled(x.positive), negative)


@dataclass(frozen=True)
class ConcatConfig(Config):
    def check(self, inputs: Sequence[str]) -> None:
        require(len(inputs) > 1, "a concatenation has several inputs")


def piece_name(activation: str, i: int) -> str:
    """The name of a spiking layer that is a part of an activation; a SpikeConcat of all has the activation's."""
    return f"{activation}[{i}]"


def pieces(name: str, layer: Layer) -> list[str]:
    """The spiking layers that a concatenation makes one activation of; none if it does no such thing."""
    return layer.inputs if isinstance(layer, SpikeConcat) and layer.inputs[0] == piece_name(name, 0) else []


def constant_name(source: str, i: int) -> str:
    """The name of neurons that fire at every step, one at each pixel of a map: they carry a bias that has borders."""
    return f"{source}[constant {i}]"


def is_constant(name: str) -> bool:
    """Whether a spiking layer is no activation of the model, but such a constant."""
    return "[constant " in name


class SpikeConcat(Layer):
    """Concatenation along the channels: of a residual that is one, or of the layers of one activation."""

    config_type = ConcatConfig

    def check_channels(self, sent: Sequence[Channels]) -> Channels:
        alike = len({(s.vector, s.image) for s in sent}) == 1 and not sent[0].image
        require(alike, "a concatenation reads spikes, all maps or all vectors")
        return Channels(sum(s.count for s in sent), sent[0].vector)

    def forward(self, values: Values, run: Run) -> Any:
        found = [values[name] for name in self.inputs]
        if not any(isinstance(x, Signed) for x in found):
            return torch.cat(found, -1)
        pairs = [x if isinstance(x, Signed) else Signed(x, torch.zeros_like(x)) for x in found]
        return Signed(*(torch.cat(parts, -1) for parts in zip(*pairs, strict=True)))

    def extra_repr(self) -> str:
        return " | ".join(self.inputs)


# -------------------------------------------------------------------------------------------- readout


@dataclass(frozen=True)
class ReadoutConfig(Config):
    channels_of = "offset"
    pools: Pools  # of each term
    vectors: Flags  # whether each term is flattened
    geometry: Geometries  # of each term
    layers: Names  # names of the model's layers, for people
    vector: Flag  # the output is [N, classes]
    flattened: Flag  # the output is a map that the model flattens
    weight_bits: Long | None = None  # 24, where the weights have so many

    def check(self, inputs: Sequence[str]) -> None:
        n = len(inputs)
        require(n > 0 and len(self.vectors) == n, "inputs do not match the weights")
        require(len(self.geometry) == n, "geometry is damaged")
        require(len(self.pools) == n, "pools are damaged")
        for pools in self.pools:
            kinds = [pool.kind for pool in pools]
            require(kinds == sorted(kinds, reverse=True), "pools are damaged: a maximum behind an average")

    def tensors(self) -> dict[str, TensorKind]:
        weight = TensorKind((torch.int16,), 4, optional=True)
        terms = range(len(self.vectors))
        return {
            "offset": per_channel(torch.float64),
            **{f"weight_{i}{d}": weight for i in terms for d in word_digits(self.weight_bits)},
            **{f"gain_{i}": per_channel(torch.float64) for i in terms},
        }


class Readout(Layer):
    """Last layer, linear, on spike counts: the mean over t of its currents. Pools before it run on counts too."""

    config_type = ReadoutConfig

    def __init__(self, inputs: Sequence[str], config: ReadoutConfig, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(inputs, config, tensors)
        # Term, name of the weight, and units of the last digit that a unit of it is worth.
        terms = range(len(config.vectors))
        long = [i for i in terms if config.weight_bits is not None and tensors[f"weight_{i}"].numel()]
        self.products = [(i, f"weight_{i}", 256 if i in long else 1) for i in terms]
        self.products += [(i, f"weight_{i}{DIGITS[2]}", 1) for i in long]
        self._geometry = [v for i, _, _ in self.products for v in config.geometry[i]]
        self._gain_names = [f"gain_{i}" for i in terms]
        self._vector, self._flattened = config.vector, config.flattened
        # Maxima are of spikes, averages of counts: no term has a maximum behind an average (convert refuses it).
        self.plan = [
            (node, [p for p in pools if p.kind == "max"], [p for p in pools if p.kind == "avg"], vector)
            for node, pools, vector in zip(self.inputs, config.pools, config.vectors, strict=True)
        ]

    def check_channels(self, sent: Sequence[Channels]) -> Channels:
        O = self.offset.numel()
        require(O > 0, "offset is empty")
        for i, (given, term) in enumerate(zip(sent, self.terms(), strict=True)):
            name = f"weight_{i}"
            require(not term.pools or not given.vector, f"pools of term {i} read a vector")
            read = check_weight(name, term.weight, term.geometry) if term.weight.numel() else O
            given.check(read, term.vector, name)
        return Channels(O, True)

    def terms(self) -> list[Term]:
        config = self.config
        return [
            Term(node, self.whole(f"weight_{i}"), self.buffer(f"gain_{i}"), geometry, pools, vector)
            for i, (node, geometry, pools, vector) in enumerate(
                zip(self.inputs, config.geometry, config.pools, config.vectors, strict=True)
            )
        ]

    def forward(self, values: Values, run: Run) -> Tensor:
        counts = self._counts(values, run)
        if run.state is None:
            return self._answer(counts, run.T - run.skip)
        # What a run goes on from is in the counts; an answer after each step is a readout of its own.
        held = run.state.of(self)
        counts = [c + held[f"{i}"] if f"{i}" in held else c for i, c in enumerate(counts)]
        held.update((f"{i}", c[-1:]) for i, c in enumerate(counts))
        done = run.before + run.T - counts[0].shape[0] + 1
        return torch.cat([self._answer([c[t : t + 1] for c in counts], done + t) for t in range(counts[0].shape[0])])

    def _counts(self, values: Values, run: Run) -> list[Tensor]:
        """The spikes of each term counted over the steps of the answer, [1 or T - skip, N, ...]."""
        found = []
        for node, max_pools, _, _ in self.plan:
            x = values[node]
            for spec in max_pools:
                x = max_pooled(x, spec, run)
            found.append(counted(x, run))
        return found

    def _answer(self, counts: list[Tensor], steps: int) -> Tensor:
        """The mean over `steps` of the last layer's currents, from counts [1 or steps, N, ...]."""
        settled: list[Tensor] = []
        multiples: list[int] = []
        for c, (_, _, average_pools, vector) in zip(counts, self.plan, strict=True):
            multiple = 1
            for spec in average_pools:
                rows, cols = spec.windows(c.shape[2], 0), spec.windows(c.shape[3], 1)
                common = spec.common_multiple(c.shape[2], c.shape[3])
                c = torch.ops.qcfs_fast.pool_counts(c, rows, cols, common)
                multiple *= common
            if vector or c.dim() == 3:
                c = c.flatten(2)[:, :, None, None]
            settled.append(c)
            multiples.append(multiple)
        buffers: Any = self._buffers
        gains = [buffers[name] for name in self._gain_names]
        out = torch.ops.qcfs_fast.readout(
            [settled[i] for i, _, _ in self.products],
            [buffers[name] for _, name, _ in self.products],
            self._geometry,
            [gains[i] if worth == 1 else gains[i] * worth for i, _, worth in self.products],
            [multiples[i] for i, _, _ in self.products],
            buffers["offset"],
            steps,
        )
        return self.arranged(out)

    def arranged(self, out: Tensor) -> Tensor:
        """The answer as the model gives it: [.., N, OH, OW, O] -> [.., N, O, OH, OW] or [.., N, classes]."""
        if self._vector:
            return out.flatten(2)
        out = out.permute(0, 1, 4, 2, 3)
        return out.flatten(2) if self._flattened else out

    def extra_repr(self) -> str:
        weights = [t.weight for t in self.terms() if t.weight.numel()]
        if not weights:
            return "mean of " + ", ".join(self.inputs)
        return _describe(self.config.layers, weights, [POINTWISE] * len(weights), self.config.vector)


LAYERS: dict[str, type[Layer]] = {
    c.__name__: c for c in (ImageInput, EncodingLayer, SpikingLayer, SpikePool, SpikeConcat, Readout)
}
