"""Which kernels run, where, and why: CPU instruction sets and engines, and the order of GPU backends.

The choice is one frozen `Settings` in a context variable. The environment sets the first one at import
(QCFS_FAST_BACKEND, QCFS_FAST_MAX_ISA, QCFS_FAST_ENGINE; docs/backends.md); `force` replaces it for the block, in this
thread or asyncio task alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import torch

from . import native

ENGINES = (
    "auto",
    "events",
    "dense",
    "table",
)  # of a spiking layer on the CPU, as they can be asked for (csrc/cpu/cpu.h)
BACKENDS = ("auto", "cuda", "triton", "reference")
GPU_ORDER = ("cuda", "triton", "reference")
OLDEST_TRITON = (3, 3)


def capped_isa(cap: str, host: int) -> int:
    """The instruction sets of `host` allowed under `cap` ("" = no cap); warns when the host has less."""
    if cap == "":
        return host
    if cap not in native.LEVELS:
        raise ValueError(f"QCFS_FAST_MAX_ISA={cap!r} is unknown; known levels: {', '.join(native.LEVELS)}")
    mask = native.level_mask(cap)
    if mask & ~host:
        warnings.warn(f"QCFS_FAST_MAX_ISA={cap} is above this processor; using what it has", stacklevel=2)
    return host & mask


def checked_engine(name: str) -> str:
    if name not in ENGINES:
        raise ValueError(f"QCFS_FAST_ENGINE={name!r} is unknown; known engines: {', '.join(ENGINES)}")
    return name


def _chosen_backend() -> str:
    name = os.environ.get("QCFS_FAST_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"QCFS_FAST_BACKEND={name!r} is unknown; known backends: {', '.join(BACKENDS)}")
    return name


@dataclass(frozen=True)
class Settings:
    """What was asked for."""

    isa: int  # mask of the instruction sets that CPU kernels may use
    engine: str  # of spiking layers on the CPU, one of ENGINES
    gpu: str  # one of BACKENDS
    reference: bool  # CPU tensors go through plain torch


isa_cap = os.environ.get("QCFS_FAST_MAX_ISA", "")
_requested = _chosen_backend()
_FROM_ENVIRONMENT = Settings(
    capped_isa(isa_cap, native.host_isa),
    checked_engine(os.environ.get("QCFS_FAST_ENGINE", "auto")),
    _requested,
    native.module is None or _requested == "reference",
)
_settings = ContextVar("qcfs_fast_settings", default=_FROM_ENVIRONMENT)
settings = _settings.get  # the settings in force here


@contextlib.contextmanager
def force(
    isa_mask: int | None = None, reference: bool | None = None, gpu: str | None = None, cpu_engine: str | None = None
) -> Iterator[None]:
    """For tests and comparisons: another instruction-set mask, the reference, a GPU backend or a CPU engine by name.

    It holds in this thread (or asyncio task) until the block ends; other threads keep their own settings.
    """
    if isa_mask is not None and isa_mask & ~native.host_isa:
        raise ValueError("this processor lacks some of the instruction sets asked for")
    if gpu is not None and gpu not in BACKENDS:
        raise ValueError(f"GPU backend {gpu!r} is unknown; known backends: {', '.join(BACKENDS)}")
    asked: dict[str, Any] = {
        "isa": isa_mask,
        "reference": reference,
        "gpu": gpu,
        "engine": None if cpu_engine is None else checked_engine(cpu_engine),
    }
    token = _settings.set(replace(settings(), **{k: v for k, v in asked.items() if v is not None}))
    try:
        yield
    finally:
        _settings.reset(token)


# ---------------------------------------------------------------------------------------------- GPU


@functools.cache
def _cuda_absence(index: int = 0) -> str:
    return str(importlib.import_module("qcfs_fast.backend.cuda").unavailable(index))


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
def _triton_absence(index: int = 0) -> str:
    reason = triton_absence(triton_version())
    if not reason:
        try:
            reason = str(importlib.import_module("qcfs_fast.backend.triton.launch").unavailable())
        except Exception as error:  # a broken installation must not break the others
            reason = f"Triton cannot be loaded ({type(error).__name__}: {error})"
    return reason


# Why a backend cannot run on a GPU (its index, by default the first's); an empty string means that it can. A backend
# joins by an entry here, in BACKENDS and GPU_ORDER, and in registration.kernels.
absence: dict[str, Callable[..., str]] = {
    "cuda": _cuda_absence,
    "triton": _triton_absence,
    "reference": lambda index=0: "",
}


def gpu_backend(index: int = 0) -> str:
    """Name of the backend that operators on tensors of a GPU use: the one asked for, or the first that can run there.

    Raises:
        RuntimeError: the backend asked for cannot run; nothing else is taken in its place.
    """
    requested = settings().gpu
    if requested == "auto":
        return next(name for name in GPU_ORDER if not absence[name](index))
    reason = absence[requested](index)
    if reason:
        raise RuntimeError(f"the {requested} backend was asked for, but {reason}")
    return requested


def triton_on_cpu() -> bool:
    """Whether CPU tensors go through the Triton kernels: asked for, and Triton runs as an interpreter."""
    return (
        settings().gpu == "triton"
        and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
        and gpu_backend() == "triton"
    )


def cpu_backend() -> str:
    """Name of the backend that operators on CPU tensors use."""
    if triton_on_cpu():
        return gpu_backend()
    return "reference" if settings().reference or native.module is None else "cpu"


def backend_on(device: torch.device) -> str:
    """Name of the backend that operators on tensors of this device use."""
    if device.type == "cpu":
        return cpu_backend()
    name = gpu_backend(device.index)
    if name != "cuda" and settings().gpu == "auto" and _cuda_built():
        _tell_once(f"qcfs_fast: {name} kernels run on {device}, since {absence['cuda'](device.index)}")
    return name


@functools.cache
def _cuda_built() -> bool:
    return importlib.util.find_spec("qcfs_fast._cuda") is not None


@functools.cache
def _tell_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def describe_gpu() -> dict[str, str]:
    """Each GPU backend for `info`: "usable" or why not, and which one would run. Of each GPU if they differ."""

    def in_use(index: int) -> str:
        try:
            return gpu_backend(index)
        except RuntimeError as error:
            return f"none: {error}"

    def of_each(state: Callable[[int], str]) -> str:
        states = [state(i) for i in range(torch.cuda.device_count() or 1)]
        alike = len(set(states)) == 1
        return states[0] if alike else "; ".join(f"GPU {i}: {text}" for i, text in enumerate(states))

    found = {name: of_each(lambda i, name=name: absence[name](i) or "usable") for name in GPU_ORDER[:-1]}  # type: ignore[misc]
    return found | {"in use": of_each(in_use)}


# ---------------------------------------------------------------------------------------------- CPU


def kernel_set() -> str:
    """Name of the CPU kernel set in use."""
    return native.kernel_set(settings().isa)


def describe() -> str:
    """One word for what runs on CPU tensors: the kernel set's name, "reference" or "triton"."""
    name = cpu_backend()
    if name == "cpu":
        return kernel_set()
    return name
