"""The integer grid of a spiking layer: which unit each output channel counts in.

For every output channel the threshold is n units, n even, and weights, bias and residual amplitudes are rounded
to whole units. n is as large as three limits allow:

    digits    |w| <= 32639 = 127 * 256 + 127, two signed base-256 digits
    overflow  n/2 + T * (sum_k |w_k| peak_k + |b| + residuals) < 2^31 for T up to max_T
    2^24      beyond which nothing is gained

If all values of a channel are multiples of theta/n for some such n (powers of two first, then odd multiples
of them), that n is taken and conversion changes nothing: it is lossless, ties included. With 8-bit weights
the grid is the same and a weight is a multiple of 256 units, of which the int8 keeps the quotient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ConversionError
from ..operators.limits import ANALOG_RANGE, MAX_BYTE_WEIGHT, MAX_SUM, MAX_THRESHOLD, MAX_WEIGHT, overflow_free_steps


@dataclass
class Grid:
    """Quantised layer: per product weights [K, O] and per identity amplitudes [O], all int64."""

    threshold: np.ndarray  # int64 [O], n
    unit: np.ndarray  # float64 [O], theta / n
    weights: list[np.ndarray]  # in units, multiples of 256 for 8 bits
    amplitudes: list[np.ndarray]
    bias: np.ndarray
    lossless: np.ndarray  # bool [O]
    weight_levels: np.ndarray  # largest |w| in units [O]
    max_steps: int  # largest T for which overflow is impossible
    narrow: float  # bits of the worst channel's weights where the overflow limit costs more than three, else 0


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
    weights: Sequence[np.ndarray],
    weight_peaks: Sequence[int],
    amplitudes: Sequence[np.ndarray],
    amplitude_peaks: Sequence[int],
    bias: np.ndarray,
    weight_bits: int,
    max_T: int,
    analog: bool,
) -> Grid:
    """Quantise one layer. Weights are effective (input amplitude folded in), float64 [K, O]; all else [O]."""
    O = theta.size
    largest = np.zeros(O)
    reach = np.abs(bias).astype(np.float64)
    inputs = 1.0 + len(amplitudes)
    for w, peak in zip(weights, weight_peaks, strict=True):
        if not np.isfinite(w).all():
            raise ConversionError(f"{name}: weights are not finite (NaN or infinity); check the trained model")
        if w.shape[0]:
            largest = np.maximum(largest, np.abs(w).max(0))
        reach += np.abs(w).sum(0) * peak
        inputs += w.shape[0] * peak
    for a, peak in zip(amplitudes, amplitude_peaks, strict=True):
        reach += np.abs(a) * peak
    if not np.isfinite(reach).all():
        raise ConversionError(f"{name}: bias or amplitudes are not finite (NaN or infinity); check the trained model")
    if analog:
        reach += ANALOG_RANGE * theta
    # Each rounded term may exceed its exact value by half a unit (128 units at 8 bits).
    slack = inputs * (0.5 if weight_bits == 16 else 128.0)
    limit = (MAX_SUM - max_T * slack) / (0.5 + max_T * reach / theta)
    if weight_bits == 8 and slack * max_T > MAX_SUM / 2:
        raise ConversionError(f"{name}: {inputs:.0f} inputs over {max_T} steps do not fit 32 bits; use a smaller max_T")
    with np.errstate(divide="ignore"):
        limit = np.minimum(
            np.minimum(limit, MAX_THRESHOLD), np.where(largest > 0, MAX_WEIGHT * theta / largest, np.inf)
        )
    if (limit < 2).any():
        c = int(np.argmin(limit))
        raise ConversionError(
            f"{name}: channel {c} has threshold {theta[c]:.3g}, largest weight {largest[c]:.3g} and can integrate "
            f"{reach[c]:.3g} a step; over {max_T} steps that leaves no resolution in 32 bits. "
            "Use a smaller max_T, or train with a larger threshold"
        )

    everything = [*weights, *(a[None] for a in amplitudes), bias[None]]
    probe = [v[:: max(1, v.shape[0] // 16)] for v in everything]
    threshold = 2 * np.floor(limit / 2)
    lossless = np.zeros(O, dtype=bool)
    for base in [1, *_odd_bases()]:
        with np.errstate(divide="ignore"):
            n = base * 2.0 ** np.floor(np.log2(limit / base))
        n = np.where(base == 1, np.maximum(n, 2), n)
        candidates = ~lossless & (n >= 2 * base) & (n <= limit)
        for values in (probe, everything):
            for i, v in enumerate(values):
                if not candidates.any():
                    break
                step = n / theta / (256 if weight_bits == 8 and i < len(weights) else 1)
                candidates[candidates] = _is_whole(v[:, candidates], step[candidates], base == 1)
        threshold = np.where(candidates, n, threshold)
        lossless |= candidates
        if lossless.all():
            break

    step = threshold / theta
    digit = 256 if weight_bits == 8 else 1
    most = MAX_BYTE_WEIGHT if weight_bits == 8 else MAX_WEIGHT
    whole = [(np.clip(np.rint(w * (step / digit)), -most, most) * digit).astype(np.int64) for w in weights]
    whole_amplitudes = [np.rint(a * step).astype(np.int64) for a in amplitudes]
    whole_bias = np.rint(bias * step).astype(np.int64)
    n = threshold.astype(np.int64)
    levels = np.rint(largest * step).astype(np.int64)

    sources = [*zip(whole, weight_peaks, strict=True), *zip(whole_amplitudes, amplitude_peaks, strict=True)]
    max_steps = overflow_free_steps(n, whole_bias, sources, analog)
    if max_steps < max_T:
        raise ConversionError(f"{name}: overflow is possible from T={max_steps + 1} on; use a smaller max_T")
    used = levels[(levels > 0) & ~lossless & (n < 2**20)]
    bits = float(np.log2(max(int(used.min()), 1)) + 1) if used.size else 0.0
    narrow = bits if used.size and bits < weight_bits - 3 else 0.0
    return Grid(n, theta / n, whole, whole_amplitudes, whole_bias, lossless, levels, max_steps, narrow)


def choose_weight_scale(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit of 16-bit weights [K, O] for the analog first layer and the readout, per channel: a power of two
    where that is exact, else largest / 32639; and where it is exact."""
    largest = np.abs(w).max(0) if w.shape[0] else np.zeros(w.shape[1])
    safe = np.where(largest > 0, largest, 1.0)
    dyadic = 2.0 ** -np.floor(np.log2(MAX_WEIGHT / safe))
    exact = _is_whole(w, 1 / dyadic, True)
    return np.where(exact, dyadic, safe / MAX_WEIGHT), exact


def choose_analog_unit(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit and threshold n of a layer that integrates the analog image alone.

    The unit is a power of two near theta / 2^24, so a dyadic current is exact; a float32 theta is then an even
    number of units too. The current is clipped to [0, theta], which changes no spike of a constant current,
    so there is no bound on T.
    """
    unit = 2.0 ** (np.floor(np.log2(theta)) - 24)
    n = 2 * np.rint(theta / unit / 2)
    return theta / n, n.astype(np.int64)
