"""What a node of a network holds, described once: its configuration's fields and its tensors.

A layer's configuration is a frozen dataclass. The type of a field carries its form in JSON (`Annotated[type, Form]`),
so `to_dict` and `from_dict` follow from the fields, and a damaged file is refused by the name of the field. Which
tensors belong to a layer, with dtype and dimensions, follows from its configuration (`Config.tensors`). Building,
writing and loading a network all go through here; docs/format.md tells the same to a reader without this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from ..errors import FormatError
from ..operators.geometry import GEOMETRY, split
from ..operators.limits import IMAGE_BITS, MAX_COUNT, MAX_EXTENT, MAX_SUM, MAX_WEIGHT
from ..operators.windows import PoolSpec


def require(condition: bool, message: str) -> None:
    if not condition:
        raise FormatError(message)


def printable(text: str) -> str:
    """A text of others, such as a name, as one line that a terminal shows and does not obey: an escape is \\x1b."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_int(x: Any, least: int) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= least


# ------------------------------------------------------------------------------ fields of a configuration


@dataclass(frozen=True)
class Form:
    """How a field stands in JSON: `fits` tells a sound value, `read` makes the field of it, `write` goes back."""

    fits: Callable[[Any], bool]
    read: Callable[[Any], Any] = lambda x: x
    write: Callable[[Any], Any] = lambda x: x


def whole(least: int, largest: int = MAX_EXTENT) -> Form:
    """An integer from `least` to `largest`."""
    return Form(lambda x: is_int(x, least) and x <= largest)


def list_of(form: Form) -> Form:
    """A list of values of one form; a tuple in Python."""
    return Form(
        lambda x: isinstance(x, (list, tuple)) and all(form.fits(v) for v in x),
        lambda x: tuple(form.read(v) for v in x),
        lambda x: [form.write(v) for v in x],
    )


def _is_geometry(g: Sequence[int]) -> bool:
    """Whether all nine are there, and only the padding is zero."""
    return len(g) == GEOMETRY and min(*g[:4], *g[6:]) > 0


_FLAG = Form(lambda x: isinstance(x, bool))
_INTS = list_of(whole(0))
_GEOMETRIES = Form(  # one flat list in JSON
    lambda x: _INTS.fits(x) and len(x) % GEOMETRY == 0 and all(map(_is_geometry, split(x))),
    lambda x: tuple(split(x)),
    lambda x: [v for g in x for v in g],
)
_POOL = Form(lambda x: isinstance(x, Mapping), PoolSpec.from_dict, PoolSpec.to_dict)

# Types of fields. A field without a value (None) is left out of the JSON.
Flag = Annotated[bool, _FLAG]
Flags = Annotated[tuple[bool, ...], list_of(_FLAG)]
Names = Annotated[tuple[str, ...], list_of(Form(lambda x: isinstance(x, str)))]
Indices = Annotated[tuple[int, ...], _INTS]
Peaks = Annotated[tuple[int, ...], list_of(whole(1, MAX_COUNT))]
Size = Annotated[int, whole(1)]
Bits = Annotated[int, whole(2, IMAGE_BITS)]
Long = Annotated[int, whole(24, 24)]  # bits of a weight
Geometry = Annotated[tuple[int, ...], Form(lambda x: _INTS.fits(x) and _is_geometry(x), tuple, list)]
Geometries = Annotated[tuple[tuple[int, ...], ...], _GEOMETRIES]
Pool = Annotated[PoolSpec, _POOL]
Moves = Annotated[tuple[PoolSpec, ...], list_of(_POOL)]
Pools = Annotated[tuple[tuple[PoolSpec, ...], ...], list_of(list_of(_POOL))]


@cache
def _forms_of(config: Any) -> dict[str, Form]:
    hints = get_type_hints(config, include_extras=True)
    found = {}
    for f in fields(config):
        hint = hints[f.name]
        annotated = next((a for a in get_args(hint) if hasattr(a, "__metadata__")), hint)  # Geometry | None
        found[f.name] = annotated.__metadata__[0]
    return found


# --------------------------------------------------------------------------------- tensors of a layer


@dataclass(frozen=True)
class TensorKind:
    """dtype and number of dimensions of a tensor; the last dimension counts the layer's output channels.

    A tensor of one dimension has one value per channel. An `optional` weight may be empty.
    """

    dtypes: tuple[torch.dtype, ...]
    dims: int = 1
    optional: bool = False


def per_channel(dtype: torch.dtype) -> TensorKind:
    return TensorKind((dtype,))


def check_weight(name: str, weight: Tensor, geometry: Sequence[int]) -> int:
    """The input channels of a weight [KH, KW, C/groups, O]; FormatError where it does not fit its geometry."""
    groups = geometry[8]
    fits = tuple(weight.shape[:2]) == tuple(geometry[:2]) and weight.shape[2] > 0 and weight.shape[3] % groups == 0
    require(fits, f"{name} of shape {list(weight.shape)} does not fit the geometry {list(geometry)}")
    return weight.shape[2] * groups


def _check_tensor(name: str, t: Tensor, kind: TensorKind, channels: int) -> None:
    if kind.dims == 1:
        require(t.dtype in kind.dtypes and t.dim() == 1, f"{name} must be a vector of {kind.dtypes[0]}")
        require(t.numel() == channels, f"{name} must have {channels} values")
    else:
        require(t.dtype in kind.dtypes, f"{name} has dtype {t.dtype}")
        fits = t.dim() == kind.dims and t.shape[-1] == channels
        require(fits or (kind.optional and t.numel() == 0), f"{name} does not fit the layer's {channels} channels")
        limit = {torch.int8: 128, torch.int16: MAX_WEIGHT}.get(t.dtype, MAX_SUM)  # else biases
        require(t.numel() == 0 or -limit <= int(t.min()) <= int(t.max()) <= limit, f"{name} exceeds {limit}")
    if t.is_floating_point():
        require(bool(torch.isfinite(t).all()), f"{name} is not finite")


# ------------------------------------------------------------------------------------- configurations

C = TypeVar("C", bound="Config")


@dataclass(frozen=True)
class Config:
    """What a layer needs besides its tensors; a subclass per layer."""

    channels_of: ClassVar[str] = ""  # the tensor whose length is the number of output channels

    @classmethod
    def forms(cls) -> dict[str, Form]:
        """The forms of the fields in JSON, in their order."""
        key: Any = cls  # mypy takes classes for unhashable
        return _forms_of(key)

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """Read a configuration from JSON; raises FormatError naming the field that does not fit."""
        optional = {f.name for f in fields(cls) if f.default is None}
        found = {}
        for name, form in cls.forms().items():
            if name in optional and name not in values:
                continue
            damaged = f"{name} {'are' if name.endswith('s') else 'is'} damaged"
            require(name in values, f"{name} is missing")
            require(form.fits(values[name]), damaged)
            try:
                found[name] = form.read(values[name])
            except (KeyError, TypeError, ValueError) as error:
                raise FormatError(f"{damaged} ({error})") from error
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        values = {name: (form, getattr(self, name)) for name, form in self.forms().items()}
        return {name: form.write(value) for name, (form, value) in values.items() if value is not None}

    def check(self, inputs: Sequence[str]) -> None:
        """Raises FormatError where the fields do not fit each other or the number of inputs."""

    def tensors(self) -> dict[str, TensorKind]:
        """The tensors of a layer with this configuration, by name."""
        return {}

    def check_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises FormatError where names, dtypes or shapes are not those of this configuration."""
        expected = self.tensors()
        for name in tensors:
            require(name in expected, f"unknown tensor {name}")
        for name in expected:
            require(name in tensors, f"{name} must have values, but the node lists no such tensor")
        for name, kind in expected.items():
            _check_tensor(name, tensors[name], kind, tensors[self.channels_of].numel())
