"""Operations of a traced graph that change a tensor in place, made into operations whose result is read.

torch.fx records ``h.relu_()`` as a node with a result that nobody reads, and hands the old ``h`` on. In PyTorch
whatever reads ``h`` from there on, by this or another name, sees the new one. So here each later reader of the changed
tensor reads the operation's result, and the operation itself becomes the one without the underscore. Where a view of
the tensor is changed and the rest read, or the other way round, no node has the value that is read: that is refused.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import fx, nn

from ..errors import ConversionError
from .graph import called, place_of

_ARITHMETIC = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.imatmul: operator.matmul,
}
# What may give the tensor that it was given: all of it as it is, or a view.
_SAME = {"contiguous", "detach", "to", "float", "type", "dropout", "dropout1d", "dropout2d", "alpha_dropout"}
_SAME_MODULES = (nn.Identity, nn.modules.dropout._DropoutNd)
_VIEWS = {
    *("getitem", "getattr", "view", "view_as", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "select", "narrow", "diagonal"),
    *("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "expand", "expand_as", "unfold", "as_strided"),
}
_PIECES = {"chunk", "split", "split_with_sizes", "tensor_split", "unbind"}  # of which no two overlap
_ASKS = {"size", "dim", "ndimension", "numel", "stride", "is_floating_point", "len"}  # answered by no tensor


def is_number(node: fx.Node) -> bool:
    """Whether a node is a size, or made of sizes alone: a number cannot be changed in place."""
    if node.op not in ("call_function", "call_method"):
        return False
    if called(node) in _ASKS or (node.target is getattr and node.args[1] not in ("data", "T", "mT", "H", "real")):
        return True
    reads = node.all_input_nodes
    return bool(reads) and (isinstance(node.target, type(operator.add)) and all(map(is_number, reads)))


class _Names:
    """Which nodes are names of one tensor, or of parts of it."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self.base: dict[fx.Node, fx.Node] = {}  # of which it is a view, at last
        self.same: dict[fx.Node, fx.Node] = {}  # all of it as it is
        self.pieces: dict[fx.Node, dict[fx.Node, Any]] = {}  # which piece of a chunk or split it lies in
        self.members: dict[fx.Node, list[fx.Node]] = {}  # by base

    def enter(self, node: fx.Node, changes: fx.Node | None) -> None:
        of, whole = changes, True
        if of is None and node.all_input_nodes and not is_number(node):
            first = node.all_input_nodes[0]
            module = self.modules.get(str(node.target)) if node.op == "call_module" else None
            whole = isinstance(module, _SAME_MODULES) or (module is None and called(node) in _SAME)
            view = isinstance(module, nn.Flatten | nn.Unflatten) or (module is None and called(node) in _VIEWS)
            of = first if (whole or view) and node.op != "output" else None
        base = node if of is None else self.base[of]
        self.base[node] = base
        self.same[node] = self.same[of] if of is not None and whole else node
        self.pieces[node] = {} if of is None else dict(self.pieces[of])
        if of is not None and node.target is operator.getitem and called(of) in _PIECES:
            self.pieces[node][of] = node.args[1]
        self.members.setdefault(base, []).append(node)

    def overlap(self, a: dict[fx.Node, Any], b: dict[fx.Node, Any]) -> bool:
        return all(a[node] == b[node] for node in a.keys() & b.keys())


def _changed(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The node whose tensor this one changes, if any."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(first, fx.Node) or node.op not in ("call_module", "call_function", "call_method"):
        return None
    name = called(node)
    if node.op == "call_module":
        module = modules[str(node.target)]
        in_place = bool(getattr(module, "inplace", False)) and not isinstance(module, _SAME_MODULES)
    elif node.target in _ARITHMETIC or (name.endswith("_") and not name.endswith("__")):
        in_place = name != "requires_grad_"
    else:
        in_place = bool(_inplace_argument(node))
    return first if in_place and not is_number(first) else None


def _inplace_argument(node: fx.Node) -> Any:
    if node.op != "call_function" or "inplace" in node.kwargs:
        return node.kwargs.get("inplace")
    try:
        return inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get("inplace")  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a function of C
        return None


def _without_underscore(node: fx.Node) -> None:
    """The operation that leaves its operand as it is, where torch has it."""
    name = called(node)
    if node.target in _ARITHMETIC:
        node.target = _ARITHMETIC[node.target]
    elif node.op == "call_method" and hasattr(torch.Tensor, name.rstrip("_")):
        node.target = name.rstrip("_")
    elif "inplace" in node.kwargs:
        node.kwargs = {**node.kwargs, "inplace": False}


def changes_in_place(graph: fx.Graph, modules: dict[str, nn.Module]) -> bool:
    return any(_changed(node, modules) is not None for node in graph.nodes)


def read_results(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Make every reader of a changed tensor read the result of what changed it.

    Raises:
        ConversionError: what is read later is a part of what was changed, or the other way round.
    """
    place = {node: i for i, node in enumerate(graph.nodes)}
    names = _Names(modules)
    for node in graph.nodes:
        changed = _changed(node, modules)
        names.enter(node, changed)
        if changed is None:
            node.target = _ARITHMETIC.get(node.target, node.target)  # of a number
            continue
        for member in list(names.members[names.base[changed]]):
            for reader in [u for u in member.users if place[u] > place[node]]:
                inside = dict(names.pieces[member])
                if reader.target is operator.getitem and called(member) in _PIECES:
                    inside[member] = reader.args[1]
                if member is node or not names.overlap(inside, names.pieces[changed]):
                    continue
                if names.same[member] is not names.same[changed]:
                    raise ConversionError(
                        f"{place_of(node)}: changes in place what is read later as {member.name}, a view of it or "
                        "what it is a view of, which torch.fx does not follow. Remedy: write it without changing in "
                        "place (y = y + x, inplace=False)"
                    )
                reader.replace_input_with(member, node)
        _without_underscore(node)
