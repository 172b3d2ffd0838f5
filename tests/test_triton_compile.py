"""Triton kernels compiled for every architecture without a GPU: matrix instructions, no spills, no contraction."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; make test installs it from constraints.txt", allow_module_level=True)

MATRIX = {
    ("cuda", "80"): "mma.sync.aligned.m16n8k32",
    ("cuda", "86"): "mma.sync.aligned.m16n8k32",
    ("cuda", "89"): "mma.sync.aligned.m16n8k32",
    ("cuda", "90"): "wgmma.mma_async",
    ("cuda", "100"): "tcgen05.mma",
    ("cuda", "120"): "mma.sync.aligned.m16n8k32",
    ("hip", "gfx90a"): "v_mfma_i32",
    ("hip", "gfx942"): "v_mfma_i32",
    # Triton has no matrix instructions for Turing: there every layer takes the direct kernel.
    ("cuda", "75"): None,
}


@pytest.mark.parametrize("target", MATRIX, ids=lambda t: t[1])
def test_compiles(target, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("triton_compile.py")
    # On one architecture, every tile that tuning may choose.
    command = [sys.executable, "-P", str(script), *target, *(["every"] if target[1] == "86" else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {f["kernel"] for f in found} >= {
        "spiking_direct", "analog", "readout", "pool", "max_pool", "pool_counts", "count", "encode", "largest_input",
        "quantize",
    }  # fmt: skip
    assert not [f for f in found if f["stack"]], "spilled registers"
    # Results in double must round after every operation.
    assert not [f for f in found if f["fused"]]
    instruction = MATRIX[target]
    matrix = [f for f in found if f["wanted"]]
    assert bool(matrix) == (instruction is not None)
    if instruction is None:
        return
    assert {f"dot T={t}" for t in range(1, 9)} <= {f["name"] for f in matrix}
    for f in matrix:
        assert f["matrix"], f
    assert any(instruction in name for f in matrix for name in f["matrix"])
