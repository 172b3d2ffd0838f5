"""What the GPU backends do on the host, without a GPU: torch's part of it is replaced by records of what was asked.

The same is asked of real GPUs in tests/test_cuda_device.py.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from qcfs_fast.backend.protocol import GpuKernels


@pytest.fixture
def devices(monkeypatch):
    """GPU 0 is current; yields the devices that were made current, each until its block ended."""
    entered, current = [], [0]

    @contextlib.contextmanager
    def device(index):
        entered.append(index)
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    return entered


def call_on(name):
    return SimpleNamespace(device=torch.device(name), make_dense=lambda: None)


def test_an_operator_runs_with_its_operands_device_current(devices):
    """Launches go to the current device; no other one is touched, or it would get a context."""
    backend = GpuKernels("fake")
    backend.by_kind[SimpleNamespace] = lambda a: torch.cuda.current_device()
    assert backend(call_on("cuda:1")) == 1
    assert devices == [1]
    assert torch.cuda.current_device() == 0
    assert backend(call_on("cuda:0")) == 0
    assert devices == [1]
    assert backend(call_on("cpu")) == 0  # interpreted and emulated kernels
    assert devices == [1]


def test_both_gpu_backends_are_of_that_kind():
    pytest.importorskip("triton")
    from qcfs_fast.backend import registration

    assert all(isinstance(registration.kernels(name), GpuKernels) for name in ("cuda", "triton"))
