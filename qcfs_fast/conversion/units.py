"""The integer grid of a spiking layer: which unit each output channel counts in.

Everything that a neuron integrates is rounded to whole units of its channel, so that its membrane is an integer. For
every output channel the threshold theta is n units, n even, and the more units, the finer the weights. n is as large as
three limits allow (operators/limits.py):

    digits    |w| <= 32639 = 127 * 256 + 127, two signed base-256 digits; 8355711 with three, 24-bit weights
    overflow  n/2 + T * (sum_k |w_k| peak_k + |b| + residuals) < 2^31 for T up to max_T; offset neurons need more
    2^24      beyond which nothing is gained; 2^30 with 24-bit weights

Rounding is not always needed. If all values of a channel are multiples of theta/n for some n within the limits (powers
of two are tried first, then odd multiples of them), that n is taken and conversion changes nothing: the channel is
lossless, ties of a membrane with its threshold included. With 8-bit weights the grid is the same and a weight is a
multiple of 256 units, of which the int8 keeps the quotient. With 24-bit weights it is the second limit that most layers
meet: a weight then has as many bits as fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import ConversionError
from ..operators.limits import (
    ANALOG_RANGE,
    MAX_BYTE_WEIGHT,
    MAX_LONG_THRESHOLD,
    MAX_LONG_WEIGHT,
    MAX_SUM,
    MAX_THRESHOLD,
    MAX_WEIGHT,
    overflow_free_steps,
)
from ..operators.neuron import Neuron

Operand = tuple[np.ndarray, int]  # weights [K, O] or amplitudes [O], and the largest integer (peak) that meets them


@dataclass
class QuantizedLayer:
    """A layer in units of its channels: weights [K, O] per product, in the smallest integers that hold them, and
    amplitudes [O] per residual, int64."""

    threshold: np.ndarray  # int64 [O], n
    unit: np.ndarray  # float64 [O], theta / n
    weights: list[np.ndarray]  # in units, multiples of 256 for 8 bits
    amplitudes: list[np.ndarray]
    bias: np.ndarray
    lossless: np.ndarray  # bool [O]
    weight_levels: np.ndarray  # largest |w| in units [O]
    max_steps: int  # largest T for which overflow is impossible
    scarce_bits: float | None  # bits left for the weights of the worst channel, if overflow took more than three of 16
    error: np.ndarray | None = None  # float64 [O]: of a step's rounded terms, times their peaks, in units: the norm;
    # None: each was rounded to its nearest


def join(parts: Iterable[QuantizedLayer], channels: int) -> QuantizedLayer:
    """One layer of blocks of its output channels, each let go before the next is made."""
    found: list[QuantizedLayer] = []
    weights: list[np.ndarray] = []
    at = 0
    for part in parts:
        weights = weights or [np.empty((w.shape[0], channels), w.dtype) for w in part.weights]
        for whole, w in zip(weights, part.weights, strict=True):
            whole[:, at : at + w.shape[1]] = w
        at += part.threshold.size
        found.append(replace(part, weights=[]))

    def joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(arrays, axis=-1)

    return QuantizedLayer(
        threshold=joined([p.threshold for p in found]),
        unit=joined([p.unit for p in found]),
        weights=weights,
        amplitudes=[joined(a) for a in zip(*(p.amplitudes for p in found), strict=True)],
        bias=joined([p.bias for p in found]),
        lossless=joined([p.lossless for p in found]),
        weight_levels=joined([p.weight_levels for p in found]),
        max_steps=min(p.max_steps for p in found),
        scarce_bits=min((p.scarce_bits for p in found if p.scarce_bits is not None), default=None),
    )


def weight_grid(weight_bits: int) -> tuple[int, int]:
    """The step of a weight's grid in units, and the largest number of steps."""
    return {8: (256, MAX_BYTE_WEIGHT), 16: (1, MAX_WEIGHT), 24: (1, MAX_LONG_WEIGHT)}[weight_bits]


def split(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The upper digits of integers and the lowest one, base 256: w = 256 * upper + lowest, lowest in -128 .. 127."""
    lowest = (w + 128) % 256 - 128
    return (w - lowest) // 256, lowest


def _odd_bases() -> list[int]:
    return [*range(3, 64, 2), 75, 81, 225]


def _is_whole(values: np.ndarray, step: np.ndarray, exact: bool) -> np.ndarray:
    """Per channel (last axis): whether values * step are all whole numbers."""
    scaled = values * step
    error = np.abs(scaled - np.rint(scaled))
    return np.all(error == 0 if exact else error <= 1e-7, axis=0)


def choose(
    name: str,
    theta: np.ndarray,
    weights: Sequence[Operand],
    amplitudes: Sequence[Operand],
    bias: np.ndarray,
    weight_bits: int,
    max_T: int,
    analog: bool,
    neuron: Neuron = Neuron(),  # noqa: B008 - it is frozen
) -> QuantizedLayer:
    """Quantise one layer.

    Weights are effective (input amplitude folded in), float64 [K, O]; the bias is [O], or one for each step [T, O]; all
    else is [O]. `max_T` steps of `neuron` must fit.
    """
    bias = np.atleast_2d(bias)
    # The largest n: what a step can add to a membrane must fit, and the largest weight must fit its digits.
    largest = np.zeros(theta.size)
    for w, _ in weights:
        if not np.isfinite(w).all():
            raise ConversionError(f"{name}: weights are not finite (NaN or infinity); check the trained model")
        if w.shape[0]:
            largest = np.maximum(largest, np.abs(w).max(0))
    limit = _largest_threshold(name, theta, largest, weights, amplitudes, bias, weight_bits, max_T, analog, neuron)

    # The n taken: one that makes the channel lossless, or else simply the largest even one.
    values = [(w, weight_bits == 8) for w, _ in weights]
    values += [(v, False) for v in (*(a[None] for a, _ in amplitudes), bias)]
    exact, lossless = _lossless_thresholds(theta, values, limit)
    threshold = np.where(lossless, exact, 2 * np.floor(limit / 2))

    # Everything in units of theta / n.
    step = threshold / theta
    digit, max_weight = weight_grid(weight_bits)
    integers = np.int32 if weight_bits == 24 else np.int16
    whole = [
        (np.clip(np.rint(w * (step / digit)), -max_weight, max_weight) * digit).astype(integers) for w, _ in weights
    ]
    whole_amplitudes = [np.rint(a * step).astype(np.int64) for a, _ in amplitudes]
    whole_bias = np.rint(bias * step).astype(np.int64)
    n = threshold.astype(np.int64)
    levels = np.rint(largest * step).astype(np.int64)

    # The promise is made of the rounded integers, since loading checks it with these.
    peaks = [peak for _, peak in [*weights, *amplitudes]]
    operands = [*zip([*whole, *whole_amplitudes], peaks, strict=True)]
    most_bias = np.abs(whole_bias).max(0)
    max_steps = overflow_free_steps(n, most_bias, operands, analog)
    enough = overflow_free_steps(n, most_bias, operands, analog, *neuron.shift)
    if enough < max_T:
        raise ConversionError(f"{name}: overflow is possible from T={enough + 1} on; use a smaller max_T")
    whole_bias = whole_bias[0] if whole_bias.shape[0] == 1 else whole_bias

    # A channel that reaches 2^20 has bits enough, and one that is lossless needs no more.
    used = levels[(levels > 0) & ~lossless & (n < 2**20)]
    bits = float(np.log2(max(int(used.min()), 1)) + 1) if used.size else None
    scarce_bits = bits if bits is not None and bits < min(weight_bits, 16) - 3 else None
    return QuantizedLayer(n, theta / n, whole, whole_amplitudes, whole_bias, lossless, levels, max_steps, scarce_bits)


def _largest_threshold(
    name: str,
    theta: np.ndarray,
    largest: np.ndarray,
    weights: Sequence[Operand],
    amplitudes: Sequence[Operand],
    bias: np.ndarray,
    weight_bits: int,
    max_T: int,
    analog: bool,
    neuron: Neuron,
) -> np.ndarray:
    """The largest n that the three limits allow, float64 [O]; `largest` is the largest |w| of each channel."""
    # reach: the most that one step can add to a membrane, in the unit of theta. inputs: its rounded terms.
    reach = np.abs(bias).max(0).astype(np.float64)
    inputs = 1.0 + sum(peak for _, peak in amplitudes)  # the bias counts once
    for w, peak in weights:
        reach += np.abs(w).sum(0) * peak
        inputs += w.shape[0] * peak
    for a, peak in amplitudes:
        reach += np.abs(a) * peak
    if not np.isfinite(reach).all():
        raise ConversionError(f"{name}: bias or amplitudes are not finite (NaN or infinity); check the trained model")
    if analog:
        reach += ANALOG_RANGE * theta
    # Each rounded term may exceed its exact value by half a unit (128 units at 8 bits).
    slack = inputs * weight_grid(weight_bits)[0] / 2
    # n/2 + iterations * n + steps * (n * reach / theta + slack) <= 2^31 - 1, solved for n.
    window, iterations = neuron.shift
    steps = max_T + iterations * window
    limit = (MAX_SUM - steps * slack) / (0.5 + iterations + steps * reach / theta)
    if weight_bits == 8 and slack * steps > MAX_SUM / 2:
        raise ConversionError(f"{name}: {inputs:.0f} inputs over {max_T} steps do not fit 32 bits; use a smaller max_T")
    max_weight, max_threshold = (
        (MAX_LONG_WEIGHT, MAX_LONG_THRESHOLD) if weight_bits == 24 else (MAX_WEIGHT, MAX_THRESHOLD)
    )
    with np.errstate(divide="ignore"):
        by_digits = np.where(largest > 0, max_weight * theta / largest, np.inf)
    limit = np.minimum(np.minimum(limit, max_threshold), by_digits)
    if (limit < 2).any():
        c = int(np.argmin(limit))
        raise ConversionError(
            f"{name}: channel {c} has threshold {theta[c]:.3g}, largest weight {largest[c]:.3g} and can integrate "
            f"{reach[c]:.3g} a step; over {max_T} steps that leaves no resolution in 32 bits. "
            "Use a smaller max_T, or train with a larger threshold"
        )
    return limit


def _lossless_thresholds(
    theta: np.ndarray, values: Sequence[tuple[np.ndarray, bool]], limit: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Per channel an n up to `limit` for which no value needs rounding, and whether there is one.

    `values` are [K, O], each with whether it has to be a multiple of 256 units and not of one.
    """
    chosen, lossless = np.zeros(theta.size), np.zeros(theta.size, dtype=bool)
    # Some sixteen rows rule out almost every channel that has to be rounded; all rows are read for the others alone.
    probe = [(v[:: max(1, v.shape[0] // 16)], coarse) for v, coarse in values]
    for base in [1, *_odd_bases()]:
        # The largest base * 2^k within the limit: a multiple of all smaller ones, so no other k need be tried.
        with np.errstate(divide="ignore"):
            n = base * 2.0 ** np.floor(np.log2(limit / base))
        n = np.where(base == 1, np.maximum(n, 2), n)
        candidates = ~lossless & (n >= 2 * base) & (n <= limit)
        for v, coarse in [*probe, *values]:
            if not candidates.any():
                break
            step = n / theta / (256 if coarse else 1)
            candidates[candidates] = _is_whole(v[:, candidates], step[candidates], base == 1)
        chosen = np.where(candidates, n, chosen)
        lossless |= candidates
        if lossless.all():
            break
    return chosen, lossless


def choose_weight_scale(w: np.ndarray, weight_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The unit of weights [K, O] of 16 bits (or 24) per channel, and whether it is exact.

    It is for the analog first layer and the readout: their sums are scaled in double, so the unit need not divide a
    threshold. A power of two is taken where all weights are multiples of it, and the largest / 32639 (or 8355711)
    elsewhere.
    """
    max_weight = MAX_LONG_WEIGHT if weight_bits == 24 else MAX_WEIGHT
    largest = np.abs(w).max(0) if w.shape[0] else np.zeros(w.shape[1])
    safe = np.where(largest > 0, largest, 1.0)
    dyadic = 2.0 ** -np.floor(np.log2(max_weight / safe))
    exact = _is_whole(w, 1 / dyadic, True)
    return np.where(exact, dyadic, safe / max_weight), exact


def choose_analog_unit(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit and threshold n of a layer that integrates the analog image alone.

    The unit is a power of two near theta / 2^24, so a dyadic current is exact; a float32 theta is then an even
    number of units too. The current of an image that stays is clipped to [0, theta], which changes no spike,
    so there is no bound on T.
    """
    unit = 2.0 ** (np.floor(np.log2(theta)) - 24)
    n = 2 * np.rint(theta / unit / 2)
    return theta / n, n.astype(np.int64)
