# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disable-error-code=assignment
# Tuples grow here by addition: Triton has no starred expressions.
# ruff: noqa: RUF005
"""Triton kernels of every operator: the same bytes as the CPU kernels and as reference.py.

One spiking layer, per output neuron (row m = pixel of the batch, channel o), for t = 0 .. T-1, in int32:

    I[t] = sum over products of scale * sum over taps, inputs k of  w[k, o] * x[k, t]
           + sum over residuals of  amplitude[o] * x[t]  + current + bias[o]
    v[-1] = n[o] / 2      v = v + I[t]      s[t] = v >= n[o]      v = v - n[o] * s[t]

Plain neurons fire in the kernel that has the sums. All other modes of the neuron (csrc/core/contract.h), biases and
currents by step and layers of the image alone take one more kernel, `neurons`, which reads the sums from memory.
Layouts (C order):

    spikes x      uint8  masks [ceil(T/8), N, H, W, C], bit t%8 of plane t//8 is the spike at step t,
                         or counts [T, N, H, W, C], one byte 0..255 a step
    weights       int8   [digit, KH, KW, O, KP]: base-256 digits (high, low) of an int16 weight or the int8 weight
                         itself; KP is C/groups padded with zeros to 16, K innermost as the matrix units want it
    residuals     uint8  [planes, M, O], amplitude int32 [O];   current int32 [M, O]
    membrane      int32  [rows, M, O], where steps come before or after the 8 of a launch; a second row holds what a
                         signed neuron has sent, or whether a masked one is silent
    partial sums  int32  [steps, M, O], only where a layer has more sources than one launch takes
    output        uint8  masks [ceil(T/8), M, O]

Tiling of `spiking_dot`: M = N*OH*OW output pixels, an implicit matrix product without im2col. One program owns
BM x BN neurons of one group for all (up to 8) steps, and takes K in pieces of BK inputs of one filter tap:

                   BN outputs                       x tile: BM x BK mask bytes, read once for all steps
                 +-----------+                      w tile: BK x BN weights, read once for all steps
              BK | w, int8   |                      for t: acc[t] += ((x tile >> t) & 1) . w tile
        BK       +-----------+
      +-----+    +-----------+ \\
   BM | x   | -> | acc[0..7] |  > int32, in registers (BM*BN*steps/threads of them, at most 32 a thread, see
      +-----+    +-----------+ /  tiles.py); then T steps of the recursion there, one byte a neuron out

`acc` is a Python tuple of one tile per step. Triton cannot assign to an element of a tuple, so every pass over the
steps builds the next tuple (`sums = sums + (tile,)`).

Two digits need no second set of accumulators: the high digits over all of K, a shift by 8, the low digits on top
(HORNER). The tensor-core instruction may saturate, so this is used only while |sum| < 2^31 is certain from K alone;
otherwise high and low sums are kept apart and meet in wrapping integer additions. A count c enters as the signed
byte c - 128; the launcher adds 128 * sum(w) back (also for padding, which enters as -128). With these, every
intermediate is exact or exact modulo 2^32, and the contract bounds the result: tile shape, split and device do
not matter.

Where C/groups is small (depthwise), K very large, or Triton has no int8 matrix instruction for the device (sm_75),
`spiking_direct` multiplies int32 by int32 instead.

Analog sums (first layer, readout) are formed in int64 (they stay below 2^53) and rounded in double in the order
reference.py has. Every operation must round: the launchers pass enable_fp_fusion=False, upon which Triton emits
mul.rn and add.rn for NVIDIA (PTX never fuses those) and leaves LLVM no licence to contract for AMD; the division is
div.rn, or AMD's exact sequence. test_triton_compile.py reads all that in the machine code.

Rows and pixels are counted in 32 bits (64-bit division is a slow call); positions in memory are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Adding and subtracting 1.5 * 2^52 rounds a double of magnitude below 2^51 to an integer, halves to even.
ROUND = tl.constexpr(6755399441055744.0)
INFINITY = tl.constexpr(0x7F800000)  # its bits as a float32; those of NaN lie above


@triton.jit
def _offset_count(count, PTX: tl.constexpr):
    """Each count c as c - 128. In PTX on four bytes at once."""
    if PTX:
        bits = tl.inline_asm_elementwise(
            "xor.b32 $0, $1, 0x80808080;", "=r,r", [count], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        bits = (count ^ 128).to(tl.int8, bitcast=True)
    return bits


@triton.jit
def _spikes(m, t: tl.constexpr, PTX: tl.constexpr):
    """Bit t of each mask byte as 0 or 1. In PTX on four bytes at once; a shift brings in only bits that are masked."""
    if PTX:
        bits = tl.inline_asm_elementwise(
            f"shr.u32 $0, $1, {t}; and.b32 $0, $0, 0x01010101;", "=r,r", [m], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        bits = ((m >> t) & 1).to(tl.int8)
    return bits


@triton.jit
def _zeros(BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr):
    """A tuple of zero accumulators, one tile per step."""
    acc = ()
    for _ in tl.static_range(STEPS):
        acc = acc + (tl.zeros([BM, BN], tl.int32),)
    return acc


@triton.jit
def _times_256(acc, STEPS: tl.constexpr):
    scaled = ()
    for t in tl.static_range(STEPS):
        scaled = scaled + (acc[t] << 8,)
    return scaled


@triton.jit
def _add_product(
    acc, x, plane, w, image, oy, ox, row_ok, o, o_ok, first,
    O, H, W, C, K, KP, KW, TAPS, SH, SW, PH, PW, DH, DW,
    COUNT: tl.constexpr, STEPS: tl.constexpr, PTX: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc[t] += one digit plane of one product, over all taps and inputs. `plane`: bytes between two count planes."""
    plane = tl.cast(plane, tl.int64)
    blocks = tl.cdiv(K, BK)
    lane = tl.arange(0, BK)
    for i in range(TAPS * blocks):
        tap = i // blocks
        k = (i - tap * blocks) * BK + lane
        ky = tap // KW
        iy = oy * SH - PH + ky * DH
        ix = ox * SW - PW + (tap - ky * KW) * DW
        inside = row_ok & (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W)
        address = x + (((image * H + iy) * W + ix) * C + first)[:, None] + k[None, :]
        valid = inside[:, None] & (k < K)[None, :]
        row = (tap * O + o).to(tl.int64) * KP
        b = tl.trans(tl.load(w + row[:, None] + k[None, :], mask=o_ok[:, None] & (k < KP)[None, :], other=0))
        m = tl.load(address, mask=valid, other=0)
        sums = ()
        for t in tl.static_range(STEPS):
            if COUNT:
                if t > 0:
                    m = tl.load(address + t * plane, mask=valid, other=0)
                a = _offset_count(m, PTX)
            else:
                a = _spikes(m, t, PTX)
            sums = sums + (tl.dot(a, b, acc[t], out_dtype=tl.int32),)
        acc = sums
    return acc


@triton.jit
def _residual(r, index, valid, r_plane, amplitude, t: tl.constexpr, COUNT: tl.constexpr):
    """amplitude[o] * x[t] of one residual source."""
    if COUNT:
        spikes = tl.load(r + index + t * r_plane, mask=valid, other=0).to(tl.int32)
    else:
        spikes = (tl.load(r + index, mask=valid, other=0).to(tl.int32) >> t) & 1
    return spikes * amplitude[None, :]


@triton.jit
def _epilogue(
    acc, tile_m, rows, o, row_ok, o_ok, O, plane,
    r0, amplitude0, r1, amplitude1, current, bias, threshold, v_in, v_out, partial_in, partial_out, out,
    STEPS: tl.constexpr, R: tl.constexpr, RCOUNT0: tl.constexpr, RCOUNT1: tl.constexpr, CURRENT: tl.constexpr,
    PARTIAL: tl.constexpr, FIRE: tl.constexpr, CONTINUED: tl.constexpr, CONTINUES: tl.constexpr,
):  # fmt: skip
    """The end of both spiking kernels: adds the other sources, then integrates, fires and resets (or stores the sums).

    `plane` = M * O, the distance between planes of everything [.., M, O].
    """
    plane = tl.cast(plane, tl.int64)
    valid = row_ok[:, None] & o_ok[None, :]
    # 64-bit positions belong to the tile, 32-bit ones to its elements: those are held in registers.
    origin = tile_m.to(tl.int64) * acc[0].shape[0] * O
    index = rows[:, None] * O + o[None, :]
    r0 += origin
    r1 += origin
    current += origin
    v_in += origin
    v_out += origin
    partial_in += origin
    partial_out += origin
    out += origin
    a0 = o * 0
    a1 = a0
    n = a0
    constant = a0[None, :]
    v = tl.zeros_like(acc[0])
    bits = tl.zeros_like(acc[0])
    if R > 0:
        a0 = tl.load(amplitude0 + o, mask=o_ok, other=0)
    if R > 1:
        a1 = tl.load(amplitude1 + o, mask=o_ok, other=0)
    if FIRE:
        n = tl.load(threshold + o, mask=o_ok, other=2)
        constant = tl.load(bias + o, mask=o_ok, other=0)[None, :]
        if CURRENT:
            constant += tl.load(current + index, mask=valid, other=0)
        if CONTINUED:
            v = tl.load(v_in + index, mask=valid, other=0)
        else:
            v += (n >> 1)[None, :]
    for t in tl.static_range(STEPS):
        total = acc[t]
        if PARTIAL:
            total += tl.load(partial_in + index + t * plane, mask=valid, other=0)
        if R > 0:
            total += _residual(r0, index, valid, plane, a0, t, RCOUNT0)
        if R > 1:
            total += _residual(r1, index, valid, plane, a1, t, RCOUNT1)
        if FIRE:
            v += total + constant
            fired = v >= n[None, :]
            v = tl.where(fired, v - n[None, :], v)
            bits |= fired.to(tl.int32) << t
        else:
            tl.store(partial_out + index + t * plane, total, mask=valid)
    if FIRE:
        tl.store(out + index, bits.to(tl.uint8), mask=valid)
        if CONTINUES:
            tl.store(v_out + index, v, mask=valid)


@triton.jit(
    do_not_specialize=[
        "M", "OH", "OW",
        "H0", "W0", "KW0", "TAPS0", "SH0", "SW0", "PH0", "PW0", "DH0", "DW0",
        "H1", "W1", "KW1", "TAPS1", "SH1", "SW1", "PH1", "PW1", "DH1", "DW1",
    ]
)  # fmt: skip
def spiking_dot(
    x0, w0, sums0, x_plane0, w_plane0, H0, W0, C0, K0, KP0, KW0, TAPS0, SH0, SW0, PH0, PW0, DH0, DW0,
    x1, w1, sums1, x_plane1, w_plane1, H1, W1, C1, K1, KP1, KW1, TAPS1, SH1, SW1, PH1, PW1, DH1, DW1,
    r0, amplitude0, r1, amplitude1, current, bias, threshold, v_in, v_out, partial_in, partial_out, out,
    M, OH, OW, O, group_outputs, plane,
    PRODUCTS: tl.constexpr,     # 1 or 2
    DIGITS: tl.constexpr,       # 2: int16 weights, 1: int8 weights
    SCALE: tl.constexpr,        # of both products
    HORNER: tl.constexpr,       # both digits in one set of accumulators
    COUNT0: tl.constexpr, COUNT1: tl.constexpr,    # coding of each input
    STEPS: tl.constexpr,        # steps of this launch, 1 to 8
    R: tl.constexpr, RCOUNT0: tl.constexpr, RCOUNT1: tl.constexpr,    # residuals: number (0 to 2), codings
    CURRENT: tl.constexpr,      # whether a constant current is added
    PARTIAL: tl.constexpr,      # whether sums of an earlier launch are added
    FIRE: tl.constexpr,         # integrate and fire, or store the sums for a later launch
    CONTINUED: tl.constexpr, CONTINUES: tl.constexpr,    # steps came before, steps follow
    PTX: tl.constexpr,          # whether inline PTX can be used (NVIDIA, not interpreted)
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Matrix products of one or two sources, then the neurons. Grid: (tiles of M x tiles of a group's O, groups)."""
    tiles = tl.cdiv(group_outputs, BN)
    tile_m = tl.program_id(0) // tiles
    tile_n = tl.program_id(0) - tile_m * tiles
    group = tl.program_id(1)
    rows = tl.arange(0, BM)
    m = tile_m * BM + rows
    row_ok = m < M
    in_group = tile_n * BN + tl.arange(0, BN)
    o_ok = in_group < group_outputs
    o = group * group_outputs + in_group
    ox = m % OW
    oy = (m // OW) % OH
    image = (m // OW // OH).to(tl.int64)
    acc = _zeros(BM, BN, STEPS)
    high = acc
    for digit in tl.static_range(DIGITS):
        if digit == 1:
            if HORNER:
                acc = _times_256(acc, STEPS)
            else:
                high = _times_256(acc, STEPS)
                acc = _zeros(BM, BN, STEPS)
        acc = _add_product(
            acc, x0, x_plane0, w0 + digit * tl.cast(w_plane0, tl.int64), image, oy, ox, row_ok, o, o_ok, group * K0,
            O, H0, W0, C0, K0, KP0, KW0, TAPS0, SH0, SW0, PH0, PW0, DH0, DW0, COUNT0, STEPS, PTX, BK,
        )  # fmt: skip
        if PRODUCTS > 1:
            acc = _add_product(
                acc, x1, x_plane1, w1 + digit * tl.cast(w_plane1, tl.int64), image, oy, ox, row_ok, o, o_ok, group * K1,
                O, H1, W1, C1, K1, KP1, KW1, TAPS1, SH1, SW1, PH1, PW1, DH1, DW1, COUNT1, STEPS, PTX, BK,
            )  # fmt: skip
    # What the counts' offset of 128 took away.
    back = o * 0
    if COUNT0:
        back += tl.load(sums0 + o, mask=o_ok, other=0)
    if PRODUCTS > 1 and COUNT1:
        back += tl.load(sums1 + o, mask=o_ok, other=0)
    back = back[None, :]
    sums = ()
    for t in tl.static_range(STEPS):
        sums = sums + ((acc[t] + high[t] + back) * SCALE,)
    _epilogue(
        sums, tile_m, rows, o, row_ok, o_ok, O, plane,
        r0, amplitude0, r1, amplitude1, current, bias, threshold, v_in, v_out, partial_in, partial_out, out,
        STEPS, R, RCOUNT0, RCOUNT1, CURRENT, PARTIAL, FIRE, CONTINUED, CONTINUES,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "M", "OH", "OW", "H", "W", "C", "K", "KW", "TAPS", "SH", "SW", "PH", "PW", "DH", "DW", "group_outputs",
    ]
)  # fmt: skip
def spiking_direct(
    x, w, x_plane, H, W, C, K, KW, TAPS, SH, SW, PH, PW, DH, DW,
    r0, amplitude0, r1, amplitude1, current, bias, threshold, v_in, v_out, partial_in, partial_out, out,
    M, OH, OW, O, group_outputs, plane,
    PRODUCTS: tl.constexpr,     # 0 or 1
    SCALE: tl.constexpr,        # of the product
    GROUPED: tl.constexpr,      # whether outputs differ in the inputs they read
    COUNT: tl.constexpr, STEPS: tl.constexpr,
    R: tl.constexpr, RCOUNT0: tl.constexpr, RCOUNT1: tl.constexpr, CURRENT: tl.constexpr,
    PARTIAL: tl.constexpr, FIRE: tl.constexpr, CONTINUED: tl.constexpr, CONTINUES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """As spiking_dot for one source or none, in plain int32 arithmetic; w is [KH, KW, K, O] as the operators take it.

    Neighbouring outputs may belong to different groups here. Grid: (tiles of M, tiles of O).
    """
    tile_m = tl.program_id(0)
    rows = tl.arange(0, BM)
    m = tile_m * BM + rows
    row_ok = m < M
    o = tl.program_id(1) * BN + tl.arange(0, BN)
    o_ok = o < O
    acc = _zeros(BM, BN, STEPS)
    if PRODUCTS > 0:
        ox = m % OW
        oy = (m // OW) % OH
        image = (m // OW // OH).to(tl.int64)
        first = (o // group_outputs) * K
        plane_bytes = tl.cast(x_plane, tl.int64)
        for i in range(TAPS * K):
            tap = i // K
            ky = tap // KW
            iy = oy * SH - PH + ky * DH
            ix = ox * SW - PW + (tap - ky * KW) * DW
            inside = row_ok & (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W)
            address = x + (((image * H + iy) * W + ix) * C + (i - tap * K))[:, None]
            valid = inside[:, None]
            if GROUPED:
                address = address + first[None, :]
                valid = valid & o_ok[None, :]
            b = tl.load(w + tl.cast(i, tl.int64) * O + o, mask=o_ok, other=0).to(tl.int32)[None, :] * SCALE
            s = tl.load(address, mask=valid, other=0).to(tl.int32)
            sums = ()
            for t in tl.static_range(STEPS):
                if COUNT:
                    if t > 0:
                        s = tl.load(address + t * plane_bytes, mask=valid, other=0).to(tl.int32)
                    sums = sums + (acc[t] + s * b,)
                else:
                    sums = sums + (acc[t] + ((s >> t) & 1) * b,)
            acc = sums
    _epilogue(
        acc, tile_m, rows, o, row_ok, o_ok, O, plane,
        r0, amplitude0, r1, amplitude1, current, bias, threshold, v_in, v_out, partial_in, partial_out, out,
        STEPS, R, RCOUNT0, RCOUNT1, CURRENT, PARTIAL, FIRE, CONTINUED, CONTINUES,
    )  # fmt: skip


@triton.jit
def _total(
    partial, current, bias, i, o, valid, plane, current_step, bias_step, levels, t: tl.constexpr,
    PARTIAL: tl.constexpr, CURRENT: tl.constexpr,
):  # fmt: skip
    """What step t integrates."""
    constant = tl.load(bias + t * tl.cast(bias_step, tl.int64) + o, mask=valid, other=0)
    if CURRENT:
        constant += tl.load(current + t * tl.cast(current_step, tl.int64) + i, mask=valid, other=0)
    total = constant * levels
    if PARTIAL:
        total += tl.load(partial + t * plane + i, mask=valid, other=0)
    return total


@triton.jit
def _held(v, n, ALONE: tl.constexpr):
    """A layer of the image alone holds its membranes within 32 thresholds."""
    if ALONE:
        v = tl.maximum(tl.minimum(v, n * 32), n * -32)
    return v


@triton.jit(do_not_specialize=["plane", "current_step", "bias_step", "levels"])
def neurons(
    partial,         # int32 [STEPS, plane], the sums over products and residuals
    current,         # int32 [plane], or one for each step, current_step apart
    bias,            # int32 [O], or one for each step, bias_step apart
    threshold,       # int32 [O]
    v_in, v_out,     # int32 [rows, plane]
    out,             # uint8 [plane]: masks of STEPS steps, or counts
    negative,        # uint8 [plane]: masks of negative spikes
    O, plane, current_step, bias_step,
    levels,          # of sum mode, else 1
    MODE: tl.constexpr,         # index in operators/neuron.py
    WINDOW: tl.constexpr,       # steps to look ahead, at the first steps of a layer; else 0
    ITERATIONS: tl.constexpr,
    STEPS: tl.constexpr, PARTIAL: tl.constexpr, CURRENT: tl.constexpr, ALONE: tl.constexpr,
    CONTINUED: tl.constexpr, CONTINUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The end of a layer in every mode, a thread for each neuron. Grid: (tiles of the neurons)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    plane = tl.cast(plane, tl.int64)
    valid = i < plane
    o = i % O
    n = tl.load(threshold + o, mask=valid, other=2)
    v = n >> 1
    more = n * 0  # signed: what was sent; masked: 1 if silent
    if CONTINUED:
        v = tl.load(v_in + i, mask=valid, other=0)
        if MODE == 2 or MODE == 3:
            more = tl.load(v_in + plane + i, mask=valid, other=0)
    for _ in tl.static_range(ITERATIONS if WINDOW > 0 else 0):
        v0 = v
        count = n * 0
        least = n * 0 + 2147483647
        largest = n * 0 - 2147483647
        for t in tl.static_range(WINDOW):
            v += _total(
                partial, current, bias, i, o, valid, plane, current_step, bias_step, levels, t, PARTIAL, CURRENT
            )
            v = _held(v, n, ALONE)
            fired = v >= n
            least = tl.where(fired, tl.minimum(least, v), least)
            largest = tl.where(fired, largest, tl.maximum(largest, v))
            count += fired.to(tl.int32)
            v = tl.where(fired, v - n, v)
        if MODE == 2:
            more = (v <= 0).to(tl.int32)
            v = v0
        else:
            residual = v - v0 + (n >> 1)
            many = (residual < 0) & (count > 0)
            few = (residual >= n) & (count < WINDOW)
            fewer = tl.maximum(n, tl.where(many, least, n) - n + 1)
            added = tl.maximum(n, n - tl.where(few, largest, n))
            v = _held(v0 - tl.where(many, fewer, 0) + tl.where(few, added, 0), n, ALONE)
    bits = n * 0
    minus = n * 0
    for t in tl.static_range(STEPS):
        v += _total(partial, current, bias, i, o, valid, plane, current_step, bias_step, levels, t, PARTIAL, CURRENT)
        v = _held(v, n, ALONE)
        if MODE == 4:  # as many spikes as there are thresholds in the membrane
            for _ in range(levels):
                fired = v >= n
                v = tl.where(fired, v - n, v)
                bits += fired.to(tl.int32)
        else:
            fired = v >= n
            if MODE == 3:
                down = (v < 0) & (more > 0)
                v = tl.where(down, v + n, v)
                more += fired.to(tl.int32) - down.to(tl.int32)
                minus |= down.to(tl.int32) << t
            v = tl.where(fired, v - n, v)
            bits |= fired.to(tl.int32) << t
    if MODE == 2:
        bits = tl.where(more > 0, 0, bits)
    tl.store(out + i, bits.to(tl.uint8), mask=valid)
    if MODE == 3:
        tl.store(negative + i, minus.to(tl.uint8), mask=valid)
    if CONTINUES:
        tl.store(v_out + i, v, mask=valid)
        if MODE == 2 or MODE == 3:
            tl.store(v_out + plane + i, more, mask=valid)


@triton.jit
def _encode_planes(current, n, out, index, valid, plane, T):
    """The recursion on a constant current, all T steps; writes ceil(T/8) planes at `index`."""
    plane = tl.cast(plane, tl.int64)
    v = tl.zeros_like(current) + (n >> 1)
    for p in range(tl.cdiv(T, 8)):
        bits = tl.zeros_like(current)
        for b in tl.static_range(8):
            v += current
            fired = (v >= n) & (p * 8 + b < T)
            v = tl.where(fired, v - n, v)
            bits |= fired.to(tl.int32) << b
        tl.store(out + p * plane + index, bits.to(tl.uint8), mask=valid)


@triton.jit
def _power_of_two(e):
    """2^e in double from its bits, e within -1022 .. 1023 (clamped)."""
    e = tl.minimum(tl.maximum(e, -1022), 1023).to(tl.int64)
    return ((e + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit(
    do_not_specialize=["M", "OH", "OW", "H", "W", "C", "K", "KW", "TAPS", "SH", "SW", "PH", "PW", "DH", "DW", "T"]
)
def analog(
    x,                     # int32 [N, H, W, C], of up to 24 bits
    exponent,              # int32 [N]
    w,                     # int16 [KH, KW, K, O], K = C/groups
    gain, offset,          # float64 [O]
    low, high,             # int32 [O]
    threshold,             # int32 [O], used with FIRE
    out,                   # int32 [M, O] or, with FIRE, masks uint8 [ceil(T/8), M, O]
    M, OH, OW, O, group_outputs, plane,
    H, W, C, K, KW, TAPS, SH, SW, PH, PW, DH, DW, T,
    GROUPED: tl.constexpr, FIRE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """current = clamp(rint(acc * ((gain * 2^half) * 2^(e-half)) + offset), low, high); FIRE: then encode it.

    acc in int64, from products of up to 39 bits. Grid: (tiles of M, tiles of O).
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    row_ok = m < M
    o = tl.program_id(1) * BN + tl.arange(0, BN)
    o_ok = o < O
    ox = m % OW
    oy = (m // OW) % OH
    image = (m // OW // OH).to(tl.int64)
    first = (o // group_outputs) * K
    acc = tl.zeros([BM, BN], tl.int64)
    for i in range(TAPS * K):
        tap = i // K
        ky = tap // KW
        iy = oy * SH - PH + ky * DH
        ix = ox * SW - PW + (tap - ky * KW) * DW
        inside = row_ok & (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W)
        address = x + ((image * H + iy) * W + ix) * C + (i - tap * K)
        b = tl.load(w + tl.cast(i, tl.int64) * O + o, mask=o_ok, other=0).to(tl.int64)
        if GROUPED:
            a = tl.load(address[:, None] + first[None, :], mask=inside[:, None] & o_ok[None, :], other=0).to(tl.int64)
        else:
            a = tl.load(address, mask=inside, other=0).to(tl.int64)[:, None]
        acc += a * b[None, :]
    e = tl.load(exponent + image, mask=row_ok, other=0)
    half = e >> 1
    scale = tl.load(gain + o, mask=o_ok, other=0.0)[None, :] * _power_of_two(half)[:, None]
    scale = scale * _power_of_two(e - half)[:, None]
    z = acc.to(tl.float64) * scale
    z = z + tl.load(offset + o, mask=o_ok, other=0.0)[None, :]
    # The limits are integers, so clamping before rounding is the same and keeps the rounding trick in range.
    z = tl.maximum(z, tl.load(low + o, mask=o_ok, other=0).to(tl.float64)[None, :])
    z = tl.minimum(z, tl.load(high + o, mask=o_ok, other=0).to(tl.float64)[None, :])
    current = ((z + ROUND) - ROUND).to(tl.int32)
    index = m.to(tl.int64)[:, None] * O + o[None, :]
    valid = row_ok[:, None] & o_ok[None, :]
    if FIRE:
        n = tl.zeros([BM, BN], tl.int32) + tl.load(threshold + o, mask=o_ok, other=2)[None, :]
        _encode_planes(current, n, out, index, valid, plane, T)
    else:
        tl.store(out + index, current, mask=valid)


@triton.jit(do_not_specialize=["H", "W", "OH", "OW", "T", "factor"])
def pool(
    x,               # uint8 masks [planes, N, H, W, C] or counts [T, N, H, W, C]
    rows, cols,      # int32 [OH, 3], [OW, 3]: first, end, divisor
    out,             # uint8 counts [T, N, OH, OW, C]
    H, W, C, OH, OW, plane_in, plane_out, T,
    factor,          # common multiple of the divisors, 0: bare sums
    COUNT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Window sums of 8 steps, [8, BC] at a time. Grid: (output pixels, tiles of C, groups of 8 steps)."""
    pixel = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    step = tl.arange(0, 8)
    t = tl.program_id(2) * 8 + step
    ox = pixel % OW
    oy = (pixel // OW) % OH
    image = (pixel // OW // OH).to(tl.int64)
    r0, r1, rd = tl.load(rows + 3 * oy), tl.load(rows + 3 * oy + 1), tl.load(rows + 3 * oy + 2)
    c0, c1, cd = tl.load(cols + 3 * ox), tl.load(cols + 3 * ox + 1), tl.load(cols + 3 * ox + 2)
    valid = (t < T)[:, None] & (c < C)[None, :]
    acc = tl.zeros([8, BC], tl.int32)
    for iy in range(r0, r1):
        for ix in range(c0, c1):
            at = ((image * H + iy) * W + ix) * C + c
            if COUNT:
                address = x + t[:, None].to(tl.int64) * plane_in + at[None, :]
                acc += tl.load(address, mask=valid, other=0).to(tl.int32)
            else:
                m = tl.load(x + tl.program_id(2).to(tl.int64) * plane_in + at, mask=c < C, other=0).to(tl.int32)
                acc += (m[None, :] >> step[:, None]) & 1
    if factor != 0:
        acc *= (factor // (rd * cd)).to(tl.int32)
    target = out + t[:, None].to(tl.int64) * plane_out + (pixel.to(tl.int64) * C + c)[None, :]
    tl.store(target, acc.to(tl.uint8), mask=valid)


@triton.jit(do_not_specialize=["H", "W", "OH", "OW"])
def max_pool(
    x, rows, cols, out,    # as in pool; x and out are masks or, with LARGEST, counts
    H, W, C, OH, OW, plane_in, plane_out,
    LARGEST: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """OR over each window, 8 steps in a byte, or its largest count. Grid: (output pixels, tiles of C, planes)."""
    pixel = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    plane = tl.program_id(2).to(tl.int64)
    ox = pixel % OW
    oy = (pixel // OW) % OH
    image = (pixel // OW // OH).to(tl.int64)
    bits = tl.zeros([BC], tl.uint8)
    for iy in range(tl.load(rows + 3 * oy), tl.load(rows + 3 * oy + 1)):
        for ix in range(tl.load(cols + 3 * ox), tl.load(cols + 3 * ox + 1)):
            at = ((image * H + iy) * W + ix) * C + c
            m = tl.load(x + plane * plane_in + at, mask=c < C, other=0)
            if LARGEST:
                bits = tl.maximum(bits, m)
            else:
                bits |= m
    tl.store(out + plane * plane_out + pixel.to(tl.int64) * C + c, bits, mask=c < C)


@triton.jit(do_not_specialize=["H", "W", "OH", "OW", "factor"])
def pool_counts(
    x, rows, cols, out,    # x int32 [images, H, W, C], out int32 [images, OH, OW, C]
    H, W, C, OH, OW, factor,
    BC: tl.constexpr,
):  # fmt: skip
    """Window sums of int32 counts. Grid: (output pixels of all images, tiles of C)."""
    pixel = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    ox = pixel % OW
    oy = (pixel // OW) % OH
    image = (pixel // OW // OH).to(tl.int64)
    r0, r1, rd = tl.load(rows + 3 * oy), tl.load(rows + 3 * oy + 1), tl.load(rows + 3 * oy + 2)
    c0, c1, cd = tl.load(cols + 3 * ox), tl.load(cols + 3 * ox + 1), tl.load(cols + 3 * ox + 2)
    acc = tl.zeros([BC], tl.int32)
    for iy in range(r0, r1):
        for ix in range(c0, c1):
            acc += tl.load(x + ((image * H + iy) * W + ix) * C + c, mask=c < C, other=0)
    if factor != 0:
        acc *= (factor // (rd * cd)).to(tl.int32)
    tl.store(out + pixel.to(tl.int64) * C + c, acc, mask=c < C)


@triton.jit(do_not_specialize=["elements", "first", "last"])
def count(
    x,           # uint8 masks [ceil(T/8), elements] or counts [T, elements]
    out,         # int32 [1, elements] totals or, with PREFIX, [last - first, elements] running sums
    elements, first, last,    # steps that are counted
    COUNT: tl.constexpr, PREFIX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = i < elements
    plane = tl.cast(elements, tl.int64)
    total = tl.zeros([BLOCK], tl.int32)
    for t in range(first, last):
        if COUNT:
            total += tl.load(x + t * plane + i, mask=valid, other=0).to(tl.int32)
        else:
            total += (tl.load(x + (t // 8) * plane + i, mask=valid, other=0).to(tl.int32) >> (t % 8)) & 1
        if PREFIX:
            tl.store(out + (t - first) * plane + i, total, mask=valid)
    if not PREFIX:
        tl.store(out + i, total, mask=valid)


@triton.jit(
    do_not_specialize=[
        "OH", "OW", "H", "W", "C", "K", "KW", "TAPS", "SH", "SW", "PH", "PW", "DH", "DW", "T", "step_rows", "multiple",
    ]
)  # fmt: skip
def readout(
    counts,        # int32 [images, H, W, C]
    w,             # int16 [KH, KW, K, O]; unused with IDENTITY (then H, W, C are those of the output)
    gain,          # float64 [O]
    offset,        # float64 [O], used with LAST
    total,         # float64 [rows, O], the sum over the terms so far
    out,           # float32 [rows, O], written with LAST
    OH, OW, O, group_outputs, H, W, C, K, KW, TAPS, SH, SW, PH, PW, DH, DW, T,
    step_rows,     # with running counts, the rows of one step (row // step_rows + 1 steps have passed); 0: totals
    multiple,      # divisor of the pool before
    IDENTITY: tl.constexpr, GROUPED: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One term: total + (sum of w * count) * gain / (steps * multiple). Grid: (rows = images*OH*OW, tiles of O).

    One row a program, [BK, BN] weights at a time, so that a single sample still keeps many threads busy.
    """
    row = tl.program_id(0)
    steps = row * 0 + T
    if step_rows != 0:
        steps = row // step_rows + 1
    o = tl.program_id(1) * BN + tl.arange(0, BN)
    o_ok = o < O
    at_row = row.to(tl.int64) * O + o
    if IDENTITY:
        acc = tl.load(counts + at_row, mask=o_ok, other=0).to(tl.int64)
    else:
        ox = row % OW
        oy = (row // OW) % OH
        image = (row // OW // OH).to(tl.int64)
        first = (o // group_outputs) * K
        lane = tl.arange(0, BK)
        blocks = tl.cdiv(K, BK)
        sums = tl.zeros([BK, BN], tl.int64)
        for i in range(TAPS * blocks):
            tap = i // blocks
            k = (i - tap * blocks) * BK + lane
            ky = tap // KW
            iy = oy * SH - PH + ky * DH + k * 0
            ix = ox * SW - PW + (tap - ky * KW) * DW + k * 0
            inside = (k < K) & (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W)
            valid = inside[:, None] & o_ok[None, :]
            at = counts + ((image * H + iy) * W + ix) * C + k
            if GROUPED:
                a = tl.load(at[:, None] + first[None, :], mask=valid, other=0).to(tl.int64)
            else:
                a = tl.load(at, mask=inside, other=0).to(tl.int64)[:, None]
            b = tl.load(w + (tap * K + k).to(tl.int64)[:, None] * O + o[None, :], mask=valid, other=0).to(tl.int64)
            sums += a * b
        acc = tl.sum(sums, axis=0)
    divisor = steps.to(tl.float64) * tl.cast(multiple, tl.float64)
    part = acc.to(tl.float64) * tl.load(gain + o, mask=o_ok, other=0.0)
    part = part / divisor
    before = tl.zeros([BN], tl.float64)  # added to the first term as well: the sum is never -0
    if not FIRST:
        before = tl.load(total + at_row, mask=o_ok, other=0.0)
    part = before + part
    if LAST:
        part = part + tl.load(offset + o, mask=o_ok, other=0.0)
        tl.store(out + at_row, part.to(tl.float32), mask=o_ok)
    else:
        tl.store(total + at_row, part, mask=o_ok)


@triton.jit
def _scaled_input(x, source, scale, shift, image, i, valid, C, W, stride_n, stride_c, stride_h, stride_w):
    c = i % C
    pixel = i // C
    at = image * stride_n + tl.load(source + c, mask=valid, other=0) * stride_c
    at += (pixel // W).to(tl.int64) * stride_h + (pixel % W).to(tl.int64) * stride_w
    z = tl.load(x + at, mask=valid, other=0.0) * tl.load(scale + c, mask=valid, other=0.0)
    return z + tl.load(shift + c, mask=valid, other=0.0)


@triton.jit(do_not_specialize=["per_sample", "C", "W", "stride_n", "stride_c", "stride_h", "stride_w"])
def largest_input(
    x,                           # float32 [N, C', H, W] with any strides
    source, scale, shift,        # int64, float32, float32 [C]
    largest_bits,                # int32 [N], zero before: bits of max |x[source] * scale + shift| over the sample
    per_sample,                  # H * W * C
    C, W, stride_n, stride_c, stride_h, stride_w,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Bits of non-negative floats order as the floats do, infinity and NaN above all. Grid: N * tiles of a sample."""
    tiles = tl.cdiv(per_sample, BLOCK)
    sample = tl.program_id(0) // tiles
    i = (tl.program_id(0) - sample * tiles) * BLOCK + tl.arange(0, BLOCK)
    valid = i < per_sample
    image = sample.to(tl.int64)
    z = _scaled_input(x, source, scale, shift, image, i, valid, C, W, stride_n, stride_c, stride_h, stride_w)
    bits = z.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(largest_bits + image, tl.max(tl.where(valid, bits, 0), axis=0))


@triton.jit(do_not_specialize=["per_sample", "limit", "C", "W", "stride_n", "stride_c", "stride_h", "stride_w"])
def quantize(
    x, source, scale, shift, largest_bits,    # as in largest_input
    out,                              # int32 [N, H, W, C]
    exponent,                         # int32 [N]
    limit, BITS: tl.constexpr,        # (2^(BITS-1) - 1) * 2^(54-BITS), and the bits of a pixel
    per_sample, C, W, stride_n, stride_c, stride_h, stride_w,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """q = rint(z * 2^-e) with the smallest e for which largest <= (2^(BITS-1) - 1) * 2^e. Grid: N * tiles of a sample.

    With largest = f * 2^q and f of 53 bits, `limit` has 53 bits too: e = q + 54 - BITS if f is not above it, else one
    more. A sample that holds NaN or infinity comes out as zeros.
    """
    tiles = tl.cdiv(per_sample, BLOCK)
    sample = tl.program_id(0) // tiles
    tile = tl.program_id(0) - sample * tiles
    i = tile * BLOCK + tl.arange(0, BLOCK)
    valid = i < per_sample
    image = sample.to(tl.int64)
    largest = tl.load(largest_bits + image)
    bits = largest.to(tl.float32, bitcast=True).to(tl.float64).to(tl.int64, bitcast=True)
    fraction = (bits & 0xFFFFFFFFFFFFF) | 0x10000000000000
    e = ((bits >> 52) - 1023 - 52 + 54 - BITS).to(tl.int32)
    e = tl.where(fraction <= limit, e, e + 1)
    e = tl.where((largest == 0) | (largest >= INFINITY), 0, e)
    z = _scaled_input(x, source, scale, shift, image, i, valid, C, W, stride_n, stride_c, stride_h, stride_w)
    z = tl.where(largest < INFINITY, z, 0.0)
    q = (z.to(tl.float64) * _power_of_two(-e) + ROUND) - ROUND
    tl.store(out + image * per_sample + i, q.to(tl.int32), mask=valid)
    if tile == 0:
        tl.store(exponent + image, e)
