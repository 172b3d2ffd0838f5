"""What a network may be made of besides layers and sums: each on a grid, where every way to run it is exact.

A network of each is converted, and its spikes and answers must be those of float64, ties included. The native executor,
the operators, a saved file and (where there is a compiler) the C program of integers must then give the same bytes.
"""

import importlib

import networks
import pytest
import torch
import torch.nn.functional as F
import torchvision_models
from test_integers import COMPILER, run_in_c
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import qcfs_fast
from qcfs_fast import QCFS
from qcfs_fast.conversion.checking import layer_differences
from qcfs_fast.exchange.integers import integer_program
from qcfs_fast.network.layers import is_constant

pytestmark = pytest.mark.filterwarnings("ignore:convert. no threshold")
SHAPE = (3, 8, 6)


class Net(nn.Module):
    """Layers a to d, an activation behind each, put together by `wiring(net, x)`; the head reads what that returns."""

    def __init__(self, wiring, width=8, shape=SHAPE, head=True, **layers):
        super().__init__()
        self.wiring, self.relu_a, self.relu_b, self.relu_c, self.relu_d = wiring, *(QCFS(4) for _ in range(4))
        self.a, self.b = nn.Conv2d(shape[0], width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.c, self.d = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 3, padding=1)
        for name, value in layers.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.head = nn.Identity()
        if head:
            with torch.no_grad():
                self.head = nn.Linear(wiring(self, torch.zeros(1, *shape)).flatten(1).shape[1], 5)

    def forward(self, x):
        out = self.wiring(self, x)
        return out if isinstance(self.head, nn.Identity) else self.head(out.flatten(1))


def exact(model, folder, shape=SHAPE, c=True, T=5, **options):
    """Convert a network on a grid, and compare all ways to run it with float64 and with each other."""
    model = networks.on_grid(model)
    snn = qcfs_fast.convert(model, T=T, input_shape=shape, **options)
    assert all(d["lossless"] == d["channels"] for d in snn.details.values())
    x = networks.images(shape, 3, grid=64)
    meaning = qcfs_fast.simulate(model, x, T, spikes=True)
    spikes = qcfs_fast.trace(snn, x)
    assert list(spikes) == list(meaning.spikes)
    for name, theirs in meaning.spikes.items():
        assert torch.equal(spikes[name], theirs.reshape(spikes[name].shape)), name  # where it was flattened before
    rates = [float(s.float().mean()) for s in spikes.values()]
    assert 0.05 < sum(rates) / len(rates) < 0.95
    by_step = snn(x, per_step=True)
    assert snn._executor.path == "one native call"
    torch.testing.assert_close(by_step, meaning.output.float(), rtol=2e-7, atol=1e-7)
    assert torch.equal(by_step[-1], snn(x))
    seen = []
    assert torch.equal(snn.run(x, per_step=True, watch=lambda *a: seen.append(a)), by_step)
    assert len(seen) == len(snn.layers)
    snn.save(folder / "snn.safetensors")
    assert torch.equal(qcfs_fast.load(folder / "snn.safetensors")(x, per_step=True), by_step)
    if c and COMPILER is not None:
        integer_program(snn, shape).c_header(folder / "network.h")
        assert torch.equal(run_in_c(folder, x, ("-std=c99", "-O1")), snn(x).flatten())
    return snn


# ----------------------------------------------------------------- concatenation before the activation


def dense_block(net, x):
    """As a DenseNet has it: each layer reads all before it, behind a BatchNorm and an activation of its own."""
    found = [net.relu_a(net.a(x))]
    for conv, norm, act in ((net.b, net.norm_b, net.relu_b), (net.narrow_c, net.norm_c, net.relu_c)):
        found.append(conv(act(norm(torch.cat(found, 1)))))
    return net.relu_d(net.norm_d(torch.cat(found, 1)))


def dense():
    norms = {"norm_b": nn.BatchNorm2d(8), "norm_c": nn.BatchNorm2d(16), "norm_d": nn.BatchNorm2d(20)}
    return Net(dense_block, narrow_c=nn.Conv2d(16, 4, 3, padding=1), **norms)


def test_a_dense_block_has_weights_that_grow_with_its_channels(tmp_path):
    snn = exact(dense(), tmp_path)
    widths = [layer.threshold.numel() for name, layer in snn.spiking_layers.items() if name.startswith("relu_d[")]
    assert widths == [8, 8, 4]  # one layer for each current: no zeros are stored, and none is multiplied


def test_currents_that_read_alike_are_one_layer(tmp_path):
    snn = exact(Net(lambda n, x: n.relu_b(torch.cat([n.b(y := n.relu_a(n.a(x))), n.d(y)], 1))), tmp_path)
    assert list(snn.spiking_layers) == ["relu_a", "relu_b"]


# ----------------------------------------------------------------------------------- signs and scales

PER_CHANNEL = torch.tensor([1.0, -0.5, 0.25, -2.0, 0.5, 1.0, -1.0, 0.0]).reshape(8, 1, 1)


class Scale(nn.Module):
    """A learned scale for each channel, as residual branches have."""

    def __init__(self, values=PER_CHANNEL):
        super().__init__()
        self.gamma = nn.Parameter(values.clone())

    def forward(self, x):
        return self.gamma * x


def spikes_of(net, x):
    return net.relu_a(net.a(x))


ARITHMETIC = {
    "difference of layers": lambda n, x: n.relu_b(n.b(y := spikes_of(n, x)) - n.d(y)),
    "difference of spikes": lambda n, x: n.relu_b(n.b(y := spikes_of(n, x)) - y),
    "sub with alpha": lambda n, x: n.relu_b(torch.sub(n.b(y := spikes_of(n, x)), y, alpha=0.5)),
    "add with alpha": lambda n, x: n.relu_b(n.b(y := spikes_of(n, x)).add(y, alpha=-0.25)),
    "in place": lambda n, x: n.relu_b(n.b(y := spikes_of(n, x)).sub_(y).mul_(0.5)),
    "negation": lambda n, x: n.relu_b(-n.b(-spikes_of(n, x))),
    "1 - spikes": lambda n, x: n.relu_c(n.c(1 - spikes_of(n, x))),
    "a layer of a sum of chosen channels": lambda n, x: n.relu_b(
        n.half_in((y := spikes_of(n, x))[:, :4] - y[:, 4:]) + n.half_in(0.5 * (y[:, 4:] + y[:, :4]))
    ),
    "constants": lambda n, x: n.relu_b(n.b(2 * spikes_of(n, x) / 4) * torch.tensor(2.0) + 0.25),
    "scale for each channel": lambda n, x: n.relu_b(n.b(n.scale(spikes_of(n, x)))),
    "scale of a layer": lambda n, x: n.relu_b(spikes_of(n, x) + n.scale(n.b(spikes_of(n, x)))),
    "scale of chosen channels": lambda n, x: n.relu_c(n.scale(spikes_of(n, x)[:, [1, 0, 2, 2, 3, 4, 6, 7]])),
    "scale of joined": lambda n, x: n.relu_b(n.wide(torch.cat([n.b(y := spikes_of(n, x)), y], 1))),
    "learned number": lambda n, x: n.relu_b(n.number * n.b(spikes_of(n, x))),
    "learned bias": lambda n, x: n.relu_b(n.b(spikes_of(n, x)) + n.scale.gamma[None]),
    "divided by a buffer": lambda n, x: n.relu_b(n.b(spikes_of(n, x)) / n.divisor),
    "computed constant": lambda n, x: n.relu_b(n.b(spikes_of(n, x)) * (n.scale.gamma + 1).view(1, -1, 1, 1)),
    "BatchNorm of spikes before an unpadded layer": lambda n, x: n.relu_c(n.c(n.norm(spikes_of(n, x)))),
    "BatchNorm before the head": lambda n, x: n.norm(n.relu_b(n.b(spikes_of(n, x)))),
    "one channel added to all": lambda n, x: n.relu_b(n.one(y := spikes_of(n, x)) + n.b(y)),
    "all channels, without their mean": lambda n, x: n.relu_b((y := n.b(spikes_of(n, x))) - y.mean(1, keepdim=True)),
    "a sum of channels": lambda n, x: n.relu_b(n.b(y := spikes_of(n, x)) - y.sum(1, True) / 8),
    "at the output": lambda n, x: 3 - 2 * n.norm(n.c(spikes_of(n, x))),
    "value and advantage at the output": lambda n, x: (
        n.one(y := F.avg_pool2d(spikes_of(n, x), 2)) * 3 + (a := n.c(y)) - a.mean(1, keepdim=True)
    ),
}


def arithmetic(wiring):
    extra = {"scale": Scale(), "wide": Scale(torch.cat([PER_CHANNEL, PER_CHANNEL.abs()])), "norm": nn.BatchNorm2d(8)}
    extra |= {"half_in": nn.Conv2d(4, 8, 3, padding=1), "one": nn.Conv2d(8, 1, 1)}
    extra |= {"number": nn.Parameter(torch.tensor([-0.5])), "divisor": torch.full((8, 1, 1), 0.5)}
    return Net(ARITHMETIC[wiring], head="at the output" not in wiring, **extra)


@pytest.mark.parametrize("wiring", ARITHMETIC)
def test_arithmetic_between_layers(wiring, tmp_path):
    exact(arithmetic(wiring), tmp_path)


REFUSED = {
    "the size of the batch": (
        lambda n, x: n.relu_b(n.b(y := spikes_of(n, x)) / y.shape[0]),
        "size of the batch.*Remedy",
    ),
    "a constant for each pixel": (lambda n, x: n.relu_b(n.b(spikes_of(n, x)) + torch.ones(8, 6)), "Remedy: one number"),
    "a constant for each column": (lambda n, x: n.relu_b(n.b(spikes_of(n, x)) * torch.ones(6)), "Remedy: one number"),
    "maximum of negative spikes": (lambda n, x: n.relu_b(n.c(n.pool(-spikes_of(n, x)))), "maximum.*negative.*Remedy"),
    "not finite": (lambda n, x: n.relu_b(n.b(spikes_of(n, x)) / torch.zeros(1)), "not finite"),
    "mean of a flattened map": (lambda n, x: n.b(spikes_of(n, x)).flatten(1).mean(1, keepdim=True), "flattened map"),
    "mean of flattened spikes": (lambda n, x: spikes_of(n, x).flatten(1).mean(1, keepdim=True), "flattened.*Remedy"),
    "one feature for a flattened map": (
        lambda n, x: (y := spikes_of(n, x).flatten(1)) + n.single(y),
        "flattened map.*Remedy",
    ),
    "pixels of another size": (lambda n, x: n.b(y := spikes_of(n, x)) + y.mean(3, keepdim=True), "F.interpolate"),
    "one flattened channel for all": (
        lambda n, x: n.relu_b(spikes_of(n, x)[:, :1]).flatten(1) + n.flat(spikes_of(n, x).flatten(1)),
        "flattened map.*Remedy",
    ),
    "a product": (lambda n, x: n.relu_b(n.b(y := spikes_of(n, x)) * y), "multiplies two activations"),
}


@pytest.mark.parametrize("wiring", REFUSED)
def test_arithmetic_without_a_spiking_meaning_is_refused(wiring):
    made, message = REFUSED[wiring]
    with pytest.raises(qcfs_fast.ConversionError, match=message):
        qcfs_fast.convert(
            Net(made, head=False, pool=nn.MaxPool2d(2), flat=nn.Linear(384, 48), single=nn.Linear(384, 1)),
            input_shape=SHAPE,
        )


# --------------------------------------------------------------------------------- the image's values

IMAGES = {
    "divided": lambda n, x: n.relu_a(n.a(x / 0.5)),
    "to -1..1": lambda n, x: n.relu_a(n.a(x * 2 - 1)),
    "buffers": lambda n, x: n.relu_a(n.a((x - n.mean) / n.std)),
    "in place": lambda n, x: n.relu_a(n.a(x.float().sub(n.mean).div_(n.std))),
    "buffers of a batch": lambda n, x: n.relu_a(n.a((x - n.mean[None]) / n.std[None])),
    "two readers": lambda n, x: n.relu_b(n.b(n.relu_a(n.a(y := 0.5 - x))) + n.aside(y)),
    "channels": lambda n, x: n.relu_a(n.a((x / 2)[:, [2, 1, 0]])),
    "one channel": lambda n, x: n.relu_a(n.a(torch.cat([(x / 2)[:, i].unsqueeze(1) + i for i in range(3)], 1))),
    "twice": lambda n, x: n.relu_a(n.twice(torch.cat([x, x], 1) / 2)),
    "beside spikes": lambda n, x: n.relu_b(n.beside(torch.cat([x * 0.5, spikes_of(n, x * 0.5)], 1))),
    "beside spikes, without a layer": lambda n, x: n.relu_f(torch.cat([spikes_of(n, x), x], 1)),
    "added to spikes beside it": lambda n, x: n.relu_f(
        torch.cat([x, y := spikes_of(n, x)], 1) * 0.5 + torch.cat([n.b(y), n.b(y)[:, :3]], 1)
    ),
    "a channel twice": lambda n, x: n.relu_b(n.twice(torch.cat([x[:, :1], x, x[:, 1:]], 1))),
    "twice, and cut": lambda n, x: n.relu_a(n.a(torch.cat([x, x * 2], 1)[:, :3])),
    "reversed, and cut": lambda n, x: n.relu_a(n.a(torch.cat([x[:, 1:], x[:, :1]], 1)[:, [1, 0, 0]])),
    "flattened": lambda n, x: n.relu_e(n.flat((x - n.mean).div(n.std).flatten(1))),
    "flattened, with a number for each feature": lambda n, x: n.relu_e(
        n.flat(n.each(((x - n.mean) / n.std).flatten(1)))
    ),
    "flattened, with an activation for each": lambda n, x: n.relu_f(n.each(x.flatten(1))),
    "a flattened map with a number for each feature": lambda n, x: n.relu_e(
        n.flat_map(n.each_of_map(F.avg_pool2d(spikes_of(n, x), 2).flatten(1)))
    ),
    "a flattened layer with a number for each feature": lambda n, x: n.relu_e(
        n.flat_map(n.relu_f(n.each_of_map(F.avg_pool2d(n.b(spikes_of(n, x)), 2).flatten(1))))
    ),
}


def image(wiring):
    extra = {"aside": nn.Conv2d(3, 8, 1), "twice": nn.Conv2d(6, 8, 3, padding=1)}
    extra |= {
        "each": nn.BatchNorm1d(144).eval(),
        "each_of_map": nn.BatchNorm1d(96).eval(),
        "flat_map": nn.Linear(96, 8),
    }
    extra |= {"flat": nn.Linear(144, 8), "relu_e": QCFS(4), "relu_f": QCFS(4), "beside": nn.Conv2d(11, 8, 3, padding=1)}
    numbers = {"mean": [0.5, -0.25, 1.0], "std": [0.5, 2.0, 0.25]}
    extra |= {name: torch.tensor(v).reshape(3, 1, 1) for name, v in numbers.items()}
    return Net(IMAGES[wiring], **extra)


VECTORS = {  # features of linear layers, and images that are vectors
    "some features of a layer": lambda n, x: n.relu_b(n.l(x)[:, 1:9]),
    "some features of spikes": lambda n, x: n.relu_b(n.m(n.relu_a(n.l(x))[:, [7, 1, 0, 1, 2, 3, 4, 6]])),
    "halves, without a layer": lambda n, x: n.relu_b((y := n.relu_a(n.l(x)))[:, :8] - 0.5 * y.narrow(1, 8, 8)),
    "a feature at the output": lambda n, x: n.relu_a(n.l(x))[:, 2:5],
    "layers side by side": lambda n, x: n.relu_b(torch.cat([n.l(x), n.o(x)], 1)),
    "a layer beside its spikes": lambda n, x: n.relu_b(torch.cat([y := n.relu_a(n.o(x)), n.m(y)], -1)),
    "heads side by side": lambda n, x: torch.cat([n.m(y := n.relu_a(n.o(x))), n.m(-y)], 1),
    "spikes beside the image": lambda n, x: n.relu_b(n.p(torch.cat([n.relu_a(n.o(x)), x], 1))),
    "the image normalised": lambda n, x: n.relu_a(n.l((x - n.mean) / n.std)),
    "BatchNorm of the image": lambda n, x: n.relu_a(n.l(n.norm(x))),
    "flattened as it is": lambda n, x: n.relu_a(n.l(torch.flatten(x, 1))),
    "some features of the image": lambda n, x: n.relu_a(n.m(x[:, 3:11])),
}


@pytest.mark.parametrize("wiring", VECTORS)
def test_vectors(wiring, tmp_path):
    extra = {"l": nn.Linear(12, 16), "m": nn.Linear(8, 8), "o": nn.Linear(12, 8), "p": nn.Linear(20, 8)}
    extra |= {
        "norm": nn.BatchNorm1d(12).eval(),
        "mean": torch.arange(12) / 16,
        "std": 2.0 ** (torch.arange(12) % 3 - 1),
    }
    net = Net(
        VECTORS[wiring], shape=(12,), head=wiring not in ("a feature at the output", "heads side by side"), **extra
    )
    exact(net, tmp_path, shape=(12,))


FEATURES = {
    "a mean of a layer": lambda n, x: n.out(n.b(spikes_of(n, x)).mean((2, 3))),
    "a mean of laid pixels": lambda n, x: n.out(n.b(spikes_of(n, x)).flatten(2).mean(2)),
    "means side by side": lambda n, x: n.norm_16(
        torch.cat([n.b(y := spikes_of(n, x)).mean((2, 3)), n.d(y).sum((2, 3))], 1)
    ),
    "some means": lambda n, x: n.relu_b(n.b(spikes_of(n, x)).sum((2, 3))[:, 2:6]),
    "some of a flattened layer": lambda n, x: n.relu_b(n.map(n.b(spikes_of(n, x)).flatten(1))[:, 1:]),
    "the image beside spikes, flattened": lambda n, x: n.relu_f(torch.cat([spikes_of(n, x), x], 1).flatten(1)),
    "a layer of that": lambda n, x: n.relu_f(n.both(torch.cat([spikes_of(n, x), x], 1).flatten(1))),
    "BatchNorm of the image, flattened": lambda n, x: n.relu_f(n.flat(n.norm(x).flatten(1))),
}


@pytest.mark.parametrize("wiring", FEATURES)
def test_maps_that_become_vectors(wiring, tmp_path):
    extra = {"out": nn.Linear(8, 5), "map": nn.Linear(384, 8), "both": nn.Linear(11 * 48, 8), "flat": nn.Linear(144, 8)}
    extra |= {"norm": nn.BatchNorm2d(3), "norm_16": nn.BatchNorm1d(16), "relu_f": QCFS(4)}
    exact(Net(FEATURES[wiring], head=False, **extra), tmp_path)


MOVED_IMAGES = {
    "zeros": lambda n, x: n.relu_a(n.a(F.pad(x, (0, 1, 2, 0)))),
    "zeros of a normalised image": lambda n, x: n.relu_a(n.a(F.pad((x - n.mean) / n.std, (0, 1, 0, 1)))),
    "reflected": lambda n, x: n.relu_a(n.a(F.pad(x, (1, 2, 3, 0), mode="reflect") - n.mean)),
    "circular": lambda n, x: n.relu_a(n.round(x)),
    "circular, and cropped": lambda n, x: n.relu_a(n.a(F.pad(x, (-1, 2, 3, -1), mode="circular"))),
    "of several channels": lambda n, x: n.relu_a(n.a(F.pad(torch.cat([x[:, :1], x[:, 1:] * 2], 1), (1, 1, 1, 1)))),
    "grey": lambda n, x: n.relu_a(n.grey(x.mean(1, keepdim=True) * 3)),
    "replicated, twice": lambda n, x: n.relu_a(n.a(n.replicate(F.pad(x, (0, 0, 1, 1), mode="replicate")))),
    "cropped": lambda n, x: n.relu_a(n.a(x[:, :, 1:-2, 2:])),
    "cropped by a negative pad": lambda n, x: n.relu_a(n.a(F.pad(x, (-1, 2, 0, -3)))),
    "every second pixel": lambda n, x: n.relu_a(n.a(x[:, [2, 0, 1], ::2, 1::2])),
    "enlarged": lambda n, x: n.relu_a(n.a(F.interpolate(x, scale_factor=2))),
    "enlarged, bilinear": lambda n, x: n.relu_a(n.unpadded(F.interpolate(x, scale_factor=2, mode="bilinear"))),
}


@pytest.mark.parametrize("wiring", MOVED_IMAGES)
def test_the_image_is_padded_cropped_or_enlarged_by_the_model(wiring, tmp_path):
    extra = {"round": nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), "unpadded": nn.Conv2d(3, 8, 3, 2)}
    extra["grey"] = nn.Conv2d(1, 8, 3, padding=1)
    numbers = {"mean": [0.5, -0.25, 1.0], "std": [0.5, 2.0, 0.25]}
    extra |= {name: torch.tensor(v).reshape(3, 1, 1) for name, v in numbers.items()}
    net = Net(MOVED_IMAGES[wiring], replicate=nn.ReplicationPad2d((1, 0, 0, 2)), **extra)
    snn = exact(net, tmp_path, c=False)
    if wiring != "grey":
        with pytest.raises(ValueError, match="pads, crops or enlarges the image"):
            integer_program(snn, SHAPE)
    frames = torch.stack([networks.images(SHAPE, 2, seed=s, grid=64) for s in (6, 7, 8)])  # an image for each step
    for answer in (snn(frames), snn.run(frames)[-1]):
        torch.testing.assert_close(answer, qcfs_fast.simulate(net, frames, 3)[-1].float(), rtol=2e-7, atol=1e-7)


def test_a_moved_image_leaves_nothing_behind():
    """As a cache of tensors would under a fake mode, for every later image of that size."""
    snn = qcfs_fast.convert(
        networks.on_grid(Net(MOVED_IMAGES["reflected"], mean=torch.zeros(3, 1, 1))), input_shape=SHAPE
    )
    x = networks.images(SHAPE, 2)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert snn.run(fake.from_tensor(x)).shape == (1, 2, 5)
    assert torch.equal(snn.run(x, watch=lambda *a: None)[-1], snn(x))


def test_an_image_with_a_border_of_zeros_is_normalised_before_it():
    for move in (lambda x: F.pad(x, (1, 1)) - 0.5, lambda x: F.pad(x, (1, 1)).flatten(1)[:, 1:]):
        with pytest.raises(qcfs_fast.ConversionError, match="Remedy"):
            qcfs_fast.convert(Net(lambda n, x, move=move: n.relu_a(n.a(move(x))), head=False), input_shape=SHAPE)
    other = Net(lambda n, x: n.relu_a(n.a(F.pad(x, (1, 1, 1, 1)))[:, :, 1:-1, 1:-1] + n.d(x)), head=False)
    other.d = nn.Conv2d(3, 8, 3, padding=1)
    with pytest.raises(qcfs_fast.ConversionError, match="another normalisation, border or channel order"):
        qcfs_fast.convert(other, input_shape=SHAPE)


@pytest.mark.parametrize("wiring", IMAGES)
def test_the_image_is_normalised_by_the_model(wiring, tmp_path):
    exact(image(wiring), tmp_path)


def test_a_flattened_map_of_many_features_is_told_the_way():
    net = Net(
        lambda n, x: n.norm(n.relu_a(n.a(x)).flatten(1)), norm=nn.BatchNorm1d(8 * 32 * 32).eval(), shape=(3, 32, 32)
    )
    with pytest.raises(qcfs_fast.ConversionError, match=r"norm: has a number for each of 8192 features.*Remedy"):
        qcfs_fast.convert(net.eval(), input_shape=(3, 32, 32))


def test_bytes_are_images_where_the_model_scales_them(tmp_path):
    net = networks.on_grid(Net(lambda n, x: n.relu_a(n.a((x / 256 - n.mean) * 4)), mean=torch.full((3, 1, 1), 0.25)))
    snn = qcfs_fast.convert(net, T=5, input_shape=SHAPE)
    x = torch.randint(0, 256, (3, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    meaning = qcfs_fast.simulate(net, x, 5, spikes=True)
    assert torch.equal(qcfs_fast.trace(snn, x)["relu_a"], meaning.spikes["relu_a"])
    assert 0.05 < meaning.spikes["relu_a"].float().mean() < 0.95
    snn.save(tmp_path / "snn.safetensors")
    for network in (snn, qcfs_fast.load(tmp_path / "snn.safetensors")):
        assert torch.equal(network(x), snn(x.float()))
        assert torch.equal(network.run(x), snn.run(x.float()))


def test_torchvisions_normalize_is_part_of_a_model(tmp_path):
    assert torchvision_models.models  # torchvision can be imported then
    norm = importlib.import_module("torchvision.transforms").Normalize([0.5, 0.25, 0.0], [0.5, 2.0, 1.0])
    exact(Net(lambda n, x: n.relu_a(n.a(n.norm(x))), norm=norm), tmp_path)


# ----------------------------------------------------------------------------------- pixels that move

SPATIAL = {
    "pad": lambda n, x: n.relu_b(n.b(F.pad(spikes_of(n, x), (1, 1, 1, 1)))),
    "uneven pad": lambda n, x: n.relu_b(n.b(F.pad(spikes_of(n, x), (0, 1, 2, 0)))),
    "far pad": lambda n, x: n.relu_b(n.c(F.pad(spikes_of(n, x), (0, 3, 0, 0))) + 0.25),
    "ZeroPad2d": lambda n, x: n.relu_b(n.b(n.zero_pad(spikes_of(n, x)))),
    "pad and average": lambda n, x: n.relu_b(n.b(F.avg_pool2d(F.pad(spikes_of(n, x), (1, 1)), 2))),
    "negative pad": lambda n, x: n.relu_b(n.b(F.pad(spikes_of(n, x), (-1, 1, 0, -2)))),
    "channels padded": lambda n, x: n.relu_b(
        F.pad(n.narrow(y := spikes_of(n, x)), (0, 0, 0, 0, 1, 4)) + F.pad(y[:, 1:-1], (0, 0, 0, 0, 0, 2))
    ),
    "shortcut A": lambda n, x: n.relu_b(
        n.strided(y := spikes_of(n, x)) + F.pad(y[:, ::2, ::2, ::2], (0, 0, 0, 0, 2, 2))
    ),
    "crop": lambda n, x: n.relu_b(n.b(spikes_of(n, x)[:, :, 1:-2, 2:])),
    "crop of channels and pixels": lambda n, x: n.relu_b(n.narrow_in(spikes_of(n, x)[:, 2:5, 1:-1])),
    "every second pixel": lambda n, x: n.relu_b(n.b(spikes_of(n, x)[:, :, 1::2, ::2])),
    "crop of averages": lambda n, x: n.relu_b(n.b(F.avg_pool2d(spikes_of(n, x), 2)[:, :, 1:, :-1])),
    "crop of a pointwise layer": lambda n, x: n.relu_b(n.c(spikes_of(n, x))[:, :, 1:]),
    "nearest": lambda n, x: n.relu_b(n.b(F.interpolate(spikes_of(n, x), scale_factor=2))),
    "nearest, by two factors": lambda n, x: n.relu_b(n.b(F.interpolate(spikes_of(n, x), scale_factor=(1, 3)))),
    "nearest of averages": lambda n, x: n.relu_b(n.b(F.interpolate(F.avg_pool2d(spikes_of(n, x), 2), scale_factor=2))),
    "Upsample": lambda n, x: n.relu_b(n.b(n.up(spikes_of(n, x)))),
    "to the size of another": lambda n, x: n.relu_b(
        (y := spikes_of(n, x)) + F.interpolate(n.relu_c(n.c(F.avg_pool2d(y, 2))), size=y.shape[-2:], mode="nearest")
    ),
    "of a pointwise sum": lambda n, x: n.relu_b(
        n.c(y := spikes_of(n, x)) + F.interpolate(n.c(F.avg_pool2d(y, 2)), scale_factor=2)
    ),
    "and pooled to the maximum": lambda n, x: n.relu_b(n.b(F.max_pool2d(n.up(spikes_of(n, x))[:, :, 1:], 2))),
    "PixelShuffle": lambda n, x: n.relu_b(n.after(n.shuffle(spikes_of(n, x)))),
    "pixel_shuffle before an activation": lambda n, x: n.relu_b(F.pixel_shuffle(spikes_of(n, x), 2) + 0.25),
    "PixelShuffle, BatchNorm and a layer": lambda n, x: n.relu_b(n.mix(n.two(n.shuffle(spikes_of(n, x))))),
    "PixelUnshuffle": lambda n, x: n.relu_b(n.unshuffled(n.unshuffle(spikes_of(n, x)))),
    "slices of phases": lambda n, x: n.relu_b(
        n.unshuffled(torch.cat([y[:, :, i::2, j::2] for y in [spikes_of(n, x)] for i in (0, 1) for j in (0, 1)], 1))
    ),
    "ConvTranspose2d": lambda n, x: n.relu_b(n.transposed(spikes_of(n, x))),
    "ConvTranspose2d, 2x2": lambda n, x: n.relu_b(n.transposed_2(spikes_of(n, x))),
    "ConvTranspose2d, groups": lambda n, x: n.relu_b(n.transposed_g(spikes_of(n, x))),
    "ConvTranspose2d, stride 1": lambda n, x: n.relu_b(n.transposed_1(spikes_of(n, x))),
    "ConvTranspose2d of averages": lambda n, x: n.relu_b(n.transposed(F.avg_pool2d(spikes_of(n, x), 2))),
    "a replicated border": lambda n, x: n.relu_b(n.b(F.pad(spikes_of(n, x), (1, 2, 0, 3), "replicate"))),
    "a wide replicated border": lambda n, x: n.relu_b(n.b(F.pad(spikes_of(n, x), (9, 0, 0, 0), "replicate"))),
    "a reflected border": lambda n, x: n.relu_b(n.b(n.mirror(spikes_of(n, x)))),
    "a circular border and a crop": lambda n, x: n.relu_b(n.b(F.pad(spikes_of(n, x), (2, -1, -1, 3), "circular"))),
    "a circular border": lambda n, x: n.relu_b(n.b(F.pad(spikes_of(n, x), (6, 1, 0, 8), "circular"))),
    "a layer with a border of pixels": lambda n, x: n.relu_b(n.bordered(spikes_of(n, x))),
    "a border of averages": lambda n, x: n.relu_b(
        n.b(F.pad(F.avg_pool2d(spikes_of(n, x), 2), (1, 1, 1, 1), "reflect"))
    ),
    "a border of a pointwise layer": lambda n, x: n.relu_b(n.b(F.pad(n.c(spikes_of(n, x)), (1, 1, 1, 1), "reflect"))),
    "bilinear": lambda n, x: n.relu_b(n.b(F.interpolate(spikes_of(n, x), scale_factor=2, mode="bilinear"))),
    "bilinear, by 4 and 1": lambda n, x: n.relu_b(n.b(n.linear_up(spikes_of(n, x)))),
    "bilinear, to the size of another": lambda n, x: n.relu_b(
        n.wide(torch.cat([y := spikes_of(n, x), F.interpolate(n.smaller(y), size=y.shape[-2:], mode="bilinear")], 1))
    ),
    "to the size of another, a layer, and beside it": lambda n, x: n.relu_b(
        n.wide(torch.cat([y := spikes_of(n, x), n.relu_d(n.d(F.interpolate(n.smaller(y), size=y.shape[-2:])))], 1))
    ),
    "bilinear of a pointwise layer": lambda n, x: n.relu_b(
        n.b(F.interpolate(n.c(spikes_of(n, x)), scale_factor=2, mode="bilinear", align_corners=False))
    ),
    "out of ConvTranspose2d": lambda n, x: n.transposed(spikes_of(n, x)),
    "out of nearest": lambda n, x: n.c(n.up(spikes_of(n, x))),
    "out of a crop": lambda n, x: n.b(F.avg_pool2d(spikes_of(n, x)[:, :, 2:], 2, 1)),
}


def spatial(wiring):
    extra = {
        "zero_pad": nn.ZeroPad2d((0, 1, 0, 1)), "narrow": nn.Conv2d(8, 3, 1), "narrow_in": nn.Conv2d(3, 8, 3),
        "strided": nn.Conv2d(8, 8, 3, 2, 1), "up": nn.Upsample(scale_factor=2), "shuffle": nn.PixelShuffle(2),
        "after": nn.Conv2d(2, 8, 3, padding=1), "two": nn.BatchNorm2d(2), "mix": nn.Conv2d(2, 8, 1),
        "unshuffle": nn.PixelUnshuffle(2), "unshuffled": nn.Conv2d(32, 8, 1),
        "transposed": nn.ConvTranspose2d(8, 6, 3, 2, 1, 1), "transposed_2": nn.ConvTranspose2d(8, 4, 2, 2),
        "transposed_g": nn.ConvTranspose2d(8, 4, (3, 4), (1, 2), (0, 1), groups=2, dilation=(2, 1)),
        "transposed_1": nn.ConvTranspose2d(8, 4, 3, padding=2), "mirror": nn.ReflectionPad2d((2, 1, 3, 0)),
        "bordered": nn.Conv2d(8, 8, 3, 2, (1, 2), padding_mode="reflect"), "wide": nn.Conv2d(16, 8, 3, padding=1),
        "linear_up": nn.Upsample(scale_factor=(4, 1), mode="bilinear"),
        "smaller": nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), QCFS(4)),
    }  # fmt: skip
    return Net(SPATIAL[wiring], head=not wiring.startswith("out of"), **extra)


@pytest.mark.parametrize("wiring", SPATIAL)
def test_pixels_are_moved(wiring, tmp_path):
    net = spatial(wiring)
    snn = exact(net, tmp_path)
    # At another size it is the same network, and in all modes it is that of the reference.
    for mode in ("signed", "offset", "sum"):
        snn.neuron = mode
        x = networks.images(SHAPE, 2, seed=5, grid=64)
        meaning = qcfs_fast.simulate(net, x, 4, neuron=mode)[-1]
        torch.testing.assert_close(snn(x, 4), meaning.float(), rtol=2e-7, atol=1e-7)


# ------------------------------------------------------------ layers that become one, borders included

COMPOSED = {
    "pointwise, then padded": lambda n, x: n.relu_b(n.b(n.c(spikes_of(n, x)))),
    "pointwise with a stride, then padded": lambda n, x: n.relu_b(n.b(n.strided(spikes_of(n, x)))),
    "pointwise, then depthwise": lambda n, x: n.relu_b(n.depthwise(n.c(spikes_of(n, x)))),
    "a constant before padding": lambda n, x: n.relu_b(n.b(spikes_of(n, x) + 1)),
    "BatchNorm before a padded layer": lambda n, x: n.relu_b(n.depthwise(n.norm(spikes_of(n, x)))),
    "BatchNorm of averages before a padded layer": lambda n, x: n.relu_b(n.b(n.norm(F.avg_pool2d(spikes_of(n, x), 2)))),
    "BatchNorm, then a pool": lambda n, x: n.relu_b(n.c(F.avg_pool2d(n.norm(spikes_of(n, x)), 2))),
    "a constant before a pad": lambda n, x: n.relu_b(n.c(F.pad(n.c(spikes_of(n, x)), (1, 0, 0, 2)))),
    "a constant of spikes before a pad": lambda n, x: n.relu_b(n.c(F.pad(spikes_of(n, x) + 1, (1, 0, 0, 2)))),
    "a constant before a padded pool": lambda n, x: n.relu_b(F.avg_pool2d(n.c(spikes_of(n, x)), 2, 1, 1)),
    "a constant before PixelShuffle": lambda n, x: n.relu_c(n.shuffle(n.c(spikes_of(n, x)))),
    "rows, then columns": lambda n, x: n.relu_b(n.columns(n.rows(spikes_of(n, x)))),
    "padded, then not": lambda n, x: n.relu_b(n.inside(n.b(spikes_of(n, x)))),
    "three layers": lambda n, x: n.relu_b(n.c(n.inside(n.b(spikes_of(n, x))))),
    "a layer's average": lambda n, x: n.relu_b(F.avg_pool2d(n.b(spikes_of(n, x)), 2)),
    "average and depthwise": lambda n, x: n.relu_b(F.avg_pool2d(n.depthwise(spikes_of(n, x)), (1, 2), 1)),
    "every second pixel of a layer": lambda n, x: n.relu_b(n.b(spikes_of(n, x))[:, :, ::2, ::2]),
    "a pool of one pixel": lambda n, x: n.relu_b(F.max_pool2d(n.b(spikes_of(n, x)), 1, 2)),
    "a sum of pixels and layers": lambda n, x: n.relu_b(n.b(n.c(y := spikes_of(n, x)) + F.max_pool2d(n.up(y), 2, 2))),
    "pooled image": lambda n, x: n.relu_a(n.first(F.avg_pool2d(x, 2))),
    "pooled image, normalised": lambda n, x: n.relu_a(n.first(F.avg_pool2d((x - 0.5) * 2, 2, 1))),
    "pooled image alone": lambda n, x: n.relu_b(F.avg_pool2d(x, 2)),
    "two layers of the image": lambda n, x: n.relu_b(n.b(n.aside(x))),
    "a transposed layer, then padded": lambda n, x: n.relu_b(n.d(n.transposed(spikes_of(n, x)))),
    "a transposed layer beside others": lambda n, x: n.relu_b(
        n.joined(torch.cat([y := spikes_of(n, x), n.transposed(n.relu_c(n.c(F.avg_pool2d(y, 2))))], 1))
    ),
    "two padded layers": lambda n, x: n.relu_b(n.d(n.b(spikes_of(n, x)))),
    "two padded layers with strides": lambda n, x: n.relu_b(n.depthwise(n.depthwise_8(spikes_of(n, x)))),
    "rows, then both": lambda n, x: n.relu_b(n.d(n.rows(spikes_of(n, x)))),
    "padded layers and averages": lambda n, x: n.relu_b(
        n.d(F.avg_pool2d(n.b(F.avg_pool2d(spikes_of(n, x), 2)), 2, 1, 1))
    ),
    "an uneven average of a layer": lambda n, x: n.relu_b(F.adaptive_avg_pool2d(n.b(spikes_of(n, x)), (4, 3))),
    "a layer's border": lambda n, x: n.relu_b(n.d(F.pad(n.b(spikes_of(n, x)), (1, 0, 2, 0)))),
    "a reflected border of a layer": lambda n, x: n.relu_b(n.c(F.pad(n.b(spikes_of(n, x)), (1, 1, 1, 1), "reflect"))),
    "a crop of a layer": lambda n, x: n.relu_b(n.b(spikes_of(n, x))[:, :, 1:]),
    "nearest pixels of a layer": lambda n, x: n.relu_b(n.d(F.interpolate(n.b(spikes_of(n, x)), scale_factor=(2, 3)))),
    "nearest pixels of a strided layer": lambda n, x: n.relu_b(F.interpolate(n.depthwise_8(spikes_of(n, x)), None, 2)),
    "bilinear pixels of a layer": lambda n, x: n.relu_b(
        n.c(F.interpolate(n.b(spikes_of(n, x)), scale_factor=2, mode="bilinear"))
    ),
    "PixelShuffle of a layer": lambda n, x: n.relu_b(n.after(n.shuffle(n.b(spikes_of(n, x))))),
    "PixelShuffle of an unpadded layer": lambda n, x: n.relu_c(n.shuffle(n.holes(spikes_of(n, x)))),
    "out of PixelShuffle of a layer": lambda n, x: n.shuffle(n.b(spikes_of(n, x))),
    "a layer of the image whose border is whole, then padded": lambda n, x: n.relu_b(n.b(n.whole(x))),
    "flattened before its activation": lambda n, x: n.less_f(n.relu_b(n.b(spikes_of(n, x)).flatten(1))),
    "a flattened layer": lambda n, x: n.relu_b(n.flat(n.b(spikes_of(n, x)).flatten(1))),
    "a flattened average of a strided layer": lambda n, x: n.relu_b(
        n.less(F.avg_pool2d(n.depthwise_8(spikes_of(n, x)), 2).view(-1, 48))
    ),
    "out of two layers": lambda n, x: n.b(n.c(spikes_of(n, x))),
    "out of a BatchNorm and a layer": lambda n, x: n.b(n.norm(spikes_of(n, x))),
}


@pytest.mark.parametrize("wiring", COMPOSED)
def test_layers_without_an_activation_between_are_one(wiring, tmp_path):
    extra = {
        "inside": nn.Conv2d(8, 8, 3, 2, dilation=(1, 2)), "rows": nn.Conv2d(8, 8, (3, 1), (2, 1), (1, 0)),
        "columns": nn.Conv2d(8, 8, (1, 3), 1, (0, 2), (1, 2)), "depthwise": nn.Conv2d(8, 16, 3, 2, 1, groups=8),
        "first": nn.Conv2d(3, 8, 2), "aside": nn.Conv2d(3, 8, 1), "strided": nn.Conv2d(8, 8, 1, (2, 1)),
        "norm": nn.BatchNorm2d(8), "up": nn.Upsample(scale_factor=2), "shuffle": nn.PixelShuffle(2),
        "transposed": nn.ConvTranspose2d(8, 8, 2, 2), "joined": nn.Conv2d(16, 8, 3, padding=1),
        "depthwise_8": nn.Conv2d(8, 8, 3, (2, 1), 1, groups=8), "after": nn.Conv2d(2, 8, 3, padding=1),
        "holes": nn.Conv2d(8, 8, (1, 3), dilation=(1, 2)), "whole": nn.Conv2d(3, 8, 3, padding=2, bias=False),
        "flat": nn.Linear(384, 8), "less": nn.Linear(48, 8), "less_f": nn.Linear(384, 8),
    }  # fmt: skip
    net = Net(COMPOSED[wiring], head=not wiring.startswith("out of"), **extra)
    snn = exact(net, tmp_path)
    if wiring == "PixelShuffle of a layer":  # nine taps of four phases
        with pytest.raises(ValueError, match="more than 32 inputs"):
            snn.neuron = "signed"
        return
    for mode in ("signed", "offset", "masked", "sum"):
        snn.neuron = mode
        x = networks.images(SHAPE, 2, seed=5, grid=64)
        meaning = qcfs_fast.simulate(net, x, 4, neuron=mode)[-1]
        torch.testing.assert_close(snn(x, 4), meaning.float(), rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_what_is_enlarged_of_one_pixel_stands_everywhere(mode):
    def wiring(n, x):
        y = spikes_of(n, x)
        whole = n.relu_c(n.c(F.adaptive_avg_pool2d(y, 1)))
        return n.relu_b(n.joined(torch.cat([y, F.interpolate(whole, size=y.shape[-2:], mode=mode)], 1)))

    shape = (3, 24, 20)
    net = networks.randomize(Net(wiring, shape=shape, joined=nn.Conv2d(16, 8, 3, padding=1)))  # 480 pixels: no ties
    snn = qcfs_fast.convert(net, T=4, input_shape=shape)
    found = layer_differences(net, snn, networks.images(shape, 2), 4)
    assert sum(d.differing for d in found.values()) <= 1e-4 * sum(d.compared for d in found.values())
    assert max(len(layer.inputs) for layer in snn.spiking_layers.values()) == 2


def test_a_bias_that_is_padded_is_carried_by_neurons_that_always_fire(tmp_path):
    snn = exact(Net(lambda n, x: n.relu_b(n.b(n.c(y := spikes_of(n, x))) + n.d(n.c(y)))), tmp_path)
    assert [name for name in snn.spiking_layers if is_constant(name)] == ["relu_a[constant 0]"]
    assert [len(layer.inputs) for layer in snn.spiking_layers.values()] == [1, 1, 2]


REFUSED_PIXELS = {
    "corners": (
        lambda n, x: n.relu_b(n.b(F.interpolate(spikes_of(n, x), scale_factor=2, mode="bilinear", align_corners=True))),
        "without align_corners",
    ),
    "bicubic": (
        lambda n, x: n.relu_b(n.b(F.interpolate(spikes_of(n, x), scale_factor=2, mode="bicubic"))),
        "bilinear ones",
    ),
    "to a size": (lambda n, x: n.relu_b(n.b(F.interpolate(spikes_of(n, x), size=(16, 12)))), "scale_factor"),
    "by one and a half": (lambda n, x: n.relu_b(n.b(F.interpolate(spikes_of(n, x), scale_factor=1.5))), "whole factor"),
    "pads of channels": (
        lambda n, x: n.relu_b(n.b(F.pad(spikes_of(n, x), (1, 1, 1, 1, 1, 1), "circular")[:, :8])),
        "pads the channels.*torch.cat",
    ),
    "enlarged to the size of another, and beside none": (
        lambda n, x: n.relu_b(
            n.b(F.interpolate(F.avg_pool2d(y := spikes_of(n, x), 2), size=y.shape[-2:], mode="bilinear"))
        ),
        "beside none.*Remedy: scale_factor",
    ),
    "padded to the size of another, and beside none": (
        lambda n, x: n.relu_b(n.b(F.pad((y := spikes_of(n, x))[:, :, 1:], (0, 0, y.size(2) - 7, 0), "replicate"))),
        "beside none.*Remedy: pad by numbers",
    ),
    "a border of a normalised image": (
        lambda n, x: n.relu_a(n.a(F.pad(n.norm(x), (1, 1, 1, 1)))),
        "image behind a BatchNorm.*Remedy",
    ),
    "bicubic of what happens to be one pixel": (
        lambda n, x: n.relu_b(
            n.c(F.interpolate(F.max_pool2d(spikes_of(n, x), (8, 6)), scale_factor=2, mode="bicubic"))
        ),
        "bilinear ones",
    ),
    "ones": (lambda n, x: n.relu_b(n.b(F.pad(spikes_of(n, x), (1, 1, 1, 1), value=1.0))), "pad with zeros"),
    "a place from the other border": (lambda n, x: n.relu_b(n.b(spikes_of(n, x)[:, :, :4])), "from the same border"),
    "the last five rows": (lambda n, x: n.relu_b(n.b(spikes_of(n, x)[..., -5:, :])), "from the same border"),
    "a pool of spikes and the image": (
        lambda n, x: n.relu_b(n.c(F.avg_pool2d(torch.cat([n.relu_a(n.a(x)), x], 1), 2)[:, :8])),
        "concatenation with the image.*Remedy",
    ),
    "a border of a layer of the image": (lambda n, x: n.relu_b(n.b(n.a(x))), "no activation in between"),
    "cut by more than it adds": (lambda n, x: n.relu_b(n.cut(spikes_of(n, x))), "less padding"),
}


@pytest.mark.parametrize("wiring", REFUSED_PIXELS)
def test_what_moves_pixels_otherwise_is_refused(wiring):
    made, message = REFUSED_PIXELS[wiring]
    with pytest.raises(qcfs_fast.ConversionError, match=message):
        qcfs_fast.convert(
            Net(made, head=False, cut=nn.ConvTranspose2d(8, 8, 2, 2, 2), norm=nn.BatchNorm2d(3)), input_shape=SHAPE
        )


@pytest.mark.parametrize("move", [nn.PixelShuffle(2), nn.Upsample(scale_factor=2), nn.PixelUnshuffle(2)])
def test_what_moves_pixels_before_an_activation_is_prepared_behind_it(move):
    width = move(torch.zeros(1, 8, 2, 2)).shape[1]
    layers = [nn.Conv2d(3, 8, 3, padding=1), move, nn.ReLU(), nn.Conv2d(width, 4, 3, padding=1), nn.ReLU()]
    model = networks.randomize(nn.Sequential(*layers, nn.Conv2d(4, 5, 1)))
    x = networks.images((3, 8, 8))
    prepared = qcfs_fast.prepare(model, levels=255)
    qcfs_fast.calibrate(prepared, [x], progress=False)
    with torch.no_grad():
        torch.testing.assert_close(prepared(x), model(x), rtol=0.1, atol=0.1)
    snn = qcfs_fast.convert(prepared)
    assert snn(x).shape == model(x).shape
