"""Builds the CUDA backend for the CPU (csrc/cuda/emulation) with g++: the C++ test, or a module for Python."""

import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = [f"cuda/{name}.cu" for name in ("cuda", "conv_if_1", "conv_if_2", "conv_if_4", "conv_if_8")]
FLAGS = ["-std=c++17", "-g", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra", "-Werror"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]

compiler = shutil.which("g++")


def _run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stderr}"


def build(sources, csrc, build_dir, output, flags, link=()):
    """Compile the kernels below `csrc` and further `sources`, two at a time, and link them."""
    build_dir.mkdir(parents=True, exist_ok=True)
    files = [csrc / k for k in KERNELS] + [csrc / "cuda/emulation/emulation.cpp", *sources]
    objects = [build_dir / (f.stem + ".o") for f in files]
    with ThreadPoolExecutor(2) as pool:
        commands = [
            [compiler, *FLAGS, *flags, f"-I{csrc}", "-x", "c++", "-c", f, "-o", o]
            for f, o in zip(files, objects, strict=True)
        ]
        list(pool.map(_run, commands))
    _run([compiler, *flags, *objects, *link, "-o", output])
    return output


def build_test(build_dir, csrc=ROOT / "csrc", flags=("-O1", *SANITIZE)):
    source = ROOT / "tests/cuda/emulation_test.cpp"
    return build([source], csrc, build_dir, build_dir / "emulation_test", list(flags))


def build_module(build_dir):
    """The backend's Python module, running its kernels on host memory."""
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    path = build_dir / "_cuda_emulated.so"
    flags = ["-O2", "-fvisibility=hidden", "-DQCFS_CUDA_MODULE=_cuda_emulated", *includes]
    build([ROOT / "csrc/cuda/bindings.cpp"], ROOT / "csrc", build_dir, path, flags, ["-shared"])
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
