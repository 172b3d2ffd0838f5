"""What symbolic execution is made of: the state of one pass, and the ways in which an operation takes its operand.

A value is an Image, a Signal, a Current, or one of their relatives (values.py). An operation asks for it as the
signals that a layer may read (`_sources`), or as a current that a neuron may integrate (`_current`). Each raises
ConversionError, with the place in the model, where the value is no such thing. A size that is not known is a Size,
and what is computed with it remains one.

A network of lines, [N, C, L], is one of maps that are one pixel high: where a model names one number, that of the
height is added here.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import ConversionError
from ..model.graph import call_sites, called, describe, owner_class, place_of, reads_lines
from ..network.layers import INPUT, constant_name
from ..operators.geometry import POINTWISE
from ..operators.windows import PoolSpec
from .shapes import Shapes
from .values import (
    Activation,
    Answer,
    Current,
    Grouped,
    Image,
    Joined,
    Laid,
    Lowered,
    Part,
    Product,
    Row,
    Signal,
    dense,
    selected,
    without_choices,
)


class ShapeNeededError(ConversionError):
    """Lowering cannot go on without the shape of the images."""


@dataclass(frozen=True)
class Unknown:
    """What an obstacle left behind: nothing that works on it is judged, until an activation makes spikes again.

    `activation`: a module made it, so it depends on the image; what a function was to make may be a constant.
    """

    activation: bool


def one_current(x: Any) -> Any:
    return dense(x) if isinstance(x, Joined) else x


class Size:
    """A size that is not a number here: that of the batch, or any while the shape of the images is not known.

    So is what Python computes with it.
    """

    def __repr__(self) -> str:
        return "N"


def has_size(x: Any) -> bool:
    return any(isinstance(v, Size) for v in pytree.tree_leaves(x))


def whole(sizes: Sequence[Any]) -> bool:
    """Whether all sizes are numbers."""
    return all(isinstance(size, int) for size in sizes)


def is_rest(size: Any) -> bool:
    """Whether a size of a reshape is -1, what is left."""
    return isinstance(size, int) and size == -1


def shown(shape: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def float64(x: Tensor | None, default: Tensor) -> Tensor:
    """A parameter of the model in the arithmetic of conversion, or its default where the layer has none."""
    return default if x is None else x.detach().to("cpu", torch.float64)


def zeros(channels: int) -> Tensor:
    return torch.zeros(channels, dtype=torch.float64)


def _asks_for_shape(node: fx.Node) -> bool:
    return called(node) == "size" or (node.target is getattr and node.args[1] == "shape")


class Symbolic:
    """One pass over the graph. `shapes` maps nodes to the shapes of their values without the batch, if known.

    `line`: the images are lines.
    """

    def __init__(self, gm: fx.GraphModule, shapes: Shapes | None) -> None:
        self.gm = gm
        self.shapes = shapes
        self.needs_shapes = False
        self.line = reads_lines(gm)
        self.sites = {node: (name, module) for name, node, module in call_sites(gm)}
        self.values: dict[fx.Node, Any] = {}
        self.node: fx.Node  # the one being executed
        self.result = Lowered(Image((), (), ()))
        self.image: Image | None = None
        self.single: set[str] = set()  # layers whose maps have one pixel, whatever the size of images
        self.sized: set[fx.Node] = set()  # numbers that are another one in images of another size
        self.constants: dict[Any, Part] = {}  # neurons that always fire, by the maps that they cover

    def fail(self, why: str) -> ConversionError:
        return ConversionError(f"{place_of(self.node)}: {why}")

    def _without_gate(self) -> str:
        """What to do about a product of two activations."""
        kind = owner_class(self.node) or "its class"
        return (
            f"Remedy for a gate, as that of squeeze-and-excitation: prepare(model, replace={{{kind}}}) leaves it out, "
            "and train then. Attention cannot be converted"
        )

    def _is_constant(self, x: Any) -> bool:
        """Whether a value depends on parameters alone, not on the image."""
        if isinstance(x, (tuple, list)):
            return all(map(self._is_constant, x))
        if isinstance(x, dict):
            return all(map(self._is_constant, x.values()))
        return not isinstance(x, (Image, Signal, Current, Joined, Grouped, Laid, Row, Answer, Unknown))

    def _depends_on_size(self, node: fx.Node) -> bool:
        """Whether a node is a number, or several, that images of another size would change."""
        if not self._is_constant(self.values[node]) or isinstance(self.values[node], bool) or not node.all_input_nodes:
            return False
        source = node.all_input_nodes[0]
        if _asks_for_shape(node):
            return node.target is getattr or len(node.args) < 2 or self._is_of_pixels(source, node.args[1])
        if node.target is operator.getitem and _asks_for_shape(source) and source in self.sized:
            return self._is_of_pixels(source.all_input_nodes[0], node.args[1])
        return not self.sized.isdisjoint(node.all_input_nodes)

    def _is_of_pixels(self, x: fx.Node, dim: Any) -> bool:
        """Whether a dimension of a map is its height or its width."""
        rank = 1 + len((self.shapes or {}).get(x, ()))
        return rank > 2 and not (isinstance(dim, int) and dim % rank < 2)

    def _asks_for_sizes(self) -> bool:
        """Whether an argument of the node being executed holds for images of one size alone."""
        return not self.sized.isdisjoint(self.node.all_input_nodes)

    def _is_mean(self, divisor: Any) -> bool:
        """Whether the node being executed divides the sum of a map's pixels by how many that map has."""
        summed, *sizes = self.node.all_input_nodes
        source, asked = summed, set()
        while called(source) == "sum":
            source = source.all_input_nodes[0]
        while sizes:
            size = sizes.pop()
            if _asks_for_shape(size):
                asked.add(size.all_input_nodes[0])
            else:
                sizes += size.all_input_nodes
        pixels = (self.shapes or {}).get(source, ())[1:]
        return source is not summed and asked == {source} and bool(divisor == math.prod(pixels))

    @staticmethod
    def _unknown(x: Any) -> Unknown | None:
        """What is unknown among arguments, if any is."""
        found = [v for v in pytree.tree_leaves(x) if isinstance(v, Unknown)]
        return Unknown(all(v.activation for v in found)) if found else None

    def _read_image(self, x: Image, channels: int | None) -> Signal:
        """The image as the one analog Part; all layers that read it must agree on its channels."""
        if x.batch_only:
            raise self.fail("reads a single channel taken out of the image; keep the channel dimension (x[:, i:i+1])")
        if not x.source:
            if channels is None:
                shape = self._image_shape()
                if shape is None:
                    raise self._shape_needed("reads the image, whose channels are not known")
                channels = shape[0]
            x = self._whole_image(x, channels)
        if self.image is not None and replace(self.image, vector=x.vector) != x:
            raise self.fail(
                "reads the image with another normalisation, border or channel order than the first layer; use one for "
                "all"
            )
        self.image = x
        return Signal((Part(INPUT, torch.ones(len(x.source), dtype=torch.float64)),), x.vector)

    def _image_shape(self) -> tuple[int, ...] | None:
        """The shape of an image, if known."""
        return next((s for n, s in (self.shapes or {}).items() if n.op == "placeholder"), None)

    @staticmethod
    def _whole_image(x: Image, channels: int) -> Image:
        """With its channels named, which before nothing has read: all are scaled alike."""
        if x.source:
            return x
        scale, shift = x.scale or (1.0,), x.shift or (0.0,)
        return replace(x, source=tuple(range(channels)), scale=scale * channels, shift=shift * channels)

    def _current(self, x: Any, channels: int | None, why_not: str) -> Current:
        """The value as what a neuron may integrate: spikes stand for the current that they are."""
        if isinstance(x, Image):
            x = self._read_image(x, channels)
        x = self._summand(x, why_not)
        if any(s.vector and s.index is not None and not self._has_one_pixel(s) for s in x.identities):
            raise self.fail("reorders or drops channels and flattens them, with no layer behind; put one there")
        return without_choices(x)

    def _summand(self, x: Any, why_not: str) -> Current:
        """The value as a current in which spikes are still what a layer may read."""
        if isinstance(x, Signal):
            return Current(zeros(x.channels), (), (x,), x.vector)
        if not isinstance(x, Current):
            raise self.fail(why_not)
        return x

    def _bias_as_spikes(self, x: Current) -> Current:
        """With its bias carried by neurons that fire at every step: zeros that are padded later lie outside of it.

        One such neuron stands at each pixel of the map; it reads what the current reads, with weights of zero.
        """
        if not bool(x.bias.any()):
            return x
        of_identities = [Product(p, torch.empty(0), POINTWISE, False, "") for s in x.identities for p in s.parts]
        read = min((*x.products, *of_identities), key=lambda p: len(p.part.pools))
        (kh, kw, *rest), part = read.geometry[:8], read.part
        key = (part.node, part.pools, read.geometry[:8])
        if key not in self.constants:
            name = constant_name(part.node, len(self.constants))
            one = torch.ones(1, dtype=torch.float64)
            nothing = Product(part, torch.zeros(1, part.channels, kh, kw), (kh, kw, *rest, 1), False, "constant")
            self.result.layers.append(Activation(name, (Current(one, (nothing,)),), one, 1))
            self.needs_shapes |= part.needs_size
            self.constants[key] = Part(name, one)
        carried = Product(self.constants[key], x.bias[:, None, None, None], POINTWISE, False, "bias")
        return replace(x, bias=zeros(x.channels), products=(*x.products, carried))

    def _by_taps(self, x: Current) -> Current:
        """With each tap of its convolutions as a product of its own, of one pixel of the spikes moved by that tap.

        What a layer behind it pads are zeros then, and not what a tap would read there. That is work for each pair of
        taps, so it is done where nothing else is exact.
        """
        if x.vector or any(p.part.is_image for p in x.products):
            return x
        products = []
        for p in x.products:
            (kh, kw, sh, sw, ph, pw, dh, dw, groups), part = p.geometry, p.part
            if p.geometry[:8] == POINTWISE[:8]:
                products.append(p)
                continue
            high, wide = dh * (kh - 1), dw * (kw - 1)
            border = (PoolSpec("max", (1, 1), padding=(ph, pw)),) if (ph, pw) != (0, 0) else ()
            for i, j in itertools.product(range(kh), range(kw)):
                place = PoolSpec.cropped((i * dh, high - i * dh), (j * dw, wide - j * dw), (sh, sw))
                tap = part.moved(*border, place)
                geometry = (*POINTWISE[:8], groups)
                products.append(p.with_weight(p.weight[:, :, i : i + 1, j : j + 1], part=tap, geometry=geometry))
        return replace(x, products=tuple(products))

    def _spikes_alone(self, signals: Sequence[Signal]) -> Sequence[Signal]:
        """The signals, none of them of the image."""
        if any(s.is_mixed for s in signals):
            raise self.fail(
                "works on a concatenation with the image, which only a layer can read. Remedy: concatenate behind it"
            )
        if any(p.is_image for s in signals for p in s.parts):
            raise self.fail("works on the image behind a BatchNorm or a sum. Remedy: do it with the image before these")
        return signals

    def _sources(self, x: Any, what: str, channels: int) -> list[Signal]:
        """The signals a linear operator may be applied to (a sum of signals, by linearity, one by one)."""
        if isinstance(x, Image):
            return [self._read_image(x, channels)]
        if isinstance(x, Signal):
            return [x]
        if isinstance(x, Current) and not x.products:
            return list(x.identities)
        if isinstance(x, Current) and any(p.part.is_image for p in x.products):
            raise self.fail(
                f"{what} of what a layer made of the image, with no activation in between. Remedy: put a ReLU (then "
                "QCFS) between the two layers, or leave out the padding of the second"
            )
        raise self.fail(
            f"{what} of a value with no activation in between, so there are no spikes to work on. Remedy: put a ReLU "
            "(then QCFS) between the two layers, or merge them into one"
        )

    def _layer(self) -> str:
        """The name of the layer that this node is, for reports."""
        return str(self.node.target) if self.node.op == "call_module" else describe(self.node)

    def _check_weights(self, what: str, weight: Any, bias: Any = None) -> None:
        """ConversionError where the weights of a layer are computed from the image."""
        if not isinstance(weight, Tensor) or not isinstance(bias, Tensor | None):
            raise self.fail(f"is a {what} whose weights depend on the image, which has no spiking counterpart")

    def _shape_needed(self, why: str) -> ShapeNeededError:
        return ShapeNeededError(
            f"{place_of(self.node)}: {why}; give convert(..., input_shape={'(C, L)' if self.line else '(C, H, W)'}), "
            "or run the prepared model on an image"
        )

    def _channels(self, x: Any) -> int:
        if isinstance(x, Image) and not x.source:  # it is whole
            shape = self._image_shape()
            if shape is None:
                raise self._shape_needed("takes channels of the image, whose shape is not known")
            return shape[0]
        if not isinstance(x, Image | Signal | Current | Joined):
            raise self.fail("takes parts of what is no map of spikes or of currents")
        return len(x.source) if isinstance(x, Image) else x.channels

    def _has_one_pixel(self, x: Any) -> bool:
        """Whether a value is a vector of a layer's own features, or a map of one pixel, whatever the size of images."""

        def single(p: Part) -> bool:
            return p.pools[-1].output == (1, 1) if p.pools else p.node in self.single

        if isinstance(x, Joined):
            return all(map(self._has_one_pixel, x.currents))
        if isinstance(x, Signal):
            return all(single(p) or (p.is_image and x.vector) for p in x.parts)
        if isinstance(x, Current) and x.flattened and x.size == (1, 1):
            return True
        return (
            isinstance(x, Current)
            and all(p.vector or (p.geometry[:8] == POINTWISE[:8] and single(p.part)) for p in x.products)
            and all(self._has_one_pixel(s) for s in x.identities)
        )

    def _selected(self, x: Any, index: Sequence[int]) -> Any:
        """Some channels of a value."""
        if isinstance(x, Image) and not x.batch_only and not x.map:
            whole = self._whole_image(x, self._channels(x))
            source = tuple(whole.source[i] for i in index)
            scale, shift = (tuple(v[i] for i in index) for v in (whole.scale, whole.shift))
            return replace(x, source=source, scale=scale, shift=shift, width=whole.channels)
        if not isinstance(x, Signal | Current | Joined) or (self._is_flat(x) and not self._has_one_pixel(x)):
            raise self.fail(
                "takes some features of a flattened map or image, which has no spiking counterpart. Remedy: take "
                "channels of the map before it is flattened, or all features, with a linear layer's weight of zero for "
                "those left out"
            )
        if not index:
            raise self.fail("takes no channels at all")
        return selected(x, index)

    def _shape(self, x: Any) -> tuple[Any, ...]:
        """The shape of a value: the batch is a Size, and so is what is not known yet."""
        known = (self.shapes or {}).get(self.node.all_input_nodes[0]) if self.node.all_input_nodes else None
        if known is not None:
            return (Size(), *known)
        return tuple(Size() for _ in range(self._rank(x)))

    @staticmethod
    def _is_flat(x: Any) -> bool:
        return bool(getattr(x, "vector", False) or getattr(x, "flattened", False) or getattr(x, "map", ()))

    def _rank(self, x: Any) -> int:
        """The dimensions of a map or a vector, the batch among them."""
        return 2 if self._is_flat(x) else 3 if self.line else 4

    def _map_size(self, x: Any) -> tuple[Any, Any]:
        """Height and width of a map."""
        *_, height, width = (1, *self._shape(x)[2:]) if self.line else self._shape(x)
        return height, width

    def _pair(self, x: Any, alone: int) -> tuple[int, int]:
        """What an argument says of height and width; `alone`: of the height of a line."""
        given = list(x) if isinstance(x, (tuple, list)) else [x]
        if not whole(given):
            raise self._shape_needed("is told a size that is not known")
        return alone if self.line else int(given[0]), int(given[-1])
