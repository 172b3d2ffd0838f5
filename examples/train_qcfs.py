"""Train a network of your own with QCFS activations, convert it, and see its accuracy by T.

    python examples/train_qcfs.py fashion-mnist
    python examples/train_qcfs.py /path/to/imagenet --model resnet18 --levels 8 --epochs 120

The data is a set by name (fashion-mnist, cifar10, cifar100), or a folder with train/ and val/ and in each a folder of
images per class. The same with all options, for torchvision's networks and the paper's own: `qcfs-fast train`, then
`qcfs-fast study`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

import qcfs_fast
from qcfs_fast.study.datasets import NAMED, open_data
from qcfs_fast.study.zoo import prepared_torchvision


def small(channels: int, size: int, classes: int, levels: int) -> nn.Module:
    """Any network of your own: QCFS where ReLU would be, average pools. `qcfs_fast.prepare` makes it of a ReLU one."""
    layers: list[nn.Module] = []
    for width in (32, 64, 128):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), qcfs_fast.QCFS(levels, 2.0)]
        layers += [nn.AvgPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * (size // 8) ** 2, classes))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", help="a torchvision name (default: the small network above)")
    parser.add_argument("--levels", type=int, default=4, help="L (default 4)")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rate", type=float, default=0.05, help="learning rate at the start (the paper: 0.1)")
    parser.add_argument("--size", type=int, default=224, help="side of a folder's images in pixels")
    parser.add_argument("--output", type=Path, default=Path("qcfs-run"))
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    o = parser.parse_args(arguments)

    training, test = (open_data(o.data, o.size, split=split) for split in ("train", "test"))
    named = NAMED.get(str(o.data))
    classes = named.classes if named else len(training.classes)
    shape = tuple(test.batch(range(1))[0].shape[1:])
    torch.manual_seed(0)
    if o.model:
        model = prepared_torchvision(o.model, classes, levels=o.levels, threshold=2.0)
    else:
        model = small(shape[0], shape[1], classes, o.levels)
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    recipe = qcfs_fast.Recipe(epochs=o.epochs, rate=o.rate, augment=named.augment if named else ("crop", "flip"))
    log = qcfs_fast.train(model, training, recipe, test, o.output)  # started again, it goes on from its last state
    print(f"ANN (QCFS, L = {o.levels}): {log[-1]['test_accuracy']:.2%}")

    for mode in ("plain", "offset"):
        snn = qcfs_fast.convert(model, T=4, input_shape=shape, neuron=mode)
        right = dict.fromkeys(o.steps, 0)
        for start in range(0, len(test), 100):
            x, y = test.batch(range(start, min(start + 100, len(test))))
            running = snn(x, T=snn.neuron.steps(max(o.steps)), per_step=True)
            for T in o.steps:
                right[T] += int((running[T - 1].argmax(1) == y).sum())
        print(f"{mode:6}  " + "   ".join(f"T = {T}: {n / len(test):.2%}" for T, n in right.items()))
        snn.save(o.output / f"{mode}.safetensors")


if __name__ == "__main__":
    main()
