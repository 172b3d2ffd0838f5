"""The converted network: a small graph of nodes (layers.py), and the loop that runs it once for all T steps.

Each node computes all T steps before the next one starts, since a network of integrate-and-fire layers without feedback
gives the same spikes either way, and one call for all steps keeps membranes in registers. The float image is the value
IMAGE, every other value has the name of its node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FormatError
from ..operators.limits import MAX_SUM
from . import anytime, saving
from .layers import IMAGE, INPUT, EncodingLayer, ImageInput, Layer, Readout, SpikingLayer, Values


class Branch(nn.Module):
    """A level of the module tree of the model: it only holds nodes, so that print(snn) shows the names of the model."""


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
                parent = parent._modules.setdefault(step, Branch())
            parent._modules[leaf] = layer
        self._program = list(layers)
        # Values that no node after this one reads; they are let go, so memory does not grow with depth.
        last_use = {source: name for name, layer in layers for source in layer.inputs}
        self._drop = {name: [s for s, last in last_use.items() if last == name] for name, _ in layers}
        self.max_T = min((int(d["max_T"]) for d in self.details.values()), default=MAX_SUM)
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
        channels = first.config.channels
        shape = f"[N, {channels}]" if first.config.vector else f"[N, {channels}, H, W]"
        if not x.is_floating_point():
            raise TypeError(f"expected a floating-point input {shape}, got {x.dtype}; scale images to floats first")
        if x.dim() != (2 if first.config.vector else 4) or x.shape[1] != channels:
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
        values: Values = {IMAGE: x}
        out: Any = None
        for name, layer in self._program:
            out = layer(values, steps, per_step)
            if watch is not None:
                watch(name, layer, out)
            for dead in self._drop[name]:
                del values[dead]
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
    ) -> anytime.Prediction:
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
        steps = self._checked_steps(self.T if T is None else T)
        level, lengths = anytime.checked_confidence(confidence), anytime.checked_schedule(schedule, steps)
        self._check_input(x)
        return anytime.predict(self.run, x, level, lengths, batch_size)

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
        graph = [
            {
                "name": name,
                "type": type(layer).__name__,
                "inputs": [INPUT if node == IMAGE else node for node in layer.inputs],
                "config": layer.config.to_dict(),
                "tensors": sorted(layer._buffers),
            }
            for name, layer in self._program
        ]
        header = {
            "T": self.T,
            "weight_bits": self.weight_bits,
            "input_shape": self.input_shape,
            "details": self.details,
            "graph": graph,
        }
        saving.save(path, header, {f"{name}/{key}": t for name, layer in self._program for key, t in layer.tensors()})


def check_graph(layers: Sequence[tuple[str, Layer]]) -> None:
    """Every input must name an earlier node, the last node must be the readout."""
    known: set[str] = {IMAGE}
    for name, layer in layers:
        for source in layer.inputs:
            if source not in known:
                raise FormatError(f"node {name!r} reads {source!r}, which is no earlier node")
        if name in known:
            raise FormatError(f"two nodes are called {name!r}")
        known.add(name)
    if not layers or not isinstance(layers[0][1], ImageInput) or layers[0][0] != INPUT:
        raise FormatError("the first node must be the image input")
    if not isinstance(layers[-1][1], Readout):
        raise FormatError("the last node must be the readout")
