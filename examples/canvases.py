"""Canvases with handwritten digits on them: the data of segmentation.py and detection.py.

The digits are scikit-learn's, 8x8 pixels. Those of the test are others than those of training.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

SIDE = 32  # pixels of a canvas
CELL = SIDE // 2  # a digit lies anywhere within a quarter of the canvas, so that none covers another


class Digit(NamedTuple):
    """A digit on a canvas: its class, and its strokes [size, size] in [0, 1] with their first row and column."""

    label: int
    pixels: Tensor
    top: int
    left: int

    @property
    def place(self) -> tuple[slice, slice]:
        size = self.pixels.shape[0]
        return slice(self.top, self.top + size), slice(self.left, self.left + size)


def canvases(count: int, test: bool, seed: int, largest: int = 8) -> tuple[Tensor, list[list[Digit]]]:
    """Images [count, 1, SIDE, SIDE] in [0, 1], and the digits on each; they are 8 to `largest` pixels wide."""
    digits = load_digits()
    of_test = torch.arange(len(digits.target)) % 4 == 0
    pixels = torch.from_numpy(digits.images).float()[of_test == test] / 16
    labels = torch.from_numpy(digits.target).long()[of_test == test]
    random = torch.Generator().manual_seed(seed)
    images = 0.2 * torch.rand(count, 1, SIDE, SIDE, generator=random)
    found: list[list[Digit]] = []
    for image in images[:, 0]:
        found.append([])
        for top in (0, CELL):
            for left in (0, CELL):
                if torch.rand((), generator=random) < 0.25:
                    continue
                i = int(torch.randint(len(labels), (), generator=random))
                digit, size = pixels[i], 8
                if largest > 8:
                    size = int(torch.randint(8, largest + 1, (), generator=random))
                    digit = F.interpolate(digit[None, None], size=(size, size), mode="bilinear")[0, 0]
                dy, dx = torch.randint(CELL - size + 1, (2,), generator=random).tolist()
                found[-1].append(Digit(int(labels[i]), digit, top + dy, left + dx))
                image[found[-1][-1].place] += 0.8 * digit
    return images, found
