"""The kernels alone, without Python or torch: sanitizers, guard pages, threads (tests/native/cpu.cpp)."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qcfs_fast import backend

SOURCE = Path(__file__).resolve().parent.parent
ARM_COMPILER = "aarch64-linux-gnu-g++"


def build(tmp_path_factory, sanitizer, *options):
    """Build the test program through the project's CMake with the given sanitizers."""
    if shutil.which("cmake") is None:
        pytest.fail("these tests build with cmake; make test installs it")
    folder = tmp_path_factory.mktemp(sanitizer.replace(",", "-"))
    for command in (
        [
            "cmake",
            "-S",
            str(SOURCE),
            "-B",
            str(folder),
            f"-DQCFS_FAST_SANITIZE={sanitizer}",
            "-DQCFS_FAST_WERROR=ON",
            "-DQCFS_FAST_CUDA=off",
            *options,
        ],
        ["cmake", "--build", str(folder), "--target", "differential", "-j2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "differential"


def run(command, seed, cases, threads, kernels):
    done = subprocess.run([*command, str(seed), str(cases), str(threads)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "ERROR" not in done.stderr
    assert "runtime error" not in done.stderr
    rate, ties, engines, names = re.search(r"rate ([\d.]+) ties (\d+) engines (\d+) kernels (.+)", done.stdout).groups()
    assert 0.05 < float(rate) < 0.95
    assert int(ties) > 0
    assert int(engines) == 4  # events, dense, depthwise, grouped
    assert set(names.split()) == kernels


def host_kernels():
    names = {name for name, _ in backend.kernel_sets()}
    return names | {"amx"} if "avx512vnni" in names else names  # tiles are emulated


def test_address_and_undefined_behaviour(tmp_path_factory):
    program = build(tmp_path_factory, "address,undefined")
    run([program], seed=1, cases=400, threads=1, kernels=host_kernels())
    run([program], seed=2, cases=100, threads=3, kernels=host_kernels())


def test_threads(tmp_path_factory):
    run([build(tmp_path_factory, "thread")], seed=3, cases=150, threads=4, kernels=host_kernels())


@pytest.mark.skipif(
    shutil.which(ARM_COMPILER) is None or shutil.which("qemu-aarch64") is None,
    reason=f"needs {ARM_COMPILER} and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_arm64(tmp_path_factory):
    """NEON, cross-compiled and emulated: on a processor with dot products and on one without."""
    program = build(
        tmp_path_factory, "none", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={ARM_COMPILER}", "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )  # fmt: skip
    run(["qemu-aarch64", "-cpu", "max", program], seed=4, cases=300, threads=2, kernels={"neondot", "neon"})
    run(["qemu-aarch64", "-cpu", "cortex-a53", program], seed=5, cases=100, threads=1, kernels={"neon"})
