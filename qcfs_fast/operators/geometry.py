"""The geometry of a convolution: nine ints, kernel, stride, padding and dilation (each height, width) and groups."""

from __future__ import annotations

from collections.abc import Sequence

GEOMETRY = 9
POINTWISE = (1, 1, 1, 1, 0, 0, 1, 1, 1)


def split(geometry: Sequence[int]) -> list[tuple[int, ...]]:
    """The geometries of several convolutions, which travel as one flat list."""
    return [tuple(geometry[i : i + GEOMETRY]) for i in range(0, len(geometry), GEOMETRY)]


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Outputs of a convolution along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def convolution_size(height: int, width: int, g: Sequence[int]) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    return out_size(height, g[0], g[2], g[4], g[6]), out_size(width, g[1], g[3], g[5], g[7])
