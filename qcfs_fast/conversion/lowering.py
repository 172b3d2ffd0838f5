"""From a traced network to spiking layers: symbolic execution of the graph.

Between two activations a network is linear, so every value there is a Signal or a Current (values.py). Convolution and
linear layers turn a Signal into a Current, BatchNorm and scalar factors rescale one, addition joins them, an activation
turns a Current into the Signal of a new spiking layer. A layer of 1x1 taps that follows a Current becomes one with it.
What does not fit (a 3x3 convolution of a Current, a product of two activations) has no spiking meaning and raises
ConversionError with the module path and a remedy.

Lowering has a method for each kind of operation; FUNCTIONS and METHODS at the end say which calls of torch they are.

Source of the construction: Bu et al., ICLR 2022, sections 3 and 4; BatchNorm folding as in its appendix.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..errors import ConversionError
from ..model.graph import (
    ADD_FUNCTIONS,
    call_sites,
    describe,
    evaluating,
    is_normalize,
    made_parameters_kept,
    parameter,
    refuse_hooks,
    relu_ceiling,
    symbolic_trace,
    tail_step,
)
from ..model.qcfs import is_qcfs, thresholds
from ..network.layers import INPUT
from ..network.tail import OF_NUMBERS, RESIZE_MODES
from ..operators.geometry import POINTWISE
from ..operators.windows import PoolSpec
from .values import (
    Activation,
    Answer,
    Current,
    Grouped,
    Image,
    Joined,
    Lowered,
    Part,
    Product,
    Signal,
    affine,
    composed,
    concatenated,
    dealt,
    dense,
    identity_current,
    joined,
    merged,
    scaled,
    selected,
    ungrouped,
    without_choices,
)

Shapes = dict[fx.Node, tuple[int, ...]]
LAST_SHAPE = "_qcfs_fast_input_shape"  # where a prepared model notes the shape of the images it last saw

_NO_THRESHOLD = "is a ReLU, which has no threshold; call qcfs_fast.prepare(model) first and train or calibrate it"


class ShapeNeededError(ConversionError):
    """Lowering cannot go on without the shape of the images."""


class _Unknown:
    """What an obstacle left behind: nothing that works on it is judged, until an activation makes spikes again."""


def _one_current(x: Any) -> Any:
    return dense(x) if isinstance(x, Joined) else x


class _Size:
    """A size that is not a number here: that of the batch, or any while the shape of the images is not known."""

    def _with(self, other: Any) -> _Size:
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __floordiv__ = __mod__ = _with
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _with  # type: ignore[assignment] # asserted: who knows
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return "N"


def _whole(sizes: Sequence[Any]) -> bool:
    """Whether all sizes are numbers."""
    return all(isinstance(size, int) for size in sizes)


def _is_rest(size: Any) -> bool:
    """Whether a size of a reshape is -1, what is left."""
    return isinstance(size, int) and size == -1


def _shown(shape: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _float64(x: Tensor | None, default: Tensor) -> Tensor:
    """A parameter of the model in the arithmetic of conversion, or its default where the layer has none."""
    return default if x is None else x.detach().to("cpu", torch.float64)


def _zeros(channels: int) -> Tensor:
    return torch.zeros(channels, dtype=torch.float64)


def _pair(x: Any) -> tuple[int, int]:
    return (int(x), int(x)) if isinstance(x, int) else (int(x[0]), int(x[1]))


class Lowering:
    """One pass over the graph. `shapes` maps nodes to the shapes of their values without the batch, if known."""

    def __init__(self, gm: fx.GraphModule, shapes: Shapes | None) -> None:
        self.gm = gm
        self.shapes = shapes
        self.needs_shapes = False
        self.sites = {node: (name, module) for name, node, module in call_sites(gm)}
        self.values: dict[fx.Node, Any] = {}
        self.node: fx.Node  # the one being executed
        self.result = Lowered(Image((), (), ()))
        self.image: Image | None = None

    def fail(self, why: str) -> ConversionError:
        return ConversionError(f"{describe(self.node)}: {why}")

    def run(self) -> Lowered:
        refuse_hooks(self.gm, "the model itself")
        obstacles: list[ConversionError] = []
        for node in self.gm.graph.nodes:
            self.node = node
            try:
                if node.op == "call_module":
                    refuse_hooks(self.gm.get_submodule(str(node.target)), str(node.target))
                self.values[node] = self._execute(node)
            except ShapeNeededError:
                raise
            except ConversionError as error:
                obstacles.append(error)
                self.values[node] = _Unknown()
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
            return is_qcfs(m) or isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, *_PASSING_MODULES))
        return FUNCTIONS.get(node.target, METHODS.get(str(node.target))) in _OF_JOINED

    def _get(self, x: Any) -> Any:
        return fx.node.map_arg(x, lambda n: self.values[n])

    def _is_constant(self, x: Any) -> bool:
        """Whether a value depends on parameters alone, not on the image."""
        if isinstance(x, (tuple, list)):
            return all(map(self._is_constant, x))
        if isinstance(x, dict):
            return all(map(self._is_constant, x.values()))
        return not isinstance(x, (Image, Signal, Current, Joined, Grouped, Answer, _Unknown))

    def _is_unknown(self, x: Any) -> bool:
        values = x.values() if isinstance(x, dict) else x
        return any(map(self._is_unknown, values)) if isinstance(x, (tuple, list, dict)) else isinstance(x, _Unknown)

    def _execute(self, node: fx.Node) -> Any:
        args, kwargs = self._get(node.args), self._get(node.kwargs)
        if not self._takes_joined(node):
            args, kwargs = (fx.node.map_aggregate(v, _one_current) for v in (args, kwargs))
        if node.op == "placeholder":
            if any(isinstance(v, Image) for v in self.values.values()):
                if node.args:  # a further argument with a default
                    return node.args[0]
                raise self.fail("a network with several inputs is not supported; convert the part behind one input")
            return Image((), (), ())
        unknown = self._is_unknown(args) or self._is_unknown(tuple(kwargs.values()))
        if node.op == "output":
            return None if unknown else self._output(args[0])
        if node.op == "get_attr":
            value: Any = self.gm
            for name in str(node.target).split("."):
                value = getattr(value, name)
            return value
        step = tail_step(self.gm, node)
        if step is not None and not unknown and not (self._is_constant(args) and self._is_constant(kwargs)):
            return self._tail(args[0] if args else kwargs["input"], *step)
        resizes = node.target is F.interpolate or (
            node.op == "call_module" and isinstance(self.gm.get_submodule(str(node.target)), nn.Upsample)
        )
        for value in () if resizes else (*args, *kwargs.values()):
            if isinstance(value, Answer):
                raise self._not_the_end(value)
        if relu_ceiling(self.gm, node) is not None:
            raise self.fail(_NO_THRESHOLD)
        if node.op == "call_module":
            m = self.gm.get_submodule(str(node.target))
            if unknown and (step is not None or is_qcfs(m) or isinstance(m, _KNOWN_MODULES)):
                return self._fired_unknown(m)
            return self._module(m, args, kwargs)
        if self._is_constant(args) and self._is_constant(kwargs) and "call_" in node.op and node.all_input_nodes:
            try:
                with torch.no_grad():
                    if callable(node.target):
                        return node.target(*args, **kwargs)
                    return getattr(args[0], node.target)(*args[1:], **kwargs)
            except Exception as error:  # whatever a function raises on a size that is not known
                raise self.fail(f"cannot be computed without an image ({error})") from error
        handler = FUNCTIONS.get(node.target) if node.op == "call_function" else METHODS.get(str(node.target))
        if handler is None and getattr(node.target, "__name__", "") == "stochastic_depth":
            handler = Lowering.stochastic_depth
        if handler is None and not (unknown and step is not None):
            raise self.fail(
                "has no spiking counterpart. Supported: convolution, linear, BatchNorm, dropout, pooling, flatten, "
                "add, concat and QCFS. Remedy: replace it, or convert only the part of the model without it"
            )
        if handler is None or (unknown and handler not in _OF_ANYTHING):
            return _Unknown()
        try:
            return handler(self, *args, **kwargs)
        except TypeError as error:
            raise self.fail(f"is called in a way that is not known here ({error})") from error

    def _not_the_end(self, value: Answer) -> ConversionError:
        """Why nothing may work on a tail."""
        name = value.steps[-1][0] if value.steps else "squeeze"
        more = "Gates, squeeze-and-excitation and attention cannot be converted"
        if name == "resize":
            more = "Remedy: mode='nearest' by a whole factor, which spikes can do"
        return self.fail(
            f"works on the result of {name}, which no neuron computes: it may only stand at the end of a network. "
            + more
        )

    # ------------------------------------------------------------------------------------- modules

    def _module(self, m: nn.Module, args: tuple, kwargs: dict) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        if is_qcfs(m):
            return self.fire(x, m)
        if isinstance(m, nn.Conv2d):
            return self._conv_module(x, m)
        if isinstance(m, nn.ConvTranspose2d):
            given = args[1] if len(args) > 1 else kwargs.get("output_size")
            if given is not None:
                raise self.fail("is told its output size at the call. Remedy: output_padding")
            weight, bias = parameter(m, "weight"), parameter(m, "bias")
            return self.conv_transpose(x, weight, bias, m.stride, m.padding, m.output_padding, m.groups, m.dilation)
        if isinstance(m, (nn.ZeroPad2d, nn.ConstantPad2d)):
            return self.pad(x, m.padding, "constant", m.value)
        if isinstance(m, nn.Upsample):
            return self.upsample(x, m.size, m.scale_factor, m.mode, m.align_corners)
        if isinstance(m, nn.PixelShuffle):
            return self.pixel_shuffle(x, m.upscale_factor)
        if isinstance(m, nn.PixelUnshuffle):
            return self.pixel_unshuffle(x, m.downscale_factor)
        if isinstance(m, nn.Linear):
            return self.linear(x, parameter(m, "weight"), parameter(m, "bias"))
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            return self.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, eps=m.eps)
        if isinstance(m, _PASSING_MODULES):
            return x
        if is_normalize(m):
            return self.normalize(x, m.mean, m.std)
        if isinstance(m, nn.ChannelShuffle):
            return self.shuffle(x, m.groups)
        if isinstance(m, nn.Flatten):
            return self.flatten(x, m.start_dim, m.end_dim)
        if isinstance(m, nn.AvgPool2d):
            return self.avg_pool(
                x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
            )
        if isinstance(m, nn.AdaptiveAvgPool2d):
            return self.adaptive_pool(x, m.output_size)
        if isinstance(m, nn.MaxPool2d):
            return self.max_pool(x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices)
        raise self.fail(
            f"{type(m).__name__} has no spiking counterpart. Supported: Conv2d, Linear, BatchNorm, Dropout, Flatten, "
            "AvgPool2d, AdaptiveAvgPool2d, MaxPool2d and QCFS. Remedy: replace the module by one of these (an "
            "activation by ReLU before prepare)"
        )

    def _fired_unknown(self, m: nn.Module) -> Signal | _Unknown:
        """What a module makes of an unknown value: an activation's spikes are known again, if their shape is."""
        shape = (self.shapes or {}).get(self.node)
        if not is_qcfs(m) or shape is None:
            return _Unknown()
        return Signal((Part(str(self.node.target), torch.ones(shape[0], dtype=torch.float64)),), len(shape) == 1)

    def fire(self, x: Any, m: Any) -> Signal:
        name = self.sites[self.node][0]
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

    def _read_image(self, x: Image, channels: int | None) -> Signal:
        """The image as the one analog Part; all layers that read it must agree on its channels."""
        if x.batch_only:
            raise self.fail("reads a single channel taken out of the image; keep the channel dimension (x[:, i:i+1])")
        if not x.source:
            if channels is None:
                shape = (self.shapes or {}).get(self.node.all_input_nodes[0])
                self.needs_shapes |= shape is None
                channels = 1 if shape is None else shape[0]
            x = self._whole_image(x, channels)
        if self.image is not None and replace(self.image, vector=x.vector) != x:
            raise self.fail(
                "reads the image with another normalisation or channel order than the first layer; use one for all"
            )
        self.image = x
        return Signal((Part(INPUT, torch.ones(len(x.source), dtype=torch.float64)),), x.vector)

    @staticmethod
    def _whole_image(x: Image, channels: int) -> Image:
        """With its channels named, which before nothing has read: all are scaled alike."""
        if x.source:
            return x
        scale, shift = x.scale or (1.0,), x.shift or (0.0,)
        return replace(x, source=tuple(range(channels)), scale=scale * channels, shift=shift * channels)

    def _current(self, x: Any, channels: int | None, why_not: str) -> Current:
        """The value as what a neuron may integrate: spikes stand for the current that they are."""
        if isinstance(x, Image):
            x = self._read_image(x, channels)
        x = self._summand(x, why_not)
        if any(s.vector and s.index is not None for s in x.identities):
            raise self.fail("reorders or drops channels and flattens them, with no layer behind; put one there")
        return without_choices(x)

    def _summand(self, x: Any, why_not: str) -> Current:
        """The value as a current in which spikes are still what a layer may read."""
        if isinstance(x, Signal):
            return Current(_zeros(x.channels), (), (x,), x.vector)
        if not isinstance(x, Current):
            raise self.fail(why_not)
        return x

    def _sources(self, x: Any, what: str, channels: int, shifted: bool = False) -> list[Signal]:
        """The signals a linear operator may be applied to (a sum of signals, by linearity, one by one).

        `shifted`: the operator is one for their sum's bias too.
        """
        if isinstance(x, Image):
            return [self._read_image(x, channels)]
        if isinstance(x, Signal):
            return [x]
        if isinstance(x, Current) and not x.products:
            if shifted or not bool(x.bias.any()):
                return list(x.identities)
            raise self.fail(
                f"{what} of spikes to which a constant was added (by a BatchNorm, say), which its padding has not. "
                "Remedy: padding=0, or an activation in between"
            )
        raise self.fail(
            f"{what} of a value with no activation in between, so there are no spikes to work on. Remedy: put a ReLU "
            "(then QCFS) between the two layers, or merge them into one"
        )

    def _conv_module(self, x: Any, m: nn.Conv2d) -> Current:
        if m.padding_mode != "zeros":
            raise self.fail(f"padding_mode={m.padding_mode!r} is not supported; use zeros")
        weight, bias = parameter(m, "weight"), parameter(m, "bias")
        return self.conv(x, weight, bias, m.stride, m.padding, m.dilation, m.groups)

    def conv(
        self,
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Current:
        if not isinstance(weight, Tensor) or not isinstance(bias, Tensor | None):
            raise self.fail("is a convolution whose weights depend on the image, which has no spiking counterpart")
        weight = _float64(weight, _zeros(0))
        out, kernel, channels = weight.shape[0], _pair(weight.shape[2:]), weight.shape[1] * groups
        stride, dilation = _pair(stride), _pair(dilation)
        if isinstance(padding, str):
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
            if any(t % 2 for t in total):
                raise self.fail("padding='same' with an even kernel pads unevenly; use explicit padding")
            padding = (total[0] // 2, total[1] // 2)
        geometry = (*kernel, *stride, *_pair(padding), *dilation, groups)
        if isinstance(x, Current) and x.products and not x.vector and kernel == (1, 1) and _pair(padding) == (0, 0):
            if x.channels != channels:
                raise self.fail(f"expects {channels} channels, gets {x.channels}")
            return composed(
                x, ungrouped(weight, groups)[:, :, 0, 0], _float64(bias, _zeros(out)), stride, self._layer()
            )
        products = []
        unpadded = _pair(padding) == (0, 0)
        out_bias = _float64(bias, _zeros(out))
        for signal in self._sources(x, "is a convolution", channels, unpadded):
            if signal.vector:
                raise self.fail("is a convolution of a flattened value")
            if signal.channels != channels:
                raise self.fail(f"expects {channels} channels, gets {signal.channels}")
            products += [
                Product(part, w, (*geometry[:8], own), False, self._layer())
                for part, w, own in dealt(weight, groups, signal)
            ]
        if isinstance(x, Current) and unpadded:
            out_bias = out_bias + ungrouped(weight, groups).sum((2, 3)) @ x.bias
        return Current(out_bias, tuple(products))

    def _layer(self) -> str:
        """The name of the layer that this node is, for reports."""
        return str(self.node.target) if self.node.op == "call_module" else describe(self.node)

    def _shape_needed(self, why: str) -> ShapeNeededError:
        return ShapeNeededError(
            f"{describe(self.node)}: {why}; give convert(..., input_shape=(C, H, W)), or run the prepared model on "
            "an image"
        )

    def linear(self, x: Any, weight: Any, bias: Any = None) -> Current:
        if not isinstance(weight, Tensor) or not isinstance(bias, Tensor | None):
            raise self.fail("is a linear layer whose weights depend on the image, which has no spiking counterpart")
        weight = _float64(weight, _zeros(0))
        out, features = weight.shape
        if isinstance(x, Image) and x.map:  # one window as large as the image
            if features != math.prod(x.map):
                raise self.fail(f"expects {features} features, gets images of {math.prod(x.map)}")
            return replace(self.conv(replace(x, map=()), weight.reshape(out, *x.map), bias), vector=True)
        if isinstance(x, Current) and x.products and x.vector:
            if x.channels != features:
                raise self.fail(f"expects {features} features, gets {x.channels}")
            return composed(x, weight, _float64(bias, _zeros(out)), (1, 1), self._layer())
        products = []
        for signal in self._sources(
            replace(x, vector=True) if isinstance(x, Image) else x, "is a linear layer", features, True
        ):
            if not signal.vector:
                raise self.fail("is a linear layer on a feature map; flatten it first")
            if features % signal.channels:
                raise self.fail(f"expects {features} features, gets a multiple of {signal.channels}")
            # The model flattens maps with the channel first, spikes are stored with it last: the weight becomes
            # [O, C, pixels, 1], a kernel as high as the map has pixels, and _fold moves the channel behind them.
            area = features // signal.channels
            geometry = (area, 1, 1, 1, 0, 0, 1, 1, 1)
            blocks = dealt(weight.reshape(out, signal.channels, area, 1), 1, signal)
            products += [Product(part, block, geometry, True, self._layer()) for part, block, _ in blocks]
        out_bias = _float64(bias, _zeros(out))
        if isinstance(x, Current):
            out_bias = out_bias + weight.reshape(out, x.channels, -1).sum(2) @ x.bias
        return Current(out_bias, tuple(products), (), True)

    def batch_norm(
        self,
        x: Any,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Current | Joined:
        if running_mean is None or running_var is None or training:
            raise self.fail("BatchNorm without running statistics cannot be folded; use track_running_stats=True")
        mean, var = running_mean.to("cpu", torch.float64), running_var.to("cpu", torch.float64)
        gamma, beta = _float64(weight, torch.ones_like(mean)), _float64(bias, torch.zeros_like(mean))
        scale = gamma / torch.sqrt(var + eps)
        if not bool(torch.isfinite(scale).all()):
            raise self.fail("BatchNorm statistics are not finite; train or reset them")
        why_not = "BatchNorm of a value it does not fit"
        current = x if isinstance(x, Joined) else self._current(x, mean.numel(), why_not)
        if current.channels != mean.numel():
            raise self.fail(why_not)
        return affine(current, scale, beta - mean * scale)

    # ------------------------------------------------------------------------------------- pooling

    def _pooled(self, x: Any, spec: PoolSpec) -> Signal | Current:
        if isinstance(x, Image):
            raise self.fail("pools the image itself; resize images before they enter the network")
        if isinstance(x, Current) and x.products and not spec.pads:
            # Averaging commutes with a pointwise convolution.
            pointwise = all(p.geometry == POINTWISE and not p.part.is_image for p in x.products)
            if pointwise and not x.vector and spec.kind == "avg":
                products = tuple(replace(p, part=self._pooled_part(p.part, spec)) for p in x.products)
                identities = tuple(
                    replace(s, parts=tuple(self._pooled_part(p, spec) for p in s.parts)) for s in x.identities
                )
                return replace(x, products=products, identities=identities)
        signals = self._sources(x, "is pooling", 1)
        if any(s.vector for s in signals):
            raise self.fail("pools a flattened value")
        if spec.kind == "max" and (
            isinstance(x, Current) or any(q.kind == "avg" for s in signals for p in s.parts for q in p.pools)
        ):
            raise self.fail("max pooling works on spikes only; use prepare(model, max_pool='avg')")
        if spec.kind == "max" and any(bool((p.amplitude < 0).any()) for s in signals for p in s.parts):
            raise self.fail("takes the maximum of spikes times a negative factor. Remedy: pool first, then scale")
        out = [replace(s, parts=tuple(self._pooled_part(p, spec) for p in s.parts)) for s in signals]
        if isinstance(x, Signal):
            return out[0]
        return replace(x, identities=tuple(out))

    def _pooled_part(self, part: Part, spec: PoolSpec) -> Part:
        shape = (self.shapes or {}).get(self.node.all_input_nodes[0])
        return replace(part, pools=(*part.pools, replace(spec, size=None if shape is None else (shape[-2], shape[-1]))))

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
        kernel = _pair(kernel_size)
        spec = PoolSpec(
            "avg",
            kernel,
            _pair(stride) if stride else kernel,
            _pair(padding),
            bool(ceil_mode),
            bool(count_include_pad),
            divisor_override,
        )
        return self._pooled(x, spec)

    def adaptive_pool(self, x: Any, output_size: Any) -> Signal | Current:
        if isinstance(output_size, (tuple, list)):
            out = tuple(None if o is None else int(o) for o in output_size)
        else:
            out = (int(output_size), int(output_size))
        return self._pooled(x, PoolSpec("avg", output=(out[0], out[1])))

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
        if return_indices or _pair(dilation) != (1, 1):
            raise self.fail("max pooling with dilation or indices is not supported")
        kernel = _pair(kernel_size)
        return self._pooled(
            x, PoolSpec("max", kernel, _pair(stride) if stride else kernel, _pair(padding), bool(ceil_mode))
        )

    # ------------------------------------------------------- pixels moved: windows of one pixel or none

    def _moved(self, x: Any, spec: PoolSpec, zeros: bool = False) -> Signal | Current:
        """A value whose pixels go where the windows of `spec` say; `zeros`: some places get none."""
        if isinstance(x, Image):
            raise self.fail("moves pixels of the image itself. Remedy: pad, crop or resize images before")

        def placed(signals: Sequence[Signal]) -> tuple[Signal, ...]:
            return tuple(replace(s, parts=tuple(map(part, s.parts))) for s in signals)

        def part(p: Part) -> Part:
            # Masks stay masks, but where spikes have signs a window of none would be a negative spike.
            counts = zeros or any(q.kind == "avg" for q in p.pools)
            return replace(p, pools=(*p.pools, replace(spec, kind="avg" if counts else "max", divisor_override=1)))

        if isinstance(x, Current) and x.products:
            pointwise = all(p.geometry == POINTWISE and not p.part.is_image for p in x.products)
            if pointwise and not x.vector and not (zeros and bool(x.bias.any())):
                products = tuple(replace(p, part=part(p.part)) for p in x.products)
                return replace(x, products=products, identities=placed(x.identities))
        signals = self._sources(x, "moves pixels", 1, shifted=not zeros)
        if any(s.vector for s in signals):
            raise self.fail("moves pixels of a flattened value")
        return placed(signals)[0] if isinstance(x, Signal) else replace(x, identities=placed(signals))

    def pad(self, x: Any, pad: Sequence[Any], mode: str = "constant", value: Any = None) -> Any:
        if mode != "constant" or value not in (None, 0):
            raise self.fail("pads with something else than zeros, which is no spike. Remedy: pad with zeros")
        if not _whole(pad):
            raise self._shape_needed("pads by a size that is not known")
        if len(pad) > 6 and any(pad[6:]):
            raise self.fail("pads the batch")
        left, right, top, bottom, first, last = [*pad, 0, 0, 0, 0, 0, 0][:6]
        rows, cols = (top, bottom), (left, right)
        border = (max(0, *rows), max(0, *cols))
        if border != (0, 0):
            x = self._moved(x, PoolSpec("avg", (1, 1), padding=border), zeros=True)
        extra = [(border[0] - top, border[0] - bottom), (border[1] - left, border[1] - right)]
        if extra != [(0, 0), (0, 0)]:
            x = self._moved(x, PoolSpec.cropped(*extra))
        if first < 0 or last < 0:
            channels = self._channels(x)
            x = self._selected(x, range(max(0, -first), channels - max(0, -last)))
        if first > 0 or last > 0:  # as in the shortcuts of ResNets for CIFAR
            current = self._current(x, None, "pads the channels of what is not a layer's output")
            rows_of = F.pad(torch.eye(current.channels, dtype=torch.float64), (0, 0, max(0, first), max(0, last)))
            x = composed(current, rows_of, _zeros(len(rows_of)), (1, 1), "channels")
        return x

    def _sliced(self, x: Any, rows: slice, cols: slice) -> Any:
        """x[:, :, rows, cols]."""
        crops, strides = [], []
        for s, size in zip((rows, cols), self._shape(x)[2:], strict=True):
            start, stop, step = s.start or 0, s.stop, s.step or 1
            if not _whole([start, step, stop or 0]):
                raise self._shape_needed("cuts pixels at a size that is not known")
            if isinstance(size, int):
                start, stop = start + size * (start < 0), None if stop == size else stop
            if start < 0 or (stop is not None and stop >= 0):
                raise self.fail(
                    "cuts pixels at a place counted from the other border, which is another one in images of another "
                    "size. Remedy: count from the same border (x[:, :, 1:-1])"
                )
            crops.append((start, -(stop or 0)))
            strides.append(step)
        if crops == [(0, 0), (0, 0)] and strides == [1, 1]:
            return x
        return self._moved(x, PoolSpec.cropped(crops[0], crops[1], (strides[0], strides[1])))

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
        everywhere = self._shape(x)[2:] == (1, 1)  # one pixel goes everywhere
        if isinstance(x, Answer) or (mode in ("bilinear", "bicubic") and not antialias and not everywhere):
            return self._resized(x, mode, size, scale_factor, align_corners)
        mode = "nearest" if everywhere else mode
        factors: list[Any] = []
        if scale_factor is not None:
            factors = list(scale_factor) if isinstance(scale_factor, (tuple, list)) else [scale_factor] * 2
        elif any(isinstance(n, fx.Node) for n in self.node.all_input_nodes[1:]):
            own, wanted = self._shape(x)[2:], list(size) if isinstance(size, (tuple, list)) else [size] * 2
            if not _whole([*own, *wanted]):
                raise self._shape_needed("resizes to a size that is not known")
            factors = [w / n for w, n in zip(wanted, own, strict=True)]
        if mode not in ("nearest", "nearest-exact") or len(factors) != 2 or any(f < 1 or f != int(f) for f in factors):
            raise self.fail(
                f"resizes with mode={mode!r}, size={size} and scale_factor={scale_factor}. Between activations only "
                "nearest pixels by a whole factor are spikes again. Remedy: mode='nearest', scale_factor=2, say"
            )
        spread = (int(factors[0]), int(factors[1]))
        return x if spread == (1, 1) else self._moved(x, PoolSpec("max", (1, 1), spread=spread))

    def pixel_shuffle(self, x: Any, upscale_factor: int) -> Current:
        r, channels = int(upscale_factor), self._channels(x)
        if channels % (r * r):
            raise self.fail(f"shuffles {channels} channels into blocks of {r}x{r} pixels")
        found = []
        for i, j in itertools.product(range(r), repeat=2):  # each pixel of a block comes from channels of its own
            chosen = self._selected(x, range(i * r + j, channels, r * r))
            moved = self._moved(chosen, PoolSpec("avg", (1, 1), spread=(r, r), phase=(i, j)), zeros=True)
            found.append(moved if isinstance(moved, Current) else Current(_zeros(moved.channels), (), (moved,)))
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
        if not isinstance(weight, Tensor):
            raise self.fail("is a convolution whose weights depend on the image, which has no spiking counterpart")
        weight = _float64(weight, _zeros(0))
        stride, padding, dilation, more = (_pair(v) for v in (stride, padding, dilation, output_padding))
        border = tuple(d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True))
        extra = tuple(s - 1 - m for s, m in zip(stride, more, strict=True))
        if min(*border, *extra) < 0:
            raise self.fail("is a transposed convolution that cuts off more than its kernel adds. Remedy: less padding")
        if stride != (1, 1):
            x = self._moved(x, PoolSpec("avg", (1, 1), spread=stride, phase=(0, 0)), zeros=True)
        if extra != (0, 0):
            x = self._moved(x, PoolSpec.cropped((0, extra[0]), (0, extra[1])))
        turned = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(-2, -1)
        return self.conv(x, turned, bias, 1, border, dilation, groups)

    # ---------------------------------------------------------------------------------- arithmetic

    def flatten(self, x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
        if isinstance(x, Grouped):
            table, last = x.index, end_dim % (x.index.dim() + 3)
            if 1 <= start_dim <= last <= table.dim():
                table = table.flatten(start_dim - 1, last - 1)
                return replace(x, index=table) if table.dim() > 1 else self._selected(x.value, table.tolist())
            x = self._selected(x.value, table.flatten().tolist())
            end_dim = -1 if last == table.dim() + 2 else 0
        if start_dim != 1 or end_dim not in (-1, 3):
            raise self.fail("flattens other dimensions than all after the batch; use flatten(x, 1)")
        if isinstance(x, Current):
            flat = tuple(replace(s, vector=True) for s in x.identities) if not x.products else x.identities
            return x if x.vector else replace(x, flattened=True, identities=flat)
        if isinstance(x, Image):
            if self.shapes is None:
                raise self._shape_needed("flattens the image, whose shape is not known")
            return replace(x, map=self.shapes[self.node.all_input_nodes[0]])
        return replace(x, vector=True)

    def view(self, x: Any, *shape: Any) -> Any:
        """Only [N, features] and [N, C, H, W] as they are: what mixes samples or pixels has no spiking counterpart."""
        asked = list(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)) else shape)
        if len(asked) == 2 and not _is_rest(asked[0]) and _is_rest(asked[1]):
            return self.flatten(x, 1)
        own = self._shape(x)
        if isinstance(x, Grouped) or len(asked) > 4:
            return self._regrouped(x, own, asked)
        if len(asked) in (2, len(own)) and not _whole(own[1:]):
            raise self._shape_needed("reshapes a value whose shape is not known")
        if len(asked) == 2 and _whole(asked[1:]) and asked[1] in (math.prod(own[1:]), -1):
            return self.flatten(x, 1)
        if _whole(asked[1:]) and asked[1:] == list(own[1:]):
            return x
        raise self.fail(
            f"reshapes {_shown(own)} to {_shown(asked)}; only flattening to [N, features] is supported. Remedy: "
            "flatten(x, 1), or keep the shape"
        )

    # Channel shuffle: [N, C, H, W] -> [N, g, C / g, H, W] -> transposed -> [N, C, H, W].

    def _regrouped(self, x: Any, own: Sequence[Any], asked: list[Any]) -> Any:
        """A reshape that takes the channels apart, or puts them together again."""
        if not _whole([*own[1:], *asked[1:]]):
            raise self._shape_needed("reshapes a value whose shape is not known")
        rest = math.prod(own[1:]) // max(1, -math.prod(asked[1:]))
        sizes = [rest if size == -1 else size for size in asked[1:]]
        if not isinstance(x, Image | Signal | Current | Grouped) or sizes[-2:] != list(own[-2:]) or len(sizes) < 3:
            raise self.fail(f"reshapes {_shown(own)} to {_shown(asked)}; only channels may be taken apart")
        if isinstance(x, Image):
            x = self._selected(x, range(own[1]))
        table = x if isinstance(x, Grouped) else Grouped(x, torch.arange(own[1]))
        if math.prod(sizes[:-2]) != table.index.numel():
            raise self.fail(f"reshapes {_shown(own)} to {_shown(asked)}, which moves samples into channels")
        index = table.index.reshape(sizes[:-2])
        return Grouped(table.value, index) if index.dim() > 1 else self._selected(table.value, index.tolist())

    def permute(self, x: Any, *dims: Any) -> Any:
        order = list(dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims)
        rank = len(self._shape(x))
        if not isinstance(x, Grouped) or sorted(d % rank for d in order) != list(range(rank)):
            raise self.fail("permutes dimensions, which has no spiking counterpart unless it shuffles channels")
        order = [d % rank for d in order]
        if order[0] != 0 or order[-2:] != [rank - 2, rank - 1]:
            raise self.fail("permutes the batch or pixels, which has no spiking counterpart; only channels may move")
        return replace(x, index=x.index.permute([d - 1 for d in order[1:-2]]))

    def transpose(self, x: Any, dim0: int, dim1: int) -> Any:
        order = list(range(len(self._shape(x))))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        return self.permute(x, order)

    def shuffle(self, x: Any, groups: int) -> Any:
        channels = self._channels(x)
        if channels % groups:
            raise self.fail(f"shuffles {channels} channels in {groups} groups")
        return self._selected(x, torch.arange(channels).reshape(groups, -1).t().flatten().tolist())

    def _channels(self, x: Any) -> int:
        if isinstance(x, Image) and not x.source:
            known = self._shape(x)[1]
            if not isinstance(known, int):
                raise self._shape_needed("takes channels of the image, whose shape is not known")
            return known
        if not isinstance(x, Image | Signal | Current):
            raise self.fail("takes parts of what is no map of spikes or of currents")
        return len(x.source) if isinstance(x, Image) else x.channels

    def _selected(self, x: Any, index: Sequence[int]) -> Any:
        """Some channels of a value."""
        if isinstance(x, Image) and not x.batch_only and not x.vector and not x.map:
            n = self._channels(x)
            whole = self._whole_image(x, n)
            source = tuple(whole.source[i] for i in index)
            scale, shift = (tuple(v[i] for i in index) for v in (whole.scale, whole.shift))
            return replace(x, source=source, scale=scale, shift=shift, width=max(x.width, n))
        if not isinstance(x, Signal | Current) or x.vector or getattr(x, "flattened", False):
            raise self.fail(
                "takes parts of a flattened value, which has no spiking counterpart; take channels of a map"
            )
        if not index:
            raise self.fail("takes no channels at all")
        return selected(x, index)

    def chunk(self, x: Any, chunks: int, dim: int = 0) -> Any:
        return self.split(x, -(-self._channels(x) // chunks), dim)

    def split(self, x: Any, split_size_or_sections: Any, dim: int = 0) -> Any:
        if dim not in (1, -3):
            raise self.fail("cuts another dimension than the channels, which has no spiking counterpart")
        channels = range(self._channels(x))
        sizes: Any = split_size_or_sections
        if isinstance(sizes, int):
            sizes = [len(channels[i : i + sizes]) for i in channels[::sizes]]
        if sum(sizes) != len(channels):
            raise self.fail(f"cuts {len(channels)} channels into {list(sizes)}")
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return tuple(self._selected(x, channels[a : a + n]) for a, n in zip(starts, sizes, strict=True))

    def index_select(self, x: Any, dim: int, index: Any) -> Any:
        return self._indexed(x, index if dim in (1, -3) else None)

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

    def _shape(self, x: Any) -> tuple[Any, ...]:
        """The shape of a value: the batch is a _Size, and so is what is not known yet."""
        known = (self.shapes or {}).get(self.node.all_input_nodes[0]) if self.node.all_input_nodes else None
        if known is not None:
            return (_Size(), *known)
        vector = getattr(x, "vector", False) or getattr(x, "flattened", False)
        return (_Size(), _Size()) if vector else (_Size(), *([_Size()] * 3))

    def size(self, x: Any, dim: int | None = None) -> Any:
        return self._shape(x) if dim is None else self._shape(x)[dim]

    def rank(self, x: Any) -> int:
        return len(self._shape(x))

    def getattr(self, x: Any, name: str) -> Any:
        if name == "shape":
            return self._shape(x)
        if name == "ndim":
            return self.rank(x)
        raise self.fail(f"reads attribute {name!r} of a tensor, which has no spiking counterpart")

    def getitem(self, x: Any, index: Any) -> Any:
        if isinstance(x, (tuple, list)):
            return x[index]
        if isinstance(x, Image) and not x.source and isinstance(index, tuple) and len(index) == 2:
            everything, channel = index
            if everything == slice(None) and isinstance(channel, int):
                return Image((channel,), x.scale or (1.0,), x.shift or (0.0,), batch_only=True)
        if isinstance(index, tuple) and isinstance(x, Image | Signal | Current):
            if Ellipsis in index:
                at = index.index(Ellipsis)
                index = (*index[:at], *[slice(None)] * (5 - len(index)), *index[at + 1 :])
            index = (*index, *[slice(None)] * (4 - len(index)))
            batch, channels, *pixels = index
            if batch == slice(None) and len(pixels) == 2 and all(isinstance(p, slice) for p in pixels):
                x = x if channels == slice(None) else self._indexed(x, channels)
                return x if pixels == [slice(None)] * 2 else self._sliced(x, *pixels)
        raise self.fail("indexes a tensor, which has no spiking counterpart unless it takes channels of a map")

    def unsqueeze(self, x: Any, dim: int) -> Any:
        if isinstance(x, Image) and x.batch_only and dim == 1:
            return replace(x, batch_only=False)
        raise self.fail("adds a dimension, which has no spiking counterpart")

    # A constant is a number, or a tensor with one for each channel: parameters, buffers and what is computed of them.

    def add(self, x: Any, y: Any, alpha: Any = 1) -> Any:
        if self._is_constant(x):
            return self._affine(self.scale(y, alpha), 1.0, x)
        if self._is_constant(y):
            return self._affine(x, 1.0, y * alpha)
        y = y if isinstance(alpha, (int, float)) and alpha == 1 else self.scale(y, alpha)
        a, b = (
            self._summand(self._read_image(v, None) if isinstance(v, Image) else v, "adds what is no layer's output")
            for v in (x, y)
        )
        if a.channels != b.channels or a.vector != b.vector:
            raise self.fail(f"adds values of {a.channels} and {b.channels} channels; broadcasting is not supported")
        return Current(
            a.bias + b.bias, a.products + b.products, a.identities + b.identities, a.vector, a.flattened or b.flattened
        )

    def subtract(self, x: Any, y: Any, alpha: Any = 1) -> Any:
        return self.add(x, y, -alpha)

    def negate(self, x: Any) -> Any:
        return self.scale(x, -1)

    def scale(self, x: Any, factor: Any) -> Any:
        if self._is_constant(x):
            x, factor = factor, x
        if not self._is_constant(factor):
            raise self.fail(
                "multiplies two activations, which has no spiking counterpart (attention and "
                "squeeze-and-excitation cannot be converted)"
            )
        return self._affine(x, factor, 0.0)

    def divide(self, x: Any, factor: Any) -> Any:
        if not self._is_constant(factor):
            raise self.fail("divides by an activation, which has no spiking counterpart")
        if isinstance(factor, (int, float, Tensor)):
            factor = torch.as_tensor(factor).detach().to("cpu", torch.float64).reciprocal()
        return self._affine(x, factor, 0.0)

    def normalize(self, x: Any, mean: Any, std: Any) -> Any:
        """(x - mean) / std, lists with a number for each channel."""
        mean, std = (torch.tensor(v, dtype=torch.float64).reshape(-1, 1, 1) for v in (mean, std))
        return self.divide(self.subtract(x, mean), std)

    def _affine(self, x: Any, scale: Any, shift: Any) -> Any:
        """x * scale + shift."""
        if isinstance(x, _Unknown):
            return x
        scale, shift = self._by_channel(x, scale), self._by_channel(x, shift)
        if isinstance(x, Image):
            n = max(len(x.scale), scale.numel(), shift.numel())
            x = self._whole_image(x, n) if n > 1 else x
            first, before = (torch.tensor(v or (d,), dtype=torch.float64) for v, d in ((x.scale, 1.0), (x.shift, 0.0)))
            after = ((first * scale).expand(n), (before * scale + shift).expand(n))
            return replace(x, scale=tuple(after[0].tolist()), shift=tuple(after[1].tolist()))
        if isinstance(x, Signal):
            if not bool(shift.any()) and (x.index is None or scale.numel() == 1):
                return scaled(x, scale.expand(x.width))
            x = self._current(x, None, "")
        return affine(x, scale.expand(x.channels), shift.expand(x.channels))

    def _by_channel(self, x: Any, value: Any) -> Tensor:
        """A constant as float64 [1] or [channels of x]."""
        if isinstance(value, _Size):
            raise self._shape_needed("computes with a size that is not known")
        if not isinstance(value, (int, float, Tensor)):
            raise self.fail("computes with a constant that is neither a number nor a tensor")
        t = torch.as_tensor(value).detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(t).all()):
            raise self.fail("computes with a constant that is not finite")
        if t.numel() == 1 or not isinstance(x, Image | Signal | Current | Joined):
            return t.reshape(-1)
        rank = 2 if x.vector or getattr(x, "flattened", False) else 4
        shape = (*([1] * (rank - t.dim())), *t.shape)
        channels = (len(x.source) if isinstance(x, Image) else x.channels) or t.numel()
        if len(shape) != rank or shape[1] != channels or t.numel() != channels:
            raise self.fail(
                f"computes with a constant of shape {list(t.shape)}, which differs between pixels or does not fit "
                f"{channels} channels. Remedy: one number, or one for each channel ([{channels}, 1, 1] for maps)"
            )
        return t.reshape(-1)

    def concat(self, tensors: Sequence[Any], dim: int = 0, **kwargs: Any) -> Any:
        dim = kwargs.get("axis", dim)
        if all(isinstance(t, Image) for t in tensors) and dim == 1:
            tensors = [self._whole_image(t, self._channels(t)) for t in tensors]
            return Image(
                sum((t.source for t in tensors), ()),
                sum((t.scale for t in tensors), ()),
                sum((t.shift for t in tensors), ()),
                width=max(t.width for t in tensors),
            )
        if dim not in (1, -3) or not all(isinstance(t, Signal | Current | Joined) for t in tensors):
            raise self.fail("concatenates the image with layers, or values not along the channels")
        if any(isinstance(t, Current | Joined) for t in tensors):
            if any(t.vector or getattr(t, "flattened", False) for t in tensors):
                raise self.fail("concatenates flattened values with no activation in between. Remedy: put one before")
            return joined([t if isinstance(t, Joined) else self._current(t, None, "") for t in tensors])
        if len({t.vector for t in tensors}) != 1:
            raise self.fail("concatenates feature maps and flattened values")
        return concatenated(tensors)

    def mean(self, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
        dims = tuple(dim) if isinstance(dim, (tuple, list)) else (dim,)
        if sorted(d % 4 if isinstance(d, int) else -1 for d in dims) != [2, 3]:
            raise self.fail("takes a mean over other dimensions than height and width")
        pooled = self.adaptive_pool(x, 1)
        return pooled if keepdim else self.flatten(pooled, 1)

    def keep(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x

    def dropout(self, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        return x

    def stochastic_depth(self, x: Any, p: float, mode: str, training: bool = True) -> Any:
        return x

    def _tail(self, x: Any, name: str, dim: Any) -> Answer:
        """A step of the tail; its dimension is counted from the batch."""
        if isinstance(x, Answer):
            answer = x
        else:
            current = self._answered(x)
            answer = Answer(current, 2 if current.vector or current.flattened else 4)
        if name in OF_NUMBERS:
            return replace(answer, steps=(*answer.steps, (name,)))
        if name != "squeeze" and dim is None:
            dim = 1  # as PyTorch takes it for [N, classes] and [N, C, H, W]
        if not isinstance(dim, int) or not -answer.dims < dim < answer.dims or dim == 0:
            raise self.fail(
                f"{name} over dimension {dim} takes in the batch, or several dimensions. Remedy: name one dimension "
                f"from 1 to {answer.dims - 1}"
            )
        dim %= answer.dims
        if name != "squeeze":
            return replace(answer, steps=(*answer.steps, (name, dim)))
        size = answer.current.channels if x is not answer and dim == 1 and answer.current.vector else None
        size = self._shape(x)[dim] if size is None else size
        if not isinstance(size, int):
            raise self._shape_needed("squeezes a dimension whose size is not known")
        return answer if size != 1 else Answer(answer.current, answer.dims - 1, (*answer.steps, (name, dim)))

    def _answered(self, x: Any) -> Current:
        """The value as what a readout gives."""
        if isinstance(x, Signal) and (x.index is not None or len(x.parts) > 1) and not x.vector:
            choice = torch.eye(x.channels, dtype=torch.float64)
            x = composed(Current(_zeros(x.channels), (), (x,)), choice, _zeros(x.channels), (1, 1), "channels")
        if isinstance(x, Signal):
            x = replace(identity_current(replace(x, vector=False)), flattened=x.vector)
        if not isinstance(x, Current):
            raise self.fail("the model's output is not a layer's output")
        return without_choices(x)

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
        answer = x if isinstance(x, Answer) else None
        current = self._answered(x) if answer is None else answer.current
        self.result.outputs.append(answer or Answer(current, 2 if current.vector or current.flattened else 4))
        return len(self.result.outputs) - 1

    def _resized(self, x: Any, mode: str, size: Any, scale: Any, align_corners: Any) -> Answer:
        """A resize behind the last layer, of the mean over the steps: linear, but not behind a softmax."""
        if mode not in RESIZE_MODES:
            raise self.fail(f"resizes with mode={mode!r}. Remedy: one of {', '.join(RESIZE_MODES)}")
        answer = x if isinstance(x, Answer) else Answer(self._answered(x), 4)
        if any(name in OF_NUMBERS or name in ("softmax", "log_softmax") for name, *_ in answer.steps):
            raise self.fail("resizes behind a softmax or the like. Remedy: resize first")
        if answer.dims != 4:
            raise self.fail("resizes what is no map")
        if scale is not None:
            scale = [float(f) for f in (scale if isinstance(scale, (tuple, list)) else [scale] * 2)]
        elif any(isinstance(n, fx.Node) for n in self.node.all_input_nodes[1:]):
            image = next((s for n, s in (self.shapes or {}).items() if n.op == "placeholder"), None)
            sizes = list(size) if isinstance(size, (tuple, list)) else [size] * 2
            if image is None or not _whole(sizes):
                raise self._shape_needed("resizes to a size that is not known")
            if sizes != list(image[-2:]):
                raise self.fail("resizes to a size that is neither the image's nor a number. Remedy: scale_factor")
            size = "image"
        else:
            size = list(size) if isinstance(size, (tuple, list)) else [size] * 2
        how = {"mode": mode, "size": size, "scale": scale, "align_corners": align_corners}
        return replace(answer, steps=(*answer.steps, ("resize", how)))


Handler = Callable[..., Any]
FUNCTIONS: dict[Any, Handler] = {
    **dict.fromkeys(ADD_FUNCTIONS, Lowering.add),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, torch.subtract), Lowering.subtract),
    **dict.fromkeys((operator.neg, torch.neg, torch.negative), Lowering.negate),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, torch.multiply), Lowering.scale),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, torch.divide), Lowering.divide),
    torch.cat: Lowering.concat,
    torch.concat: Lowering.concat,
    torch.flatten: Lowering.flatten,
    torch.unsqueeze: Lowering.unsqueeze,
    torch.reshape: Lowering.view,
    torch.permute: Lowering.permute,
    torch.transpose: Lowering.transpose,
    torch.chunk: Lowering.chunk,
    torch.split: Lowering.split,
    torch.index_select: Lowering.index_select,
    torch.channel_shuffle: Lowering.shuffle,
    F.channel_shuffle: Lowering.shuffle,
    torch.mean: Lowering.mean,
    torch.conv2d: Lowering.conv,
    F.conv2d: Lowering.conv,
    F.linear: Lowering.linear,
    F.batch_norm: Lowering.batch_norm,
    F.dropout: Lowering.dropout,
    F.dropout1d: Lowering.dropout,
    F.dropout2d: Lowering.dropout,
    F.alpha_dropout: Lowering.dropout,
    F.feature_alpha_dropout: Lowering.dropout,
    F.avg_pool2d: Lowering.avg_pool,
    F.adaptive_avg_pool2d: Lowering.adaptive_pool,
    F.max_pool2d: Lowering.max_pool,
    torch.max_pool2d: Lowering.max_pool,
    F.pad: Lowering.pad,
    F.interpolate: Lowering.upsample,
    F.pixel_shuffle: Lowering.pixel_shuffle,
    F.pixel_unshuffle: Lowering.pixel_unshuffle,
    torch.conv_transpose2d: Lowering.conv_transpose,
    F.conv_transpose2d: Lowering.conv_transpose,
    operator.getitem: Lowering.getitem,
    getattr: Lowering.getattr,
}
METHODS: dict[str, Handler] = {
    "add": Lowering.add,
    "add_": Lowering.add,
    **dict.fromkeys(("sub", "sub_", "subtract"), Lowering.subtract),
    **dict.fromkeys(("neg", "neg_", "negative"), Lowering.negate),
    **dict.fromkeys(("mul", "mul_", "multiply"), Lowering.scale),
    **dict.fromkeys(("div", "div_", "divide"), Lowering.divide),
    "flatten": Lowering.flatten,
    "view": Lowering.view,
    "reshape": Lowering.view,
    "size": Lowering.size,
    "dim": Lowering.rank,
    "ndimension": Lowering.rank,
    "mean": Lowering.mean,
    "unsqueeze": Lowering.unsqueeze,
    "permute": Lowering.permute,
    "transpose": Lowering.transpose,
    "chunk": Lowering.chunk,
    "split": Lowering.split,
    "index_select": Lowering.index_select,
    "contiguous": Lowering.keep,
    "detach": Lowering.keep,
    "clone": Lowering.keep,
    "float": Lowering.keep,
}


_PASSING_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.Identity)
_KNOWN_MODULES = (
    *_PASSING_MODULES,
    nn.Conv2d,
    nn.Linear,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.Flatten,
    nn.ChannelShuffle,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.MaxPool2d,
    nn.ConvTranspose2d,
    nn.ConstantPad2d,
    nn.Upsample,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
)
# What takes currents side by side one by one.
_OF_JOINED = (
    *(Lowering.batch_norm, Lowering.concat, Lowering.scale, Lowering.divide, Lowering.negate),
    *(Lowering.keep, Lowering.dropout),
)
# What is looked at even where a value is unknown: sizes have an answer, a product of two values is an obstacle.
_OF_ANYTHING = (Lowering.size, Lowering.rank, Lowering.getattr, Lowering.scale, Lowering.divide)


def _all_of(obstacles: list[ConversionError]) -> ConversionError:
    """All that stands in the way, each reason once with its places."""
    places: dict[str, list[str]] = {}
    for error in obstacles:
        place, _, why = str(error).partition(": ")
        places.setdefault(why, []).append(place)
    lines = []
    for why, found in places.items():
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        lines.append(f"{', '.join(found[:3])}{more}: {why}")
    if len(lines) > 1:
        lines = [f"{len(obstacles)} obstacles", *(f"  {line}" for line in lines)]
    raised = ConversionError("\n".join(lines))
    raised.obstacles = tuple((why, tuple(found)) for why, found in places.items())
    return raised


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph and notes the shape of every tensor, without the batch."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.shapes: Shapes = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_normalize(self.fetch_attr(target)):  # which looks at values
            return args[0]
        return super().call_module(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(int(d) for d in value.shape[1:])
        return value


def _propagate_shapes(gm: fx.GraphModule, input_shape: Sequence[int]) -> Shapes:
    """Run the graph on a batch of 1 without values: a copy of it whose tensors are on the meta device."""
    with made_parameters_kept(gm), torch.no_grad():
        tensors = [*gm.parameters(), *gm.buffers()]
        own = {
            id(t): nn.Parameter(t.to("meta"), False) if isinstance(t, nn.Parameter) else t.to("meta") for t in tensors
        }
        recorder = _ShapeRecorder(copy.deepcopy(gm, own))
        with torch.device("meta"):
            recorder.run(torch.empty((1, *input_shape), dtype=tensors[0].dtype if tensors else None))
    by_name = {node.name: node for node in gm.graph.nodes}
    return {by_name[node.name]: shape for node, shape in recorder.shapes.items()}


def usable_shape(model: nn.Module, image: Image, known: Sequence[int] | None) -> tuple[int, ...] | None:
    """The shape of an image that the model runs on: the one given or last seen, or a small one; None: none found."""
    known = known or model.__dict__.get(LAST_SHAPE)
    if known is not None:
        return tuple(known)
    if image.vector:
        return (image.channels,)
    with evaluating(model):
        gm = symbolic_trace(model)
        for side in (32, 64, 224):
            with contextlib.suppress(Exception):  # whatever the model's own code raises
                _propagate_shapes(gm, (image.channels, side, side))
                return (image.channels, side, side)
    return None


def lower(model: nn.Module, input_shape: Sequence[int] | None = None) -> tuple[Lowered, tuple[int, ...] | None]:
    """Trace and lower a model; returns the layers and the image shape [C, H, W] they were settled for, if any.

    The shape matters only where a pool's divisor depends on it. It is the one given, or the one the
    prepared model last saw, or else a guess: the usual 224 pixels, then 32.
    """
    with evaluating(model):
        gm = symbolic_trace(model)
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
            guesses: list[tuple[int, ...]] = [(c, side, side) for c in channels for side in (224, 32)]
        else:
            guesses = [tuple(int(d) for d in known)]
        # With a shape: its sizes at every node are found by running the graph on fake tensors.
        error: Exception | None = None
        for shape in guesses:
            try:
                shapes = _propagate_shapes(gm, shape)
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
