"""backend: who runs an operator.

    registration.py  every operator as a torch operator, and the way to a backend
    choice.py        which kernels run: settings, `force`, the order of GPU backends
    protocol.py      plan, pack, run
    packing.py       the one cache of packed weights
    native.py        the native CPU module and what the processor can do
    cpu.py, cuda.py, triton/  the backends; plain torch is operators/reference.py
    cuda_graph.py    a network as a CUDA graph
    information.py   `info`

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
