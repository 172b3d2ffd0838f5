"""The kernels alone, without Python or torch: sanitizers, guard pages, threads (csrc/tests/differential.cpp)."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qcfs_fast import backend

SOURCE = Path(__file__).resolve().parent.parent
KERNELS = sorted((SOURCE / "csrc/cpu/kernels").glob("*.cpp"))


def build(tmp_path_factory, sanitizer):
    """Build the test program through the project's CMake with the given sanitizers."""
    if shutil.which("cmake") is None:
        pytest.fail("these tests build with cmake; make test installs it")
    folder = tmp_path_factory.mktemp(sanitizer.replace(",", "-"))
    for command in (
        ["cmake", "-S", str(SOURCE), "-B", str(folder), f"-DQCFS_FAST_SANITIZE={sanitizer}", "-DQCFS_FAST_WERROR=ON"],
        ["cmake", "--build", str(folder), "--target", "differential", "-j2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "differential"


def run(program, seed, cases, threads):
    done = subprocess.run([program, str(seed), str(cases), str(threads)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "ERROR" not in done.stderr
    assert "runtime error" not in done.stderr
    rate, ties, engines, kernels = re.search(
        r"rate ([\d.]+) ties (\d+) engines (\d+) kernels (.+)", done.stdout
    ).groups()
    assert 0.05 < float(rate) < 0.95
    assert int(ties) > 0
    assert int(engines) == 4  # events, dense, depthwise, grouped
    wanted = {name for name, _ in backend.kernel_sets()}
    if "avx512vnni" in wanted:
        wanted.add("amx")  # on emulated tiles
    assert set(kernels.split()) == wanted


def test_address_and_undefined_behaviour(tmp_path_factory):
    program = build(tmp_path_factory, "address,undefined")
    run(program, seed=1, cases=500, threads=1)
    run(program, seed=2, cases=150, threads=3)


def test_threads(tmp_path_factory):
    run(build(tmp_path_factory, "thread"), seed=3, cases=200, threads=4)
