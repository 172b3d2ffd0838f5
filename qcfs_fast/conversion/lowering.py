"""From a traced network to spiking layers: symbolic execution of the graph.

Between two activations a network is linear, so every value there is a Signal or a Current (values.py). Convolution and
linear layers turn a Signal into a Current, BatchNorm and scalar factors rescale one, addition joins them, an activation
turns a Current into the Signal of a new spiking layer. A layer that follows a Current becomes one with it where that
is exact at borders as well, and elsewhere tap by tap. What does not fit (a product of two activations, say) raises
ConversionError with the module path and a remedy.

Lowering has a method for each kind of operation, in a file for each kind:

    sizes.py       sizes of maps, and what is computed with them
    symbolic.py    the state of a pass, and how an operation takes its operand
    weighted.py    convolution, linear layer, BatchNorm
    arithmetic.py  sums, factors, concatenations
    ends.py        what follows the last layer
    spatial.py     pools, pads, crops, upsampling
    reshaping.py   shapes, views, choices of channels

Each file's class extends that of the one before, and Lowering the last. FUNCTIONS, METHODS and MODULES at the
end say which calls of torch the methods are.

Source of the construction: Bu et al., ICLR 2022, sections 3 and 4; BatchNorm folding as in its appendix.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..errors import ConversionError
from ..model.graph import ADD_FUNCTIONS, CASTS, REPLACEABLE, called, layer_rank, relu_ceiling, tail_step
from ..model.hooks import parameter, refuse_hooks
from ..model.qcfs import is_qcfs, thresholds
from ..model.tracing import evaluating, is_normalize, refuse_patched, symbolic_trace
from .reshaping import Reshaping
from .shapes import LAST_SHAPE, propagate_shapes
from .sizes import ShapeNeededError, Size, has_size
from .symbolic import Unknown, one_current
from .values import (
    Activation,
    Answer,
    Image,
    Joined,
    Lowered,
    Part,
    Signal,
    merged,
)

_NO_THRESHOLD = "is a ReLU, which has no threshold; call qcfs_fast.prepare(model) first and train or calibrate it"
_OTHER_RANK = {  # layers that are not of the images' rank
    1: "works on lines [N, C, L], which no map and no vector is here. Remedy: give the network images [N, C, L], or, "
    "in a network of maps, its 2d counterpart with a kernel (1, K)",
    2: "works on maps [N, C, H, W], which no line [N, C, L] is. Remedy: give the network images [N, C, 1, L]",
    3: "works on volumes, and the kernels here have two dimensions. Remedy: 2d layers, and the frames of a clip as the "
    "steps of an input [T, N, C, H, W]; or a kernel of depth 1 as a 2d layer",
}
_OF_ITSELF = "it normalises each image by itself, which is not linear. Remedy: BatchNorm in its place, trained"
_ATTENTION = "attention multiplies activations with each other. Remedy: convert the part before it"
_NO_COUNTERPART: dict[Any, str] = {
    (
        nn.LayerNorm,
        nn.GroupNorm,
        nn.LocalResponseNorm,
        nn.modules.instancenorm._InstanceNorm,
    ): _OF_ITSELF,
    (nn.RNNBase, nn.RNNCellBase): "it is recurrent, and spikes run forward. Remedy: convert the part before it",
    (nn.MultiheadAttention, nn.Transformer, nn.TransformerEncoderLayer): _ATTENTION,
    nn.Embedding: "it looks up indices, which are no image. Remedy: convert the part behind it",
    tuple(REPLACEABLE): "it has negative values. Remedy: ReLU, or prepare(model, replace={its class}) and train",
}
_NO_FUNCTION: dict[Any, str] = {  # by the names that functions and methods share
    "argmax argmin topk sort argsort": "it gives labels or places, which have no mean over the steps. Remedy: return "
    "the scores, and take it of the network's answer",
    "normalize": "it divides values by their own length, which is not linear. Remedy: a BatchNorm, or convert the "
    "network up to it",
    "layer_norm group_norm instance_norm local_response_norm rms_norm": _OF_ITSELF,
    "scaled_dot_product_attention multi_head_attention_forward bmm baddbmm": _ATTENTION,
    "einsum": "only a linear layer's product is known. Remedy: F.linear or a 1x1 convolution of the constant",
    "max min maximum minimum": "it compares activations with each other, or says where the largest is. Remedy: amax "
    "over pixels, or a pool; where labels are asked, return the scores, and take argmax of the network's answer",
    "stack": "it adds a dimension. Remedy: a sum of the values, or torch.cat along the channels",
}


class Lowering(Reshaping):
    """The walk over the graph, and the layers that it finds."""

    def run(self) -> Lowered:
        refuse_hooks(self.gm, "the model itself")
        obstacles: list[ConversionError] = []
        for node in self.gm.graph.nodes:
            self.node = node
            try:
                self.values[node] = self._execute(node)
                if self._is_constant(self.values[node]) and self._depends_on_size(node):
                    self.sized.add(node)
            except ShapeNeededError:
                raise
            except ConversionError as error:
                obstacles.append(error)
                self.values[node] = Unknown(node.op == "call_module")
        if obstacles:
            raise _all_of(obstacles)
        if not self.result.outputs:
            raise ConversionError("the model returns nothing that depends on its input")
        if self.image is None:
            raise ConversionError("the model has no layer that reads its input")
        self.result.image = self.image
        return self.result

    def _takes_joined(self, node: fx.Node) -> bool:
        """Whether a node leaves currents side by side as they are; all others get them as one."""
        if node.op == "call_module":
            m = self.gm.get_submodule(str(node.target))
            return is_qcfs(m) or isinstance(m, (*_BATCH_NORMS, *_PASSING_MODULES))
        return _handler(node) in _OF_JOINED

    def _takes_sums(self, node: fx.Node) -> bool:
        """Whether a node leaves sums of pixels as they are; all others get them as vectors."""
        if node.op == "call_module":
            return self._is_module(node, (nn.Flatten, *_PASSING_MODULES))
        return _handler(node) in _OF_SUMS or called(node) == "squeeze" or self._is_mean(node)

    def _get(self, x: Any) -> Any:
        return fx.node.map_arg(x, lambda n: self.values[n])

    def _execute(self, node: fx.Node) -> Any:
        args, kwargs = self._get(node.args), self._get(node.kwargs)
        if not self._takes_joined(node):
            args, kwargs = (fx.node.map_aggregate(v, one_current) for v in (args, kwargs))
        if not self._takes_sums(node):
            args, kwargs = (fx.node.map_aggregate(v, self.summed) for v in (args, kwargs))
        if node.op == "placeholder":
            if str(node.target).startswith("*"):
                if node.users:
                    raise self.fail(
                        f"is what forward takes as {node.target}, of which torch.fx knows nothing. Remedy: a forward "
                        "whose one argument has a name"
                    )
                return None
            if any(isinstance(v, Image) for v in self.values.values()):
                if node.args:  # a further argument with a default
                    return node.args[0]
                raise self.fail("a network with several inputs is not supported; convert the part behind one input")
            return Image((), (), (), vector=len(self._image_shape() or ()) == 1, line=self.line)
        rank = layer_rank(self.gm, node)
        if rank is not None and rank != self._rank(None) - 2:
            raise self.fail(_OTHER_RANK[rank])
        unknown = self._unknown((args, kwargs))
        if node.op == "output":
            return None if unknown else self._output(args[0])
        if node.op == "get_attr":
            value: Any = self.gm
            for name in str(node.target).split("."):
                value = getattr(value, name)
            return value
        handler = _handler(node)
        judged = handler in _DROPOUTS or node in self.sites or (handler is Lowering.expand and has_size(args))
        if node.all_input_nodes and self._is_constant((args, kwargs)) and not judged:
            return self._constant(args, kwargs)
        step = tail_step(self.gm, node)
        if step is not None and not unknown:
            x = args[0] if args else kwargs["input"]
            squeezed = self.squeeze(x, step[1]) if step[0] == "squeeze" and not isinstance(x, Answer) else None
            return self._tail(x, *step) if squeezed is None else squeezed
        for value in () if self._is_resize(node) else (*args, *kwargs.values()):
            if isinstance(value, Answer):
                raise self._not_the_end(value)
        if relu_ceiling(self.gm, node) is not None:
            raise self.fail(_NO_THRESHOLD)
        if node.op == "call_module":
            m = self.gm.get_submodule(str(node.target))
            if unknown and (step is not None or is_qcfs(m) or isinstance(m, _KNOWN_MODULES)):
                return self._fired_unknown(m) or unknown
            return self._module(m, args, kwargs)
        for names, why in _NO_FUNCTION.items():
            if handler is None and called(node) in names.split():
                raise self.fail(f"has no spiking counterpart: {why}")
        if isinstance(node.target, type):
            raise self.fail(f"makes a {called(node)}. Remedy: return a tuple or a dict")
        if handler is None and not (unknown and (step is not None or not unknown.activation)):
            raise self.fail(
                "has no spiking counterpart. Supported: convolution, linear, BatchNorm, dropout, pooling, flatten, "
                "add, concat and QCFS. Remedy: replace it, or convert only the part of the model without it"
            )
        if handler is None or (unknown and handler not in (_OF_ACTIVATIONS if unknown.activation else _OF_ANYTHING)):
            return unknown
        if self._asks_for_sizes() and handler not in _OF_SIZES and not self._is_mean(node):
            raise self.fail(
                "is given a number made of the size of maps, which is another one in images of another size. Remedy: "
                "write the number, in a model for images of one size"
            )
        try:
            return handler(self, *args, **kwargs)
        except TypeError as error:
            raise self.fail(f"is called in a way that is not known here ({error})") from error

    def _constant(self, args: tuple, kwargs: dict) -> Any:
        """What a node makes of parameters, numbers and sizes."""
        target: Any = self.node.target
        if target is torch._assert and self.shapes is None:
            return None  # it may ask for sizes
        if self.node.op == "call_module":
            target = self.gm.get_submodule(target)
        elif any(isinstance(v, Size) for v in args) and getattr(target, "__module__", "") in ("math", "_operator"):
            return Size()
        try:
            with torch.no_grad():
                return target(*args, **kwargs) if callable(target) else getattr(args[0], target)(*args[1:], **kwargs)
        except Exception as error:  # whatever a function raises on a size that is not known
            if self.shapes is None and has_size((args, kwargs)):
                raise self._shape_needed("computes with a size that is not known") from error
            raise self.fail(f"cannot be computed without an image ({error})") from error

    def _not_the_end(self, value: Answer) -> ConversionError:
        """Why nothing may work on a tail."""
        name = value.steps[-1][0] if value.steps else "squeeze"
        more = self._without_gate()
        if name == "resize":
            more = "Remedy: mode='nearest' by a whole factor, which spikes can do"
        return self.fail(
            f"works on the result of {name}, which no neuron computes: it may only stand at the end of a network. "
            + more
        )

    def _module(self, m: nn.Module, args: tuple, kwargs: dict) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        if is_qcfs(m):
            return self.fire(x, m)
        if is_normalize(m):
            return self.normalize(x, m.mean, m.std)
        if isinstance(m, nn.ConvTranspose1d | nn.ConvTranspose2d) and (len(args) > 1 or kwargs.get("output_size")):
            raise self.fail("is told its output size at the call. Remedy: output_padding")
        for kinds, lowered in MODULES:
            if isinstance(m, kinds):
                return lowered(self, x, m)
        for kinds, why in _NO_COUNTERPART.items():
            if isinstance(m, kinds):
                raise self.fail(f"{type(m).__name__} has no spiking counterpart: {why}")
        kind = type(m).__name__
        if type(m) is not getattr(nn, kind, type(m)):  # of another package, as quantised layers are
            kind = f"{type(m).__module__}.{kind}"
        raise self.fail(
            f"{kind} has no spiking counterpart. Supported: Conv1d, Conv2d, Linear, BatchNorm, Dropout, "
            "Flatten, AvgPool, AdaptiveAvgPool, MaxPool and QCFS. Remedy: replace the module by one of these (an "
            "activation by ReLU before prepare)"
        )

    def _fired_unknown(self, m: nn.Module) -> Signal | None:
        """What a module makes of an unknown value: an activation's spikes are known again, if their shape is."""
        shape = (self.shapes or {}).get(self.node)
        if not is_qcfs(m) or not shape:
            return None
        return Signal((Part(str(self.node.target), torch.ones(shape[0], dtype=torch.float64)),), len(shape) == 1)

    def fire(self, x: Any, m: Any) -> Signal:
        name = self.sites[self.node][0]
        self.single |= {name} if self._has_one_pixel(x) else set()
        values = x.currents if isinstance(x, Joined) else (x,)
        currents = tuple(
            merged(self._current(v, None, "activates something that is not a layer's output")) for v in values
        )
        parts = [p.part for c in currents for p in c.products]
        parts += [p for c in currents for s in c.identities for p in s.parts]
        self.needs_shapes |= any(p.needs_size for p in parts)
        theta = thresholds(m, name, sum(c.channels for c in currents))
        self.result.layers.append(Activation(name, currents, theta, int(m.L)))
        return Signal((Part(name, theta),), currents[0].vector or currents[0].flattened)

    def _output(self, x: Any) -> None:
        several = isinstance(x, (tuple, list, dict))
        if several and not x:
            raise ConversionError("the model returns nothing that depends on its input")
        form = self._form(x)
        self.result.form = form if several else None

    def _form(self, x: Any) -> Any:
        """How outputs are put together; each of them becomes a readout."""
        if isinstance(x, dict):
            if not all(isinstance(name, str) for name in x):
                raise self.fail("the model returns a dict whose keys are no strings")
            return ["dict", {name: self._form(v) for name, v in x.items()}]
        if isinstance(x, (tuple, list)):
            return ["tuple" if isinstance(x, tuple) else "list", [self._form(v) for v in x]]
        self.result.outputs.append(self._answer(x))
        return len(self.result.outputs) - 1


Handler = Callable[..., Any]
FUNCTIONS: dict[Any, Handler] = {
    **dict.fromkeys(ADD_FUNCTIONS, Lowering.add),
    **dict.fromkeys((operator.sub, torch.sub, torch.subtract), Lowering.subtract),
    **dict.fromkeys((operator.neg, torch.neg, torch.negative), Lowering.negate),
    **dict.fromkeys((operator.mul, torch.mul, torch.multiply), Lowering.scale),
    **dict.fromkeys((operator.truediv, torch.div, torch.divide), Lowering.divide),
    torch.cat: Lowering.concat,
    torch.concat: Lowering.concat,
    torch.flatten: Lowering.flatten,
    torch.unflatten: Lowering.unflatten,
    torch.unsqueeze: Lowering.unsqueeze,
    torch.reshape: Lowering.view,
    torch.permute: Lowering.permute,
    torch.transpose: Lowering.transpose,
    torch.chunk: Lowering.chunk,
    torch.split: Lowering.split,
    torch.index_select: Lowering.index_select,
    torch.narrow: Lowering.narrow,
    **dict.fromkeys((operator.matmul, torch.matmul, torch.mm), Lowering.matmul),
    torch.channel_shuffle: Lowering.shuffle,
    F.channel_shuffle: Lowering.shuffle,
    torch.mean: Lowering.mean,
    torch.sum: Lowering.sum,
    torch.amax: Lowering.amax,
    torch.is_floating_point: Lowering.is_floating_point,
    **dict.fromkeys((torch.conv1d, F.conv1d, torch.conv2d, F.conv2d), Lowering.conv),
    F.linear: Lowering.linear,
    F.batch_norm: Lowering.batch_norm,
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), Lowering.dropout),
    **dict.fromkeys((torch.dropout, torch.feature_dropout), Lowering.dropout),
    **dict.fromkeys((torch.alpha_dropout, torch.feature_alpha_dropout), Lowering.dropout),
    **dict.fromkeys((F.alpha_dropout, F.feature_alpha_dropout), Lowering.alpha_dropout),
    **dict.fromkeys((F.avg_pool1d, torch.avg_pool1d, F.avg_pool2d), Lowering.avg_pool),
    **dict.fromkeys((F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d), Lowering.adaptive_pool),
    F.adaptive_avg_pool2d: Lowering.adaptive_pool,
    **dict.fromkeys((F.adaptive_max_pool1d, F.adaptive_max_pool2d), Lowering.adaptive_max_pool),
    **dict.fromkeys((F.max_pool1d, torch.max_pool1d, F.max_pool2d, torch.max_pool2d), Lowering.max_pool),
    F.pad: Lowering.pad,
    F.interpolate: Lowering.upsample,
    F.pixel_shuffle: Lowering.pixel_shuffle,
    F.pixel_unshuffle: Lowering.pixel_unshuffle,
    **dict.fromkeys((torch.conv_transpose1d, F.conv_transpose1d), Lowering.conv_transpose),
    **dict.fromkeys((torch.conv_transpose2d, F.conv_transpose2d), Lowering.conv_transpose),
    operator.getitem: Lowering.getitem,
    getattr: Lowering.getattr,
}
METHODS: dict[str, Handler] = {
    "add": Lowering.add,
    **dict.fromkeys(("sub", "subtract"), Lowering.subtract),
    **dict.fromkeys(("neg", "negative"), Lowering.negate),
    **dict.fromkeys(("mul", "multiply"), Lowering.scale),
    **dict.fromkeys(("div", "divide"), Lowering.divide),
    "flatten": Lowering.flatten,
    "unflatten": Lowering.unflatten,
    "view": Lowering.view,
    "reshape": Lowering.view,
    "size": Lowering.size,
    "dim": Lowering.rank,
    "is_floating_point": Lowering.is_floating_point,
    "ndimension": Lowering.rank,
    "mean": Lowering.mean,
    "sum": Lowering.sum,
    "amax": Lowering.amax,
    "unsqueeze": Lowering.unsqueeze,
    "permute": Lowering.permute,
    "transpose": Lowering.transpose,
    "chunk": Lowering.chunk,
    "split": Lowering.split,
    "index_select": Lowering.index_select,
    "narrow": Lowering.narrow,
    **dict.fromkeys(("matmul", "mm"), Lowering.matmul),
    **dict.fromkeys(("to", "type"), Lowering.to),
    "contiguous": Lowering.keep,
    "detach": Lowering.keep,
    "clone": Lowering.keep,
    **dict.fromkeys((*CASTS, "type_as"), Lowering.keep),
    **dict.fromkeys(("expand", "expand_as"), Lowering.expand),
}


def _conv(lowering: Lowering, x: Any, m: Any) -> Any:
    padding = m.padding
    if m.padding_mode != "zeros":  # the module knows how much on each side, the last dimension first
        x, padding = lowering.pad(x, m._reversed_padding_repeated_twice, m.padding_mode), 0
    return lowering.conv(x, parameter(m, "weight"), parameter(m, "bias"), m.stride, padding, m.dilation, m.groups)


def _conv_transpose(lowering: Lowering, x: Any, m: Any) -> Any:
    weight, bias = parameter(m, "weight"), parameter(m, "bias")
    return lowering.conv_transpose(x, weight, bias, m.stride, m.padding, m.output_padding, m.groups, m.dilation)


def _batch_norm(lowering: Lowering, x: Any, m: Any) -> Any:
    return lowering.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, eps=m.eps)


def _avg_pool(lowering: Lowering, x: Any, m: Any) -> Any:
    divisor = getattr(m, "divisor_override", None)  # a pool over lines has none
    return lowering.avg_pool(x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, divisor)


def _max_pool(lowering: Lowering, x: Any, m: Any) -> Any:
    return lowering.max_pool(x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices)


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
_PASSING_MODULES = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    nn.Identity,
)
MODULES: list[tuple[Any, Callable[[Lowering, Any, Any], Any]]] = [
    ((nn.Conv1d, nn.Conv2d), _conv),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d), _conv_transpose),
    (nn.Linear, lambda self, x, m: self.linear(x, parameter(m, "weight"), parameter(m, "bias"))),
    (_BATCH_NORMS, _batch_norm),
    (_PASSING_MODULES, lambda self, x, m: x),
    ((nn.AvgPool1d, nn.AvgPool2d), _avg_pool),
    ((nn.MaxPool1d, nn.MaxPool2d), _max_pool),
    ((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d), lambda self, x, m: self.adaptive_pool(x, m.output_size)),
    (
        (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
        lambda self, x, m: self.adaptive_max_pool(x, m.output_size, m.return_indices),
    ),
    ((nn.ConstantPad1d, nn.ConstantPad2d), lambda self, x, m: self.pad(x, m.padding, "constant", m.value)),
    ((nn.ReflectionPad1d, nn.ReflectionPad2d), lambda self, x, m: self.pad(x, m.padding, "reflect")),
    ((nn.ReplicationPad1d, nn.ReplicationPad2d), lambda self, x, m: self.pad(x, m.padding, "replicate")),
    ((nn.CircularPad1d, nn.CircularPad2d), lambda self, x, m: self.pad(x, m.padding, "circular")),
    (nn.Upsample, lambda self, x, m: self.upsample(x, m.size, m.scale_factor, m.mode, m.align_corners)),
    (nn.PixelShuffle, lambda self, x, m: self.pixel_shuffle(x, m.upscale_factor)),
    (nn.PixelUnshuffle, lambda self, x, m: self.pixel_unshuffle(x, m.downscale_factor)),
    (nn.ChannelShuffle, lambda self, x, m: self.shuffle(x, m.groups)),
    (nn.Flatten, lambda self, x, m: self.flatten(x, m.start_dim, m.end_dim)),
    (nn.Unflatten, lambda self, x, m: self.unflatten(x, m.dim, m.unflattened_size)),
]
_KNOWN_MODULES = tuple(kind for kinds, _ in MODULES for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
_OF_TORCHVISION: dict[str, Handler] = {
    "stochastic_depth": Lowering.stochastic_depth,
    **dict.fromkeys(("drop_block2d", "drop_block3d"), Lowering.drop_block),
}


def _handler(node: fx.Node) -> Handler | None:
    """The method that lowers a call of a function or of a tensor's method, if one does."""
    if node.op == "call_function":
        return FUNCTIONS.get(node.target) or _OF_TORCHVISION.get(called(node))
    return METHODS.get(str(node.target)) if node.op == "call_method" else None


_DROPOUTS = (Lowering.dropout, Lowering.alpha_dropout, Lowering.stochastic_depth, Lowering.drop_block)
# What takes currents side by side one by one.
_OF_JOINED = (
    *(Lowering.batch_norm, Lowering.concat, Lowering.scale, Lowering.divide, Lowering.negate),
    *(Lowering.keep, *_DROPOUTS, Lowering.getitem, Lowering.split, Lowering.chunk, Lowering.index_select),
    *(Lowering.narrow, Lowering.to),
)
# What is looked at even where a value is unknown: sizes have an answer, a product of two activations is an obstacle.
_OF_ANYTHING = (Lowering.size, Lowering.rank, Lowering.getattr, *_DROPOUTS)
_OF_ACTIVATIONS = (*_OF_ANYTHING, Lowering.scale, Lowering.divide)


_OF_SUMS = (
    *(Lowering.sum, Lowering.mean, Lowering.amax, Lowering.flatten, Lowering.view, Lowering.getitem, Lowering.keep),
    *(Lowering.size, Lowering.rank, Lowering.getattr),
)


# What may be told the size of maps: it stays true in other sizes, or the method asks whether it does.
_OF_SIZES = (
    *(Lowering.view, Lowering.getitem, Lowering.pad, Lowering.upsample, Lowering.avg_pool, Lowering.max_pool),
    *(Lowering.flatten, Lowering.to, Lowering.expand),
)


def _all_of(obstacles: list[ConversionError]) -> ConversionError:
    """All that stands in the way, each reason once with its places."""
    places: dict[str, list[str]] = {}
    for error in obstacles:
        place, _, why = str(error).partition(": ")
        found = places.setdefault(why, [])
        found += [place] if place not in found else []
    lines = []
    for why, found in places.items():
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        lines.append(f"{', '.join(found[:3])}{more}: {why}")
    if len(lines) > 1:
        lines = [f"{sum(map(len, places.values()))} obstacles", *(f"  {line}" for line in lines)]
    raised = ConversionError("\n".join(lines))
    raised.obstacles = tuple((why, tuple(found)) for why, found in places.items())
    return raised


def lower(model: nn.Module, input_shape: Sequence[int] | None = None) -> tuple[Lowered, tuple[int, ...] | None]:
    """Trace and lower a model; returns the layers and the image shape [C, H, W] they were settled for, if any.

    The shape matters only where a pool's divisor depends on it. It is the one given, or the one the
    prepared model last saw, or else a guess: the usual 224 pixels, then 32.
    """
    with evaluating(model):
        gm = symbolic_trace(model)
        refuse_patched(gm)
        # Without a shape: one pass that finds out whether any is needed, and how many channels the image has.
        known = input_shape or model.__dict__.get(LAST_SHAPE)
        needed: ConversionError | None = None
        if known is None:
            lowering = Lowering(gm, None)
            try:
                lowered = lowering.run()
                if not lowering.needs_shapes:
                    return lowered, None
            except ConversionError as e:
                needed = e  # with sizes there may be more to say
            channels = (3, 1) if lowering.image is None else (len(lowering.image.source),)
            guesses = [(c, side, side)[: 2 if lowering.line else 3] for c in channels for side in (224, 32)]
        else:
            guesses = [tuple(int(d) for d in known)]
        # With a shape: its sizes at every node are found by running the graph on fake tensors.
        error: Exception | None = None
        for shape in guesses:
            try:
                shapes = propagate_shapes(gm, shape)
            except Exception as e:  # whatever the model's own code raises on a shape that does not fit
                error = e
                continue
            try:
                lowered = Lowering(gm, shapes).run()
            except ConversionError:
                if not isinstance(needed, ShapeNeededError):
                    raise
                continue  # it may be the guess that is wrong
            if needed is None or isinstance(needed, ShapeNeededError):
                return lowered, shape
    if needed is not None:
        raise needed
    raise ConversionError(
        f"the model does not run on images of shape {guesses[-1]} ({str(error).splitlines()[0]}). "
        "Remedy: give convert(..., input_shape=(channels, height, width))"
    ) from error
