"""Segmentation: a small network that finds digits on a canvas, trained, converted, and its mean IoU by time steps.

    python examples/segmentation.py

The data is made by canvases.py: handwritten digits of scikit-learn, a few of them pasted at random on a noisy 32x32
canvas. Each pixel of a digit's strokes has the digit as its class, all others are background. The network is a small
encoder and decoder with a skip connection; nearest upsampling moves spikes, so it is exact, and the bilinear resize at
the end works on the mean of the readout.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from canvases import SIDE, canvases
from torch import Tensor, nn

import qcfs_fast

CLASSES = 11  # ten digits, and the background as the last class


class Segmenter(nn.Module):
    """[N, 1, H, W] -> scores [N, CLASSES, H, W]; H and W are multiples of 4."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
            conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

        self.fine = nn.Sequential(block(1, width), block(width, width, 2))
        self.coarse = nn.Sequential(block(width, 2 * width, 2), block(2 * width, 2 * width), block(2 * width, width))
        self.joined = block(2 * width, 2 * width)
        self.head = nn.Conv2d(2 * width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        coarse = F.interpolate(self.coarse(fine), scale_factor=2)
        scores = self.head(self.joined(torch.cat((fine, coarse), 1)))
        return F.interpolate(scores, size=x.shape[-2:], mode="bilinear")


def labelled(count: int, test: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Images [count, 1, SIDE, SIDE] in [0, 1] and classes [count, SIDE, SIDE]."""
    images, found = canvases(count, test, seed)
    classes = torch.full((count, SIDE, SIDE), CLASSES - 1)
    for of_canvas, digits in zip(classes, found, strict=True):
        for d in digits:
            of_canvas[d.place][d.pixels > 0.25] = d.label
    return images, classes


def mean_iou(found: Tensor, wanted: Tensor) -> float:
    """Intersection over union of each class that occurs, over all pixels; their mean."""
    counts = torch.bincount(wanted.flatten() * CLASSES + found.flatten(), minlength=CLASSES**2)
    table = counts.reshape(CLASSES, CLASSES).double()
    both = table.diagonal()
    union = table.sum(0) + table.sum(1) - both
    return float((both / union)[union > 0].mean())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=2000, help="canvases for training (default 2000)")
    parser.add_argument("--test", type=int, default=200, help="canvases for the test (default 200)")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--levels", type=int, default=8, help="L (default 8)")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    o = parser.parse_args(arguments)

    torch.manual_seed(0)
    images, classes = labelled(o.train, test=False, seed=0)
    model = qcfs_fast.prepare(Segmenter(), levels=o.levels, threshold=2.0)
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    batches = max(1, o.train // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=o.epochs * batches)
    weight = torch.ones(CLASSES)
    weight[-1] = 0.3  # most pixels are background
    model.train()
    for _ in range(o.epochs):
        for chosen in torch.randperm(o.train).tensor_split(batches):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), classes[chosen], weight).backward()
            optimizer.step()
            schedule.step()
    model.eval()

    images, classes = labelled(o.test, test=True, seed=1)
    with torch.no_grad():
        found = torch.cat([model(x).argmax(1) for x in images.split(50)])
    print(f"ANN (QCFS, L = {o.levels}): mean IoU {mean_iou(found, classes):.3f}")
    snn = qcfs_fast.convert(model, T=max(o.steps), input_shape=(1, SIDE, SIDE))
    running = [snn(x, per_step=True).argmax(2) for x in images.split(50)]
    for steps in o.steps:
        found = torch.cat([r[steps - 1] for r in running])
        print(f"SNN, T = {steps}: mean IoU {mean_iou(found, classes):.3f}")


if __name__ == "__main__":
    main()
