"""Detection: a small single-stage detector, trained, converted, and its average precision by time steps.

    python examples/detection.py

The data is made by canvases.py: digits of 8 to 16 pixels on a 32x32 canvas. The network is a feature pyramid: what the
deeper, coarser level sees is upsampled and added to the finer one. Both levels are linear there, as in torchvision's
pyramids, and the layers that follow become one with them when the network is converted. A head that both levels share
says for each pixel of a level which digit has its centre there, and how far the four edges of its box are.

With its defaults it trains for two minutes. The ANN then reached an average precision of 0.755 (at an overlap of one
half), and the spiking network 0.404 at T = 4, 0.659 at T = 8 and 0.754 at T = 16.

Boxes, scores and the suppression of those that overlap are computed here, from the mean of the readouts, as they would
be for an ANN.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from canvases import Digit, canvases
from torch import Tensor, nn

import qcfs_fast

LARGEST, CLASSES = 16, 10
STRIDES = (4, 8)  # pixels of the image for one of a level; digits of 12 pixels and more belong to the coarser one


class Detector(nn.Module):
    """[N, 1, H, W] -> for each level [N, CLASSES + 4, H / stride, W / stride]: logits, and the edges' distances."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
            conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

        self.stem = nn.Sequential(block(1, width), block(width, width, 2))
        self.fine = nn.Sequential(block(width, 2 * width, 2), block(2 * width, 2 * width))
        self.coarse = nn.Sequential(block(2 * width, 2 * width, 2), block(2 * width, 2 * width))
        self.lateral = nn.ModuleList(nn.Conv2d(2 * width, 2 * width, 1) for _ in STRIDES)
        self.shared = nn.Sequential(block(2 * width, 2 * width), block(2 * width, 2 * width))
        self.head = nn.Conv2d(2 * width, CLASSES + 4, 1)
        nn.init.constant_(self.head.bias[:CLASSES], -4.0)  # most pixels have no digit

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(self.stem(x))
        coarse = self.lateral[1](self.coarse(fine))
        fine = self.lateral[0](fine) + F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
        return self.head(self.shared(fine)), self.head(self.shared(coarse))


def box(digit: Digit) -> list[float]:
    """Its first and last edges: x0, y0, x1, y1."""
    size = digit.pixels.shape[0]
    return [digit.left, digit.top, digit.left + size, digit.top + size]


def targets(found: Sequence[Sequence[Digit]], level: int, side: int) -> tuple[Tensor, Tensor]:
    """For the pixels of a level: classes [N, CLASSES, side, side] of 0 and 1, and distances [N, 4, side, side]."""
    stride = STRIDES[level]
    classes, edges = torch.zeros(len(found), CLASSES, side, side), torch.zeros(len(found), 4, side, side)
    for n, digits in enumerate(found):
        for d in digits:
            if (d.pixels.shape[0] >= 12) != (level == 1):
                continue
            x0, y0, x1, y1 = box(d)
            column, row = int((x0 + x1) / 2 / stride), int((y0 + y1) / 2 / stride)
            x, y = (column + 0.5) * stride, (row + 0.5) * stride
            classes[n, d.label, row, column] = 1
            edges[n, :, row, column] = torch.tensor([x - x0, y - y0, x1 - x, y1 - y]) / stride
    return classes, edges


def loss(outputs: Sequence[Tensor], wanted: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Focal loss of the classes (Lin et al., ICCV 2017), and the distances' errors where a digit is; for each digit."""
    total, digits = torch.zeros(()), torch.zeros(())
    for out, (classes, edges) in zip(outputs, wanted, strict=True):
        logits, found = out.split((CLASSES, 4), 1)
        error = (torch.sigmoid(logits) - classes).abs()
        total = total + (error.square() * F.binary_cross_entropy_with_logits(logits, classes, reduction="none")).sum()
        there = classes.amax(1, keepdim=True)
        total = total + (there * (found - edges).abs()).sum()
        digits = digits + there.sum()
    return total / digits.clamp(min=1)


class Boxes(NamedTuple):
    """What was found on one canvas: x0, y0, x1, y1 [M, 4], scores [M] from high to low, and classes [M]."""

    edges: Tensor
    scores: Tensor
    classes: Tensor


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes [M, 4] and [K, 4]: [M, K]."""
    size = (torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])).clamp(min=0)
    both = size.prod(2)
    areas = [(v[:, 2:] - v[:, :2]).clamp(min=0).prod(1) for v in (a, b)]
    return both / (areas[0][:, None] + areas[1] - both).clamp(min=1e-9)


def decoded(outputs: Sequence[Tensor], least: float = 0.05) -> list[Boxes]:
    """The boxes of each canvas; of those that overlap by half, whatever their class, the best."""
    edges, scores = [], []
    for out, stride in zip(outputs, STRIDES, strict=True):
        columns, rows = (stride * (torch.arange(n) + 0.5) for n in (out.shape[3], out.shape[2]))
        centre = torch.stack((columns.expand(len(rows), -1), rows[:, None].expand(-1, len(columns))))
        distance = stride * out[:, CLASSES:]
        edges.append(torch.cat((centre - distance[:, :2], centre + distance[:, 2:]), 1).flatten(2))
        scores.append(torch.sigmoid(out[:, :CLASSES]).flatten(2))
    found = []
    for e, s in zip(torch.cat(edges, 2), torch.cat(scores, 2), strict=True):
        best, classes = s.max(0)
        order = best.argsort(descending=True)
        order = order[best[order] > least]
        e, best, classes = e[:, order].T, best[order], classes[order]
        near = overlap(e, e) > 0.5
        kept: list[int] = []
        for i in range(len(e)):
            if not near[i, kept].any():
                kept.append(i)
        found.append(Boxes(e[kept], best[kept], classes[kept]))
    return found


def average_precision(found: Sequence[Boxes], wanted: Sequence[Sequence[Digit]]) -> float:
    """Area under precision over recall of each class at an overlap of one half; their mean."""
    areas = []
    for c in range(CLASSES):
        hits: list[tuple[float, bool]] = []
        there = 0
        for boxes, digits in zip(found, wanted, strict=True):
            own = torch.tensor([box(d) for d in digits if d.label == c]).reshape(-1, 4)
            there += len(own)
            free = torch.ones(len(own), dtype=torch.bool)
            for edges, score in zip(boxes.edges[boxes.classes == c], boxes.scores[boxes.classes == c], strict=True):
                match = overlap(edges[None], own)[0] * free
                hit = bool((match > 0.5).any())
                if hit:
                    free[match.argmax()] = False
                hits.append((float(score), hit))
        hit = torch.tensor([h for _, h in sorted(hits, key=lambda h: -h[0])], dtype=torch.float64)
        precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1)
        envelope = precision.flip(0).cummax(0).values.flip(0) if len(hit) else precision
        if there:
            areas.append(float((envelope * hit).sum()) / there)
    return sum(areas) / len(areas)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=3000, help="canvases for training (default 3000)")
    parser.add_argument("--test", type=int, default=200, help="canvases for the test (default 200)")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--levels", type=int, default=8, help="L (default 8)")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    o = parser.parse_args(arguments)

    torch.manual_seed(0)
    images, digits = canvases(o.train, test=False, seed=0, largest=LARGEST)
    side = images.shape[2]
    wanted = [targets(digits, i, side // stride) for i, stride in enumerate(STRIDES)]
    model = qcfs_fast.prepare(Detector(), levels=o.levels, threshold=2.0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    batches = max(1, o.train // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=o.epochs * batches)
    model.train()
    for _ in range(o.epochs):
        for chosen in torch.randperm(o.train).tensor_split(batches):
            optimizer.zero_grad()
            loss(model(images[chosen]), [(c[chosen], e[chosen]) for c, e in wanted]).backward()
            optimizer.step()
            schedule.step()
    model.eval()

    images, digits = canvases(o.test, test=True, seed=1, largest=LARGEST)
    with torch.no_grad():
        found = decoded(model(images))
    print(f"ANN (QCFS, L = {o.levels}): average precision {average_precision(found, digits):.3f}")
    snn = qcfs_fast.convert(model, T=max(o.steps), input_shape=(1, side, side))
    running = snn(images, per_step=True)
    for steps in o.steps:
        found = decoded([level[steps - 1] for level in running])
        print(f"SNN, T = {steps}: average precision {average_precision(found, digits):.3f}")


if __name__ == "__main__":
    main()
