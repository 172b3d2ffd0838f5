"""Fits the rates by which the CPU chooses an engine, and prints this kernel set's row of csrc/cpu/engines.cpp.

Each engine is timed on 3x3 layers of several widths, sizes and firing rates, one thread, and its time is fitted to the
work that engines.cpp counts: relative least squares over rates that are not negative. Other programs disturb a timing
upwards only, so the least of many counts; rounds go over all layers, so that a slow spell of the machine spoils one
round of each and not all of one. Usage: python tools/fit_engine_rates.py [--repeat N]
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from typing import Any

import numpy as np
import torch

from qcfs_fast import backend
from qcfs_fast.backend import native
from qcfs_fast.backend.choice import ENGINES, settings
from qcfs_fast.backend.protocol import last_engine
from qcfs_fast.operators.signature import Conv2dIf

T = 4
SHAPES = (
    (16, 16, 32), (16, 32, 32), (32, 32, 16), (48, 32, 16), (64, 64, 8), (64, 64, 16), (128, 128, 8),
    (64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7),
)  # fmt: skip
FIRING = (0.02, 0.05, 0.1, 0.2, 0.3)


class Layer:
    """A layer with its input, and its least time so far by engine."""

    def __init__(self, bits: int, C: int, O: int, size: int, rate: float) -> None:
        rng = np.random.default_rng(0)
        batch = max(1, 16384 // size**2)  # as many images as make the fixed cost of a call small
        x = torch.from_numpy(
            sum((rng.random((1, batch, size, size, C)) < rate).astype(np.uint8) << t for t in range(T)).astype(np.uint8)
        )
        spread = 20 if bits == 8 else 4000
        w = torch.from_numpy(np.clip(rng.normal(0, spread, (3, 3, C, O)), -6 * spread, 6 * spread))
        w = w.to(torch.int8 if bits == 8 else torch.int16)
        unit = 256 if bits == 8 else 1
        n = torch.full((O,), 2 * int(spread * unit * math.sqrt(9 * C * rate)) + 2, dtype=torch.int32)
        self.operands: Any = ([x], [w], [3, 3, 1, 1, 1, 1, 1, 1, 1], [], [], None, torch.zeros_like(n), n, T)
        checked = Conv2dIf.checked(*self.operands)
        self.work = native.module.SpikingLayer(checked, settings().isa, 1, ENGINES.index("auto")).work()
        self.best = dict.fromkeys(self.work, math.inf)

    def run(self, engine: str) -> None:
        with backend.force(cpu_engine=engine):
            begin = time.perf_counter()
            torch.ops.qcfs_fast.conv2d_if(*self.operands)
            seconds = time.perf_counter() - begin
        if last_engine.get() == engine:  # some layers are not for every engine
            self.best[engine] = min(self.best[engine], seconds * 1e9 / T)


def fit(engine: str, layers: list[Layer]) -> np.ndarray:
    """Nanoseconds for a unit of each kind of work."""
    timed = [layer for layer in layers if layer.best[engine] < math.inf]
    rows, times = [layer.work[engine] for layer in timed], [layer.best[engine] for layer in timed]
    scaled = np.array(rows) / np.array(times)[:, None]
    kept = list(range(scaled.shape[1]))
    while True:  # a kind of work whose cost would be negative costs nothing
        cost = np.linalg.lstsq(scaled[:, kept], np.ones(len(times)), rcond=None)[0]
        if (cost > 0).all():
            break
        kept.pop(int(cost.argmin()))
    result = np.zeros(scaled.shape[1])
    result[kept] = cost
    error = np.abs(scaled @ result - 1)
    print(f"// {engine}: {len(times)} layers, median error {np.median(error):.0%}, largest {error.max():.0%}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=30)
    repeat = parser.parse_args().repeat
    torch.set_num_threads(1)
    layers = [Layer(bits, *shape, rate) for bits, shape, rate in itertools.product((16, 8), SHAPES, FIRING)]
    for _, layer in itertools.product(range(repeat), layers):
        for engine in layer.work:
            layer.run(engine)
    events_16, events_8, listed, appended = fit("events", layers)
    products, expanded, fired = fit("dense", layers)
    groups, pixel, rows = fit("table", layers)
    rates = [1 / max(cost, 1e-4) for cost in (events_16, events_8, products, listed)]
    rates += [appended, *(1 / max(cost, 1e-4) for cost in (expanded, fired, groups)), pixel, 1 / max(rows, 1e-4)]
    print(f'{{"{backend.kernel_set()}", {", ".join(f"{r:.3g}" for r in rates)}}},')


if __name__ == "__main__":
    main()
