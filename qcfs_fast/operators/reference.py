"""Every operator in plain torch: slow, exact, on any device.

Integer sums are formed by float64 matrix products. All of them are below 2^53, so they are exact whatever the
order or the use of fused multiply-add; the recursion over time is int64. Each function takes a call of its
operator (signature.py), which has been checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import convolution_size, split
from .masks import pack, unpack
from .signature import (
    NOT_FINITE,
    Conv2dCurrent,
    Conv2dEncode,
    Conv2dIf,
    Count,
    Encode,
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


def _integrate_and_fire(currents: Tensor, threshold: Tensor) -> Tensor:
    """int64 currents [T, N, ..., C] -> masks."""
    n = threshold.to(torch.int64)
    v = (n // 2).expand(currents.shape[1:])
    spikes = torch.empty(currents.shape, dtype=torch.bool, device=currents.device)
    for t in range(currents.shape[0]):
        v = v + currents[t]
        spikes[t] = v >= n
        v = v - n * spikes[t]
    return pack(spikes)


def conv2d_if(a: Conv2dIf) -> Tensor:
    T = a.T
    total = a.bias.to(torch.int64)
    for x, weight, g in zip(a.x, a.weight, split(a.geometry), strict=True):
        steps = unpack(x, T)
        scale = 256 if weight.dtype == torch.int8 else 1
        part = convolve(steps.flatten(0, 1), weight, g).to(torch.int64) * scale
        total = total + part.unflatten(0, (T, x.shape[1]))
    for r, amplitude in zip(a.residual, a.amplitude, strict=True):
        total = total + unpack(r, T) * amplitude.to(torch.int64)
    if a.current is not None:
        total = total + a.current.to(torch.int64).expand(T, *a.current.shape)
    return _integrate_and_fire(total, a.threshold)


def encode(a: Encode) -> Tensor:
    return _encoded(a.current, a.threshold, a.T)


def _encoded(current: Tensor, threshold: Tensor, T: int) -> Tensor:
    return _integrate_and_fire(current.to(torch.int64).expand(T, *current.shape), threshold)


def conv2d_current(a: Conv2dCurrent) -> Tensor:
    acc = convolve(a.x, a.weight, a.geometry)
    # Powers of two, split so that neither factor leaves the range of doubles.
    half = torch.div(a.exponent, 2, rounding_mode="floor").to(torch.float64)
    scale = (a.gain * torch.exp2(half)[:, None]) * torch.exp2(a.exponent.to(torch.float64) - half)[:, None]
    product = acc * scale[:, None, None, :]
    z = torch.round(product + a.offset)
    return torch.maximum(torch.minimum(z, a.high.to(torch.float64)), a.low.to(torch.float64)).to(torch.int32)


def conv2d_encode(a: Conv2dEncode) -> Tensor:
    return _encoded(conv2d_current(a), a.threshold, a.T)


def _window_sums(x: Tensor, rows: Sequence[int], cols: Sequence[int], multiple: int) -> Tensor:
    """int64 [.., H, W, C] -> scaled window sums [.., OH, OW, C]."""
    out = []
    for r0, r1, rd in zip(rows[0::3], rows[1::3], rows[2::3], strict=True):
        line = []
        for c0, c1, cd in zip(cols[0::3], cols[1::3], cols[2::3], strict=True):
            factor = multiple // (rd * cd) if multiple else 1
            line.append(x[..., r0:r1, c0:c1, :].sum((-3, -2)) * factor)
        out.append(torch.stack(line, -2))
    return torch.stack(out, -3)


def pool(a: Pool) -> Tensor:
    return _window_sums(unpack(a.x, a.T), a.rows, a.cols, a.multiple).to(torch.uint8)


def max_pool(a: MaxPool) -> Tensor:
    bits = torch.stack([(a.x >> b) & 1 for b in range(8)])
    sums = _window_sums(bits.to(torch.int64), a.rows, a.cols, 0)
    out = torch.zeros(sums.shape[1:], dtype=torch.uint8, device=a.x.device)
    for b in range(8):
        out |= (sums[b] > 0).to(torch.uint8) << b
    return out


def count(a: Count) -> Tensor:
    steps = unpack(a.x, a.T)
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
    if not bool(torch.isfinite(z).all()):
        raise ValueError(NOT_FINITE)
    largest = z.abs().flatten(1).amax(1) if z.numel() else z.new_zeros(z.shape[0])
    _, exponent = torch.frexp(largest / 32767.0)
    exponent = exponent.to(torch.float64)
    exponent = torch.where(largest <= 32767.0 * torch.exp2(exponent - 1), exponent - 1, exponent)
    exponent = torch.where(largest > 0, exponent, torch.zeros_like(exponent))
    q = torch.round(z * torch.exp2(-exponent)[:, None, None, None]).to(torch.int16)
    return q.permute(0, 2, 3, 1).contiguous(), exponent.to(torch.int32)
