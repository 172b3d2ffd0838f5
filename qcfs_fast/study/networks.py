"""The paper's networks for small images.

    cifar-vgg11, -vgg13, -vgg16, -vgg19    3x3 convolutions in five stages, an average pool behind each, 3 linear layers
    cifar-resnet20                         three stages of three residual blocks, 16, 32 and 64 channels
    cifar-resnet18, -resnet34              four stages, 64 to 512 channels, the first convolution 3x3 without a pool

Layers and names of tensors are those of the authors' published networks (Bu et al., ICLR 2022), so that their
checkpoints load. `width` multiplies all channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..model.qcfs import QCFS

VGG_STAGES = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
VGG_WIDTHS = (64, 128, 256, 512, 512)
RESNET_STAGES = {
    "resnet18": ((64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet20": ((16, 32, 64), (3, 3, 3)),
    "resnet34": ((64, 128, 256, 512), (3, 4, 6, 3)),
}
SMALL = tuple(f"cifar-{name}" for name in (*VGG_STAGES, *RESNET_STAGES))


class Vgg(nn.Module):
    """`stages` holds the widths of each stage, `linear` the inputs and outputs of each layer of the head."""

    def __init__(
        self,
        stages: list[list[int]],
        linear: list[tuple[int, int]],
        channels: int,
        levels: int,
        threshold: float = 8.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for number, widths in enumerate(stages, 1):
            layers: list[nn.Module] = []
            for width in widths:
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1),
                    nn.BatchNorm2d(width),
                    QCFS(levels, threshold),
                    nn.Dropout(dropout),
                ]
                channels = width
            self.add_module(f"layer{number}", nn.Sequential(*layers, nn.AvgPool2d(2)))
        head: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in linear[:-1]:
            head += [nn.Linear(inputs, outputs), QCFS(levels, threshold), nn.Dropout(dropout)]
        self.classifier = nn.Sequential(*head, nn.Linear(*linear[-1]))
        self.stages = len(stages)

    def forward(self, x: Tensor) -> Tensor:
        for number in range(self.stages):
            x = self.get_submodule(f"layer{number + 1}")(x)
        return self.classifier(x)


class Block(nn.Module):
    """A residual block; `projection` puts a 1x1 convolution on the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, projection: bool, levels: int, threshold: float) -> None:
        super().__init__()
        self.residual_function = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            QCFS(levels, threshold),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if projection:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.act = QCFS(levels, threshold)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.residual_function(x) + self.shortcut(x))


class ResNet(nn.Module):
    """`stages` holds for each block its width and whether its shortcut has a projection."""

    def __init__(
        self,
        channels: int,
        width: int,
        stages: list[list[tuple[int, bool]]],
        classes: int,
        levels: int,
        threshold: float = 8.0,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), QCFS(levels, threshold)
        )
        for number, blocks in enumerate(stages, 2):
            layers = []
            for i, (outputs, projection) in enumerate(blocks):
                layers.append(Block(width, outputs, 2 if number > 2 and i == 0 else 1, projection, levels, threshold))
                width = outputs
            self.add_module(f"conv{number}_x", nn.Sequential(*layers))
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, classes)
        self.stages = len(stages)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for number in range(self.stages):
            x = self.get_submodule(f"conv{number + 2}_x")(x)
        return self.fc(self.avg_pool(x).flatten(1))


def small_network(
    name: str,
    classes: int,
    channels: int = 3,
    size: int = 32,
    levels: int = 4,
    threshold: float = 8.0,
    width: float = 1.0,
    dropout: float = 0.0,
) -> nn.Module:
    """One of the paper's networks for small images, in training mode, with its usual random weights.

    Args:
        name: one of SMALL.
        classes: outputs.
        channels: of the images.
        size: side of the images in pixels; VGG halves it five times.
        levels: L of every QCFS.
        threshold: theta of every QCFS at first.
        width: factor on the channels of every layer.
        dropout: of VGG's layers.

    Raises:
        ValueError: the name is unknown, or the images are too small for VGG.
    """
    if name not in SMALL:
        raise ValueError(f"no network {name!r} for small images; known: {', '.join(SMALL)}")
    kind = name.removeprefix("cifar-")

    def scaled(channels: int) -> int:
        return max(1, round(width * channels))

    if kind in VGG_STAGES:
        if size < 32:
            raise ValueError(f"{name} halves its images five times: they must have 32 pixels or more, got {size}")
        stages = [[scaled(w)] * count for w, count in zip(VGG_WIDTHS, VGG_STAGES[kind], strict=True)]
        hidden = scaled(4096)
        inputs = stages[-1][-1] * (size // 32) ** 2
        network: nn.Module = Vgg(
            stages, [(inputs, hidden), (hidden, hidden), (hidden, classes)], channels, levels, threshold, dropout
        )
    else:
        widths, counts = RESNET_STAGES[kind]
        blocks = [
            [(scaled(w), stage > 0 and i == 0) for i in range(count)]
            for stage, (w, count) in enumerate(zip(widths, counts, strict=True))
        ]
        network = ResNet(channels, scaled(widths[0]), blocks, classes, levels, threshold)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
