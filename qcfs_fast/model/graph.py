"""What the nodes of a traced network are: call sites and their names, ReLU in its spellings, tails.

Shared by prepare (ReLU call sites become QCFS), convert and simulate, so that all three give an activation's
call site the same name: the module's path, with _1, _2, ... for further calls of one module.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .hooks import is_patched
from .qcfs import is_qcfs

_TORCH, _HERE = str(Path(torch.__file__).parent), str(Path(__file__).parent)  # where no code of a user is


def owner_path(node: fx.Node) -> str:
    """Path of the module whose forward made this node ("" for the root)."""
    stack = node.meta.get("nn_module_stack")
    return "" if not stack else str(list(stack.values())[-1][0])


def owner_class(node: fx.Node) -> str:
    """Name of that module's class ("" for the root's)."""
    stack = node.meta.get("nn_module_stack")
    return "" if not stack else str(getattr(list(stack.values())[-1][1], "__name__", ""))


def describe(node: fx.Node) -> str:
    """How an error names a node: its module path, or the function and the module that calls it."""
    if node.op == "call_module":
        return str(node.target)
    where = owner_path(node) or "the model's own forward"
    return f"{called(node)} in {where}"


def place_of(node: fx.Node) -> str:
    """`describe`, and for calls of functions the line of the user's code, where torch.fx knows it."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
    own = [(Path(file).name, line) for file, line in frames if not file.startswith((_TORCH, _HERE))]
    if node.op == "call_module" or not own:
        return describe(node)
    return f"{describe(node)} ({own[-1][0]}, line {own[-1][1]})"


def called(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def call_sites(gm: fx.GraphModule) -> Iterator[tuple[str, fx.Node, Any]]:
    """(site name, node, activation) of every QCFS call, in graph order."""
    calls: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        module = gm.get_submodule(str(node.target))
        if is_qcfs(module):
            n = calls.get(str(node.target), int(node.target == IMAGE))  # an activation called "input" is input_1
            calls[str(node.target)] = n + 1
            yield (str(node.target) if n == 0 else f"{node.target}_{n}"), node, module


def layer_rank(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """1, 2 or 3 where a node is a convolution, a pool or a pad of so many dimensions of pixels; None for all others."""
    name = getattr(node.target, "__name__", "")
    if node.op == "call_module":
        kinds = type(gm.get_submodule(str(node.target))).__mro__
        name = next(kind.__name__ for kind in kinds if kind.__module__.startswith("torch."))
    found = re.fullmatch(r".*(?:conv|pool|pad).*([123])d", name.lower())
    return int(found[1]) if found else None


def reads_lines(gm: fx.GraphModule) -> bool:
    """Whether images are lines [N, C, L]: so they are where all convolutions, pools and pads have one dimension."""
    return {layer_rank(gm, node) for node in gm.graph.nodes} - {None} == {1}


IMAGE = "input"
"""The name of the image among the nodes of a network."""
_CLAMPS: dict[Any, tuple[str, ...]] = dict.fromkeys(
    (torch.clamp, torch.clamp_, torch.clip, torch.clip_, "clamp", "clamp_", "clip", "clip_"), ("min", "max")
)
RECTIFIERS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), ()),
    **_CLAMPS,
    **dict.fromkeys((torch.clamp_min, torch.clamp_min_, "clamp_min", "clamp_min_"), ("min",)),
    **dict.fromkeys((torch.maximum, torch.fmax, torch.max, "maximum", "fmax", "max"), ("other",)),
    **dict.fromkeys((nn.Hardtanh, F.hardtanh, F.hardtanh_), ("min_val", "max_val")),  # ReLU6 is one
    **dict.fromkeys((nn.LeakyReLU, F.leaky_relu, F.leaky_relu_), ("negative_slope",)),
    **dict.fromkeys((nn.RReLU, F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_), ("lower", "upper")),
    **dict.fromkeys((nn.Threshold, F.threshold, torch.threshold, torch.threshold_), ("threshold", "value")),
}
"""Spellings of max(x, 0) by what stands behind x: that is 0, but for a ceiling `max`."""
CUTS: dict[Any, tuple[str, ...]] = {
    **_CLAMPS,
    **dict.fromkeys((nn.Hardtanh, F.hardtanh, F.hardtanh_), ("min_val", "max_val")),
    **dict.fromkeys((torch.clamp_max, torch.clamp_max_, "clamp_max", "clamp_max_"), ("max",)),
    **dict.fromkeys((torch.minimum, torch.fmin, torch.min, "minimum", "fmin", "min"), ("other",)),
}
"""Spellings of min(x, ceiling), for x of 0 and more."""
_LEFT_OUT = {"min_val": -1.0, "max_val": 1.0, "negative_slope": 0.01, "lower": 1 / 8, "upper": 1 / 3}
ADD_FUNCTIONS = {operator.add, torch.add}
"""x + y in all its spellings; the method is add. Those in place have become these (inplace.py)."""
CASTS = ("float", "double", "half", "bfloat16")
"""Methods that make floats of another precision, which no value in spikes has."""


def relu_ceiling(gm: nn.Module, node: fx.Node) -> float | None:
    """Where a node is max(x, 0) in one of its spellings: the value at which it is cut (6 for ReLU6), or infinity.

    None for every other node, and where x is a constant, of which no neuron is needed.
    """
    if node.op == "call_function" and node.target is F.relu6:
        return 6.0
    given = _given(gm, node, RECTIFIERS)
    if given is None or _is_constant(node):
        return None
    high = given.pop("max", None)
    return _ceiling(high) if all(v == 0 for v in given.values()) else None


def _ceiling(high: float | None) -> float | None:
    return float("inf") if high is None else high if high > 0 else None


def _given(gm: nn.Module, node: fx.Node, table: dict[Any, tuple[str, ...]]) -> dict[str, float | None] | None:
    """What a call in `table` is given behind x, as numbers: not a number where it is none."""
    names: tuple[str, ...] | None = None
    if node.op == "call_module":
        m = gm.get_submodule(str(node.target))
        names = next((table[kind] for kind in type(m).__mro__ if kind in table), None)
        found = {name: getattr(m, name) for name in names or ()}
    elif node.op in ("call_function", "call_method"):
        names = table.get(node.target)
        given = {**dict(zip(names or (), node.args[1:], strict=False)), **node.kwargs}
        found = {name: given.get(name, _LEFT_OUT.get(name)) for name in names or ()}
    if names is None:
        return None
    return {name.removesuffix("_val"): _number(gm, v, name) for name, v in found.items()}


def _number(gm: nn.Module, value: Any, name: str) -> float | None:
    """An argument as a number: a constant tensor's, if it has one. None stays."""
    if isinstance(value, fx.Node) and value.op == "get_attr":
        held = operator.attrgetter(str(value.target))(gm)
        fixed = isinstance(held, torch.Tensor) and not isinstance(held, nn.Parameter) and held.numel() == 1
        return float(held) if fixed else float("nan")
    if value is None and name != "other":
        return None
    number = isinstance(value, int | float) and name != "other"  # x.max(0) is over a dimension
    return float(value) if number else float("nan")


def _is_constant(node: fx.Node) -> bool:
    """Whether no input leads to a node."""
    found = [node]
    while found:
        source = found.pop()
        if source.op == "placeholder":
            return False
        found += source.all_input_nodes
    return True


def join_cuts(root: nn.Module, graph: fx.Graph) -> None:
    """relu(x).clamp(max=c) becomes x.clamp(0, c): one neuron, and not one behind another."""

    def patched(node: fx.Node) -> bool:  # such a module stays, to be refused by its name
        return node.op == "call_module" and is_patched(root.get_submodule(str(node.target)))

    for node in list(graph.nodes):
        inner = node.args[0] if node.args else None
        given = _given(root, node, CUTS)
        if given is None or not isinstance(inner, fx.Node) or (below := relu_ceiling(root, inner)) is None:
            continue
        cut = _ceiling(given.get("max", given.get("other")))
        if cut is None or not (given.get("min") or 0) <= 0 or any(map(patched, (node, inner))):
            continue
        x = inner.args[0] if inner.args else inner.kwargs["input"]
        with graph.inserting_after(node):
            new = graph.call_function(torch.clamp, (x, 0.0, min(cut, below)))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        if not inner.users:
            graph.erase_node(inner)


REPLACEABLE: dict[type[nn.Module], Any] = {  # other activations, and their functional forms
    nn.SiLU: F.silu,
    nn.Hardswish: F.hardswish,
    nn.GELU: F.gelu,
    nn.LeakyReLU: F.leaky_relu,
    nn.ELU: F.elu,
    nn.Mish: F.mish,
    nn.PReLU: F.prelu,
}
TAIL_FUNCTIONS = {
    **dict.fromkeys((F.softmax, torch.softmax, "softmax"), "softmax"),
    **dict.fromkeys((F.log_softmax, torch.log_softmax, "log_softmax"), "log_softmax"),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid"), "sigmoid"),
    **dict.fromkeys((F.tanh, torch.tanh, "tanh"), "tanh"),
    **dict.fromkeys((torch.squeeze, "squeeze"), "squeeze"),
}
TAIL_MODULES = {nn.Softmax: "softmax", nn.LogSoftmax: "log_softmax", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh"}


def tail_step(gm: fx.GraphModule, node: fx.Node) -> tuple[str, Any] | None:
    """What may follow the last layer of a network: the function's name and its dimension (or None); else None.

    No neuron computes these, so they stand at the end alone, behind the mean over the time steps.
    """
    if node.op == "call_module":
        m = gm.get_submodule(str(node.target))
        name = TAIL_MODULES.get(type(m))
        return None if name is None else (name, getattr(m, "dim", None))
    if node.op not in ("call_function", "call_method") or node.target not in TAIL_FUNCTIONS:
        return None
    return TAIL_FUNCTIONS[node.target], node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)


def without_tails(gm: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A network in two: up to its last layers, whose values are a tuple, and what the model makes of these values: its
    output, with the tails behind them. The first is `gm`, cut.
    """
    output = next(node for node in gm.graph.nodes if node.op == "output")
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    ends: list[fx.Node] = []

    def moved(node: fx.Node) -> fx.Node:
        if node not in values:
            if tail_step(gm, node) is not None and len(node.all_input_nodes) == 1:
                moved(node.all_input_nodes[0])
                values[node] = graph.node_copy(node, values.__getitem__)
            else:
                values[node] = placeholders[node]
        return values[node]

    def end(node: fx.Node) -> fx.Node:
        while tail_step(gm, node) is not None and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        if node not in ends:
            ends.append(node)
        return node

    fx.node.map_arg(output.args[0], end)
    placeholders = {node: graph.placeholder(f"x{i}") for i, node in enumerate(ends)}
    graph.output(fx.node.map_arg(output.args[0], moved))
    finish = fx.GraphModule(gm, graph)
    output.args = (tuple(ends),)
    for node in reversed([n for n in gm.graph.nodes if n in values and n not in placeholders]):
        gm.graph.erase_node(node)
    gm.recompile()
    return gm, finish
