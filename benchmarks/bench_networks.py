"""Whole networks beside their ANN, the step-loop simulator, SpikingJelly and snnTorch (qcfs_fast/study/benchmark).

There is one benchmark per network and batch. Within it all contenders take turns at each T. The figure that
pytest-benchmark itself prints is that of our 16-bit network at the last T.
"""

import pytest

from qcfs_fast.study.benchmark.cases import NETWORKS, QUICK, STEPS, batches

CASES = [(label, batch) for label in NETWORKS for batch in batches(label)]


@pytest.mark.parametrize(("label", "batch"), CASES, ids=[f"{label}-batch {batch}" for label, batch in CASES])
def bench_network(benchmark, network, collect, options, label, batch):
    steps = options.steps or (STEPS if options.full else QUICK.get((label, batch)))
    if steps is None:
        pytest.skip("part of --full")
    under_test = network(label)
    collect(benchmark, under_test.cases(batch, steps, options.effort), under_test.ours(batch, steps[-1]))
