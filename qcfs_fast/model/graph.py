"""From a torch module to a torch.fx graph whose leaves are layers and activations.

Shared by prepare (ReLU call sites become QCFS), convert and simulate, so that all three give an activation's
call site the same name: the module's path, with _1, _2, ... for further calls of one module.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..errors import ConversionError
from .qcfs import is_qcfs

# While torch.fx traces, it replaces methods of nn.Module for the whole process. So traces go one after another, and
# another thread that uses a module meanwhile gets what it would get without a trace.
_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, then in the mode it had. No other thread traces meanwhile: it might see either mode."""
    with _one_at_a_time:
        was_training = model.training
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_qcfs(m) or super().is_leaf_module(m, module_qualified_name)

    def current_path(self) -> str:
        return str(self.scope.module_path) or "the model's own forward"


def symbolic_trace(model: nn.Module) -> fx.GraphModule:
    """Trace in eval mode (the path inference takes); the result shares the model's parameters."""
    if isinstance(model, fx.GraphModule):
        return model
    tracer = _Tracer()
    try:
        with evaluating(model):
            graph = tracer.trace(model)
    except Exception as error:  # a model's own code can raise anything when run on proxies
        raise ConversionError(
            f"{tracer.current_path()}: cannot be traced by torch.fx ({type(error).__name__}: {error}). Remedy: replace "
            "control flow that depends on tensor values by modules, or move it out of the model"
        ) from error
    return fx.GraphModule(tracer.root, graph)


def owner_path(node: fx.Node) -> str:
    """Path of the module whose forward made this node ("" for the root)."""
    stack = node.meta.get("nn_module_stack")
    return "" if not stack else str(list(stack.values())[-1][0])


def describe(node: fx.Node) -> str:
    """How an error names a node: its module path, or the function and the module that calls it."""
    if node.op == "call_module":
        return str(node.target)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    where = owner_path(node) or "the model's own forward"
    return f"{name} in {where}"


def call_sites(gm: fx.GraphModule) -> Iterator[tuple[str, fx.Node, Any]]:
    """(site name, node, activation) of every QCFS call, in graph order."""
    calls: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        module = gm.get_submodule(str(node.target))
        if is_qcfs(module):
            n = calls.get(str(node.target), 0)
            calls[str(node.target)] = n + 1
            yield (str(node.target) if n == 0 else f"{node.target}_{n}"), node, module


RELU_MODULES = (nn.ReLU, nn.ReLU6)
RELU_FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_, F.relu6}
RELU_METHODS = {"relu", "relu_"}
ADD_FUNCTIONS = {operator.add, operator.iadd, torch.add}
"""x + y in all its spellings; the methods are add and add_."""


def is_relu(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), RELU_MODULES)
    if node.op == "call_function":
        return node.target in RELU_FUNCTIONS
    return node.op == "call_method" and node.target in RELU_METHODS
