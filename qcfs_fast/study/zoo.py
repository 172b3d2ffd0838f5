"""Networks by name or from a file: what `qcfs-fast convert` turns into a spiking network.

    torchvision's classifiers   by name (timm's as timm:NAME), prepared (ReLU -> QCFS); weights from a checkpoint or as
                                torchvision has them
    the authors' checkpoints    state dicts of Bu et al.'s published code (VGG and ResNet for CIFAR and ImageNet). Such
                                a file holds tensors only, so the network is rebuilt from their names and shapes:

        VGG      layer1 .. layer5   per convolution: i.weight, i+1.* (BatchNorm), i+2.thresh, i+3 is dropout
                 classifier         1.weight, 2.thresh, 4.weight, 5.thresh, 7.weight
        ResNet   conv1.0, .1, .2    convolution, BatchNorm, threshold
                 conv2_x .. conv5_x per block: residual_function.0, .1, .2, .3, .4, shortcut.0, .1, act
                 fc

                                Their first repository calls a threshold up, and a block's activation relu.

Files are read with weights_only=True, so reading a checkpoint runs no code of its author.
"""

from __future__ import annotations

import importlib
import pickle
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as parsed
from torch import Tensor, nn

from ..conversion.preparation import prepare
from ..errors import ConversionError, FormatError
from .networks import ResNet, Vgg

_kept: list[Any] = []  # a torch.library registration lasts as long as its object


def torchvision_models() -> Any:
    """The module torchvision.models.

    torchvision's Python part registers fake kernels for two operators of its binary part. Beside a torch of another
    build (a CPU build and PyPI's torchvision, for instance) the binary part does not load, and the import fails. The
    models need neither operator, so the import is tried once more with their schemas declared.
    """
    try:
        return importlib.import_module("torchvision").models
    except ImportError as error:
        raise ImportError("torchvision is not installed: pip install 'qcfs-fast[vision]'") from error
    except RuntimeError as error:
        if "nms" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)
    return importlib.import_module("torchvision").models


def every_classifier() -> list[str]:
    """Names of torchvision's image classifiers."""
    models = torchvision_models()
    return sorted(models.list_models(module=models))


def classifiers() -> list[str]:
    """Names of those that convert as they are (without attention or gates)."""
    families = (
        r"(alexnet|vgg\d+(_bn)?|resnet\d+|wide_resnet\d+_2|resnext\d+_\d+x\d+d|squeezenet1_[01]|googlenet|inception_v3"
        r"|regnet_x_\w+|mobilenet_v2|mnasnet\d_\d+|densenet\d+|shufflenet_v2_\w+)"
    )
    return [n for n in every_classifier() if re.fullmatch(families, n)]


def torchvision_network(name: str, classes: int | None = None, weights: str | None = None) -> nn.Module:
    """One of torchvision's classifiers, in eval mode; `weights` as torchvision names them (may download).

    timm:NAME is one of timm's, with its pretrained weights where any are asked for.
    """
    if name.startswith("timm:"):
        return timm_network(name.removeprefix("timm:"), classes, weights)
    models = torchvision_models()
    if name not in every_classifier():
        raise ValueError(f"{name!r} is no torchvision network; those that convert: {', '.join(classifiers())}")
    options: dict[str, Any] = {} if weights or classes is None else {"num_classes": classes}
    if name in ("googlenet", "inception_v3") and weights is None:
        options.update(aux_logits=False, init_weights=True)
    try:
        network: nn.Module = getattr(models, name)(weights=weights, **options)
    except (ValueError, KeyError) as error:
        raise ValueError(f"torchvision cannot make {name} with weights={weights!r}: {error}") from error
    return network.eval()


def timm_network(name: str, classes: int | None, weights: str | None = None) -> nn.Module:
    torchvision_models()  # timm imports torchvision
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ImportError("timm is not installed: pip install 'qcfs-fast[timm]'") from error
    options = {} if classes is None else {"num_classes": classes}
    try:
        network: nn.Module = timm.create_model(name, pretrained=weights is not None, **options)
    except RuntimeError as error:  # an unknown name
        raise ValueError(f"timm cannot make {name}: {error}") from error
    return network.eval()


def classes_named(network: nn.Module, names: Collection[str]) -> set[type[nn.Module]]:
    """The classes of a network's modules that have these names, as prepare takes them in `replace`."""
    found = {type(m) for m in network.modules() if type(m).__name__ in names}
    if missing := set(names) - {kind.__name__ for kind in found}:
        known = sorted({type(m).__name__ for m in network.modules()})
        raise ValueError(f"no module of the network is a {min(missing)}; its classes are {', '.join(known)}")
    return found


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file: a state dict, or a dictionary that holds one."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            found: Any = parsed(path.read_bytes())  # not mapped: see network/saving.py
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise FormatError(
            f"{path}: holds objects other than tensors, or is no torch file ({reason}). Save the model's state_dict() "
            "instead; whole pickled models are not read, because reading one runs its code"
        ) from error
    except Exception as error:  # zip, pickle and safetensors errors of damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FormatError(f"{path}: not a complete checkpoint ({reason}); copy it again from its source") from error
    for key in ("model", "state_dict", "net"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise FormatError(f"{path}: holds no state dict (a dictionary of tensors)")
    return {str(k).removeprefix("module."): v for k, v in found.items()}


def load_state(network: nn.Module, state: Mapping[str, Tensor], what: str) -> nn.Module:
    """load_state_dict with an error that names what differs."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise FormatError(f"the checkpoint does not fit {what}: {' '.join(lines)[:400]}") from error
    return network


def prepared_torchvision(
    name: str,
    classes: int | None = None,
    weights: str | None = None,
    state: Mapping[str, Tensor] | None = None,
    levels: int = 8,
    max_pool: str = "avg",
    threshold: float = 8.0,
    replace: Collection[str] | None = None,
) -> nn.Module:
    """A torchvision network with QCFS activations; `state` is of the prepared network, or of the plain one.

    `replace`: names of classes whose modules are replaced as well, see prepare.
    """
    if state is not None and classes is None:
        last = [v for v in state.values() if v.dim() in (2, 4)]
        classes = int(last[-1].shape[0]) if last else None
    network = torchvision_network(name, classes, weights)
    if state is not None and not any(k.endswith(".thresh") for k in state):
        network, state = load_state(network, state, f"torchvision's {name}"), None
    kinds = classes_named(network, replace or ())
    model: nn.Module = prepare(network, levels=levels, threshold=threshold, max_pool=max_pool, replace=kinds)
    if state is not None:
        load_state(model, state, f"prepare({name})")
    return model.eval()


# --------------------------------------------------------------------------------- the authors' shapes


def authors_network(state: Mapping[str, Tensor], levels: int = 8) -> nn.Module:
    """Rebuild the network of one of the authors' checkpoints.

    Args:
        state: the checkpoint's tensors by name.
        levels: L of the training. It is not stored in such files, and conversion does not depend on it: only
            running the result as an ANN does.

    Raises:
        ConversionError: the names are those of another kind of network.
    """

    state = {re.sub(r"(\.relu)?\.up$", lambda m: ".act.thresh" if m[1] else ".thresh", k): v for k, v in state.items()}

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise ConversionError(f"the checkpoint looks like one of the authors' networks, but has no {name}")
        return tuple(state[name].shape)

    def members(pattern: str) -> list[int]:
        return sorted({int(m.group(1)) for k in state if (m := re.fullmatch(pattern, k))})

    if "layer1.0.weight" in state and "classifier.1.weight" in state and "layer1.2.thresh" in state:
        stages = [
            [shape(f"layer{s}.{i}.weight")[0] for i in members(rf"layer{s}\.(\d+)\.weight") if i % 4 == 0]
            for s in members(r"layer(\d+)\.0\.weight")
        ]
        linear = [shape(f"classifier.{i}.weight")[::-1] for i in members(r"classifier\.(\d+)\.weight")]
        network: nn.Module = Vgg(stages, [(a, b) for a, b in linear], shape("layer1.0.weight")[1], levels)
    elif "conv1.0.weight" in state and "conv2_x.0.act.thresh" in state:
        width, channels, *kernel = shape("conv1.0.weight")
        if kernel != [3, 3]:
            raise ConversionError(f"the checkpoint's first convolution is {kernel}, but the authors' networks have 3x3")
        stages_of_blocks = [
            [
                (
                    shape(f"conv{s}_x.{i}.residual_function.0.weight")[0],
                    f"conv{s}_x.{i}.shortcut.0.weight" in state,
                )
                for i in members(rf"conv{s}_x\.(\d+)\.act\.thresh")
            ]
            for s in members(r"conv(\d+)_x\.0\.act\.thresh")
        ]
        network = ResNet(channels, width, stages_of_blocks, shape("fc.weight")[0], levels)
    else:
        some = ", ".join(list(state)[:4])
        thresholds = any(k.endswith("thresh") for k in state)
        raise ConversionError(
            f"the checkpoint's tensors ({some}, ...) are not named as in the authors' VGG (with BatchNorm) or ResNet. "
            + (
                "If they belong to a prepared torchvision network, name it: qcfs-fast convert resnet18 "
                "--checkpoint FILE"
                if thresholds
                else "It has no thresholds (thresh), so it is no QCFS network: train one, or name a torchvision "
                "network and calibrate it: qcfs-fast convert resnet18 --checkpoint FILE --calibrate DATA"
            )
            + ". For any other network use qcfs_fast.convert(model) in Python"
        )
    return load_state(network, state, "the network its names describe").eval()
