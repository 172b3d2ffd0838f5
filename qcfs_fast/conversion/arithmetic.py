"""Lowering of sums, factors and concatenations of values, which a Current takes in, and of what changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..model.graph import called
from ..operators.geometry import POINTWISE
from .sizes import Size, shown
from .symbolic import Unknown, zeros
from .values import (
    Current,
    Image,
    Joined,
    Laid,
    Row,
    Signal,
    affine,
    composed,
    concatenated,
    joined,
    scaled,
)
from .weighted import Weighted


class Arithmetic(Weighted):
    """Sums, factors and concatenations of values."""

    def add(self, x: Any, y: Any, alpha: Any = 1) -> Any:
        if self._is_constant(x):
            return self._affine(self.scale(y, alpha), 1.0, x)
        if self._is_constant(y):
            return self._affine(x, 1.0, y * alpha)
        y = y if isinstance(alpha, (int, float)) and alpha == 1 else self.scale(y, alpha)
        a, b = (
            self._summand(self._read_image(v, None) if isinstance(v, Image) else v, "adds what is no layer's output")
            for v in (x, y)
        )
        sizes = [(self.shapes or {}).get(n, ())[1:] for n in self.node.all_input_nodes]
        if len(sizes) == 2 and all(sizes) and sizes[0] != sizes[1]:
            raise self.fail(
                f"adds maps of {shown(sizes[0])} and {shown(sizes[1])} pixels. Remedy: F.interpolate(small, "
                "size=large.shape[-2:])"
            )
        if a.vector == b.vector and 1 in (a.channels, b.channels) and a.channels != b.channels:
            # One channel goes to all of the other value.
            for c in (a, b):
                self._check_no_flattened_map(c)
            wide = torch.ones(max(a.channels, b.channels), 1, dtype=torch.float64)
            a, b = (self._mixed(c, wide) if c.channels == 1 else c for c in (a, b))
        if a.channels != b.channels or a.vector != b.vector:
            raise self.fail(f"adds values of {a.channels} and {b.channels} channels")
        return Current(
            a.bias + b.bias, a.products + b.products, a.identities + b.identities, a.vector, a.flattened or b.flattened
        )

    def _mixed(self, x: Any, weight: Tensor) -> Current:
        """Sums of the channels of a value, by constants [sums, channels]."""
        x = self._read_image(x, None) if isinstance(x, Image) else x
        x = self._summand(x, "mixes the channels of what is no layer's output")
        self._check_no_flattened_map(x)
        if len(weight) == x.channels == 1:
            return x
        return composed(x, weight[:, :, None, None], POINTWISE, zeros(len(weight)), self._layer())

    def _check_no_flattened_map(self, x: Current) -> None:
        """ConversionError where a value is a flattened map, whose features are more than its channels."""
        if (x.flattened or (x.vector and x.identities)) and not self._has_one_pixel(x):
            raise self.fail("mixes the features of a flattened map. Remedy: a linear layer, or do it before flatten")

    def subtract(self, x: Any, y: Any, alpha: Any = 1) -> Any:
        return self.add(x, y, -alpha)

    def negate(self, x: Any) -> Any:
        return self.scale(x, -1)

    def scale(self, x: Any, factor: Any) -> Any:
        if self._is_constant(x):
            x, factor = factor, x
        if not self._is_constant(factor):
            raise self.fail(f"multiplies two activations, which has no spiking counterpart. {self._without_gate()}")
        return self._affine(x, factor, 0.0)

    def divide(self, x: Any, factor: Any) -> Any:
        if not self._is_constant(factor):
            raise self.fail("divides by an activation, which has no spiking counterpart")
        if isinstance(factor, (int, float, Tensor)):
            factor = torch.as_tensor(factor).detach().to("cpu", torch.float64).reciprocal()
        return self._affine(x, factor, 0.0)

    def normalize(self, x: Any, mean: Any, std: Any) -> Any:
        """(x - mean) / std, lists with a number for each channel."""
        mean, std = (torch.tensor(v, dtype=torch.float64).reshape(-1, 1, 1) for v in (mean, std))
        return self.divide(self.subtract(x, mean), std)

    def _affine(self, x: Any, scale: Any, shift: Any) -> Any:
        """x * scale + shift."""
        if isinstance(x, Unknown):
            return x
        x = self._by_feature(x, max(v.numel() if isinstance(v, Tensor) else 1 for v in (scale, shift)))
        scale, shift = self._by_channel(x, scale), self._by_channel(x, shift)
        if isinstance(x, Laid | Row) and scale.numel() == shift.numel() == 1:
            return replace(x, value=self._affine(x.value, float(scale), float(shift)))
        if not isinstance(x, Image | Signal | Current | Joined):
            raise self.fail("scales or shifts what is no map and no vector. Remedy: do it before the reshape")
        if isinstance(x, Image):
            if bool(shift.any()) and any(spec.leaves_zeros for spec in x.moves):
                raise self.fail("adds a constant to an image with a border of zeros. Remedy: pad it behind that")
            n = max(len(x.scale), scale.numel(), shift.numel())
            x = self._whole_image(x, n) if n > 1 else x
            first, before = (torch.tensor(v or (d,), dtype=torch.float64) for v, d in ((x.scale, 1.0), (x.shift, 0.0)))
            after = ((first * scale).expand(n), (before * scale + shift).expand(n))
            return replace(x, scale=tuple(after[0].tolist()), shift=tuple(after[1].tolist()))
        if isinstance(x, Signal):
            if not bool(shift.any()) and (x.index is None or scale.numel() == 1):
                return scaled(x, scale.expand(x.width))
            x = self._current(x, None, "")
        return affine(x, scale.expand(x.channels), shift.expand(x.channels))

    def _by_channel(self, x: Any, value: Any) -> Tensor:
        """A constant as float64 [1] or [channels of x]."""
        if isinstance(value, Size):
            if self.shapes is not None:
                raise self.fail(
                    "computes with the size of the batch, which is no part of an image. Remedy: leave it out"
                )
            raise self._shape_needed("computes with a size that is not known")
        if not isinstance(value, (int, float, Tensor)):
            raise self.fail("computes with a constant that is neither a number nor a tensor")
        t = torch.as_tensor(value).detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(t).all()):
            raise self.fail("computes with a constant that is not finite")
        if t.numel() == 1 or not isinstance(x, Image | Signal | Current | Joined):
            return t.reshape(-1)
        rank = self._rank(x)
        shape = (*([1] * (rank - t.dim())), *t.shape)
        channels = (len(x.source) if isinstance(x, Image) else x.channels) or t.numel()
        if len(shape) != rank or shape[1] != channels or t.numel() != channels:
            if isinstance(x, Image) and self.shapes is None:
                raise self._shape_needed("computes with a constant for values of the image, whose shape is not known")
            raise self.fail(
                f"computes with a constant of shape {list(t.shape)}, which differs between pixels or does not fit "
                f"{channels} channels. Remedy: one number, or one for each channel ({[channels, *[1] * (rank - 2)]})"
            )
        return t.reshape(-1)

    def concat(self, tensors: Sequence[Any], dim: int = 0, **kwargs: Any) -> Any:
        dim = kwargs.get("axis", dim)
        if all(isinstance(t, Image) and t.moves == tensors[0].moves for t in tensors) and dim == 1:
            tensors = [self._whole_image(t, self._channels(t)) for t in tensors]
            return replace(
                tensors[0],
                source=sum((t.source for t in tensors), ()),
                scale=sum((t.scale for t in tensors), ()),
                shift=sum((t.shift for t in tensors), ()),
                width=max(t.channels for t in tensors),
            )
        vector = any(getattr(t, "vector", False) for t in tensors)
        tensors = [
            self._read_image(replace(t, vector=vector), None) if isinstance(t, Image) and not t.map else t
            for t in tensors
        ]
        if dim % self._rank(tensors[0]) != 1 or not all(isinstance(t, Signal | Current | Joined) for t in tensors):
            raise self.fail("concatenates values not along the channels. Remedy: torch.cat(values, 1)")
        if any(isinstance(t, Current | Joined) for t in tensors):
            if len({t.vector for t in tensors}) != 1 or any(
                self._is_flat(t) and not self._has_one_pixel(t) for t in tensors
            ):
                raise self.fail("concatenates flattened maps with no activation in between. Remedy: put one before")
            return joined([t if isinstance(t, Joined) else self._current(t, None, "") for t in tensors])
        if len({t.vector for t in tensors}) != 1:
            raise self.fail("concatenates feature maps and flattened values")
        self._check_areas(tensors)
        return concatenated(tensors)

    def _check_areas(self, tensors: Sequence[Signal]) -> None:
        """ConversionError where flattened maps do not have equally many pixels: a linear layer counts on it."""
        if all(map(self._has_one_pixel, tensors)) or not tensors[0].vector:
            return
        nodes = pytree.tree_leaves((self.node.args, self.node.kwargs), is_leaf=lambda v: isinstance(v, fx.Node))
        shapes = [(self.shapes or {}).get(n, ()) for n in nodes if isinstance(n, fx.Node)]
        if not all(shapes):
            raise self._shape_needed("concatenates flattened maps whose size is not known")
        if len({shape[0] // t.channels for shape, t in zip(shapes, tensors, strict=True)}) > 1:
            raise self.fail(
                "concatenates flattened maps of different sizes. Remedy: a linear layer for each, and their sum"
            )

    def expand(self, x: Any, *sizes: Any) -> Any:
        """A constant as large as a value, which those that take both do by themselves."""
        alone = {"add", "sub", "mul", "div", "truediv"}
        if not self._is_constant(x) or not all(called(user) in alone for user in self.node.users):
            raise self.fail("repeats a value, which has no spiking counterpart. Remedy: torch.cat, or F.interpolate")
        return x

    def keep(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x

    def dropout(
        self, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False, train: bool | None = None
    ) -> Any:
        """A dropout that is off; torch.dropout calls its `training` so: `train`."""
        if p and (training if train is None else train):
            raise self.fail(
                "drops values at random in eval mode too, as its `training` is True (F.dropout's default). Remedy: "
                "training=self.training, or nn.Dropout"
            )
        return x

    def alpha_dropout(self, x: Any, p: float = 0.5, training: bool = False, inplace: bool = False) -> Any:
        return self.dropout(x, p, training)

    def stochastic_depth(self, x: Any, p: float, mode: str, training: bool = True) -> Any:
        return self.dropout(x, p, training)

    def drop_block(
        self, x: Any, p: float, block_size: int, inplace: bool = False, eps: float = 1e-6, training: bool = True
    ) -> Any:
        return self.dropout(x, p, training)
