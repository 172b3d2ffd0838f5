"""From a torch module to a torch.fx graph whose leaves are layers and activations.

A forward that asks for sizes gets answers: it is run without values (on the meta device) for images of usual sizes, and
where all of them give one answer, that is what the trace goes on with.
"""

from __future__ import annotations

import contextlib
import copy
import math
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..errors import ConversionError
from .graph import join_cuts
from .hooks import made_parameters_kept, refuse_hooks, wrapped
from .inplace import changes_in_place, read_results
from .qcfs import is_qcfs, refuse_other_formula

# While torch.fx traces, it replaces methods of nn.Module for the whole process. So traces go one after another, and
# another thread that uses a module meanwhile gets what it would get without a trace.
_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, then in the mode it had. No other thread traces meanwhile: it might see either mode."""
    with _one_at_a_time:
        modes = [(m, m.training) for m in model.modules()]  # a layer may have another mode than the model
        model.eval()
        try:
            yield
        finally:
            for m, was_training in modes:
                m.training = was_training


_OTHER_BRANCH = (
    "the forward asks for the size of its images, and these take another branch than all usual sizes (28 to 1024 "
    "pixels), which was traced. Remedy: leave the branch of your images, as a subclass whose forward has no other"
)


_REMEDIES = {  # by the words of an error in a trace; all others are of control flow
    "is not a member of this module": "make layers and parameters in __init__, not in forward",
    "does not support item assignment": "put values together by torch.cat, F.pad or where they are made",
    "ScriptModule": "the module as it was before torch.jit.script or torch.jit.trace",
    "got Proxy": "convert the part of the model without what takes tensors alone",
    "no one float": "leave values of parameters tensors, without float()",
}


def _in_place(function: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


class Proxy(fx.Proxy):
    """What a forward works on while it is traced. Where it asks for a number, it gets the one that all sizes share."""

    tracer: _Tracer
    __array_ufunc__ = None  # a number of numpy leaves arithmetic to this class

    def __len__(self) -> int:
        return int(self.tracer.number(self.node, len))

    def __index__(self) -> int:
        return int(self.tracer.number(self.node, operator.index))

    def __int__(self) -> int:
        return self.__index__()

    def __float__(self) -> float:
        return float(self.tracer.number(self.node, float))

    # torch.fx takes y += z for y = y + z.
    __iadd__, __isub__, __imul__ = map(_in_place, (operator.iadd, operator.isub, operator.imul))
    __itruediv__, __ifloordiv__ = map(_in_place, (operator.itruediv, operator.ifloordiv))
    __imod__, __ipow__ = map(_in_place, (operator.imod, operator.ipow))


class _Tracer(fx.Tracer):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.record_stack_traces = True
        self.own = set(model.modules())
        self.thread = threading.get_ident()
        self.failed_in = ""  # the innermost module whose forward raised
        self.shadow: nn.Module | None = None  # the model without values
        self.torn = ""  # a question on sizes that images of two sizes answer differently

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread or m not in self.own:  # or made by a forward, as nn.Flatten()(x)
            return forward(*args, **kwargs)
        if (inner := wrapped(m)) is not None:
            return inner(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or self.path_of_module(m)
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        return super().create_arg(a.item() if isinstance(a, np.generic) else a)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The parts of a tuple, of as many as all sizes give."""
        return (operator.getitem(obj, i) for i in range(self.number(obj.node, len)))

    def number(self, node: fx.Node, of: Callable[[Any], Any]) -> Any:
        """`of` the node's value, which must be one for all images: its number, or how many parts it has."""
        answers = {
            of(value)
            for values in (self._answers(node, batch) for batch in (2, 3))
            for value in values.values()
            if not (of is not len and isinstance(value, torch.Tensor))
        }
        if len(answers) != 1:
            raise TypeError(f"{node} has no one {of.__name__} for all images")
        return answers.pop()

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The way that a branch takes, where it asks for shapes alone: images of many sizes must agree on it.

        The graph asserts that it is taken, for sizes that were not tried.
        """
        ways: dict[bool, str] = {}
        for batch, most in ((2, None), (1, 1), (64, 1)):
            for shape, answer in self._answers(obj.node, batch, most).items():
                if isinstance(answer, bool):
                    ways.setdefault(answer, f"{list(shape)}" if batch == 2 else f"{list(shape)} in batches of {batch}")
        if len(ways) != 1:
            self.torn = f"images of {' and '.join(ways.values())} take different branches of it" if ways else ""
            return bool(super().to_bool(obj))
        (answer,) = ways
        as_said = self.create_proxy("call_function", operator.eq, (obj, answer), {})
        self.create_proxy("call_function", torch._assert, (as_said, _OTHER_BRANCH), {})
        return answer

    def _answers(self, asked: fx.Node, batch: int, most: int | None = None) -> dict[tuple[int, ...], Any]:
        """What a node is for images of usual shapes that the model takes, found without values."""
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(self.graph, copied)
        graph.output(copied[asked])
        found: dict[tuple[int, ...], Any] = {}
        with contextlib.suppress(Exception), made_parameters_kept(self.root), torch.no_grad():
            self.shadow = self.shadow or without_values(self.root)
            run = fx.Interpreter(fx.GraphModule(self.shadow, graph)).run
            for shape in _usual_shapes(self.root):
                with contextlib.suppress(Exception), torch.device("meta"):  # whatever a model raises on other shapes
                    found[shape] = run(torch.empty((batch, *shape)))
                if len(found) == most:
                    break
        return found

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, torch.jit.ScriptModule):
            raise TypeError(f"{type(m).__name__} of torch.jit is a ScriptModule, whose code is hidden")
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


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own network: without DataParallel, DistributedDataParallel, AveragedModel and torch.compile."""
    while (inner := wrapped(model)) is not None:
        refuse_hooks(model, "the model itself")
        model = inner
    if isinstance(model, fx.GraphModule):
        if any(isinstance(node.target, torch._ops.OpOverload) for node in model.graph.nodes):
            raise ConversionError(
                "the model is a graph of torch.export or make_fx, of torch's inner operators. Remedy: the model that "
                "it was made of"
            )
        if model.graph.python_code("self").src != model.code:
            raise ConversionError(
                "the model's graph was changed, and its forward is still the one before. Remedy: model.recompile()"
            )
    return model


def refuse_other_trace(model: nn.Module, gm: fx.GraphModule, shape: Sequence[int] | None = None) -> None:
    """ConversionError where a model computes something else than the graph that was traced of it, on a random image.

    A forward can ask whether it is given a tensor, and PyTorch can do what torch.fx does not see.

    Args:
        shape: of an image; default a usual one that the model takes. Where it takes none nothing is compared.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    shape = shape or _taken_shape(model, gm, dtype)
    if shape is None:
        return
    x = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with evaluating(model), evaluating(gm), torch.no_grad(), torch.random.fork_rng(devices=[]), _buffers_kept(model):
        try:
            meant, again = (pytree.tree_leaves(model(x.clone())) for _ in range(2))
        except Exception:  # whatever a model raises on an image that it does not like
            return
        try:
            found = pytree.tree_leaves(fx.Interpreter(gm).run(x.clone()))
        except Exception as error:
            raise ConversionError(f"what torch.fx traced of the model fails where the model runs ({error})") from error
    if not _alike(meant, again):
        raise ConversionError(
            "the model gives another output when it is given the same image again: it draws random numbers, or changes "
            "a buffer or counts its calls in its forward. Remedy: write that part without, or only while training "
            "(if self.training:); check=False leaves this check out"
        )
    if not _alike(meant, found):
        raise ConversionError(
            "the model computes something else than what torch.fx traced of it. Usual causes are a forward that asks "
            "for the type of a value (isinstance(x, Tensor)) or whether gradients are computed. Remedy: write that "
            "part without asking; check=False leaves this check out"
        )


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers that a forward changes, as one that counts its calls does, are put back."""
    before = [(t, t._version, t.clone()) for t in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for t, version, value in before:
                if t._version != version:
                    t.copy_(value)


def _taken_shape(model: nn.Module, gm: fx.GraphModule, dtype: torch.dtype) -> tuple[int, ...] | None:
    """The smallest usual shape of images, or a smaller one, that a model takes; None: none is found."""
    usual = sorted(_usual_shapes(model), key=math.prod)
    smaller = [(*shape[:1], *[side] * len(shape[1:])) for shape in usual for side in (16, 8)]
    with contextlib.suppress(Exception), made_parameters_kept(gm), torch.no_grad(), torch.device("meta"):
        shadow = without_values(gm).eval()
        for shape in (*usual, *smaller):
            with contextlib.suppress(Exception):  # whatever a model raises on an image that does not fit
                fx.Interpreter(shadow).run(torch.empty((2, *shape), dtype=dtype))  # which prints no error
                return shape
    return None


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_alike, a, b))
    if torch.is_tensor(a) and torch.is_tensor(b) and a.shape == b.shape:
        a, b = (t.double().nan_to_num() for t in (a, b))
        return bool((a - b).abs().mean() <= 1e-3 * a.abs().mean())
    return type(a) is type(b) and not torch.is_tensor(a) and bool(a == b)


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
    model = unwrapped(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    refuse_no_weights(model)
    if isinstance(model, fx.GraphModule):
        if not changes_in_place(model.graph, modules):
            return model
        graph = fx.Graph()
        graph.output(graph.graph_copy(model.graph, {}))
        read_results(graph, modules)
        return fx.GraphModule(model, graph)
    refuse_hooks(model, "the model itself")
    tracer = _Tracer(model)
    try:
        with evaluating(model), _buffers_kept(model):
            graph = tracer.trace(model)
            graph._tracer_cls = fx.Tracer  # by which a pickle of the prepared model is read
    except Exception as error:  # a model's own code can raise anything when run on proxies
        where = tracer.failed_in or "the model's own forward"
        if tracer.torn:
            raise ConversionError(
                f"{where}: asks for the size of its input, and {tracer.torn}, of which only one can be converted. "
                "Remedy: leave the branch of your images, as a subclass whose forward has no other"
            ) from error
        remedy = "replace control flow that depends on tensor values by modules, or move it out of the model"
        remedy = next((better for words, better in _REMEDIES.items() if words in str(error)), remedy)
        raise ConversionError(
            f"{where}: cannot be traced by torch.fx ({type(error).__name__}: {error}). Remedy: {remedy}"
        ) from error
    _drop_indices(graph)
    read_results(graph, modules)
    join_cuts(tracer.root, graph)
    return fx.GraphModule(tracer.root, graph)


def refuse_no_weights(model: nn.Module) -> None:
    if any(p.is_meta for p in model.parameters()):
        raise ConversionError(
            "the model has no weights (meta device). Remedy: model.to_empty(device='cpu'), then load them"
        )


def refuse_patched(gm: fx.GraphModule) -> None:
    """ConversionError where a layer or an activation is not what its class says."""
    for node in gm.graph.nodes:
        if node.op == "call_module":
            module, name = gm.get_submodule(node.target), node.target
            refuse_hooks(module, name)
            if is_qcfs(module):
                refuse_other_formula(module, name)


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
