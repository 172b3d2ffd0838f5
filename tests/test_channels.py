"""Channels cut, chosen and shuffled, of spikes, of currents and of the image: exact on a grid, or refused."""

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcfs_fast
from qcfs_fast import QCFS, ConversionError

pytestmark = pytest.mark.filterwarnings("ignore:convert. no threshold")
SHAPE = (3, 8, 6)


def shuffled(y, groups=2):
    n, c, h, w = y.size()
    return y.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, -1 if groups == 4 else c, h, w)


def permuted(y):
    n, c, h, w = y.shape
    return y.reshape(n, 2, 2, c // 4, h, w).permute(0, 3, 1, 2, 4, 5).flatten(1, 3)


SPELLINGS = {
    "shuffle": shuffled,
    "shuffle by four, view(-1)": lambda y: shuffled(y, 4),
    "permuted": permuted,
    "ChannelShuffle": nn.ChannelShuffle(4),
    "F.channel_shuffle": lambda y: F.channel_shuffle(y, 2),
    "chunk": lambda y: torch.cat(y.chunk(3, 1)[::-1], 1),
    "split": lambda y: torch.cat(torch.split(y, [3, 4, 1], dim=1)[1:], 1),
    "split by size": lambda y: y.split(3, dim=1)[2],
    "slice": lambda y: y[:, 1:7:2],
    "slice of maps": lambda y: y[:, :-1, :, :],
    "list": lambda y: y[:, [5, 0, 0, 2]],
    "index_select": lambda y: y.index_select(1, torch.tensor([7, 1, 3])),
    "twice": lambda y: shuffled(y[:, 2:])[:, 1:5],
}


class Net(nn.Module):
    """`spelling` of eight channels, at one place of a network; `width` channels are left."""

    def __init__(self, spelling, place, width):
        super().__init__()
        self.spelling, self.place = spelling, place
        self.a, self.aside = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.act_a, self.act_b, self.act_aside = QCFS(4), QCFS(4), QCFS(4)
        self.b = nn.Conv2d(width + 3 * (place == "concatenation"), 5, 3, padding=1)
        if place == "grouped":
            self.b = nn.Conv2d(width, 2 * width, 3, padding=1, groups=width)
        if place == "flattened":
            self.b = nn.Linear(width * 48, 5)
        self.short = nn.Conv2d(8, width, 1)

    def forward(self, x):
        y = self.a(x)
        if self.place == "current":
            return self.b(self.act_a(self.spelling(y)))
        if self.place == "current with residual":
            y = self.act_a(y)
            return self.b(self.act_b(self.spelling(y + self.act_aside(y))))
        y = self.act_a(y)
        z = self.spelling(y)
        if self.place == "output":
            return z
        if self.place == "residual":
            return self.b(self.act_b(self.short(y) + z))
        if self.place == "pooled":
            z = F.avg_pool2d(z, 2)
        if self.place == "scaled":
            z = z * 0.5
        if self.place == "concatenation":
            z = torch.cat([self.act_aside(self.aside(x)), z], 1)
        if self.place == "flattened":
            z = z.flatten(1)
        return self.act_b(self.b(z))


PLACES = [
    "spikes", "pooled", "scaled", "concatenation", "grouped", "residual", "current", "current with residual",
    "flattened", "output",
]  # fmt: skip


def exact(model, shape=SHAPE, T=4):
    """The model on a grid converts losslessly: spikes and answers are those of float64."""
    model = networks.on_grid(model, seed=5)
    x = networks.images(shape, 3, grid=32)
    snn = qcfs_fast.convert(model, T=T, input_shape=shape)
    assert all(d["lossless"] == d["channels"] for d in snn.details.values())
    meaning, found = qcfs_fast.simulate(model, x, T, spikes=True), qcfs_fast.trace(snn, x)
    assert list(found) == list(meaning.spikes)
    assert all(torch.equal(found[k], meaning.spikes[k]) for k in found)
    assert all(0.05 < float(v.double().mean()) < 0.95 for v in found.values())
    torch.testing.assert_close(snn(x, per_step=True), meaning.output.float(), rtol=2e-7, atol=1e-7)
    return snn


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("how", SPELLINGS)
def test_channels_are_exact(how, place):
    width = SPELLINGS[how](torch.zeros(1, 8, 4, 4)).shape[1]
    exact(Net(SPELLINGS[how], place, width))


@pytest.mark.parametrize("how", SPELLINGS)
def test_channels_of_the_image(how):
    width = SPELLINGS[how](torch.zeros(1, 8, 4, 4)).shape[1]

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act, self.b = nn.Conv2d(width, 6, 3, padding=1), QCFS(4), nn.Conv2d(6, 4, 1)
            self.spelling = SPELLINGS[how]

        def forward(self, x):
            return self.b(self.act(self.a(self.spelling(x))))

    exact(First(), (8, 6, 5))


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        (lambda y: y[:, :, [0, 2]], "indexes a tensor.*takes channels of a map"),
        (lambda y: y[:, 0].unsqueeze(1).expand(-1, 8, -1, -1), "takes channels of a map"),
        (lambda y: y.chunk(2, 2)[0], "cuts another dimension than the channels"),
        (lambda y: y.transpose(2, 3), "permutes dimensions"),
        (lambda y: y.view(-1, 2, 4, 8, 6).transpose(0, 1).reshape(-1, 8, 8, 6), "permutes the batch or pixels"),
        (lambda y: y.view(-1, 2, 4, 6, 8).flatten(1, 2), "only channels may be taken apart"),
        (lambda y: y.flatten(1)[:, :384].view(-1, 8, 8, 6), "takes some features of a flattened map.*Remedy"),
    ],
)
def test_what_moves_pixels_or_samples_is_refused(spelling, message):
    with pytest.raises(ConversionError, match=message):
        qcfs_fast.convert(networks.on_grid(Net(spelling, "spikes", 8)), input_shape=SHAPE)


@pytest.mark.parametrize("padding", [1, 2])
def test_layers_that_read_the_image_are_summed(padding):
    """As in RepVGG: the small kernel lies within the large one."""

    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 5, 2, 2), nn.Conv2d(3, 6, 1 + 2 * padding, 2, padding)
            self.c, self.d = nn.Conv2d(3, 6, 1, 2, bias=False), nn.Conv2d(6, 4, 1)
            self.e, self.act, self.act_e = nn.Conv2d(3, 6, 3, 2, 1, groups=3), QCFS(4), QCFS(4)

        def forward(self, x):
            return self.d(self.act_e(self.e(x) + self.act(self.c(x) + self.a(x) + self.b(x)) + self.c(x)))

    exact(Summed())


def test_layers_that_read_the_image_unlike_each_other_are_refused():
    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 3, padding=2, dilation=2), QCFS(4)

        def forward(self, x):
            return self.act(self.a(x) + self.b(x))

    with pytest.raises(ConversionError, match="the image enters twice"):
        exact(Summed())


class DualPath(nn.Module):
    """Blocks that add to some channels and append others, of currents, as a dual-path network has them."""

    def __init__(self, blocks=8):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 2 * i) for i in range(blocks))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 2 * i, 8, 1) for i in range(blocks))
        self.acts = nn.ModuleList(QCFS(4) for _ in range(blocks + 1))
        self.out = nn.Linear(6 + 2 * blocks + 2, 5)

    def forward(self, x):
        x = self.first(x)
        for norm, conv, act in zip(self.norms, self.convs, self.acts[:-1], strict=True):
            y = conv(act(norm(x)))
            x = torch.cat([x[:, :6] + y[:, :6], x[:, 6:], y[:, 6:]], 1)
        return self.out(self.acts[-1](x).mean((2, 3)))


def test_parts_of_a_concatenation_keep_what_they_read():
    """Each block read twice as many products as the one before, half of them of zeros."""
    snn = exact(DualPath())
    assert max(len(layer.inputs) for layer in snn.spiking_layers.values()) <= 9
