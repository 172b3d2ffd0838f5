"""The contract in plain integers: numpy int64, one loop per step, written from the design and nothing else.

Deliberately naive and independent of the package's own reference: the membrane of every neuron is kept and
returned, so that tests can also ask whether thresholds were hit exactly.
"""

from dataclasses import dataclass

import numpy as np


def unpack(x, T):
    """Masks [ceil(T/8), ...] or counts [T, ...] -> int64 [T, ...]."""
    if x.shape[0] == T:
        return x.astype(np.int64)
    return np.stack([(x[t // 8].astype(np.int64) >> (t % 8)) & 1 for t in range(T)])


def pack(spikes):
    T = spikes.shape[0]
    out = np.zeros(((T + 7) // 8, *spikes.shape[1:]), dtype=np.uint8)
    for t in range(T):
        out[t // 8] += (spikes[t] * 2 ** (t % 8)).astype(np.uint8)
    return out


def convolve(x, w, geometry):
    """int64 [N, H, W, C] with weights [KH, KW, C/groups, O] -> int64 [N, OH, OW, O], output pixel by output pixel."""
    kh, kw, sh, sw, ph, pw, dh, dw, groups = geometry
    N, H, W, C = x.shape
    O = w.shape[3]
    ci, co = C // groups, O // groups
    oh, ow = (H + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (W + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    w = w.astype(np.int64)
    out = np.zeros((N, oh, ow, O), dtype=np.int64)
    for i in range(oh):
        for j in range(ow):
            for a in range(kh):
                for b in range(kw):
                    r, c = i * sh - ph + a * dh, j * sw - pw + b * dw
                    if not (0 <= r < H and 0 <= c < W):
                        continue
                    for g in range(groups):
                        out[:, i, j, g * co : (g + 1) * co] += (
                            x[:, r, c, g * ci : (g + 1) * ci] @ w[a, b, :, g * co : (g + 1) * co]
                        )
    return out


@dataclass
class Fired:
    masks: np.ndarray
    rate: float
    ties: int


def integrate_and_fire(currents, threshold):
    """int64 currents [T, ...] -> masks, firing rate and the number of membranes that hit theta exactly."""
    n = threshold.astype(np.int64)
    v = np.broadcast_to(n // 2, currents.shape[1:]).copy()
    spikes, ties = [], 0
    for current in currents:
        v = v + current
        assert np.abs(v).max(initial=0) < 2**31, "the test's own operands overflow 32 bits"
        s = v >= n
        ties += int((v == n).sum())
        v = v - n * s
        spikes.append(s)
    spikes = np.stack(spikes)
    return Fired(pack(spikes), float(spikes.mean()) if spikes.size else 0.0, ties)


def currents(products, residuals, constant, bias, T):
    """Sum of a layer's sources: products (x, w, geometry), residuals (x, amplitude), a constant current, bias."""
    total = bias.astype(np.int64)
    for x, w, geometry in products:
        scale = 256 if w.dtype == np.int8 else 1
        total = total + np.stack([convolve(step, w, geometry) for step in unpack(x, T)]) * scale
    for x, amplitude in residuals:
        total = total + unpack(x, T) * amplitude.astype(np.int64)
    if constant is not None:
        total = total + constant.astype(np.int64)
    return np.broadcast_to(total, (T, *total.shape[-4:])) if total.ndim == 4 else total


def windows_sum(x, rows, cols, multiple):
    out = np.zeros((*x.shape[:-3], len(rows) // 3, len(cols) // 3, x.shape[-1]), dtype=np.int64)
    for i in range(len(rows) // 3):
        for j in range(len(cols) // 3):
            r0, r1, rd = rows[3 * i : 3 * i + 3]
            c0, c1, cd = cols[3 * j : 3 * j + 3]
            factor = multiple // (rd * cd) if multiple else 1
            for r in range(r0, r1):
                for c in range(c0, c1):
                    out[..., i, j, :] += x[..., r, c, :].astype(np.int64) * factor
    return out
