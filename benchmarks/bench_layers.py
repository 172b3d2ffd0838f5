"""One spiking layer at T = 4, batch 1, beside the ANN's layer and the step loop (qcfs_fast/study/benchmark)."""

import pytest

from qcfs_fast.study.benchmark.cases import LAYERS, LayerCase


@pytest.mark.parametrize("label", list(LAYERS))
def bench_layer(benchmark, collect, options, device, label):
    if device.type == "cuda":
        pytest.skip("layers alone are measured on the CPU; on a GPU by benchmarks/gpu.py")
    layer = LayerCase(label)
    collect(benchmark, [layer.case(options.effort)], lambda: layer.ours(16))
