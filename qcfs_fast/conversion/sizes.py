"""Sizes of maps while a graph is lowered: what is known of them, and what is computed with them.

A size that is not known is a Size, and what is computed with it remains one. A number that is known holds for images of
one size alone, and the network shall run on others. So an operation that is given such a number is refused, unless it
is true in all sizes: a pool of the whole map, the mean as a sum over its pixels, or a map that is made as large as
another one, to which it is added or put beside. These must fit each other, or the network refuses the image. Whether a
number is the size of a map, and not only equal to it here, is seen where it is computed again for other sides.

A network of lines, [N, C, L], is one of maps that are one pixel high: where a model names one number, that of the
height is added here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..errors import ConversionError
from ..model.graph import called, place_of, reads_lines
from ..model.inplace import is_number
from ..model.qcfs import is_qcfs
from ..model.tracing import is_normalize
from .shapes import Shapes

_SIDES = (1009, 1013)  # of a map of any size: primes, which little else makes
_FLATTENING = ("flatten", "view", "reshape", "squeeze", "size", "getattr")  # the last two ask for sizes
_KEEPING = (
    *("relu", "add", "sub", "mul", "truediv", "div", "neg", "cat", "batch_norm", "dropout", "dropout2d"),
    *("contiguous", "clone", "detach", "float", "to"),
)


class ShapeNeededError(ConversionError):
    """Lowering cannot go on without the shape of the images."""


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


def _asks_for_shape(node: fx.Node) -> bool:
    return called(node) == "size" or (node.target is getattr and node.args[1] == "shape")


class Sizes:
    """What a pass over the graph knows of sizes.

    `shapes` maps nodes to the shapes of their values without the batch, if known. `line`: the images are lines.
    """

    def __init__(self, gm: fx.GraphModule, shapes: Shapes | None) -> None:
        self.gm = gm
        self.shapes = shapes
        self.line = reads_lines(gm)
        self.values: dict[fx.Node, Any] = {}
        self.node: fx.Node  # the one being executed
        self.sized: set[fx.Node] = set()  # numbers that are another one in images of another size
        self.computed: set[fx.Node] = set()  # maps whose size is computed from that of others
        for node in gm.graph.nodes:
            maps = [n for n in node.all_input_nodes if n.op != "get_attr" and not is_number(n)]
            sized = called(node) in ("interpolate", "pad", "getitem") and self._asked(node.all_input_nodes[1:])
            if sized or (maps and self.computed.issuperset(maps)):
                self.computed.add(node)

    def fail(self, why: str) -> ConversionError:
        return ConversionError(f"{place_of(self.node)}: {why}")

    def _shape_needed(self, why: str) -> ShapeNeededError:
        return ShapeNeededError(
            f"{place_of(self.node)}: {why}; give convert(..., input_shape={'(C, L)' if self.line else '(C, H, W)'}), "
            "or run the prepared model on an image"
        )

    def _image_shape(self) -> tuple[int, ...] | None:
        """The shape of an image, if known."""
        return next((s for n, s in (self.shapes or {}).items() if n.op == "placeholder"), None)

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

    def _depends_on_size(self, node: fx.Node) -> bool:
        """Whether a constant, a number or several, is one that images of another size would change."""
        if isinstance(self.values[node], bool) or not node.all_input_nodes:
            return False
        source = node.all_input_nodes[0]
        if called(node) in ("expand", "expand_as"):  # a constant, which fits maps of all sizes
            return False
        if _asks_for_shape(node):
            dims = (*node.args[1:], *node.kwargs.values())
            return node.target is getattr or not dims or self._is_of_pixels(source, dims[0])
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

    def _is_as_large(self, x: fx.Node, y: fx.Node) -> bool:
        """Whether two maps have one size in images of all sizes, because what lies between them keeps it."""
        return self._first_as_large(x) is self._first_as_large(y)

    def _first_as_large(self, node: fx.Node) -> fx.Node:
        """The first of the maps that a node was made of without a change of their size."""
        shapes = self.shapes or {}
        while self._keeps_size(node):
            same = [n for n in node.all_input_nodes if shapes.get(n, ())[1:] == shapes.get(node, ())[1:]]
            if not same:
                break
            node = same[0]
        return node

    def _keeps_size(self, node: fx.Node) -> bool:
        """Whether a node keeps the size of all maps if it keeps that of one."""
        if node.op != "call_module":
            return called(node) in _KEEPING
        m: Any = self.gm.get_submodule(str(node.target))
        if hasattr(m, "stride"):
            return m.stride in (1, (1,), (1, 1))
        kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.Identity)
        return is_qcfs(m) or is_normalize(m) or isinstance(m, kinds)

    def _is_made_of(self, numbers: Any, source: fx.Node, wanted: Callable[..., Any]) -> bool:
        """Whether numbers are `wanted(sides)` of the map `source` in images of all sizes."""
        sides = _SIDES[-1:] if self.line else _SIDES

        def again(n: fx.Node) -> Any:
            if _asks_for_shape(n):
                channels = (self.shapes or {})[n.all_input_nodes[0]][: -len(sides)]
                if len(channels) != 1 or not self._is_as_large(source, n.all_input_nodes[0]):
                    raise LookupError("the size of another map")
                shape, dims = torch.Size([1, *channels, *sides]), (*n.args[1:], *n.kwargs.values())
                return shape if n.op == "call_function" or not dims else shape[cast(int, dims[0])]
            args, kwargs = fx.node.map_arg((n.args, n.kwargs), again)
            if n.op == "call_method":
                return getattr(args[0], str(n.target))(*args[1:], **kwargs)
            return cast(Any, n.target)(*args, **kwargs)

        try:
            found = fx.node.map_arg(numbers, again)
        except Exception:  # whatever arithmetic raises on other numbers
            return False
        return bool(found == wanted(sides) or (isinstance(found, (tuple, list)) and tuple(found) == wanted(sides)))

    @staticmethod
    def _asked(numbers: Sequence[fx.Node]) -> set[fx.Node]:
        """The values whose sizes numbers are made of."""
        found, left = set(), list(numbers)
        while left:
            node = left.pop()
            if _asks_for_shape(node):
                found.add(node.all_input_nodes[0])
            else:
                left += node.all_input_nodes
        return found

    def _is_mean(self, node: fx.Node) -> bool:
        """Whether a node divides the sum of a map's pixels by how many that map has."""
        if called(node) not in ("div", "divide", "truediv") or not node.all_input_nodes:
            return False
        source = summed = node.all_input_nodes[0]
        while called(source) == "sum":
            source = source.all_input_nodes[0]
        return source is not summed and self._is_made_of(node.args[-1], source, math.prod)

    def _is_flattened(self) -> bool:
        """Whether the node being executed is flattened next, so that a layer behind it takes one size alone."""
        found = list(self.node.users)
        for node in found:  # which grows
            if called(node) in ("dropout", "dropout2d") or self._is_module(node, nn.modules.dropout._DropoutNd):
                found += node.users
            elif called(node) not in _FLATTENING and not self._is_module(node, nn.Flatten):
                return False
        return bool(found)

    def _is_module(self, node: fx.Node, kinds: Any) -> bool:
        return node.op == "call_module" and isinstance(self.gm.get_submodule(str(node.target)), kinds)

    def _meets_others(self) -> bool:
        """Whether a map of a computed size, or what keeps it, is added to or put beside one whose size is not computed.

        They must then fit each other, so images of another size are refused if the computed size was another.
        """
        shapes = self.shapes or {}
        found = list(self.node.users)
        for node in found:  # which grows
            alike = len(node.all_input_nodes) == 1 and shapes.get(node, ())[1:] == shapes.get(self.node, ())[1:]
            joins = called(node) in ("cat", "concat", "add", "sub")
            if called(node) == "pad" or (node in self.computed and (joins or alike) and node.op != "output"):
                found += [n for n in node.users if n not in found]
            elif not joins:
                return False
        return bool(found)
