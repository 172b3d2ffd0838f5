"""Networks as their users write them, each small: they convert, or a refusal says what to write instead.

Where all averages are dyadic a network is put on a grid, and its spikes are float64's to the last tie.
"""

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcfs_fast

pytestmark = pytest.mark.filterwarnings("ignore:convert. no threshold")


def block(inputs, outputs):
    layers = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class Up(nn.Module):
    """A step up of a U-Net: twice the size, padded to that of the map that is put beside it."""

    def __init__(self, inputs, outputs, way):
        super().__init__()
        if way == "transposed":
            self.up = nn.ConvTranspose2d(inputs, inputs // 2, 2, stride=2)
        elif way == "shuffled":
            self.up = nn.Sequential(nn.Conv2d(inputs, 2 * inputs, 1), nn.PixelShuffle(2))
        else:
            self.up = nn.Sequential(nn.Upsample(scale_factor=2, mode=way), nn.Conv2d(inputs, inputs // 2, 1))
        self.conv = block(inputs, outputs)

    def forward(self, x, beside):
        x = self.up(x)
        rows, cols = beside.size()[2] - x.size()[2], beside.size()[3] - x.size()[3]
        x = F.pad(x, [cols // 2, cols - cols // 2, rows // 2, rows - rows // 2])
        return self.conv(torch.cat([beside, x], dim=1))


class UNet(nn.Module):
    """Ronneberger et al., MICCAI 2015, with padded layers."""

    def __init__(self, way, width=4):
        super().__init__()
        self.first = block(3, width)
        self.down = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2), block(n, 2 * n)) for n in (width, 2 * width))
        self.up = nn.ModuleList(Up(2 * n, n, way) for n in (2 * width, width))
        self.last = nn.Conv2d(width, 2, 1)

    def forward(self, x):
        found = [self.first(x)]
        for step in self.down:
            found.append(step(found[-1]))
        y = self.up[0](found[2], found[1])
        return self.last(self.up[1](y, found[0]))


def leaky(inputs, outputs, kernel=3):
    layers = nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1)
    return nn.Sequential(*layers)


class TinyYolo(nn.Module):
    """YOLOv3-tiny in small: a pool of stride 1 behind an uneven pad, two heads, one of them of an enlarged map."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Sequential(leaky(3, 4), nn.MaxPool2d(2), leaky(4, 8), nn.MaxPool2d(2), leaky(8, 8))
        self.coarse = nn.Sequential(
            nn.MaxPool2d(2), leaky(8, 8), nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(2, 1), leaky(8, 8)
        )
        self.head, self.lateral, self.up = nn.Conv2d(8, 6, 1), leaky(8, 4, 1), nn.Upsample(scale_factor=2)
        self.fine_head = nn.Sequential(leaky(12, 8), nn.Conv2d(8, 6, 1))

    def forward(self, x):
        fine = self.fine(x)
        coarse = self.coarse(fine)
        return self.head(coarse), self.fine_head(torch.cat((self.up(self.lateral(coarse)), fine), 1))


class DuelingDQN(nn.Module):
    """Wang et al., ICML 2016: the value of a state, and the advantage of each action over their mean."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(4, 8, 8, 4), nn.ReLU(), nn.Conv2d(8, 8, 4, 2), nn.ReLU())
        self.hidden, self.value, self.advantage = nn.Linear(72, 16), nn.Linear(16, 1), nn.Linear(16, 6)

    def forward(self, x):
        x = self.trunk(x / 256)
        x = F.relu(self.hidden(x.reshape(x.size(0), -1)))
        advantage = self.advantage(x)
        return self.value(x) + advantage - advantage.mean(dim=1, keepdim=True)


class EEGNet(nn.Module):
    """Lawhern et al., J. Neural Eng. 2018: even kernels with padding="same", layers in a row without activation."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, (1, 16), padding="same", bias=False), nn.BatchNorm2d(4),
            nn.Conv2d(4, 8, (8, 1), groups=4, bias=False), nn.BatchNorm2d(8), nn.ELU(), nn.AvgPool2d((1, 4)),
            nn.Conv2d(8, 8, (1, 4), padding="same", groups=8, bias=False), nn.Conv2d(8, 8, 1, bias=False),
            nn.BatchNorm2d(8), nn.ELU(), nn.AvgPool2d((1, 8)), nn.Flatten(), nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, x):
        return self.features(x)


class M5(nn.Module):
    """Dai et al., ICASSP 2017, as the tutorial on speech commands has it: classes behind a permute."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv1d(1, 8, 16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(4), nn.Conv1d(8, 8, 3), nn.ReLU()]
        self.layers, self.classes = nn.Sequential(*layers), nn.Linear(8, 5)

    def forward(self, x):
        x = self.layers(x)
        x = F.avg_pool1d(x, x.shape[-1])
        return F.log_softmax(self.classes(x.permute(0, 2, 1)), dim=2)


class PointNet(nn.Module):
    """Qi et al., CVPR 2017: layers of single points, and the maximum over them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 16, 1), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.b(F.relu(self.a(x))))
        x = torch.max(x, 2, keepdim=True)[0]
        return self.d(F.relu(self.c(x.view(-1, 16))))


class SuperResolution(nn.Module):
    """Shi et al., CVPR 2016: pixels of the large image from the channels of the small one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(1, 8, 5, padding=2),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 4, 3, padding=1),
        )

    def forward(self, x):
        return F.pixel_shuffle(self.c(F.relu(self.b(F.relu(self.a(x))))), 2)


class Style(nn.Module):
    """Johnson et al., ECCV 2016, with BatchNorm: every layer has a border of pixels, the first one as well."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(2), nn.Conv2d(3, 6, 5), nn.BatchNorm2d(6), nn.ReLU(), nn.ReflectionPad2d(1),
            nn.Conv2d(6, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), nn.ReLU(),
            nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 3, padding=1, padding_mode="replicate"),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


class DeepLab(nn.Module):
    """The decoder of Chen et al., ECCV 2018: coarse scores enlarged beside fine ones, and enlarged again."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 6, 1))
        self.joined = nn.Sequential(nn.Conv2d(12, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1))

    def forward(self, x):
        fine = self.fine(x)
        coarse = F.interpolate(self.coarse(fine), size=fine.shape[-2:], mode="bilinear", align_corners=False)
        scores = self.joined(torch.cat([fine, coarse], 1))
        return F.interpolate(scores, size=x.shape[-2:], mode="bilinear", align_corners=False)


class Factored(nn.Module):
    """Layers of low rank, as a compressed network has them: a column, then a row; and two whole layers in a row."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, (3, 1), padding=(1, 0), bias=False),
            nn.Conv2d(4, 8, (1, 3), padding=(0, 1)), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1),
            nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


def generator():
    """Radford et al., ICLR 2016: an image from a vector, as a map of one pixel."""
    layers = [nn.ConvTranspose2d(8, 8, 4), nn.ReLU(), nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(4, 1, 4, 2, 1), nn.Tanh())


NETWORKS = {
    **{
        f"U-Net, {way}": (lambda way=way: UNet(way), (3, 16, 12))
        for way in ("transposed", "shuffled", "nearest", "bilinear")
    },
    "YOLOv3-tiny": (TinyYolo, (3, 16, 24)),
    "dueling DQN": (DuelingDQN, (4, 36, 36)),
    "EEGNet": (EEGNet, (1, 8, 32)),
    "M5": (M5, (1, 240)),
    "PointNet": (PointNet, (3, 10)),
    "super-resolution": (SuperResolution, (1, 8, 6)),
    "style": (Style, (3, 12, 8)),
    "DeepLab's decoder": (DeepLab, (3, 16, 12)),
    "factored": (Factored, (3, 8, 8)),
    "generator": (generator, (8, 1, 1)),
}
OTHERS = {nn.LeakyReLU, nn.ELU}
# The average of so many pixels rounds, and a spike at a tie may differ.
ROUNDED = {"M5"}


@pytest.mark.parametrize("max_pool", ["avg", "keep"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_as_it_is_written(name, max_pool, tmp_path):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    pools = [m for m in model.modules() if isinstance(m, nn.MaxPool1d | nn.MaxPool2d)]
    if max_pool == "keep" and not pools and name != "PointNet":
        pytest.skip("it has no maximum")
    prepared = qcfs_fast.prepare(model, levels=4, max_pool=max_pool, replace=OTHERS)
    x = networks.images(shape, 3)
    qcfs_fast.calibrate(prepared, [x], progress=False)
    snn = qcfs_fast.convert(prepared, T=4)  # which compares each layer's spikes with float64's
    with torch.no_grad():
        theirs, ours = prepared(x), snn(x)
    theirs, ours = ((y,) if isinstance(y, torch.Tensor) else y for y in (theirs, ours))
    assert [y.shape for y in ours] == [y.shape for y in theirs]
    ann = qcfs_fast.convert(prepared, T=4, neuron="sum")(x)  # whose spikes are the levels of the trained network
    for y, z in zip((ann,) if isinstance(ann, torch.Tensor) else ann, theirs, strict=True):
        assert float((y - z).norm() / z.norm()) < 0.1
    if name in ROUNDED:
        return
    torch.manual_seed(0)
    grid = qcfs_fast.prepare(make().eval(), levels=4, max_pool=max_pool, replace=OTHERS)
    meaning = qcfs_fast.simulate(networks.on_grid(grid), networks.images(shape, 3, grid=64), 5, spikes=True)
    spikes = qcfs_fast.trace(qcfs_fast.convert(grid, T=5, input_shape=shape), networks.images(shape, 3, grid=64))
    assert list(spikes) == list(meaning.spikes)
    for layer, theirs in meaning.spikes.items():
        assert torch.equal(spikes[layer], theirs), layer


def test_a_residual_image_is_added_by_the_user():
    """Zhang et al., TIP 2017: the network is the noise, and the image without it the answer."""

    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.noise = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))

        def forward(self, x):
            return x - self.noise(x)

    with pytest.raises(qcfs_fast.ConversionError, match=r"Remedy: .*x - snn\(x\)"):
        qcfs_fast.convert(qcfs_fast.prepare(Denoiser()))
    assert qcfs_fast.convert(qcfs_fast.prepare(Denoiser().noise, levels=4))(torch.rand(2, 1, 8, 8)).shape == (
        2,
        1,
        8,
        8,
    )
