"""From a torch module to a torch.fx graph whose leaves are layers and activations.

Shared by prepare (ReLU call sites become QCFS), convert and simulate, so that all three give an activation's
call site the same name: the module's path, with _1, _2, ... for further calls of one module.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

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
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.own = set(model.modules())
        self.thread = threading.get_ident()
        self.failed_in = ""  # the innermost module whose forward raised
        self.shadow: nn.Module | None = None  # the model without values
        self.torn = ""  # a question on sizes that images of two sizes answer differently

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread or m not in self.own:  # or made by a forward, as nn.Flatten()(x)
            return forward(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or self.path_of_module(m)
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The way that a branch takes, where it asks for shapes alone: images of many sizes must agree on it.

        The graph asserts that it is taken, for sizes that were not tried.
        """
        answers = self._answers(obj.node)
        if len(set(answers.values())) != 1:
            sizes = " and ".join(
                str(list(next(s for s, a in answers.items() if a is way))) for way in set(answers.values())
            )
            self.torn = f"images of {sizes} take different branches of it" if answers else ""
            return bool(super().to_bool(obj))
        (answer,) = set(answers.values())
        as_said = self.create_proxy("call_function", operator.eq, (obj, answer), {})
        self.create_proxy("call_function", torch._assert, (as_said, "another branch than the traced one"), {})
        return answer

    def _answers(self, asked: fx.Node) -> dict[tuple[int, ...], bool]:
        """What a condition is for images of usual shapes that the model takes, found without values."""
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(self.graph, copied)
        graph.output(copied[asked])
        found = {}
        with contextlib.suppress(Exception), made_parameters_kept(self.root), torch.no_grad():
            self.shadow = self.shadow or without_values(self.root)
            run = fx.Interpreter(fx.GraphModule(self.shadow, graph)).run
            for shape in _usual_shapes(self.root):
                with contextlib.suppress(Exception), torch.device("meta"):  # whatever a model raises on other shapes
                    answer = run(torch.empty((2, *shape)))
                    if not isinstance(answer, bool):  # a tensor: it depends on values
                        return {}
                    found[shape] = answer
        return found

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_qcfs(m) or is_normalize(m) or super().is_leaf_module(m, module_qualified_name)


def _usual_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes of images that the first layer may take."""
    first: Any = next((m for m in model.modules() if hasattr(m, "in_channels") or hasattr(m, "in_features")), None)
    if isinstance(first, nn.Linear):
        yield (first.in_features,)
    channels = {3, 1} if isinstance(first, nn.Linear) or first is None else {first.in_channels}
    for c in channels:
        for side in (224, 32, 28, 97, 512, 64, 128, 256, 300, 1024):
            yield (c, side) if isinstance(first, nn.Conv1d) else (c, side, side)


def without_values(module: nn.Module) -> Any:
    """A copy whose tensors are on the meta device: they have shapes alone."""
    tensors = [*module.parameters(), *module.buffers()]
    own = {id(t): nn.Parameter(t.to("meta"), False) if isinstance(t, nn.Parameter) else t.to("meta") for t in tensors}
    return copy.deepcopy(module, own)


def is_normalize(m: nn.Module) -> bool:
    """Whether a module is torchvision's Normalize, whose forward asks what its input is."""
    return type(m).__name__ == "Normalize" and type(m).__module__.startswith("torchvision.transforms")


def symbolic_trace(model: nn.Module) -> fx.GraphModule:
    """Trace in eval mode (the path inference takes); the result shares the model's parameters."""
    if isinstance(model, fx.GraphModule):
        return model
    refuse_hooks(model, "the model itself")
    tracer = _Tracer(model)
    try:
        with evaluating(model):
            graph = tracer.trace(model)
    except Exception as error:  # a model's own code can raise anything when run on proxies
        where = tracer.failed_in or "the model's own forward"
        if tracer.torn:
            raise ConversionError(
                f"{where}: asks for the size of its input, and {tracer.torn}, of which only one can be converted. "
                "Remedy: leave the branch of your images, as a subclass whose forward has no other"
            ) from error
        raise ConversionError(
            f"{where}: cannot be traced by torch.fx ({type(error).__name__}: {error}). Remedy: replace "
            "control flow that depends on tensor values by modules, or move it out of the model"
        ) from error
    _drop_indices(graph)
    _join_cuts(tracer.root, graph)
    return fx.GraphModule(tracer.root, graph)


def _drop_indices(graph: fx.Graph) -> None:
    """x.max(dim), of which the values are read and not the indices, becomes x.amax(dim)."""
    for node in list(graph.nodes):
        asked = [v for v in (node.args[1:2], node.kwargs.get("dim")) if v not in ((), None)]
        if node.target not in (torch.max, "max") or not asked or isinstance(asked[0], fx.Node):
            continue
        parts = [(u.target, *u.args[1:]) in ((operator.getitem, 0), (getattr, "values")) for u in node.users]
        unread = [u.op != "output" and not u.users for u in node.users]  # as the indices in `values, _ = x.max(1)`
        if any(parts) and all(map(operator.or_, parts, unread)):
            node.target = "amax" if node.op == "call_method" else torch.amax
            for user in list(node.users):
                user.replace_all_uses_with(node)
                graph.erase_node(user)


def _is_ours(hook: Any) -> bool:
    """Whether a hook belongs to this package, or makes a parameter of others, as weight_norm and pruning do."""
    return getattr(hook, "__module__", "").startswith(__name__.partition(".")[0]) or makes_parameter(hook) is not None


def refuse_hooks(module: nn.Module, name: str) -> None:
    """ConversionError where a module has hooks, which would not run in the converted network."""
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if not _is_ours(hook):
            what = getattr(hook, "__qualname__", type(hook).__name__)
            raise ConversionError(
                f"{name}: has a forward hook ({what}), which the converted network would not run. Remedy: remove it "
                "(handle.remove()), or do its work in the forward of a module"
            )


def makes_parameter(hook: Any) -> str | None:
    """The parameter that a pre-hook of torch makes of others before each forward; None where it makes none."""
    if isinstance(hook, WeightNorm | SpectralNorm):
        return str(hook.name)
    return str(hook._tensor_name) if isinstance(hook, BasePruningMethod) else None


@contextlib.contextmanager
def made_parameters_kept(model: nn.Module) -> Iterator[None]:
    """What such hooks made is detached meanwhile, so that it can be copied, and put back after whatever runs makes."""
    hooks = [(m, hook) for m in model.modules() for hook in m._forward_pre_hooks.values()]
    made = [(m, name, getattr(m, name)) for m, hook in hooks if (name := makes_parameter(hook))]
    for m, name, value in made:
        setattr(m, name, value.detach())
    try:
        yield
    finally:
        for m, name, value in made:
            setattr(m, name, value)


def parameter(module: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter as the next forward will see it.

    Under torch's hook-based weight_norm, spectral_norm and pruning the attribute is what the last forward made, which
    may have been before the weights were loaded.
    """
    for hook in module._forward_pre_hooks.values():
        if makes_parameter(hook) != name:
            continue
        if isinstance(hook, WeightNorm):
            return hook.compute_weight(module)
        if isinstance(hook, SpectralNorm):
            return hook.compute_weight(module, do_power_iteration=False)
        assert isinstance(hook, BasePruningMethod)
        return hook.apply_mask(module)
    found: torch.Tensor | None = getattr(module, name)
    return found


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
ADD_FUNCTIONS = {operator.add, operator.iadd, torch.add}
"""x + y in all its spellings; the methods are add and add_."""


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


def _join_cuts(root: nn.Module, graph: fx.Graph) -> None:
    """relu(x).clamp(max=c) becomes x.clamp(0, c): one neuron, and not one behind another."""
    for node in list(graph.nodes):
        inner = node.args[0] if node.args else None
        given = _given(root, node, CUTS)
        if given is None or not isinstance(inner, fx.Node) or (below := relu_ceiling(root, inner)) is None:
            continue
        cut = _ceiling(given.get("max", given.get("other")))
        if cut is None or not (given.get("min") or 0) <= 0:
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
