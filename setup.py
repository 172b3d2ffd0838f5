"""Builds the native modules through CMake and Ninja; everything else is in pyproject.toml.

torch is not needed to build: the kernels know only pointers and sizes. QCFS_FAST_CUDA (auto, on, off),
TORCH_CUDA_ARCH_LIST, CUDA_HOME and MAX_JOBS are read from the environment, here or by CMakeLists.txt.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Configures, builds and installs the CMake project into the place setuptools wants."""

    def build_extension(self, ext):
        if not any(shutil.which(c) for c in (os.environ.get("CXX", "c++"), "g++", "clang++")):
            sys.exit(
                "qcfs_fast: no C++ compiler found. Install g++ or clang++ "
                "(Debian: apt-get install g++) or set CXX, and try again."
            )
        import pybind11

        source = Path(__file__).resolve().parent
        prefix = Path(self.get_ext_fullpath(ext.name)).resolve().parent.parent
        build = Path(self.build_temp).resolve()
        # A cache of an earlier isolated build names tools of an environment that is gone.
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        configure = [
            "cmake",
            "-S",
            str(source),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_INSTALL_PREFIX={prefix}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        jobs = os.environ.get("MAX_JOBS")
        compile_ = ["cmake", "--build", str(build), *(["-j", jobs] if jobs else [])]
        for command in (configure, compile_, ["cmake", "--install", str(build)]):
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError) as e:
                sys.exit(
                    f"qcfs_fast: '{' '.join(command[:3])} ...' failed ({e}); the lines above say why. "
                    "QCFS_FAST_CUDA=off leaves the CUDA module out."
                )


setup(ext_modules=[Extension("qcfs_fast._cpu", sources=[])], cmdclass={"build_ext": CMakeBuild})
