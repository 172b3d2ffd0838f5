"""Networks for the tests: one for each thing a graph may contain, and the shapes of the authors' own models."""

import torch
import torch.nn.functional as F
from torch import nn

import qcfs_fast
from qcfs_fast import QCFS


class Residual(nn.Module):
    """Basic block with reused ReLU, as torchvision writes it."""

    def __init__(self, cin, cout, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.relu = nn.ReLU(inplace=True)
        self.down = (
            nn.Sequential(nn.Conv2d(cin, cout, 1, stride), nn.BatchNorm2d(cout)) if stride > 1 or cin != cout else None
        )

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.down is None else self.down(x)
        return self.relu(y)


class Small(nn.Module):
    """Convolution, pool, two residual blocks (identity and projection), head."""

    def __init__(self, classes=5, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2))
        self.block1 = Residual(width, width)
        self.block2 = Residual(width, 2 * width, 2)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = self.block2(self.block1(self.stem(x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Groups(nn.Module):
    """Groups, depthwise with multiplier, dilation, uneven strides, functional ReLU, dropout, view."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.b = nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.c = nn.Conv2d(24, 16, (1, 3), stride=(1, 2), padding=(0, 2), dilation=(1, 2), groups=4)
        self.d = nn.Conv2d(16, 7, 3, padding="same")
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(7 * 8 * 4, 5)

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = F.relu(self.b(x))
        x = self.c(x).relu()
        x = self.drop(F.relu(self.d(x)))
        return self.out(F.dropout(x.view(x.size(0), -1), training=self.training))


class Branches(nn.Module):
    """Concatenation (of spikes and of averages), pool of pool, residual of a concatenation, sum before a layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 1)
        self.c, self.d = nn.Conv2d(6, 7, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.e = nn.Conv2d(16, 12, 3, padding=1)
        self.f = nn.Conv2d(12, 8, 1)
        self.pool, self.wide = nn.AvgPool2d(2, 1), nn.AvgPool2d(8, 1)
        self.out = nn.Conv2d(8, 5, 1)
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.relu(self.a(x))
        b, c = self.relu(self.b(x)), self.relu(self.c(x))
        d = self.relu(self.d(F.avg_pool2d(x, 3, 1, 1)))
        y = self.relu(self.e(torch.cat([b, c, d], 1)) + torch.cat([b, c], dim=1))
        y = self.relu(self.f(self.wide(self.pool(y)) + self.wide(self.pool(y))))
        return self.out(y).mean((2, 3))


class Image(nn.Module):
    """The image enters a later neuron too, beside spikes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.skip = nn.Conv2d(3, 8, 1)
        self.out = nn.Linear(8, 5)

    def forward(self, x):
        y = torch.relu(self.a(x))
        y = torch.relu(self.b(y) + self.skip(x))
        return self.out(y.mean([2, 3]))


class Perceptron(nn.Sequential):
    """Linear layers on vectors [N, 20], with BatchNorm1d."""

    def __init__(self):
        super().__init__(
            nn.Linear(20, 33), nn.BatchNorm1d(33), nn.ReLU(), nn.Linear(33, 17), nn.ReLU(), nn.Linear(17, 5)
        )


class Pools(nn.Module):
    """Adaptive pools that do and do not divide, ceil mode, partial padding, before spiking layers."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.p1 = nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.p2 = nn.AdaptiveAvgPool2d((3, 2))
        self.c, self.d = nn.Linear(48, 24), nn.Linear(24, 5)

    def forward(self, x):
        x = self.p1(torch.relu(self.a(x)))
        x = torch.relu(self.b(x))
        x = torch.relu(self.c(self.p2(x).flatten(1)))
        return self.d(x)


class AllConvolution(nn.Sequential):
    """No linear layer: the output is a pooled convolution, flattened."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )


class SpikesOut(nn.Sequential):
    """As SqueezeNet: the last activation is pooled and is the output."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()
        )


class UNet(nn.Module):
    """Down, and up again by a transposed layer beside what was there, and by bilinear pixels; a border of pixels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(8, 10, 3, 2, 1)
        self.up = nn.ConvTranspose2d(10, 8, 2, 2)
        self.d = nn.Conv2d(16, 7, 3, padding=1, padding_mode="reflect")
        self.e, self.out = nn.Conv2d(7, 6, 3, padding=1), nn.Conv2d(6, 5, 1)

    def forward(self, x):
        fine = torch.relu(self.a(x))
        middle = torch.relu(self.b(fine))
        y = torch.relu(self.d(torch.cat([middle, self.up(torch.relu(self.c(middle)))], 1)))
        y = F.interpolate(y, scale_factor=2, mode="bilinear")
        return self.out(torch.relu(self.e(y) + fine)).mean((2, 3))


SHAPES = {
    Small: (3, 10, 12), Groups: (3, 8, 8), Branches: (3, 9, 9), Image: (3, 8, 8), Perceptron: (20,), Pools: (3, 12, 11),
    AllConvolution: (3, 8, 8), SpikesOut: (3, 8, 8), UNet: (3, 8, 12),
}  # fmt: skip


def randomize(model, seed=0):
    """Random but lively parameters, BatchNorm statistics included."""
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            fan = m.weight[0].numel()
            m.weight.data = torch.randn(m.weight.shape, generator=g) * (2 / fan) ** 0.5
            if m.bias is not None:
                m.bias.data = torch.randn(m.bias.shape, generator=g) * 0.1
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            n = m.num_features
            m.running_mean = torch.randn(n, generator=g) * 0.1
            m.running_var = torch.rand(n, generator=g) + 0.5
            m.weight.data = torch.rand(n, generator=g) + 0.5
            m.bias.data = torch.randn(n, generator=g) * 0.1
    return model.eval()


def on_grid(model, seed=0):
    """Parameters on a coarse dyadic grid, thresholds too: conversion must then be lossless, and ties are many."""
    g = torch.Generator().manual_seed(seed)

    def pick(shape, low, high, step):
        return torch.randint(low, high + 1, shape, generator=g) * step

    for m in model.modules():
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            reach = max(1, round(16 / m.weight[0].numel() ** 0.5))
            m.weight.data = pick(m.weight.shape, -reach, reach, 1 / 8)
            if m.bias is not None:
                m.bias.data = pick(m.bias.shape, -2, 3, 1 / 8)
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            n = (m.num_features,)
            m.eps = 0.0
            m.running_mean, m.running_var = pick(n, -1, 1, 1 / 4), 4.0 ** pick(n, 0, 1, 1).float()
            m.weight.data, m.bias.data = pick(n, 1, 2, 1 / 2), pick(n, -1, 2, 1 / 8)
        if isinstance(m, QCFS):
            m.thresh.data = 2.0 ** pick(m.thresh.shape, -1, 1, 1).float()
    return model.eval()


def images(shape, n=3, seed=1, grid=None):
    """Random images, on multiples of 1 / grid where a grid is given."""
    x = torch.randn((n, *shape), generator=torch.Generator().manual_seed(seed))
    return x if grid is None else torch.round(x.clamp(-2, 2) * grid) / grid


def lively(model, shape, levels=4, **options):
    """A prepared network whose thresholds fit its random weights."""
    prepared = qcfs_fast.prepare(model, levels=levels, **options)
    return qcfs_fast.calibrate(prepared, [images(shape, 8, seed=7)], progress=False)


def converted(kind, T=4, **options):
    """A lively network of this kind as an SNN, and images for it."""
    shape = SHAPES[kind]
    return qcfs_fast.convert(lively(randomize(kind()), shape), T=T, **options), images(shape)


# ------------------------------------------------------------ the shapes of the authors' own models


class TheirIF(nn.Module):
    """An activation recognised by its shape: a `thresh` parameter, a level count L, a ReLU inside, a T switch."""

    def __init__(self, L=8, thresh=8.0):
        super().__init__()
        self.thresh = nn.Parameter(torch.tensor([thresh]))
        self.L, self.T, self.gama = L, 0, 1.0
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        if self.T > 0:
            raise RuntimeError("spiking mode of the original code is not needed here")
        x = torch.clamp(x / self.thresh, 0, 1)
        return torch.floor(x * self.L + 0.5) / self.L * self.thresh


VGG_PLANS = {
    "vgg11": [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "vgg13": [64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "vgg16": [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"],
    "vgg19": [64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"],
}


class TheirVGG(nn.Module):
    def __init__(self, plan, classes=10, dropout=0.1, divide=8, area=1):
        super().__init__()
        self.init_channels = 3
        self.T = 0
        stages = [[]]
        for v in VGG_PLANS[plan]:
            if v == "M":
                stages[-1].append(nn.AvgPool2d(2))
                stages.append([])
            else:
                width = v // divide
                stages[-1] += [
                    nn.Conv2d(self.init_channels, width, 3, padding=1),
                    nn.BatchNorm2d(width),
                    TheirIF(),
                    nn.Dropout(dropout),
                ]
                self.init_channels = width
        for i, stage in enumerate(stages[:5], 1):
            setattr(self, f"layer{i}", nn.Sequential(*stage))
        hidden = 4096 // divide
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(self.init_channels * area, hidden), TheirIF(), nn.Dropout(dropout),
            nn.Linear(hidden, hidden), TheirIF(), nn.Dropout(dropout), nn.Linear(hidden, classes),
        )  # fmt: skip

    def forward(self, x):
        if self.T > 0:
            x = x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1).flatten(0, 1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4, self.layer5):
            x = stage(x)
        return self.classifier(x)


class TheirBlock(nn.Module):
    def __init__(self, cin, cout, stride):
        super().__init__()
        self.residual_function = nn.Sequential(
            nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout), TheirIF(),
            nn.Conv2d(cout, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout),
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if stride != 1 or cin != cout:
            self.shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))
        self.act = TheirIF()

    def forward(self, x):
        return self.act(self.residual_function(x) + self.shortcut(x))


class TheirResNet(nn.Module):
    """18 and 34 have four stages; 20, for CIFAR, three. ImageNet models start with a strided convolution and a pool."""

    def __init__(self, depth, classes=10, imagenet=False, divide=8):
        super().__init__()
        blocks = {18: [2, 2, 2, 2], 20: [3, 3, 3], 34: [3, 4, 6, 3]}[depth]
        widths = [16, 32, 64] if depth == 20 else [64 // divide, 128 // divide, 256 // divide, 512 // divide]
        stem = (
            [nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)]
            if imagenet
            else [nn.Conv2d(3, widths[0], 3, padding=1, bias=False)]
        )
        stem += [nn.BatchNorm2d(widths[0]), TheirIF()]
        self.conv1 = nn.Sequential(*stem, nn.AvgPool2d(3, 2, 1)) if imagenet else nn.Sequential(*stem)
        cin, stages = widths[0], []
        for i, (n, width) in enumerate(zip(blocks, widths, strict=True)):
            stages.append(
                nn.Sequential(
                    *(TheirBlock(cin if j == 0 else width, width, 2 if i and j == 0 else 1) for j in range(n))
                )
            )
            cin = width
        self.stages = nn.Sequential(*stages)
        self.avg_pool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(cin, classes)

    def forward(self, x):
        output = self.avg_pool(self.stages(self.conv1(x)))
        return self.fc(output.view(output.size(0), -1))
