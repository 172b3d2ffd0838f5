"""Every operator through the Triton kernels, in Triton's interpreter, against the CPU kernels and the reference: ==."""

import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; make test installs it from constraints.txt", allow_module_level=True)

from math import lcm

import numpy as np
import oracle
import torch
from layers import ODD, Evidence, random_case, random_geometry, random_spikes, random_weights, tensor
from markers import slow_but
from torch import nn

import qcfs_fast
from qcfs_fast import backend
from qcfs_fast.backend.triton import launch as tb
from qcfs_fast.backend.triton import tiles as triton_tiles
from qcfs_fast.operators import masks, reference
from qcfs_fast.operators.geometry import POINTWISE
from qcfs_fast.operators.neuron import MODES
from qcfs_fast.operators.windows import PoolSpec

pytestmark = pytest.mark.triton
OPS = torch.ops.qcfs_fast
SMALL = {"max_T": 20, "max_batch": 2, "max_channels": 33, "max_pixels": 5}


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that ran: a test states which it means."""
    names = []
    launch = tb._launch

    def note(kernel, *args, **options):
        names.append(kernel.fn.__name__)
        return launch(kernel, *args, **options)

    monkeypatch.setattr(tb, "_launch", note)
    return names


def bytes_of(t):
    """Tells 0 and -0 apart, too."""
    return t.contiguous().numpy().tobytes()


def same(name, *args):
    """Run an operator on Triton, the CPU kernels and the reference; returns the common answer."""
    with backend.force(gpu="triton"):
        assert backend.describe() == "triton"
        got = getattr(OPS, name)(*args)
    with backend.force(reference=False):
        assert backend.describe() in [k for k, _ in backend.kernel_sets()]
        want = getattr(OPS, name)(*args)
    with backend.force(reference=True):
        plain = getattr(OPS, name)(*args)
    results = [r if isinstance(r, tuple) else (r,) for r in (got, want, plain)]
    for a, b, c in zip(*results, strict=True):
        assert a.dtype == b.dtype == c.dtype
        assert a.shape == b.shape == c.shape
        assert bytes_of(a) == bytes_of(b) == bytes_of(c)
    return got


def check(name, evidence, seed, *args, **options):
    """A random layer, small enough for the interpreter, on all of them and against plain integers."""
    case = random_case(seed, *args, **{**SMALL, **options})
    assert np.array_equal(same(name, *case.operands).numpy(), case.want.masks), f"seed {seed}"
    evidence.add(case.want)
    return case.operands


def test_the_interpreter_runs():
    assert tb.INTERPRETED
    with backend.force(gpu="triton"):
        assert backend.describe() == "triton"
        assert backend.describe_gpu()["in use"] == "triton"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_random_layers(part, launched):
    evidence = Evidence()
    for seed in range(100 * part, 100 * part + 12):
        check("conv2d_if", evidence, seed)
    evidence.check()
    assert {"spiking_dot", "spiking_direct"} <= set(launched)


@pytest.mark.parametrize("T", slow_but([1, 2, 4, 8, 9, 17], range(1, 21)))
def test_steps(T, launched):
    evidence = Evidence()
    for bits in (8, 16):
        check("conv2d_if", evidence, T, T, channels=17, outputs=9, bits=bits, plain=True)
    assert "spiking_dot" in launched
    evidence.check(ties=False)  # few neurons here; the larger tests show ties


@pytest.mark.parametrize("size", [size for size in ODD if size <= 33])
def test_odd_sizes(size, launched):
    evidence = Evidence()
    for other in (1, 33):
        check("conv2d_if", evidence, 1000 + size, 2, channels=size, outputs=other, plain=True)
        check("conv2d_if", evidence, 2000 + size, 3, channels=other, outputs=size, plain=True)
    evidence.check(ties=False)
    assert {"spiking_dot", "spiking_direct"} <= set(launched)


@pytest.mark.parametrize("mode", slow_but(["plain", "sum"], MODES))
def test_every_mode(mode, launched):
    """Scales, 24-bit weights, biases and currents by step, states; and layers of the image alone."""
    evidence = Evidence()
    for seed in range(12):
        case = random_case(seed, **{**SMALL, "max_channels": 17}, modes=(mode,))
        results = same("conv2d_if" + "_from" * (case.state is not None), *case.operands)
        spikes, *state = results if isinstance(results, tuple) else (results,)
        assert np.array_equal(spikes.numpy(), case.want.masks), f"seed {seed}"
        assert not state or np.array_equal(state[0].numpy(), case.want.state), f"seed {seed}"
        evidence.add(case.want)
    evidence.check()
    assert {"neurons", "spiking_direct", "spiking_dot"} <= set(launched)
    if mode == "sum":  # of the image alone, too: its totals are not held
        n = torch.tensor([1000], dtype=torch.int32)
        current = torch.tensor([[700], [-5], [3]], dtype=torch.int32)
        counts = same("linear_if", [], [], [], [], current, n * 0, n, 1, [], [MODES.index("sum"), 200, 0])
        assert counts.flatten().tolist() == [140, 0, 1]
        return
    rng = np.random.default_rng(8)
    n = np.array([2, 1000, 2**25 - 2], dtype=np.int32)
    for T in (1, 5, 20):
        current = (rng.choice([-31, -1, 0, 1, 2, 31], (T, 2, 3)) * (n.astype(np.int64) // 2) * 2 // 2).astype(np.int32)
        neuron = [MODES.index(mode), min(T, 4), 1] if mode in ("offset", "masked") else [MODES.index(mode), 0, 0]
        threshold = tensor(n)
        same("linear_if", [], [], [], [], tensor(current), threshold * 0, threshold, T, [], neuron)
        if mode in ("plain", "signed"):
            same("linear_if_from", [], [], [], [], tensor(current), threshold * 0, threshold, T, [], neuron)


@pytest.mark.slow
def test_many_sources(launched):
    """More products and residuals than one launch takes: partial sums pass through memory."""
    evidence = Evidence()
    for seed in range(3):
        check("conv2d_if", evidence, seed, products=5, residuals=4, channels=16, plain=True)
        same("conv2d_if", [], [], [], *check("conv2d_if", evidence, seed, residuals=3)[3:])
    evidence.check()
    assert len(launched) > 3 * 4


def test_without_matrix_units(launched, monkeypatch):
    monkeypatch.setattr(tb, "_matrix_units", lambda device: False)
    evidence = Evidence()
    for seed in range(4):
        check("conv2d_if", evidence, seed, channels=7 + seed, outputs=9, plain=True)
    evidence.check()
    assert set(launched) == {"spiking_direct"}


@pytest.mark.slow
@pytest.mark.parametrize("tile", [(16, 32, 64), (64, 16, 32), (32, 64, 32)])
def test_tiles_do_not_matter(tile, monkeypatch, launched):
    monkeypatch.setattr(triton_tiles, "INTERPRETER", triton_tiles.Tile(*tile, 4, 1))
    evidence = Evidence()
    for seed in range(8):
        check("conv2d_if", evidence, seed, channels=33, plain=True)
    evidence.check()
    assert "spiking_dot" in launched


@pytest.mark.slow
def test_digits_apart_from_a_depth_on(launched, monkeypatch):
    """Deep layers keep the sums of high and low digits apart, and the deepest leave the matrix units."""
    evidence = Evidence()
    monkeypatch.setattr(tb, "HORNER_DEPTH", 1)
    for seed in range(6):
        check("conv2d_if", evidence, seed, channels=17, plain=True)
    assert "spiking_dot" in launched
    launched.clear()
    monkeypatch.setattr(tb, "MASK_DEPTH", 1)
    monkeypatch.setattr(tb, "COUNT_DEPTH", 1)
    check("conv2d_if", evidence, 0, channels=17, plain=True)
    assert "spiking_dot" not in launched
    evidence.check()


def test_depth_limits_hold():
    """The largest sums of digit products below each limit fit 32 bits."""
    for depth, worst in (
        (tb.HORNER_DEPTH - 1, 256 * 128 + 128),
        (tb.COUNT_DEPTH - 1, 128 * 128),
        (tb.MASK_DEPTH - 1, 128),
    ):
        assert depth * worst < 2**31


def test_extreme_counts_and_weights(launched):
    """All counts 255 under all-equal extreme weights: the largest partial sums there are."""
    for value in (-32639, 32639):
        x = torch.full((2, 1, 3, 3, 33), 255, dtype=torch.uint8)
        w = torch.full((2, 2, 33, 3), value, dtype=torch.int16)
        bias = torch.tensor([0, 64, -64], dtype=torch.int32)
        n = torch.full((3,), 2 * (255 * 32639 * 33), dtype=torch.int32)
        out = same("conv2d_if", [x], [w], [2, 2, 1, 1, 1, 1, 1, 1, 1], [], [], None, bias, n, 2)
        if value > 0:
            spikes = masks.unpack(out, 2).double().mean()
            assert 0.05 < float(spikes) < 0.95
    assert set(launched) == {"spiking_dot"}


def test_linear(launched):
    evidence = Evidence()
    for seed in range(12):
        check("linear_if", evidence, seed, channels=(9, 33)[seed % 2], linear=True)
    evidence.check()
    assert "spiking_dot" in launched


def test_weights_changed_in_place_are_seen():
    x, (shared,), *rest = random_case(3, 4, channels=16, outputs=16, bits=16, plain=True, products=1, **SMALL).operands
    weight = shared.clone()
    before = same("conv2d_if", x, [weight], *rest)
    weight.neg_()
    assert not torch.equal(before, same("conv2d_if", x, [weight], *rest))
    with torch.inference_mode():
        same("conv2d_if", x, [weight.clone()], *rest)


def test_any_strides():
    """Operands need not be contiguous."""

    def spread(t):
        wide = torch.stack([t, torch.zeros_like(t)], -1)[..., 0]
        assert t.numel() < 2 or not wide.is_contiguous()
        return wide

    for T, channels in ((4, 5), (9, 17)):
        case = random_case(T, T, channels=channels, outputs=9, residuals=1, plain=True, **SMALL)
        x, w, g, r, a, current, bias, n, *_ = case.args
        operands = [spread(t) for t in x], [spread(t) for t in w], g, [spread(t) for t in r], [spread(t) for t in a]
        got = same("conv2d_if", *operands, None if current is None else spread(current), spread(bias), spread(n), T)
        assert torch.equal(got, same("conv2d_if", x, w, g, r, a, current, bias, n, T))
        for name, *rest in (
            ("count", T, True), ("count", T, True, [1, 3]),
            ("pool", [0, 2, 1], [0, 2, 1], 0, T), ("max_pool", [0, 2, 1], [0, 2, 1]),
        ):  # fmt: skip
            same(name, spread(x[0]), *rest)


def test_empty_batch():
    x = torch.zeros((1, 0, 4, 4, 16), dtype=torch.uint8)
    w = torch.ones((3, 3, 16, 5), dtype=torch.int16)
    n = torch.full((5,), 64, dtype=torch.int32)
    assert same("conv2d_if", [x], [w], [3, 3, 1, 1, 1, 1, 1, 1, 1], [], [], None, n, n, 4).shape == (1, 0, 4, 4, 5)
    same("pool", x, [0, 2, 1], [0, 2, 1], 0, 4)
    counts = same("count", x, 4, True)
    gain = torch.ones(5, dtype=torch.float64)
    same("readout", [counts], [w], [3, 3, 1, 1, 1, 1, 1, 1, 1], [gain], [1], gain, 4)
    same("linear_if", [], [], [], [], torch.zeros((0, 5), dtype=torch.int32), n, n, 4)
    same("quantize_input", torch.zeros(0, 3, 4, 4), torch.arange(3), torch.ones(3), torch.zeros(3))


def test_more_rows_than_a_launch_can_count():
    assert tb._rows("pool", 2**31 - 1024) == tb.MAX_ROWS
    with pytest.raises(ValueError, match=r"qcfs_fast::pool: 2147483648 output pixels .* use smaller batches"):
        tb._rows("pool", 2**11, 2**10, 2**10)


# ----------------------------------------------------------------------------------- the other operators


@pytest.mark.slow
def test_first_layer(launched):
    evidence = Evidence()
    for seed in range(16):
        rng = np.random.default_rng(seed)
        T, groups, N = int(rng.integers(1, 21)), int(rng.choice((1, 1, 2, 3))), int(rng.integers(1, 3))
        C, O = groups * int(rng.integers(1, 5)), groups * int(rng.integers(1, 12))
        g = [*random_geometry(rng, groups)[:6], 1, 1, groups]
        limit = 2 ** int(rng.choice([7, 15, 23])) - 1
        x = tensor(rng.integers(-limit, limit + 1, (N, 5, 6, C), dtype=np.int32))
        e = tensor(rng.integers(-21, 4, N, dtype=np.int32))
        w = tensor(random_weights(rng, (g[0], g[1], C // groups, O), 16, seed % 2 == 0))
        acc = reference.convolve(x, w, g) * torch.exp2(e.double())[:, None, None, None]
        gain = 1000.0 / acc.abs().mean((0, 1, 2)).clamp_min(1e-9)
        n = torch.full((O,), 2048, dtype=torch.int32)
        low = torch.zeros_like(n) if rng.random() < 0.5 else -n
        args = (x, e, w, g, gain, tensor(rng.standard_normal(O) * 100), low, n)
        current = same("conv2d_current", *args)
        same("conv2d_encode", *args, n, T)
        same("conv2d_if", [], [], [], [], [], current, torch.zeros_like(n), n, T)
        steps = np.broadcast_to(current.numpy().astype(np.int64), (T, *current.shape))
        evidence.add(oracle.integrate_and_fire(steps, n.numpy()))
    evidence.check(ties=False)
    assert set(launched) == {"analog", "neurons"}


def test_first_layer_rounds_halves_to_even():
    x = torch.arange(-32, 32, dtype=torch.int32).reshape(1, 8, 8, 1)
    limits = torch.tensor([-(2**31) + 1], dtype=torch.int32), torch.tensor([2**31 - 1], dtype=torch.int32)
    for exponent, gain, offset in ((-1, 1.0, 0.0), (0, 0.5, 1e9), (7, 2.0**-8, -(2.0**30)), (-300, 2.0**299, 0.0)):
        e = torch.tensor([exponent], dtype=torch.int32)
        vectors = torch.tensor([gain], dtype=torch.float64), torch.tensor([offset], dtype=torch.float64)
        out = same("conv2d_current", x, e, torch.ones((1, 1, 1, 1), dtype=torch.int16), [*POINTWISE], *vectors, *limits)
        halves = x.double().flatten() / 2 + offset
        assert torch.equal(out.flatten().double(), halves.round())
        assert bool((halves != halves.floor()).any())


def test_constant_current_gives_qcfs_counts():
    n = 720720  # divisible by every T tried, so that z*T/n + 1/2 hits integers exactly
    for T in (1, 2, 7, 8, 9, 16, 20):
        z = torch.cat([torch.arange(-n // 2, 2 * n, 9973), torch.arange(-1, 2 * T + 2) * n // (2 * T)]).to(torch.int32)
        threshold = torch.tensor([n], dtype=torch.int32)
        masks = same("linear_if", [], [], [], [], z.reshape(-1, 1), threshold * 0, threshold, T)
        counts = same("count", masks, T, False).flatten().to(torch.int64)
        want = torch.div(2 * z.to(torch.int64) * T + n, 2 * n, rounding_mode="floor").clamp(0, T)
        assert torch.equal(counts, want)
        assert 0.05 < float(counts.double().mean()) / T < 0.95


def test_quantize_input(launched):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        N, C, H, W = (int(v) for v in rng.integers(1, 6, 4))
        scales = 10.0 ** rng.integers(-30, 31, (N, 1, 1, 1))
        x = tensor((rng.standard_normal((N, C, H, W)) * scales).astype(np.float32))
        source = tensor(rng.integers(0, C, C + 1))
        scale, shift = tensor(rng.standard_normal((2, C + 1)).astype(np.float32))
        same("quantize_input", x, source, scale, shift, int(rng.choice([2, 8, 16, 24])))
        same("quantize_input", x.contiguous(memory_format=torch.channels_last), source, scale, shift * 0)
    one = torch.zeros(1, dtype=torch.int64), torch.ones(1), torch.zeros(1)
    # In float32 the second is a tie, which goes to 0.
    same("quantize_input", torch.tensor([32767.0, 0.5 + 2**-30], dtype=torch.float64).reshape(1, 1, 1, 2), *one)
    edges = (0.0, 1.0, -1.0, 32767.0, 32767.002, 32768.0, 65534.0, 2.0**-140, 1e-45, 3.4e38, -3.4e38)
    same("quantize_input", torch.tensor(edges).reshape(-1, 1, 1, 1), *one)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = tensor(np.random.default_rng(0).standard_normal((2, 3, 5, 5))).to(dtype)
        same("quantize_input", x, torch.arange(3), torch.tensor([0.3, 1.7, -2.9]), torch.tensor([0.1, -0.7, 1.3]))
    assert {"largest_input", "quantize"} == set(launched)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(2, 1, 40, 40)
        x[1, 0, 39, 39] = bad
        with backend.force(gpu="triton"), pytest.raises(ValueError, match="NaN or infinity"):
            OPS.quantize_input(x, *one)


POOLS = (
    PoolSpec("avg", (2, 2), (2, 2)),
    PoolSpec("avg", (3, 2), (2, 1), (1, 0), count_include_pad=False, size=(5, 7)),
    PoolSpec("avg", (3, 3), (2, 2), ceil_mode=True, size=(5, 7)),
    PoolSpec("avg", output=(1, 1), size=(5, 7)),
    PoolSpec("avg", output=(2, 3), size=(5, 7)),
)


@pytest.mark.parametrize("spec", slow_but(POOLS[:1], POOLS))
def test_pooling(spec, launched):
    rows, cols = spec.windows(5, 0), spec.windows(7, 1)
    multiple = lcm(*spec.divisors())
    for T, count in ((1, True), (3, True), (10, False)):
        x = tensor(random_spikes(np.random.default_rng(T), (1, 5, 7, 17), T, count))
        small = x.clamp_max(2) if count else x
        for m in (multiple, 0):
            if m <= 100:
                same("pool", small, rows, cols, m, T)
            same("pool_counts", masks.unpack(x, T).to(torch.int32), rows, cols, m)
        same("max_pool", x, rows, cols)
        for prefix in (False, True):
            same("count", x, T, prefix)
    assert {"pool", "pool_counts", "max_pool", "count"} == set(launched)


@pytest.mark.slow
def test_readout(launched):
    for seed in range(12):
        rng = np.random.default_rng(seed)
        T, N, O, K = (int(rng.integers(1, end)) for end in (5, 3, 20, 21))
        groups = int(rng.choice([g for g in (1, 2, 3) if O % g == 0]))
        S = T if rng.random() < 0.5 else 1
        counts = [tensor(rng.integers(0, 501, (S, N, 1, 3, K * groups), dtype=np.int32))]
        counts.append(tensor(rng.integers(0, 2**31 - 1, (S, N, 2, 2, O), dtype=np.int32, endpoint=True)))
        weights = [tensor(random_weights(rng, (2, 3, K, O), 16, rng.random() < 0.5)), torch.zeros(0, dtype=torch.int16)]
        gains, offset = list(tensor(rng.standard_normal((2, O)))), tensor(rng.standard_normal(O))
        geometry = [2, 3, 1, 2, 1, 1, 1, 1, groups, *POINTWISE]
        if seed == 0:  # sums that are -0 only where the first term is not added to 0
            counts, gains, offset = [c * 0 for c in counts], [-g.abs() for g in gains], torch.full_like(offset, -0.0)
        for n in (1, 2):
            same("readout", counts[:n], weights[:n], geometry[: 9 * n], gains[:n], [36, 7][:n], offset, T)
    assert set(launched) == {"readout"}


# -------------------------------------------------------------------------------------- whole networks


class Block(nn.Module):
    """A residual block with a projection shortcut, then one with identity."""

    def __init__(self, groups):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 12, 3, 1, 1, groups=groups)
        self.short = nn.Conv2d(8, 12, 1, 2)
        self.c = nn.Conv2d(12, 12, 3, 1, 2, dilation=2)
        self.norm = nn.BatchNorm2d(12)

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.a(x))) + self.short(x))
        return torch.relu(self.norm(self.c(x)) + x)


def network(groups, head):
    torch.manual_seed(groups)
    stem = [nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    tail = {
        "linear": [nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)],
        "global": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)],
    }[head]
    return nn.Sequential(*stem, Block(groups), *tail)


@pytest.mark.parametrize(
    ("groups", "head", "bits"),
    [
        (1, "linear", 16),
        pytest.param(12, "global", 16, marks=pytest.mark.slow),
        pytest.param(3, "linear", 8, marks=pytest.mark.slow),
    ],
)
def test_networks(groups, head, bits, launched):
    images = torch.rand((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    model = qcfs_fast.prepare(network(groups, head).eval(), levels=4)
    qcfs_fast.calibrate(model, [images], progress=False)
    snn = qcfs_fast.convert(model, T=4, weight_bits=bits, max_T=17, input_shape=(3, 8, 8))
    for T in {16: (1, 11), 8: (4, 17)}[bits]:
        values = []
        for gpu in ("triton", "auto"):
            seen = {}
            with backend.force(gpu=gpu), torch.no_grad():
                assert (backend.describe() == "triton") == (gpu == "triton")
                logits = snn.run(images, T, per_step=True, watch=lambda name, _, value, s=seen: s.update({name: value}))
            values.append((logits, seen))
        (a, first), (b, second) = values
        assert torch.equal(a, b)
        rates = []
        for name in snn.spiking_layers:
            assert torch.equal(first[name], second[name]), name
            rates.append(float(masks.unpack(second[name], T).double().mean()))
        assert 0.05 < sum(rates) / len(rates) < 0.95
    assert {"quantize", "analog", "spiking_dot", "count", "readout"} <= set(launched)


# ------------------------------------------------------------------------------------------------ tiles


def problem(**changes):
    values = {"rows": 1000, "outputs": 64, "groups": 1, "inputs": 64, "depth": 576, "steps": 4, "accumulators": 4}
    return triton_tiles.Problem(**{**values, "variant": "x", **changes})


def test_tile_candidates():
    for hip, limit in ((False, 32 * triton_tiles.REGISTERS), (True, 64 * triton_tiles.REGISTERS_HIP)):
        for accumulators in range(1, 17):
            for rows in (1, 49, 10**6):
                for outputs in (1, 9, 512):
                    shape = problem(rows=rows, outputs=outputs, accumulators=accumulators)
                    found = triton_tiles.candidates(shape, hip)
                    assert 1 <= len(found) <= 7
                    for t in found:
                        small = (t.m, t.n) == triton_tiles.SMALL[:2]
                        assert small or t.m * t.n * accumulators <= limit * t.warps
                        assert t.warps == 4 or not hip


def test_fastest_tile_skips_what_does_not_fit():
    tiles = triton_tiles.candidates(problem())
    times = {tiles[0]: 3.0, tiles[1]: 1.0}
    ran = []

    def milliseconds(run):
        run()
        if ran[-1] not in times:
            raise triton_tiles.triton.runtime.errors.OutOfResources(1, 0, "shared memory")
        return times[ran[-1]]

    assert triton_tiles.fastest(tiles, ran.append, milliseconds) == tiles[1]
    assert ran == tiles


def test_tile_cache(tmp_path):
    path = tmp_path / "deeper" / "triton-tiles.json"
    assert triton_tiles.read_cache(path) == {}
    a, b = triton_tiles.Tile(1, 2, 3, 4, 5), triton_tiles.Tile(5, 4, 3, 2, 1)
    triton_tiles.write_cache(path, {"a": a})
    triton_tiles.write_cache(path, {"b": b})
    assert triton_tiles.read_cache(path) == {"a": a, "b": b}
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    for broken in (b"", b"[]", b'{"a": [1]}', b'{"a": 3}', b"{", b"\xff\xfe\x00"):
        path.write_bytes(broken)
        assert triton_tiles.read_cache(path) == {}
    triton_tiles.write_cache(path, {"a": a})
    assert triton_tiles.read_cache(path) == {"a": a}


def test_tile_cache_under_concurrent_writers(tmp_path):
    """Readers never see half a file, and no temporary file stays."""
    path = tmp_path / "triton-tiles.json"
    tile = triton_tiles.Tile(1, 2, 3, 4, 5)
    triton_tiles.write_cache(path, {f"key {i}": tile for i in range(500)})

    def write(thread):
        for i in range(20):
            triton_tiles.write_cache(path, {f"{thread} {i}": tile})
            assert len(json.loads(path.read_text())) >= 500

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert list(tmp_path.iterdir()) == [path]


def test_tile_cache_that_cannot_be_kept(tmp_path, monkeypatch):
    tile = triton_tiles.Tile(1, 2, 3, 4, 5)
    occupied = tmp_path / "file"
    occupied.write_text("")
    triton_tiles.write_cache(occupied / "triton-tiles.json", {"a": tile})  # no folder can be made there
    (tmp_path / "triton-tiles.json").mkdir()
    triton_tiles.write_cache(tmp_path / "triton-tiles.json", {"a": tile})  # nor a file moved there
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "triton-tiles.json"]

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("QCFS_FAST_CACHE_DIR", raising=False)
    monkeypatch.setattr(triton_tiles.Path, "home", homeless)
    assert triton_tiles.cache_file() is None
    triton_tiles.write_cache(None, {"a": tile})
    assert triton_tiles.read_cache(None) == {}


def test_tiles_are_timed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("QCFS_FAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton_tiles, "_known", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "fake")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    ran = []
    monkeypatch.setattr(triton_tiles, "_milliseconds", lambda run: (run(), -float(len(ran)))[1])
    options = triton_tiles.candidates(problem())
    assert triton_tiles.choose(problem(), ran.append, "gpu 1", False) == options[-1]  # each beats the one before
    assert ran == options
    monkeypatch.setattr(triton_tiles, "_known", None)  # a new process reads the file
    assert triton_tiles.choose(problem(), ran.append, None, False) == options[-1]
    assert ran == options
    monkeypatch.setenv("QCFS_FAST_TRITON_TUNE", "0")
    assert triton_tiles.choose(problem(), ran.append, None, False) == options[0]
    assert triton_tiles.choose(problem(), ran.append, None, True) == triton_tiles.INTERPRETER
    monkeypatch.setenv("QCFS_FAST_TRITON_TUNE", "off")
    with pytest.raises(ValueError, match="QCFS_FAST_TRITON_TUNE='off' is unknown; it is 0"):
        triton_tiles.choose(problem(), ran.append, None, False)


def test_tile_key():
    """What may change the fastest tile is in the key."""
    key = problem().key("gpu")
    assert "gpu" in key
    assert triton_tiles.triton.__version__ in key
    assert qcfs_fast.__version__ in key
    assert problem(rows=900).key("gpu") == key  # the same power of two
    for change in ({"rows": 500}, {"outputs": 63}, {"groups": 2}, {"inputs": 63}, {"depth": 9}, {"variant": "y"}):
        assert problem(**change).key("gpu") != key


def test_no_tile_is_timed_under_capture(monkeypatch):
    monkeypatch.setattr(triton_tiles, "_known", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "fake")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert triton_tiles.choose(problem(), pytest.fail, None, False) == triton_tiles.candidates(problem())[0]
    assert triton_tiles._known == {}


def test_unavailable_says_why(monkeypatch):
    assert tb.unavailable() == ""  # interpreted
    monkeypatch.setattr(tb, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no GPU" in tb.unavailable()

    class Driver:
        def get_current_target(self):
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tb.triton.runtime, "driver", SimpleNamespace(active=Driver()))
    assert "Triton cannot use the GPU (RuntimeError: Failed to find C compiler" in tb.unavailable()


def test_matrix_units_by_architecture():
    has = tb.has_matrix_units
    assert not has("cuda", 75, (3, 9, 0))
    assert all(has("cuda", arch, (3, 3, 0)) for arch in (80, 86, 89, 90, 100))
    assert not has("cuda", 120, (3, 3, 0))
    assert has("cuda", 120, (3, 9, 0))
    assert has("hip", "gfx90a", (3, 9, 0))
    assert not has("hip", "gfx1030", (3, 9, 0))
