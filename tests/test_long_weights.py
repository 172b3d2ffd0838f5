"""weight_bits=24: weights of three digits, in the spiking layers, the first layer and the readout."""

import re

import format_reader
import networks
import numpy as np
import pytest
import torch
from markers import slow_but
from networks import converted, images, lively
from test_format import compare_with_the_page
from torch import nn

import qcfs_fast
from qcfs_fast.conversion import units
from qcfs_fast.network.layers import EncodingLayer, SpikingLayer
from qcfs_fast.operators import limits
from qcfs_fast.operators.neuron import MODES
from qcfs_fast.study.profiling.synapses import afferents

KINDS = list(networks.SHAPES)
IDS = [k.__name__ for k in KINDS]


class Every(nn.Module):
    """What format_reader.py reads: the image beside spikes, a pool, a residual, vectors, all in one network."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.skip, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, padding=1)
        self.d, self.e = nn.Conv2d(6, 6, 1), nn.Linear(24, 16)
        self.pool, self.out = nn.AvgPool2d(2), nn.Linear(16, 5)

    def forward(self, x):
        y = torch.relu(self.a(x))
        y = torch.relu(self.b(y) + self.skip(x))
        y = torch.relu(self.c(self.pool(y)))
        y = torch.relu(self.d(y) + y)
        return self.out(torch.relu(self.e(self.pool(y).flatten(1))))


def test_digits():
    limit = limits.MAX_LONG_WEIGHT
    w = np.array([0, 127, 128, 255, 256, -128, -129, 32639, 32640, -32640, 65536, limit, -limit])
    w = np.concatenate([w, np.random.default_rng(0).integers(-limit, limit + 1, 100000)])
    words, low = units.split(w)
    high, middle = units.split(words)
    assert np.array_equal(65536 * high + 256 * middle + low, w)
    assert np.abs(words).max() == limits.MAX_WEIGHT
    assert np.abs(high).max() == 127
    assert (low.min(), low.max(), middle.min(), middle.max()) == (-128, 127, -128, 127)


@pytest.mark.parametrize("kind", slow_but([networks.Image], KINDS), ids=IDS)
def test_every_mode_gives_the_bytes_of_the_reference(kind):
    for mode in MODES:
        snn, x = converted(kind, T=4, weight_bits=24, neuron=mode)
        assert any((b < -120).any() for n, b in snn.named_buffers() if n.endswith("_low"))
        out = snn(x)
        with qcfs_fast.backend.force(reference=True):
            assert torch.equal(out, snn(x))
        assert out.std() > 0


def test_images_over_time_and_streams():
    snn, x = converted(networks.Image, T=6, weight_bits=24)
    still = snn(x, per_step=True)
    assert torch.equal(snn(x.expand(6, *x.shape), per_step=True), still)
    stream = snn.stream()
    stream(x, 2)
    assert torch.equal(stream(steps=4), still[-1])
    moving = images((3, 8, 8), 18, seed=4).reshape(6, 3, 3, 8, 8)
    out = snn(moving, per_step=True)
    with qcfs_fast.backend.force(reference=True):
        assert torch.equal(out, snn(moving, per_step=True))


@pytest.mark.parametrize("mode", MODES)
def test_a_reader_that_knows_the_page_alone_computes_the_same_bytes(mode, tmp_path):
    prepared = lively(networks.randomize(Every(), seed=2), (3, 8, 8))
    snn, x = qcfs_fast.convert(prepared, T=5, weight_bits=24, neuron=mode), images((3, 8, 8), 2)
    snn.save(tmp_path / "net")
    header, tensors = format_reader.read(tmp_path / "net")
    kinds = [node["type"] for node in header["graph"] if "weight_bits" in node["config"]]
    assert sorted(set(kinds)) == ["EncodingLayer", "Readout", "SpikingLayer"]
    assert any(name.endswith("/analog_weight_low") for name in tensors)
    compare_with_the_page(tmp_path / "net", x, qcfs_fast.load(tmp_path / "net"), 5)

    # Last digits seldom decide a spike. So let them be all of the image's weights, some beyond half a threshold.
    for name, weight in snn.named_buffers():
        if name in ("relu.weight", "relu_1.analog_weight"):
            layer = snn.get_submodule(name.rpartition(".")[0])
            weight.zero_()
            layer.gain *= 2**16
    snn.save(tmp_path / "last")
    compare_with_the_page(tmp_path / "last", x, qcfs_fast.load(tmp_path / "last"), 5)


def membrane_errors(prepared, bits, x, T):
    """Of each layer, the error of what its neurons have integrated after T steps, on the network's own input spikes."""
    snn = qcfs_fast.convert(prepared, T=T, max_T=T, weight_bits=bits)
    spikes = qcfs_fast.trace(snn, x, T)
    sim = qcfs_fast.simulate(prepared, x, T, spikes=True, force=spikes)
    stream, errors = snn.stream(), {}
    stream(x, T)
    for name, layer in snn.layers.items():
        if isinstance(layer, (EncodingLayer, SpikingLayer)):
            theta = torch.tensor(snn.details[name]["theta"], dtype=torch.float64)
            membrane = stream._state.of(layer)["state"][0] * (theta / layer.threshold)
            membrane = membrane.movedim(-1, 1)
            theta = theta.reshape(-1, *[1] * (membrane.dim() - 2))
            ours = membrane + theta * spikes[name].sum(0)
            exact = sim.membranes[name][-1] + theta * sim.spikes[name][:-1].sum(0)
            errors[name] = float(((ours - exact) / theta).square().mean().sqrt())
    return errors


@pytest.mark.parametrize("kind", [networks.Small, networks.Groups, networks.Image, networks.Perceptron])
def test_what_neurons_integrate_is_fifty_times_nearer_to_float64(kind):
    shape = networks.SHAPES[kind]
    prepared = lively(networks.randomize(kind()), shape)
    x = images(shape, 8)
    short, long = (membrane_errors(prepared, bits, x, 4) for bits in (16, 24))
    for name, error in short.items():
        assert 0 < 50 * long[name] < error < 1e-3, name


def test_bits_are_as_many_as_fit():
    """Of wide layers the sums leave fewer; that is reported and no reason to warn (warnings are errors here)."""
    shape = networks.SHAPES[networks.Small]
    prepared = lively(networks.randomize(networks.Small()), shape)
    few, many = (qcfs_fast.convert(prepared, weight_bits=24, max_T=t) for t in (255, 4))
    for name, d in few.details.items():
        assert 16 < d["weight_bits_used"] <= many.details[name]["weight_bits_used"] <= 24
        assert d["max_T"] >= 255
    assert few.details != many.details


def test_synapses_are_those_of_16_bits():
    found, shapes = [], {}

    def watch(name, layer, out):
        shapes[name] = tuple(out[0].shape[-3:])  # no layer of Branches is a vector

    for bits in (16, 24):
        snn, x = converted(networks.Branches, weight_bits=bits)
        snn.run(x, 4, False, watch)
        found.append({k: (v.synapses, v.analog, len(v.bundles)) for k, v in afferents(snn, shapes).items()})
        assert set(re.findall(r"(\d+)-bit", str(snn))) == {str(bits)}
    assert found[0] == found[1]


def test_too_many_products_are_refused():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.ModuleList(nn.Conv2d(1, 2, 1) for _ in range(22))
            self.b, self.out = nn.Conv2d(44, 3, 1), nn.Linear(3 * 4, 2)

        def forward(self, x):
            return self.out(torch.relu(self.b(torch.cat([torch.relu(a(x)) for a in self.a], 1))).flatten(1))

    prepared = lively(networks.randomize(Dense()), (1, 2, 2))
    qcfs_fast.convert(prepared, weight_bits=16)
    with pytest.raises(qcfs_fast.ConversionError, match=r"sums 22 products; with 24-bit weights it can be 21.*=16"):
        qcfs_fast.convert(prepared, weight_bits=24)


def test_digits_of_different_shapes_are_refused(tmp_path):
    from test_save_load import rewrite

    snn, _ = converted(networks.Perceptron, weight_bits=24)
    snn.save(tmp_path / "net")
    rewrite(tmp_path / "net", None, lambda t: t.update({"4/weight_0_low": t["4/weight_0_low"][1:].clone()}))
    with pytest.raises(qcfs_fast.FormatError, match="4: weight_0_low has another shape than the upper digit"):
        qcfs_fast.load(tmp_path / "net")
