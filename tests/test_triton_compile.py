"""Triton kernels compiled for every architecture without a GPU: matrix instructions, no spills, every rounding kept.

triton_compile.py runs the real launchers up to the launch and reports on the machine code.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; make test installs it from constraints.txt", allow_module_level=True)

import triton

from qcfs_fast.backend import choice

pytestmark = pytest.mark.triton
WARP_MMA = "mma.sync.aligned.m16n8k32"
MATRIX = {
    "cuda:80": WARP_MMA,
    "cuda:86": WARP_MMA,
    "cuda:89": WARP_MMA,
    "cuda:90": "wgmma.mma_async",
    "cuda:100": "tcgen05.mma",
    "cuda:120": WARP_MMA,
    "hip:gfx90a": "v_mfma_i32",
    "hip:gfx942": "v_mfma_i32",
    # Triton has no int8 matrix instructions for Turing: there every layer takes the direct kernel.
    "cuda:75": None,
}
SHARED = {"cuda": 99 * 1024, "hip": 64 * 1024}  # bytes a block may have, on the smallest of these devices
KERNELS = {
    "spiking_direct", "analog", "readout", "pool", "max_pool", "pool_counts", "count", "neurons", "largest_input",
    "quantize",
}  # fmt: skip
# Everywhere the matrix kernel for each T and one of every other kernel. Where thorough: all kernels for each T, all
# codings and size classes, every tile that tuning may choose. `make test-triton` is thorough everywhere.
THOROUGH = tuple(MATRIX) if os.environ.get("TEST_TRITON_THOROUGH") else ("cuda:75", "cuda:80")
VERSION = tuple(int(v) for v in triton.__version__.split("+")[0].split(".")[:3])
PINNED = (
    "triton==" + triton.__version__ in Path(__file__).resolve().parent.parent.joinpath("constraints.txt").read_text()
)


def compiled(target, folder):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    script = Path(__file__).with_name("triton_compile.py")
    command = [sys.executable, "-P", str(script), *target.split(":"), *(["thorough"] if target in THOROUGH else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if not PINNED and ("TRITON_HIP_LLD_PATH" in done.stderr or "ld.lld" in done.stderr):
        pytest.skip(f"Triton {triton.__version__} brings no linker for AMD and none that suits it is installed")
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("target", MATRIX)
def test_compiles(target, tmp_path):
    found = compiled(target, tmp_path)
    assert {f["kernel"] for f in found} >= KERNELS
    all_steps = set(range(1, 9))
    direct_steps = all_steps if target in THOROUGH else {1, 4, 8}
    assert direct_steps <= {f["steps"] for f in found if f["kernel"] == "spiking_direct"}
    assert not [f for f in found if f["inexact"]]
    assert not [f for f in found if SHARED[target.split(":")[0]] < f["shared"]]
    assert not [f for f in found if f["spilled"]]
    matrix = [f for f in found if f["kernel"] == "spiking_dot"]
    instruction = MATRIX[target]
    if instruction is None or (target == "cuda:120" and VERSION < (3, 3, 1)):
        assert not matrix
        return
    assert all_steps <= {f["steps"] for f in matrix if not f["count"]}
    assert (all_steps if target in THOROUGH else {1, 4, 8}) <= {f["steps"] for f in matrix if f["count"]}
    for f in matrix:
        assert f["matrix"], f
    # Early releases have sm_100 use the int8 instruction of the devices before it.
    wanted = {instruction, WARP_MMA} if target == "cuda:100" and not PINNED else {instruction}
    assert any(i in name for i in wanted for f in matrix for name in f["matrix"])


def test_versions_are_stated():
    """One lower bound, in the package, its metadata and the documentation; this run's Triton is within."""
    root = Path(__file__).resolve().parent.parent
    oldest = ".".join(map(str, choice.OLDEST_TRITON))
    assert f'"triton>={oldest}"' in (root / "pyproject.toml").read_text()
    assert f"{oldest} or newer" in (root / "docs" / "backends.md").read_text()
    assert VERSION >= choice.OLDEST_TRITON
