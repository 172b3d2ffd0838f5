"""How many synapses a spike reaches: exact fan-outs, from which synaptic operations are counted.

A convolution. A spike at row y, column x of its input reaches

    rows[y] * cols[x] * (output channels / groups)

synapses. rows[y] is the number of pairs (output row o, tap k) with o*stride - padding + k*dilation = y; cols[x] is the
same for columns. Border pixels have fewer pairs, and a pixel that the stride skips has none. Both factors are the same
for all channels, so it is enough to count spikes per position.

An average pool has no neurons and is linear, so a spike passes through it into every window that covers it. As in
backpropagation, the fan-out of a window is added to each input it covers (`_pull_back`).

A maximum pool lets one spike of a window through. Its outputs count as the spikes of the plane behind it.

A residual connection is one synapse per spike.

A synapse whose weight is zero counts. A position in the padding does not exist and does not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ...network.layers import Analog, EncodingLayer, Readout, SpikeConcat, SpikePool, SpikingLayer
from ...network.snn import SNN
from ...operators.geometry import out_size
from ...operators.windows import PoolSpec

Shape = tuple[int, int, int]  # height, width, channels; vectors are 1 x 1 maps


class Plane(NamedTuple):
    """Spikes that synapses start from: those of a node, perhaps behind maximum pools that the readout applies."""

    node: str
    max_pools: tuple[PoolSpec, ...] = ()


@dataclass(frozen=True)
class Bundle:
    """Synapses from one plane to one layer; a spike at (y, x) reaches rows[y] * cols[x] * outputs of them."""

    plane: Plane
    residual: bool
    rows: Tensor  # int64 [H]
    cols: Tensor  # int64 [W]
    outputs: int

    def operations(self, spikes: Tensor) -> Tensor:
        """Accumulates per step, int64 [T], of spikes counted per position, int64 [T, H, W]."""
        return torch.einsum("thw,h,w->t", spikes, self.rows, self.cols) * self.outputs


@dataclass
class Afferents:
    """All that a layer receives.

    synapses: multiply-accumulates of one dense pass, those of the ANN. Residual connections are not in it.
    with_padding: the same with the taps that fall into the padding, as the usual counters count.
    analog: the part of `synapses` that reads the image itself.
    """

    bundles: list[Bundle] = field(default_factory=list)
    synapses: int = 0
    with_padding: int = 0
    analog: int = 0


def _taps(size: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """For each of `size` input positions the number of (output, tap) pairs that read it."""
    fan = torch.zeros(size, dtype=torch.int64)
    for o in range(out_size(size, kernel, stride, padding, dilation)):
        for k in range(kernel):
            at = o * stride - padding + k * dilation
            if 0 <= at < size:
                fan[at] += 1
    return fan


def _pull_back(fan: Tensor, windows: Sequence[int], size: int) -> Tensor:
    """Fan-out of a pool's inputs along one axis, given that of its outputs."""
    inner = torch.zeros(size, dtype=torch.int64)
    for reach, first, end in zip(fan, windows[0::3], windows[1::3], strict=True):
        inner[first:end] += reach
    return inner


def pooled(shape: Shape, spec: PoolSpec) -> Shape:
    """The shape behind a pool."""
    return len(spec.windows(shape[0], 0)) // 3, len(spec.windows(shape[1], 1)) // 3, shape[2]


class _Counter:
    """Counts the synapses of each kind of layer."""

    def __init__(self, snn: SNN, shapes: Mapping[str, Shape]) -> None:
        self.layers = snn.layers
        self.shapes = shapes

    def _planes(self, node: str, rows: Tensor, cols: Tensor) -> list[tuple[Plane, Tensor, Tensor]]:
        """The planes whose spikes arrive at a node, with the node's fan-out pulled back to each."""
        layer = self.layers[node]
        if isinstance(layer, SpikeConcat):
            return [found for name in layer.inputs for found in self._planes(name, rows, cols)]
        if isinstance(layer, SpikePool) and layer.spec.kind == "avg":
            height, width, _ = self.shapes[layer.inputs[0]]
            rows = _pull_back(rows, layer.spec.windows(height, 0), height)
            cols = _pull_back(cols, layer.spec.windows(width, 1), width)
            return self._planes(layer.inputs[0], rows, cols)
        return [(Plane(node), rows, cols)]

    @staticmethod
    def _fan_out(shape: Shape, weight: Tensor, g: Sequence[int], vector: bool) -> tuple[Tensor, Tensor, int, int, int]:
        """rows, cols and outputs of a product on an input of this shape, and its synapses without and with padding."""
        height, width, channels = shape
        if vector:  # flattened: every feature reaches every output
            rows, cols = torch.ones(height, dtype=torch.int64), torch.ones(width, dtype=torch.int64)
            outputs = weight.shape[-1]
            synapses = height * width * channels * outputs
            return rows, cols, outputs, synapses, synapses
        rows, cols = (_taps(shape[i], g[i], g[2 + i], g[4 + i], g[6 + i]) for i in (0, 1))
        outputs = weight.shape[3] // g[8]
        positions = [out_size(shape[i], g[i], g[2 + i], g[4 + i], g[6 + i]) * g[i] for i in (0, 1)]
        pairs = channels * outputs
        return rows, cols, outputs, int(rows.sum() * cols.sum()) * pairs, positions[0] * positions[1] * pairs

    def _add_analog(self, found: Afferents, image: Analog) -> None:
        *_, synapses, padded = self._fan_out(self.shapes[image.node], image.weight, image.geometry, False)
        found.synapses += synapses
        found.with_padding += padded
        found.analog += synapses

    def encoding(self, layer: EncodingLayer) -> Afferents:
        """The layer that reads nothing but the image."""
        found = Afferents()
        self._add_analog(found, layer.analog)
        return found

    def spiking(self, layer: SpikingLayer) -> Afferents:
        """Products with spikes, residual connections, and the image where the layer reads it too."""
        found, vector = Afferents(), layer.config.vector
        for source in layer.sources():
            shape = self.shapes[source.node]
            rows, cols, outputs, synapses, padded = self._fan_out(shape, source.weight, source.geometry, vector)
            planes = self._planes(source.node, rows, cols)
            found.bundles += [Bundle(plane, False, r, c, outputs) for plane, r, c in planes]
            if not source.shared:  # sections of one pool share a weight; the ANN has it once
                found.synapses += synapses
                found.with_padding += padded
        for node in (residual.node for residual in layer.residuals()):
            rows, cols = (torch.ones(n, dtype=torch.int64) for n in self.shapes[node][:2])
            found.bundles += [Bundle(plane, True, r, c, 1) for plane, r, c in self._planes(node, rows, cols)]
        if layer.analog is not None:
            self._add_analog(found, layer.analog)
        return found

    def readout(self, layer: Readout) -> Afferents:
        """Products with spikes behind the readout's own pools; maximum pools come before average pools."""
        found = Afferents()
        for node, weight, _, g, specs, vector in layer.terms():
            max_pools = tuple(s for s in specs if s.kind == "max")
            shapes = [self.shapes[node]]
            for spec in max_pools:
                shapes[0] = pooled(shapes[0], spec)
            averages = [s for s in specs if s.kind == "avg"]
            for spec in averages:
                shapes.append(pooled(shapes[-1], spec))
            identity = weight.numel() == 0  # the output is the mean of the spikes themselves
            if identity:
                rows, cols = (torch.ones(n, dtype=torch.int64) for n in shapes[-1][:2])
                outputs = 1
            else:
                rows, cols, outputs, synapses, padded = self._fan_out(shapes[-1], weight, g, vector)
                found.synapses += synapses
                found.with_padding += padded
            for spec, shape in zip(reversed(averages), reversed(shapes[:-1]), strict=True):
                rows = _pull_back(rows, spec.windows(shape[0], 0), shape[0])
                cols = _pull_back(cols, spec.windows(shape[1], 1), shape[1])
            planes = [(Plane(node, max_pools), rows, cols)] if max_pools else self._planes(node, rows, cols)
            found.bundles += [Bundle(plane, identity, r, c, outputs) for plane, r, c in planes]
        return found


def afferents(snn: SNN, shapes: Mapping[str, Shape]) -> dict[str, Afferents]:
    """The synapses of every layer that has some, by name.

    Args:
        snn: a converted network.
        shapes: height, width and channels of every node's value (the image's for the input).
    """
    counter = _Counter(snn, shapes)
    found = {}
    for name, layer in snn.layers.items():
        if isinstance(layer, EncodingLayer):
            found[name] = counter.encoding(layer)
        elif isinstance(layer, SpikingLayer):
            found[name] = counter.spiking(layer)
        elif isinstance(layer, Readout):
            found[name] = counter.readout(layer)
    return found
