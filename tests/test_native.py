"""The kernels alone, without Python or torch: sanitizers, guard pages, threads (tests/native/cpu.cpp); C++ rules."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qcfs_fast import backend

SOURCE = Path(__file__).resolve().parent.parent
ARM_COMPILER = "aarch64-linux-gnu-g++"
X86 = platform.machine().lower() in ("x86_64", "amd64")
X86_FLAGS = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]


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
    program = build(tmp_path_factory, "thread")
    run([program], seed=3, cases=150, threads=4, kernels=host_kernels())
    assert_tables_alone_are_shared(program.parent)


def assert_tables_alone_are_shared(folder):
    """An instruction-set file defines no symbol that the linker could give to others, but its table (kernel_set.h)."""
    objects = sorted(folder.rglob("csrc/cpu/sets/*.o"))
    assert {path.name.split(".")[0] for path in objects} >= {"portable", *(("avx2", "amx") if X86 else ())}
    for path in objects:
        nm = ["nm", "-C", "--defined-only", "--extern-only", str(path)]
        done = subprocess.run(nm, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if " DW.ref." not in line]  # the sanitizer's
        names = [line.split(maxsplit=2)[2] for line in lines]
        assert names == [f"qcfs::cpu::{path.name.split('.')[0]}_kernels"]


def compile_text(text):
    """Check a C++ text as the kernels are compiled, for the widest instruction sets."""
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unused"]
    command += ["-fsyntax-only", f"-I{SOURCE / 'csrc'}", *(X86_FLAGS if X86 else []), "-x", "c++", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)


def test_headers_stand_alone():
    """Every header has a guard and all its includes."""
    headers = [SOURCE / "csrc/core/contract.h", SOURCE / "csrc/core/neuron.h", *(SOURCE / "csrc/cpu").rglob("*.h")]
    assert len(headers) > 20
    for path in headers:
        if path.name.startswith("x86_") and not X86:
            continue
        include = f'#include "{path.relative_to(SOURCE / "csrc")}"\n'
        done = compile_text(2 * include)
        assert done.returncode == 0, done.stderr[:2000]


def test_standard_headers_of_the_kernels():
    """What instruction-set files include brings in no function with external linkage (kernel_set.h)."""
    allowed = {"cassert", "cstddef", "cstdint", "type_traits", "immintrin.h", "emmintrin.h", "arm_neon.h"}
    seen, left = set(), list((SOURCE / "csrc/cpu/sets").glob("*.cpp"))
    assert len(left) > 5
    while left:
        text = left.pop().read_text()
        standard = set(re.findall(r"#include <([^>]+)>", text))
        assert standard <= allowed
        new = {SOURCE / "csrc" / name for name in re.findall(r'#include "([^"]+)"', text)} - seen
        seen |= new
        left += new
    assert SOURCE / "csrc/cpu/events/fire.h" in seen


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("static Int dot4(Int acc, Int, Int)", "needs `dot4`"),
        ("static constexpr int max_dense_input", "needs `max_dense_input`"),
        ("using DenseBlock", "needs `DenseBlock`"),
    ],
)
def test_an_incomplete_instruction_set_is_told_what_it_lacks(member, message):
    members = {
        "using DenseBlock": "using DenseBlock = VectorBlock<Mine>;",
        "static Int dot4(Int acc, Int, Int)": "static Int dot4(Int acc, Int, Int) { return acc; }",
        "static constexpr int max_dense_input": "static constexpr int max_dense_input = 127;",
    }
    text = """
        #include "cpu/sets/four_lanes.h"
        #include "cpu/sets/generic.h"
        namespace qcfs::cpu {
        struct FourLanesAlone {  // as FourLanes, without what is tested here
          static constexpr int lanes = 4, block_vectors_16 = 4, block_vectors_8 = 4, analog_vectors = 2;
          static constexpr int dense_vectors = 4, dense_rows = 6;
          static constexpr bool interleaves = false;
          using Int = VectorTypes<lanes>::Int;
          static Int dot2(Int acc, Int, Int) { return acc; }
          static constexpr auto list_bytes = FourLanes::list_bytes;
        };
        namespace {
        struct Mine : FourLanesAlone { %s };
        constexpr KernelSet kernels = make_kernel_set<Mine>("mine", 0);
        }
        }
    """
    assert compile_text(text % " ".join(members.values())).returncode == 0
    done = compile_text(text % " ".join(code for name, code in members.items() if name != member))
    assert done.returncode != 0
    assert message in done.stderr


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
