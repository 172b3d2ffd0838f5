"""prepare: a ReLU network -> the same network with QCFS activations and average pooling, ready to train.

On request, other activations become QCFS as well, and gates are left out. A gate, as that of squeeze-and-excitation,
multiplies a map by factors that it makes of the map, and no spiking layer multiplies two activations. Networks for
integer hardware leave them out too: EfficientNet-Lite has no squeeze-and-excitation, and ReLU6 for SiLU
(tensorflow/tpu, models/official/efficientnet/lite, 2020); MobileNetV3's "minimalistic" form has neither
squeeze-and-excitation nor hard-swish (tensorflow/models, research/slim/nets/mobilenet); RegNetX is RegNetY without
squeeze-and-excitation (Radosavovic et al., Designing Network Design Spaces, CVPR 2020).
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..errors import ConversionError
from ..model.graph import REPLACEABLE, call_sites, layer_rank, owner_path, place_of, relu_ceiling
from ..model.hooks import made_parameters_kept, refuse_hooks
from ..model.qcfs import QCFS
from ..model.tracing import refuse_no_weights, refuse_other_trace, refuse_patched, symbolic_trace, unwrapped
from .lowering import lower
from .shapes import LAST_SHAPE
from .sizes import ShapeNeededError

MAX_POOL_CHOICES = ("avg", "keep")
_MAX_MODULES = (nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)
_MAX_FUNCTIONS = {F.max_pool1d, torch.max_pool1d, F.max_pool2d, torch.max_pool2d}
_ADAPTIVE_FUNCTIONS = {F.adaptive_max_pool1d, F.adaptive_max_pool2d}


def _remember_input_shape(module: Any, args: tuple[Any, ...]) -> None:
    """Forward pre-hook: convert later settles size-dependent pools for the images the network last saw."""
    if args and isinstance(args[0], Tensor) and not isinstance(args[0], fx.Proxy):
        module.__dict__[LAST_SHAPE] = tuple(args[0].shape[1:])  # whatever the names of submodules


def prepare(
    model: nn.Module,
    levels: int = 8,
    threshold: float = 8.0,
    max_pool: str = "avg",
    check: bool = True,
    replace: Collection[type[nn.Module]] = (),
) -> fx.GraphModule:
    """Copy a network, with every ReLU call its own QCFS and MaxPool replaced.

    Args:
        model: a network that torch.fx can trace (every torchvision classifier of the supported families). It is
            traced in eval mode: auxiliary training heads, as in GoogLeNet, are not part of the result.
        levels: L of each QCFS.
        threshold: initial theta of each QCFS (8.0 in the paper); calibrate() sets better ones.
        max_pool: "avg" replaces max pooling by average pooling of the same geometry, as the paper does, because
            the maximum does not commute with averaging over time; "keep" leaves it (then the SNN takes the
            maximum of the spikes of each step, and agrees with the ANN less).
        check: refuse a network that convert() could not convert (the error names the layer and a remedy), and one of
            which torch.fx traces something else than it computes on a random image.
        replace: classes of modules to be replaced. Activations, any of nn.SiLU, nn.Hardswish, nn.GELU, nn.LeakyReLU,
            nn.ELU, nn.Mish and nn.PReLU, become QCFS as ReLU does. Gates become nn.Identity: a gate is a module that
            returns x [N, C, H, W] times factors [N, C, 1, 1] that depend on x, such as
            torchvision.ops.SqueezeExcitation, and each is tried on random maps. The network then computes something
            else, and pretrained weights lose their accuracy: train it before it is converted.

    Returns:
        A torch.fx.GraphModule with the model's own submodule names, weights and training mode. A QCFS stands at
        the path of the ReLU it replaces; further calls of one module get _1, _2, ...; functional calls get
        "relu" under the module that makes them.

    Raises:
        ConversionError: the model cannot be traced, has a part without spiking meaning, calls an activation of
            `replace` as a function, or has a module of `replace` that is neither an activation nor a gate.
        TypeError, ValueError: an argument is not of the form or the choices above.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"prepare: expected a torch.nn.Module, got {type(model).__name__}")
    if max_pool not in MAX_POOL_CHOICES:
        raise ValueError(f"prepare: max_pool must be one of {', '.join(MAX_POOL_CHOICES)}, got {max_pool!r}")
    if isinstance(replace, Mapping | str) or not isinstance(replace, Collection):
        raise TypeError("prepare: replace must be a set of classes of modules, such as {nn.SiLU, nn.GELU}")
    if others := [c for c in replace if c not in REPLACEABLE and not _may_be_gate(c)]:
        names = ", ".join(f"nn.{c.__name__}" for c in REPLACEABLE)
        raise ValueError(f"prepare: replace takes {names}, and classes of gates, none of torch's; got {others[0]!r}")
    model = unwrapped(model)
    refuse_no_weights(model)
    with made_parameters_kept(model):
        own = copy.deepcopy(model)
    _substitute(own, replace)
    gm = symbolic_trace(own)
    refuse_patched(gm)
    different: ConversionError | None = None  # said behind what lowering finds, which is more precise
    if check and gm is not own:
        try:
            refuse_other_trace(own, gm)
        except ConversionError as error:
            different = error
    _refuse_functions(gm, replace)
    QCFS(levels, threshold)  # validates both before anything is changed
    taken = {name for name, _ in gm.named_modules()}
    _activate_first(gm)
    # Found before any is replaced: two calls of one module are two sites.
    ceilings = {node: c for node in gm.graph.nodes if (c := relu_ceiling(gm, node)) is not None}
    for node in list(gm.graph.nodes):
        if node in ceilings:
            qcfs = QCFS(levels, min(threshold, ceilings[node]))
            qcfs.ceiling = ceilings[node]
            _replace(gm, node, _site_path(gm, node, taken, "relu"), qcfs)
        elif max_pool == "avg" and node.op != "call_module" and node.target in ("amax", torch.amax):
            node.target = "mean" if node.op == "call_method" else torch.mean
        elif max_pool == "avg" and _is_max_pool(gm, node) and len(node.all_input_nodes) > 1:  # told the size of a map
            node.target = F.avg_pool1d if layer_rank(gm, node) == 1 else F.avg_pool2d
            node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("dilation", "return_indices")}
        elif max_pool == "avg" and (pool := _average_pool(gm, node)) is not None:
            _replace(gm, node, _site_path(gm, node, taken, "pool"), pool)
    gm.graph.lint()
    gm.delete_all_unused_submodules()
    gm.recompile()
    first = next(gm.parameters(), None)
    if first is not None:
        gm.to(first.device)
    gm.register_forward_pre_hook(_remember_input_shape)
    if check:
        with contextlib.suppress(ShapeNeededError):  # calibration or training will show the model an image
            lower(gm)
    if different is not None:
        raise different
    if not any(True for _ in call_sites(gm)):
        unlike = [(n, type(m).__name__) for n, m in gm.named_modules() if isinstance(m, tuple(REPLACEABLE))]
        also = "".join(f", or replace={{nn.{kind}}} ({n} is one)" for n, kind in unlike[:1])
        raise ConversionError(
            f"the model has no ReLU: nothing can become a spiking neuron. Remedy: use ReLU as its activation{also}"
        )
    return gm


def _substitute(model: nn.Module, kinds: Collection[type[nn.Module]]) -> None:
    """Put a ReLU, which becomes a QCFS as any other does, in the place of these activations, and nothing in gates'."""
    for path, parent in list(model.named_modules()):
        for name, m in list(parent._modules.items()):  # named_children leaves out a module's second place
            if m is None or type(m) not in kinds:
                continue
            place = f"{path}.{name}".lstrip(".")
            refuse_hooks(m, place)
            if type(m) not in REPLACEABLE and not _is_gate(m):
                raise ConversionError(
                    f"{place}: {type(m).__name__} is named in replace and is no gate. A gate returns its input "
                    "[N, C, H, W] times factors [N, C, 1, 1] that depend on it, and this module does not, for random "
                    "maps and weights. Remedy: leave it out of replace, and change the model there"
                )
            setattr(parent, name, nn.ReLU() if type(m) in REPLACEABLE else nn.Identity())


def _may_be_gate(kind: Any) -> bool:
    """Whether a class is not one of torch's own, which has layers and no gates."""
    return isinstance(kind, type) and issubclass(kind, nn.Module) and not kind.__module__.startswith("torch.")


def _is_gate(m: nn.Module) -> bool:
    """Whether a module returns x [N, C, H, W] times factors [N, C, 1, 1] that depend on x.

    Weights are random here, since with trained ones all images may have one factor. The channels that it takes are as
    many as one of its parameters has rows or columns, or any number.
    """
    g = torch.Generator().manual_seed(0)
    gate = copy.deepcopy(m).cpu().double().eval()
    for p in gate.parameters():
        nn.init.uniform_(p, -0.1, 0.1, generator=g)
    found: list[Tensor] = []
    for channels in {8, *(size for p in gate.parameters() for size in p.shape)}:
        x = torch.randn(4, channels, 1, 1, generator=g) + torch.randn(4, channels, 5, 7, generator=g).double()
        with contextlib.suppress(Exception), torch.no_grad():  # whatever it raises on maps of other channels
            y = gate(x.clone())
            found += [(y / x).flatten(2)] if y.shape == x.shape else []

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=1e-9, atol=0.0)

    return bool(found) and all(same(f, f[..., :1]) and not same(f, f[:1]) for f in found)


def _refuse_functions(gm: fx.GraphModule, kinds: Collection[type[nn.Module]]) -> None:
    functions = {function: kind for kind, function in REPLACEABLE.items() if kind in kinds}
    for node in gm.graph.nodes:
        kind = functions.get(node.target) if node.op == "call_function" else None
        if kind is not None and relu_ceiling(gm, node) is None:
            raise ConversionError(
                f"{place_of(node)}: replace finds activations by their modules, and this one is a function. "
                f"Remedy: make it a module of the network, self.act = nn.{kind.__name__}()"
            )


def _activate_first(gm: fx.GraphModule) -> None:
    """relu(max_pool(z)) becomes max_pool(relu(z)), which is the same; so does QCFS, which never falls either.

    Likewise behind what moves whole pixels: they are spikes then, and no currents.
    """
    for node in list(gm.graph.nodes):
        if relu_ceiling(gm, node) is None:
            continue
        while node.args and isinstance(moved := node.args[0], fx.Node) and len(moved.users) == 1:
            if len(moved.all_input_nodes) != 1 or not (_is_max_pool(gm, moved) or _moves_pixels(gm, moved)):
                break
            source = moved.all_input_nodes[0]
            node.replace_all_uses_with(moved)
            node.replace_input_with(moved, source)
            moved.replace_input_with(source, node)
            moved.prepend(node)


def _moves_pixels(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        m = gm.get_submodule(str(node.target))
        nearest = isinstance(m, nn.Upsample) and m.mode == "nearest"
        return nearest or isinstance(m, nn.PixelShuffle | nn.PixelUnshuffle)
    if node.target == "contiguous" or (node.target is operator.getitem and isinstance(node.args[1], tuple)):
        return True
    nearest = node.target is F.interpolate and node.kwargs.get("mode", "nearest") == "nearest" and len(node.args) < 4
    return node.op == "call_function" and (nearest or node.target in (F.pixel_shuffle, F.pixel_unshuffle))


def _is_max_pool(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), _MAX_MODULES)
    return node.op == "call_function" and node.target in _MAX_FUNCTIONS | _ADAPTIVE_FUNCTIONS


def _site_path(gm: fx.GraphModule, node: fx.Node, taken: set[str], name: str) -> str:
    """Where a call site's new module goes; a module's first call takes the module's own place."""
    if node.op == "call_module":
        path = str(node.target)
        if path in taken:
            taken.discard(path)  # the next call of the same module needs another name
            taken.add(path + "#replaced")
            return path
    else:
        owner = owner_path(node)
        path = f"{owner}.{name}" if owner else name
        if path not in taken and f"{path}#replaced" not in taken:
            taken.add(path)
            return path
    i = 1
    while f"{path}_{i}" in taken:
        i += 1
    taken.add(f"{path}_{i}")
    return f"{path}_{i}"


def _replace(gm: fx.GraphModule, node: fx.Node, path: str, module: nn.Module) -> None:
    gm.add_submodule(path, module.train(gm.training))
    x = node.args[0] if node.args else node.kwargs["input"]
    with gm.graph.inserting_after(node):
        new = gm.graph.call_module(path, (x,))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def _average_pool(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The average pool that stands in for a max-pooling node; None for other nodes."""
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    if not _is_max_pool(gm, node):
        return None
    kinds: dict[int | None, tuple[type[nn.Module], type[nn.Module]]] = {
        1: (nn.AvgPool1d, nn.AdaptiveAvgPool1d),
        2: (nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    }
    pool, adaptive = kinds[layer_rank(gm, node)]
    if node.op == "call_module":
        m = gm.get_submodule(str(node.target))
        if isinstance(m, nn.AdaptiveMaxPool1d | nn.AdaptiveMaxPool2d):
            return adaptive(m.output_size)
        values = {name: getattr(m, name) for name in names}
    else:
        if node.target in _ADAPTIVE_FUNCTIONS:
            return adaptive(node.args[1] if len(node.args) > 1 else node.kwargs["output_size"])
        values = {
            **dict(zip(names, node.args[1:], strict=False)),
            **{k: v for k, v in node.kwargs.items() if k != "input"},
        }
    if values.get("dilation", 1) not in (1, (1,), (1, 1)) or values.get("return_indices"):
        raise ConversionError(f"{place_of(node)}: max pooling with dilation or indices has no average counterpart")
    return pool(
        values["kernel_size"], values.get("stride"), values.get("padding", 0), bool(values.get("ceil_mode", False))
    )
