"""What the nodes of a traced network are: call sites and their names, ReLU in its spellings, tails.

Shared by prepare (ReLU call sites become QCFS), convert and simulate, so that all three give an activation's
call site the same name: the module's path, with _1, _2, ... for further calls of one module.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .qcfs import is_qcfs


def owner_path(node: fx.Node) -> str:
    """Path of the module whose forward made this node ("" for the root)."""
    stack = node.meta.get("nn_module_stack")
    return "" if not stack else str(list(stack.values())[-1][0])


def describe(node: fx.Node) -> str:
    """How an error names a node: its module path, or the function and the module that calls it."""
    if node.op == "call_module":
        return str(node.target)
    where = owner_path(node) or "the model's own forward"
    return f"{called(node)} in {where}"


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
RELU_FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_}
RELU_METHODS = {"relu", "relu_"}
BOUNDED_BELOW = {torch.clamp_min, "clamp_min", "clamp_min_"}
CLAMPS = {torch.clamp, torch.clip, F.hardtanh, "clamp", "clamp_", "clip", "clip_"}
ADD_FUNCTIONS = {operator.add, operator.iadd, torch.add}
"""x + y in all its spellings; the methods are add and add_."""


def relu_ceiling(gm: fx.GraphModule, node: fx.Node) -> float | None:
    """Where a node is max(x, 0) in one of its spellings: the value at which it is cut (6 for ReLU6), or infinity.

    None for every other node.
    """
    unbounded = float("inf")
    if node.op == "call_module":
        m = gm.get_submodule(str(node.target))
        if isinstance(m, nn.Hardtanh):  # ReLU6 is one
            return float(m.max_val) if m.min_val == 0 < m.max_val else None
        if isinstance(m, nn.LeakyReLU):
            return unbounded if m.negative_slope == 0 else None
        return unbounded if isinstance(m, nn.ReLU) else None
    if node.op == "call_function" and node.target is F.relu6:
        return 6.0
    if node.op != "get_attr" and node.target in BOUNDED_BELOW | {F.leaky_relu}:
        bound = [*node.args[1:], *(v for k, v in node.kwargs.items() if k in ("min", "negative_slope"))]
        return unbounded if bound[:1] == [0] else None
    if node.target in CLAMPS and node.op != "get_attr":
        bounds = dict(zip(("min", "max"), node.args[1:], strict=False))
        bounds |= {k.removesuffix("_val"): v for k, v in node.kwargs.items()}
        if node.target is F.hardtanh:
            bounds = {"min": -1.0, "max": 1.0, **bounds}
        low, high = bounds.get("min"), bounds.get("max")
        if not isinstance(low, int | float) or low != 0 or not isinstance(high, int | float | None):
            return None
        return unbounded if high is None else float(high) if high > 0 else None
    named = RELU_FUNCTIONS if node.op == "call_function" else RELU_METHODS if node.op == "call_method" else ()
    return unbounded if node.target in named else None


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
