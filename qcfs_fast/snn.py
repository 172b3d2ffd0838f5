"""The converted network: modules that hold integers, and the loop that runs them once for all T steps.

Every module is one node of a small graph. Its inputs are named nodes, its state is buffers, its configuration
is plain data, so that a network can be printed, moved, compiled, exported and saved. Spikes travel as uint8
masks or count planes (ops.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import lcm
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import backend, ops
from .errors import FormatError
from .lowering import INPUT
from .windows import PoolSpec

if TYPE_CHECKING:
    from .anytime import Prediction

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
        backend.last_engine = ""
        out = self._fire(values, T)
        if not torch.compiler.is_compiling():
            self.engine = backend.last_engine
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
        split = [geometry[ops.GEOMETRY * i : ops.GEOMETRY * (i + 1)] for i in first]
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
        return _describe(self.config["layers"], weights, [ops.POINTWISE] * len(weights), self.config["vector"])


LAYERS: dict[str, type[Layer]] = {
    c.__name__: c for c in (ImageInput, EncodingLayer, SpikingLayer, SpikePool, SpikeConcat, Readout)
}


def spec_to(spec: PoolSpec) -> dict[str, Any]:
    return {
        "kind": spec.kind,
        "kernel": spec.kernel,
        "stride": spec.stride,
        "padding": spec.padding,
        "ceil_mode": spec.ceil_mode,
        "count_include_pad": spec.count_include_pad,
        "divisor_override": spec.divisor_override,
        "output": spec.output,
        "multiple": spec.multiple,
        "section": spec.section,
    }


def spec_from(config: Mapping[str, Any]) -> PoolSpec:
    pairs = {
        k: None if config[k] is None else tuple(config[k]) for k in ("kernel", "stride", "padding", "output", "section")
    }
    return PoolSpec(**{**config, **pairs})


class Group(nn.Module):
    """A level of the original network's module tree."""

    def extra_repr(self) -> str:
        return ""


class SNN(nn.Module):
    """A spiking network that runs all T time steps of a layer in one call.

    Made by :func:`qcfs_fast.convert` or :func:`qcfs_fast.load`; has buffers only and stays in eval mode. A call
    never depends on the calls before it.

    Attributes:
        T: time steps used when a call gives none; may be set up to ``max_T``.
        max_T: the largest T for which no 32-bit membrane can overflow, whatever the input.
        weight_bits: 16 or 8.
        details: per spiking layer, what conversion settled (see :meth:`report`).
    """

    def __init__(
        self,
        layers: Sequence[tuple[str, Layer]],
        T: int,
        weight_bits: int,
        details: Mapping[str, Mapping[str, Any]],
        input_shape: Sequence[int] | None,
    ) -> None:
        super().__init__()
        self.weight_bits = weight_bits
        self.details = {name: dict(d) for name, d in details.items()}
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self.order = [name for name, _ in layers]
        for name, layer in layers:
            *path, leaf = name.split(".")
            parent: Any = self
            for step in path:  # not by add_module: a module may be called `predict` or `report`
                parent = parent._modules.setdefault(step, Group())
            parent._modules[leaf] = layer
        self._program = list(layers)
        last_use = {source: name for name, layer in layers for source in layer.inputs}
        self._drop: dict[str, list[str]] = {}
        for source, name in last_use.items():
            self._drop.setdefault(name, []).append(source)
        self.max_T = min((int(d["max_T"]) for d in self.details.values()), default=2**31 - 1)
        self.T = T
        self.eval()

    @property
    def T(self) -> int:  # noqa: N802 - the field's name
        return self._T

    @T.setter
    def T(self, value: int) -> None:  # noqa: N802
        self._T = self._checked_steps(value)

    def _checked_steps(self, T: int) -> int:
        if isinstance(T, bool) or not isinstance(T, int):
            raise TypeError(f"T must be an int (time steps), got {T!r}")
        if T < 1:
            raise ValueError(f"T must be at least 1 time step, got {T}")
        if self.max_T < T:
            worst = min(self.details, key=lambda n: int(self.details[n]["max_T"]))
            raise ValueError(
                f"T={T} is beyond this network's overflow bound of {self.max_T} steps (layer {worst}); "
                f"convert again with max_T={T}"
            )
        return T

    @property
    def layers(self) -> Mapping[str, Layer]:
        """All nodes by name, in order of execution."""
        return dict(self._program)

    @property
    def spiking_layers(self) -> Mapping[str, Layer]:
        return {n: m for n, m in self._program if isinstance(m, (EncodingLayer, SpikingLayer))}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SNN:
        # .half(), .double() and .to(dtype) must not touch the grid: only the device may change.
        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(move, recurse)
        return self

    def train(self, mode: bool = True) -> SNN:
        """Always eval mode: a converted network has nothing to train."""
        return super().train(False)

    def _check_input(self, x: Any) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a torch.Tensor, got {type(x).__name__}")
        first = self._program[0][1]
        channels = first.config["channels"]
        shape = f"[N, {channels}]" if first.config["vector"] else f"[N, {channels}, H, W]"
        if not x.is_floating_point():
            raise TypeError(f"expected a floating-point input {shape}, got {x.dtype}; scale images to floats first")
        if x.dim() != (2 if first.config["vector"] else 4) or x.shape[1] != channels:
            raise ValueError(f"expected an input of shape {shape}, got {list(x.shape)}")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("the input requires grad, but spiking inference has no gradient; pass x.detach()")
        if x.device != first.source.device:
            raise ValueError(f"the input is on {x.device}, the network on {first.source.device}; move one with .to()")

    def run(
        self,
        x: Tensor,
        T: int | None = None,
        per_step: bool = False,
        watch: Callable[[str, Layer, Any], None] | None = None,
    ) -> Tensor:
        """Execute the graph; `watch` sees each node's value. Returns [1 or T, N, ...]."""
        steps = self._T if T is None else self._checked_steps(T)
        self._check_input(x)
        values: Values = {INPUT: x}
        out: Any = None
        for name, layer in self._program:
            out = layer(values, steps, per_step)
            if watch is not None:
                watch(name, layer, out)
            for dead in self._drop.get(name, ()):
                if dead != name:
                    values.pop(dead, None)
            values[name] = out
        return out

    def forward(self, x: Tensor, T: int | None = None, per_step: bool = False) -> Tensor:
        """Run the network.

        Args:
            x: float image batch [N, C, H, W] (or [N, features] for a network that starts with a linear layer).
            T: time steps, default ``self.T``.
            per_step: also return what the network would have answered after fewer steps.

        Returns:
            float32 [N, classes], the mean over T of the last layer's output; with ``per_step`` float32
            [T, N, classes], the running means after each step, from the same single pass.

        Raises:
            ValueError: wrong shape, T out of range, NaN or infinity in x.
            TypeError: x is not a floating-point tensor.
        """
        out = self.run(x, T, per_step)
        return out if per_step else out[0]

    def predict(
        self,
        x: Tensor,
        confidence: float = 0.9,
        T: int | None = None,
        schedule: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> Prediction:
        """Classify, stopping each sample as soon as its answer is clear.

        A sample stops after the first step at which the softmax margin of its running mean logits (largest minus
        second largest probability) reaches ``confidence``, and after T steps at the latest; it then leaves the batch.

        Args:
            x: images as for ``snn(x)``.
            confidence: margin at which a sample stops, from 0 (after one step) to 1.
            T: most steps a sample may use, default ``self.T``.
            schedule: rising step counts, the last one T, at which the samples not done yet are run again; default
                1, 2, 4, ..., T. It changes the time taken, never the result (anytime.py says how).
            batch_size: most samples to run at once; default all.

        Returns:
            A named tuple: labels int64 [N], steps int64 [N], logits float32 [N, classes]. Row n of logits equals
            ``snn(x, T, per_step=True)[steps[n] - 1, n]``.

        Raises:
            ValueError: confidence, schedule or batch_size out of range; the output is not class scores.
        """
        from .anytime import predict

        return predict(self, x, confidence, T, schedule, batch_size)

    def report(self) -> str:
        """What conversion settled, one line per spiking layer, and the overflow bound of the whole network."""
        rows = [("layer", "neurons' unit", "weight bits", "exact", "overflow-free T")]
        for name, d in self.details.items():
            bits = f"{d['weight_bits_used']:.1f}"
            exact = "all" if d["lossless"] == d["channels"] else f"{d['lossless']}/{d['channels']}"
            rows.append((name, f"theta/{d['threshold_min']}..{d['threshold_max']}", bits, exact, f"<= {d['max_T']}"))
        widths = [max(len(r[i]) for r in rows) for i in range(5)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        bound = f"No 32-bit sum can overflow for T <= {self.max_T}, whatever the input."
        shape = "" if self.input_shape is None else f" Settled for images of shape {list(self.input_shape)}."
        return "\n".join([*lines, bound + shape])

    def extra_repr(self) -> str:
        return f"T={self.T}, max_T={self.max_T}, weight_bits={self.weight_bits}"

    def save(self, path: Any) -> None:
        """Write the network to a safetensors file (atomically; no pickle). See :func:`qcfs_fast.load`."""
        from .serialize import save

        save(self, path)


def check_graph(layers: Sequence[tuple[str, Layer]]) -> None:
    """Every input must name an earlier node, the last node must be the readout."""
    known: set[str] = {INPUT}
    for i, (name, layer) in enumerate(layers):
        for source in layer.inputs:
            if source not in known or (source == name and i > 0):
                raise FormatError(f"node {name!r} reads {source!r}, which is no earlier node")
        if name in known and i > 0:
            raise FormatError(f"two nodes are called {name!r}")
        known.add(name)
    if not layers or not isinstance(layers[0][1], ImageInput) or layers[0][0] != INPUT:
        raise FormatError("the first node must be the image input")
    if not isinstance(layers[-1][1], Readout):
        raise FormatError("the last node must be the readout")
