"""What a value of the traced network is, between two activations: the algebra that lowering computes with.

Signal   spikes (or their window sums, or the image): integers times an amplitude per channel; a list of
         parts, concatenated along the channels, or a choice of their channels in any order
Current  what a neuron integrates: a sum of products (convolution or linear layer of a part) and identities
         (residual signals), plus a bias per channel
Joined   currents side by side along the channels, as a DenseNet concatenates them

The amplitude of a layer's spikes is its threshold theta: a spike stands for theta in the network that was trained. All
values here are float64; rounding to integers comes later (units.py). Weights stay as the model stores them until they
are read, because a copy of all in float64 would take twice the memory of the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Any

import torch
from torch import Tensor

from ..network.layers import INPUT, piece_name
from ..network.schema import Geometry
from ..operators.geometry import POINTWISE
from ..operators.windows import PoolSpec

LOUDEST = 2.0**8  # a weight over another that one unit of 16 bits serves as well


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
    def counts(self) -> bool:
        """Whether its pools have made numbers of its spikes, one for each step."""
        return any(q.kind == "avg" for q in self.pools)

    @property
    def needs_size(self) -> bool:
        return any(p.depends_on_size and p.size is None for p in self.pools)

    def moved(self, *specs: PoolSpec) -> Part:
        """With its pixels where the windows of one pixel or none say; masks stay masks, and counts counts."""
        kind = "avg" if self.counts else "max"
        return replace(self, pools=(*self.pools, *(replace(s, kind=kind, divisor_override=1) for s in specs)))

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
    index: tuple[int, ...] | None = None  # the channels of the parts that it has, in its order; None: all

    @property
    def channels(self) -> int:
        return self.width if self.index is None else len(self.index)

    @property
    def width(self) -> int:
        """The channels of its parts."""
        return sum(p.channels for p in self.parts)

    @property
    def is_mixed(self) -> bool:
        """Whether the image stands beside spikes."""
        return len(self.parts) > 1 and any(p.is_image for p in self.parts)


@dataclass(frozen=True)
class Image:
    """The image before the first layer: channel i is source[i] * scale[i] + shift[i]."""

    source: tuple[int, ...]
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    vector: bool = False
    batch_only: bool = False  # one channel taken out, [N, H, W]
    line: bool = False  # [N, C, L]
    map: tuple[int, ...] = ()  # [C, H, W], where the image was flattened
    width: int = 0  # its channels, where some are not read
    moves: tuple[PoolSpec, ...] = ()  # what pads, crops or enlarges it, behind scale and shift

    @property
    def channels(self) -> int:
        """The channels of an image that is given."""
        return max(self.width, 1 + max(self.source))

    @property
    def dims(self) -> int:
        """The dimensions of a batch of images."""
        return 2 if self.vector else 3 if self.line else 4


@dataclass(frozen=True)
class Grouped:
    """A value whose channels a reshape has put into a table: index[i, j, ...] is the channel at that place."""

    value: Any
    index: Tensor  # int64


@dataclass(frozen=True)
class Laid:
    """A map whose pixels stand in one dimension, row by row: [N, C, H * W]."""

    value: Any
    size: tuple[int, int]  # H and W


@dataclass(frozen=True)
class Summed:
    """A map whose pixels are added up over the axes `over`: 2, the rows, 3, the columns, or both.

    How many there are depends on the size of images, so it stays a map until a layer reads the sums, or until they are
    divided by that number and are means.
    """

    value: Any
    size: tuple[int, int]  # H and W of `value`
    over: frozenset[int]
    kept: bool  # with axes of one pixel left in its shape


@dataclass(frozen=True)
class Row:
    """A vector that stands as [N, 1, features], or with more dimensions of one."""

    value: Any
    ones: int


@dataclass(frozen=True)
class Product:
    """A convolution of a part, or a linear layer: then the kernel covers the whole map."""

    part: Part
    stored: Tensor  # [O, C/groups, KH, KW], as the model has it: `weight` without its scale
    geometry: Geometry
    vector: bool
    layer: str
    scale: Tensor | None = None  # float64 [O]

    def rows(self, channels: slice) -> Tensor:
        """The weight of some output channels, float64, amplitude not yet folded in."""
        found = self.stored[channels].to(torch.float64)
        return found if self.scale is None else found * self.scale[channels, None, None, None]

    @property
    def weight(self) -> Tensor:
        return self.rows(slice(None))

    def with_weight(self, weight: Tensor, **changes: Any) -> Product:
        return replace(self, stored=weight, scale=None, **changes)

    def scaled(self, scale: Tensor) -> Product:
        """With each output channel times a factor."""
        return replace(self if self.scale is None else self.with_weight(self.weight), scale=scale)


@dataclass(frozen=True)
class Current:
    """A sum of products and identities, and a bias."""

    bias: Tensor  # float64 [O]
    products: tuple[Product, ...] = ()
    identities: tuple[Signal, ...] = ()
    vector: bool = False
    flattened: bool = False  # a map that was flattened before its activation or at the output
    size: tuple[Any, Any] = (None, None)  # its height and width before, where they are known

    @property
    def channels(self) -> int:
        return self.bias.numel()

    def nodes(self) -> set[str]:
        """The nodes whose integers it sums."""
        return {p.part.node for p in self.products} | {q.node for s in self.identities for q in s.parts}


@dataclass(frozen=True)
class Joined:
    """Currents side by side along the channels. As one current each would have rows of zeros for all others."""

    currents: tuple[Current, ...]

    @property
    def channels(self) -> int:
        return sum(c.channels for c in self.currents)

    @property
    def vector(self) -> bool:
        return self.currents[0].vector

    @property
    def flattened(self) -> bool:
        return self.currents[0].flattened


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


@dataclass
class Activation:
    """A call of an activation: a spiking layer, or one for each current of a concatenation before it."""

    name: str
    currents: tuple[Current, ...]
    theta: Tensor  # float64 [O]
    levels: int
    step_bias: Tensor | None = None  # float64 [steps, O], added to the bias

    def nodes(self) -> list[FireNode]:
        """Its spiking layers, in the order of the channels."""
        found, at = [], 0
        for i, c in enumerate(self.currents):
            here = slice(at, at + c.channels)
            name = piece_name(self.name, i) if len(self.currents) > 1 else self.name
            bias = None if self.step_bias is None else self.step_bias[:, here]
            found.append(FireNode(name, c, self.theta[here], self.levels, bias))
            at += c.channels
        return found


@dataclass(frozen=True)
class Answer:
    """The output of the network with a tail behind it: steps as network/tail.py takes them."""

    current: Current
    dims: int  # of the answer, the batch among them
    steps: tuple[tuple[Any, ...], ...] = ()


@dataclass
class Lowered:
    """A network as spiking layers in order of execution, and the currents that are read out, with their tails.

    `form` says how several outputs are put together (network/tail.py).
    """

    image: Image
    layers: list[Activation] = field(default_factory=list)
    outputs: list[Answer] = field(default_factory=list)
    form: Any = None


def identity_current(signal: Signal) -> Current:
    """The current that a signal is by itself, as in a residual connection.

    Where it has some channels of its parts, or all in another order, a weight of zeros and ones chooses them, and where
    the image stands beside spikes one for each.
    """
    nothing = torch.zeros(signal.channels, dtype=torch.float64)
    if signal.index is None and not signal.is_mixed:
        return Current(nothing, (), (signal,), signal.vector)
    choice = torch.eye(signal.channels, dtype=torch.float64)[:, :, None, None]
    products = tuple(Product(p, w, POINTWISE, False, "channels") for p, w, _ in dealt(choice, 1, signal))
    return Current(nothing, products)


def without_choices(current: Current) -> Current:
    """With products of zeros and ones for each identity that is not all of one node's channels, or of several's."""
    found = [identity_current(s) for s in current.identities]
    return replace(
        current,
        products=current.products + sum((c.products for c in found), ()),
        identities=sum((c.identities for c in found), ()),
    )


def concatenated(signals: Sequence[Signal]) -> Signal:
    """Signals side by side along the channels."""
    index, at = [], 0
    for s in signals:
        index += [at + i for i in (range(s.width) if s.index is None else s.index)]
        at += s.width
    chosen = tuple(index) if any(s.index is not None for s in signals) else None
    return Signal(sum((s.parts for s in signals), ()), signals[0].vector, chosen)


def selected(value: Signal | Current | Joined, index: Sequence[int]) -> Any:
    """Some channels of a value, in the order of `index`."""
    if isinstance(value, Joined):  # of each current those that are asked: as one, it would keep products of zeros
        owners = [(i, c) for i, current in enumerate(value.currents) for c in range(current.channels)]
        runs = itertools.groupby((owners[i] for i in index), lambda owner: owner[0])
        found = [selected(value.currents[i], [c for _, c in run]) for i, run in runs]
        return found[0] if len(found) == 1 else joined(found)
    if isinstance(value, Current):
        rows = torch.as_tensor(index, dtype=torch.int64)
        chosen = [identity_current(selected(s, index)) for s in value.identities]
        products = tuple(
            p.with_weight(ungrouped(p.weight, p.geometry[8])[rows], geometry=(*p.geometry[:8], 1))
            for p in value.products
        )
        return replace(
            value,
            bias=value.bias[rows],
            products=products + sum((c.products for c in chosen), ()),
            identities=sum((c.identities for c in chosen), ()),
        )
    places = list(range(value.width)) if value.index is None else value.index
    wanted = [places[i] for i in index]
    parts: list[Part] = []
    moved, at = {}, 0
    for p in value.parts:  # a part of which nothing is left goes
        here = range(at, at + p.channels)
        if any(i in here for i in wanted):
            first = sum(q.channels for q in parts)
            moved.update({i: first + i - at for i in here})
            parts.append(p)
        at += p.channels
    settled = tuple(moved[i] for i in wanted)
    whole = settled == tuple(range(sum(p.channels for p in parts)))
    return replace(value, parts=tuple(parts), index=None if whole else settled)


def dealt(weight: Tensor, groups: int, signal: Signal) -> list[tuple[Part, Tensor, int]]:
    """A weight [O, C / groups, ...] over a signal as one over each part of it, and its groups: their sum is the same.

    A concatenation is a sum, in which each part meets its own slice of the weight; channels left out meet zeros.
    """
    if signal.index is None and len(signal.parts) == 1:
        return [(signal.parts[0], weight, groups)]
    dense = ungrouped(weight, groups)
    if signal.index is not None:
        spread = torch.zeros((dense.shape[0], signal.width, *dense.shape[2:]), dtype=torch.float64)
        dense = spread.index_add(1, torch.tensor(signal.index, dtype=torch.int64), dense.to(torch.float64))
    found, at = [], 0
    for p in signal.parts:
        found.append((p, dense[:, at : at + p.channels], 1))
        at += p.channels
    return found


def merged(current: Current) -> Current:
    """With one product for all that read a part alike: in one geometry, or the image with one kernel inside another."""
    products: list[Product] = []
    for p in current.products:
        for i, q in enumerate(products):
            found = _sum(q, p) or _sum(p, q)
            if found is not None:
                products[i] = replace(found, layer=q.layer if p.layer == q.layer else f"{q.layer} + {p.layer}")
                break
        else:
            products.append(p)
    return replace(current, products=tuple(products))


def _sum(large: Product, small: Product) -> Product | None:
    """Two products as one, if the kernel of `small`, padded with zeros, is a kernel of `large`.

    For spikes only equal geometries count: there zeros would be work.
    """
    a, b = large.part, small.part
    if (a.node, a.pools, large.vector) != (b.node, b.pools, small.vector) or not torch.equal(a.amplitude, b.amplitude):
        return None
    if large.geometry == small.geometry:
        fits = large.stored.shape == small.stored.shape
        return large.with_weight(large.weight + small.weight) if fits else None
    (kh, kw, *stride, ph, pw, dh, dw, groups), (h, w, *other, qh, qw, eh, ew, own) = large.geometry, small.geometry
    top, left = ph - qh, pw - qw
    if not a.is_image or large.vector or stride != other or {dh, dw, eh, ew} != {1}:
        return None
    if not (0 <= top <= kh - h and 0 <= left <= kw - w):
        return None
    weight = ungrouped(large.weight, groups).clone()
    weight[:, :, top : top + h, left : left + w] += ungrouped(small.weight, own)
    return large.with_weight(weight, geometry=(*large.geometry[:8], 1))


def by_loudness(product: Product) -> list[Product]:
    """A product as a sum of some, each of channels whose largest weights lie within a factor of LOUDEST.

    One unit serves all weights of an output channel. Beside one of a far larger threshold, of a neuron that may never
    fire, the others would round to zero.
    """
    amplitude = product.part.amplitude
    largest = product.weight.abs().amax((2, 3)).unflatten(0, (product.geometry[8], -1)).amax(1).flatten()
    found, rest = [], largest * amplitude.abs()
    while bool((here := rest > rest.max() / LOUDEST).any()):
        found.append(replace(product, part=replace(product.part, amplitude=torch.where(here, amplitude, 0.0))))
        rest = torch.where(here, 0.0, rest)
    return found if len(found) > 1 else [product]


def scaled(signal: Signal, factor: Tensor) -> Signal:
    """A signal times a factor per channel of its parts."""
    parts, at = [], 0
    for p in signal.parts:
        parts.append(replace(p, amplitude=p.amplitude * factor[at : at + p.channels]))
        at += p.channels
    return replace(signal, parts=tuple(parts))


def affine(current: Current | Joined, scale: Tensor, shift: Tensor) -> Any:
    """current * scale + shift, per channel; scaling a product scales the rows of its weight."""
    if isinstance(current, Joined):
        sizes = [c.channels for c in current.currents]
        each = zip(current.currents, scale.split(sizes), shift.split(sizes), strict=True)
        return replace(current, currents=tuple(affine(*c) for c in each))
    current = current if bool((scale == scale[0]).all()) else without_choices(current)
    return replace(
        current,
        bias=current.bias * scale + shift,
        products=tuple(p.scaled(scale) for p in current.products),
        identities=tuple(
            scaled(s, scale if s.index is None else scale[:1].expand(s.width)) for s in current.identities
        ),
    )


# What two layers without an activation between them are: one layer, whose weight is the product of theirs.


def ungrouped(weight: Tensor, groups: int) -> Tensor:
    """The weight [O, C, KH, KW] of the convolution without groups that is the same; zero between the groups."""
    out, channels = weight.shape[:2]
    if groups == 1:
        return weight
    dense = weight.new_zeros((out, channels * groups, *weight.shape[2:]))
    for g, rows in enumerate(weight.chunk(groups)):
        at = g * (out // groups)
        dense[at : at + len(rows), g * channels : (g + 1) * channels] = rows
    return dense


def composable(current: Current, outer: Geometry) -> bool:
    """Whether a convolution of this geometry over a current is one convolution of what the current reads.

    Along each axis the outer one pads nothing, or the inner ones give zeros outside of their maps, where they meet
    nothing but padding: the zeros that the outer one pads are then what the inner ones make of zeros. So it is with one
    tap, and with a transposed convolution that cuts nothing off. A bias is no such zero.
    """
    if outer[4:6] != (0, 0) and bool(current.bias.any()):
        return False
    inner = [p.geometry for p in current.products]
    return all(outer[4 + a] == 0 or _zero_outside(g, a) for g in inner for a in (0, 1))


def _zero_outside(inner: Geometry, axis: int) -> bool:
    kernel, stride, padding, dilation = inner[axis:8:2]
    return (stride == 1 and padding >= dilation * (kernel - 1)) or (kernel, padding) == (1, 0)


def composed(current: Current, weight: Tensor, outer: Geometry, bias: Tensor, layer: str) -> Current:
    """A convolution, weight [O, C / groups, KH, KW], over a current with C channels that is composable with it.

    It is the same as one layer: the outer one's tap a of the inner one's tap b reads at a * step + b * space.
    """
    groups = outer[8]
    weight = weight.to(torch.float64)
    products = []
    for p in current.products:
        inner = ungrouped(p.weight, p.geometry[8])
        size, dilation, step, space = [], [], [], []
        for a in (0, 1):
            (k, s, _, d), (K, _, _, D) = p.geometry[a:8:2], outer[a:8:2]
            # Where one of both has a single tap, the other's dilation remains one.
            dilation.append(D * s if k == 1 else d if K == 1 else 1)
            step.append(1 if k == 1 else D * s)
            space.append(1 if K == 1 else d)
            size.append((K - 1) * step[a] + (k - 1) * space[a] + 1)
        taps = torch.zeros((weight.shape[0], inner.shape[1], *size), dtype=torch.float64)
        for i, j in itertools.product(range(outer[0]), range(outer[1])):
            here = zip(weight[:, :, i, j].chunk(groups), inner.chunk(groups), strict=True)
            product = torch.cat([torch.einsum("oc,cikl->oikl", *both) for both in here])
            rows, columns = (
                slice(n * t, n * t + (k - 1) * e + 1, e)
                for n, t, k, e in zip((i, j), step, p.geometry, space, strict=False)
            )
            taps[:, :, rows, columns] += product
        own = p.geometry
        strides = [own[2 + a] * outer[2 + a] for a in (0, 1)]
        pads = [own[4 + a] + own[2 + a] * outer[4 + a] for a in (0, 1)]
        geometry = (*size, *strides, *pads, *dilation, 1)
        products.append(p.with_weight(taps, geometry=geometry, layer=f"{p.layer} * {layer}"))
    for signal in current.identities:
        products += [
            Product(part, w, (*outer[:8], own), current.vector, layer) for part, w, own in dealt(weight, groups, signal)
        ]
    constant = ungrouped(weight, groups).sum((2, 3)) @ current.bias
    return replace(current, bias=constant + bias, products=tuple(products), identities=())


def joined(currents: Sequence[Current | Joined]) -> Joined:
    """Currents side by side; neighbours that read the same parts alike are one, with the rows of both."""
    found: list[Current] = []
    for c in (c for value in currents for c in (value.currents if isinstance(value, Joined) else (value,))):
        if found and (alike := _reads(c)) is not None and alike == _reads(found[-1]):
            found[-1] = dense(Joined((found[-1], c)))
        else:
            found.append(c)
    return Joined(tuple(found))


def _reads(current: Current) -> Any:
    """What a current reads and how, if it can be made wider: it has no identities and no groups."""
    if current.identities or any(p.geometry[8] != 1 for p in current.products):
        return None
    return [(p.part.node, p.part.pools, p.part.amplitude.tolist(), p.geometry, p.vector) for p in current.products]


def dense(value: Joined) -> Current:
    """The same as one current: each has rows of its own, and zeros in those of the others."""
    first = value.currents[0]
    if _reads(first) is not None and all(_reads(c) == _reads(first) for c in value.currents[1:]):
        rows = zip(*(c.products for c in value.currents), strict=True)
        products = [p[0].with_weight(torch.cat([q.weight for q in p])) for p in rows]
    else:
        products, at = [], 0
        for current in value.currents:
            rows_of = torch.zeros((value.channels, current.channels), dtype=torch.float64)
            rows_of[at : at + current.channels] = torch.eye(current.channels, dtype=torch.float64)
            nothing = torch.zeros(value.channels, dtype=torch.float64)
            wide = composed(current, rows_of[:, :, None, None], POINTWISE, nothing, "concatenation")
            products += [replace(p, layer=p.layer.removesuffix(" * concatenation")) for p in wide.products]
            at += current.channels
    return replace(first, bias=torch.cat([c.bias for c in value.currents]), products=tuple(products), identities=())
