"""Quantisation, the analog first layer, pooling, counting and the readout, against plain integers."""

from math import lcm

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import Evidence, random_geometry, random_spikes, tensor

from qcfs_fast import backend
from qcfs_fast.operators.windows import PoolSpec

ENGINES = [("reference", None), *backend.kernel_sets()]
OPS = torch.ops.qcfs_fast


@pytest.fixture(params=ENGINES, ids=[name for name, _ in ENGINES])
def engine(request):
    name, isa = request.param
    with backend.force(isa, reference=isa is None):
        assert backend.describe() == name
        yield name


def identity(channels):
    return torch.arange(channels), torch.ones(channels), torch.zeros(channels)


def test_quantize_input(engine):
    rng = np.random.default_rng(0)
    for _ in range(20):
        N, C, H, W = (int(v) for v in rng.integers(1, 9, 4))
        x = (rng.standard_normal((N, C, H, W)) * 10.0 ** rng.integers(-20, 20, (N, 1, 1, 1))).astype(np.float32)
        source = rng.integers(0, C, C)
        scale, shift = rng.standard_normal((2, C)).astype(np.float32)
        shift *= 10.0**-10
        bits = int(rng.choice([2, 8, 16, 24]))
        q, e = OPS.quantize_input(tensor(x), tensor(source), tensor(scale), tensor(shift), bits)
        limit = 2 ** (bits - 1) - 1
        z = (x[:, source] * scale[:, None, None] + shift[:, None, None]).astype(np.float64)
        for n in range(N):
            most = np.abs(z[n]).max()
            step = 2.0 ** int(e[n])
            assert most <= limit * step
            assert most > limit * step / 2
            assert np.array_equal(q[n].numpy(), np.rint(z[n] / step).astype(np.int32).transpose(1, 2, 0))


def test_quantize_input_takes_any_layout_and_float_type(engine):
    x = torch.randn(3, 5, 6, 4, generator=torch.Generator().manual_seed(0))
    want = OPS.quantize_input(x, *identity(5))
    got = OPS.quantize_input(x.contiguous(memory_format=torch.channels_last), *identity(5))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    strided = torch.stack([x, x], -1)[..., 0]
    assert torch.equal(OPS.quantize_input(strided, *identity(5))[0], want[0])
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        a, b = OPS.quantize_input(x.to(dtype), *identity(5)), OPS.quantize_input(x.to(dtype).float(), *identity(5))
        assert torch.equal(a[0], b[0])


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 32767.0, 32768.0, 2.0**24 - 1, 2.0**-140, 3.4e38])
def test_quantize_input_edges(engine, value):
    q, e = OPS.quantize_input(torch.full((1, 1, 1, 1), value), *identity(1))
    assert abs(int(q)) <= 2**23 - 1
    assert float(q) * 2.0 ** int(e) == pytest.approx(value, rel=2**-23)
    if value in (0.0, 1.0, -1.0, 32767.0, 32768.0):
        assert float(q) * 2.0 ** int(e) == value


def random_analog(rng, T):
    groups = int(rng.choice([1, 1, 1, 2, 3]))
    C, O = groups * int(rng.integers(1, 6)), groups * int(rng.integers(1, 24))
    N = int(rng.integers(1, 4))
    g = random_geometry(rng, groups)
    limit = int(rng.choice([2**7, 2**15, 2**23])) - 1
    x = rng.integers(-limit, limit + 1, (N, 9, 8, C)).astype(np.int32)
    e = rng.integers(-20, 3, N).astype(np.int32)
    w = rng.choice([-32639, 32639, 5, -7, 300], (g[0], g[1], C // groups, O)).astype(np.int16)
    # The reference arithmetic, spelled out: exact sum, two roundings in double, nearest even, clamp.
    acc = oracle.convolve(x.astype(np.int64), w, g)
    gain = 1000.0 / np.maximum(np.abs(acc * 2.0 ** e[:, None, None, None]).mean((0, 1, 2)), 1e-9)
    offset = rng.standard_normal(O) * 100
    n = np.full(O, 2048, dtype=np.int32)
    low, high = np.zeros(O, dtype=np.int32) if rng.random() < 0.5 else -n, n.copy()
    z = acc.astype(np.float64) * (gain * 2.0 ** e[:, None].astype(np.float64))[:, None, None, :] + offset
    current = np.clip(np.rint(z), low, high).astype(np.int64)
    args = [tensor(x), tensor(e), tensor(w), list(g), tensor(gain), tensor(offset), tensor(low), tensor(high)]
    return args, tensor(n), current


def test_first_layer(engine):
    evidence = Evidence()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        T = int(rng.integers(1, 30))
        args, n, current = random_analog(rng, T)
        want = oracle.integrate_and_fire(np.broadcast_to(current, (T, *current.shape)), n.numpy())
        evidence.add(want)
        assert np.array_equal(OPS.conv2d_current(*args).numpy(), current)
        assert np.array_equal(OPS.conv2d_encode(*args, n, T).numpy(), want.masks)
    evidence.check()


@pytest.mark.parametrize(("C", "kernel"), [(29, 1), (30, 1), (31, 1), (32, 1), (510, 1), (1100, 1), (3, 3), (10, 3)])
def test_largest_analog_sums(engine, C, kernel):
    """Sums of a digit that 32 bits would not hold uncut: pixels and weights at their limits, in one row and several."""
    x = torch.full((1, kernel, kernel, C), -(2**23 - 1), dtype=torch.int32)
    x[..., ::3] = 2**23 - 1
    w = torch.full((kernel, kernel, C, 4), -32639, dtype=torch.int16)
    w[..., 1] = 32639
    w[..., 2:] = torch.where(x > 0, 32639, -32639)[0, ..., None].to(torch.int16)
    w[..., 3] *= -1
    acc = oracle.convolve(x.numpy().astype(np.int64), w.numpy(), (kernel, kernel, 1, 1, 0, 0, 1, 1, 1))
    gain, offset = torch.full((4,), 2.0**-22, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    high = torch.full((4,), 2**30, dtype=torch.int32)
    g = [kernel, kernel, 1, 1, 0, 0, 1, 1, 1]
    out = OPS.conv2d_current(x, torch.zeros(1, dtype=torch.int32), w, g, gain, offset, -high, high)
    assert np.array_equal(out.numpy(), np.rint(acc * 2.0**-22).astype(np.int64))


def test_constant_current_gives_qcfs_counts(engine):
    """Bu et al., theorem 2 in exact integers: the count over T is clip(floor(zT/theta + 1/2), 0, T) for every z."""
    n = 720720  # divisible by every T tried, so that z*T/n + 1/2 hits integers exactly
    for T in (1, 2, 3, 4, 7, 8, 9, 16, 33, 70):
        z = torch.cat([torch.arange(-n // 2, 2 * n, 997), torch.arange(-1, 2 * T + 2) * n // (2 * T)]).to(torch.int32)
        threshold, zero = torch.tensor([n], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        masks = OPS.linear_if([], [], [], [], z.reshape(-1, 1), zero, threshold, T)
        counts = OPS.count(masks, T, False).flatten().numpy().astype(np.int64)
        want = np.clip((2 * z.numpy().astype(np.int64) * T + n) // (2 * n), 0, T)
        assert np.array_equal(counts, want)
        assert 0.05 < counts.mean() / T < 0.95


def pools():
    yield "avg", (2, 2), {"stride": (2, 2)}
    yield "avg", (3, 3), {"stride": (2, 2), "padding": (1, 1)}
    yield "avg", (3, 2), {"stride": (2, 1), "padding": (1, 0), "count_include_pad": False}
    yield "avg", (3, 3), {"stride": (2, 2), "ceil_mode": True}
    yield "avg", (3, 3), {"stride": (2, 2), "padding": (1, 1), "ceil_mode": True}
    yield "avg", (2, 2), {"stride": (2, 2), "divisor_override": 3}
    yield "adaptive", (1, 1), {}
    yield "adaptive", (4, 3), {}
    yield "adaptive", (9, 11), {}
    yield "adaptive", (13, 12), {}


@pytest.mark.parametrize(("kind", "size", "options"), list(pools()))
def test_pooling_matches_torch(engine, kind, size, options):
    H, W, T = 9, 11, 5
    rng = np.random.default_rng(0)
    spec = (
        PoolSpec("avg", output=size, size=(H, W))
        if kind == "adaptive"
        else PoolSpec("avg", size, size=(H, W), **options)
    )
    rows, cols = spec.windows(H, 0), spec.windows(W, 1)
    multiple = lcm(*spec.divisors())
    for count in (False, True):
        x = random_spikes(rng, (2, H, W, 17), T, count)
        x = np.minimum(x, 2) if count else x
        steps = torch.from_numpy(oracle.unpack(x, T)).double().permute(0, 1, 4, 2, 3).flatten(0, 1)
        if kind == "adaptive":
            mean = F.adaptive_avg_pool2d(steps, size)
        else:
            mean = F.avg_pool2d(
                steps, size, options["stride"], options.get("padding", 0), options.get("ceil_mode", False),
                options.get("count_include_pad", True), options.get("divisor_override"),
            )  # fmt: skip
        want = (mean * multiple).round().permute(0, 2, 3, 1).unflatten(0, (T, 2))
        counts = OPS.pool_counts(torch.from_numpy(oracle.unpack(x, T).astype(np.int32)), rows, cols, multiple)
        assert torch.equal(counts.double(), want)
        if want.max() <= 255 and spec.depends_on_size is False:
            assert torch.equal(OPS.pool(tensor(x), rows, cols, multiple, T).double(), want)
        if multiple <= 127:
            assert torch.equal(OPS.pool(tensor(x), rows, cols, multiple, T).double(), want)


def test_sections_of_a_window_add_up(engine):
    rng = np.random.default_rng(1)
    spec = PoolSpec("avg", output=(1, 1), size=(20, 33), multiple=660)
    x = random_spikes(rng, (2, 20, 33, 9), 3, False)
    sections = spec.sections(255)
    assert len(sections) > 1
    total = sum(OPS.pool(tensor(x), s.windows(20, 0), s.windows(33, 1), 660, 3).long() for s in sections)
    assert np.array_equal(total.numpy(), oracle.unpack(x, 3).sum((2, 3), keepdims=True))


def test_max_pool(engine):
    rng = np.random.default_rng(2)
    x = random_spikes(rng, (2, 9, 8, 19), 11, False)
    spec = PoolSpec("max", (3, 3), (2, 2), (1, 1))
    out = OPS.max_pool(tensor(x), spec.windows(9, 0), spec.windows(8, 1))
    steps = torch.from_numpy(oracle.unpack(x, 11)).double().permute(0, 1, 4, 2, 3).flatten(0, 1)
    want = F.max_pool2d(steps, 3, 2, 1).unflatten(0, (11, 2)).permute(0, 1, 3, 4, 2)
    assert np.array_equal(oracle.unpack(out.numpy(), 11), want.numpy())
    counts = random_spikes(rng, (2, 9, 8, 19), 3, True)
    out = OPS.max_pool(tensor(counts), spec.windows(9, 0), spec.windows(8, 1), True)
    maps = torch.from_numpy(counts).double().permute(0, 1, 4, 2, 3).flatten(0, 1)
    want = F.max_pool2d(maps, 3, 2, 1).unflatten(0, (3, 2)).permute(0, 1, 3, 4, 2)
    assert np.array_equal(out.numpy(), want.numpy())


def test_count(engine):
    rng = np.random.default_rng(3)
    for T in (1, 2, 8, 9, 23):
        for is_count in (False, True):
            x = random_spikes(rng, (2, 3, 5, 67), T, is_count)
            steps = oracle.unpack(x, T)
            assert np.array_equal(OPS.count(tensor(x), T, False).numpy(), steps.sum(0, keepdims=True))
            assert np.array_equal(OPS.count(tensor(x), T, True).numpy(), steps.cumsum(0))
            first = int(rng.integers(0, T))
            last = int(rng.integers(first + 1, T + 1))
            part = steps[first:last]
            assert np.array_equal(OPS.count(tensor(x), T, False, [first, last]).numpy(), part.sum(0, keepdims=True))
            assert np.array_equal(OPS.count(tensor(x), T, True, [first, last]).numpy(), part.cumsum(0))


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**31))
def test_readout(seed):
    rng = np.random.default_rng(seed)
    T, N, O = int(rng.integers(1, 9)), int(rng.integers(1, 4)), int(rng.integers(1, 20))
    prefix = bool(rng.random() < 0.5)
    S = T if prefix else 1
    g = (2, 3, 1, 1, 1, 1, 1, 1, 1)
    counts = [
        rng.integers(0, 500, (S, N, 5, 6, 4)).astype(np.int32),
        rng.integers(0, 9, (S, N, 6, 6, O)).astype(np.int32),
    ]
    weights = [rng.integers(-32639, 32640, (2, 3, 4, O)).astype(np.int16), np.zeros(0, dtype=np.int16)]
    gains = list(rng.standard_normal((2, O)))
    offset, multiples = rng.standard_normal(O), [36, 1]
    steps = np.arange(1, T + 1, dtype=np.float64) if S > 1 else np.array([T], dtype=np.float64)
    want = np.zeros((S, N, 6, 6, O))
    for c, w, gain, m in zip(counts, weights, gains, multiples, strict=True):
        acc = np.stack([oracle.convolve(step.astype(np.int64), w, g) for step in c]) if w.size else c
        want = want + acc.astype(np.float64) * gain / (steps * m)[:, None, None, None, None]
    want = (want + offset).astype(np.float32)
    for name, isa in ENGINES:
        with backend.force(isa, reference=isa is None):
            assert backend.describe() == name
            out = OPS.readout(
                [tensor(c) for c in counts], [tensor(w) for w in weights], [*g, 1, 1, 1, 1, 0, 0, 1, 1, 1],
                [tensor(v) for v in gains], multiples, tensor(offset), T,
            )  # fmt: skip
        assert np.array_equal(out.numpy(), want)
