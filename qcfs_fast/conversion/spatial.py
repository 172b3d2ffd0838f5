"""Lowering of what moves or sums pixels: pools, pads, crops, upsampling, pixel shuffles, transposed convolution.

All are windows over the spikes of a Part (PoolSpec), of one pixel or none where nothing is summed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..model.graph import tail_step
from ..network.schema import Geometry
from ..operators.geometry import POINTWISE
from ..operators.windows import BORDERS, PoolSpec
from .ends import Ends
from .sizes import whole
from .symbolic import float64, zeros
from .values import (
    Answer,
    Current,
    Image,
    Part,
    Product,
    Signal,
    composable,
    composed,
)


def pointwise(x: Current) -> bool:
    """Whether a current reads each pixel for itself, of spikes."""
    parts = (q for s in x.identities for q in s.parts)
    return all(p.geometry[:8] == POINTWISE[:8] and not p.part.is_image for p in x.products) and not any(
        q.is_image for q in parts
    )


_PLAIN_MAX = "max pooling with dilation or indices is not supported. Remedy: MaxPool2d without these"


def _steps_by_one(product: Product) -> bool:
    return product.geometry[2:4] == (1, 1) and not product.part.is_image


def _widened(geometry: Geometry, factors: tuple[int, int]) -> Geometry:
    """A convolution of stride 1 on a map in which each pixel has become several."""
    kh, kw, *_, ph, pw, dh, dw, groups = geometry
    h, w = factors
    return (kh, kw, 1, 1, ph * h, pw * w, dh * h if kh > 1 else 1, dw * w if kw > 1 else 1, groups)


def parts_mapped(x: Any, change: Callable[[Part], Part]) -> Any:
    """A signal, or a current, with each part that it reads changed."""
    if isinstance(x, Signal):
        return replace(x, parts=tuple(map(change, x.parts)))
    products = tuple(replace(p, part=change(p.part)) for p in x.products)
    return replace(x, products=products, identities=tuple(parts_mapped(s, change) for s in x.identities))


def _average(spec: PoolSpec) -> Tensor | None:
    """The weight [KH, KW] of a pool whose windows are all alike."""
    if spec.kernel is None or spec.ceil_mode or (spec.pads and not spec.count_include_pad):
        return None
    return torch.full(spec.kernel, 1.0 / (spec.divisor_override or math.prod(spec.kernel)), dtype=torch.float64)


class Spatial(Ends):
    """What moves or sums pixels: pools, pads, crops, upsampling, transposed convolution."""

    def _pooled(self, x: Any, spec: PoolSpec) -> Signal | Current:
        if isinstance(x, Image):
            if spec.kind == "max" or _average(spec) is None or x.vector or x.map:
                raise self.fail(
                    "pools the image itself, and not by the mean of windows that are all alike. Remedy: AvgPool2d, "
                    "without ceil_mode and with count_include_pad, or resize images before they enter"
                )
            x = self._summand(self._read_image(x, None), "")
        if isinstance(x, Current) and spec.kind == "avg" and not x.vector:
            x = self._bias_as_spikes(x) if spec.pads else x
            if not pointwise(x) and (weight := _average(spec)) is not None:
                window = (*weight.shape, *spec.stride, *spec.padding, 1, 1, x.channels)
                if composable(x, window):
                    weight = weight.expand(x.channels, 1, *weight.shape)
                    return composed(x, weight, window, zeros(x.channels), "average")
            x = self._by_taps(x)
            if pointwise(x) and x.products:  # averaging commutes with it
                return parts_mapped(x, lambda p: self._pooled_part(p, spec))
        signals = self._spikes_alone(self._sources(x, "is pooling", 1))
        if any(s.vector for s in signals):
            raise self.fail("pools a flattened value")
        if spec.kind == "max" and (
            isinstance(x, Current) or any(q.kind == "avg" for s in signals for p in s.parts for q in p.pools)
        ):
            raise self.fail("max pooling works on spikes only; use prepare(model, max_pool='avg')")
        if spec.kind == "max" and any(bool((p.amplitude < 0).any()) for s in signals for p in s.parts):
            raise self.fail("takes the maximum of spikes times a negative factor. Remedy: pool first, then scale")
        return parts_mapped(x if isinstance(x, Current) else signals[0], lambda p: self._pooled_part(p, spec))

    def _pooled_part(self, part: Part, spec: PoolSpec) -> Part:
        if spec.size is None and self.shapes and self.node.all_input_nodes[0] in self.shapes:
            spec = replace(spec, size=self._map_size(None))
        return replace(part, pools=(*part.pools, spec))

    def avg_pool(
        self,
        x: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Signal | Current:
        kernel, padding = self._pair(kernel_size, 1), self._pair(padding, 0)
        if self._is_whole_map(kernel, kernel_size):
            return self._pooled(x, PoolSpec("avg", output=(1, 1)))
        stride = self._pair(stride, 1) if stride else kernel
        if kernel == (1, 1) == (divisor_override or 1, 1) and padding == (0, 0):
            return self._strided(x, stride)
        window = (kernel, stride, padding, bool(ceil_mode), bool(count_include_pad), divisor_override)
        return self._pooled(x, PoolSpec("avg", *window))

    def adaptive_pool(self, x: Any, output_size: Any, kind: str = "avg") -> Signal | Current:
        asked = output_size if isinstance(output_size, (tuple, list)) else [output_size]
        height, width = (None if o is None else self._pair(o, 1)[1] for o in (asked[0], asked[-1]))
        return self._pooled(x, PoolSpec(kind, output=(1 if self.line else height, width)))

    def adaptive_max_pool(self, x: Any, output_size: Any, return_indices: bool = False) -> Signal | Current:
        if return_indices:
            raise self.fail(_PLAIN_MAX)
        return self.adaptive_pool(x, output_size, "max")

    def max_pool(
        self,
        x: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Signal | Current:
        if return_indices or self._pair(dilation, 1) != (1, 1):
            raise self.fail(_PLAIN_MAX)
        kernel, padding = self._pair(kernel_size, 1), self._pair(padding, 0)
        if self._is_whole_map(kernel, kernel_size):
            return self._pooled(x, PoolSpec("max", output=(1, 1)))
        stride = self._pair(stride, 1) if stride else kernel
        if kernel == (1, 1) and padding == (0, 0):
            return self._strided(x, stride)
        return self._pooled(x, PoolSpec("max", kernel, stride, padding, bool(ceil_mode)))

    def _moved(self, x: Any, spec: PoolSpec) -> Any:
        """A value whose pixels go where the windows of `spec` say."""
        if isinstance(x, Image):
            if x.vector or x.map or x.batch_only:
                raise self.fail("moves pixels of a flattened image. Remedy: pad, crop or resize it before")
            return replace(x, moves=(*x.moves, spec))
        if isinstance(x, Current) and not x.vector:
            x = self._bias_as_spikes(x) if spec.leaves_zeros else x
            if not pointwise(x) and spec.spreads and x.products and all(_steps_by_one(p) for p in x.products):
                # Each tap moves on by as many pixels as one has become.
                wide = [replace(p, geometry=_widened(p.geometry, spec.spread)) for p in x.products]
                return parts_mapped(replace(x, products=tuple(wide)), lambda p: p.moved(spec))
            x = self._by_taps(x)
            if pointwise(x) and x.products:
                return parts_mapped(x, lambda p: p.moved(spec))
        signals = self._spikes_alone(self._sources(x, "moves pixels", 1))
        if any(s.vector for s in signals):
            raise self.fail("moves pixels of a flattened value")
        return parts_mapped(x, lambda p: p.moved(spec))

    def pad(self, x: Any, pad: Sequence[Any], mode: str = "constant", value: Any = None) -> Any:
        if (mode != "constant" and mode not in BORDERS) or value not in (None, 0):
            raise self.fail("pads with something else than zeros or pixels, which is no spike. Remedy: pad with zeros")
        if not whole(pad):
            raise self._shape_needed("pads by a size that is not known")
        if len(self.node.all_input_nodes) > 1 and not self._meets_others():
            raise self.fail(
                "pads by the sizes of maps, and is put beside none: the pad holds for one size of images alone. "
                "Remedy: pad by numbers"
            )
        pad = [*pad[:2], 0, 0, *pad[2:]] if self.line else pad
        if len(pad) > 6 and any(pad[6:]):
            raise self.fail("pads the batch")
        left, right, top, bottom, first, last = [*pad, 0, 0, 0, 0, 0, 0][:6]
        if mode != "constant" and (first, last) != (0, 0):
            raise self.fail("pads the channels with channels. Remedy: torch.cat of those")
        sides: Any = ((top, bottom), (left, right))
        if mode == "circular" and min(*sides[0], *sides[1]) < 0:  # what is cut off is not wrapped round
            x = self._moved(x, PoolSpec.cropped(*((max(0, -a), max(0, -b)) for a, b in sides)))
            sides = tuple((max(0, a), max(0, b)) for a, b in sides)
        border = (max(0, *sides[0]), max(0, *sides[1]))
        if border != (0, 0):
            how = None if mode == "constant" else mode
            x = self._moved(x, PoolSpec("max", (1, 1), padding=border, border=how))
        extra = [(b - before, b - behind) for b, (before, behind) in zip(border, sides, strict=True)]
        if extra != [(0, 0), (0, 0)]:
            x = self._moved(x, PoolSpec.cropped(*extra))
        if first < 0 or last < 0:
            channels = self._channels(x)
            x = self._selected(x, range(max(0, -first), channels - max(0, -last)))
        if first > 0 or last > 0:  # as in the shortcuts of ResNets for CIFAR
            current = self._current(x, None, "pads the channels of what is not a layer's output")
            rows_of = F.pad(torch.eye(current.channels, dtype=torch.float64), (0, 0, max(0, first), max(0, last)))
            x = composed(current, rows_of[:, :, None, None], POINTWISE, zeros(len(rows_of)), "channels")
        return x

    def _sliced(self, x: Any, rows: slice, cols: slice) -> Any:
        """x[:, :, rows, cols]."""
        crops, strides = [], []
        index: Any = self.node.args[1]
        asked = [s for s in index if isinstance(s, slice)] if self._asks_for_sizes() else []
        if not self.sized.isdisjoint(n for s in asked for n in (s.start, s.step) if isinstance(n, fx.Node)):
            raise self.fail(
                "cuts pixels from a place, or at a distance, that is made of the size of maps. Remedy: write a number"
            )
        for s, size in zip((rows, cols), self._map_size(x), strict=True):
            start, stop, step = s.start or 0, s.stop, s.step or 1
            if not whole([start, step, stop or 0]):
                raise self._shape_needed("cuts pixels at a size that is not known")
            if stop == size and asked and self._meets_others():
                stop = None  # as of another map, whatever its size
            if start < 0 or (stop is not None and stop >= 0):
                raise self.fail(
                    "cuts pixels at a place counted from the other border, which is another one in images of another "
                    "size. Remedy: count from the same border (x[:, :, 1:-1])"
                )
            crops.append((start, -(stop or 0)))
            strides.append(step)
        if crops == [(0, 0), (0, 0)]:
            return self._strided(x, (strides[0], strides[1]))
        return self._moved(x, PoolSpec.cropped(crops[0], crops[1], (strides[0], strides[1])))

    def _strided(self, x: Any, stride: tuple[int, int]) -> Any:
        """Every stride-th pixel."""
        if stride == (1, 1):
            return x
        if isinstance(x, Current) and not pointwise(x):
            taps = torch.ones((x.channels, 1, 1, 1), dtype=torch.float64)
            return composed(x, taps, (1, 1, *stride, 0, 0, 1, 1, x.channels), zeros(x.channels), "stride")
        return self._moved(x, PoolSpec.cropped((0, 0), (0, 0), stride))

    def upsample(
        self,
        x: Any,
        size: Any = None,
        scale_factor: Any = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
        antialias: bool = False,
    ) -> Any:
        everywhere = self._has_one_pixel(x)  # which goes everywhere
        linear = mode == ("linear" if self.line else "bilinear") and not align_corners and not everywhere
        computed = len(self.node.all_input_nodes) > 1  # the size
        smooth = mode in ("bilinear", "bicubic") and not antialias and not everywhere
        if isinstance(x, Answer) or ((smooth or computed) and not self._goes_on()):
            return self._resized(x, mode, size, scale_factor, align_corners)
        mode = "nearest" if everywhere else mode
        factors: list[Any] = []
        if scale_factor is not None:
            factors = [*scale_factor] if isinstance(scale_factor, (tuple, list)) else [scale_factor] * 2
        elif computed:
            own, wanted = self._map_size(x), self._pair(size, 1)
            if not whole(own):
                raise self._shape_needed("resizes to a size that is not known")
            if not self._meets_others():
                raise self.fail(
                    "resizes to the size of another map, and is put beside none of that size: the factor holds for one "
                    "size of images alone. Remedy: scale_factor"
                )
            factors = [w / n for w, n in zip(wanted, own, strict=True)]
        factors[:1] = [1] if self.line and factors else factors[:1]
        known = linear or mode in ("nearest", "nearest-exact")
        if not known or antialias or len(factors) != 2 or any(f < 1 or f != int(f) for f in factors):
            raise self.fail(
                f"resizes with mode={mode!r}, size={size} and scale_factor={scale_factor}. Between activations only "
                "nearest pixels and bilinear ones without align_corners, by a whole factor, are sums of spikes. "
                "Remedy: mode='nearest', scale_factor=2, say"
            )
        spread = (int(factors[0]), int(factors[1]))
        if spread == (1, 1):
            return x
        x = self._moved(x, PoolSpec("max", (1, 1), spread=spread))
        return self._smoothed(x, spread) if linear else x

    def _smoothed(self, x: Any, spread: tuple[int, int]) -> Any:
        """Bilinear pixels from nearest ones, each of which stands f times in a row.

        A straight line between two pixels is an average over f places of what jumps between them; where f is even the
        places lie between the new pixels, and another average over two moves them there.
        """
        x = self._moved(x, PoolSpec("max", (1, 1), padding=(spread[0] // 2, spread[1] // 2), border="replicate"))
        even = (2 - spread[0] % 2, 2 - spread[1] % 2)
        for kernel in (spread, even):
            x = x if kernel == (1, 1) else self._pooled(x, PoolSpec("avg", kernel))
        return x

    def _is_resize(self, node: fx.Node) -> bool:
        return node.target is F.interpolate or self._is_module(node, nn.Upsample)

    def _goes_on(self) -> bool:
        """Whether a layer follows this node, and not only what a tail can do."""
        found = list(self.node.users)
        for node in found:  # which grows
            if node.op != "output" and not self._is_resize(node) and tail_step(self.gm, node) is None:
                return True
            found += [n for n in node.users if n not in found]
        return False

    def pixel_shuffle(self, x: Any, upscale_factor: int) -> Current:
        r, channels = int(upscale_factor), self._channels(x)
        if channels % (r * r):
            raise self.fail(f"shuffles {channels} channels into blocks of {r}x{r} pixels")
        found = []
        for i, j in itertools.product(range(r), repeat=2):  # each pixel of a block comes from channels of its own
            chosen = self._selected(x, range(i * r + j, channels, r * r))
            moved = self._moved(chosen, PoolSpec("max", (1, 1), spread=(r, r), phase=(i, j)))
            found.append(moved if isinstance(moved, Current) else Current(zeros(moved.channels), (), (moved,)))
        return replace(
            found[0],
            products=sum((c.products for c in found), ()),
            identities=sum((c.identities for c in found), ()),
        )

    def pixel_unshuffle(self, x: Any, downscale_factor: int) -> Any:
        r, channels = int(downscale_factor), self._channels(x)
        places = [
            self._moved(x, PoolSpec("max", (r, r), (r, r), section=(i, r, j, r)))
            for i, j in itertools.product(range(r), repeat=2)
        ]
        order = torch.arange(r * r * channels).reshape(r * r, channels).t().flatten().tolist()
        return self._selected(self.concat(places, 1), order)

    def conv_transpose(
        self,
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Current:
        """A convolution of the map with zeros between its pixels, by the kernel turned round."""
        self._check_weights("convolution", weight)
        weight = float64(weight, zeros(0))
        weight = weight.unsqueeze(2) if weight.dim() == 3 else weight  # of a line
        stride, dilation = self._pair(stride, 1), self._pair(dilation, 1)
        padding, more = self._pair(padding, 0), self._pair(output_padding, 0)
        border = tuple(d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True))
        extra = tuple(s - 1 - m for s, m in zip(stride, more, strict=True))
        if min(*border, *extra) < 0:
            raise self.fail("is a transposed convolution that cuts off more than its kernel adds. Remedy: less padding")
        if stride != (1, 1):
            x = self._moved(x, PoolSpec("max", (1, 1), spread=stride, phase=(0, 0)))
        if extra != (0, 0):
            x = self._moved(x, PoolSpec.cropped((0, extra[0]), (0, extra[1])))
        turned = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(-2, -1)
        return self.conv(x, turned, bias, 1, border, dilation, groups)
