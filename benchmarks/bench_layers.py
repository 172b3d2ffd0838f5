"""One spiking layer at T = 4, batch 1, against the ANN's layer and the step loop: qcfs_fast/benchmark.py."""

import pytest

from qcfs_fast import benchmark as bench


@pytest.mark.parametrize("label", list(bench.LAYERS))
def bench_layer(benchmark, collect, options, label):
    layer = bench.Layer(label)
    collect(benchmark, [layer.case(options.effort)], lambda: layer.ours(16))
