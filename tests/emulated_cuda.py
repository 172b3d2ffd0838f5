"""Builds the CUDA backend for the CPU (csrc/cuda/emulation) with g++: the C++ test, or a module for Python.

The C++ test can also be one that runs PTX (tests/ptx) in place of the kernels' C++.
"""

import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
UNITS = [f"cuda/{name}.cu" for name in ("conv_if_1", "conv_if_2", "conv_if_4", "conv_if_8", "cuda")]
UNITS.append("cuda/emulation/emulation.cpp")
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra", "-Werror"]
SANITIZE = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]

compiler = shutil.which("g++")
nvcc = shutil.which("nvcc")


def _run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stderr}"


def compile_all(sources, folder, flags, csrc=CSRC):
    """One object of each source, two at a time; returns them by the sources' names."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = list(sources)
    objects = {Path(s).name: folder / f"{Path(s).name}.o" for s in sources}
    commands = [
        [compiler, *FLAGS, *flags, f"-I{csrc}", "-x", "c++", "-c", s, "-o", objects[Path(s).name]] for s in sources
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_run, commands))
    return objects


def link(objects, output, *flags):
    _run([compiler, *objects.values(), *flags, "-o", output])
    return output


def test_objects(folder, flags):
    """The kernels, the emulation and the C++ test."""
    return compile_all([*(CSRC / u for u in UNITS), ROOT / "tests/native/cuda.cpp"], folder, flags)


def ptx_test(folder):
    """The C++ test, whose launches go to the kernels in the PTX files that QCFS_PTX names.

    AddressSanitizer watches memory, which the PTX machine asks it about; the code itself needs no instructions of it.
    """
    flags = ["-O1", f"-I{ROOT / 'tests/native'}"]
    objects = test_objects(folder, flags) | compile_all((ROOT / "tests/ptx").glob("*.cpp"), folder, flags)
    return link(objects, folder / "ptx_test", "-fsanitize=address", "-rdynamic", "-ldl")


def write_ptx(unit, architecture, folder):
    """What nvcc makes of one of UNITS for sm_`architecture`, before ptxas: a file of PTX."""
    path = folder / f"{unit}.{architecture}.ptx"
    wgmma = ["-DQCFS_FAST_WGMMA"] if architecture == "90a" else []
    command = [nvcc, "-ptx", "-std=c++17", "-O3", *wgmma, f"-I{CSRC}", f"-arch=compute_{architecture}"]
    _run([*command, CSRC / f"cuda/{unit}.cu", "-o", path])
    return path


def build_module(folder):
    """The backend's Python module, running its kernels on host memory."""
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    flags = ["-O1", "-fvisibility=hidden", "-DQCFS_CUDA_MODULE=_cuda_emulated", *includes]
    objects = compile_all([CSRC / "cuda/bindings.cpp", *(CSRC / u for u in UNITS)], folder, flags)
    path = link(objects, folder / "_cuda_emulated.so", "-shared")
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
