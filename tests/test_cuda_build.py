"""What nvcc makes of the kernels, without a GPU: no warnings, no spills, and the instructions that should be there."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("cuda_report", ROOT / "tools/cuda_report.py")
cuda_report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda_report)

needs_nvcc = pytest.mark.skipif(cuda_report.find_nvcc() is None, reason="nvcc is not installed")


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """All architectures, once; QCFS_FAST_CUDA_REPORT names a folder to keep it in."""
    kept = os.environ.get("QCFS_FAST_CUDA_REPORT")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("cuda")
    result = cuda_report.make_report(folder, list(cuda_report.ARCHITECTURES), int(os.environ.get("MAX_JOBS", "2")))
    (folder / "report.json").write_text(json.dumps(result, indent=1))
    return result


@needs_nvcc
def test_every_kernel_compiles_for_every_architecture_without_spills(report):
    rows = report["kernels"]
    kernels = {r["kernel"] for r in rows}
    assert sum(k.startswith("conv_if_kernel") for k in kernels) == 11
    assert {(r["kernel"], r["arch"]) for r in rows} == {(k, a) for k in kernels for a in cuda_report.ARCHITECTURES}
    assert all(r["spill_stores"] == r["spill_loads"] == r["stack"] == 0 for r in rows)
    # 256 threads must fit an SM's 65536 registers.
    assert all(r["registers"] <= 255 for r in rows)
    assert report["problems"] == []


@needs_nvcc
@pytest.mark.skipif(cuda_report.find_cuobjdump() is None, reason="cuobjdump is in neither the CUDA toolkit nor Triton")
def test_the_machine_code_has_tensor_cores_asynchronous_copies_and_wide_accesses(report):
    found = {(r["kernel"], r["arch"]): Counter(r["instructions"]) for r in report["instructions"]}
    assert len(found) == len(report["kernels"])
    assert cuda_report.missing_instructions(found) == []
    for (kernel, arch), instructions in found.items():
        if not kernel.startswith("conv_if_kernel"):
            continue
        T, parts, cols = map(int, re.findall(r"\d+", kernel)[:3])
        products = sum(n for name, n in instructions.items() if name.startswith("IMMA"))
        # A stage is two 32-byte steps of K: T x parts x cols/8 products each (four times as many on Turing).
        assert products % (2 * T * parts * cols // 8 * (4 if arch == "75" else 1)) == 0
        assert products > 0


def test_a_missing_instruction_is_a_problem():
    good = Counter({"IMMA.16832.U8.S8": 8, "LDSM.16.M88.4": 4, "LDGSTS.E.BYPASS.128": 2, "STG.E.128": 1})
    key = ("conv_if_kernel<4, 1, 64, 8, 4, 1>", "90")
    assert cuda_report.missing_instructions({key: good}) == []
    for name in good:
        lacking = Counter({k: n for k, n in good.items() if k != name})
        assert len(cuda_report.missing_instructions({key: lacking})) == 1
    assert cuda_report.missing_instructions({key: good + Counter({"STL.64": 1})}) != []


@needs_nvcc
@pytest.mark.parametrize(("variable", "value", "message"), [
    ("QCFS_FAST_CUDA", "perhaps", "known values: auto, on, off"),
    ("TORCH_CUDA_ARCH_LIST", "ninety", "is not like 8.0"),
])  # fmt: skip
def test_wrong_build_settings_say_so(variable, value, message, tmp_path):
    pybind11 = pytest.importorskip("pybind11")
    cmake = next((p for p in (Path(sys.executable).parent / "cmake", Path("/usr/bin/cmake")) if p.exists()), None)
    if cmake is None:
        pytest.skip("cmake is not installed")
    command = [cmake, "-S", ROOT, "-B", tmp_path, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    command.append(f"-DPython_EXECUTABLE={sys.executable}")
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, variable: value})
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())
