"""Gates are refused with a remedy, prepare(replace={their class}), which leaves them out; nothing else is left out."""

import re

import networks
import pytest
import torch
import torch.nn.functional as F
from markers import slow_but
from torch import nn
from torchvision_models import models

import qcfs_fast
from qcfs_fast import ConversionError
from qcfs_fast.conversion.checking import layer_differences, share
from qcfs_fast.study.zoo import classes_named

SHAPE = (3, 16, 16)


class Squeeze(nn.Module):
    """Hu et al., CVPR 2018, as EfficientNet has it."""

    def __init__(self, channels):
        super().__init__()
        self.reduce, self.act, self.expand = nn.Conv2d(channels, 2, 1), nn.SiLU(), nn.Conv2d(2, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))


class Inverted(nn.Module):
    """Pointwise, depthwise, gate, pointwise without an activation; a residual sum where shapes allow."""

    def __init__(self, cin, cout, stride, gate=Squeeze):
        super().__init__()
        wide, self.residual = 4 * cin, stride == 1 and cin == cout
        self.expand = nn.Sequential(nn.Conv2d(cin, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.SiLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.SiLU()
        )
        self.gate = gate(wide)
        self.project = nn.Sequential(nn.Conv2d(wide, cout, 1, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x):
        y = self.project(self.gate(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


class Efficient(nn.Module):
    """What EfficientNet is made of (Tan and Le, ICML 2019), in small."""

    def __init__(self, gate=Squeeze):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.blocks = nn.Sequential(*(Inverted(*plan, gate) for plan in ((8, 8, 1), (8, 12, 2), (12, 12, 1))))
        self.head = nn.Sequential(nn.Conv2d(12, 24, 1, bias=False), nn.BatchNorm2d(24), nn.SiLU())
        self.classes = nn.Linear(24, 5)

    def forward(self, x):
        return self.classes(self.head(self.blocks(self.stem(x))).mean((2, 3)))


def as_told(model):
    """The model as its refusal says that it can be prepared."""
    with pytest.raises(ConversionError) as caught:
        qcfs_fast.prepare(model)
    names = re.findall(r"replace=\{(\w+)\}\) leaves it out", str(caught.value))
    names += re.findall(
        r": (\w+) has no spiking counterpart: .*prepare\(model, replace=\{its class\}\)", str(caught.value)
    )
    assert names
    return qcfs_fast.prepare(model, levels=4, replace=classes_named(model, names))


def test_a_network_with_gates_converts_as_its_refusal_says(tmp_path):
    model = networks.randomize(Efficient())
    prepared = as_told(model)
    assert isinstance(model.blocks[0].gate, Squeeze)  # the model itself stays
    assert not any("gate" in name for name in prepared.state_dict())
    x = networks.images(SHAPE, 8)
    qcfs_fast.calibrate(prepared, [x], progress=False)
    snn = qcfs_fast.convert(prepared, T=4)
    found = layer_differences(prepared, snn, x, 4)
    assert len(found) == 8
    assert share(found) < 1e-4
    assert 0.05 < sum(d.fired for d in found.values()) / sum(d.compared for d in found.values()) < 0.95
    snn.save(tmp_path / "net.safetensors")
    assert torch.equal(qcfs_fast.load(tmp_path / "net.safetensors")(x, per_step=True), snn(x, per_step=True))


def test_without_its_gates_a_network_is_exact():
    grid = networks.on_grid(as_told(Efficient()))
    x = networks.images(SHAPE, 3, grid=64)
    meaning = qcfs_fast.simulate(grid, x, 5, spikes=True)
    spikes = qcfs_fast.trace(qcfs_fast.convert(grid, T=5, input_shape=SHAPE), x)
    assert list(spikes) == list(meaning.spikes)
    assert all(torch.equal(spikes[name], theirs) for name, theirs in meaning.spikes.items())


def test_what_remains_is_the_network_without_gates():
    """With many levels and a large threshold QCFS is a ReLU."""
    model = networks.randomize(Efficient()).double()
    prepared = qcfs_fast.prepare(model, levels=1 << 30, threshold=1e3, replace={nn.SiLU, Squeeze})
    plain = networks.randomize(Efficient(lambda channels: nn.Identity())).double()
    plain.load_state_dict(model.state_dict(), strict=False)
    for part in (plain.stem, plain.head, *(p for b in plain.blocks for p in (b.expand, b.depthwise))):
        part[2] = nn.ReLU()
    x = networks.images(SHAPE, 4).double()
    torch.testing.assert_close(prepared(x), plain(x), rtol=1e-5, atol=1e-5)


def test_it_trains():
    torch.manual_seed(0)
    prepared = qcfs_fast.prepare(Efficient().train(), levels=4, threshold=2.0, replace={nn.SiLU, Squeeze})
    before = {name: p.clone() for name, p in prepared.named_parameters()}
    F.cross_entropy(prepared(torch.randn(8, *SHAPE)), torch.randint(5, (8,))).backward()
    torch.optim.SGD(prepared.parameters(), lr=0.1).step()
    assert all(not torch.equal(before[name], p) for name, p in prepared.named_parameters())


@pytest.mark.parametrize(
    "name", slow_but(["mobilenet_v3_small"], ["mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf"])
)
def test_torchvisions_families_with_gates(name):
    torch.manual_seed(0)
    prepared = as_told(getattr(models, name)(weights=None, num_classes=10).eval())
    x = torch.randn(2, 3, 64, 64)
    snn = qcfs_fast.convert(qcfs_fast.calibrate(prepared, [x], progress=False), T=4)
    assert share(layer_differences(prepared, snn, x, 4)) < 1e-4


class Written(nn.Module):
    """A module of the user's, of `rule`."""

    def __init__(self, rule, channels):
        super().__init__()
        self.rule, self.mix, self.line = rule, nn.Conv2d(channels, channels, 1), nn.Conv1d(1, 1, 3, padding=1)
        self.linear, self.norm = nn.Linear(channels, channels), nn.BatchNorm2d(channels)
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        nn.init.zeros_(self.mix.weight)  # as some initialise the last layer of a gate: all images have one factor

    def forward(self, x):
        return self.rule(self, x, x.mean((2, 3), keepdim=True))


GATES = {
    "squeeze": lambda m, x, mean: x * torch.sigmoid(m.mix(mean)),
    "linear": lambda m, x, mean: torch.sigmoid(m.linear(mean.flatten(1)))[:, :, None, None] * x,
    "Wang et al., CVPR 2020": lambda m, x, mean: (
        x * torch.sigmoid(m.line(mean.flatten(1)[:, None])).transpose(1, 2)[..., None]
    ),
    "hard": lambda m, x, mean: F.hardsigmoid(m.mix(mean)).expand_as(x) * x,
    "in place": lambda m, x, mean: x.mul_(torch.sigmoid(m.mix(mean))),
    "with itself": lambda m, x, mean: x + x * torch.tanh(m.mix(mean)),
}
NO_GATES = {
    "by pixel": lambda m, x, mean: x * torch.sigmoid(m.mix(x)),
    "of pixels": lambda m, x, mean: x * torch.sigmoid(x.amax(1, keepdim=True)),
    "swish": lambda m, x, mean: x * torch.sigmoid(x),
    "the factor": lambda m, x, mean: torch.sigmoid(m.mix(mean)),
    "a constant": lambda m, x, mean: x * m.scale,
    "normalised": lambda m, x, mean: m.norm(x),
    "nothing": lambda m, x, mean: x,
    "zeros": lambda m, x, mean: 0 * x,
    "a sum": lambda m, x, mean: x + mean,
    "activated": lambda m, x, mean: torch.relu(x * torch.sigmoid(m.mix(mean))),
    "two values": lambda m, x, mean: (x * torch.sigmoid(m.mix(mean)), x),
    "of another image": lambda m, x, mean: x * torch.sigmoid(m.mix(mean))[:1],
}


def with_written(rule, channels):
    first, last = nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 2, 1)
    return nn.Sequential(first, nn.ReLU(), Written(rule, channels), last).eval()


@pytest.mark.parametrize("channels", [1, 6])
def test_what_is_a_gate_and_what_is_none(channels):
    x = networks.images((3, 8, 8))
    for name, rule in GATES.items():
        model = with_written(rule, channels)
        bare = nn.Sequential(*model[:2], *model[3:])
        without = qcfs_fast.prepare(model, threshold=2.0, replace={Written})
        assert torch.equal(without(x), qcfs_fast.prepare(bare, threshold=2.0)(x)), name
    for rule in NO_GATES.values():
        with pytest.raises(ConversionError, match=r"^2: Written is named in replace and is no gate.*Remedy"):
            qcfs_fast.prepare(with_written(rule, channels), replace={Written})


def test_every_place_of_a_gate_is_found_and_hooks_stay_refused():
    gate = Squeeze(8)
    block = nn.Sequential(nn.Conv2d(8, 8, 1), gate, nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), block, gate, nn.Conv2d(8, 8, 1), nn.ReLU(), block).eval()
    model.append(nn.Conv2d(8, 2, 1))
    prepared = qcfs_fast.prepare(model, replace={nn.SiLU, Squeeze})
    assert not any("reduce" in name for name, _ in prepared.named_parameters())
    gate.register_forward_hook(lambda m, args, y: 2 * y)
    with pytest.raises(ConversionError, match="has a forward hook"):
        qcfs_fast.prepare(model, replace={nn.SiLU, Squeeze})


def test_a_gate_without_weights_is_not_taken_for_one():
    with torch.device("meta"):
        model = with_written(GATES["squeeze"], 6)
    with pytest.raises(ConversionError, match="has no weights"):
        qcfs_fast.prepare(model, replace={Written})


def test_layers_of_torch_are_no_gates():
    for kind in (nn.BatchNorm2d, nn.LayerNorm, nn.Dropout, nn.Module, int, "Squeeze"):
        with pytest.raises(ValueError, match="classes of gates, none of torch's"):
            qcfs_fast.prepare(Efficient(), replace={kind})
