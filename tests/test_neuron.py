"""Modes of the neuron in whole networks: what they win back, the integer ANN, bounds and refusals."""

import networks
import numpy as np
import oracle
import pytest
import torch
from markers import slow_but
from networks import converted

import qcfs_fast
from qcfs_fast import backend
from qcfs_fast.network.layers import SpikingLayer
from qcfs_fast.operators.limits import overflow_free_steps
from qcfs_fast.operators.neuron import MODES

KINDS = [networks.Small, networks.Branches, networks.Image, networks.Perceptron, networks.Pools]


def in_mode(kind, mode, T):
    """A network converted for a mode, and images."""
    shape = networks.SHAPES[kind]
    model = qcfs_fast.prepare(networks.randomize(kind()), levels=4)
    x = torch.randn(16, *shape, generator=torch.Generator().manual_seed(0))
    qcfs_fast.calibrate(model, [x], progress=False)
    return qcfs_fast.convert(model, T=T, neuron=mode, input_shape=shape), x


def test_a_neuron_says_what_is_wrong():
    for wrong, match in (
        ({"mode": "fast"}, "plain, offset, masked, signed, sum"),
        ({"mode": "offset", "window": 0}, "window must be from 1 to 8"),
        ({"mode": "offset", "window": 9}, "window must be from 1 to 8"),
        ({"mode": "offset", "iterations": 0}, "iterations must be from 1 to 8"),
        ({"mode": "plain", "iterations": 2}, "only offset mode"),
    ):
        with pytest.raises(ValueError, match=match):
            qcfs_fast.Neuron(**wrong)
    with pytest.raises(TypeError, match="window must be an int"):
        qcfs_fast.Neuron("offset", window=2.0)
    snn, _ = converted(networks.Small)
    with pytest.raises(ValueError, match="neuron must be one of"):
        snn.neuron = "fast"
    assert snn.neuron == qcfs_fast.Neuron("plain")


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_on_an_image_alone_the_first_layer_is_plain(kind):
    """Its current does not change, so there is nothing to mend: the fused operator serves all modes but masked."""
    snn, x = converted(kind)
    first = next(iter(snn.spiking_layers))
    for mode in ("offset", "signed"):
        traces = {}
        for m in ("plain", mode):
            snn.neuron = m
            traces[m] = qcfs_fast.trace(snn, x, 9)[first]
            traces[m, "over time"] = qcfs_fast.trace(snn, x.expand(9, *x.shape))[first]
        assert torch.equal(traces["plain"], traces[mode].bool())
        assert torch.equal(traces["plain"], traces[mode, "over time"].bool())
        assert int(traces[mode].min()) >= 0


@pytest.mark.parametrize("kind", [k for k in KINDS if k is not networks.Image], ids=lambda k: k.__name__)
@pytest.mark.parametrize("L", [4, 8])
def test_sum_is_the_ann_as_an_integer_network(kind, L):
    """At T = L the counts are the levels of the trained ANN, up to what rounding to 16 bits explains."""
    shape = networks.SHAPES[kind]
    model = qcfs_fast.prepare(networks.randomize(kind()), levels=L)
    x = torch.randn(64, *shape, generator=torch.Generator().manual_seed(0))
    qcfs_fast.calibrate(model, [x], progress=False)
    snn = qcfs_fast.convert(model, T=L, neuron="sum", input_shape=shape)
    counts = qcfs_fast.trace(snn, x)
    levels = {}
    sites = {n: m for n, m in model.named_modules() if isinstance(m, qcfs_fast.QCFS)}
    hooks = [
        m.register_forward_hook(lambda m, _, y, n=n: levels.setdefault(n, []).append(y.detach() / m.thresh * L))
        for n, m in sites.items()
    ]
    with torch.no_grad():
        answer = model.eval().double()(x.double())
    for hook in hooks:
        hook.remove()
    different = neurons = 0
    for name, found in counts.items():
        site = name if name in levels else name.rsplit(".", 1)[0]
        want = levels[site].pop(0)
        different += int((found[0].reshape(want.shape) != want.round()).sum())
        neurons += want.numel()
        assert 0.05 < float(want.mean()) / L < 0.95
    assert different / neurons < 2e-3
    assert float((snn(x).argmax(1) == answer.argmax(1)).double().mean()) > 0.96


def test_offset_wins_back_what_plain_loses():
    """Counts of each layer, given the layers before it, against the levels of the ANN at T = L = 4."""
    model = qcfs_fast.prepare(networks.randomize(networks.Small()), levels=4)
    x = torch.randn(64, *networks.SHAPES[networks.Small], generator=torch.Generator().manual_seed(0))
    qcfs_fast.calibrate(model, [x], progress=False)
    snn = qcfs_fast.convert(model, T=4)
    wrong = {}
    snn.neuron = "sum"
    want = qcfs_fast.trace(snn, x)
    for mode in ("plain", "offset", "masked", "signed"):
        snn.neuron = mode
        found = qcfs_fast.trace(snn, x)
        last = list(found)[-1]
        wrong[mode] = float((found[last].sum(0) != want[last][0]).double().mean())
    assert wrong["plain"] > 0.05, "nothing to win back: the test is void"
    assert wrong["offset"] < 0.25 * wrong["plain"]
    assert wrong["signed"] < wrong["plain"]
    assert wrong["masked"] < wrong["plain"]


@pytest.mark.parametrize("mode", MODES)
def test_answers_do_not_depend_on_batches_threads_or_T(mode):
    snn, x = in_mode(networks.Branches, mode, 8)
    whole = snn(x, 8)
    assert torch.equal(torch.cat([snn(part, 8) for part in x.split(1)]), whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(snn(x, 8), whole)
    finally:
        torch.set_num_threads(threads)
    if mode != "sum":
        by_step = snn(x, 8, per_step=True)
        assert all(torch.equal(snn(x, t), by_step[t - 1]) for t in (1, 2, 4, 8))


def test_bounds_speak_for_the_mode():
    model = qcfs_fast.prepare(networks.randomize(networks.Small()), levels=4)
    x = torch.randn(8, *networks.SHAPES[networks.Small], generator=torch.Generator().manual_seed(0))
    qcfs_fast.calibrate(model, [x], progress=False)
    snn = qcfs_fast.convert(model, T=4, max_T=8)
    plain = snn.max_T
    snn.neuron = "offset"
    assert 4 <= snn.max_T <= plain - 4
    assert f"T <= {snn.max_T} in offset (window 4) mode" in snn.report()
    with pytest.raises(ValueError, match=r"overflow bound of .* in offset .* mode .*and this neuron"):
        snn(x, snn.max_T + 1)
    snn.neuron = "plain"
    assert snn.max_T == plain
    snn.T = plain
    with pytest.raises(ValueError, match="overflow bound"):  # T does not fit, and nothing has changed
        snn.neuron = "offset"
    assert (snn.neuron.mode, snn.T, snn.max_T) == ("plain", plain, plain)
    wide = qcfs_fast.convert(model, T=4, max_T=8, neuron="offset")
    assert wide.max_T >= 8
    short = qcfs_fast.convert(model, T=1, max_T=2)
    if short.max_T < 8:
        with pytest.raises(ValueError, match="a window of 8 steps is beyond"):
            short.neuron = qcfs_fast.Neuron("offset", window=8)


@pytest.mark.parametrize("mode", ["offset", "masked"])
@pytest.mark.parametrize("window", [1, 8])
def test_a_neuron_and_its_words_give_one_network(mode, window):
    """24 bits take all that the sums leave, so that a window which the bound does not know would not fit."""
    shape = networks.SHAPES[networks.Small]
    model = networks.lively(networks.randomize(networks.Small()), shape)
    options = {"T": 1, "max_T": 1, "weight_bits": 24, "input_shape": shape}
    by_words = qcfs_fast.convert(model, neuron=mode, window=window, **options)
    by_object = qcfs_fast.convert(model, neuron=qcfs_fast.Neuron(mode, window), **options)
    assert by_object.neuron == by_words.neuron
    assert by_object.report() == by_words.report()


def test_sum_mode_reaches_the_max_T_asked_for():
    shape = networks.SHAPES[networks.Pools]
    model = qcfs_fast.prepare(networks.randomize(networks.Pools()), levels=4)
    qcfs_fast.calibrate(model, [torch.randn(8, *shape)], progress=False)
    bounds = [qcfs_fast.convert(model, T=4, max_T=m, neuron="sum", input_shape=shape).max_T for m in (4, 7)]
    assert bounds[0] >= 4
    assert bounds[1] >= 7


def test_signed_spikes_double_the_sources():
    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Conv2d(3, 4, 1)
            self.act = qcfs_fast.QCFS(4)
            self.many = torch.nn.ModuleList(torch.nn.Conv2d(4, 4, 1, dilation=i + 1) for i in range(33))
            self.last = qcfs_fast.QCFS(4)
            self.out = torch.nn.Linear(4, 2)

        def forward(self, x):
            x = self.act(self.first(x))
            y = self.many[0](x)
            for layer in self.many[1:]:
                y = y + layer(x)
            return self.out(self.last(y).mean((2, 3)))

    snn = qcfs_fast.convert(networks.on_grid(Wide(), seed=0), T=2, input_shape=(3, 2, 2))
    with pytest.raises(ValueError, match="layer last sums more than 32 inputs"):
        snn.neuron = "signed"


def test_a_long_table_of_biases_costs_no_resolution():
    model = qcfs_fast.prepare(networks.randomize(networks.Small()), levels=4)
    x = torch.randn(8, *networks.SHAPES[networks.Small])
    qcfs_fast.calibrate(model, [x], progress=False)
    table = qcfs_fast.step_biases(model, [x], T=4, progress=False)
    long = {name: t.repeat(1000, 1) for name, t in table.items()}
    a, b = (qcfs_fast.convert(model, T=4, max_T=4, step_bias=t).state_dict() for t in (table, long))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_counts_of_sum_mode_fit_a_byte():
    snn, x = converted(networks.Pools)
    plain = snn.max_T
    snn.neuron = "sum"
    assert snn.max_T < min(plain, 256)
    with pytest.raises(ValueError, match="in sum mode"):
        snn(x, snn.max_T + 1)


@pytest.mark.filterwarnings("ignore:convert. no threshold")
def test_pools_in_sum_mode_that_need_too_many_inputs_are_refused_by_convert():
    """A window's totals must fit a byte, so that large windows are cut into sections, each an input of its own."""
    first, second = (torch.nn.Sequential(torch.nn.Conv2d(c, 2, 1), qcfs_fast.QCFS(4)) for c in (1, 2))
    head = (torch.nn.Flatten(), torch.nn.Linear(2, 2))
    wide = networks.on_grid(torch.nn.Sequential(first, torch.nn.AvgPool2d(20), second, *head))
    options = {"neuron": "sum", "input_shape": (1, 20, 20)}
    assert qcfs_fast.convert(wide, T=4, **options)(torch.rand(1, 1, 20, 20)).shape == (1, 2)
    with pytest.raises(qcfs_fast.ConversionError, match=r"at most 64 of each fit.*or a smaller T"):
        qcfs_fast.convert(wide, T=250, **options)
    with pytest.raises(ValueError, match="in sum mode T is at most 255"):
        qcfs_fast.convert(wide, T=256, **options)


def test_sum_mode_has_no_steps():
    snn, x = converted(networks.Small)
    snn.neuron = "sum"
    for call in (lambda: snn(x, per_step=True), lambda: snn(x, skip=1), lambda: snn.predict(x)):
        with pytest.raises(ValueError, match="integer ANN"):
            call()


@pytest.mark.parametrize("mode", MODES)
def test_compiled_and_exported(mode):
    torch._dynamo.reset()
    snn, x = in_mode(networks.Branches, mode, 4)
    want = snn(x, 4)
    assert torch.equal(torch.compile(snn, fullgraph=True, backend="aot_eager")(x, T=4), want)
    snn.T = 4
    assert torch.equal(torch.export.export(snn, (x,)).module()(x), want)


@pytest.mark.parametrize("skip", [-1, 4, 9])
def test_skip_leaves_a_step(skip):
    snn, x = converted(networks.Small)
    with pytest.raises(ValueError, match="skip must leave at least one of T=4 steps"):
        snn(x, 4, skip=skip)


@pytest.mark.parametrize("mode", MODES)
def test_the_overflow_bound_at_the_bound(mode):
    """Neurons whose currents are as large as the bound allows, in all orders of sign: as plain integers give them."""
    rng = np.random.default_rng(0)
    farthest = 0
    for n in (2, 1000, 2**24):
        for window, iterations in ((1, 1), (4, 1), (4, 3), (8, 8)) if mode == "offset" else ((4, 1),):
            T = 1 if mode == "sum" else window + 2
            levels = 6 if mode == "sum" else 1
            shift = (window, iterations) if mode == "offset" else (0, 0)
            steps = T * levels
            most = (2**31 - 1 - n // 2 - shift[1] * n) // (steps + shift[0] * shift[1])
            bound = [np.array([v]) for v in (n, most)]
            assert overflow_free_steps(*bound, [], False, *shift) == steps
            signs = rng.choice([-1, 1, -1, 1, 0], (T, 3000))
            signs[:, :2] = [1, -1]  # always the same
            signs[:window, 2:4], signs[window:, 2:4] = [1, -1], [-1, 1]
            currents = signs * most
            for i in range(0, 3000, 7):  # not only the extremes
                currents[:, i] = rng.integers(-most, most + 1, T)
            settings = {"sum": (levels, 0), "offset": (window, iterations), "masked": (window, 1)}.get(mode, (0, 0))
            want = [oracle.fire_neuron([int(c) * levels for c in column], n, mode, *settings) for column in currents.T]
            farthest = max(farthest, *(abs(b) for _, before, _ in want for b in before))
            assert farthest < 2**31
            silent = torch.zeros((T + 7) // 8, 3000, 1, dtype=torch.uint8)
            threshold = torch.tensor([n], dtype=torch.int32)
            current = torch.from_numpy(currents.astype(np.int32))[:, :, None]
            spikes = torch.ops.qcfs_fast.linear_if(
                [silent], [torch.ones(1, 1, dtype=torch.int16)], [], [], current, threshold * 0, threshold, T, [],
                [MODES.index(mode), *settings],
            ).numpy()[..., 0]  # fmt: skip
            if mode == "sum":
                assert spikes[0].tolist() == [s[0] for s, _, _ in want]
                continue
            expected = np.array([s for s, _, _ in want]).T
            half = len(spikes) // (2 if mode == "signed" else 1)
            found = oracle.unpack(spikes[:half], T)
            assert np.array_equal(found - (oracle.unpack(spikes[half:], T) if mode == "signed" else 0), expected)
    assert farthest > 2**30, "nothing came near the bound: the test is void"


def driven(weight, threshold, bias, steps, mode, settings):
    """The largest membrane potential that any channel reaches in so many steps, in plain integers within 32 bits.

    Of each channel the inputs with positive weights [K, O] fire, those with negative ones, and both by turns. Every
    instruction set and engine must give the same bytes.
    """
    O, window = len(threshold), max(1, settings[0])
    T = 1 if mode == "sum" else steps
    up, down = (weight > 0).T, (weight < 0).T  # [O, K]
    early = np.arange(T)[:, None, None] < window
    odd = np.arange(T)[:, None, None] % 2 == 1
    x = [np.broadcast_to(p, (T, *up.shape)) for p in (up, down)] + [
        np.where(w, a, b) for w in (early, odd) for a, b in ((up, down), (down, up))
    ]
    x = np.concatenate(x, 1).astype(np.uint8)  # [T, samples, K]
    levels = steps if mode == "sum" else 1
    bias = bias[:T] if bias.ndim == 2 else bias
    currents = (x.astype(np.int64) @ weight.astype(np.int64) + (bias[:, None] if bias.ndim == 2 else bias)) * levels
    want = oracle.fire(currents, threshold, mode, *settings)  # which asserts that nothing leaves 32 bits
    runs = [
        oracle.fire_neuron([int(c) for c in currents[:, i, i % O]], int(threshold[i % O]), mode, *settings)
        for i in range(2 * O)
    ]
    spikes = torch.from_numpy(x * np.uint8(levels) if mode == "sum" else oracle.pack(x))
    given = [torch.from_numpy(bias.astype(np.int32)), torch.from_numpy(threshold.astype(np.int32))]
    sets = [
        {"isa_mask": mask, "cpu_engine": engine}
        for _, mask in backend.kernel_sets()
        for engine in ("events", "dense", "table")
    ]
    for forced in ({"reference": True}, {}, *sets):
        call = [[spikes], [torch.from_numpy(weight)], [], [], None, *given, T, [], [MODES.index(mode), *settings]]
        with backend.force(**forced):
            if want.state is None:
                found = torch.ops.qcfs_fast.linear_if(*call)
            else:
                found, state = torch.ops.qcfs_fast.linear_if_from(*call, None)
                assert np.array_equal(state.numpy(), want.state), forced
        assert np.array_equal(found.numpy(), want.masks), forced
    return max(abs(b) for _, before, _ in runs for b in before)


def settings_of(mode, steps, window=4, iterations=1):
    return {"sum": (steps, 0), "offset": (window, iterations), "masked": (window, 1)}.get(mode, (0, 0))


@pytest.mark.parametrize(("mode", "by_step"), [*((mode, False) for mode in MODES), ("plain", True), ("signed", True)])
def test_spikes_that_drive_membranes_to_the_bound(mode, by_step):
    """For as many steps as the bound allows."""
    rng = np.random.default_rng(MODES.index(mode))
    K, O, window, iterations = 2500, 4, 4, 2 if mode == "offset" else 1
    signs = rng.choice([-1, 1], (K, O))
    signs[:, :2] = [1, -1]  # of these two a step can add all that the bound counts with
    weight = (signs * rng.integers(20000, 32640, (K, O))).astype(np.int16)
    threshold = np.array([2, 1000, 2**20, 2**24])
    bias = rng.integers(-(2**20), 2**20, (40, O) if by_step else O)
    shift = (window, iterations) if mode == "offset" else (0, 0)
    steps = overflow_free_steps(threshold, np.abs(bias).reshape(-1, O).max(0), [(weight, 1)], False, *shift)
    assert steps > window
    farthest = driven(weight, threshold, bias, steps, mode, settings_of(mode, steps, window, iterations))
    assert farthest > 1.2e9, "nothing came near the bound: the test is void"


@pytest.mark.parametrize("mode", slow_but(["plain", "offset"], MODES))
def test_layers_of_networks_driven_to_their_bound(mode):
    """At max_T, of random networks the channels to which a step can add the most."""
    farthest = layers = 0
    for seed, kind in enumerate(KINDS):
        model = qcfs_fast.prepare(networks.randomize(kind(), seed), levels=4)
        images = torch.randn(24, *networks.SHAPES[kind], generator=torch.Generator().manual_seed(seed))
        qcfs_fast.calibrate(model, [images], progress=False)
        max_T = 7 if mode == "sum" else 1000  # sums of pools hold 255
        snn = qcfs_fast.convert(model, T=4, neuron=mode, max_T=max_T, input_shape=images.shape[1:])
        for layer in snn.layers.values():
            if not isinstance(layer, SpikingLayer) or layer.analog is not None:
                continue
            rows = [s.weight.reshape(-1, s.weight.shape[-1]) for s in layer.sources() if s.peak == 1]
            rows += [r.amplitude[None] for r in layer.residuals() if r.peak == 1]
            if not rows:
                continue
            weight = torch.cat([r.int() for r in rows]).numpy()
            most = np.argsort(-np.abs(weight).sum(0))[:2]
            weight, n, bias = weight[:, most], layer.threshold.numpy()[most], layer.bias.numpy()[most]
            if np.abs(weight).max() < 2**15:
                settings = settings_of(mode, snn.max_T)
                farthest = max(farthest, driven(weight.astype(np.int16), n, bias, snn.max_T, mode, settings))
                layers += 1
    assert layers >= 6
    assert farthest > (2**22 if mode == "sum" else 2**28), "nothing came near the bound: the test is void"


@pytest.mark.parametrize("mode", ["plain", "signed"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_biases_by_step(kind, mode, tmp_path):
    """Layer by layer as in float64; a file keeps them; fewer steps are a prefix; a stream goes through them."""
    shape = networks.SHAPES[kind]
    model = qcfs_fast.prepare(networks.randomize(kind()), levels=4)
    x = torch.randn(24, *shape, generator=torch.Generator().manual_seed(0))
    qcfs_fast.calibrate(model, [x], progress=False)
    table = qcfs_fast.step_biases(model, [x[:16]], T=6, progress=False)
    snn = qcfs_fast.convert(model, T=6, neuron=mode, step_bias=table, max_T=6, input_shape=shape)
    assert snn.max_T == 6
    spikes = qcfs_fast.trace(snn, x)
    meaning = qcfs_fast.simulate(model, x, 6, spikes=True, force=spikes, neuron=mode, step_bias=table).spikes
    different = sum(int((spikes[k] != meaning[k]).sum()) for k in spikes)
    assert different <= 3 + 2e-4 * sum(s.numel() for s in spikes.values())
    without = qcfs_fast.trace(qcfs_fast.convert(model, T=6, neuron=mode, input_shape=shape), x)
    assert any(not torch.equal(spikes[k], without[k]) for k in spikes)
    snn.save(tmp_path / "net")
    again = qcfs_fast.load(tmp_path / "net")
    whole = snn(x, per_step=True)
    assert torch.equal(again(x, per_step=True), whole)
    assert torch.equal(snn(x, 3), whole[2])
    assert torch.equal(snn(x.expand(6, *x.shape), per_step=True), whole)
    stream = again.stream()
    assert torch.equal(stream(x, steps=2), whole[1])
    assert torch.equal(stream(steps=4, per_step=True), whole[2:])
    with pytest.raises(ValueError, match=r"stream: T=7, but step_bias has .* make a table for T=7, or call reset"):
        stream()
    assert stream.steps == 6
    with pytest.raises(ValueError, match="step_bias has biases for 6 steps; make a table for T=7"):
        snn(x, 7)
    with pytest.raises(ValueError, match="has a bias for each step"):
        snn.neuron = "offset"


def test_what_step_bias_refuses():
    model = qcfs_fast.prepare(networks.randomize(networks.Small()), levels=4)
    x = torch.randn(8, *networks.SHAPES[networks.Small])
    qcfs_fast.calibrate(model, [x], progress=False)
    table = qcfs_fast.step_biases(model, [x], T=4, progress=False)
    name = next(iter(table))
    nan = {**table, name: table[name] * float("nan")}
    far = {**table, name: table[name] + 1e6}
    for options, match in (
        ({"neuron": "offset", "step_bias": table}, "goes with plain and signed neurons"),
        ({"step_bias": dict(list(table.items())[1:])}, "a table for each activation"),
        ({"step_bias": table, "T": 5}, "of at least 5"),
        ({"step_bias": table, "T": 4, "max_T": 8}, "of at least 8"),
        ({"step_bias": {**table, name: table[name][:3]}}, "all of the same number of steps"),
        ({"step_bias": {**table, name: table[name].numpy()}}, "must hold a tensor"),
        ({"step_bias": {**table, name: table[name][:, :1].repeat(1, 2)}}, "must be finite"),
        ({"step_bias": nan}, "must be finite"),
        ({"step_bias": {**table, name: table[name][0]}}, "must hold a tensor"),
        ({"step_bias": {**table, name: table[name].tolist()}}, "must hold a tensor"),
        ({"step_bias": far}, "exceeds half a threshold"),
    ):
        with pytest.raises(ValueError, match=match):
            qcfs_fast.convert(model, **{"T": 4, **options})
