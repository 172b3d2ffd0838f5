"""The check that convert ends with: it finds faults, and no fault where there is none."""

import networks
import pytest
import torch
from torch import nn

import qcfs_fast
from qcfs_fast import ConversionError
from qcfs_fast.conversion import builder

FAULTS = {
    "weight": ("block1.relu_1", "weight_0"),
    "bias": ("block1.relu_1", "bias"),
    "residual": ("block1.relu_1", "amplitude_0"),
    "first layer": ("stem.2", "weight"),
    "readout": ("head", "gain_0"),
}


def break_channel(monkeypatch, fault, change):
    """From now on change(layer, channel 1 of the tensor, a view) follows every conversion, before its check."""
    build = builder._Builder.build

    def altered(self, *args):
        snn = build(self, *args)
        name, tensor = FAULTS[fault]
        change(snn.layers[name], snn.layers[name].buffer(tensor)[..., 1])
        return snn

    monkeypatch.setattr(builder._Builder, "build", altered)


@pytest.mark.parametrize("bits", [8, 16, 24])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_channel_that_went_wrong_is_found(monkeypatch, bits, fault):
    model = networks.lively(networks.randomize(networks.Small()), networks.SHAPES[networks.Small])

    def change(layer, part):
        part *= -1
        if fault == "bias":
            part += layer.threshold[1] // 2

    assert qcfs_fast.convert(model, weight_bits=bits).T == 4
    break_channel(monkeypatch, fault, change)
    with pytest.raises(ConversionError, match="fault of qcfs_fast"):
        qcfs_fast.convert(model, weight_bits=bits)
    assert qcfs_fast.convert(model, weight_bits=bits, check=False).T == 4


@pytest.mark.parametrize("fault", ["weight", "bias"])
def test_rounding_by_data_hides_no_fault(monkeypatch, fault):
    model = networks.lively(networks.randomize(networks.Small()), networks.SHAPES[networks.Small])

    def change(layer, part):
        part += layer.threshold[1] // 2 if fault == "bias" else (part * 0.3).to(part.dtype)

    data = [networks.images(networks.SHAPES[networks.Small], 8)]
    assert qcfs_fast.convert(model, weight_bits=8, data=data, progress=False).T == 4
    break_channel(monkeypatch, fault, change)
    with pytest.raises(ConversionError, match="fault of qcfs_fast"):
        qcfs_fast.convert(model, weight_bits=8, data=data, progress=False)


@pytest.mark.parametrize("bits", [8, 16, 24])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_readout_keeps_small_weights_beside_those_of_a_neuron_that_never_fires(bits, grouped):
    torch.manual_seed(0)
    head = nn.Conv2d(8, 6, 1, groups=2) if grouped else nn.Conv2d(8, 6, 1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), qcfs_fast.QCFS(4, 2.0, 8), head).eval()
    model[1].thresh.data[3] = 3e38
    head.weight.data[:, 1] *= 1e5
    model[0].bias.data[1 + 4 * grouped] = -1e3  # its input never fires either
    x = networks.images((3, 6, 6))
    found = qcfs_fast.convert(model, weight_bits=bits)(x)
    wanted = qcfs_fast.simulate(model, x, 4)[-1]
    assert wanted.abs().max() < 10 or grouped
    assert (found - wanted).abs().max() < 2e-4 * wanted.abs().max()


@pytest.mark.parametrize("bits", [8, 16])
def test_weights_that_all_round_alike_are_no_fault(bits):
    """Equal weights have equal errors, which add up; so do those of a layer whose bits are few."""
    model = networks.randomize(networks.Small(width=32))
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.weight.data = m.weight[:, :1, :1, :1].sign().expand_as(m.weight) * 0.013
    model = networks.lively(model, networks.SHAPES[networks.Small])
    for max_T in (4, 5000):
        assert qcfs_fast.convert(model, weight_bits=bits, max_T=max_T).max_T >= max_T


def test_a_perceptron_that_flattens_is_refused_without_a_page_of_logs(capfd, caplog):
    model = qcfs_fast.prepare(nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.ReLU(), nn.Linear(20, 3)), check=False)
    with pytest.raises(ConversionError, match="input_shape"):
        qcfs_fast.convert(model)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
