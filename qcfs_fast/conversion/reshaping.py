"""Lowering of what asks for shapes or changes them: views, permutations, channels cut, chosen and shuffled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConversionError
from ..model.graph import called
from ..operators.geometry import POINTWISE
from ..operators.windows import PoolSpec
from .sizes import has_size, is_rest, shown, whole
from .spatial import Spatial, parts_mapped, pointwise
from .symbolic import one_current, zeros
from .values import (
    Current,
    Grouped,
    Image,
    Joined,
    Laid,
    Product,
    Row,
    Signal,
    Summed,
    composed,
    dealt,
    ungrouped,
)


class Reshaping(Spatial):
    """Shapes, views and choices of channels."""

    def flatten(self, x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
        if isinstance(x, Summed):
            return self._reshaped(x)
        if isinstance(x, Row) and (start_dim, end_dim % (2 + x.ones)) == (1, 1 + x.ones):
            return x.value
        if isinstance(x, Grouped):
            table, pixels = x.index, self._rank(x) - 2
            last = end_dim % (table.dim() + pixels + 1)
            if 1 <= start_dim <= last <= table.dim():
                table = table.flatten(start_dim - 1, last - 1)
                return replace(x, index=table) if table.dim() > 1 else self._selected(x.value, table.tolist())
            x = self._selected(x.value, table.flatten().tolist())
            end_dim = -1 if last == table.dim() + pixels else 0
        if isinstance(x, Laid) and end_dim in (-1, 2):
            x, end_dim = x.value, -1
        rank = self._rank(x)
        if start_dim == 2 == rank - 2 and end_dim in (-1, 3) and isinstance(x, Signal | Current):
            return Laid(x, self._map_size(x))
        if start_dim != 1 or end_dim % rank != rank - 1:
            raise self.fail("flattens other dimensions than all after the batch; use flatten(x, 1)")
        if isinstance(x, Signal | Current):
            x = self._read_by_layers(x)
        if isinstance(x, Current):
            flat = tuple(replace(s, vector=True) for s in x.identities) if not x.products else x.identities
            return x if x.vector else replace(x, flattened=True, size=self._map_size(x), identities=flat)
        if isinstance(x, Image) and not x.vector:
            if self.shapes is None:
                raise self._shape_needed("flattens the image, whose shape is not known")
            shape = self.shapes[self.node.all_input_nodes[0]]
            if len(shape) != self._rank(None) - 1:
                raise self.fail(f"flattens images {list(shape)}. Remedy: give the network vectors, [N, features]")
            return replace(x, map=shape)
        return replace(x, vector=True)

    def _read_by_layers(self, x: Signal | Current) -> Signal | Current:
        """A map with the image in it as the output of a 1x1 convolution of ones: only maps of spikes are flattened."""
        current = self._summand(x, "")
        if x.vector or not any(p.is_image for s in current.identities for p in s.parts):
            return x
        n = current.channels
        ones = torch.eye(n, dtype=torch.float64)[:, :, None, None]
        return composed(current, ones, POINTWISE, zeros(n), "image")

    def view(self, x: Any, *shape: Any) -> Any:
        """Only [N, features] and [N, C, H, W] as they are: what mixes samples or pixels has no spiking counterpart."""
        asked = list(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)) else shape)
        if isinstance(x, Summed):
            return self._reshaped(x)
        if len(asked) == 2 and not is_rest(asked[0]) and is_rest(asked[1]):
            return self.flatten(x, 1)
        own = self._shape(x)
        if isinstance(x, Grouped) or len(asked) > self._rank(None):
            return self._regrouped(x, own, asked)
        literal = isinstance(asked[0], int) and not is_rest(asked[0])  # a batch that is said
        if len(asked) == 3 and len(own) == 4 and isinstance(x, Signal | Current) and not literal:
            if not whole([*own[1:], *asked[1:]]):
                raise self._shape_needed("reshapes a value whose shape is not known")
            if asked[1] == own[1] and asked[2] in (-1, own[2] * own[3]):
                return Laid(x, self._map_size(x))
        if len(asked) in (2, len(own)) and not whole(own[1:]):
            raise self._shape_needed("reshapes a value whose shape is not known")
        if len(asked) == 2 and whole(asked[1:]) and asked[1] in (math.prod(own[1:]), -1):
            return self.flatten(x, 1)
        if whole(asked[1:]) and asked[1:] == list(own[1:]):
            return x
        if len(own) == 2 and len(asked) > 2:
            self._refuse_map(x, asked)
        raise self.fail(
            f"reshapes {shown(own)} to {shown(asked)}; only flattening to [N, features] is supported. Remedy: "
            "flatten(x, 1), or keep the shape"
        )

    def _refuse_map(self, x: Any, asked: list[Any]) -> None:
        """ConversionError where the features of a vector become a map."""
        if isinstance(x, Image):
            raise self.fail(
                f"makes a map {shown(['N', *asked[1:]])} of an image that is a vector. Remedy: leave it out of the "
                "model, and give the network such images"
            )
        raise self.fail(
            "makes a map of a vector's features, which has no spiking counterpart. Remedy: maps of one pixel up to "
            "there, and nn.ConvTranspose2d(features, channels, (height, width)) in place of the linear layer"
        )

    def unflatten(self, x: Any, dim: int, sizes: Sequence[int]) -> Any:
        own = self._shape(x)
        dim %= len(own)
        return self.view(x, *own[:dim], *sizes, *own[dim + 1 :])

    def _regrouped(self, x: Any, own: Sequence[Any], asked: list[Any]) -> Any:
        """A reshape that takes the channels apart, or puts them together again."""
        if not whole([*own[1:], *asked[1:]]):
            raise self._shape_needed("reshapes a value whose shape is not known")
        rest = math.prod(own[1:]) // max(1, -math.prod(asked[1:]))
        sizes = [rest if size == -1 else size for size in asked[1:]]
        pixels = self._rank(None) - 2
        same = sizes[-pixels:] == list(own[-pixels:])
        if not isinstance(x, Image | Signal | Current | Grouped) or not same or len(sizes) <= pixels:
            raise self.fail(f"reshapes {shown(own)} to {shown(asked)}; only channels may be taken apart")
        if isinstance(x, Image):
            x = self._selected(x, range(own[1]))
        table = x if isinstance(x, Grouped) else Grouped(x, torch.arange(own[1]))
        if math.prod(sizes[:-pixels]) != table.index.numel():
            raise self.fail(f"reshapes {shown(own)} to {shown(asked)}, which moves samples into channels")
        index = table.index.reshape(sizes[:-pixels])
        return Grouped(table.value, index) if index.dim() > 1 else self._selected(table.value, index.tolist())

    def permute(self, x: Any, *dims: Any) -> Any:
        order = list(dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims)
        rank, pixels = len(self._shape(x)), self._rank(x) - 2
        single = isinstance(x, Signal | Current) and self._shape(x)[2:] in ((1,), (1, 1))
        if single and order[0] == 0 and order[-1] % rank == 1:  # the channels of a map of one pixel stand behind it
            return Row(self.flatten(x, 1), rank - 2)
        if not isinstance(x, Grouped) or sorted(d % rank for d in order) != list(range(rank)):
            raise self.fail(
                "permutes dimensions, which has no spiking counterpart unless it shuffles channels. Remedy: give the "
                "network images [N, C, H, W] (signals [N, C, L]), and permute before it"
            )
        order = [d % rank for d in order]
        if order[0] != 0 or order[-pixels:] != list(range(rank - pixels, rank)):
            raise self.fail("permutes the batch or pixels, which has no spiking counterpart; only channels may move")
        return replace(x, index=x.index.permute([d - 1 for d in order[1:-pixels]]))

    def transpose(self, x: Any, dim0: int, dim1: int) -> Any:
        order = list(range(len(self._shape(x))))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        return self.permute(x, order)

    def shuffle(self, x: Any, groups: int) -> Any:
        channels = self._channels(x)
        if channels % groups:
            raise self.fail(f"shuffles {channels} channels in {groups} groups")
        return self._selected(x, torch.arange(channels).reshape(groups, -1).t().flatten().tolist())

    def chunk(self, x: Any, chunks: int, dim: int = 0) -> Any:
        return self.split(x, -(-self._channels(x) // chunks), dim)

    def split(self, x: Any, split_size_or_sections: Any, dim: int = 0) -> Any:
        if dim % self._rank(x) != 1:
            raise self.fail("cuts another dimension than the channels, which has no spiking counterpart")
        channels = range(self._channels(x))
        sizes: Any = split_size_or_sections
        if isinstance(sizes, int):
            sizes = [len(channels[i : i + sizes]) for i in channels[::sizes]]
        if sum(sizes) != len(channels):
            raise self.fail(f"cuts {len(channels)} channels into {list(sizes)}")
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return tuple(self._selected(x, channels[a : a + n]) for a, n in zip(starts, sizes, strict=True))

    def narrow(self, x: Any, dim: int, start: int, length: int) -> Any:
        return self._indexed(x, slice(start, start + length) if dim % self._rank(x) == 1 and start >= 0 else None)

    def to(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """x.to(dtype) and x.to(device), which change nothing as long as the values stay floats."""
        if any(isinstance(v, torch.dtype) and not v.is_floating_point for v in (*args, *kwargs.values())):
            raise self.fail("rounds values to integers, which is not linear. Remedy: leave them floats")
        return x

    def index_select(self, x: Any, dim: int, index: Any) -> Any:
        return self._indexed(x, index if dim % self._rank(x) == 1 else None)

    def _indexed(self, x: Any, channels: Any) -> Any:
        """x[:, channels]."""
        every = range(self._channels(x))
        if isinstance(channels, Tensor) and channels.dim() == 1:
            channels = channels.nonzero().flatten().tolist() if channels.dtype == torch.bool else channels.tolist()
        if isinstance(channels, slice):
            return self._selected(x, every[channels])
        if not isinstance(channels, (list, tuple)) or any(not isinstance(i, int) for i in channels):
            raise self.fail("indexes a tensor, which has no spiking counterpart unless it takes channels of a map")
        return self._selected(x, [every[i] for i in channels])

    def size(self, x: Any, dim: int | None = None) -> Any:
        return self._shape(x) if dim is None else self._shape(x)[dim]

    def rank(self, x: Any) -> int:
        return len(self._shape(x))

    def is_floating_point(self, x: Any) -> bool:
        return True

    def getattr(self, x: Any, name: str) -> Any:
        if name == "shape":
            return self._shape(x)
        if name == "ndim":
            return self.rank(x)
        if name in ("dtype", "device") and all(called(user) in ("to", "type") for user in self.node.users):
            return torch.float32 if name == "dtype" else torch.device("cpu")  # which change nothing
        raise self.fail(
            f"reads attribute {name!r} of a tensor, which has no spiking counterpart. Remedy: a forward without it"
        )

    def getitem(self, x: Any, index: Any) -> Any:
        if isinstance(x, (tuple, list)):
            return x[index]
        if isinstance(x, Summed) and x.kept and isinstance(index, tuple) and index[:2] == (slice(None),) * 2:
            return self._reshaped(x)
        x = self.summed(x)
        if isinstance(x, Image) and not x.source and isinstance(index, tuple) and len(index) == 2:
            everything, channel = index
            if everything == slice(None) and isinstance(channel, int):
                return replace(x, source=(channel,), scale=x.scale or (1.0,), shift=x.shift or (0.0,), batch_only=True)
        rank = self._rank(None)
        if isinstance(index, tuple) and isinstance(x, Image | Signal | Current | Joined):
            if any(has_size([s.start, s.stop, s.step]) for s in index if isinstance(s, slice)):
                raise self._shape_needed("takes parts up to a size that is not known")
            if Ellipsis in index:
                at = index.index(Ellipsis)
                index = (*index[:at], *[slice(None)] * (1 + rank - len(index)), *index[at + 1 :])
            index = (*index, *[slice(None)] * (rank - len(index)))
            batch, channels, *pixels = index
            alone = [i + 2 for i, p in enumerate(pixels) if isinstance(p, int)]
            if alone and batch == channels == slice(None):
                if not whole(self._shape(x)[2:]):
                    raise self._shape_needed("takes a pixel of a map whose size is not known")
                if all(self._shape(x)[i] == 1 for i in alone) and all(pixels[i - 2] in (0, -1) for i in alone):
                    return self._without(one_current(x), alone)
            pixels = [slice(None), *pixels] if rank == 3 else pixels
            if batch == slice(None) and len(pixels) == 2 and all(isinstance(p, slice) for p in pixels):
                x = x if channels == slice(None) else self._indexed(x, channels)
                return x if pixels == [slice(None)] * 2 else self._sliced(one_current(x), *pixels)
        raise self.fail("indexes a tensor, which has no spiking counterpart unless it takes channels of a map")

    def unsqueeze(self, x: Any, dim: int) -> Any:
        if isinstance(x, Image) and x.batch_only and dim == 1:
            return replace(x, batch_only=False)
        raise self.fail(
            "adds a dimension, which has no spiking counterpart. Remedy: give the network images that have it, "
            "[N, 1, L] for signals"
        )

    def mean(self, x: Any, dim: Any = None, keepdim: bool = False, kind: str = "avg") -> Any:
        over = self._over(x, dim)
        if over == {1} and keepdim and kind == "avg" and not isinstance(x, Laid | Grouped | Summed):
            n = self._channels(x)
            return self._mixed(x, torch.full((1, n), 1.0 / n, dtype=torch.float64))
        if not over or min(over) < 2 or (isinstance(x, Laid) and keepdim):
            raise self._of_other_dimensions()
        if isinstance(x, Laid | Summed):
            height, width = (1 if axis in over else None for axis in (2, 3))
            pooled = self._pooled(x.value, PoolSpec(kind, output=(height, width), size=self._known(x.size)))
            if isinstance(x, Laid):
                return self._without(pooled, range(2, self._rank(x.value)))
            if kind == "max":
                raise self.fail("takes the maximum of sums, which no spike is. Remedy: amax first")
            return self._sums(pooled, (height or x.size[0], width or x.size[1]), x.over | over)
        pooled = self.adaptive_pool(x, 1 if self.line else [1 if axis in over else None for axis in (2, 3)], kind)
        return pooled if keepdim else self._without(pooled, [2] if self.line else sorted(over))

    def sum(self, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
        over = self._over(x, dim)
        if over == {1}:
            return self.scale(self.mean(x, dim, keepdim), self._channels(x))
        if not over or min(over) < 2 or (isinstance(x, Laid) and keepdim):
            raise self._of_other_dimensions()
        if isinstance(x, Summed):
            return self._sums(x.value, x.size, x.over | over)
        size = x.size if isinstance(x, Laid) else self._map_size(x)
        if not whole(size):
            raise self._shape_needed("sums pixels of a map whose size is not known")
        return self._sums(x.value if isinstance(x, Laid) else x, size, over)

    def _of_other_dimensions(self) -> ConversionError:
        return self.fail(
            "takes a mean, a sum or a maximum over other dimensions than those of pixels. Remedy: over channels, "
            "keepdim=True, and no maximum"
        )

    def _sums(self, value: Any, size: tuple[int, int], over: frozenset[int]) -> Summed:
        return Summed(value, size, over, len((self.shapes or {})[self.node]) > 3 - len(over))

    def divide(self, x: Any, factor: Any) -> Any:
        if not isinstance(x, Summed):
            return super().divide(x, factor)
        pooled = self._pooled(x.value, PoolSpec("avg", output=(1, 1), size=x.size))  # by how many pixels there are
        return pooled if x.kept else self._without(pooled, range(2, self._rank(pooled)))

    def _over(self, x: Any, dim: Any) -> frozenset[int]:
        """The axes of a map [N, C, H, W] that an operation is over; those of a line and of what is laid are both."""
        dims = dim if isinstance(dim, (tuple, list)) else [dim]
        axes: list[tuple[int, ...]] = [(0,), (1,), (2,), (3,)]
        if isinstance(x, Summed) and not x.kept:
            axes = [(0,), (1,), *((axis,) for axis in {2, 3} - x.over)]
        elif isinstance(x, Laid) or self.line:
            axes = [(0,), (1,), (2, 3)]
        axes = axes[: self._rank(x)] if self._is_flat(x) else axes
        named = [axes[d % len(axes)] if isinstance(d, int) else (0,) for d in dims]
        return frozenset(sum(named, ()))

    def _reshaped(self, x: Summed) -> Any:
        """Sums without the axes of one pixel that they may have kept."""
        shape = (self.shapes or {}).get(self.node, ())
        if len(x.over) < 2 or math.prod(shape) != shape[0]:
            raise self._of_sums()
        return self._sums(x.value, x.size, x.over)

    def _of_sums(self) -> ConversionError:
        return self.fail(
            "works on sums along one axis of a map, or on a map of sums, and how many pixels they have depends on the "
            "size of images. Remedy: mean in place of sum, times a number, or the sum over both axes without keepdim"
        )

    def summed(self, x: Any) -> Any:
        """Sums as a vector: of windows as large as the map. A map of another size has none, or several, and these are
        more features than the layer behind them has.
        """
        if not isinstance(x, Summed):
            return x
        if x.kept or len(x.over) < 2:
            raise self._of_sums()
        current = self._by_taps(self._summand(x.value, "sums pixels of what is no map"))
        if not pointwise(current):
            self._spikes_alone(self._sources(current, "is a sum of pixels", 1))
        window = PoolSpec("avg", x.size, divisor_override=1)
        pooled = parts_mapped(current, lambda p: replace(p, pools=(*p.pools, window)))
        return self._as_features(replace(pooled, bias=current.bias * math.prod(x.size)))

    def _as_features(self, x: Current) -> Current:
        """A current that reads each pixel for itself as a vector: it must have one, or no layer behind it fits."""
        eye = torch.eye(x.channels, dtype=torch.float64)[:, :, None, None]
        products = [(p.part, p.weight, p.geometry[8], p.layer) for p in x.products]
        products += [(*found, "channels") for s in x.identities for found in dealt(eye, 1, s)]
        found = tuple(Product(p, ungrouped(w, groups), POINTWISE, True, layer) for p, w, groups, layer in products)
        return Current(x.bias, found, (), True)

    def amax(self, x: Any, dim: Any = (), keepdim: bool = False) -> Any:
        return self.mean(x, dim, keepdim, "max")

    @staticmethod
    def _known(size: tuple[Any, Any]) -> Any:
        return size if whole(size) else None

    def _without(self, x: Any, dims: Sequence[int]) -> Any:
        """A map without its dimensions of pixels that are in `dims`, in which it has one pixel."""
        if len(dims) == self._rank(x) - 2:
            if isinstance(x, Current) and pointwise(x):
                return self._as_features(x)
            flat = self.flatten(x, 1)
            return replace(flat, size=(1, 1)) if isinstance(flat, Current) else flat
        size = self._map_size(x)  # as it was before
        return Laid(x, (1, size[1]) if 2 in dims else (size[0], 1))

    def squeeze(self, x: Any, dim: Any = None) -> Any:
        """A map without dimensions of one pixel; None where it is left to the tail of the network."""
        shape = self._shape(x)
        if dim is None:
            raise self.fail("also squeezes a batch of one image. Remedy: flatten(1), or name the dimensions")
        if isinstance(x, Summed):
            return self._reshaped(x)
        rank = len(shape)
        dims = sorted({d % rank for d in (dim if isinstance(dim, (tuple, list)) else [dim])})
        if not dims or dims[0] < 2 or not isinstance(x, Signal | Current | Laid):
            return None
        if not whole(shape[2:]):
            raise self._shape_needed("squeezes a dimension whose size is not known")
        if any(shape[d] != 1 for d in dims):
            return None if any(shape[d] == 1 for d in dims) else x
        return self.flatten(x, 1) if isinstance(x, Laid) else self._without(x, dims)
