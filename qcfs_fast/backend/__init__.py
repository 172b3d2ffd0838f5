"""Who runs an operator: the CPU kernels, CUDA, Triton or plain torch, chosen by choice.py, run by one protocol.

`qcfs_fast.backend.force(...)` chooses for a block; docs/backends.md describes the order and every override.
"""

from . import native, registration
from .choice import ENGINES, absence, describe, describe_gpu, force, gpu_backend, kernel_set, settings
from .native import kernel_sets

__all__ = [
    "ENGINES",
    "absence",
    "describe",
    "describe_gpu",
    "force",
    "gpu_backend",
    "kernel_set",
    "kernel_sets",
    "native",
    "registration",
    "settings",
]
