"""What symbolic execution is made of: the state of one pass, and the ways in which an operation takes its operand.

A value is an Image, a Signal, a Current, or one of their relatives (values.py). An operation asks for it as the
signals that a layer may read (`_sources`), or as a current that a neuron may integrate (`_current`). Each raises
ConversionError, with the place in the model, where the value is no such thing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..model.graph import call_sites, describe, owner_class
from ..network.layers import INPUT, constant_name
from ..operators.geometry import POINTWISE
from ..operators.windows import PoolSpec
from .shapes import Shapes
from .sizes import Sizes
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
    Summed,
    dense,
    selected,
    without_choices,
)


@dataclass(frozen=True)
class Unknown:
    """What an obstacle left behind: nothing that works on it is judged, until an activation makes spikes again.

    `activation`: a module made it, so it depends on the image; what a function was to make may be a constant.
    """

    activation: bool


def one_current(x: Any) -> Any:
    return dense(x) if isinstance(x, Joined) else x


def float64(x: Tensor | None, default: Tensor) -> Tensor:
    """A parameter of the model in the arithmetic of conversion, or its default where the layer has none."""
    return default if x is None else x.detach().to("cpu", torch.float64)


def zeros(channels: int) -> Tensor:
    return torch.zeros(channels, dtype=torch.float64)


class Symbolic(Sizes):
    """One pass over the graph."""

    def __init__(self, gm: fx.GraphModule, shapes: Shapes | None) -> None:
        super().__init__(gm, shapes)
        self.needs_shapes = False
        self.sites = {node: (name, module) for name, node, module in call_sites(gm)}
        self.result = Lowered(Image((), (), ()))
        self.image: Image | None = None
        self.single: set[str] = set()  # layers whose maps have one pixel, whatever the size of images
        self.constants: dict[Any, Part] = {}  # neurons that always fire, by the maps that they cover

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
        return not isinstance(x, (Image, Signal, Current, Joined, Grouped, Laid, Summed, Row, Answer, Unknown))

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
