"""Which kernels run: the native CPU module, the instruction sets it may use, and the fallback.

Environment (read at import):
    QCFS_FAST_MAX_ISA   caps the instruction set of the CPU kernels: portable, avx2 or avx512.
    QCFS_FAST_BACKEND   "reference" runs every operator through plain torch (slow, exact); "cuda" insists on these
                        kernels for tensors on a GPU instead of taking the best that loads.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

native: Any = None
native_error = ""
try:
    native = importlib.import_module("._cpu", __package__)
except ImportError as error:  # a source tree that was not built: the reference still works
    native_error = str(error)

LEVELS = ("portable", "avx2", "avx512")
GPU_BACKENDS = ("cuda",)  # best first; each is a module <name>_backend
BACKENDS = ("auto", *GPU_BACKENDS, "reference")


def _level_mask(level: str) -> int:
    if native is None or level == "portable":
        return 0
    avx2 = int(native.ISA_AVX2)
    return avx2 if level == "avx2" else avx2 | int(native.ISA_AVX512)


def capped_isa(cap: str, host: int) -> int:
    """The instruction sets of `host` allowed under `cap` ("" = no cap); warns when the host has less."""
    if cap == "":
        return host
    if cap not in LEVELS:
        raise ValueError(f"QCFS_FAST_MAX_ISA={cap!r} is unknown; known levels: {', '.join(LEVELS)}")
    mask = _level_mask(cap)
    if mask & ~host:
        warnings.warn(f"QCFS_FAST_MAX_ISA={cap} is above this processor; using what it has", stacklevel=2)
    return host & mask


def _chosen_backend() -> str:
    name = os.environ.get("QCFS_FAST_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"QCFS_FAST_BACKEND={name!r} is unknown; known backends: {', '.join(BACKENDS)}")
    return name


host_isa = int(native.host_isa()) if native is not None else 0
isa_cap = os.environ.get("QCFS_FAST_MAX_ISA", "")
isa = capped_isa(isa_cap, host_isa)
use_reference = native is None or _chosen_backend() == "reference"


@contextlib.contextmanager
def force(isa_mask: int | None = None, reference: bool | None = None) -> Iterator[None]:
    """For tests and comparisons: run with another instruction-set mask, or through the reference."""
    global isa, use_reference
    saved = (isa, use_reference)
    if isa_mask is not None and isa_mask & ~host_isa:
        raise ValueError("this processor lacks some of the instruction sets asked for")
    isa = saved[0] if isa_mask is None else isa_mask
    use_reference = saved[1] if reference is None else reference
    try:
        yield
    finally:
        isa, use_reference = saved


def kernel_sets() -> list[tuple[str, int]]:
    """Name and required ISA mask of each native kernel set that this processor can run, best first."""
    if native is None:
        return []
    return [(str(name), int(mask)) for name, mask in native.kernel_sets() if not int(mask) & ~host_isa]


def describe() -> str:
    """One word for what runs: the kernel set's name, or "reference"."""
    if use_reference or native is None:
        return "reference"
    return str(native.chosen_kernel_set(isa))


@functools.cache
def _load_gpu_backend() -> tuple[Any, str]:
    """The first GPU backend that runs here, or None, and in words what was found."""
    chosen = _chosen_backend()
    names = GPU_BACKENDS if chosen == "auto" else tuple(n for n in GPU_BACKENDS if n == chosen)
    problems = []
    for name in names:
        module = importlib.import_module(f".{name}_backend", __package__)
        problem = str(module.unavailable())
        if problem == "":
            return module, name
        problems.append(problem)
    if chosen in GPU_BACKENDS:
        raise RuntimeError(f"QCFS_FAST_BACKEND={chosen}: {problems[0]}")
    return None, "; ".join([*problems, "operators run through plain torch"])


def gpu_backend() -> Any:
    """The module whose functions run operators on GPU tensors, loaded at first use; None: plain torch does."""
    if use_reference and native is not None:
        return None
    return _load_gpu_backend()[0]


def describe_gpu() -> str:
    """What runs on a GPU, or why nothing native does."""
    try:
        return _load_gpu_backend()[1]
    except RuntimeError as error:
        return str(error)
