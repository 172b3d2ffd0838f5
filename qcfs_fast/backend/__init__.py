"""Which kernels run, where, and why: CPU instruction sets, and the order of GPU backends.

docs/backends.md describes the order and every override (QCFS_FAST_BACKEND, QCFS_FAST_MAX_ISA, ...) for users;
both variables are read at import, `force` changes the choice at run time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

native: Any = None
native_error = ""
try:
    native = importlib.import_module("qcfs_fast._cpu")
except ImportError as error:  # a source tree that was not built: the reference still works
    native_error = str(error)


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
if native is not None and (_address := _torch_threads()):
    native.use_threads_of(_address)
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
# How a spiking layer runs on the CPU; the first three can be asked for (csrc/cpu/cpu.h explains them).
ENGINES = ("auto", "events", "dense", "depthwise", "grouped")
BACKENDS = ("auto", "cuda", "triton", "reference")
GPU_ORDER = ("cuda", "triton", "reference")
OLDEST_TRITON = (3, 3)


def _level_mask(level: str) -> int:
    return 0 if native is None else sum(int(getattr(native, f"ISA_{feature}")) for feature in LEVELS[level])


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


def checked_engine(name: str) -> str:
    if name not in ENGINES[:3]:
        raise ValueError(f"QCFS_FAST_ENGINE={name!r} is unknown; known engines: {', '.join(ENGINES[:3])}")
    return name


def _chosen_backend() -> str:
    name = os.environ.get("QCFS_FAST_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"QCFS_FAST_BACKEND={name!r} is unknown; known backends: {', '.join(BACKENDS)}")
    return name


host_isa = int(native.host_isa()) if native is not None else 0
isa_cap = os.environ.get("QCFS_FAST_MAX_ISA", "")
isa = capped_isa(isa_cap, host_isa)
engine = checked_engine(os.environ.get("QCFS_FAST_ENGINE", "auto"))
last_engine = ""  # of the spiking layer that ran last on the CPU
requested = _chosen_backend()
use_reference = native is None or requested == "reference"


@contextlib.contextmanager
def force(
    isa_mask: int | None = None, reference: bool | None = None, gpu: str | None = None, cpu_engine: str | None = None
) -> Iterator[None]:
    """For tests and comparisons: another instruction-set mask, the reference, a GPU backend or a CPU engine by name."""
    global isa, use_reference, requested, engine
    saved = (isa, use_reference, requested, engine)
    if isa_mask is not None and isa_mask & ~host_isa:
        raise ValueError("this processor lacks some of the instruction sets asked for")
    if gpu is not None and gpu not in ("auto", *GPU_ORDER):
        raise ValueError(f"GPU backend {gpu!r} is unknown; known backends: auto, {', '.join(GPU_ORDER)}")
    isa = saved[0] if isa_mask is None else isa_mask
    use_reference = saved[1] if reference is None else reference
    requested = saved[2] if gpu is None else gpu
    engine = saved[3] if cpu_engine is None else checked_engine(cpu_engine)
    try:
        yield
    finally:
        isa, use_reference, requested, engine = saved


# ---------------------------------------------------------------------------------------------- GPU


@functools.cache
def _cuda_absence() -> str:
    return str(importlib.import_module("qcfs_fast.backend.cuda").unavailable())


@functools.cache
def triton_version() -> str | None:
    """Version of the installed Triton, found without importing it."""
    if importlib.util.find_spec("triton") is None:
        return None
    for package in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return str(importlib.import_module("triton").__version__)


def triton_absence(version: str | None) -> str:
    """Why a Triton of this version (None: not installed) cannot be used; empty if it can."""
    oldest = ".".join(map(str, OLDEST_TRITON))
    if version is None:
        return f"Triton is not installed (pip install 'triton>={oldest}')"
    if tuple(int(v) for v in re.findall(r"\d+", version)[:2]) < OLDEST_TRITON:
        return f"Triton {version} is too old; {oldest} or newer is needed"
    return ""


@functools.cache
def _triton_absence() -> str:
    reason = triton_absence(triton_version())
    if not reason:
        try:
            reason = str(importlib.import_module("qcfs_fast.backend.triton.launch").unavailable())
        except Exception as error:  # a broken installation must not break the others
            reason = f"Triton cannot be loaded ({type(error).__name__}: {error})"
    return reason


# Why a backend cannot run here; an empty string means that it can. A backend joins by an entry here and in `operators`.
absence: dict[str, Callable[[], str]] = {
    "cuda": _cuda_absence,
    "triton": _triton_absence,
    "reference": lambda: "",
}


def gpu_backend() -> str:
    """Name of the backend that operators on GPU tensors use: the one asked for, or the first that can run.

    Raises:
        RuntimeError: the backend asked for cannot run; nothing else is taken in its place.
    """
    if requested == "auto":
        return next(name for name in GPU_ORDER if not absence[name]())
    reason = absence[requested]()
    if reason:
        raise RuntimeError(f"the {requested} backend was asked for, but {reason}")
    return requested


def triton_on_cpu() -> bool:
    """Whether CPU tensors go through the Triton kernels: asked for, and Triton runs as an interpreter."""
    return (
        requested == "triton"
        and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
        and gpu_backend() == "triton"
    )


def operators(name: str) -> Mapping[str, Callable[..., Any]]:
    """The operators of a GPU backend other than the reference, by name; arguments as in reference.py."""
    module = {"cuda": "qcfs_fast.backend.cuda", "triton": "qcfs_fast.backend.triton.launch"}[name]
    found: Mapping[str, Callable[..., Any]] = importlib.import_module(module).OPERATORS
    return found


def describe_gpu() -> dict[str, str]:
    """State of each GPU backend for `info`: "usable" or why not, and which one would run."""
    states = {name: absence[name]() or "usable" for name in GPU_ORDER if name != "reference"}
    try:
        states["in use"] = gpu_backend()
    except RuntimeError as error:
        states["in use"] = f"none: {error}"
    return states


# ---------------------------------------------------------------------------------------------- CPU


def kernel_sets() -> list[tuple[str, int]]:
    """Name and required ISA mask of each native kernel set that this processor can run, best first."""
    if native is None:
        return []
    return [(str(name), int(mask)) for name, mask in native.kernel_sets() if not int(mask) & ~host_isa]


@functools.cache
def _chosen_set(mask: int) -> str:
    return str(native.chosen_kernel_set(mask))


def kernel_set() -> str:
    """Name of the CPU kernel set in use."""
    return _chosen_set(isa)


def describe() -> str:
    """One word for what runs on CPU tensors: the kernel set's name, "reference" or "triton"."""
    if triton_on_cpu():
        return "triton"
    if use_reference or native is None:
        return "reference"
    return kernel_set()
