"""info: what this installation is and which kernels it would run."""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import backend
from ..version import __version__


def version_of(package: str) -> str | None:
    """Version of an installed package, else None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def info() -> dict[str, Any]:
    """Facts about the installation: versions, instruction sets, threads, kernels in use; plain data."""
    built = [name for name, _ in backend.native.kernel_sets()] if backend.native else []
    return {
        "qcfs_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version_of("torchvision"),
        "triton": backend.triton_version(),
        "machine": platform.machine(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "thread pool": backend.thread_pool,
        "native module": "loaded"
        if backend.native
        else f"absent ({backend.native_error}); operators run through plain torch",
        "kernel sets built": built,
        "kernel sets this processor runs": [name for name, _ in backend.kernel_sets()],
        "QCFS_FAST_MAX_ISA": backend.isa_cap or "not set",
        "kernels in use (cpu)": backend.describe(),
        "QCFS_FAST_ENGINE": backend.engine,
        "QCFS_FAST_BACKEND": backend.requested,
        "gpu devices": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "gpu backends": backend.describe_gpu(),
    }
