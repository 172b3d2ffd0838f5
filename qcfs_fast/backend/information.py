"""info: what this installation is and which kernels it would run."""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..version import __version__
from . import choice, native


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
    built = [name for name, _ in native.module.kernel_sets()] if native.module else []
    return {
        "qcfs_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version_of("torchvision"),
        "triton": choice.triton_version(),
        "machine": platform.machine(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "thread pool": native.thread_pool,
        "native module": "loaded" if native.module else f"absent ({native.error}); operators run through plain torch",
        "kernel sets built": built,
        "kernel sets this processor runs": [name for name, _ in native.kernel_sets()],
        "QCFS_FAST_MAX_ISA": choice.isa_cap or "not set",
        "kernels in use (cpu)": choice.describe(),
        "QCFS_FAST_ENGINE": choice.settings().engine,
        "QCFS_FAST_BACKEND": choice.settings().gpu,
        "gpu devices": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "gpu backends": choice.describe_gpu(),
    }
