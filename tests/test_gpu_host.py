"""What the GPU backends do on the host, without a GPU: torch's part of it is replaced by records of what was asked.

The same is asked of real GPUs in tests/test_cuda_device.py.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from networks import lively
from torch import nn

import qcfs_fast
from qcfs_fast import backend
from qcfs_fast.backend import choice, packing, protocol
from qcfs_fast.backend.packing import PackedWeights, Packing
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


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is on GPU 1, and notes the streams that it is lent to."""

    is_cuda = True
    device = torch.device("cuda:1")

    def record_stream(self, stream):
        self.lent = [*getattr(self, "lent", []), stream.cuda_stream]


def test_packed_memory_waits_for_every_stream_that_reads_it(monkeypatch):
    """The weights may go while another stream still reads what was made of them: the allocator has to know."""
    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    weight = torch.arange(3).as_subclass(OnGpu)
    packing = Packing("fake", (weight,), lambda: (torch.arange(3).as_subclass(OnGpu),))
    cache = PackedWeights()
    for stream.cuda_stream in (7, 8, 8, 7, 9):
        (packed,) = cache.get(packing)
    assert packed.lent == [7, 8, 9]


def lasting():
    """How much is kept beyond a call: packed weights, and tables of windows that were made so far."""
    return len(protocol.packed_weights._entries), packing.window_table.cache_info().misses


def check_nothing_is_kept_by_a_call():
    """On its way to a device a network gets ready: the weights and tables that calls keep are made then."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    model = nn.Sequential(*model, nn.MaxPool2d(2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    snn = qcfs_fast.convert(lively(model, (3, 8, 8)), T=4, max_T=9, input_shape=(3, 8, 8), progress=False)
    images = torch.randn(2, 3, 8, 8)
    want = snn(images)
    packing.window_table.cache_clear()
    protocol.packed_weights._entries.clear()
    snn._apply(torch.clone)
    before = lasting()
    assert all(before)
    assert torch.equal(snn(images), want)
    snn(images[:1], 9, per_step=True)
    snn.neuron = "signed"
    snn(images, 2)
    assert lasting() == before


def test_a_network_gets_ready_when_it_is_moved(monkeypatch):
    """A call under torch.compile(mode="reduce-overhead") may keep nothing that it allocates."""
    pytest.importorskip("triton")
    monkeypatch.setattr(protocol, "packed_weights", PackedWeights())
    with backend.force(gpu="triton"):
        check_nothing_is_kept_by_a_call()


# ------------------------------------------------------------------------------------------ CUDA graphs


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
