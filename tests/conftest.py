"""What holds for every test."""

import ctypes
import gc
import mmap
import os
from pathlib import Path

# Both are read once, when Triton and torch are first imported, which other packages may trigger. Triton interprets its
# kernels. Threads of torch that wait sleep: two workers have more threads than cores, and those that spin keep the
# others from the work that they wait for, at up to three times the processor time.
os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# The files that take longest, the longest first: workers take files in this order, and the last ones to be taken, which
# leave a worker waiting for another, are short.
LONGEST = [
    "native", "triton_compile", "libqcfs", "cuda_emulation", "cuda_ptx", "conversion", "random_networks", "demo",
    "examples", "training", "interrupts", "triton", "spiking_layer", "torch_integration", "command_line", "simulation",
    "installation", "tooling", "fuzz",
]  # fmt: skip
STATM = Path("/proc/self/statm")
_kept = [0]


def resident():
    """Bytes of this process in memory; 0 where that is not known."""
    return int(STATM.read_text().split()[1]) * mmap.PAGESIZE if STATM.exists() else 0


def pytest_collection_modifyitems(items):
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(autouse=True)
def networks_let_go():
    """Graphs of torch.fx are cycles; without this a worker keeps gigabytes of networks until Python looks.

    What is free then glibc keeps, beneath something small that is not, and the next network would lie above it.
    """
    yield
    if resident() > _kept[0] + 2**28:
        gc.collect()
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
        _kept[0] = resident()


@pytest.fixture(autouse=True)
def threads_as_before():
    """A test may set the number of threads; those after it see none of that."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
