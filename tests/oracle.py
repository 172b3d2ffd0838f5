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
    """masks, firing rate, the number of membranes that hit the threshold exactly, and the state after the last step."""

    masks: np.ndarray
    rate: float
    ties: int
    state: np.ndarray | None = None


def integrate_and_fire(currents, threshold):
    """The plain neuron, a whole layer at a time."""
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


def fire_neuron(currents, n, mode="plain", window=0, iterations=0, alone=False, v=None, sent=0):
    """One neuron in plain Python integers: its spikes, the membrane before each reset, and (v, sent) at the end.

    `alone`: a layer of the image alone, whose membrane stays within 32 thresholds. sum: `window` is the levels, and
    there is one current.
    """
    half = n // 2
    hold = (lambda u: max(-32 * n, min(32 * n, u))) if alone else (lambda u: u)

    def plain_run(v, currents):
        spikes, before = [], []
        for current in currents:
            v = hold(v + current)
            before.append(v)
            spikes.append(1 if v >= n else 0)
            if spikes[-1]:
                v -= n
        return spikes, before, v

    if mode == "sum":
        (total,) = currents
        return [max(0, min(window, (total + half) // n))], [total + half], None
    start = half if v is None else v
    if mode == "signed":
        spikes, before, v = [], [], start
        for current in currents:
            v = hold(v + current)
            before.append(v)
            s = 1 if v >= n else -1 if v < 0 and sent > 0 else 0
            v -= n * s
            sent += s
            spikes.append(s)
        return spikes, before, (v, sent)
    if mode == "offset":
        for _ in range(iterations):
            spikes, before, end = plain_run(start, currents[:window])
            left = end - start + half
            if left < 0 and sum(spikes) > 0:
                lowest = min(b for b, s in zip(before, spikes, strict=True) if s)
                start -= max(n, lowest - n + 1)
            elif left >= n and sum(spikes) < window:
                highest = max(b for b, s in zip(before, spikes, strict=True) if not s)
                start += max(n, n - highest)
            start = hold(start)
    silent = mode == "masked" and plain_run(start, currents[:window])[2] <= 0
    spikes, before, v = plain_run(start, currents)
    return [0] * len(spikes) if silent else spikes, before, (v, sent)


def fire(currents, threshold, mode="plain", window=0, iterations=0, alone=False, state=None):
    """`fire_neuron` for a layer: int64 currents [T, ..., C] -> Fired, whose masks are laid out as conv2d_if does.

    Fired.state: [rows, ..., C] after the last step, where the mode has one.
    """
    T, shape = currents.shape[0], currents.shape[1:]
    flat = currents.reshape(T, -1)
    n = np.broadcast_to(threshold.astype(np.int64), shape).reshape(-1)
    rows = {"plain": 1, "signed": 2}.get(mode, 0)
    before_first = None if state is None else state.reshape(rows, -1)
    spikes, ties, after = np.zeros(flat.shape, dtype=np.int64), 0, np.zeros((rows, n.size), dtype=np.int64)
    for i in range(n.size):
        v, sent = (None, 0) if before_first is None else (int(before_first[0, i]), 0)
        if rows == 2 and before_first is not None:
            sent = int(before_first[1, i])
        args = [int(c) for c in flat[:, i]], int(n[i]), mode, window, iterations, alone, v, sent
        found, before, end = fire_neuron(*args)
        assert all(abs(b) < 2**31 for b in before), "the test's own operands overflow 32 bits"
        spikes[:, i] = found
        ties += sum(b == int(n[i]) for b in before) + (mode == "signed") * before.count(0)
        if rows:
            after[:, i] = end[:rows]
    spikes = spikes.reshape(currents.shape)
    out = {
        "sum": lambda: spikes.astype(np.uint8),
        "signed": lambda: np.concatenate([pack(spikes > 0), pack(spikes < 0)]),
    }.get(mode, lambda: pack(spikes > 0))()
    rate = float(np.abs(spikes).mean()) / (window if mode == "sum" else 1) if spikes.size else 0.0
    return Fired(out, rate, ties, after.reshape(rows, *shape).astype(np.int32) if rows else None)


def currents(products, residuals, constant, bias, T, scales=None, levels=1):
    """Sum of a layer's sources: products (x, w, geometry), residuals (x, amplitude), a current and a bias.

    `constant` is [N, OH, OW, O] or one for each step [T, ..], `bias` [O] or [T, O]. `levels`: of sum mode, in which
    current and bias count that often.
    """
    total = bias.astype(np.int64).reshape(-1, 1, 1, 1, bias.shape[-1]) * levels
    for i, (x, w, geometry) in enumerate(products):
        scale = (256 if w.dtype == np.int8 else 1) if scales is None else scales[i]
        total = total + np.stack([convolve(step, w, geometry) for step in unpack(x, T)]) * scale
    for x, amplitude in residuals:
        total = total + unpack(x, T) * amplitude.astype(np.int64)
    if constant is not None:
        total = total + constant.astype(np.int64) * levels
    return np.broadcast_to(total, (T, *total.shape[-4:]))


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
