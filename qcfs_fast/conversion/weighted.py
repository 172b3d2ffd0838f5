"""Lowering of what has weights: convolution, linear layer, BatchNorm.

They turn a Signal into a Current; a layer that follows a Current becomes one with it, where that is exact.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators.geometry import POINTWISE
from .sizes import whole
from .symbolic import (
    Symbolic,
    float64,
    zeros,
)
from .values import (
    Current,
    Image,
    Joined,
    Product,
    Row,
    affine,
    composable,
    composed,
    dealt,
)

MOST_FEATURES = 4096  # that are looked at one by one: their weight has the square of it


class Weighted(Symbolic):
    """Convolution, linear layer and BatchNorm."""

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
        self._check_weights("convolution", weight, bias)
        weight = weight.detach().cpu()
        weight = weight.unsqueeze(2) if weight.dim() == 3 else weight  # of a line
        out, kernel, channels = weight.shape[0], tuple(weight.shape[2:]), weight.shape[1] * groups
        stride, dilation = self._pair(stride, 1), self._pair(dilation, 1)
        if isinstance(padding, str):
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
            if any(t % 2 and d > 1 for t, d in zip(total, dilation, strict=True)):
                raise self.fail("padding='same' with an even kernel and a dilation pads unevenly; use explicit padding")
            # What is padded unevenly gets a tap of zero on the side of less padding, and as much there.
            weight = F.pad(weight, (total[1] % 2, 0, total[0] % 2, 0))
            kernel, padding = tuple(weight.shape[2:]), (-(-total[0] // 2), -(-total[1] // 2))
        padding = self._pair(padding, 0)
        geometry = (*kernel, *stride, *padding, *dilation, groups)
        if isinstance(x, Current) and not x.vector:
            x = x if padding == (0, 0) else self._bias_as_spikes(x)
            x = x if composable(x, geometry) else self._by_taps(x)
            if composable(x, geometry):
                if x.channels != channels:
                    raise self.fail(f"expects {channels} channels, gets {x.channels}")
                return composed(x, weight, geometry, float64(bias, zeros(out)), self._layer())
        products = []
        for signal in self._sources(x, "is a convolution", channels):
            if signal.vector:
                raise self.fail("is a convolution of a flattened value")
            if signal.channels != channels:
                raise self.fail(f"expects {channels} channels, gets {signal.channels}")
            products += [
                Product(part, w, (*geometry[:8], own), False, self._layer())
                for part, w, own in dealt(weight, groups, signal)
            ]
        return Current(float64(bias, zeros(out)), tuple(products))

    def linear(self, x: Any, weight: Any, bias: Any = None) -> Any:
        if isinstance(x, Row):
            return replace(x, value=self.linear(x.value, weight, bias))
        self._check_weights("linear layer", weight, bias)
        weight = weight.detach().cpu()
        out, features = weight.shape
        if isinstance(x, Image) and x.map:  # one window as large as the image
            if features != math.prod(x.map):
                raise self.fail(f"expects {features} features, gets images of {math.prod(x.map)}")
            return replace(self.conv(replace(x, map=()), weight.reshape(out, *x.map), bias), vector=True)
        if isinstance(x, Current) and x.products and x.vector:
            if x.channels != features:
                raise self.fail(f"expects {features} features, gets {x.channels}")
            return composed(x, weight[:, :, None, None], POINTWISE, float64(bias, zeros(out)), self._layer())
        if isinstance(x, Current) and x.products and x.flattened:  # one window as large as the map
            if not whole(x.size):
                raise self._shape_needed("reads a flattened map whose size is not known")
            if features != x.channels * math.prod(x.size):
                raise self.fail(f"expects {features} features, gets {x.channels * math.prod(x.size)}")
            window = weight.reshape(out, x.channels, *x.size)
            return replace(self.conv(replace(x, flattened=False), window, bias), flattened=True, size=(1, 1))
        products = []
        for signal in self._sources(
            replace(x, vector=True) if isinstance(x, Image) else x, "is a linear layer", features
        ):
            if not signal.vector:
                if self.shapes is None and signal.parts[0].is_image:
                    raise self._shape_needed("is a linear layer on the image, which may be a map")
                raise self.fail("is a linear layer on a feature map; flatten it first")
            if features % signal.channels:
                raise self.fail(f"expects {features} features, gets a multiple of {signal.channels}")
            # The model flattens maps with the channel first, spikes are stored with it last: the weight becomes
            # [O, C, pixels, 1], a kernel as high as the map has pixels, and _fold moves the channel behind them.
            area = features // signal.channels
            geometry = (area, 1, 1, 1, 0, 0, 1, 1, 1)
            blocks = dealt(weight.reshape(out, signal.channels, area, 1), 1, signal)
            products += [Product(part, block, geometry, True, self._layer()) for part, block, _ in blocks]
        out_bias = float64(bias, zeros(out))
        if isinstance(x, Current):
            out_bias = out_bias + weight.double().reshape(out, x.channels, -1).sum(2) @ x.bias
        return Current(out_bias, tuple(products), (), True)

    def _by_feature(self, x: Any, numbers: int) -> Any:
        """A flattened image or map as a current for each of its features, where there are numbers for them."""
        if not self._is_flat(x) or isinstance(x, Joined) or numbers == 1:
            return x
        if x.vector if isinstance(x, Image) else numbers <= x.channels:
            return x
        if numbers > MOST_FEATURES:
            raise self.fail(
                f"has a number for each of {numbers} features of a flattened map. Remedy: a BatchNorm of the map, or "
                "numbers for its channels, before flatten"
            )
        return self.linear(x, torch.eye(numbers))

    def matmul(self, x: Any, weight: Any) -> Any:
        """A linear layer whose weight is [features, outputs]."""
        if self._is_constant(x) or not isinstance(weight, Tensor) or weight.dim() != 2:
            raise self.fail("multiplies matrices, and the second is no constant [features, outputs]")
        return self.linear(x, weight.t())

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
        gamma, beta = float64(weight, torch.ones_like(mean)), float64(bias, torch.zeros_like(mean))
        scale = gamma / torch.sqrt(var + eps)
        if not bool(torch.isfinite(scale).all()):
            raise self.fail("BatchNorm statistics are not finite; train or reset them")
        why_not = "BatchNorm of a value it does not fit"
        x = self._by_feature(x, mean.numel())
        current = x if isinstance(x, Joined) else self._current(x, mean.numel(), why_not)
        if current.channels != mean.numel():
            raise self.fail(why_not)
        return affine(current, scale, beta - mean * scale)
