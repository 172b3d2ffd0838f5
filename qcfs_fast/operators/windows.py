"""Pooling windows as PyTorch defines them, as explicit integer lists.

An output row i of a pool covers input rows [first, end) and is divided by `divisor`; columns alike, and the
average's divisor is the product of both. Windows are lists of ints, three per output: first, end, divisor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor
from typing import Any


@dataclass(frozen=True)
class PoolSpec:
    """Geometry of an average ("avg") or maximum ("max") pool; `output` is set for adaptive pools.

    `multiple` is the common multiple of the window divisors: the integer value of a window is
    sum * multiple / divisor, so that one factor, 1/multiple, serves all positions. `size` is the height and
    width of the input it was settled for, where that matters. `section` = (i, m, j, n) sums only the i-th of m
    parts of each window's rows and the j-th of n parts of its columns: windows too large for a byte are cut.
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

    @property
    def pads(self) -> bool:
        return self.padding != (0, 0) or self.ceil_mode

    @property
    def depends_on_size(self) -> bool:
        """Whether windows may differ in size from each other or with the size of the input."""
        if self.output is not None:
            return True
        if self.divisor_override:
            return False
        return self.ceil_mode or (self.padding != (0, 0) and not self.count_include_pad)

    def windows(self, size: int, axis: int) -> list[int]:
        """Windows along one axis (0: rows, 1: columns) of an input of `size`; empty where a section has no rows."""
        values = self._whole_windows(size, axis)
        part, parts = self.section[2 * axis : 2 * axis + 2]
        if parts > 1:
            for i in range(0, len(values), 3):
                first, end = values[i], values[i + 1]
                values[i] = first + (end - first) * part // parts
                values[i + 1] = first + (end - first) * (part + 1) // parts
        return values

    def _whole_windows(self, size: int, axis: int) -> list[int]:
        if self.output is not None:
            out = self.output[axis] or size
            edges = [(floor(i * size / out), ceil((i + 1) * size / out)) for i in range(out)]
            return [v for first, end in edges for v in (first, end, end - first)]
        assert self.kernel is not None
        k, s, p = self.kernel[axis], self.stride[axis], self.padding[axis]
        span = size + 2 * p - k
        if span < 0:
            raise ValueError(f"pooling: an input of {size} with padding {p} is smaller than the window of {k}")
        out = (ceil(span / s) if self.ceil_mode else span // s) + 1
        if self.ceil_mode and (out - 1) * s >= size + p:
            out -= 1  # PyTorch: the last window must start inside the input or its left padding
        values: list[int] = []
        for i in range(out):
            start = i * s - p
            end = min(start + k, size + p)
            first, last = max(start, 0), min(end, size)
            divisor = end - start if self.count_include_pad else last - first
            values += (first, last, divisor)
        if self.divisor_override:
            values[2::3] = [self.divisor_override if axis == 0 else 1] * out
        return values

    def divisors(self) -> set[int]:
        """Divisors of all windows of an input of `size`, or of any input where size does not matter."""
        if not self.depends_on_size:
            assert self.kernel is not None
            return {self.divisor_override or self.kernel[0] * self.kernel[1]}
        assert self.size is not None
        rows, cols = self.windows(self.size[0], 0), self.windows(self.size[1], 1)
        return {h * w for h in set(rows[2::3]) for w in set(cols[2::3])}

    def largest_value(self) -> int:
        """Largest integer value of a window of ones."""
        if not self.depends_on_size:
            assert self.kernel is not None
            factor = self.multiple // (self.divisor_override or self.kernel[0] * self.kernel[1])
            return -(-self.kernel[0] // self.section[1]) * -(-self.kernel[1] // self.section[3]) * factor
        assert self.size is not None
        return largest_value(self.windows(self.size[0], 0), self.windows(self.size[1], 1), self.multiple)

    def sections(self, most: int) -> list[PoolSpec]:
        """This pool cut into sections whose window values are at most `most` on inputs of one."""
        for m, n in [(m, 1) for m in range(1, 33)] + [(m, m) for m in range(2, 33)]:
            cut = [replace(self, section=(i, m, j, n)) for i in range(m) for j in range(n)]
            if max(c.largest_value() for c in cut) <= most:
                return cut
        raise ValueError(f"a pool over inputs that need {most} units each has no sections small enough")


def largest_value(rows: Sequence[int], cols: Sequence[int], multiple: int) -> int:
    """Largest value of a pool over inputs of one; multiple = 0 takes bare sums."""
    most = 0
    for h, hd in {(e - s, d) for s, e, d in zip(rows[0::3], rows[1::3], rows[2::3], strict=True)}:
        for w, wd in {(e - s, d) for s, e, d in zip(cols[0::3], cols[1::3], cols[2::3], strict=True)}:
            most = max(most, h * w * (multiple // (hd * wd) if multiple else 1))
    return most


def spec_to(spec: PoolSpec) -> dict[str, Any]:
    return {
        "kind": spec.kind,
        "kernel": spec.kernel,
        "stride": spec.stride,
        "padding": spec.padding,
        "ceil_mode": spec.ceil_mode,
        "count_include_pad": spec.count_include_pad,
        "divisor_override": spec.divisor_override,
        "output": spec.output,
        "multiple": spec.multiple,
        "section": spec.section,
    }


def spec_from(config: Mapping[str, Any]) -> PoolSpec:
    pairs = {
        k: None if config[k] is None else tuple(config[k]) for k in ("kernel", "stride", "padding", "output", "section")
    }
    return PoolSpec(**{**config, **pairs})
