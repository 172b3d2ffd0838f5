"""Rounding of weights by data: errors that compensate each other, for the inputs that a layer really receives.

A neuron integrates w . x + b. If its weights are rounded with errors e (exact minus rounded) and its bias with error d,
its current is off by e . x + d. Over the data, with mu and C the mean and the covariance of x,

    E[(e . x + d)^2]  =  e' C e  +  (e . mu + d)^2

Rounding each weight to its nearest grid point makes every e small by itself. But inputs of a layer are correlated, and
then e can be chosen so that its parts cancel. With the Cholesky factor C = R' R, R upper triangular, the first term is

    e' C e  =  sum_k R_kk^2 (e_k + sum_{j > k} R_kj / R_kk e_j)^2

Term k holds the errors of the weights k, k+1, ... alone. So weights are rounded from the last to the first, and each
goes to the grid point that makes its term least, given the errors behind it:

    w_k + sum_{j > k} (R_kj / R_kk) e_j   is rounded instead of w_k

Weights whose inputs vary much are rounded early, while there are others left to make up for their errors. The bias
comes last. Its grid is at least as fine as that of the weights, and it takes up the mean error: b + e . mu is rounded
instead of b.

Source: GPTQ (Frantar et al., ICLR 2023), which removes the rounded inputs one by one from the inverse of E[x x']; the
factor above says the same without an inverse. Here the bias takes part, so the covariance stands in place of the second
moments.

Which x? The spikes (or window sums) that the network converted so far sends to the layer, averaged over the T time
steps. These are what the integers will meet. A membrane potential sums its currents, so an error that changes its sign
between two steps cancels and one that stays adds up; the average over time weighs them so. Sums of spikes over time and
data are whole numbers, exact in float64, and so depend neither on the order of summation nor on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..network.layers import IMAGE, PIXELS, EncodingLayer, ImageInput, Layer, Run, SpikingLayer, Values, counted
from ..network.schema import Geometry
from ..operators.geometry import convolution_size
from ..operators.limits import CHUNK, overflow_free_steps
from ..operators.neuron import Neuron
from .units import QuantizedLayer, weight_grid

DAMPING = 0.01  # of the mean variance, added to all: errors shall not rely on correlations that the data show by chance
WINDOWS = 1 << 16  # that are read of a layer's input; more are sampled
ENTRIES = 1 << 24  # of a layer's covariances; where they would have more, inputs are divided into blocks
PANEL = 128  # weights rounded before their errors are passed on to all others in one product

Read = tuple[Sequence[str], Geometry]  # what one product reads: the nodes whose integers add up, and its geometry


@dataclass
class Moments:
    """Mean [G, K] and covariance of the inputs of each of G groups of output channels, float64.

    The covariance is [G, B, B] for each block of B inputs. All K inputs are one block unless that takes too much
    memory; errors compensate each other within a block, and the bias takes up the mean error of all.
    """

    mean: Tensor
    covariance: list[Tensor]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The inputs of each block, and their covariance."""
        start = 0
        for c in self.covariance:
            yield slice(start, start + c.shape[1]), c
            start += c.shape[1]


def checked_batches(data: Any, channels: int, dims: int) -> list[Tensor]:
    """The image batches in `data`, or an error that says what is wrong with them."""
    remedy = "give an iterable of image batches, such as a DataLoader or [images]"
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(f"convert: data is a {type(data).__name__}; {remedy}")
    shape = f"[N, {channels}{PIXELS[dims]}]"
    batches = []
    for batch in data:
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, Tensor):
            raise TypeError(f"convert: data holds a {type(x).__name__}; {remedy}")
        if not x.is_floating_point():
            raise TypeError(f"convert: data holds {x.dtype}; scale images to floats as for the network itself")
        if x.dim() != dims or x.shape[1] != channels:
            raise ValueError(f"convert: data holds a batch of shape {list(x.shape)}, expected {shape}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError("convert: data holds NaN or infinity; clean the images first")
        if x.numel():
            batches.append(x.detach().cpu())
    if not batches:
        raise ValueError("convert: data is empty; give at least one batch of images (a thousand images are enough)")
    return batches


class Prefix:
    """The nodes converted so far, and what they answer to the data in a run of T time steps."""

    def __init__(self, batches: Sequence[Tensor], run: Run) -> None:
        self.T, self.run = run.T, run
        self.nodes: dict[str, Layer] = {}
        self.values: list[Values] = [{IMAGE: x} for x in batches]

    def add(self, name: str, layer: Layer) -> None:
        """Take in the next node. Spikes are kept; pools are made again where they are read."""
        self.nodes[name] = layer
        if isinstance(layer, (ImageInput, EncodingLayer, SpikingLayer)):
            for values in self.values:
                values[name] = self._value(values, name)

    def keep(self, names: Collection[str]) -> None:
        """Let go of the answers of all other nodes."""
        for values in self.values:
            for name in values.keys() - names:
                del values[name]

    def _value(self, values: Values, name: str) -> Any:
        if name in values:
            return values[name]
        layer = self.nodes[name]
        return layer({i: self._value(values, i) for i in layer.inputs}, self.run)

    def moments(self, products: Sequence[Read], vector: bool) -> Moments:
        """Mean and covariance of what the products of one layer read.

        The K inputs of a group are those of the products one after the other, each [KH, KW, C/groups].
        """
        groups = math.lcm(*(g[8] for _, g in products))
        count, total = 0, torch.zeros(())
        second: list[Tensor] = []
        for rows in self._windows(products, vector, groups):
            blocks = torch.split(rows, _block(groups, rows.shape[2]), 2)
            if not count:
                total = rows.new_zeros(groups, rows.shape[2])
                second = [rows.new_zeros(groups, b.shape[2], b.shape[2]) for b in blocks]
            count += rows.shape[1]
            total += rows.sum(1)
            for s, b in zip(second, blocks, strict=True):
                s += b.mT @ b
        moments = Moments(total / (count * self.T), second)
        for inputs, c in moments.blocks():
            c /= count * self.T**2
            c -= moments.mean[:, inputs, None] * moments.mean[:, None, inputs]
        return moments

    def _windows(self, products: Sequence[Read], vector: bool, groups: int) -> Iterator[Tensor]:
        """Windows of the layer's input, some at a time, summed over the time steps: float64 [groups, M, K]."""
        generator = torch.Generator().manual_seed(0)
        share = -(-WINDOWS // len(self.values))
        for values in self.values:
            inputs = [self._counts(values, names, vector) for names, _ in products]
            N, H, W, _ = inputs[0].shape
            height, width = convolution_size(H, W, products[0][1])
            chosen = torch.randperm(N * height * width, generator=generator)[:share].sort().values
            read = [(F.pad(x, (0, 0, g[5], g[5], g[4], g[4])), g) for x, (_, g) in zip(inputs, products, strict=True)]
            size = sum(g[0] * g[1] * x.shape[3] * groups // g[8] for x, g in read)
            for part in torch.split(chosen, max(1, CHUNK // size)):
                at = part // (height * width), part // width % height, part % width
                yield torch.cat([_gather(x, g, *at).repeat_interleave(groups // g[8], 0) for x, g in read], 2)

    def _counts(self, values: Values, names: Sequence[str], vector: bool) -> Tensor:
        """The sum of some nodes' integers over all time steps: int32 [N, H, W, C]; a vector is one pixel."""
        counts = [counted(self._value(values, n), self.run)[0] for n in names]
        total = torch.stack(counts).sum(0, dtype=torch.int32)
        return total.flatten(1)[:, None, None] if vector else total


def _block(groups: int, inputs: int) -> int:
    """Inputs of a block: all, or a part of about equal size of which the covariances fit."""
    parts = -(-inputs // max(1, math.isqrt(ENTRIES // groups)))
    return -(-inputs // parts)


def _gather(padded: Tensor, g: Geometry, n: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The windows at outputs (n, y, x) of a padded map [N, H, W, C]: float64 [groups, M, KH * KW * C/groups]."""
    rows = (y * g[2])[:, None, None] + g[6] * torch.arange(g[0])[:, None]
    columns = (x * g[3])[:, None, None] + g[7] * torch.arange(g[1])
    taps = padded[n[:, None, None], rows, columns].to(torch.float64)  # [M, KH, KW, C]
    return taps.reshape(len(n), g[0] * g[1], g[8], -1).permute(2, 0, 1, 3).flatten(2)


def round_sequentially(w: Tensor, covariance: Tensor, largest: int) -> Tensor:
    """Whole numbers near w that keep e' C e small, e = w - result.

    Args:
        w: float64 [G, K, O], in steps of its grid.
        covariance: float64 [G, K, K], C.
        largest: magnitude that the result keeps to.
    """
    variance = covariance.diagonal(dim1=1, dim2=2)
    order = variance.argsort(dim=1, stable=True)
    damped = covariance.gather(1, order[:, :, None].expand_as(covariance))
    damped = damped.gather(2, order[:, None].expand_as(covariance))
    mean = variance.mean(1, keepdim=True)
    damped.diagonal(dim1=1, dim2=2).add_(torch.where(mean > 0, DAMPING * mean, 1.0))
    factor = torch.linalg.cholesky(damped, upper=True)
    factor /= factor.diagonal(dim1=1, dim2=2)[:, :, None].clone()

    index = order[:, :, None].expand_as(w)
    exact = w.gather(1, index)
    whole, error = torch.empty_like(w), torch.zeros_like(w)
    for end in range(w.shape[1], 0, -PANEL):
        start = max(0, end - PANEL)
        wanted = exact[:, start:end] + factor[:, start:end, end:] @ error[:, end:]
        for k in reversed(range(start, end)):
            compensating = factor[:, k : k + 1, k + 1 : end] @ error[:, k + 1 : end]
            whole[:, k] = (wanted[:, k - start] + compensating[:, 0]).round().clamp(-largest, largest)
            error[:, k] = exact[:, k] - whole[:, k]
    return torch.empty_like(w).scatter_(1, index, whole)


def compensated(
    layer: QuantizedLayer,
    weights: Sequence[np.ndarray],
    bias: np.ndarray,
    peaks: Sequence[int],
    moments: Moments,
    weight_bits: int,
    max_T: int,
    analog: bool,
    neuron: Neuron,
) -> QuantizedLayer:
    """The layer with weights and bias rounded anew for inputs with these moments.

    A channel keeps its weights, each rounded to the nearest, where they serve the data better, and its bias as well
    where its membrane could otherwise leave 32 bits within max_T steps of `neuron`. A lossless channel has no errors to
    compensate, so nothing of it changes.

    Args:
        layer: the layer, rounded value by value.
        weights, bias: what was rounded, float64 [K, O] per product and [O], or a bias for each step
            [steps, O].
        peaks: largest integers that meet the weights, then the residual amplitudes.
    """
    step, largest = weight_grid(weight_bits)
    groups = moments.mean.shape[0]

    def grouped(parts: Sequence[np.ndarray]) -> Tensor:
        """[K, O] per product, in units -> [G, K, O/G], in steps of the grid."""
        joined = torch.from_numpy(np.concatenate(parts) / step)
        return joined.reshape(joined.shape[0], groups, -1).transpose(0, 1).contiguous()

    def completed(whole: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The bias for these weights, and E[(e . x + d)^2] with it, in units."""
        error = (exact - whole) * step
        wanted = bias / layer.unit + (error * moments.mean[:, :, None]).sum(1).flatten().numpy()
        cost = sum((error[:, b] * (c @ error[:, b])).sum(1) for b, c in moments.blocks())
        assert isinstance(cost, Tensor)
        rest = np.atleast_2d(wanted - np.rint(wanted))  # all steps take up the same mean error
        return np.rint(wanted), cost.flatten().numpy() + (rest**2).mean(0)

    exact, nearest = grouped([w / layer.unit for w in weights]), grouped(layer.weights)
    found = torch.cat([round_sequentially(exact[:, b], c, largest) for b, c in moments.blocks()], 1)
    (nearest_bias, nearest_cost), (found_bias, found_cost) = completed(nearest), completed(found)
    better = found_cost < nearest_cost
    flat = (found.transpose(0, 1).flatten(1) * step).numpy()
    parts = np.split(flat, np.cumsum([w.shape[0] for w in weights])[:-1])
    whole = [np.where(better, new.astype(old.dtype), old) for new, old in zip(parts, layer.weights, strict=True)]
    whole_bias = np.where(better, found_bias, nearest_bias).astype(np.int64)

    def steps(neuron: Neuron, channels: slice = slice(None)) -> int:
        terms = zip([*whole, *layer.amplitudes], peaks, strict=True)
        own = [(w[..., channels], peak) for w, peak in terms]
        largest_bias = np.abs(np.atleast_2d(whole_bias)).max(0)[channels]
        return overflow_free_steps(layer.threshold[channels], largest_bias, own, analog, *neuron.shift)

    if steps(neuron) < max_T:
        for c in range(layer.threshold.size):
            if steps(neuron, slice(c, c + 1)) < max_T:
                for new, old in zip([*whole, whole_bias], [*layer.weights, layer.bias], strict=True):
                    new[..., c] = old[..., c]
    square = 0.25 * (1 + sum(peak**2 for peak in peaks[len(weights) :]))  # of the bias and the residuals
    for w, found_w, peak in zip(weights, whole, peaks, strict=False):
        square = square + peak**2 * np.square(w / layer.unit - found_w).sum(0)
    return replace(layer, weights=whole, bias=whole_bias, max_steps=steps(Neuron()), error=np.sqrt(square))
