"""Networks of lines [N, C, L]: Conv1d and its kin are convolutions of maps that are one pixel high."""

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcfs_fast
from qcfs_fast import QCFS, ConversionError

pytestmark = pytest.mark.filterwarnings("ignore:convert. no threshold")
SHAPE = (2, 40)


class Lines(nn.Module):
    """Strides, groups, dilation, a shortcut, a maximum, an average, a transposed convolution, a shuffle, a mean."""

    def __init__(self, activation=nn.ReLU):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv1d(2, 8, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.b, self.c = nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=2), nn.Conv1d(8, 6, 3, padding="same")
        self.up, self.out = nn.ConvTranspose1d(6, 4, 2, 2), nn.Linear(4, 5)
        self.pool, self.average = nn.MaxPool1d(2), nn.AvgPool1d(2)
        self.acts = nn.ModuleList(activation() for _ in range(4))

    def forward(self, x):
        x = self.acts[0](self.norm(self.a(x)))
        n, c, length = x.shape
        y = x.view(n, 2, c // 2, length).transpose(1, 2).reshape(n, c, length)
        x = self.pool(self.acts[1](self.b(y) + x))
        x = self.average(self.acts[2](self.c(x)))
        return self.out(F.pad(self.acts[3](self.up(x)), (1, 0))[:, :, 1:].mean(-1))


def on_grid():
    """The network in 16th parts, and images of it."""
    model = networks.on_grid(Lines(lambda: QCFS(4)))
    model.up.weight.data = torch.round(model.up.weight.data * 8) / 8
    model.up.bias.data = torch.round(model.up.bias.data * 8) / 8
    return model, networks.images(SHAPE, 5, grid=64)


@pytest.mark.parametrize("neuron", ["plain", "offset", "masked", "signed"])
def test_on_a_grid_every_spike_is_exact(neuron):
    model, x = on_grid()
    snn = qcfs_fast.convert(model, T=4, input_shape=SHAPE, neuron=neuron)
    spikes, meant = qcfs_fast.trace(snn, x), qcfs_fast.simulate(model, x, 4, spikes=True, neuron=neuron)
    assert [s.shape for s in spikes.values()] == [s.shape for s in meant.spikes.values()]
    for name, theirs in meant.spikes.items():
        assert torch.equal(spikes[name].to(theirs.dtype), theirs), name
        assert 0.005 < theirs.double().abs().mean() < 0.95
    torch.testing.assert_close(snn(x, per_step=True), meant.output.float(), rtol=2e-7, atol=1e-7)


def test_as_maps_of_one_row():
    """The same integers as the network of 2d layers that a user would write instead."""
    lines = networks.lively(Lines(), SHAPE)
    x = networks.images(SHAPE, 5)
    snn = qcfs_fast.convert(lines, T=4)

    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.lines = lines

        def forward(self, x):
            def conv(m, x):
                same = (0, 0) if m.padding == (0,) else (0, m.padding[0] if m.padding != "same" else 1)
                w = m.weight.unsqueeze(2)
                return F.conv2d(x, w, m.bias, (1, *m.stride), same, (1, *m.dilation), m.groups)

            n = self.lines
            first = F.batch_norm(conv(n.a, x), n.norm.running_mean, n.norm.running_var, n.norm.weight, n.norm.bias)
            x = n.acts.get_submodule("0")(first)
            x = F.avg_pool2d(n.acts.get_submodule("1")(conv(n.b, F.channel_shuffle(x, 2)) + x), (1, 2))
            x = F.avg_pool2d(n.acts.get_submodule("2")(conv(n.c, x)), (1, 2))
            x = F.conv_transpose2d(x, n.up.weight.unsqueeze(2), n.up.bias, (1, 2))
            x = F.pad(n.acts.get_submodule("3")(x), (1, 0))[:, :, :, 1:]
            return n.out(x.mean((2, 3)))

    maps = qcfs_fast.convert(Maps().eval(), T=4, input_shape=(2, 1, 40))
    assert torch.equal(maps(x.unsqueeze(2)), snn(x))
    for ours, theirs in zip(
        qcfs_fast.trace(snn, x).values(), qcfs_fast.trace(maps, x.unsqueeze(2)).values(), strict=True
    ):
        assert torch.equal(ours, theirs.squeeze(3))


def test_every_way_of_running(tmp_path):
    model, x = networks.lively(Lines(), SHAPE), networks.images(SHAPE, 5)
    snn = qcfs_fast.convert(model, T=4)
    expected = snn(x, per_step=True)
    assert "one native call" in snn.extra_repr()
    assert len(expected.unique()) > 20
    assert "[2, 40]" in snn.report()
    snn.save(tmp_path / "net")
    loaded = qcfs_fast.load(tmp_path / "net")
    assert loaded.input_shape == snn.input_shape == SHAPE
    assert torch.equal(loaded(x, per_step=True), expected)
    operators = []
    handle = snn.layers["input"].register_forward_hook(lambda *_: operators.append(1))  # then there is no native call
    assert torch.equal(snn(x, per_step=True), expected)
    assert operators
    handle.remove()
    stream = snn.stream()
    assert torch.equal(torch.cat([stream(x, steps=3, per_step=True), stream(per_step=True)]), expected)
    assert qcfs_fast.profile(snn, [x], progress=False).image_shape == SHAPE
    assert torch.equal(snn.predict(x, confidence=1.0).logits, expected[-1])
    assert torch.equal(snn(torch.stack([x] * 4)), expected[-1])  # four dimensions are time and lines
    counts = torch.randint(0, 3, (4, 5, *SHAPE), dtype=torch.uint8)
    assert torch.equal(snn(counts), snn(counts.float()))
    with pytest.raises(ValueError, match=r"\[N, 2, L\], or \[T, N, 2, L\] over time; got \[5, 2, 1, 40\]"):
        snn(x.unsqueeze(2))


def test_outputs_that_are_lines():
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv1d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 3, 1), nn.Softmax(1))
    model = networks.lively(trunk, SHAPE)
    x = networks.images(SHAPE, 5)
    snn = qcfs_fast.convert(model, T=4)
    meant = qcfs_fast.simulate(model, x, 4)
    assert snn(x).shape == (5, 3, 40)
    torch.testing.assert_close(snn(x, per_step=True), meant.float(), rtol=1e-3, atol=1e-3)


def test_causal_layers_cut_their_end():
    """As temporal convolutional networks do, before the activation, which may as well be after the cut."""

    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Conv1d(2, 6, 3, padding=2), nn.Conv1d(6, 6, 3, padding=4, dilation=2)
            self.out = nn.Linear(6, 3)

        def forward(self, x):
            x = torch.relu(self.a(x)[:, :, :-2].contiguous())
            return self.out(torch.relu(self.b(x)[:, :, :-4]).mean(2))

    plain = Causal().eval()
    model, x = networks.lively(plain, SHAPE), networks.images(SHAPE, 5)
    snn = qcfs_fast.convert(model, T=4)
    spikes = qcfs_fast.trace(snn, x)
    meant = qcfs_fast.simulate(model, x, 4, spikes=True, force=spikes)
    assert [s.shape[-1] for s in spikes.values()] == [42, 44]  # the pixels that are cut are neurons
    assert sum(int((spikes[k] != meant.spikes[k]).sum()) for k in spikes) <= 2
    torch.testing.assert_close(snn(x, per_step=True), meant.output.float(), rtol=1e-3, atol=1e-3)


def test_rounding_on_data_and_biases_by_step():
    model, x = networks.lively(Lines(), SHAPE), networks.images(SHAPE, 20)
    data = [x[:10], x[10:]]
    rounded = qcfs_fast.convert(model, T=4, weight_bits=8, data=data, progress=False)
    nearest = qcfs_fast.convert(model, T=4, weight_bits=8)
    assert any(not torch.equal(a, b) for a, b in zip(rounded.buffers(), nearest.buffers(), strict=True))
    biases = qcfs_fast.step_biases(model, data, T=4, progress=False)
    assert qcfs_fast.convert(model, T=4, step_bias=biases)(x).shape == (20, 5)


class Of(nn.Module):
    """A line through one layer, and a head."""

    def __init__(self, first, head=4):
        super().__init__()
        self.first, self.out = first, nn.Linear(head, 3)

    def forward(self, x):
        return self.out(torch.relu(self.first(x)).flatten(1))


class Called(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.conv, self.call = nn.Conv1d(1, 4, 3), call

    def forward(self, x):
        return torch.relu(self.conv(self.call(x))).mean(2)


REFUSED = {
    "volumes": (Of(nn.Conv3d(2, 4, 3)), "first: works on volumes.*steps of an input"),
    "maps too": (Of(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv1d(2, 4, 3))), r"first.1: works on lines.*\(1, K\)"),
    "vectors": (Called(lambda x: x.unsqueeze(1)), r"adds a dimension.*\[N, 1, L\]"),
    "channels last": (Called(lambda x: x.permute(0, 2, 1)), r"permutes dimensions.*\[N, C, L\]"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_a_remedy(what):
    model, message = REFUSED[what]
    with pytest.raises(ConversionError, match=f"(?s){message}"):
        qcfs_fast.prepare(model.eval())
