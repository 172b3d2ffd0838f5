"""The check that convert ends with: it finds faults, and no fault where there is none."""

import networks
import pytest
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


@pytest.mark.parametrize("bits", [8, 16, 24])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_channel_that_went_wrong_is_found(monkeypatch, bits, fault):
    model = networks.lively(networks.randomize(networks.Small()), networks.SHAPES[networks.Small])
    build = builder._Builder.build

    def altered(self, *args):
        snn = build(self, *args)
        name, tensor = FAULTS[fault]
        layer = snn.layers[name]
        layer.buffer(tensor)[..., 1] *= -1
        if tensor == "bias":
            layer.bias[1] += layer.threshold[1] // 2
        return snn

    assert qcfs_fast.convert(model, weight_bits=bits).T == 4
    monkeypatch.setattr(builder._Builder, "build", altered)
    with pytest.raises(ConversionError, match="fault of qcfs_fast"):
        qcfs_fast.convert(model, weight_bits=bits)
    assert qcfs_fast.convert(model, weight_bits=bits, check=False).T == 4


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
