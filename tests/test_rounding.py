"""Rounding by data: the objective, its ingredients against slow references, and what convert makes of it."""

import warnings

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from markers import slow_but
from networks import converted, images, lively

import qcfs_fast
from qcfs_fast.conversion import rounding, units
from qcfs_fast.network.layers import Run, SpikingLayer
from qcfs_fast.operators import masks
from qcfs_fast.operators.geometry import POINTWISE

KINDS = list(networks.SHAPES)
IDS = [k.__name__ for k in KINDS]


def correlated(seed, K=24, M=400, groups=1):
    """Counts [G, M, K] whose columns share causes, as the spikes of neighbouring neurons do."""
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(groups, M, 4)) @ rng.normal(size=(groups, 4, K))
    return torch.from_numpy(np.clip(np.floor(causes + rng.normal(size=(groups, M, K)) * 0.3 + 1), 0, 4))


def moments_of(x, T):
    """Mean and covariance per step of counts x [G, M, K] over T steps."""
    x = x / T
    mean = x.mean(1, keepdim=True)
    return rounding.Moments(mean[:, 0], [(x - mean).mT @ (x - mean) / x.shape[1]])


def random_layer(seed, bits, K=24, O=10, max_T=32):
    """A layer's weights [K, O] and bias [O], and the layer rounded to the nearest."""
    rng = np.random.default_rng(seed)
    weights, bias = rng.normal(size=(K, O)), rng.normal(size=O) * 0.1
    layer = units.choose("layer", rng.uniform(0.5, 2, O), [(weights, 1)], [], bias, bits, max_T, False)
    return weights, bias, layer


def cost(layer, weights, bias, x, T):
    """E[(exact current - current)^2] per channel in units, from the inputs themselves."""
    G, K, O = x.shape[0], x.shape[2], bias.size
    errors = (weights / layer.unit - layer.weights[0]).reshape(K, G, O // G)
    current = np.einsum("gmk,kgo->mgo", x.numpy() / T, errors).reshape(-1, O) + bias / layer.unit - layer.bias
    return (current**2).mean(0)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("groups", [1, 2])
def test_no_channel_is_worse_than_rounded_to_the_nearest(bits, groups):
    T, gains = 4, []
    for seed in range(30):
        x = correlated(seed, groups=groups)
        weights, bias, layer = random_layer(seed, bits)
        found = rounding.compensated(layer, [weights], bias, [1], moments_of(x, T), bits, 32, False, qcfs_fast.Neuron())
        before, after = cost(layer, weights, bias, x, T), cost(found, weights, bias, x, T)
        assert (after <= before * (1 + 1e-9)).all()
        gains.append(after.sum() / before.sum())
        assert (np.abs(found.weights[0]) <= (32639 if bits == 16 else 127 * 256)).all()
        assert bits == 16 or (found.weights[0] % 256 == 0).all()
    # At 16 bits the bias is no finer than the weights, and its own rounding is a good part of what is left.
    assert np.mean(gains) < (0.5 if bits == 8 else 0.8)


@pytest.mark.parametrize("K", [1, 24, 150])
def test_sequential_rounding_is_that_of_gptq(K):
    """As its source states it: each rounded weight is eliminated from the inverse, its error spread over the rest."""
    x = correlated(K, K=K, M=1000, groups=2)
    covariance = moments_of(x, 4).covariance[0]
    w = torch.from_numpy(np.random.default_rng(K).normal(size=(2, K, 5)) * 8)
    found = rounding.round_sequentially(w, covariance, 12)
    for g in range(2):
        damped = covariance[g] + 0.01 * covariance[g].diagonal().mean() * torch.eye(K, dtype=torch.float64)
        inverse, rest = torch.linalg.inv(damped).numpy(), w[g].numpy().copy()
        for k in np.argsort(-covariance[g].diagonal().numpy(), kind="stable"):
            want = np.clip(np.rint(rest[k]), -12, 12)
            assert np.array_equal(found[g, k].numpy(), want)
            rest -= np.outer(inverse[:, k] / inverse[k, k], rest[k] - want)
            inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    assert K == 1 or (found.abs() == 12).any()  # the limit was met


def test_inputs_in_blocks(monkeypatch):
    """Blocks of inputs compensate by themselves; the bias takes up what all of them leave."""
    x = correlated(5, M=2000)
    weights, bias, layer = random_layer(5, 8)
    monkeypatch.setattr(rounding, "ENTRIES", 100)
    prefix = rounding.Prefix([torch.zeros(1)], Run(4))
    steps = (torch.arange(4)[:, None, None] < x[0]).to(torch.uint8)  # [T, M, K]
    prefix.values[0]["a"] = masks.pack(steps)
    moments = prefix.moments([(["a"], POINTWISE)], True)
    assert [c.shape[1] for c in moments.covariance] == [8, 8, 8]
    assert torch.allclose(moments.mean, x.mean(1) / 4)
    found = rounding.compensated(layer, [weights], bias, [1], moments, 8, 32, False, qcfs_fast.Neuron())
    assert cost(found, weights, bias, x, 4).sum() < cost(layer, weights, bias, x, 4).sum()


GEOMETRIES = {
    "plain": (3, 3, 1, 1, 1, 1, 1, 1, 1),
    "strided, dilated, uneven": (2, 3, 2, 1, 1, 2, 1, 2, 1),
    "groups": (3, 3, 1, 1, 1, 1, 1, 1, 4),
    "depthwise": (3, 3, 1, 1, 1, 1, 1, 1, 8),
}


@pytest.mark.parametrize("T", [3, 11])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=list(GEOMETRIES))
def test_moments_are_those_of_all_windows(geometry, T, monkeypatch):
    """Against torch's unfold, over two batches; the input is the sum of two nodes, masks and counts."""
    monkeypatch.setattr(rounding, "CHUNK", 1000)  # many small parts
    KH, KW, sh, sw, ph, pw, dh, dw, groups = geometry
    generator = torch.Generator().manual_seed(T)
    prefix = rounding.Prefix([torch.zeros(1), torch.zeros(1)], Run(T))
    rows = []
    for values in prefix.values:
        spikes = torch.rand(T, 2, 6, 7, 8, generator=generator) < 0.3
        counts = torch.randint(0, 5, (T, 2, 6, 7, 8), generator=generator, dtype=torch.uint8)
        values.update(a=masks.pack(spikes), b=counts)
        total = (spikes.sum(0) + counts.sum(0)).to(torch.float64).permute(0, 3, 1, 2) / T
        taps = F.unfold(total, (KH, KW), (dh, dw), (ph, pw), (sh, sw))  # [N, C * KH * KW, windows]
        taps = taps.unflatten(1, (groups, 8 // groups, KH * KW)).permute(1, 0, 4, 3, 2)
        rows.append(taps.reshape(groups, -1, KH * KW * (8 // groups)))
    rows = torch.cat(rows, 1)
    want = moments_of(rows * T, T)
    found = prefix.moments([(["a", "b"], geometry)], False)
    assert torch.allclose(found.mean, want.mean)
    assert torch.allclose(found.covariance[0], want.covariance[0], atol=1e-9)

    # Two products in one layer: their inputs stand side by side, and every group sees its own of either.
    second = [(["a"], (KH, KW, sh, sw, ph, pw, dh, dw, 2))]
    alone = prefix.moments(second, False)
    both = prefix.moments([(["a", "b"], geometry), *second], False)
    K, G = rows.shape[2], both.mean.shape[0]
    assert max(groups, 2) == G
    for g in range(G):
        for moments, inputs, group in ((found, slice(0, K), g * groups // G), (alone, slice(K, None), g * 2 // G)):
            assert torch.equal(both.mean[g, inputs], moments.mean[group])
            assert torch.equal(both.covariance[0][g, inputs, inputs], moments.covariance[0][group])


def test_samples_where_there_are_many_windows(monkeypatch):
    monkeypatch.setattr(rounding, "WINDOWS", 500)
    prefix = rounding.Prefix([torch.zeros(1)], Run(4))
    spikes = torch.rand(4, 8, 20, 20, 3, generator=torch.Generator().manual_seed(0)) < 0.3
    prefix.values[0]["a"] = masks.pack(spikes)
    read = [(["a"], GEOMETRIES["plain"])]
    assert sum(rows.shape[1] for rows in prefix._windows(read, False, 1)) == 500
    mean = prefix.moments(read, False).mean
    assert torch.equal(mean, prefix.moments(read, False).mean)
    assert float((mean - 0.3).abs().max()) < 0.1


def test_lossless_channels_stay():
    weights, bias, _ = random_layer(0, 8)
    weights[:, 3], bias[3] = np.rint(weights[:, 3] * 8) / 8, 0.25
    layer = units.choose("layer", np.ones(10), [(weights, 1)], [], bias, 8, 32, False)
    assert layer.lossless.tolist() == [c == 3 for c in range(10)]
    found = rounding.compensated(
        layer, [weights], bias, [1], moments_of(correlated(0), 4), 8, 32, False, qcfs_fast.Neuron()
    )
    same = (found.weights[0] == layer.weights[0]).all(0)
    assert same.tolist() == layer.lossless.tolist()
    assert found.bias[3] == layer.bias[3]


def test_the_overflow_promise_holds():
    """A channel whose compensated weights could overflow earlier than promised keeps those rounded to the nearest."""
    kept = 0
    for seed in range(5):
        weights, bias, layer = random_layer(seed, 8, K=200, max_T=3000)
        args = layer, [weights], bias, [1], moments_of(correlated(seed, K=200, M=400), 4), 8
        free = rounding.compensated(*args, 1, False, qcfs_fast.Neuron())
        bound = rounding.compensated(*args, layer.max_steps, False, qcfs_fast.Neuron())
        assert bound.max_steps >= layer.max_steps
        kept += int(((bound.weights[0] == layer.weights[0]).all(0) & (bound.bias == layer.bias)).sum())
        assert not (free.weights[0] == layer.weights[0]).all(0).any()
    assert kept


@pytest.mark.parametrize("bits", [16, 8, 24])
@pytest.mark.parametrize("kind", slow_but([networks.Small], KINDS), ids=IDS)
def test_every_network_converts(kind, bits):
    shape = networks.SHAPES[kind]
    plain, x = converted(kind, weight_bits=bits)
    data = [images(shape, 8, seed=11), (images(shape, 5, seed=12), "labels are not read")]
    snn, _ = converted(kind, weight_bits=bits, data=data, progress=False)
    again, _ = converted(kind, weight_bits=bits, data=data, progress=False)
    before, after = plain.state_dict(), snn.state_dict()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in after.items())
    changed = {k.split(".")[-1] for k, v in after.items() if not torch.equal(v, before[k])}
    assert all(name.startswith(("weight_", "bias")) for name in changed)
    assert changed or not any(isinstance(m, SpikingLayer) for m in snn.layers.values())
    for name, layer in snn.layers.items():
        if isinstance(layer, SpikingLayer):
            assert layer.overflow_free_steps(qcfs_fast.Neuron()) == snn.details[name]["max_T"] >= 32
    assert snn(x).shape == (3, 5)


@pytest.mark.parametrize("mode", slow_but(["signed"], ["offset", "masked", "signed", "sum"]))
def test_every_mode_of_the_neuron(mode):
    """The prefix runs as the network will, and the bound holds for it."""
    plain, x = converted(networks.Small, neuron=mode, weight_bits=8)
    data = [images(networks.SHAPES[networks.Small], 8, seed=11)]
    snn, _ = converted(networks.Small, neuron=mode, weight_bits=8, data=data, progress=False)
    assert any(not torch.equal(v, plain.state_dict()[k]) for k, v in snn.state_dict().items())
    assert snn.max_T >= 32
    layers = [m for m in snn.layers.values() if isinstance(m, SpikingLayer)]
    assert all(m.overflow_free_steps(snn.neuron) >= snn.max_T for m in layers)
    assert snn(x).shape == (3, 5)


def test_every_step_of_a_bias_takes_up_the_same():
    shape = networks.SHAPES[networks.Small]
    model = lively(networks.randomize(networks.Small()), shape)
    data = [images(shape, 8, seed=11)]
    options = {"max_T": 4, "weight_bits": 8, "step_bias": qcfs_fast.step_biases(model, data, T=4)}
    before = qcfs_fast.convert(model, **options).layers["block1.relu"].bias
    after = qcfs_fast.convert(model, data=data, progress=False, **options).layers["block1.relu"].bias
    moved = (after - before).double()
    assert moved.shape == (4, 8)
    assert float((moved.amax(0) - moved.amin(0)).max()) <= 1  # but for rounding
    assert float(moved.abs().max()) > 10


def test_a_network_on_a_grid_is_unchanged():
    prepared = networks.on_grid(qcfs_fast.prepare(networks.Small(), levels=4), seed=3)
    shape = networks.SHAPES[networks.Small]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # thresholds may equal the initial one
        plain = qcfs_fast.convert(prepared, weight_bits=8)
        snn = qcfs_fast.convert(prepared, weight_bits=8, data=[images(shape, 8)], progress=False)
    assert all(torch.equal(v, snn.state_dict()[k]) for k, v in plain.state_dict().items())


def test_batches_do_not_matter():
    """All windows of the data are read here, so the same images in other batches give the same integers."""
    x = images(networks.SHAPES[networks.Small], 9, seed=11)
    one, _ = converted(networks.Small, data=[x], progress=False)
    many, _ = converted(networks.Small, data=x.split(2), progress=False)
    assert all(torch.equal(v, many.state_dict()[k]) for k, v in one.state_dict().items())


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (torch.zeros(2, 3, 10, 12), TypeError, "data is a Tensor; give an iterable of image batches"),
        (3, TypeError, "data is a int; give an iterable"),
        ([], ValueError, "data is empty; give at least one batch"),
        ([torch.zeros(0, 3, 10, 12)], ValueError, "data is empty"),
        (["image"], TypeError, "data holds a str"),
        ([()], TypeError, "data holds a tuple"),
        ([torch.zeros(2, 3, 10, 12, dtype=torch.uint8)], TypeError, "torch.uint8; scale images to floats"),
        ([torch.zeros(3, 10, 12)], ValueError, r"shape \[3, 10, 12\], expected \[N, 3, H, W\]"),
        ([torch.zeros(2, 1, 10, 12)], ValueError, r"expected \[N, 3, H, W\]"),
        ([torch.full((2, 3, 10, 12), float("nan"))], ValueError, "NaN or infinity"),
    ],
)
def test_bad_data_is_refused_in_words(data, error, message):
    with pytest.raises(error, match=message):
        converted(networks.Small, data=data)
