"""The native CPU module: loaded once, given torch's threads, asked what the processor can do.

A source tree that was not built has none; the reference still works, slowly.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
from pathlib import Path
from typing import Any

import torch

module: Any = None
error = ""
try:
    module = importlib.import_module("qcfs_fast._cpu")
except ImportError as reason:
    error = str(reason)


def _torch_threads() -> int:
    """Address of libtorch_cpu's torch_parallel_for, a plain C function from torch 2.10 on; 0 where there is none."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            with contextlib.suppress(OSError, AttributeError):
                function = ctypes.CDLL(str(folder / name)).torch_parallel_for
                return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


# The kernels run on torch's own threads: two pools would compete for the cores.
thread_pool = "own"
if module is not None and (_address := _torch_threads()):
    module.use_threads_of(_address)
    thread_pool = "torch"

# Caps of the instruction set, and the CPU features that each allows.
LEVELS = {
    "portable": (),
    "avx2": ("AVX2",),
    "avxvnni": ("AVX2", "AVXVNNI"),
    "avx512": ("AVX2", "AVX512"),
    "avx512vnni": ("AVX2", "AVXVNNI", "AVX512", "AVX512VNNI"),
    "amx": ("AVX2", "AVXVNNI", "AVX512", "AVX512VNNI", "AMX"),
    "neon": ("NEON",),
    "neondot": ("NEON", "NEONDOT"),
}
host_isa = int(module.host_isa()) if module is not None else 0


def level_mask(level: str) -> int:
    return 0 if module is None else sum(int(getattr(module, f"ISA_{feature}")) for feature in LEVELS[level])


def kernel_sets() -> list[tuple[str, int]]:
    """Name and required ISA mask of each native kernel set that this processor can run, best first."""
    if module is None:
        return []
    return [(str(name), int(mask)) for name, mask in module.kernel_sets() if not int(mask) & ~host_isa]


@functools.cache
def kernel_set(isa: int) -> str:
    """Name of the kernel set that runs under this mask."""
    return str(module.chosen_kernel_set(isa))
