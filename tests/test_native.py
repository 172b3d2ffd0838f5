"""The kernels alone, without Python or torch: sanitizers, guard pages, threads (tests/native).

And what files with instruction-set flags may not do. Of an inline function or a template that several files use, the
linker keeps any one copy: by the one-definition rule all are equal. If it keeps a copy that was compiled for AVX-512,
the other files call that one, and an older processor stops there. So such a file may define nothing but its table.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest

from qcfs_fast import backend
from qcfs_fast.operators import limits

pytestmark = pytest.mark.native
SOURCE = Path(__file__).resolve().parent.parent
ARM_COMPILER = "aarch64-linux-gnu-g++"
X86 = platform.machine().lower() in ("x86_64", "amd64")
X86_FLAGS = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]


def cmake(*arguments):
    if shutil.which("cmake") is None:
        pytest.fail("these tests build with cmake; make test installs it")
    done = subprocess.run(["cmake", *map(str, arguments)], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def configure(folder, sanitizer, *options):
    """The project's own CMake, with the test program in place of the Python modules."""
    cmake("-S", SOURCE, "-B", folder, f"-DQCFS_FAST_SANITIZE={sanitizer}", "-DQCFS_FAST_CUDA=off", *options)


def build(tmp_path_factory, sanitizer, *options, targets=("differential",)):
    """The folder with the programs."""
    folder = tmp_path_factory.mktemp(sanitizer.replace(",", "-"))
    if sanitizer != "none":  # of the sets that this machine cannot run, the checks would only be compiled
        options += (f"-DQCFS_FAST_KERNEL_SETS={';'.join(sorted(host_kernels()))}",)
    configure(folder, sanitizer, "-DQCFS_FAST_WERROR=ON", *options)
    cmake("--build", folder, "--target", *targets, "-j2")
    return folder


def run(command, seed, cases, threads, kernels):
    done = subprocess.run([*command, str(seed), str(cases), str(threads)], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "ERROR" not in done.stderr
    assert "runtime error" not in done.stderr
    rate, ties, engines, names = re.search(r"rate ([\d.]+) ties (\d+) engines (\d+) kernels (.+)", done.stdout).groups()
    assert 0.05 < float(rate) < 0.95
    assert int(ties) > 0
    assert int(engines) == 5  # events, dense, table, depthwise, grouped
    assert set(names.split()) == kernels


def host_kernels():
    names = {name for name, _ in backend.kernel_sets()}
    return names | {"amx"} if "avx512vnni" in names else names  # tiles are emulated


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """The programs under the sanitizers of addresses and of undefined behaviour."""
    targets = ("differential", "hostile_files")
    return build(tmp_path_factory, "address,undefined", "-DQCFS_FAST_LIBQCFS=ON", targets=targets)


@pytest.mark.slow
def test_address_and_undefined_behaviour(checked):
    run([checked / "differential"], seed=1, cases=400, threads=1, kernels=host_kernels())
    run([checked / "differential"], seed=2, cases=100, threads=3, kernels=host_kernels())


@pytest.mark.slow
def test_damaged_files(checked):
    """Saved networks cut off at every length, bytes flipped, the header altered (tests/native/hostile_files.cpp)."""
    files = sorted((SOURCE / "tests" / "data").glob("*.safetensors"))
    command = [checked / "hostile_files", "1", "600", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(files)
    for line in lines:
        whole, ran, cut, changed, changed_ran = map(int, re.findall(r"\d+", line))
        assert (whole, ran, cut) == (1, 1, 0)
        assert 30 < changed_ran <= changed < 570


@pytest.mark.slow
def test_threads(tmp_path_factory):
    programs = build(tmp_path_factory, "thread", "-DQCFS_FAST_LIBQCFS=ON", targets=("differential", "shared_network"))
    run([programs / "differential"], seed=3, cases=150, threads=4, kernels=host_kernels())
    files = sorted((SOURCE / "tests" / "data").glob("*.safetensors"))
    command = [programs / "shared_network", "12", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["calls", "48"]] * len(files)


def compile_text(text):
    """Check a C++ text as the kernels are compiled, for the widest instruction sets."""
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unused"]
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    command += ["-fsyntax-only", f"-I{SOURCE / 'csrc'}", *python, *(X86_FLAGS if X86 else []), "-x", "c++", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)


def test_limits_of_the_kernels_are_those_of_python():
    n = backend.native.module
    assert n.MAX_PRODUCTS == n.MAX_RESIDUALS == limits.MAX_SOURCES
    for name in ("MAX_EXTENT", "MAX_ELEMENTS", "MAX_POOL_WINDOWS", "MAX_STATED", "MAX_HELD"):
        assert getattr(n, name) == getattr(limits, name)


@pytest.mark.slow
def test_headers_stand_alone():
    """Every header has a guard and all its includes."""
    headers = sorted((SOURCE / "csrc").rglob("*.h"))
    assert len(headers) > 40
    for path in headers:
        if path.name.startswith("x86_") and not X86:
            continue
        include = f'#include "{path.relative_to(SOURCE / "csrc")}"\n'
        done = compile_text(2 * include)
        assert done.returncode == 0, done.stderr[:2000]


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
          static constexpr auto compress = FourLanes::compress;
          static constexpr auto store_bytes = FourLanes::store_bytes;
          template <typename Byte>
          static Int widen_bytes(const Byte* p) { return FourLanes::widen_bytes(p); }
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


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(ARM_COMPILER) is None or shutil.which("qemu-aarch64") is None,
    reason=f"needs {ARM_COMPILER} and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_arm64(tmp_path_factory):
    """NEON, cross-compiled and emulated: on a processor with dot products and on one without."""
    program = build(
        tmp_path_factory, "none", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={ARM_COMPILER}", "-DCMAKE_EXE_LINKER_FLAGS=-static",
    ) / "differential"  # fmt: skip
    run(["qemu-aarch64", "-cpu", "max", program], seed=4, cases=300, threads=2, kernels={"neondot", "neon"})
    run(["qemu-aarch64", "-cpu", "cortex-a53", program], seed=5, cases=300, threads=1, kernels={"neon"})


# ------------------------------------------------------------------------- files with instruction-set flags

# Types, macros and intrinsics: nothing of which the program could keep a copy.
HARMLESS = {"arm_neon.h", "cassert", "cstddef", "cstdint", "emmintrin.h", "immintrin.h", "type_traits"}


@pytest.fixture(scope="module")
def flagged(tmp_path_factory):
    """The files that CMake compiles with flags of an instruction set, each with its command."""
    folder = tmp_path_factory.mktemp("commands")
    configure(folder, "none", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    listed = json.loads((folder / "compile_commands.json").read_text())
    commands = {Path(c["file"]): shlex.split(c["command"]) for c in listed}
    found = {path: words for path, words in commands.items() if any(re.match("-m(avx|amx|arch)", w) for w in words)}
    # One a kernel set, but for the one that any processor of the family runs.
    assert {path.stem for path in found} == {name for name, _ in backend.native.module.kernel_sets()[:-1]}
    return found


def includes(path):
    """Names in angle brackets, of a file and of all that it includes."""
    seen, names, left = set(), set(), [path]
    while left:
        path = left.pop()
        if path not in seen:
            seen.add(path)
            text = path.read_text()
            names |= set(re.findall(r"#include\s*<([^>]+)>", text))
            left += [SOURCE / "csrc" / name for name in re.findall(r'#include\s*"([^"]+)"', text)]
    return names


def test_files_with_instruction_set_flags_include_no_library_code(flagged, tmp_path):
    for path in flagged:
        names = includes(path)
        assert names & {"immintrin.h", "arm_neon.h"}  # includes were found
        assert names <= HARMLESS, path
    for header in ("vector", "string", "algorithm"):
        (tmp_path / "set.cpp").write_text(f"#include <immintrin.h>\n#include <{header}>\n")
        assert not includes(tmp_path / "set.cpp") <= HARMLESS


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nm") is None, reason="needs nm of GNU binutils")
def test_files_with_instruction_set_flags_define_only_their_table(flagged, tmp_path):
    """Without optimisation, so that nothing is inlined: every function that could be shared shows."""

    def symbols(words, source, name):
        out = tmp_path / f"{name}.o"
        words = [w for w in words if w != "-DQCFS_EMULATE_TILES"]
        words[words.index("-o") + 1], words[words.index("-c") + 1] = str(out), str(source)
        subprocess.run([*words, "-O0", "-w"], check=True, timeout=300)
        nm = ["nm", "-C", "--defined-only", "--extern-only", str(out)]
        listed = subprocess.run(nm, capture_output=True, text=True, check=True).stdout
        return [line.split(maxsplit=2)[2] for line in listed.splitlines()]

    for path, words in flagged.items():
        assert symbols(words, path, path.stem) == [f"qcfs::cpu::{path.stem}_kernels"]
    wrong = tmp_path / "wrong.cpp"
    wrong.write_text("inline int shared(int x) { return x + 1; }\nint (*use)(int) = shared;\n")
    assert "shared(int)" in symbols(words, wrong, "wrong")
