"""The nodes of a converted network: modules that hold integers.

A node names the nodes that it reads (`inputs`), holds its integers as buffers, and everything else in a frozen
configuration, so that a network can be printed, moved, compiled, exported and saved. Each class stands behind the
configuration that describes it (schema.py); a node is checked when it is made, whoever makes it. Spikes travel as
uint8 masks or count planes (operators/masks.py).

Several weights of one node are buffers weight_0, weight_1, ...; `sources()`, `residuals()` and `terms()` put them
together with the nodes they belong to. A forward call looks up buffers by names that the constructor settled: moving a
module replaces its buffers, so tensors themselves cannot be kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..backend.protocol import last_engine
from ..operators.geometry import POINTWISE
from ..operators.limits import ANALOG_RANGE, overflow_free_steps
from ..operators.windows import PoolSpec
from .schema import (
    Config,
    Flag,
    Flags,
    Geometries,
    Geometry,
    Indices,
    Names,
    Peaks,
    Pool,
    Pools,
    Size,
    TensorKind,
    per_channel,
    require,
)

IMAGE = "<image>"  # the float image, among the values of a run
INPUT = "input"  # the node that quantises it

Values = dict[str, Any]


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
    """The convolution of the quantised image that a layer integrates as a constant current."""

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
        self.check()

    if TYPE_CHECKING:  # buffers by name

        def __getattr__(self, name: str) -> Any: ...

    def check(self) -> None:
        """Raises FormatError where the numbers of the tensors are none that this layer can have."""

    def forward(self, values: Values, T: int, per_step: bool) -> Any:
        raise NotImplementedError

    def buffer(self, name: str) -> Tensor:
        found = self._buffers[name]
        assert found is not None
        return found

    def tensors(self) -> list[tuple[str, Tensor]]:
        """The buffers by name."""
        return [(name, self.buffer(name)) for name in self._buffers]

    def indexed(self, prefix: str) -> list[Tensor]:
        """Buffers prefix_0, prefix_1, ..."""
        names = (f"{prefix}_{i}" for i in range(len(self._buffers)))
        return [self.buffer(name) for name in names if name in self._buffers]


def _check_thresholds(threshold: Tensor) -> None:
    sound = threshold.numel() > 0 and bool((threshold >= 2).all()) and bool((threshold % 2 == 0).all())
    require(sound, "thresholds must be even and positive")


# ---------------------------------------------------------------------------------------------- input


@dataclass(frozen=True)
class ImageConfig(Config):
    channels_of = "source"
    channels: Size  # of the image that the user gives
    vector: Flag  # the image is a vector [N, features]

    def check(self, inputs: Sequence[str]) -> None:
        require(list(inputs) == [IMAGE], "the image input reads the image and nothing else")

    def tensors(self) -> dict[str, TensorKind]:
        return {
            "source": per_channel(torch.int64),
            "scale": per_channel(torch.float32),
            "shift": per_channel(torch.float32),
        }


class ImageInput(Layer):
    """float image -> int16 with one binary exponent per sample: x = q * 2^e, |q| <= 32767."""

    config_type = ImageConfig

    def check(self) -> None:
        inside = bool((self.source >= 0).all()) and bool((self.source < self.config.channels).all())
        require(inside, "source is damaged")

    def forward(self, values: Values, T: int, per_step: bool) -> Any:
        x = values[IMAGE]
        if x.dim() == 2:
            x = x[:, :, None, None]
        return torch.ops.qcfs_fast.quantize_input(x, self.source, self.scale, self.shift)

    def extra_repr(self) -> str:
        return f"channels={self.source.numel()}, 16 bits per sample"


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

    def check(self, inputs: Sequence[str]) -> None:
        require(len(inputs) == 1, "inputs do not match the weights")

    def tensors(self) -> dict[str, TensorKind]:
        return {
            "threshold": per_channel(torch.int32),
            "weight": TensorKind((torch.int16,), 4),
            **_CURRENT,
        }


class EncodingLayer(Layer):
    """First layer: an integer convolution of the image, computed once, then T steps of integrate-and-fire."""

    config_type = EncodingConfig

    def __init__(self, inputs: Sequence[str], config: EncodingConfig, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(inputs, config, tensors)
        self._geometry, self._vector = list(config.geometry), config.vector

    def check(self) -> None:
        _check_thresholds(self.threshold)
        inside = bool((self.low >= 0).all()) and bool((self.high <= self.threshold).all())
        require(inside, "the current's range is damaged")

    @property
    def analog(self) -> Analog:
        return Analog(self.inputs[0], self.weight, self.config.geometry)

    def forward(self, values: Values, T: int, per_step: bool) -> Any:
        q, exponent = values[self.inputs[0]]
        masks = torch.ops.qcfs_fast.conv2d_encode(
            q, exponent, self.weight, self._geometry, self.gain, self.offset, self.low, self.high, self.threshold, T
        )
        return masks.flatten(2) if self._vector else masks

    def extra_repr(self) -> str:
        return _describe(self.config.layers, [self.weight], [self.config.geometry], self.config.vector)


@dataclass(frozen=True)
class SpikingConfig(Config):
    channels_of = "threshold"
    weight_index: Indices  # source i has weight_{weight_index[i]}
    geometry: Geometries  # of each source
    vector: Flag  # a linear layer: spikes are [planes, N, C], weights [C, O]
    layers: Names  # names of the model's layers, one per weight, for people
    peaks: Peaks  # largest integer of each source, then residual
    analog_geometry: Geometry | None = None  # where the image adds a current

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
        weight = TensorKind((torch.int16, torch.int8), 2 if self.vector else 4)
        return {
            "threshold": per_channel(torch.int32),
            "bias": per_channel(torch.int32),
            **{f"weight_{i}": weight for i in range(self.weights)},
            **{f"amplitude_{i}": per_channel(torch.int32) for i in range(self.residuals)},
            **({} if self.analog_geometry is None else {"analog_weight": TensorKind((torch.int16,), 4), **_CURRENT}),
        }


class SpikingLayer(Layer):
    """Integrate-and-fire over the sum of convolutions (or linear layers) of its inputs and of residual spikes.

    inputs: first the nodes of the sources, then those of the residuals, last the image's if it adds a current.
    `engine` names how the last call ran on the CPU (events, dense, depthwise or grouped; docs/backends.md), "" before
    that and on other devices.
    """

    config_type = SpikingConfig
    engine = ""

    def __init__(self, inputs: Sequence[str], config: SpikingConfig, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(inputs, config, tensors)
        count = len(config.weight_index)
        self._source_nodes = self.inputs[:count]
        self._residual_nodes = self.inputs[count : count + config.residuals]
        self._weight_names = [f"weight_{i}" for i in config.weight_index]
        self._amplitude_names = [f"amplitude_{i}" for i in range(config.residuals)]
        self._geometry = [v for g in config.geometry for v in g]
        self._analog_geometry = None if config.analog_geometry is None else list(config.analog_geometry)
        self._vector = config.vector

    def check(self) -> None:
        _check_thresholds(self.threshold)
        if self.config.analog_geometry is not None:
            limit = ANALOG_RANGE * self.threshold.to(torch.int64)
            inside = bool((self.high <= limit).all()) and bool((self.low >= -self.high).all())
            require(inside, "the analog current's range is damaged")

    def sources(self) -> list[Source]:
        index = self.config.weight_index
        return [
            Source(node, self.buffer(name), geometry, peak, index[i] in index[:i])
            for i, (node, name, geometry, peak) in enumerate(
                zip(self._source_nodes, self._weight_names, self.config.geometry, self.config.peaks, strict=False)
            )
        ]

    def residuals(self) -> list[Residual]:
        peaks = self.config.peaks[len(self._source_nodes) :]
        return [
            Residual(node, self.buffer(name), peak)
            for node, name, peak in zip(self._residual_nodes, self._amplitude_names, peaks, strict=True)
        ]

    def overflow_free_steps(self) -> int:
        """The largest T for which no membrane can leave 32 bits, from the integers that the layer holds."""
        bounds: list[tuple[Any, int]] = [(r.amplitude.numpy(), r.peak) for r in self.residuals()]
        for i, weight in enumerate(self.indexed("weight")):
            # Sections of one pool share a weight, and all of them can be at their peaks.
            peak = sum(p for k, p in zip(self.config.weight_index, self.config.peaks, strict=False) if k == i)
            bounds.append((weight.numpy(), peak * (256 if weight.dtype == torch.int8 else 1)))
        analog = self.config.analog_geometry is not None
        return overflow_free_steps(self.threshold.numpy(), self.bias.numpy(), bounds, analog)

    @property
    def analog(self) -> Analog | None:
        geometry = self.config.analog_geometry
        return None if geometry is None else Analog(self.inputs[-1], self.analog_weight, geometry)

    def forward(self, values: Values, T: int, per_step: bool) -> Any:
        if torch.compiler.is_compiling():
            return self._fire(values, T)
        last_engine.set("")
        out = self._fire(values, T)
        if self.engine != (engine := last_engine.get()):  # assigning to a module takes longer than a small operator
            self.engine = engine
        return out

    def _fire(self, values: Values, T: int) -> Tensor:
        buffers = self._buffers
        sources = [values[name] for name in self._source_nodes]
        weights = [buffers[name] for name in self._weight_names]
        residuals = [values[name] for name in self._residual_nodes]
        amplitudes = [buffers[name] for name in self._amplitude_names]
        current = None
        if self._analog_geometry is not None:
            q, exponent = values[self.inputs[-1]]
            current = torch.ops.qcfs_fast.conv2d_current(
                q, exponent, self.analog_weight, self._analog_geometry, self.gain, self.offset, self.low, self.high
            )
        if not self._vector:
            return torch.ops.qcfs_fast.conv2d_if(
                sources,
                weights,
                self._geometry,
                residuals,
                amplitudes,
                current,
                buffers["bias"],
                buffers["threshold"],
                T,
            )
        if any(r.dim() == 5 and r.shape[2:4] != (1, 1) for r in residuals):
            raise ValueError("a flattened feature map cannot be added to a linear layer's output")
        sources, residuals = [s.flatten(2) for s in sources], [r.flatten(2) for r in residuals]
        current = None if current is None else current.flatten(1)
        return torch.ops.qcfs_fast.linear_if(
            sources, weights, residuals, amplitudes, current, buffers["bias"], buffers["threshold"], T
        )

    def extra_repr(self) -> str:
        own = [s for s in self.sources() if not s.shared]
        text = _describe(self.config.layers, [s.weight for s in own], [s.geometry for s in own], self.config.vector)
        text += "".join(f" + {r.node}" for r in self.residuals())
        return text + (f", {self.engine} engine" if self.engine else "")


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
    bits = {torch.int16: "16-bit", torch.int8: "8-bit"}
    return " + ".join(parts) + (f", {bits[weights[0].dtype]}" if weights else "identity")


# ------------------------------------------------------------------------------ nodes without neurons


@dataclass(frozen=True)
class PoolConfig(Config):
    pool: Pool

    def check(self, inputs: Sequence[str]) -> None:
        require(len(inputs) == 1, "a pool has one input")


class SpikePool(Layer):
    """Average pooling to count planes (window sums; the divisor sits in the next weights), or max to masks."""

    config_type = PoolConfig

    def __init__(self, inputs: Sequence[str], config: PoolConfig, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(inputs, config, tensors)
        self.spec = config.pool

    def forward(self, values: Values, T: int, per_step: bool) -> Any:
        x = values[self.inputs[0]]
        rows, cols = self.spec.windows(x.shape[2], 0), self.spec.windows(x.shape[3], 1)
        if self.spec.kind == "max":
            return torch.ops.qcfs_fast.max_pool(x, rows, cols)
        return torch.ops.qcfs_fast.pool(x, rows, cols, self.spec.multiple, T)

    def extra_repr(self) -> str:
        s = self.spec
        where = f"output {s.output}" if s.output else f"kernel {s.kernel}, stride {s.stride}, padding {s.padding}"
        return f"{self.inputs[0]}: {s.kind}, {where}"


@dataclass(frozen=True)
class ConcatConfig(Config):
    def check(self, inputs: Sequence[str]) -> None:
        require(len(inputs) > 1, "a concatenation has several inputs")


class SpikeConcat(Layer):
    """Concatenation along the channels, for a residual that is one."""

    config_type = ConcatConfig

    def forward(self, values: Values, T: int, per_step: bool) -> Any:
        return torch.cat([values[name] for name in self.inputs], -1)

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

    def check(self, inputs: Sequence[str]) -> None:
        n = len(inputs)
        require(n > 0 and len(self.vectors) == n, "inputs do not match the weights")
        require(len(self.geometry) == n, "geometry is damaged")
        require(len(self.pools) == n, "pools are damaged")

    def tensors(self) -> dict[str, TensorKind]:
        weight = TensorKind((torch.int16,), 4, optional=True)
        terms = range(len(self.vectors))
        return {
            "offset": per_channel(torch.float64),
            **{f"weight_{i}": weight for i in terms},
            **{f"gain_{i}": per_channel(torch.float64) for i in terms},
        }


class Readout(Layer):
    """Last layer, linear, on spike counts: the mean over t of its currents. Pools before it run on counts too."""

    config_type = ReadoutConfig

    def __init__(self, inputs: Sequence[str], config: ReadoutConfig, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(inputs, config, tensors)
        self._geometry = [v for g in config.geometry for v in g]
        self._weight_names = [f"weight_{i}" for i in range(len(config.vectors))]
        self._gain_names = [f"gain_{i}" for i in range(len(config.vectors))]
        self._vector, self._flattened = config.vector, config.flattened
        # Maxima are of spikes, averages of counts: no term has a maximum behind an average (convert refuses it).
        self._plan = [
            (node, [p for p in pools if p.kind == "max"], [p for p in pools if p.kind == "avg"], vector)
            for node, pools, vector in zip(self.inputs, config.pools, config.vectors, strict=True)
        ]

    def terms(self) -> list[Term]:
        config = self.config
        return [
            Term(node, self.buffer(f"weight_{i}"), self.buffer(f"gain_{i}"), geometry, pools, vector)
            for i, (node, geometry, pools, vector) in enumerate(
                zip(self.inputs, config.geometry, config.pools, config.vectors, strict=True)
            )
        ]

    def forward(self, values: Values, T: int, per_step: bool) -> Tensor:
        counts: list[Tensor] = []
        multiples: list[int] = []
        for node, max_pools, average_pools, vector in self._plan:
            x, multiple = values[node], 1
            for spec in max_pools:
                x = torch.ops.qcfs_fast.max_pool(x, spec.windows(x.shape[2], 0), spec.windows(x.shape[3], 1))
            c = torch.ops.qcfs_fast.count(x, T, per_step)
            for spec in average_pools:
                rows, cols = spec.windows(c.shape[2], 0), spec.windows(c.shape[3], 1)
                common = spec.common_multiple(c.shape[2], c.shape[3])
                c = torch.ops.qcfs_fast.pool_counts(c, rows, cols, common)
                multiple *= common
            if vector or c.dim() == 3:
                c = c.flatten(2)[:, :, None, None]
            counts.append(c)
            multiples.append(multiple)
        buffers = self._buffers
        out = torch.ops.qcfs_fast.readout(
            counts,
            [buffers[name] for name in self._weight_names],
            self._geometry,
            [buffers[name] for name in self._gain_names],
            multiples,
            buffers["offset"],
            T,
        )
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
