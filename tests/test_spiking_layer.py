"""conv2d_if and linear_if: every CPU kernel set and the reference against plain integers, with ==."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import Evidence, random_case, random_spikes, tensor

from qcfs_fast import backend
from qcfs_fast.backend.protocol import last_engine
from qcfs_fast.operators.neuron import MODES

# The reference, and every kernel set with every engine that can be asked for.
ENGINES = [("reference", None, "auto")] + [
    (name, isa, how) for name, isa in backend.kernel_sets() for how in ("events", "dense", "table")
]
IDS = [f"{name} {how}" for name, _, how in ENGINES]


@pytest.fixture(params=ENGINES, ids=IDS)
def engine(request):
    name, isa, how = request.param
    with backend.force(isa, reference=isa is None, cpu_engine=how):
        assert backend.describe() == name  # the kernels under test are the ones that run
        yield name


def test_every_kernel_set_is_covered():
    assert {"portable dense", "portable events", "portable table"} <= set(IDS) or {
        "neon dense", "neon events", "neon table"
    } <= set(IDS)  # fmt: skip
    assert len(IDS) == 1 + 3 * len(backend.kernel_sets())


def ran(case_args):
    """The engine that a native call must have used."""
    x, w, geometry, *_, T, _, _ = case_args
    groups = geometry[8::9]
    if any(g != 1 for g in groups):
        O = w[0].shape[3]
        return "depthwise" if all(g == O == t.shape[4] for g, t in zip(groups, x, strict=True)) else "grouped"
    if backend.settings().engine == "events" or not x:
        return "events"
    if backend.settings().engine == "table":
        spikes = all(t.shape[0] != T or (T == 1 and (not t.numel() or int(t.max()) <= 1)) for t in x)
        dilated = any(geometry[9 * i + 1] > 1 and geometry[9 * i + 7] > 1 for i in range(len(x)))
        return "table" if spikes and not dilated else "events"
    large = any(t.shape[0] == T and t.numel() and int(t.max()) > 127 for t in x)
    return "events" if large and not backend.kernel_set().endswith(("vnni", "amx")) else "dense"


def test_random_layers(engine):
    evidence = Evidence()

    @settings(max_examples=60 if engine == "reference" else 150, deadline=None, database=None, derandomize=True)
    @given(st.integers(0, 2**31), st.one_of(st.integers(1, 20), st.integers(21, 70)))
    def check(seed, T):
        case = random_case(seed, T)
        out = torch.ops.qcfs_fast.conv2d_if(*case.operands)
        evidence.add(case.want)
        assert np.array_equal(out.numpy(), case.want.masks)
        if engine != "reference":
            used.add(last_engine.get())
            assert last_engine.get() == ran(case.operands)

    used = set()
    check()
    evidence.check()
    if engine != "reference":
        assert backend.settings().engine in used
        assert {"depthwise", "grouped"} <= used


@pytest.mark.parametrize("mode", MODES)
def test_random_layers_of_every_mode(engine, mode):
    """Every mode; scales, 24-bit weights, a bias and a current by step, and states that go in and come out."""
    evidence = Evidence()

    @settings(max_examples=40 if engine == "reference" else 100, deadline=None, database=None, derandomize=True)
    @given(st.integers(0, 2**31), st.one_of(st.integers(1, 20), st.integers(21, 70)))
    def check(seed, T):
        case = random_case(seed, T, max_channels=33, max_pixels=4, modes=(mode,))
        evidence.add(case.want)
        case.check("conv2d_if")

    check()
    evidence.check()


def test_linear_layers_of_every_mode(engine):
    evidence = Evidence()
    for seed in range(60):
        case = random_case(seed, max_T=20, linear=True, modes=MODES)
        evidence.add(case.want)
        case.check("linear_if")
    evidence.check()


def test_a_layer_of_the_image_alone(engine):
    """No products, no residuals: currents by step up to 31 thresholds, membranes held within 32 of them."""
    rng = np.random.default_rng(8)
    evidence = Evidence()
    for mode in MODES[:4]:
        for T in (1, 5, 40):
            n = np.array([2, 1000, 2**25 - 2], dtype=np.int32)
            share = rng.choice([-31, -1, 0, 1, 2, 31], (T, 2, 1, 3, 3)) / rng.choice([1, 2], (T, 2, 1, 3, 3))
            current = (share * n).astype(np.int32)
            window, iterations = (min(T, 4), 1) if mode in ("offset", "masked") else (0, 0)
            want = oracle.fire(current.astype(np.int64), n, mode, window, iterations, alone=True)
            evidence.add(want)
            neuron = [MODES.index(mode), window, iterations]
            zero = torch.zeros(3, dtype=torch.int32)
            out = torch.ops.qcfs_fast.conv2d_if([], [], [], [], [], tensor(current), zero, tensor(n), T, [], neuron)
            assert np.array_equal(out.numpy(), want.masks)
    evidence.check()


def by_hand(mode, currents, more=(0, 0), state=None, n=4):
    """Spikes of one neuron of threshold 4 on these currents, masks as ints; `state` is replaced by that at the end."""
    T = len(currents)
    current = torch.tensor(currents, dtype=torch.int32).reshape(T, 1, 1)
    one = torch.zeros(1, 1, 1, dtype=torch.uint8).expand(T, 1, 1)  # a silent input: no layer of the image alone
    operands = ([one], [torch.ones(1, 1, dtype=torch.int16)], [], [], current)
    neuron = [MODES.index(mode), *more]
    zero, threshold = torch.zeros(1, dtype=torch.int32), torch.tensor([n], dtype=torch.int32)
    operands += (zero, threshold, T, [], neuron)
    if state is None:
        return torch.ops.qcfs_fast.linear_if(*operands).flatten().tolist()
    out, state[:] = torch.ops.qcfs_fast.linear_if_from(*operands, state)
    return out.flatten().tolist()


def test_rules_by_hand(engine):
    """n = 4, so membranes start at 2. Each comment gives the membranes before reset."""
    # plain: 6 -1 -1: a spike too early, which nothing takes back. The count should be floor((1 + 2) / 4) = 0.
    assert by_hand("plain", [4, -3, 0]) == [0b001]
    # offset: residual -1, count 1, A = 6: v0 = 2 - max(4, 6 - 4 + 1) = -2, so 2 -1 -1: no spike.
    assert by_hand("offset", [4, -3, 0], (3, 1)) == [0b000]
    # A = 9: v0 = 2 - max(4, 9 - 4 + 1) = -4, so 3 -7: the step no longer fires, just so.
    assert by_hand("offset", [7, -10], (2, 1)) == [0b00]
    # One too few: 2 0 10*, residual 6 >= 4, count 1 of 3, B = 2: v0 = 2 + max(4, 4 - 2) = 6, so 6* 0 10*: two spikes.
    assert by_hand("plain", [0, -2, 10]) == [0b100]
    assert by_hand("offset", [0, -2, 10], (3, 1)) == [0b101]
    # Saturated: it fires at every step already, so nothing is added. 12* 18* 24*
    assert by_hand("offset", [10, 10, 10], (3, 1)) == [0b111]
    # The window is a part of the run: only the first two steps are looked at, and those are in order.
    assert by_hand("offset", [4, -1, -9], (2, 1)) == by_hand("plain", [4, -1, -9])
    # masked: 6* -1: ends below 0, silent for good, and so is a neuron that ends at 0 exactly (6* 2 0).
    assert by_hand("masked", [4, -3, 9], (2, 1)) == [0b000]
    assert by_hand("masked", [4, -2, 9], (2, 1)) == [0b000]
    assert by_hand("masked", [4, -1, 9], (2, 1)) == [0b101]
    # signed: 6* -1- 3; the spike is taken back. At v = 0 it is not (4* 0 0), nor before anything was sent (-1 -1).
    assert by_hand("signed", [4, -3, 0]) == [0b001, 0b010]
    assert by_hand("signed", [2, 0, 0]) == [0b001, 0b000]
    assert by_hand("signed", [-3, 0, 0]) == [0b000, 0b000]
    # A state: after 6* the membrane is 2 and one spike is sent; the next call takes it back.
    state = torch.tensor([[[2]], [[0]]], dtype=torch.int32)
    assert by_hand("signed", [4], state=state) == [0b1, 0b0]
    assert state.flatten().tolist() == [2, 1]
    assert by_hand("signed", [-3, 0], state=state) == [0b00, 0b01]
    assert state.flatten().tolist() == [3, 0]
    # sum of 3 levels: the current counts three times, floor((3 I + 2) / 4) between 0 and 3; at I = 2 it is 8 / 4.
    assert [by_hand("sum", [i], (3, 0))[0] for i in (-9, 0, 1, 2, 3, 99)] == [0, 0, 1, 2, 2, 3]


def test_16_bit_weights_with_the_largest_scale(engine):
    rng, T, N, K, O = np.random.default_rng(0), 9, 4, 30, 37
    x = [(rng.random((T, N, K)) < 0.5).astype(np.uint8) for _ in range(2)]
    w = [rng.integers(-200, 201, (K, O)).astype(np.int16) for _ in range(2)]
    scale, bias, threshold = [65536, -65536], rng.integers(-(2**26), 2**27, O), np.full(O, 2**27)
    currents = bias + sum(
        s * (xi.astype(np.int64) @ wi.astype(np.int64)) for s, xi, wi in zip(scale, x, w, strict=True)
    )
    want = oracle.fire(currents, threshold, "plain", 0, 0)  # which asserts that nothing leaves 32 bits
    given = [tensor(bias.astype(np.int32)), tensor(threshold.astype(np.int32))]
    spikes = [tensor(oracle.pack(xi)) for xi in x]
    found = torch.ops.qcfs_fast.linear_if(spikes, [tensor(wi) for wi in w], [], [], None, *given, T, scale, [0, 0, 0])
    assert np.array_equal(found.numpy(), want.masks)
    assert 0.05 < oracle.unpack(want.masks, T).mean() < 0.95
    with pytest.raises(ValueError, match="16-bit weights take scales of one size"):
        torch.ops.qcfs_fast.linear_if(spikes, [tensor(wi) for wi in w], [], [], None, *given, T, [65536, 1], [0, 0, 0])


@pytest.mark.slow
@pytest.mark.long
def test_many_layers_agree_between_engines():
    """Beyond what the slow oracle can afford: larger layers, all engines against each other."""
    spikes = neurons = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        case_args = _wide_layer(rng)
        outputs = []
        for name, isa, how in ENGINES[1:]:
            with backend.force(isa, cpu_engine=how):
                assert backend.describe() == name
                outputs.append(torch.ops.qcfs_fast.conv2d_if(*case_args))
        assert all(torch.equal(outputs[0], o) for o in outputs[1:]), f"seed {seed}"
        bits = oracle.unpack(outputs[0].numpy(), case_args[8])
        spikes, neurons = spikes + int((bits & 1).sum()), neurons + bits.size
        if seed % 20 == 0:
            with backend.force(reference=True):
                assert torch.equal(outputs[0], torch.ops.qcfs_fast.conv2d_if(*case_args)), f"seed {seed}"
    assert 0.05 < spikes / neurons < 0.95


def _wide_layer(rng):
    T = int(rng.integers(1, 17))
    C, O = (int(v) for v in rng.choice([1, 3, 16, 33, 64, 100, 128, 200, 257], 2))
    x = random_spikes(rng, (int(rng.integers(1, 3)), 7, 6, C), T, rng.random() < 0.2)
    w = rng.integers(-32639, 32640, (3, 3, C, O)).astype(np.int16)
    n = max(2, int(32639 * np.sqrt(C) * (1 if x.shape[0] != T or T == 1 else 100)))
    threshold = np.full(O, n // 2 * 2, dtype=np.int32)
    bias = rng.integers(-1000, 1000, O).astype(np.int32)
    g = [3, 3, int(rng.integers(1, 3)), 1, 1, 1, 1, 1, 1]
    return [tensor(x)], [tensor(w)], g, [], [], None, tensor(bias), tensor(threshold), T


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("O", "size"), [(8, (2, 112, 64, 64)), (600, (40, 14, 14, 64)), (9, (1, 2, 3000, 64))])
def test_layers_larger_than_a_wave(O, size):
    """Samples and rows in turns, weights beyond the cache, strips of wide rows: as each sample alone, T = 8."""
    rng = np.random.default_rng(O)
    T, wholes = 40, []
    x = tensor(random_spikes(rng, size, T, False))
    w = tensor(rng.integers(-32639, 32640, (3, 3, 64, O)).astype(np.int16))
    threshold, bias = torch.full((O,), 400_000, dtype=torch.int32), torch.zeros(O, dtype=torch.int32)
    for name, isa, how in ENGINES[1:]:
        if O == 600 and ("portable" in name or how == "table"):
            continue  # slow, and the same code; tables of 600 outputs are larger than that engine takes
        with backend.force(isa, cpu_engine=how):
            layer = [w], [3, 3, 1, 1, 1, 1, 1, 1, 1], [], [], None, bias, threshold
            whole = torch.ops.qcfs_fast.conv2d_if([x], *layer, T)
            assert last_engine.get() == how
            wholes.append(whole)
            for n in range(0, size[0], 13):
                alone = torch.ops.qcfs_fast.conv2d_if([x[:1, n : n + 1]], *layer, 8)
                assert torch.equal(whole[:1, n : n + 1], alone)
            assert 0.05 < oracle.unpack(alone.numpy(), 8).mean() < 0.95
    assert all(torch.equal(w, wholes[0]) for w in wholes)


def test_linear(engine):
    evidence = Evidence()
    for seed in range(40):
        case = random_case(seed, max_T=20, linear=True)
        evidence.add(case.want)
        assert np.array_equal(torch.ops.qcfs_fast.linear_if(*case.operands).numpy(), case.want.masks), f"seed {seed}"
    evidence.check()


def test_large_linear_layer_in_chunks(engine):
    """Weights of one panel beyond the cache: taken chunk by chunk, with sums waiting in memory."""
    rng = np.random.default_rng(5)
    T, N, K, O = 5, 3, 6144, 70
    x = random_spikes(rng, (N, K), T, False)
    w = rng.integers(-300, 301, (K, O)).astype(np.int16)
    bias = rng.integers(-50, 51, O).astype(np.int32)
    total = oracle.unpack(x, T) @ w.astype(np.int64) + bias
    threshold = np.maximum(2 * np.rint(np.abs(total).mean((0, 1)) / 2), 2).astype(np.int32)
    want = oracle.integrate_and_fire(total, threshold)
    out = torch.ops.qcfs_fast.linear_if([tensor(x)], [tensor(w)], [], [], None, tensor(bias), tensor(threshold), T)
    assert np.array_equal(out.numpy(), want.masks)
    assert 0.05 < want.rate < 0.95


@pytest.mark.parametrize(
    ("K", "T", "values"),
    [(1024, 8, (1, 1)), (600, 2, (2, 4)), (250, 2, (33, 64)), (125, 2, (65, 127)), (60, 2, (128, 255))],
)
def test_sums_of_bytes_at_their_limits(engine, K, T, values):
    """Weights of 127 and -128 under inputs that all fire: partial sums in 16 bits are as large as they can be."""
    rng = np.random.default_rng(K)
    sign = np.tile([1, -1, 1, -1, 1], 7)
    limit = np.where(sign < 0, 128, 127)
    w = np.broadcast_to(sign * limit, (K, sign.size)).astype(np.int8)
    w[:, 4::5] = rng.choice([-128, 127], (K, 7))
    low, high = values
    shape = (3, 1, 1, K)
    if high == 1:
        x = np.full((T + 7) // 8 * 3 * K, 2**T - 1, dtype=np.uint8).reshape(-1, *shape)
    else:
        x = rng.integers(low, high + 1, (T, *shape)).astype(np.uint8)
    reach = K * 128 * 256 * high
    assert 2 * reach * T < 2**31
    unit = limit * 256
    bias = np.where(sign < 0, reach // unit * unit, 0).astype(np.int32)
    n = np.full(sign.size, reach // unit // 3 * 2 * unit, dtype=np.int32)  # on the grid of the sums
    total = oracle.currents([(x, w[None, None], (1, 1, 1, 1, 0, 0, 1, 1, 1))], [], None, bias, T)
    want = oracle.integrate_and_fire(total, n)
    args = ([tensor(x[..., 0, 0, :])], [tensor(w)], [], [], None, tensor(bias), tensor(n), T)
    out = torch.ops.qcfs_fast.linear_if(*args)
    assert np.array_equal(out.numpy()[:, :, None, None], want.masks)
    assert 0.05 < want.rate < 0.95
    if engine != "reference":
        assert last_engine.get() in ("events", "dense", "table")


@pytest.mark.parametrize(("weight", "fitting"), [(127, 258), (-128, 256), (217, 151), (-256, 128)])
@pytest.mark.parametrize("beyond", [0, 1])
def test_sums_at_the_edge_of_16_bits(engine, weight, fitting, beyond):
    """Tables have 16-bit sums up to here and wider ones beyond. All inputs fire; a membrane meets its threshold."""
    k, scale = fitting + beyond, 1 if abs(weight) > 128 else 256
    w = torch.full((k, 2), weight, dtype=torch.int16 if scale == 1 else torch.int8)
    x = torch.full((1, 1, k), 0b01, dtype=torch.uint8)
    n = torch.full((2,), 1000, dtype=torch.int32)
    bias = 500 - k * weight * scale - torch.tensor([0, 1], dtype=torch.int32)  # ends at n, and one short of it
    out = torch.ops.qcfs_fast.linear_if([x], [w], [], [], None, torch.stack([bias, 0 * bias]), n, 2)
    assert out.flatten().tolist() == [0b01, 0b00]
    if backend.settings().engine == "table" and engine != "reference":
        assert last_engine.get() == "table"


def test_weights_changed_in_place_are_packed_again(engine):
    rng = np.random.default_rng(6)
    x = tensor(random_spikes(rng, (1, 6, 6, 16), 4, False))
    w = tensor(rng.integers(-500, 501, (3, 3, 16, 24)).astype(np.int16))
    rest = ([3, 3, 1, 1, 1, 1, 1, 1, 1], [], [], None, torch.zeros(24, dtype=torch.int32))
    threshold = torch.full((24,), 800, dtype=torch.int32)
    before = torch.ops.qcfs_fast.conv2d_if([x], [w], *rest, threshold, 4)
    assert torch.equal(before, torch.ops.qcfs_fast.conv2d_if([x], [w], *rest, threshold, 4))
    w.neg_()
    after = torch.ops.qcfs_fast.conv2d_if([x], [w], *rest, threshold, 4)
    assert not torch.equal(before, after)
    assert torch.equal(after, torch.ops.qcfs_fast.conv2d_if([x], [w.clone()], *rest, threshold, 4))


def engine_at(rate, channels=128):
    """The engine that `auto` takes for a layer of 8-bit weights and spikes of this rate."""
    rng = np.random.default_rng(7)
    w = tensor(rng.integers(-127, 128, (3, 3, channels, channels)).astype(np.int8))
    n = torch.full((channels,), 256 * 400, dtype=torch.int32)
    x = tensor(oracle.pack(rng.random((4, 1, 14, 14, channels)) < rate))
    torch.ops.qcfs_fast.conv2d_if([x], [w], [3, 3, 1, 1, 1, 1, 1, 1, 1], [], [], None, torch.zeros_like(n), n, 4)
    return last_engine.get()


def test_few_spikes_go_through_lists():
    assert engine_at(0.02) == "events"


def test_narrow_layers_look_up_tables():
    if backend.kernel_set().endswith(("vnni", "amx")):
        pytest.skip(f"{backend.kernel_set()} has fast products of bytes, so the matrix product may win")
    assert engine_at(0.05, channels=16) == "table"


def test_many_spikes_go_through_the_matrix_product():
    if not backend.kernel_set().endswith(("vnni", "amx")):
        pytest.skip(f"{backend.kernel_set()} has no fast products of bytes, so lists may win at any rate")
    assert engine_at(0.95) == "dense"


def masks_and_sets():
    """Instruction sets of processors, most of which nobody here has, and the kernel set that each must run."""
    n = backend.native.module
    if n is None:
        return
    built = n.kernel_sets()
    baseline, avx2, avx512 = built[-1][0], n.ISA_AVX2, n.ISA_AVX2 | n.ISA_AVX512
    yield 0, baseline
    yield n.ISA_AMX, baseline  # tiles without the rest
    yield n.ISA_AVX512, baseline  # no known level: AVX-512 without AVX2
    yield avx2, "avx2"
    yield avx2 | n.ISA_AVXVNNI, "avxvnni"
    yield avx512, "avx512"
    yield avx512 | 1 << 31, "avx512"  # a bit that nobody knows
    yield avx512 | n.ISA_AVXVNNI, "avx512"
    yield avx512 | n.ISA_AVX512VNNI, "avx512vnni"
    yield avx512 | n.ISA_AVX512VNNI | n.ISA_AMX, "amx"
    yield n.ISA_NEON | n.ISA_NEONDOT, "neondot"
    yield from ((mask, name) for name, mask in built)


@pytest.mark.parametrize(("mask", "want"), list(masks_and_sets()))
def test_the_best_allowed_kernel_set_is_picked(mask, want):
    """Dispatch is a function of the mask."""
    if want not in [name for name, _ in backend.native.module.kernel_sets()]:
        pytest.skip(f"{want} is not built for this processor family, or not by this compiler")
    assert backend.native.module.chosen_kernel_set(mask) == want


def test_a_mask_beyond_this_processor_is_refused():
    with pytest.raises(ValueError, match="lacks some of the instruction sets"), backend.force(1 << 31):
        pass


def test_threads_and_batch_splits_do_not_matter():
    evidence = Evidence()
    for seed in range(30):
        case = random_case(1000 + seed, max_pixels=12)
        evidence.add(case.want)
        outputs = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            outputs.append(torch.ops.qcfs_fast.conv2d_if(*case.operands).numpy())
        assert all(np.array_equal(o, case.want.masks) for o in outputs)
        x, w, g, residual, amplitude, constant, bias, threshold, T, *_ = case.args
        halves = [
            torch.ops.qcfs_fast.conv2d_if(
                [t[:, s] for t in x], w, g, [t[:, s] for t in residual], amplitude,
                None if constant is None else constant[s], bias, threshold, T,
            )
            for s in (slice(0, 1), slice(1, None))
        ]  # fmt: skip
        assert np.array_equal(torch.cat(halves, 1).numpy(), case.want.masks)
    evidence.check()


def test_mask_bits_beyond_T_are_ignored(engine):
    rng = np.random.default_rng(3)
    T = 5
    x = random_spikes(rng, (1, 4, 4, 16), T, False)
    w = rng.integers(-500, 501, (3, 3, 16, 24)).astype(np.int16)
    rest = (
        [3, 3, 1, 1, 1, 1, 1, 1, 1],
        [],
        [],
        None,
        torch.zeros(24, dtype=torch.int32),
        torch.full((24,), 800, dtype=torch.int32),
        T,
    )
    clean = torch.ops.qcfs_fast.conv2d_if([tensor(x)], [tensor(w)], *rest)
    dirty = torch.ops.qcfs_fast.conv2d_if([tensor(x | 0xE0)], [tensor(w)], *rest)
    assert torch.equal(clean, dirty)
    assert 0.05 < oracle.unpack(clean.numpy(), T).mean() < 0.95


def test_threshold_is_inclusive_and_reset_is_soft(engine):
    """One neuron, by hand: n = 4, v starts at 2; currents 2, 1, 1, 9, 0 give v 4* 1 2 11* 7*."""
    x = torch.tensor([2, 1, 1, 9, 0], dtype=torch.uint8).reshape(5, 1, 1)
    w, zero, n = (
        torch.ones(1, 1, dtype=torch.int16),
        torch.zeros(1, dtype=torch.int32),
        torch.tensor([4], dtype=torch.int32),
    )
    out = torch.ops.qcfs_fast.linear_if([x], [w], [], [], None, zero, n, 5)
    assert out.flatten().tolist() == [0b11001]


def test_rows_that_lists_cannot_count_are_refused():
    x = torch.zeros(1, 1, dtype=torch.uint8).expand(1, 1, 2**27)
    w = torch.zeros(1, 1, dtype=torch.int8).expand(2**27, 1)
    zero = torch.zeros(1, dtype=torch.int32)
    with backend.force(reference=False), pytest.raises(ValueError, match="134217728 inputs in a row at T=4"):
        torch.ops.qcfs_fast.linear_if([x], [w], [], [], None, zero, zero + 2, 4)


def test_empty_batch(engine):
    x = torch.zeros(1, 0, 4, 4, 3, dtype=torch.uint8)
    out = torch.ops.qcfs_fast.conv2d_if(
        [x], [torch.ones(1, 1, 3, 5, dtype=torch.int16)], [1, 1, 1, 1, 0, 0, 1, 1, 1], [], [], None,
        torch.zeros(5, dtype=torch.int32), torch.full((5,), 2, dtype=torch.int32), 4,
    )  # fmt: skip
    assert out.shape == (1, 0, 4, 4, 5)
