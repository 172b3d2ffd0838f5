"""The CUDA backend on a real GPU against the CPU kernels, with ==. Skips where there is none.

compute-sanitizer runs this file too, see docs/cuda.md.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from layers import Evidence, random_case
from torch import nn

import qcfs_fast
from qcfs_fast import backend
from qcfs_fast.backend import cuda as cuda_backend
from qcfs_fast.operators.neuron import MODES

problem = "torch sees no GPU" if not torch.cuda.is_available() else cuda_backend.unavailable()
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(problem != "", reason=problem or "runs")]


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(autouse=True)
def native_cuda_kernels():
    """Whatever QCFS_FAST_BACKEND says, these tests are about the CUDA kernels."""
    with backend.force(gpu="cuda"):
        yield


def on_gpu(args, device="cuda"):
    def move(a):
        if isinstance(a, torch.Tensor):
            return a.to(device)
        return [move(v) for v in a] if isinstance(a, list) else a

    return tuple(move(a) for a in args)


def test_a_few_layers():
    """Little enough for compute-sanitizer (tools/measure_gpu.py)."""
    for seed in range(12):
        case = random_case(seed, max_pixels=6)
        got = torch.ops.qcfs_fast.conv2d_if(*on_gpu(case.operands))
        assert np.array_equal(got.cpu().numpy(), case.want.masks), f"seed {seed}"


def test_random_layers_equal_the_oracle():
    evidence = Evidence()
    for seed in range(150):
        case = random_case(seed)
        got = torch.ops.qcfs_fast.conv2d_if(*on_gpu(case.operands))
        assert np.array_equal(got.cpu().numpy(), case.want.masks), f"seed {seed}"
        evidence.add(case.want)
    evidence.check()


@pytest.mark.parametrize("mode", MODES)
def test_random_layers_of_every_mode(mode):
    evidence = Evidence()
    for seed in range(60):
        case = random_case(5000 + seed, modes=(mode,))
        operator = torch.ops.qcfs_fast.conv2d_if if case.state is None else torch.ops.qcfs_fast.conv2d_if_from
        got = operator(*on_gpu(case.operands))
        spikes, *state = got if isinstance(got, tuple) else (got,)
        assert np.array_equal(spikes.cpu().numpy(), case.want.masks), f"seed {seed}"
        assert all(np.array_equal(s.cpu().numpy(), case.want.state) for s in state), f"seed {seed}"
        evidence.add(case.want)
    evidence.check()


def layer(T, N, size, C, O, kernel, stride):
    """Operands of a layer on random masks, whose neurons are neither silent nor saturated."""
    g = torch.Generator().manual_seed(T + size + C)
    planes = (T + 7) // 8
    x = torch.zeros((planes, N, size, size, C), dtype=torch.uint8)
    for t in range(8):
        x |= (torch.rand(x.shape, generator=g) < 0.15).to(torch.uint8) << t
    if planes == T:
        x &= 1
    w = torch.randint(-2000, 2001, (kernel, kernel, C, O), generator=g, dtype=torch.int16)
    bias = torch.randint(-500, 2000, (O,), generator=g, dtype=torch.int32)
    threshold = torch.full((O,), 2 * int(1200 * (0.15 * kernel * kernel * C) ** 0.5), dtype=torch.int32)
    return (
        [x],
        [w],
        [kernel, kernel, stride, stride, kernel // 2, kernel // 2, 1, 1, 1],
        [],
        [],
        None,
        bias,
        threshold,
        T,
    )


def rate_of(masks, T):
    return sum(float(((masks[t // 8] >> (t % 8)) & 1).float().mean()) for t in range(T)) / T


@pytest.mark.parametrize("T", [1, 2, 4, 8, 33])
@pytest.mark.parametrize(("N", "size", "C", "O", "kernel", "stride"), [
    (8, 56, 64, 64, 3, 1), (2, 56, 64, 128, 3, 2), (1, 14, 256, 256, 3, 1), (1, 7, 512, 512, 3, 1),
    (3, 28, 96, 200, 1, 1), (64, 1, 4096, 1000, 1, 1), (2, 30, 128, 128, 3, 1),
])  # fmt: skip
def test_layers_of_real_networks_equal_the_cpu(T, N, size, C, O, kernel, stride):
    """Sizes at which each tile, split-K and the wide stores are chosen."""
    args = layer(T, N, size, C, O, kernel, stride)
    want = torch.ops.qcfs_fast.conv2d_if(*args)
    assert 0.05 < rate_of(want, T) < 0.95
    assert torch.equal(want, torch.ops.qcfs_fast.conv2d_if(*on_gpu(args)).cpu())


@pytest.mark.parametrize(("size", "C", "O", "stride"), [(56, 64, 64, 1), (28, 128, 128, 1), (14, 256, 512, 2)])
def test_large_batches_equal_the_cpu(size, C, O, stride):
    """The plans of batch 256, as the benchmark times them. Samples are independent: the CPU computes the last eight."""
    args = layer(4, 256, size, C, O, 3, stride)
    some = ([args[0][0][:, -8:].contiguous()], *args[1:])
    want = torch.ops.qcfs_fast.conv2d_if(*some)
    assert 0.05 < rate_of(want, 4) < 0.95
    assert torch.equal(want, torch.ops.qcfs_fast.conv2d_if(*on_gpu(args)).cpu()[:, -8:])


@pytest.mark.parametrize("T", [4, 8, 11, 20])
def test_count_planes_and_residuals_of_counts(T):
    """Behind an average pool; T on both sides of a launch's eight steps."""
    for C, O in ((64, 64), (48, 40), (3, 7)):
        x, w, geometry, _, _, _, bias, threshold, _ = layer(T, 2, 9, C, O, 3, 1)
        g = torch.Generator().manual_seed(T)
        counts = torch.randint(0, 256, (T, *x[0].shape[1:]), generator=g, dtype=torch.uint8)
        residual = torch.randint(0, 256, (T, 2, 9, 9, O), generator=g, dtype=torch.uint8)
        amplitude = torch.randint(-30, 31, (O,), generator=g, dtype=torch.int32)
        args = ([counts, x[0]], w * 2, geometry * 2, [residual], [amplitude], None, bias, threshold * 100, T)
        want = torch.ops.qcfs_fast.conv2d_if(*args)
        assert 0.05 < rate_of(want, T) < 0.95
        assert torch.equal(want, torch.ops.qcfs_fast.conv2d_if(*on_gpu(args)).cpu())


def test_operands_that_are_not_aligned():
    """Views that begin inside of an allocation: contiguous ones are read where they lie, others are copied."""
    for C in (64, 48):
        args = layer(4, 2, 9, C, 64, 3, 1)
        want = torch.ops.qcfs_fast.conv2d_if(*args)
        on_device = on_gpu(args)
        x = on_device[0][0]
        shifted = torch.empty(x.numel() + 1, dtype=torch.uint8, device=x.device)[1:].view(x.shape)
        wide = torch.empty((*x.shape[:-1], C + 1), dtype=torch.uint8, device=x.device)[..., 1:]
        for view in (shifted, wide):
            view.copy_(x)
            assert view.data_ptr() % 4 != 0
            assert torch.equal(want, torch.ops.qcfs_fast.conv2d_if([view], *on_device[1:]).cpu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AvgPool2d(2))
        self.a = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU())
        self.b, self.short = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(32, 64, 1, stride=2)
        self.relu = nn.ReLU()
        self.depthwise = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.ReLU())
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
        )

    def forward(self, x):
        x = self.stem(x)
        x = self.relu(self.b(self.a(x)) + self.short(x))
        return self.head(self.depthwise(x) + x)


def converted(T, bits=16):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    model = qcfs_fast.prepare(Net(), levels=4)
    qcfs_fast.calibrate(model, [images], progress=False)
    return qcfs_fast.convert(model, T=T, weight_bits=bits, input_shape=(3, 32, 32)), images


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("T", [1, 2, 4, 8, 11])
def test_a_network_equals_the_cpu(T, bits):
    snn, images = converted(T, bits)
    want, traced = snn(images, per_step=True), qcfs_fast.trace(snn, images)
    rate = sum(float(s.float().mean()) for s in traced.values()) / len(traced)
    assert 0.05 < rate < 0.95
    snn = snn.to("cuda")
    assert torch.equal(want, snn(images.cuda(), per_step=True).cpu())
    for name, s in qcfs_fast.trace(snn, images.cuda()).items():
        assert torch.equal(traced[name], s.cpu()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_inputs(dtype):
    snn, images = converted(4)
    x = images.to(dtype)
    want = snn(x)
    snn = snn.to("cuda")
    assert torch.equal(want, snn(x.cuda()).cpu())
    assert torch.equal(want, snn(x.cuda().to(memory_format=torch.channels_last)).cpu())
    with torch.inference_mode():
        assert torch.equal(want, snn(x.cuda()).cpu())


def test_several_streams():
    snn, images = converted(4)
    want = snn(images)
    snn, x = snn.to("cuda"), images.cuda()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for _ in range(5):
        for s in streams:
            with torch.cuda.stream(s):
                results.append(snn(x))
    torch.cuda.synchronize()
    assert all(torch.equal(want, r.cpu()) for r in results)


def test_a_graph_made_under_inference_mode():
    snn, images = converted(4)
    want = snn(images)
    snn = snn.to("cuda")
    with torch.inference_mode():
        graph = qcfs_fast.cuda_graph(snn, images.cuda())
    assert torch.equal(want, graph(images.cuda()).cpu())


@two_gpus
def test_graphs_on_two_devices():
    snn, images = converted(4)
    others = torch.randn_like(images)
    want, want_others = snn(images), snn(others)
    for device in ("cuda:0", "cuda:1"):
        snn = snn.to(device)
        graph = qcfs_fast.cuda_graph(snn, images.to(device))
        assert torch.equal(want, graph(images.to(device)).cpu())
        assert torch.equal(want_others, graph(others.to(device)).cpu())


@pytest.mark.parametrize("T", [4, 10])
def test_cuda_graph(T):
    snn, images = converted(T)
    others = torch.randn_like(images)
    want, want_others = snn(images), snn(others)
    assert not torch.equal(want, want_others)
    snn = snn.to("cuda")
    graph = qcfs_fast.cuda_graph(snn, images.cuda())
    for _ in range(3):
        assert torch.equal(want, graph(images.cuda()).cpu())
        assert torch.equal(want_others, graph(others.cuda()).cpu())
    graph.check()
    broken = images.clone()
    broken[1, 0, 3, 3] = float("nan")
    graph(broken.cuda())
    with pytest.raises(ValueError, match="NaN or infinity"):
        graph.check()
    with pytest.raises(ValueError, match="captured for inputs of shape"):
        graph(images[:2].cuda())


def test_nan_and_infinity_raise():
    snn, images = converted(2)
    snn = snn.to("cuda")
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = images.clone()
        bad[2, 1, 5, 5] = value
        with pytest.raises(ValueError, match="NaN or infinity"):
            snn(bad.cuda())


def test_an_empty_batch():
    snn, images = converted(4)
    assert snn.to("cuda")(images[:0].cuda(), per_step=True).shape == (4, 0, 10)


def check_reduced_overhead():
    snn, images = converted(4)
    others = torch.randn_like(images)
    want, want_others = snn(images), snn(others)
    snn = snn.to("cuda")
    compiled = torch.compile(snn, mode="reduce-overhead")
    for _ in range(4):  # warm-up, record, replay
        assert torch.equal(want, compiled(images.cuda()).cpu())
        assert torch.equal(want_others, compiled(others.cuda()).cpu())


def check_a_graph_of_triton_kernels():
    snn, images = converted(4)
    want = snn(images)
    snn, x = snn.to("cuda"), images.cuda()
    with backend.force(gpu="triton"):
        graph = qcfs_fast.cuda_graph(snn, x)
    assert torch.equal(want, graph(x).cpu())
    graph.check()
    x[1, 0, 3, 3] = float("inf")
    assert torch.equal(want[[0, 2, 3]], graph(x).cpu()[[0, 2, 3]])
    with pytest.raises(ValueError, match="NaN or infinity"):
        graph.check()


def in_a_process(code, **environment):
    """What a process of its own prints: under pytest, Triton interprets its kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "QCFS_FAST_BACKEND": "cuda", **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compiled_with_reduced_overhead():
    """Its graphs allow no call to keep memory that it allocates; the network has not run before."""
    in_a_process("import test_cuda_device as device; device.check_reduced_overhead()")


@pytest.mark.skipif(backend.absence["triton"]() != "", reason="Triton cannot run here")
def test_a_graph_of_triton_kernels_tells_of_nan():
    code = "import test_cuda_device as device; device.check_a_graph_of_triton_kernels()"
    in_a_process(code, QCFS_FAST_TRITON_TUNE="0")


def test_weights_that_go_while_another_stream_reads_them():
    """Their packed memory must not be given to what comes next on the stream that packed it."""
    args = layer(4, 64, 28, 128, 128, 3, 1)
    want = torch.ops.qcfs_fast.conv2d_if(*args)
    x, w, *rest = on_gpu(args)
    torch.ops.qcfs_fast.conv2d_if(x, w, *rest)
    other = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        torch.cuda._sleep(50_000_000)
        got = torch.ops.qcfs_fast.conv2d_if(x, w, *rest)
        w[0].record_stream(other)
    size = cuda_backend.module.packed_bytes(w[0], False)
    del w
    taken = [torch.full((size,), 1, dtype=torch.int8, device="cuda") for _ in range(4)]
    torch.cuda.synchronize()
    assert torch.equal(want, got.cpu())
    assert all(bool((t == 1).all()) for t in taken)


@two_gpus
@pytest.mark.parametrize("current", [0, 1])
def test_the_device_of_the_input(current):
    """Not the current one, which stays as it is."""
    snn, images = converted(4)
    want = snn(images)
    before = torch.cuda.current_device()
    torch.cuda.set_device(current)
    try:
        for device in ("cuda:1", "cuda:0", "cuda:1"):
            snn = snn.to(device)
            assert torch.equal(want, snn(images.to(device)).cpu())
            assert torch.cuda.current_device() == current
    finally:
        torch.cuda.set_device(before)


USES_THE_SECOND = """
import ctypes, torch, qcfs_fast
x = torch.zeros((1, 2, 4, 4, 32), dtype=torch.uint8, device="cuda:1")
w = torch.ones((3, 3, 32, 16), dtype=torch.int16, device="cuda:1")
n = torch.full((16,), 8, dtype=torch.int32, device="cuda:1")
torch.ops.qcfs_fast.conv2d_if([x], [w], [3, 3, 1, 1, 1, 1, 1, 1, 1], [], [], None, 0 * n, n, 4)
torch.cuda.synchronize(1)
driver, device = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
for index in (0, 1):
    flags, active = ctypes.c_uint(), ctypes.c_int()
    assert driver.cuDeviceGet(ctypes.byref(device), index) == 0
    assert driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active)) == 0
    print(active.value)
"""


@two_gpus
def test_the_first_gpu_gets_no_context_from_work_on_the_second():
    assert in_a_process(USES_THE_SECOND).split() == ["0", "1"]
