"""SpikingJelly both ways: the spikes of its own run, step by step, on weights and images of a coarse grid."""

import networks
import pytest
import torch
from torch import nn

import qcfs_fast
from qcfs_fast import ConversionError
from qcfs_fast.study import shipped

pytest.importorskip("spikingjelly")

from spikingjelly.activation_based import functional, layer, neuron

T = 6


class Residual(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.stem = nn.Sequential(layer.Conv2d(3, 8, 3, padding=1), layer.BatchNorm2d(8), make(1.0))
        self.a, self.first = layer.Conv2d(8, 8, 3, padding=1), make(0.5)
        self.b, self.second = layer.Conv2d(8, 8, 3, padding=1), make(2.0)
        self.head = nn.Sequential(layer.AvgPool2d(2), layer.Dropout(0.5), layer.Flatten(), layer.Linear(8 * 16, 5))

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.second(self.b(self.first(self.a(x))) + x))


class Sequence(nn.Sequential):
    """As its networks of several steps are written; layers of torch in a container."""

    def __init__(self, make):
        super().__init__(
            layer.SeqToANNContainer(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)), make(1.0),
            layer.SeqToANNContainer(nn.AvgPool2d(2), nn.Conv2d(8, 8, 3, padding=1, groups=4)), make(1.0),
            layer.Flatten(),
            layer.Linear(8 * 16, 12), make(0.5), layer.Linear(12, 5),
        )  # fmt: skip


def soft(theta):
    return neuron.IFNode(v_threshold=theta, v_reset=None)


def stated(theta):
    """First potentials that somebody set: a quarter of the threshold."""
    node = soft(theta)
    node.set_reset_value("v", theta / 4)
    return node


MAKERS = {"from 0": soft, "from theta/4": stated, "from theta/2": neuron.HalfThresholdIFNode}


def images():
    return networks.images((3, 8, 8), 4, grid=8)


def run(net, x, steps=T):
    """The mean output of the library's own loop, and the spikes of its neurons."""
    found = {n: [] for n, m in net.named_modules() if isinstance(m, neuron.BaseNode)}
    handles = [
        net.get_submodule(n).register_forward_hook(lambda _m, _i, out, n=n: found[n].append(out != 0)) for n in found
    ]
    net.eval()
    functional.reset_net(net)
    with torch.no_grad():
        out = torch.stack([net(x) for _ in range(steps)]).mean(0)
    functional.reset_net(net)
    for handle in handles:
        handle.remove()
    return out, {n: torch.stack(spikes) for n, spikes in found.items()}


def assert_same_spikes(snn, net, x, steps=T):
    out, want = run(net, x, steps)
    got = qcfs_fast.trace(snn, x, steps)
    assert list(got) == list(want)
    for name, spikes in want.items():
        assert 0.02 < spikes.float().mean() < 0.95, f"{name}: the test is void"
        assert torch.equal(got[name], spikes), name
    torch.testing.assert_close(snn(x, steps), out)


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_its_networks_convert(make):
    net = networks.on_grid(Residual(make), seed=1)
    snn = qcfs_fast.from_spikingjelly(net, T=T, input_shape=(3, 8, 8))
    assert all(d["lossless"] == d["channels"] for d in snn.details.values())
    assert_same_spikes(snn, net, images())
    assert_same_spikes(snn, net, images(), 3)
    assert isinstance(net.first, neuron.BaseNode)  # the network is as it was


@pytest.mark.parametrize("make", [soft, neuron.HalfThresholdIFNode])
def test_networks_of_several_steps_convert(make):
    net = networks.on_grid(Sequence(make), seed=3)
    x = images()
    functional.set_step_mode(net, "m")
    snn = qcfs_fast.from_spikingjelly(net, T=T)
    functional.reset_net(net)
    with torch.no_grad():
        out = net.eval()(x.expand(T, *x.shape))
    torch.testing.assert_close(snn(x), out.mean(0))
    torch.testing.assert_close(snn(x, per_step=True)[1], out[:2].mean(0))


def test_stated_first_potential():
    net = networks.on_grid(Residual(soft), seed=1)
    snn = qcfs_fast.from_spikingjelly(net, T=T, v_init=0.5)
    twin = networks.on_grid(Residual(neuron.HalfThresholdIFNode), seed=1)
    assert_same_spikes(snn, twin, images())
    assert snn.max_T > T  # no bias by step is needed
    with pytest.raises(ValueError, match="v_init must be from 0 to 1"):
        qcfs_fast.from_spikingjelly(net, v_init=2.0)


def from_ann(x, **options):
    """What its RateCodingRecipe makes of an ANN."""
    ann2snn = pytest.importorskip("spikingjelly.activation_based.ann2snn")  # has dependencies of its own
    ann = networks.on_grid(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5),
        )
    )  # fmt: skip
    recipe = ann2snn.RateCodingRecipe(dataloader=[(x, torch.zeros(4))], mode="max", **options)
    return ann2snn.FXConverter(recipe).convert(ann).eval()


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_ann2snn_converts(make):
    """Its scales, which are no multiples of anything, are set to powers of two."""
    x = images()
    net = from_ann(x, neuron_factory=make)
    for number, scale in enumerate((2.0, 4.0)):
        stage = net.get_submodule(f"spiking_{number}")
        stage.scaler0.scale, stage.scaler1.scale = torch.tensor(scale), torch.tensor(1 / scale)
    assert_same_spikes(qcfs_fast.from_spikingjelly(net, T=T), net, x)


def test_scales_by_channel_are_refused():
    with pytest.raises(ConversionError, match=r"spiking_0\.scaler0: scales each channel by its own number"):
        qcfs_fast.from_spikingjelly(from_ann(images(), channel_wise=True))


# -------------------------------------------------------------------------------------------- there


@pytest.mark.parametrize("kind", [networks.Small, networks.Groups, networks.Perceptron], ids=lambda k: k.__name__)
def test_ours_become_its(kind):
    pytest.importorskip("nir")
    shape = networks.SHAPES[kind]
    snn = qcfs_fast.convert(networks.on_grid(qcfs_fast.prepare(kind(), levels=4)), T=T)
    x = networks.images(shape, grid=8)
    net = qcfs_fast.to_spikingjelly(snn, shape)
    out, spikes = run(net, x)
    assert all(torch.equal(spikes[name.replace(".", "_")], s) for name, s in qcfs_fast.trace(snn, x).items())
    torch.testing.assert_close(out.float(), snn(x))
    functional.set_step_mode(net, "m")
    functional.reset_net(net)
    with torch.no_grad():
        torch.testing.assert_close(net(x.expand(T, *x.shape)).mean(0), out)


def test_thresholds_that_differ_by_channel():
    pytest.importorskip("nir")
    snn = qcfs_fast.convert(shipped.network()[0], T=3)
    assert any(layer.threshold.unique().numel() > 1 for layer in snn.spiking_layers.values())
    x = torch.round(shipped.images().batch(range(4))[0] * 256) / 256
    net = qcfs_fast.to_spikingjelly(snn, x.shape[1:])
    out, spikes = run(net, x, 3)
    assert all(torch.equal(spikes[name.replace(".", "_")], s) for name, s in qcfs_fast.trace(snn, x).items())
    functional.set_step_mode(net, "m")
    with torch.no_grad():
        torch.testing.assert_close(net(x.expand(3, *x.shape)).mean(0), out)


def test_its_network_comes_back_in_integers():
    """A network of its own, converted and given back, spikes as it did."""
    pytest.importorskip("nir")
    net = networks.on_grid(Residual(neuron.HalfThresholdIFNode), seed=1)
    snn = qcfs_fast.from_spikingjelly(net, T=T)
    again, spikes = run(qcfs_fast.to_spikingjelly(snn, (3, 8, 8)), images())
    out, want = run(net, images())
    assert [torch.equal(a, b) for a, b in zip(spikes.values(), want.values(), strict=True)] == [True] * len(want)
    torch.testing.assert_close(again.float(), out)


# ----------------------------------------------------------------------------------------- refusals


def network(node, *layers):
    return nn.Sequential(layer.Conv2d(3, 4, 3), node, *layers, layer.Flatten(), layer.Linear(4 * 36, 5))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fire, self.out = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), soft(1.0), nn.Linear(4 * 36, 5)

    def forward(self, x):
        return self.out(self.fire(self.b(self.fire(self.a(x)))).flatten(1))


def _far(theta=1.0):
    node = soft(theta)
    node.set_reset_value("v", -1.0)
    return node


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: network(neuron.IFNode()), r"1: its neurons are reset to 0\.0"),
        (lambda: network(neuron.LIFNode(v_reset=None)), "1: LIFNode has no exact counterpart"),
        (lambda: network(_far()), r"1: a threshold of 1\.0 and a first potential of -1\.0"),
        (lambda: network(soft(-1.0)), r"1: a threshold of -1\.0"),
        (lambda: network(soft(1.0), layer.WSConv2d(4, 4, 1)), "2: WSConv2d has no exact counterpart"),
        (lambda: network(soft(1.0), layer.TemporalWiseAttention(16)), "2: TemporalWiseAttention has no exact"),
        (Twice, "fire: is called twice in a step"),
        (lambda: nn.Sequential(layer.Linear(3, 2)), "the network has no IFNode"),
        (lambda: soft(1.0), "a neuron alone is no network"),
    ],
)
def test_what_has_no_counterpart_is_refused(make, message):
    with pytest.raises(ConversionError, match=message):
        qcfs_fast.from_spikingjelly(make())


def test_no_module():
    with pytest.raises(TypeError, match="expected a torch module, got str"):
        qcfs_fast.from_spikingjelly("net")
