"""Every operator in plain torch: slow, exact, on any device.

Integer sums are formed by float64 matrix products. All of them are below 2^53, so they are exact whatever the
order or the use of fused multiply-add; the recursion over time is int64. Layouts are those of ops.py; operands
have been checked there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import convolution_size
from .masks import pack, unpack


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


def conv2d_if(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    geometry: Sequence[int],
    residual: Sequence[Tensor],
    amplitude: Sequence[Tensor],
    current: Tensor | None,
    bias: Tensor,
    threshold: Tensor,
    T: int,
) -> Tensor:
    total: Tensor | None = None
    for i, (xi, wi) in enumerate(zip(x, weight, strict=True)):
        steps = unpack(xi, T)
        scale = 256 if wi.dtype == torch.int8 else 1
        part = convolve(steps.flatten(0, 1), wi, geometry[9 * i : 9 * i + 9]).to(torch.int64) * scale
        part = part.unflatten(0, (T, xi.shape[1]))
        total = part if total is None else total + part
    for r, a in zip(residual, amplitude, strict=True):
        part = unpack(r, T) * a.to(torch.int64)
        total = part if total is None else total + part
    if current is not None:
        part = current.to(torch.int64).expand(T, *current.shape)
        total = part if total is None else total + part
    assert total is not None
    return _integrate_and_fire(total + bias.to(torch.int64), threshold)


def encode(current: Tensor, threshold: Tensor, T: int) -> Tensor:
    return _integrate_and_fire(current.to(torch.int64).expand(T, *current.shape), threshold)


def conv2d_current(
    x: Tensor,
    exponent: Tensor,
    weight: Tensor,
    geometry: Sequence[int],
    gain: Tensor,
    offset: Tensor,
    low: Tensor,
    high: Tensor,
) -> Tensor:
    acc = convolve(x, weight, geometry)
    # Powers of two, split so that neither factor leaves the range of doubles.
    half = torch.div(exponent, 2, rounding_mode="floor").to(torch.float64)
    scale = (gain * torch.exp2(half)[:, None]) * torch.exp2(exponent.to(torch.float64) - half)[:, None]
    product = acc * scale[:, None, None, :]
    z = torch.round(product + offset)
    return torch.maximum(torch.minimum(z, high.to(torch.float64)), low.to(torch.float64)).to(torch.int32)


def conv2d_encode(
    x: Tensor,
    exponent: Tensor,
    weight: Tensor,
    geometry: Sequence[int],
    gain: Tensor,
    offset: Tensor,
    low: Tensor,
    high: Tensor,
    threshold: Tensor,
    T: int,
) -> Tensor:
    return encode(conv2d_current(x, exponent, weight, geometry, gain, offset, low, high), threshold, T)


def linear_if(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    residual: Sequence[Tensor],
    amplitude: Sequence[Tensor],
    current: Tensor | None,
    bias: Tensor,
    threshold: Tensor,
    T: int,
) -> Tensor:
    maps = [t[:, :, None, None] for t in x]
    kernels = [w[None, None] for w in weight]
    residual = [r[:, :, None, None] for r in residual]
    current = None if current is None else current[:, None, None]
    pointwise = [1, 1, 1, 1, 0, 0, 1, 1, 1] * len(maps)
    return conv2d_if(maps, kernels, pointwise, residual, amplitude, current, bias, threshold, T).flatten(2)


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


def pool(x: Tensor, rows: Sequence[int], cols: Sequence[int], multiple: int, T: int) -> Tensor:
    return _window_sums(unpack(x, T), rows, cols, multiple).to(torch.uint8)


def max_pool(x: Tensor, rows: Sequence[int], cols: Sequence[int]) -> Tensor:
    bits = torch.stack([(x >> b) & 1 for b in range(8)])
    sums = _window_sums(bits.to(torch.int64), rows, cols, 0)
    out = torch.zeros(sums.shape[1:], dtype=torch.uint8, device=x.device)
    for b in range(8):
        out |= (sums[b] > 0).to(torch.uint8) << b
    return out


def count(x: Tensor, T: int, prefix: bool) -> Tensor:
    steps = unpack(x, T)
    return (steps.cumsum(0) if prefix else steps.sum(0, keepdim=True)).to(torch.int32)


def pool_counts(counts: Tensor, rows: Sequence[int], cols: Sequence[int], multiple: int) -> Tensor:
    return _window_sums(counts.to(torch.int64), rows, cols, multiple).to(torch.int32)


def readout(
    counts: Sequence[Tensor],
    weight: Sequence[Tensor],
    geometry: Sequence[int],
    gain: Sequence[Tensor],
    multiple: Sequence[int],
    offset: Tensor,
    T: int,
) -> Tensor:
    total: Tensor | None = None
    for i, (c, w, g, m) in enumerate(zip(counts, weight, gain, multiple, strict=True)):
        S, N = c.shape[:2]
        if w.numel() == 0:
            acc = c.to(torch.float64)
        else:
            acc = convolve(c.flatten(0, 1), w, geometry[9 * i : 9 * i + 9]).unflatten(0, (S, N))
        steps = torch.tensor([T] if S == 1 else list(range(1, T + 1)), dtype=torch.float64, device=c.device)
        part = acc * g / (steps * m).reshape(-1, 1, 1, 1, 1)
        total = 0.0 + part if total is None else total + part  # from 0, so never -0
    assert total is not None
    return (total + offset).to(torch.float32)


def quantize_input(x: Tensor, source: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    z = x.to(torch.float32).index_select(1, source) * scale[:, None, None]
    z = (z + shift[:, None, None]).to(torch.float64)
    if not bool(torch.isfinite(z).all()):
        raise ValueError("quantize_input: the input holds NaN or infinity; clean the data before it enters the network")
    most = z.abs().flatten(1).amax(1) if z.numel() else z.new_zeros(z.shape[0])
    _, exponent = torch.frexp(most / 32767.0)
    exponent = exponent.to(torch.float64)
    exponent = torch.where(most <= 32767.0 * torch.exp2(exponent - 1), exponent - 1, exponent)
    exponent = torch.where(most > 0, exponent, torch.zeros_like(exponent))
    q = torch.round(z * torch.exp2(-exponent)[:, None, None, None]).to(torch.int16)
    return q.permute(0, 2, 3, 1).contiguous(), exponent.to(torch.int32)
