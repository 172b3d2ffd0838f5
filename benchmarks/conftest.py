"""Shared by the benchmarks: measuring contenders in turns, in one run.

Every benchmark is one group of contenders on the same layer or network. They are timed in turns, so that a change of
the machine's speed hits all alike; pytest-benchmark then reports our call, with the others' medians, the
ratios and the firing rate of the input as extra information and as a printed line. Each checks its answer first.
"""

import sys
from pathlib import Path

import pytest
import torch

from qcfs_fast.demo import interleaved_medians

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


@pytest.fixture
def compare(benchmark):
    """compare(label, {name: call}, firing_rate): the first contender is ours and is the one pytest-benchmark times."""

    def run(label, calls, firing_rate, rounds=25):
        with torch.no_grad():
            medians = interleaved_medians(calls, rounds)
            ours, *others = calls
            benchmark.extra_info.update(
                {
                    "firing_rate": firing_rate,
                    "threads": torch.get_num_threads(),
                    **{f"{n} (ms)": 1e3 * t for n, t in medians.items()},
                }
            )
            benchmark.pedantic(calls[ours], rounds=5, warmup_rounds=1)
        cells = [f"{ours} {1e3 * medians[ours]:.3f} ms"]
        cells += [f"{n} {1e3 * medians[n]:.3f} ms (x{medians[ours] / medians[n]:.2f})" for n in others]
        print(f"\n{label}, firing rate {firing_rate:.1%}, {torch.get_num_threads()} threads: " + ", ".join(cells))

    return run
