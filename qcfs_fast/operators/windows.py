"""Pooling windows as PyTorch defines them, as explicit integers.

Row i of a pool's output covers the input rows [first, end) and has a divisor; columns alike, and an average divides by
the product of both. The operators take the windows of an axis as one sequence, three integers per output: first, end,
divisor. So no operator has to know about padding, ceil mode or adaptive pools.

Averages stay integers: with m a common multiple of all divisors, a window counts sum * (m / divisor), and the factor
1/m is folded into the weights that read the pool.

The same windows say which pixel goes where without any sum: a crop has windows of one pixel that begin inside, a border
of zeros has windows of none, one of pixels (`border`) has windows of one, and an image is enlarged (`spread`) by
windows of one pixel that repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, floor, lcm
from typing import Any

import torch

from .limits import MAX_EXTENT, MAX_POOL_WINDOWS, MAX_SUM

# Which of n pixels stands at place i, at most n outside but for the first; of integers and of tensors of them.
BORDERS: dict[str, Callable[[Any, int], Any]] = {
    "replicate": lambda i, n: (abs(i) - abs(i - (n - 1)) + n - 1) // 2,
    "reflect": lambda i, n: n - 1 - abs(n - 1 - abs(i)),
    "circular": lambda i, n: i % n,
}


@dataclass(frozen=True)
class PoolSpec:
    """Geometry of an average ("avg") or maximum ("max") pool; `output` is set for adaptive pools.

    `multiple` is the common multiple of the divisors, 0 as long as none has been chosen. `size` is the height and width
    of the input for which it was chosen, where that matters. `section` = (i, m, j, n) keeps only the i-th of m parts of
    each window's rows and the j-th of n parts of its columns: a window whose sum does not fit a byte is cut into
    sections, and the layer that reads them adds them up. `spread` = (h, w) gives each pixel h x w outputs, or, among
    zeros, that one of them which `phase` names. `border` says which pixels stand in the padding, by the names of
    torch.nn.functional.pad: "replicate", "reflect" or "circular".
    """

    kind: str
    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None
    output: tuple[int | None, int | None] | None = None
    multiple: int = 0
    size: tuple[int, int] | None = None
    section: tuple[int, int, int, int] = (0, 1, 0, 1)
    spread: tuple[int, int] = (1, 1)
    phase: tuple[int, int] | None = None
    border: str | None = None

    @classmethod
    def cropped(cls, rows: tuple[int, int], cols: tuple[int, int], stride: tuple[int, int] = (1, 1)) -> PoolSpec:
        """A pool that leaves out the first and last rows and columns, and then takes every stride-th."""
        (top, bottom), (left, right) = rows, cols
        height, width = top + bottom + 1, left + right + 1
        return cls("max", (height, width), stride, section=(top, height, left, width))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PoolSpec:
        """Read a pool from JSON values; raises ValueError, TypeError or KeyError where they are none."""
        found: dict[str, Any] = {name: values[name] for name in _stored("spread" in values, "border" in values)}
        found = {name: tuple(v) if isinstance(v, (list, tuple)) else v for name, v in found.items()}
        spec = cls(**found)
        if spec.kind not in ("avg", "max") or (spec.kernel is None) == (spec.output is None):
            raise ValueError(f"kind {spec.kind!r}, kernel {spec.kernel}, output {spec.output}")
        if not (isinstance(spec.ceil_mode, bool) and isinstance(spec.count_include_pad, bool)):
            raise ValueError(f"ceil_mode {spec.ceil_mode!r}, count_include_pad {spec.count_include_pad!r}")
        first, parts = spec.section[0::2], spec.section[1::2]
        phase, divisor = _given(spec.phase, (0, 0)), _given(spec.divisor_override, 0)
        for name, pair, least, most in (
            ("stride", spec.stride, 1, MAX_EXTENT),
            ("padding", spec.padding, 0, MAX_EXTENT),
            ("kernel", _given(spec.kernel, (1, 1)), 1, MAX_EXTENT),
            ("output", tuple(_given(v, 1) for v in _given(spec.output, (1, 1))), 1, MAX_EXTENT),
            ("section", first, 0, MAX_EXTENT),
            ("section", parts, 1, MAX_EXTENT),
            ("spread", spec.spread, 1, MAX_EXTENT),
            ("phase", phase, 0, MAX_EXTENT),
            ("multiple and divisor_override", (spec.multiple, divisor), 0, MAX_SUM),
        ):
            if len(pair) != 2 or any(type(v) is not int or not least <= v <= most for v in pair):
                raise ValueError(f"{name} {pair} where two integers from {least} to {most} are needed")
        if not all(i < m for i, m in zip(first, parts, strict=True)):
            raise ValueError(f"section {spec.section} where a part below the number of parts is needed")
        if spec.spreads and (spec.kernel != (1, 1) or any(p >= s for p, s in zip(phase, spec.spread, strict=True))):
            raise ValueError(f"spread {spec.spread} of a kernel {spec.kernel} and a phase {spec.phase}")
        alone = (spec.kernel, spec.stride, spec.spread) == ((1, 1), (1, 1), (1, 1)) and not spec.ceil_mode
        if spec.border is not None and (spec.border not in BORDERS or not alone):
            raise ValueError(f"border {spec.border!r} of a kernel {spec.kernel}")
        return spec

    def to_dict(self) -> dict[str, Any]:
        """The pool as JSON values; `size` is left out, since `multiple` holds what was settled with it."""
        return {name: getattr(self, name) for name in _stored(self.spreads, self.border is not None)}

    @property
    def spreads(self) -> bool:
        return self.spread != (1, 1)

    @property
    def pads(self) -> bool:
        return self.padding != (0, 0) or self.ceil_mode

    @property
    def moves(self) -> bool:
        """Whether it only says where pixels go: it spreads them, or puts a border round them, or cuts one off."""
        plain = (self.stride, self.section) == ((1, 1), (0, 1, 0, 1))
        if self.spreads:
            return plain and self.padding == (0, 0) and not self.ceil_mode
        if self.padding != (0, 0):
            return plain and self.kernel == (1, 1) and not self.ceil_mode
        return self.section[1::2] == self.kernel and not self.ceil_mode

    @property
    def leaves_zeros(self) -> bool:
        """Whether some windows of a pool that moves pixels are of none."""
        return self.phase is not None or (self.padding != (0, 0) and self.border is None)

    @property
    def depends_on_size(self) -> bool:
        """Whether windows may differ in size from each other or with the size of the input."""
        if self.output is not None:
            return True
        if self.divisor_override:
            return False
        return self.ceil_mode or (self.padding != (0, 0) and not self.count_include_pad)

    def windows(self, size: int, axis: int) -> tuple[int, ...]:
        """Windows along one axis (0: rows, 1: columns) of an input of `size`; empty where a section has no rows."""
        found: tuple[int, ...] = _windows(self, int(size), axis)
        return found

    def common_multiple(self, height: int, width: int) -> int:
        """The least common multiple of the divisors of all windows of an input of this size."""
        return int(_common_multiple(self, int(height), int(width)))

    def divisors(self) -> set[int]:
        """Divisors of all windows of an input of `size`, or of any input where size does not matter."""
        if not self.depends_on_size:
            assert self.kernel is not None
            return {self.divisor_override or self.kernel[0] * self.kernel[1]}
        assert self.size is not None
        return _divisors(self, *self.size)

    def largest_value(self) -> int:
        """Largest integer value of a window of ones."""
        if not self.depends_on_size:
            assert self.kernel is not None
            factor = self.multiple // (self.divisor_override or self.kernel[0] * self.kernel[1])
            return -(-self.kernel[0] // self.section[1]) * -(-self.kernel[1] // self.section[3]) * factor
        assert self.size is not None
        return largest_value(self.windows(self.size[0], 0), self.windows(self.size[1], 1), self.multiple)

    def sections(self, limit: int) -> list[PoolSpec]:
        """This pool cut into sections whose window values are at most `limit` on inputs of one."""
        if self.largest_value() <= limit:
            return [self]
        for m, n in [(m, 1) for m in range(2, 33)] + [(m, m) for m in range(2, 33)]:
            cut = [replace(self, section=(i, m, j, n)) for i in range(m) for j in range(n)]
            if max(c.largest_value() for c in cut) <= limit:
                return cut
        raise ValueError(f"no sections of this pool have values of at most {limit}")


def _remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a cache: a network asks for the same few windows at every call.

    torch.compile traces through the function itself; it would warn of the cache.
    """
    cached = lru_cache(maxsize=1024)(function)

    def call(*args: Any) -> Any:
        return function(*args) if torch.compiler.is_compiling() else cached(*args)

    return call


@_remembered
def _windows(spec: PoolSpec, size: int, axis: int) -> tuple[int, ...]:
    values = _whole_windows(spec, size, axis)
    part, parts = spec.section[2 * axis : 2 * axis + 2]
    if parts > 1:
        for i in range(0, len(values), 3):
            first, end = values[i], values[i + 1]
            values[i] = first + (end - first) * part // parts
            values[i + 1] = first + (end - first) * (part + 1) // parts
    return tuple(values)


def _divisors(spec: PoolSpec, height: int, width: int) -> set[int]:
    rows, cols = _windows(spec, height, 0), _windows(spec, width, 1)
    return {h * w for h in set(rows[2::3]) for w in set(cols[2::3])}


@_remembered
def _common_multiple(spec: PoolSpec, height: int, width: int) -> int:
    return lcm(*_divisors(spec, height, width))


def _check_windows(windows: int) -> None:
    if windows > MAX_POOL_WINDOWS:
        raise ValueError(f"pooling: {windows} windows along an axis; at most {MAX_POOL_WINDOWS} are possible")


def _whole_windows(spec: PoolSpec, size: int, axis: int) -> list[int]:
    """The windows before a section is cut out of them."""
    if spec.spreads:
        factor, phase = spec.spread[axis], None if spec.phase is None else spec.phase[axis]
        _check_windows(size * factor)
        taken = [(i // factor, phase is None or i % factor == phase) for i in range(size * factor)]
        return [v for at, there in taken for v in (at, at + there, 1)]
    if spec.output is not None:
        out = spec.output[axis] or size
        _check_windows(out)
        edges = [(floor(i * size / out), ceil((i + 1) * size / out)) for i in range(out)]
        return [v for first, end in edges for v in (first, end, end - first)]
    assert spec.kernel is not None
    k, s, p = spec.kernel[axis], spec.stride[axis], spec.padding[axis]
    if spec.border is not None:
        _check_windows(size + 2 * p)
        if spec.border != "replicate" and p > size - (spec.border == "reflect"):
            raise ValueError(f"pooling: a {spec.border} border of {p} is too wide for an input of {size}")
        return [v for i in range(-p, size + p) for at in [BORDERS[spec.border](i, size)] for v in (at, at + 1, 1)]
    span = size + 2 * p - k
    if span < 0:
        raise ValueError(f"pooling: an input of {size} with padding {p} is smaller than the window of {k}")
    out = (ceil(span / s) if spec.ceil_mode else span // s) + 1
    if spec.ceil_mode and (out - 1) * s >= size + p:
        out -= 1  # PyTorch: the last window must start inside the input or its left padding
    _check_windows(out)
    values: list[int] = []
    for i in range(out):
        start = i * s - p
        end = min(start + k, size + p)
        first, last = min(max(start, 0), size), min(max(end, 0), size)
        divisor = end - start if spec.count_include_pad else last - first
        values += (first, last, divisor)
    if spec.divisor_override:
        values[2::3] = [spec.divisor_override if axis == 0 else 1] * out
    return values


def _given(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _stored(spreads: bool, borders: bool) -> tuple[str, ...]:
    """The fields that a file has: those since format 4 where a pool spreads, that since 5 where it has a border."""
    always = (
        "kind", "kernel", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override", "output",
        "multiple", "section",
    )  # fmt: skip
    return (*always, *(("spread", "phase") if spreads else ()), *(("border",) if borders else ()))


def largest_value(rows: Sequence[int], cols: Sequence[int], multiple: int) -> int:
    """Largest value of a pool over inputs of one; multiple = 0 takes bare sums."""
    largest = 0
    for h, hd in {(e - s, d) for s, e, d in zip(rows[0::3], rows[1::3], rows[2::3], strict=True)}:
        for w, wd in {(e - s, d) for s, e, d in zip(cols[0::3], cols[1::3], cols[2::3], strict=True)}:
            largest = max(largest, h * w * (multiple // (hd * wd) if multiple else 1))
    return largest
