"""Every operator in plain torch: slow, exact, on any device.

Integer sums are formed by float64 matrix products. All of them are below 2^53, so they are exact whatever the
order or the use of fused multiply-add; the recursion over time is int64. Each function takes a call of its
operator (signature.py), which has been checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .finite import refuse_not_finite
from .geometry import convolution_size, split
from .limits import IMAGE_MEMBRANE
from .masks import pack, unpack
from .neuron import MODES
from .signature import (
    Conv2dCurrent,
    Conv2dEncode,
    Conv2dIf,
    Count,
    MaxPool,
    Pool,
    PoolCounts,
    QuantizeInput,
    Readout,
)


def convolve(x: Tensor, weight: Tensor, g: Sequence[int]) -> Tensor:
    """Exact integer convolution: x [M, H, W, C] and weight [KH, KW, C/groups, O] -> float64 [M, OH, OW, O]."""
    M, H, W, C = x.shape
    kh, kw, sh, sw, ph, pw, dh, dw, groups = g
    O = weight.shape[3]
    oh, ow = convolution_size(H, W, g)
    padded = F.pad(x.to(torch.float64), (0, 0, pw, pw, ph, ph))
    kernel = weight.to(torch.float64).reshape(kh, kw, C // groups, groups, O // groups)
    out = torch.zeros((M, oh, ow, groups, O // groups), dtype=torch.float64, device=x.device)
    for i in range(kh):
        for j in range(kw):
            tap = padded[:, i * dh : i * dh + (oh - 1) * sh + 1 : sh, j * dw : j * dw + (ow - 1) * sw + 1 : sw]
            out += torch.einsum("mhwgc,cgo->mhwgo", tap.reshape(M, oh, ow, groups, C // groups), kernel[i, j])
    return out.reshape(M, oh, ow, O)


def _run(
    currents: Tensor, n: Tensor, v: Tensor, limit: Tensor | None, sent: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Integrate, fire, reset on int64 currents [T, ...] from membranes v: spikes, membranes before reset, `sent`.

    The membranes after the last step are membranes[-1] - n * spikes[-1]. With `sent` neurons are signed; `limit` bounds
    membranes on both sides.
    """
    spikes, membranes = torch.empty_like(currents), torch.empty_like(currents)
    for t in range(currents.shape[0]):
        v = v + currents[t]
        if limit is not None:
            v = torch.maximum(torch.minimum(v, limit), -limit)
        s = (v >= n).to(torch.int64)
        if sent is not None:
            s = s - ((v < 0) & (sent > 0)).to(torch.int64)
            sent = sent + s
        spikes[t], membranes[t] = s, v
        v = v - n * s
    return spikes, membranes, sent


def _shifted(currents: Tensor, n: Tensor, v0: Tensor, limit: Tensor | None) -> Tensor:
    """Initial potentials of offset mode, from a first run over the window's currents from v0."""
    spikes, v, _ = _run(currents, n, v0, limit)
    fired, count = spikes > 0, spikes.sum(0)
    residual = v[-1] - n * spikes[-1] - v0 + n // 2
    far = torch.iinfo(torch.int64).max // 4
    least_fired = torch.where(fired, v, far).amin(0)
    largest_silent = torch.where(fired, -far, v).amax(0)
    fewer = v0 - torch.maximum(n, least_fired - n + 1)
    more = v0 + torch.maximum(n, n - largest_silent)
    shifted = torch.where((residual < 0) & (count > 0), fewer, v0)
    shifted = torch.where((residual >= n) & (count < currents.shape[0]), more, shifted)
    return shifted if limit is None else torch.maximum(torch.minimum(shifted, limit), -limit)


def _fire(a: Conv2dIf, currents: Tensor) -> tuple[Tensor, Tensor]:
    """The end of a layer: int64 currents [T, N, OH, OW, O] -> its spikes and its state."""
    n = a.threshold.to(torch.int64)
    mode, window, more = MODES[a.neuron[0]], a.neuron[1], a.neuron[2]
    limit = None if a.x or a.residual else IMAGE_MEMBRANE * n
    v = (n // 2).expand(currents.shape[1:]) if a.state is None else a.state[0].to(torch.int64)
    if mode == "sum":
        levels = window
        return torch.div(currents + v, n, rounding_mode="floor").clamp(0, levels).to(torch.uint8), v
    keep = torch.ones_like(v)
    if mode == "offset":
        for _ in range(more):
            v = _shifted(currents[:window], n, v, limit)
    elif mode == "masked":
        spikes, membranes, _ = _run(currents[:window], n, v, limit)
        keep = (membranes[-1] - n * spikes[-1] > 0).to(torch.int64)
    sent = None
    if mode == "signed":
        sent = torch.zeros_like(v) if a.state is None else a.state[1].to(torch.int64)
    spikes, membranes, sent = _run(currents, n, v, limit, sent)
    state = torch.stack([membranes[-1] - n * spikes[-1], *([] if sent is None else [sent])]).to(torch.int32)
    spikes = spikes * keep
    return torch.cat([pack(spikes > 0), *([] if sent is None else [pack(spikes < 0)])]), state


def conv2d_if(a: Conv2dIf) -> Tensor:
    return conv2d_if_from(a)[0]


def conv2d_if_from(a: Conv2dIf) -> tuple[Tensor, Tensor]:
    T, shape = a.T, a.shape[1:]
    constant = a.bias.to(torch.int64).reshape(-1, 1, 1, 1, a.bias.shape[-1])
    if a.current is not None:
        constant = constant + a.current.to(torch.int64)
    if MODES[a.neuron[0]] == "sum":
        constant = constant * a.neuron[1]
    total = constant.expand(T, *shape)
    for x, weight, g, scale in zip(a.x, a.weight, split(a.geometry), a.scales, strict=True):
        steps = unpack(x, T)
        part = convolve(steps.flatten(0, 1), weight, g).to(torch.int64) * scale
        total = total + part.unflatten(0, (T, x.shape[1]))
    for r, amplitude in zip(a.residual, a.amplitude, strict=True):
        total = total + unpack(r, T) * amplitude.to(torch.int64)
    return _fire(a, total)


def conv2d_current(a: Conv2dCurrent) -> Tensor:
    acc = convolve(a.x, a.weight, a.geometry)
    # Powers of two, split so that neither factor leaves the range of doubles.
    half = torch.div(a.exponent, 2, rounding_mode="floor").to(torch.float64)
    scale = (a.gain * torch.exp2(half)[:, None]) * torch.exp2(a.exponent.to(torch.float64) - half)[:, None]
    product = acc * scale[:, None, None, :]
    z = torch.round(product + a.offset)
    return torch.clamp(z, a.low.to(torch.float64), a.high.to(torch.float64)).to(torch.int32)  # high, where they cross


def conv2d_encode(a: Conv2dEncode) -> Tensor:
    n, current = a.threshold.to(torch.int64), conv2d_current(a).to(torch.int64)
    spikes, _, _ = _run(current.expand(a.T, *current.shape), n, (n // 2).expand(current.shape), None)
    return pack(spikes > 0)


def _windows(x: Tensor, rows: Sequence[int], cols: Sequence[int], of: Callable[[Tensor, int], Tensor]) -> Tensor:
    """of(window [.., h, w, C], its divisor) -> [.., C], for every window of [.., H, W, C]: [.., OH, OW, C]."""
    out = []
    for r0, r1, rd in zip(rows[0::3], rows[1::3], rows[2::3], strict=True):
        line = []
        for c0, c1, cd in zip(cols[0::3], cols[1::3], cols[2::3], strict=True):
            line.append(of(x[..., r0:r1, c0:c1, :], rd * cd))
        out.append(torch.stack(line, -2))
    return torch.stack(out, -3)


def _window_sums(x: Tensor, rows: Sequence[int], cols: Sequence[int], multiple: int) -> Tensor:
    """int64 [.., H, W, C] -> scaled window sums [.., OH, OW, C]."""
    return _windows(x, rows, cols, lambda w, divisor: w.sum((-3, -2)) * (multiple // divisor if multiple else 1))


def pool(a: Pool) -> Tensor:
    return _window_sums(unpack(a.x, a.T), a.rows, a.cols, a.multiple).to(torch.uint8)


def max_pool(a: MaxPool) -> Tensor:
    if a.counts:
        largest = lambda w, _: w.amax((-3, -2)) if w.shape[-3] * w.shape[-2] else w.sum((-3, -2))  # noqa: E731
        return _windows(a.x.to(torch.int64), a.rows, a.cols, largest).to(torch.uint8)
    bits = torch.stack([(a.x >> b) & 1 for b in range(8)])
    sums = _window_sums(bits.to(torch.int64), a.rows, a.cols, 0)
    out = torch.zeros(sums.shape[1:], dtype=torch.uint8, device=a.x.device)
    for b in range(8):
        out |= (sums[b] > 0).to(torch.uint8) << b
    return out


def count(a: Count) -> Tensor:
    steps = unpack(a.x, a.T)[a.first : a.last]
    return (steps.cumsum(0) if a.prefix else steps.sum(0, keepdim=True)).to(torch.int32)


def pool_counts(a: PoolCounts) -> Tensor:
    return _window_sums(a.counts.to(torch.int64), a.rows, a.cols, a.multiple).to(torch.int32)


def readout(a: Readout) -> Tensor:
    total: Tensor | None = None
    for c, w, gain, g, m in zip(a.counts, a.weight, a.gain, split(a.geometry), a.multiple, strict=True):
        S, N = c.shape[:2]
        acc = c.to(torch.float64) if w.numel() == 0 else convolve(c.flatten(0, 1), w, g).unflatten(0, (S, N))
        steps = torch.tensor([a.T] if S == 1 else list(range(1, a.T + 1)), dtype=torch.float64, device=c.device)
        part = acc * gain / (steps * m).reshape(-1, 1, 1, 1, 1)
        total = 0.0 + part if total is None else total + part  # from 0, so never -0
    assert total is not None
    return (total + a.offset).to(torch.float32)


def quantize_input(a: QuantizeInput) -> tuple[Tensor, Tensor]:
    z = a.x.to(torch.float32).index_select(1, a.source) * a.scale[:, None, None]
    z = (z + a.shift[:, None, None]).to(torch.float64)
    finite = torch.isfinite(z).flatten(1).all(1)
    refuse_not_finite(~finite)
    z = z.where(finite[:, None, None, None], 0)
    largest = z.abs().flatten(1).amax(1) if z.numel() else z.new_zeros(z.shape[0])
    limit = float(2 ** (a.bits - 1) - 1)
    _, exponent = torch.frexp(largest / limit)
    exponent = exponent.to(torch.float64)
    exponent = torch.where(largest <= limit * torch.exp2(exponent - 1), exponent - 1, exponent)
    exponent = torch.where(largest > 0, exponent, torch.zeros_like(exponent))
    q = torch.round(z * torch.exp2(-exponent)[:, None, None, None]).to(torch.int32)
    return q.permute(0, 2, 3, 1).contiguous(), exponent.to(torch.int32)
