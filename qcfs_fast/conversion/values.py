"""What a value of the traced network is, between two activations: the algebra that lowering computes with.

Signal   spikes (or their window sums, or the image): integers times an amplitude per channel; a list of
         parts, concatenated along the channels
Current  what a neuron integrates: a sum of products (convolution or linear layer of a part) and identities
         (residual signals), plus a bias per channel

The amplitude of a layer's spikes is its threshold theta: a spike stands for theta in the network that was trained. All
values here are float64; rounding to integers comes later (units.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Any

import torch
from torch import Tensor

from ..network.layers import INPUT
from ..operators.windows import PoolSpec


@dataclass(frozen=True)
class Part:
    """One node's integers, pooled or not: value = amplitude[c] * (average over the windows of) the integer."""

    node: str
    amplitude: Tensor  # float64 [C]
    pools: tuple[PoolSpec, ...] = ()

    @property
    def channels(self) -> int:
        return self.amplitude.numel()

    @property
    def is_image(self) -> bool:
        return self.node == INPUT

    @property
    def needs_size(self) -> bool:
        return any(p.depends_on_size and p.size is None for p in self.pools)

    def settled(self) -> Part:
        """With the common divisor of each pool chosen and folded into the amplitude: value = amplitude * integer."""
        part = self
        for i, spec in enumerate(self.pools):
            if spec.kind == "max":
                continue
            multiple = lcm(*spec.divisors())
            pools = (*part.pools[:i], replace(spec, multiple=multiple), *part.pools[i + 1 :])
            part = replace(part, pools=pools, amplitude=part.amplitude / multiple)
        return part


@dataclass(frozen=True)
class Signal:
    """Parts that are concatenated along the channels."""

    parts: tuple[Part, ...]
    vector: bool = False  # flattened to [N, features]

    @property
    def channels(self) -> int:
        return sum(p.channels for p in self.parts)


@dataclass(frozen=True)
class Image:
    """The image before the first layer: channel i is source[i] * scale[i] + shift[i]."""

    source: tuple[int, ...]
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    vector: bool = False
    batch_only: bool = False  # one channel taken out, [N, H, W]
    map: tuple[int, ...] = ()  # [C, H, W], where the image was flattened


@dataclass(frozen=True)
class Product:
    """A convolution of a part, or a linear layer: then the kernel covers the whole map."""

    part: Part
    weight: Tensor  # float64 [O, C/groups, KH, KW], amplitude not yet folded in
    geometry: tuple[int, ...]
    vector: bool
    layer: str


@dataclass(frozen=True)
class Current:
    """A sum of products and identities, and a bias."""

    bias: Tensor  # float64 [O]
    products: tuple[Product, ...] = ()
    identities: tuple[Signal, ...] = ()
    vector: bool = False
    flattened: bool = False  # a map that was flattened before its activation or at the output

    @property
    def channels(self) -> int:
        return self.bias.numel()

    def nodes(self) -> set[str]:
        """The nodes whose integers it sums."""
        return {p.part.node for p in self.products} | {q.node for s in self.identities for q in s.parts}


@dataclass
class FireNode:
    """A spiking layer: its name, what it integrates, and its thresholds."""

    name: str
    current: Current
    theta: Tensor  # float64 [O]
    levels: int
    step_bias: Tensor | None = None  # float64 [steps, O], added to the bias

    def bias(self) -> Tensor:
        """The current's bias [O], or with that of each step [steps, O]."""
        return self.current.bias if self.step_bias is None else self.current.bias + self.step_bias


@dataclass(frozen=True)
class Answer:
    """The output of the network with a tail behind it: steps as network/tail.py takes them."""

    current: Current
    dims: int  # of the answer, the batch among them
    steps: tuple[tuple[Any, ...], ...] = ()


@dataclass
class Lowered:
    """A network as spiking layers in order of execution, and the current that is read out."""

    image: Image
    layers: list[FireNode] = field(default_factory=list)
    output: Current | None = None
    tail: tuple[tuple[Any, ...], ...] = ()


def identity_current(signal: Signal) -> Current:
    """The current that a signal is by itself, as in a residual connection."""
    return Current(torch.zeros(signal.channels, dtype=torch.float64), (), (signal,), signal.vector)


def scaled(signal: Signal, factor: Tensor) -> Signal:
    """A signal times a factor per channel."""
    parts, at = [], 0
    for p in signal.parts:
        parts.append(replace(p, amplitude=p.amplitude * factor[at : at + p.channels]))
        at += p.channels
    return replace(signal, parts=tuple(parts))


def affine(current: Current, scale: Tensor, shift: Tensor) -> Current:
    """current * scale + shift, per channel; scaling a product scales the rows of its weight."""
    return replace(
        current,
        bias=current.bias * scale + shift,
        products=tuple(replace(p, weight=p.weight * scale[:, None, None, None]) for p in current.products),
        identities=tuple(scaled(s, scale) for s in current.identities),
    )


# What two layers without an activation between them are: one layer, whose weight is the product of theirs.


def ungrouped(weight: Tensor, groups: int) -> Tensor:
    """The weight [O, C, KH, KW] of the convolution without groups that is the same; zero between the groups."""
    out, channels = weight.shape[:2]
    dense = weight.new_zeros((out, channels * groups, *weight.shape[2:]))
    for g, rows in enumerate(weight.chunk(groups)):
        at = g * (out // groups)
        dense[at : at + len(rows), g * channels : (g + 1) * channels] = rows
    return dense


def composed(current: Current, weight: Tensor, bias: Tensor, stride: tuple[int, int], layer: str) -> Current:
    """A convolution of 1x1 taps, weight [O, C], over a current with C channels; or a linear layer over a vector.

    It is the same as one layer with the product of both weights: no tap meets padding of its own, so this holds at the
    borders, and the bias stays one number for a channel.
    """
    products = []
    for p in current.products:
        kh, kw, sh, sw, *rest, groups = p.geometry
        inner = ungrouped(p.weight, groups)
        outer = torch.einsum("oc,cikl->oikl", weight, inner)
        geometry = (kh, kw, sh * stride[0], sw * stride[1], *rest, 1)
        products.append(replace(p, weight=outer, geometry=geometry, layer=f"{p.layer} * {layer}"))
    for signal in current.identities:
        at = 0
        for part in signal.parts:
            taps = weight[:, at : at + part.channels, None, None]
            products.append(Product(part, taps, (1, 1, *stride, 0, 0, 1, 1, 1), current.vector, layer))
            at += part.channels
    return replace(current, bias=weight @ current.bias + bias, products=tuple(products), identities=())


def joined(currents: Sequence[Current]) -> Current:
    """Currents side by side along the channels: each in rows of its own, zero in those of the others."""
    total = sum(c.channels for c in currents)
    products, at = [], 0
    for current in currents:
        rows = torch.zeros((total, current.channels), dtype=torch.float64)
        rows[at : at + current.channels] = torch.eye(current.channels, dtype=torch.float64)
        part = composed(current, rows, torch.zeros(total, dtype=torch.float64), (1, 1), "concatenation")
        products += [replace(p, layer=p.layer.removesuffix(" * concatenation")) for p in part.products]
        at += current.channels
    return Current(torch.cat([c.bias for c in currents]), tuple(products))
