"""What the GPU backends do on the host, without a GPU: torch's part of it is replaced by records of what was asked.

The same is asked of real GPUs in tests/test_cuda_device.py.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch

import qcfs_fast
from qcfs_fast import backend
from qcfs_fast.backend import choice
from qcfs_fast.backend.protocol import GpuKernels
from qcfs_fast.operators import finite


@pytest.fixture
def devices(monkeypatch):
    """GPU 0 is current; yields the devices that were made current, each until its block ended."""
    entered, current = [], [0]

    @contextlib.contextmanager
    def device(index):
        entered.append(getattr(index, "index", index))
        current.append(entered[-1])
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


# ------------------------------------------------------------------------------------------ CUDA graphs


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is on GPU 1."""

    is_cuda = True
    device = torch.device("cuda:1")


@pytest.fixture
def captures(devices, monkeypatch):
    """Graphs that replay nothing; yields the device of each stream that was captured on."""
    streams = []

    class Stream:
        def __init__(self):
            self.device = torch.cuda.current_device()

        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def graph(graph, stream=None):
        streams.append(0 if stream is None else stream.device)  # torch's own is the first capture's, on GPU 0
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return streams


def gpu_images():
    return torch.randn(2, 3, 4, 4).as_subclass(OnGpu)


def test_a_graph_is_captured_on_the_device_of_its_example(captures):
    """On a stream of another device nothing is captured, and every replay returns what the capture run computed."""
    qcfs_fast.cuda_graph(lambda x, T, per_step: x * 2, gpu_images())
    assert captures == [1]


def test_a_graph_made_under_inference_mode_runs_outside(captures):
    with torch.inference_mode():
        graph = qcfs_fast.cuda_graph(lambda x, T, per_step: x * 2, gpu_images())
    images = gpu_images()
    graph(images)
    assert torch.equal(graph.input.as_subclass(torch.Tensor), images.as_subclass(torch.Tensor))


@pytest.mark.parametrize("name", ["triton", "reference"])  # those of CUDA: tests/test_cuda_emulation.py
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_a_capture_cannot_raise_is_kept(name, value, monkeypatch):
    """The flags of an image with NaN or infinity, which comes out as zeros; another sample is none the worse."""
    if name == "triton":
        pytest.importorskip("triton")
    with backend.force(gpu=name, reference=name == "reference"):
        assert choice.cpu_backend() == name
        check_flags(monkeypatch, value)


def check_flags(monkeypatch, value):
    x = torch.randn(3, 2, 5, 4)
    operands = (torch.arange(2), torch.ones(2), torch.zeros(2))
    want = torch.ops.qcfs_fast.quantize_input(x, *operands)
    bad = x.clone()
    bad[1, 1, 4, 2] = value
    monkeypatch.setattr(finite, "capturing", lambda x: True)
    with finite.kept_flags() as flags:
        torch.ops.qcfs_fast.quantize_input(x, *operands)
    finite.raise_flags(flags)
    with finite.kept_flags() as flags:
        q, exponent = torch.ops.qcfs_fast.quantize_input(bad, *operands)
    with pytest.raises(ValueError, match="NaN or infinity"):
        finite.raise_flags(flags)
    for got, before in zip((q, exponent), want, strict=True):
        assert not got[1].any()
        assert torch.equal(got[::2], before[::2])
