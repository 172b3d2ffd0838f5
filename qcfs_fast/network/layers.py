"""The nodes of a converted network: modules that hold integers.

A node's inputs are named nodes, its state is buffers, its configuration is plain data, so that a network can be
printed, moved, compiled, exported and saved. Spikes travel as uint8 masks or count planes (operators/signature.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lcm
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backend.protocol import last_engine
from ..operators.geometry import GEOMETRY, POINTWISE
from ..operators.windows import spec_from

INPUT = "input"  # the image's name

Values = dict[str, Any]


class Layer(nn.Module):
    """A node: `inputs` are the names it reads, `config` what else it needs besides its buffers."""

    def __init__(self, inputs: Sequence[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.inputs = list(inputs)
        self.config = dict(config)
        for name in sorted(tensors):
            # Kernels want dense tensors: a copy now, or one at every call.
            self.register_buffer(name, tensors[name].contiguous())

    if TYPE_CHECKING:  # buffers by name

        def __getattr__(self, name: str) -> Any: ...

    def forward(self, values: Values, T: int, per_step: bool) -> Any:
        raise NotImplementedError

    def indexed(self, prefix: str) -> list[Tensor]:
        """Buffers prefix_0, prefix_1, ..."""
        found: list[Tensor] = []
        while hasattr(self, f"{prefix}_{len(found)}"):
            found.append(getattr(self, f"{prefix}_{len(found)}"))
        return found


class ImageInput(Layer):
    """float image -> int16 with one binary exponent per sample: x = q * 2^e, |q| <= 32767."""

    def forward(self, values: Values, T: int, per_step: bool) -> Any:
        x = values[INPUT]
        if x.dim() == 2:
            x = x[:, :, None, None]
        return torch.ops.qcfs_fast.quantize_input(x, self.source, self.scale, self.shift)

    def extra_repr(self) -> str:
        return f"channels={self.source.numel()}, 16 bits per sample"


class EncodingLayer(Layer):
    """First layer: an integer convolution of the image, computed once, then T steps of integrate-and-fire."""

    def forward(self, values: Values, T: int, per_step: bool) -> Any:
        q, exponent = values[self.inputs[0]]
        masks = torch.ops.qcfs_fast.conv2d_encode(
            q,
            exponent,
            self.weight,
            self.config["geometry"],
            self.gain,
            self.offset,
            self.low,
            self.high,
            self.threshold,
            T,
        )
        return masks.flatten(2) if self.config["vector"] else masks

    def extra_repr(self) -> str:
        return _describe(self.config["layers"], [self.weight], [self.config["geometry"]], self.config["vector"])


class SpikingLayer(Layer):
    """Integrate-and-fire over the sum of convolutions (or linear layers) of its inputs and of residual spikes.

    inputs: first the products' sources, then the residuals', last the image if it adds an analog current. Product
    i uses buffer weight_{weight_index[i]}, residual i amplitude_i. `engine` names how the last call ran on the CPU
    (events, dense, depthwise or grouped; docs/backends.md), "" before that and on other devices.
    """

    engine = ""

    def forward(self, values: Values, T: int, per_step: bool) -> Any:
        if torch.compiler.is_compiling():
            return self._fire(values, T)
        last_engine.set("")
        out = self._fire(values, T)
        self.engine = last_engine.get()
        return out

    def _fire(self, values: Values, T: int) -> Tensor:
        amplitudes = self.indexed("amplitude")
        weights = [getattr(self, f"weight_{i}") for i in self.config["weight_index"]]
        x = [values[name] for name in self.inputs]
        current = None
        if "analog_geometry" in self.config:
            q, exponent = x.pop()
            current = torch.ops.qcfs_fast.conv2d_current(
                q,
                exponent,
                self.analog_weight,
                self.config["analog_geometry"],
                self.gain,
                self.offset,
                self.low,
                self.high,
            )
        sources, residuals = x[: len(weights)], x[len(weights) :]
        if self.config["vector"]:
            if any(r.dim() == 5 and r.shape[2:4] != (1, 1) for r in residuals):
                raise ValueError("a flattened feature map cannot be added to a linear layer's output")
            sources, residuals = [s.flatten(2) for s in sources], [r.flatten(2) for r in residuals]
            current = None if current is None else current.flatten(1)
            return torch.ops.qcfs_fast.linear_if(
                sources, weights, residuals, amplitudes, current, self.bias, self.threshold, T
            )
        return torch.ops.qcfs_fast.conv2d_if(
            sources, weights, self.config["geometry"], residuals, amplitudes, current, self.bias, self.threshold, T
        )

    def extra_repr(self) -> str:
        geometry, index = self.config["geometry"], self.config["weight_index"]
        weights = self.indexed("weight")
        first = [index.index(i) for i in range(len(weights))]
        split = [geometry[GEOMETRY * i : GEOMETRY * (i + 1)] for i in first]
        text = _describe(self.config["layers"], weights, split, self.config["vector"])
        residuals = self.inputs[len(index) : len(index) + len(self.indexed("amplitude"))]
        text += "".join(f" + {name}" for name in residuals)
        return text + (f", {self.engine} engine" if self.engine else "")


def _describe(names: Sequence[str], weights: Sequence[Tensor], geometry: Sequence[Sequence[int]], vector: bool) -> str:
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


class SpikePool(Layer):
    """Average pooling to count planes (window sums; the divisor sits in the next weights), or max to masks."""

    def __init__(self, inputs: Sequence[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().__init__(inputs, config, tensors)
        self.spec = spec_from(self.config["pool"])

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


class SpikeConcat(Layer):
    """Concatenation along the channels, for a residual that is one."""

    def forward(self, values: Values, T: int, per_step: bool) -> Any:
        return torch.cat([values[name] for name in self.inputs], -1)

    def extra_repr(self) -> str:
        return " | ".join(self.inputs)


class Readout(Layer):
    """Last layer, linear, on spike counts: the mean over t of its currents. Pools before it run on counts too."""

    def forward(self, values: Values, T: int, per_step: bool) -> Tensor:
        weights, gains = self.indexed("weight"), self.indexed("gain")
        counts: list[Tensor] = []
        multiples: list[int] = []
        for name, pools, vector in zip(self.inputs, self.config["pools"], self.config["vectors"], strict=True):
            x, multiple = values[name], 1
            specs = [spec_from(p) for p in pools]
            for spec in specs:
                if spec.kind == "max":
                    x = torch.ops.qcfs_fast.max_pool(x, spec.windows(x.shape[2], 0), spec.windows(x.shape[3], 1))
            c = torch.ops.qcfs_fast.count(x, T, per_step)
            for spec in specs:
                if spec.kind == "avg":
                    rows, cols = spec.windows(c.shape[2], 0), spec.windows(c.shape[3], 1)
                    common = lcm(*(h * w for h in set(rows[2::3]) for w in set(cols[2::3])))
                    c = torch.ops.qcfs_fast.pool_counts(c, rows, cols, common)
                    multiple *= common
            if vector or c.dim() == 3:
                c = c.flatten(2)[:, :, None, None]
            counts.append(c)
            multiples.append(multiple)
        out = torch.ops.qcfs_fast.readout(counts, weights, self.config["geometry"], gains, multiples, self.offset, T)
        if self.config["vector"]:
            return out.flatten(2)
        out = out.permute(0, 1, 4, 2, 3)
        return out.flatten(2) if self.config["flattened"] else out

    def extra_repr(self) -> str:
        weights = [w for w in self.indexed("weight") if w.numel()]
        if not weights:
            return "mean of " + ", ".join(self.inputs)
        return _describe(self.config["layers"], weights, [POINTWISE] * len(weights), self.config["vector"])


LAYERS: dict[str, type[Layer]] = {
    c.__name__: c for c in (ImageInput, EncodingLayer, SpikingLayer, SpikePool, SpikeConcat, Readout)
}
