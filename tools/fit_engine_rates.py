"""Fits the rates by which the CPU chooses an engine, and prints this kernel set's row of csrc/cpu/engines.cpp.

Each engine is timed on 3x3 layers of several widths, sizes and firing rates, one thread, and its time is fitted to the
work that engines.cpp counts: relative least squares over rates that are not negative. Other programs disturb a timing
upwards only, so the least of many counts. Usage: python tools/fit_engine_rates.py [--repeat N]
"""

from __future__ import annotations

import argparse
import itertools
import math
import time

import numpy as np
import torch

from qcfs_fast import backend
from qcfs_fast.backend.protocol import last_engine

T = 4
SHAPES = ((16, 16, 32), (16, 32, 32), (32, 32, 16), (48, 32, 16), (64, 64, 8), (64, 64, 16), (128, 128, 8))
FIRING = (0.02, 0.05, 0.1, 0.2)


def timed(engine: str, bits: int, C: int, O: int, size: int, rate: float, repeat: int) -> float:
    """Nanoseconds a step of one image on this engine; nan where it does not take the layer."""
    rng = np.random.default_rng(0)
    batch = max(1, 2048 // size**2)  # as many images as make the fixed cost of a call small
    x = torch.from_numpy(
        sum((rng.random((1, batch, size, size, C)) < rate).astype(np.uint8) << t for t in range(T)).astype(np.uint8)
    )
    spread = 20 if bits == 8 else 4000
    w = torch.from_numpy(np.clip(rng.normal(0, spread, (3, 3, C, O)), -6 * spread, 6 * spread))
    w = w.to(torch.int8 if bits == 8 else torch.int16)
    unit = 256 if bits == 8 else 1
    n = torch.full((O,), 2 * int(spread * unit * math.sqrt(9 * C * rate)) + 2, dtype=torch.int32)
    rest = ([3, 3, 1, 1, 1, 1, 1, 1, 1], [], [], None, torch.zeros_like(n), n, T)
    best = math.inf
    with backend.force(cpu_engine=engine):
        for _ in range(repeat):
            begin = time.perf_counter()
            torch.ops.qcfs_fast.conv2d_if([x], [w], *rest)
            best = min(best, time.perf_counter() - begin)
    return best * 1e9 / T / batch if last_engine.get() == engine else math.nan


def work(engine: str, bits: int, C: int, O: int, size: int, rate: float) -> list[float]:
    """What engines.cpp counts, in the order of an engine's columns there. Padding at the border is left out."""
    pixels, inputs = size**2, size**2 * C
    if engine == "events":
        panel = 64 * 8 // bits
        rows = rate * 9 * C * pixels * math.ceil(O / panel) * panel
        return [*((rows, 0.0) if bits == 16 else (0.0, rows)), inputs, 3 * pixels]
    if engine == "dense":
        return [pixels * 9 * C * O * bits / 8, inputs]
    return [3 * C / 4 * pixels, pixels, (1 - (1 - rate) ** 4) * 9 * C / 4 * pixels * O * bits / 4]


def fit(engine: str, repeat: int) -> np.ndarray:
    """Nanoseconds for a unit of each kind of work."""
    rows, times = [], []
    for bits, (C, O, size), rate in itertools.product((16, 8), SHAPES, FIRING):
        measured = timed(engine, bits, C, O, size, rate, repeat)
        if not math.isnan(measured):
            rows.append(work(engine, bits, C, O, size, rate))
            times.append(measured)
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
    events_16, events_8, listed, appended = fit("events", repeat)
    products, expanded = fit("dense", repeat)
    groups, pixel, rows = fit("table", repeat)
    rates = [1 / max(cost, 1e-3) for cost in (events_16, events_8, products, listed)]
    rates += [appended, 1 / max(expanded, 1e-3), 1 / max(groups, 1e-3), pixel, 1 / max(rows, 1e-3)]
    print(f'{{"{backend.kernel_set()}", {", ".join(f"{r:.3g}" for r in rates)}}},')


if __name__ == "__main__":
    main()
