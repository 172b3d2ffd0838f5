"""The file that training leaves: weights, with what they are.

It is safetensors: the state dict, and as metadata one JSON object, `Trained`, from which the network is built again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import WRONG_FORM, FormatError
from ..files import write_tensors_atomically
from .about_images import checked_classes, checked_numbers
from .networks import SMALL, small_network
from .zoo import load_state, prepared_torchvision, read_state


@dataclass(frozen=True)
class Trained:
    """What a trained file says of its weights; everything that builds the network, and where it comes from."""

    network: str  # one of SMALL, or a torchvision name
    data: str  # name of the data set, or of its folder
    classes: int
    shape: tuple[int, int, int]  # of an image: channels, height, width
    levels: int
    width: float = 1.0
    max_pool: str = "avg"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    epochs: int = 0
    seed: int = 0
    accuracy: float | None = None  # of the ANN on the test images
    recipe: str = ""  # the command, or the arguments of the training
    names: tuple[str, ...] | None = None  # of the classes, in the order of the outputs
    replace: tuple[str, ...] | None = None  # classes of modules that were replaced, see prepare

    def facts(self) -> dict[str, Any]:
        """Plain data; without `names` and `replace` where there are none, as before files had any."""
        return {k: v for k, v in asdict(self).items() if k not in ("names", "replace") or v is not None}

    def build(self, threshold: float = 8.0) -> nn.Module:
        """The network with random weights, in training mode."""
        if self.network in SMALL:
            channels, size, _ = self.shape
            return small_network(self.network, self.classes, channels, size, self.levels, threshold, self.width)
        return prepared_torchvision(
            self.network,
            self.classes,
            levels=self.levels,
            max_pool=self.max_pool,
            threshold=threshold,
            replace=self.replace,
        ).train()


METADATA = "qcfs_fast_trained"


def save_trained(path: Path, model: nn.Module, about: Trained) -> None:
    """Write a network's state dict with what it is."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_tensors_atomically(path, tensors, {METADATA: json.dumps(about.facts())})


def trained_about(path: Path) -> Trained | None:
    """What a file says of its weights; None where it is no file of `save_trained`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            text = (file.metadata() or {}).get(METADATA)
    except (SafetensorError, OSError):
        return None
    if text is None:
        return None
    try:
        found = json.loads(text)
        if not isinstance(found, dict) or not {f.name for f in fields(Trained)} >= set(found):
            raise ValueError("it has other fields than this version knows")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
        about = Trained(**values)
        _check(about)
        return about
    except WRONG_FORM as error:
        raise FormatError(
            f"{path}: its metadata {METADATA} is damaged ({error}); train again, or copy it again"
        ) from error


def _check(about: Trained) -> None:
    """ValueError where a field does not hold what it must, before anything is built from it."""

    def whole(name: str, value: Any, last: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= last:
            raise ValueError(f"{name} must be an integer from 1 to {last}, got {value!r}")

    whole("classes", about.classes, 1 << 20)
    whole("levels", about.levels, 1 << 20)
    if not isinstance(about.shape, tuple) or len(about.shape) != 3:
        raise ValueError(f"shape must be three integers, got {about.shape!r}")
    for value in about.shape:
        whole("shape", value, 1 << 14)
    if not isinstance(about.width, float | int) or not 0 < about.width <= 64:
        raise ValueError(f"width must be in (0, 64], got {about.width!r}")
    if about.names is not None:
        checked_classes(about.names, about.classes)
    for name in ("mean", "std"):
        checked_numbers(name, getattr(about, name), about.shape[0])
    if not isinstance(about.network, str) or not re.fullmatch(r"[\w-]+", about.network):
        raise ValueError(f"network must be a name, got {about.network!r}")
    if not isinstance(about.replace, tuple | None) or not all(isinstance(n, str) for n in about.replace or ()):
        raise ValueError(f"replace must be names of classes, got {about.replace!r}")


def load_trained(path: Path) -> tuple[nn.Module, Trained]:
    """The network of a trained file, in eval mode, and what the file says of it.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: it is no trained file, or its tensors do not fit its network.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no trained network {path}; make one by qcfs-fast train")
    about = trained_about(path)
    if about is None:
        raise FormatError(f"{path}: is no file of qcfs-fast train (safetensors with metadata {METADATA})")
    state: Mapping[str, Tensor] = read_state(path)
    return load_state(about.build(), state, about.network).eval(), about
