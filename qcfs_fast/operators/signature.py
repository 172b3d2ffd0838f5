"""Every operator of a converted network, stated once: its operands, its checks, the shape of its result.

An operator is a dataclass, and an instance is one call of it. The fields, in order, are the arguments of
torch.ops.qcfs_fast.<name>; from them follow the torch schema, the fake kernel (check, then an empty result) and the one
argument of each backend's function. Formulas and layouts are those of csrc/core/contract.h, whose structs these mirror:

    spikes     uint8, masks [ceil(T/8), N, H, W, C] or count planes [T, N, H, W, C]; linear layers use [.., N, K]
    weights    int16 or int8, [KH, KW, C/groups, O]; linear layers use [K, O]
    scale      what a product is multiplied by, one int each; empty: 1 for int16 and 256 for int8
    neuron     the mode of the neuron as ints (neuron.py)
    geometry   nine ints for each convolution (geometry.py)
    windows    three ints for each output row or column of a pool: first input index, last + 1, divisor

There is no autograd: an operand that requires grad raises.

Adding an operator: a dataclass here, a function in reference.py, and one in each backend that has a kernel for it
(docs/adding-a-kernel.md).
"""

from __future__ import annotations

import functools
import typing
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Optional

import torch
from torch import Tensor

from .checks import (
    ANY,
    BATCH,
    check_coding,
    check_devices,
    check_elements,
    check_multiple,
    check_no_grad,
    check_steps,
    check_tensor,
    checked_convolution,
    checked_geometries,
    checked_windows,
    fail,
)
from .geometry import POINTWISE
from .limits import IMAGE_BITS, MAX_SOURCES, SCALES
from .masks import planes
from .neuron import MODES, PLAIN, checked_neuron, mask_planes, state_rows

# torch's schema language
_WORDS = {
    Tensor: "Tensor",
    Optional[Tensor]: "Tensor?",  # noqa: UP045 - as get_type_hints gives it
    list[Tensor]: "Tensor[]",
    list[int]: "int[]",
    int: "int",
    bool: "bool",
}

_SPIKES = [ANY, BATCH, ANY, ANY, ANY]
_WEIGHTS = (torch.int16, torch.int8)


@dataclass(slots=True, eq=False)
class Operator:
    """A call: an operator with its operands. `check` comes first: it settles `shape`, that of the result."""

    name: ClassVar[str]
    returns: ClassVar[str] = "Tensor"
    dtype: ClassVar[torch.dtype]  # of the result
    anchor: ClassVar[str]  # the operand on whose device the result is made
    without: ClassVar[tuple[str, ...]] = ()  # fields that are no operands of this operator
    shape: tuple[int, ...] = field(init=False, repr=False)

    @classmethod
    def schema(cls) -> str:
        operands = ", ".join(f"{word} {name}{default}" for name, word, default in cls._schema_words())
        return f"{cls.name}({operands}) -> {cls.returns}"

    @classmethod
    def checked(cls, *operands: Any) -> Any:
        """A call with these operands, checked."""
        a = cls(*operands)
        try:
            a.check()
        except AttributeError as error:  # asked late, so that calls that are right do not wait for it
            for name, word in cls._words():
                value = getattr(a, name)
                for t in value if word == "Tensor[]" else (value,) if word == "Tensor" else ():
                    if not isinstance(t, Tensor):
                        raise TypeError(f"qcfs_fast::{cls.name}: {name} must be a tensor, got {t!r}") from error
            raise
        return a

    def check(self) -> None:
        """Raise ValueError (or RuntimeError for an operand that requires grad) unless a kernel may run.

        What `settle` finds depends on dtypes, shapes, devices and integers alone, and a network asks the same at every
        call: the answer is remembered. A failure is not, nor is an answer about symbolic sizes (torch.compile).
        """
        self.check_grad()
        key: Any = self._key()
        try:
            shape = _settled.get(key)
        except TypeError:  # a symbolic size has no hash
            key, shape = None, None
        if shape is None:
            shape = self.settle()
            if key is not None:
                self._check_elements(shape)
            if len(_settled) >= MAX_REMEMBERED:
                _settled.clear()
            if key is not None:
                _settled[key] = shape
        self.shape = shape

    def _check_elements(self, shape: tuple[int, ...]) -> None:
        for name, word in self._words():
            value = getattr(self, name)
            for t in value if word == "Tensor[]" else (value,):
                if isinstance(t, Tensor):
                    check_elements(self.name, name, t.shape)
        check_elements(self.name, "the result", shape)

    def check_grad(self) -> None:
        """For the operators that take floating-point operands."""

    def settle(self) -> tuple[int, ...]:
        """The checks; returns the shape of the result."""
        raise NotImplementedError

    def _key(self) -> tuple[Any, ...]:
        key: list[Any] = [self.name]
        for name, word in self._words():
            value = getattr(self, name)
            if word == "Tensor[]":
                key.append(tuple([(t.dtype, t.shape, t.device) for t in value]))
            elif word == "int[]":
                key.append(tuple(value))
            elif isinstance(value, Tensor):
                key.append((value.dtype, value.shape, value.device))
            else:
                key.append(value)
        return tuple(key)

    @property
    def device(self) -> torch.device:
        """Where all operands are and the result will be."""
        like: Tensor = getattr(self, self.anchor)
        return like.device

    def empty(self) -> Any:
        """Memory for the result, which a kernel writes whole."""
        like: Tensor = getattr(self, self.anchor)
        return like.new_empty(self.shape, dtype=self.dtype)

    def make_dense(self) -> None:
        """Copy the operands that are not contiguous: kernels know no strides."""
        for name, several in self._tensor_fields():
            value = getattr(self, name)
            if several:
                setattr(self, name, [t.contiguous() for t in value])
            elif value is not None and not value.is_contiguous():
                setattr(self, name, value.contiguous())

    def tensors(self) -> list[Tensor]:
        """The operands that are tensors."""
        values = [(getattr(self, name), several) for name, several in self._tensor_fields()]
        return [t for value, several in values for t in (value if several else (value,)) if t is not None]

    @classmethod
    @functools.cache
    def _words(cls) -> tuple[tuple[str, str], ...]:
        """Name of each operand and its type in torch's schema language."""
        hints = typing.get_type_hints(cls)
        return tuple((f.name, _WORDS[hints[f.name]]) for f in fields(cls) if f.init)

    @classmethod
    def _schema_words(cls) -> list[tuple[str, str, str]]:
        """The same for the schema, with defaults and without what the operator does not take."""
        found = []
        for f, (name, word) in zip([f for f in fields(cls) if f.init], cls._words(), strict=True):
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            text = "" if default is MISSING else f"={default}"
            if isinstance(default, list) and default:  # of a fixed length, or torch takes it for one number
                word = f"int[{len(default)}]"
            if name not in cls.without:
                found.append((name, word, text))
        return found

    @classmethod
    @functools.cache
    def _tensor_fields(cls) -> tuple[tuple[str, bool], ...]:
        """Name of each operand that is a tensor or a list of tensors, and whether it is a list."""
        return tuple((name, word == "Tensor[]") for name, word in cls._words() if word.startswith("Tensor"))


# What `check` remembers, by operator and description of the operands.
_settled: dict[tuple[Any, ...], tuple[int, ...]] = {}
MAX_REMEMBERED = 4096


# ------------------------------------------------------------------------------------------- first layer


@dataclass(slots=True, eq=False)
class QuantizeInput(Operator):
    """Float images [N, C', H, W], any strides -> int32 [N, H, W, C] and a binary exponent for each sample [N].

    Channel c of the result is x[:, source[c]] * scale[c] + shift[c], in `bits` bits with the sign.
    """

    name = "quantize_input"
    returns = "(Tensor, Tensor)"
    dtype = torch.int32
    anchor = "x"
    x: Tensor
    source: Tensor  # int64 [C]
    scale: Tensor  # float32 [C]
    shift: Tensor  # float32 [C]
    bits: int = IMAGE_BITS

    def check_grad(self) -> None:
        check_no_grad(self.name, self.x)

    def settle(self) -> tuple[int, ...]:
        op = self.name
        check_tensor(
            op, "x", self.x, (torch.float32, torch.float64, torch.float16, torch.bfloat16), [BATCH, ANY, ANY, ANY]
        )
        check_tensor(op, "source", self.source, torch.int64, [ANY])
        channels = self.source.shape[0]
        check_tensor(op, "scale", self.scale, torch.float32, [channels])
        check_tensor(op, "shift", self.shift, torch.float32, [channels])
        check_devices(op, self.x, self.source, self.scale, self.shift)
        if not 2 <= self.bits <= IMAGE_BITS:
            fail(op, f"bits must be from 2 to {IMAGE_BITS}, got {self.bits}")
        n, _, h, w = self.x.shape
        return (n, h, w, channels)

    def empty(self) -> tuple[Tensor, Tensor]:
        return self.x.new_empty(self.shape, dtype=self.dtype), self.x.new_empty(self.shape[:1], dtype=torch.int32)

    def make_dense(self) -> None:
        """The image keeps its strides, which the kernels know."""
        self.x = self.x.to(torch.float32)
        self.source, self.scale, self.shift = self.source.contiguous(), self.scale.contiguous(), self.shift.contiguous()


NOT_FINITE = "quantize_input: the input holds NaN or infinity; clean the data before it enters the network"


@dataclass(slots=True, eq=False)
class Conv2dCurrent(Operator):
    """Convolution of the quantised image -> the current it gives, int32 [N, OH, OW, O], the same at every step."""

    name = "conv2d_current"
    dtype = torch.int32
    anchor = "x"
    x: Tensor  # int32 [N, H, W, C], of IMAGE_BITS bits at most
    exponent: Tensor  # int32 [N]
    weight: Tensor  # int16 [KH, KW, C/groups, O]
    geometry: list[int]
    gain: Tensor  # float64 [O]
    offset: Tensor  # float64 [O]
    low: Tensor  # int32 [O]
    high: Tensor  # int32 [O]
    key: Tensor = field(init=False, repr=False)  # the weight that the caller holds, as in Conv2dIf

    def __post_init__(self) -> None:
        self.key = self.weight

    def check_grad(self) -> None:
        check_no_grad(self.name, self.gain, self.offset)

    def settle(self) -> tuple[int, ...]:
        return self.current_shape()

    def current_shape(self) -> tuple[int, ...]:
        op, x, weight = self.name, self.x, self.weight
        check_tensor(op, "x", x, torch.int32, [BATCH, ANY, ANY, ANY])
        check_tensor(op, "exponent", self.exponent, torch.int32, [x.shape[0]])
        check_tensor(op, "weight", weight, torch.int16, [ANY] * 4)
        (g,) = checked_geometries(op, self.geometry, 1)
        oh, ow = checked_convolution(op, x, weight, g)
        O = weight.shape[3]
        for name in ("gain", "offset"):
            check_tensor(op, name, getattr(self, name), torch.float64, [O])
        for name in ("low", "high"):
            check_tensor(op, name, getattr(self, name), torch.int32, [O])
        check_devices(op, x, self.exponent, weight, self.gain, self.offset, self.low, self.high)
        return (x.shape[0], oh, ow, O)


@dataclass(slots=True, eq=False)
class Conv2dEncode(Conv2dCurrent):
    """The first layer: conv2d_current, then T steps of integrate-and-fire on it -> masks [ceil(T/8), N, OH, OW, O]."""

    name = "conv2d_encode"
    dtype = torch.uint8
    threshold: Tensor  # int32 [O]
    T: int

    def settle(self) -> tuple[int, ...]:
        check_steps(self.name, self.T)
        shape = self.current_shape()
        check_tensor(self.name, "threshold", self.threshold, torch.int32, [shape[3]])
        check_devices(self.name, self.x, self.threshold)
        return (planes(self.T), *shape)


# --------------------------------------------------------------------------------------- spiking layers


@dataclass(slots=True, eq=False)
class Conv2dIf(Operator):
    """Integrate-and-fire over a sum of convolutions, residual spikes and a current of the image -> spikes.

    The result is masks [ceil(T/8), N, OH, OW, O]; of signed neurons the masks of positive spikes and then those of
    negative ones, [2 * ceil(T/8), ..]; in sum mode one plane of counts [1, ..].

    A layer with neither products nor residuals integrates the image alone. Its current must lie within +-31 thresholds,
    and it keeps its membranes within +-32 (limits.py), so that it may run for any number of steps.

    A linear layer is one whose maps are 1x1 (LinearIf.as_maps). `keys` are the tensors that the caller holds and under
    which weights in the order of a kernel are remembered; `weight` may be views of them. `caller` is the operator's
    name in messages.
    """

    name = "conv2d_if"
    dtype = torch.uint8
    anchor = "threshold"
    without: ClassVar[tuple[str, ...]] = ("state",)
    x: list[Tensor]  # masks or counts [.., N, H, W, C]
    weight: list[Tensor]  # one dtype
    geometry: list[int]
    residual: list[Tensor]  # masks or counts [.., N, OH, OW, O]
    amplitude: list[Tensor]  # int32 [O]
    current: Tensor | None  # int32 [N, OH, OW, O], the same at every step, or [T, N, OH, OW, O]
    bias: Tensor  # int32 [O], or [T, O]
    threshold: Tensor  # int32 [O], even
    T: int
    scale: list[int] = field(default_factory=list)
    neuron: list[int] = field(default_factory=lambda: list(PLAIN))
    state: Tensor | None = None  # Conv2dIfFrom
    keys: list[Tensor] = field(init=False, repr=False)
    caller: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.keys, self.caller = self.weight, self.name

    def settle(self) -> tuple[int, ...]:
        """The checks. The shape follows from the first source there is; all others must agree."""
        op, T, threshold = self.caller, self.T, self.threshold
        x, weight, residual, amplitude = self.x, self.weight, self.residual, self.amplitude
        check_steps(op, T)
        if len(x) != len(weight):
            fail(op, f"{len(x)} inputs but {len(weight)} weights")
        if len(residual) != len(amplitude):
            fail(op, f"{len(residual)} residuals but {len(amplitude)} amplitudes")
        if not x and not residual and self.current is None:
            fail(op, "a layer needs at least one source")
        if max(len(x), len(residual)) > MAX_SOURCES:
            fail(
                op,
                f"at most {MAX_SOURCES} inputs and {MAX_SOURCES} residuals can be summed in one layer, "
                f"got {len(x)} and {len(residual)}",
            )
        check_tensor(op, "threshold", threshold, torch.int32, [ANY])
        O = threshold.shape[0]
        mode = checked_neuron(op, self.neuron, T)
        check_tensor(op, "bias", self.bias, torch.int32, [O] if self.bias.dim() == 1 else [T, O])
        self._check_scale(op)
        shape: tuple[int, ...] | None = None
        first = ""

        def agree(name: str, found: tuple[int, ...]) -> None:
            nonlocal shape, first
            if shape is None:
                shape, first = found, name
            elif shape != found:
                fail(op, f"{name} gives an output of shape {list(found)}, {first} one of {list(shape)}")

        for i, g in enumerate(checked_geometries(op, self.geometry, len(x))):
            xi, wi = x[i], weight[i]
            check_tensor(op, f"input {i}", xi, torch.uint8, _SPIKES)
            check_tensor(op, f"weight {i}", wi, _WEIGHTS, [ANY, ANY, ANY, O])
            if wi.dtype != weight[0].dtype:
                fail(op, "all weights of a layer must have one dtype")
            check_coding(op, f"input {i}", xi, T)
            agree(f"input {i}", (xi.shape[1], *checked_convolution(op, xi, wi, g), O))
        for i, (r, a) in enumerate(zip(residual, amplitude, strict=True)):
            check_tensor(op, f"residual {i}", r, torch.uint8, [*_SPIKES[:4], O])
            check_tensor(op, f"amplitude {i}", a, torch.int32, [O])
            check_coding(op, f"residual {i}", r, T)
            agree(f"residual {i}", tuple(r.shape[1:]))
        if self.current is not None:
            by_step = self.current.dim() == 5
            check_tensor(op, "current", self.current, torch.int32, [*([T] if by_step else []), *_SPIKES[1:4], O])
            agree("current", tuple(self.current.shape[-4:]))
        assert shape is not None
        if self.state is not None:
            check_tensor(op, "state", self.state, torch.int32, [state_rows(mode), *shape])
        check_devices(op, threshold, self.bias, self.current, self.state, *x, *weight, *residual, *amplitude)
        return (mask_planes(mode, T), *shape)

    def _check_scale(self, op: str) -> None:
        """A kernel multiplies its sums by the quotient of neighbouring scales, which must be an integer."""
        if not self.scale:
            return
        if len(self.scale) != len(self.x):
            fail(op, f"{len(self.x)} inputs but {len(self.scale)} scales")
        sizes = [abs(s) for s in self.scale]
        if any(s not in SCALES for s in sizes) or sizes != sorted(sizes, reverse=True):
            fail(op, f"scales must be +-1, +-256 or +-65536, the largest first, got {self.scale}")
        if len(set(sizes)) > 1 and self.weight[0].dtype == torch.int16:
            fail(op, f"16-bit weights take scales of one size, got {self.scale}")

    @property
    def scales(self) -> list[int]:
        """What each product is multiplied by."""
        return self.scale or [256 if w.dtype == torch.int8 else 1 for w in self.weight]


def _as_map(x: Tensor) -> Tensor:
    return x.unsqueeze(-2).unsqueeze(-2)


@dataclass(slots=True, eq=False)
class LinearIf(Operator):
    """conv2d_if with linear layers in place of convolutions: no H and W, and no geometry."""

    name = "linear_if"
    dtype = torch.uint8
    anchor = "threshold"
    without: ClassVar[tuple[str, ...]] = ("state",)
    x: list[Tensor]  # masks or counts [.., N, K]
    weight: list[Tensor]  # [K, O]
    residual: list[Tensor]  # masks or counts [.., N, O]
    amplitude: list[Tensor]
    current: Tensor | None  # [N, O] or [T, N, O]
    bias: Tensor
    threshold: Tensor
    T: int
    scale: list[int] = field(default_factory=list)
    neuron: list[int] = field(default_factory=lambda: list(PLAIN))
    state: Tensor | None = None  # LinearIfFrom

    def settle(self) -> tuple[int, ...]:
        op = self.name
        for name, tensors in (("input", self.x), ("residual", self.residual)):
            for i, t in enumerate(tensors):
                check_tensor(op, f"{name} {i}", t, torch.uint8, [ANY, BATCH, ANY])
        for i, w in enumerate(self.weight):
            check_tensor(op, f"weight {i}", w, _WEIGHTS, [ANY, ANY])
        if self.current is not None:
            check_tensor(op, "current", self.current, torch.int32, [ANY, BATCH, ANY][self.current.dim() != 3 :])
        if self.state is not None:
            check_tensor(op, "state", self.state, torch.int32, [ANY, BATCH, ANY])
        masks, n, _, _, O = self.as_maps().settle()
        return (masks, n, O)

    def as_maps(self) -> Conv2dIf:
        """The same layer as 1x1 convolutions of 1x1 maps, on views of the operands."""
        maps = (Conv2dIfFrom if isinstance(self, LinearIfFrom) else Conv2dIf)(
            x=[_as_map(t) for t in self.x],
            weight=[w[None, None] for w in self.weight],
            geometry=list(POINTWISE) * len(self.x),
            residual=[_as_map(r) for r in self.residual],
            amplitude=self.amplitude,
            current=None if self.current is None else _as_map(self.current),
            bias=self.bias,
            threshold=self.threshold,
            T=self.T,
            scale=self.scale,
            neuron=self.neuron,
            state=None if self.state is None else _as_map(self.state),
        )
        maps.keys, maps.caller = self.weight, self.name
        return maps

    def checked_maps(self) -> Conv2dIf:
        """`as_maps` of an operand that has been checked."""
        maps = self.as_maps()
        maps.shape = (*self.shape[:2], 1, 1, self.shape[2])
        return maps


class _GoingOn(Operator):
    """What the operators that go on from a state add to those that begin: -> (spikes, state after the last step).

    A state is int32 [rows, N, .., O]: the membrane potentials and, of signed neurons, the sum of the spikes that each
    has sent. Without one a run begins: half the threshold, and zero.
    """

    __slots__ = ()
    returns = "(Tensor, Tensor)"
    without: ClassVar[tuple[str, ...]] = ()
    neuron: list[int]
    threshold: Tensor
    T: int

    def settle(self) -> tuple[int, ...]:
        mode = checked_neuron(self.name, self.neuron, self.T)
        if not state_rows(mode):
            fail(self.name, f"a neuron in {mode} mode has no state that a later call could go on from")
        return super().settle()

    def empty(self) -> Any:
        state = self.threshold.new_empty((state_rows(MODES[self.neuron[0]]), *self.shape[1:]))
        return super().empty(), state


@dataclass(slots=True, eq=False)
class Conv2dIfFrom(_GoingOn, Conv2dIf):
    """conv2d_if that goes on from a state [rows, N, OH, OW, O]."""

    name = "conv2d_if_from"


@dataclass(slots=True, eq=False)
class LinearIfFrom(_GoingOn, LinearIf):
    """linear_if that goes on from a state [rows, N, O]."""

    name = "linear_if_from"


# ---------------------------------------------------------------------------------- pooling and counting


@dataclass(slots=True, eq=False)
class Pool(Operator):
    """Window sums of masks or counts -> count planes [T, N, OH, OW, C]; value = sum * multiple / divisor."""

    name = "pool"
    dtype = torch.uint8
    anchor = "x"
    x: Tensor
    rows: list[int]
    cols: list[int]
    multiple: int
    T: int

    def settle(self) -> tuple[int, ...]:
        op, x, T = self.name, self.x, self.T
        check_steps(op, T)
        check_tensor(op, "x", x, torch.uint8, _SPIKES)
        check_coding(op, "x", x, T)
        oh, ow = checked_windows(op, x, self.rows, self.cols, self.multiple, counts=True)
        return (T, x.shape[1], oh, ow, x.shape[4])


@dataclass(slots=True, eq=False)
class MaxPool(Operator):
    """Whether any neuron of a window fired, step by step: masks -> masks. With `counts` the largest of count planes."""

    name = "max_pool"
    dtype = torch.uint8
    anchor = "x"
    x: Tensor
    rows: list[int]
    cols: list[int]
    counts: bool = False

    def settle(self) -> tuple[int, ...]:
        check_tensor(self.name, "x", self.x, torch.uint8, _SPIKES)
        oh, ow = checked_windows(self.name, self.x, self.rows, self.cols, 0)
        return (*self.x.shape[:2], oh, ow, self.x.shape[4])


@dataclass(slots=True, eq=False)
class Count(Operator):
    """Spikes counted over steps first .. last-1 -> int32, totals [1, ..] or, with `prefix`, running counts.

    There is one running count for each step: [last - first, ..]. An empty `span` is [0, T].
    """

    name = "count"
    dtype = torch.int32
    anchor = "x"
    x: Tensor  # masks or counts [.., N, ..]
    T: int
    prefix: bool
    span: list[int] = field(default_factory=list)  # first, last

    @property
    def first(self) -> int:
        return self.span[0] if self.span else 0

    @property
    def last(self) -> int:
        return self.span[1] if self.span else self.T

    def settle(self) -> tuple[int, ...]:
        op, x = self.name, self.x
        check_steps(op, self.T)
        if self.span and not (len(self.span) == 2 and 0 <= self.span[0] < self.span[1] <= self.T):
            fail(op, f"span must be [first, last] with 0 <= first < last <= T={self.T}, got {self.span}")
        check_tensor(op, "x", x, torch.uint8, None)
        if x.dim() < 2:
            fail(op, f"x must be masks or count planes, got shape {list(x.shape)}")
        check_coding(op, "x", x, self.T)
        return (self.last - self.first if self.prefix else 1, *x.shape[1:])


@dataclass(slots=True, eq=False)
class PoolCounts(Operator):
    """Window sums of int32 counts [S, N, H, W, C] -> [S, N, OH, OW, C]."""

    name = "pool_counts"
    dtype = torch.int32
    anchor = "counts"
    counts: Tensor
    rows: list[int]
    cols: list[int]
    multiple: int

    def settle(self) -> tuple[int, ...]:
        check_tensor(self.name, "counts", self.counts, torch.int32, _SPIKES)
        oh, ow = checked_windows(self.name, self.counts, self.rows, self.cols, self.multiple)
        return (*self.counts.shape[:2], oh, ow, self.counts.shape[4])


# ---------------------------------------------------------------------------------------------- last layer


@dataclass(slots=True, eq=False)
class Readout(Operator):
    """The last layer, linear, on counts: float32 [1 or T, N, OH, OW, O], the mean over the steps of its currents.

    A term is a convolution of counts, or the counts themselves where its weight is empty.
    """

    name = "readout"
    dtype = torch.float32
    anchor = "offset"
    counts: list[Tensor]  # int32 [1 or T, N, H, W, C]
    weight: list[Tensor]  # int16 [KH, KW, C/groups, O] or [0]
    geometry: list[int]
    gain: list[Tensor]  # float64 [O]
    multiple: list[int]  # divisor of the pools before each term
    offset: Tensor  # float64 [O]
    T: int

    def check_grad(self) -> None:
        check_no_grad(self.name, *self.gain, self.offset)

    def settle(self) -> tuple[int, ...]:
        op, T, offset = self.name, self.T, self.offset
        check_steps(op, T)
        check_tensor(op, "offset", offset, torch.float64, [ANY])
        O = offset.shape[0]
        n = len(self.counts)
        if not (n == len(self.weight) == len(self.gain) == len(self.multiple)):
            fail(op, "counts, weight, gain and multiple must have one entry per term")
        if n == 0:
            fail(op, "a readout needs at least one term")
        shape: tuple[int, ...] | None = None
        geometries = checked_geometries(op, self.geometry, n)
        for i, (c, w, gain, g, m) in enumerate(
            zip(self.counts, self.weight, self.gain, geometries, self.multiple, strict=True)
        ):
            check_tensor(op, f"counts {i}", c, torch.int32, _SPIKES)
            check_tensor(op, f"weight {i}", w, torch.int16, None)
            check_tensor(op, f"gain {i}", gain, torch.float64, [O])
            if c.shape[0] not in (1, T):
                fail(op, f"counts {i} must hold 1 total or {T} running counts, got {c.shape[0]}")
            check_multiple(op, f"multiple {i}", m, 1)
            spatial = tuple(c.shape[2:4]) if w.numel() == 0 else checked_convolution(op, c, w, g)
            if (c.shape[4] if w.numel() == 0 else w.shape[3]) != O:
                fail(op, f"term {i} does not give {O} channels")
            found = (c.shape[0], c.shape[1], *spatial, O)
            if shape is not None and found != shape:
                fail(op, f"term {i} gives shape {list(found)}, the terms before {list(shape)}")
            shape = found
        assert shape is not None
        check_devices(op, offset, *self.counts, *self.weight, *self.gain)
        return shape


OPERATORS: tuple[type[Operator], ...] = (
    QuantizeInput,
    Conv2dCurrent,
    Conv2dEncode,
    Conv2dIf,
    Conv2dIfFrom,
    LinearIf,
    LinearIfFrom,
    Pool,
    MaxPool,
    Count,
    PoolCounts,
    Readout,
)
