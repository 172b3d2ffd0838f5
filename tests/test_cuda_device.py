"""The CUDA backend on a real GPU against the CPU kernels, with ==. Skips where there is none.

compute-sanitizer runs this file too, see docs/cuda.md.
"""

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


@pytest.mark.parametrize("T", [1, 2, 4, 8, 33])
@pytest.mark.parametrize(("N", "size", "C", "O", "kernel", "stride"), [
    (8, 56, 64, 64, 3, 1), (2, 56, 64, 128, 3, 2), (1, 14, 256, 256, 3, 1), (1, 7, 512, 512, 3, 1),
    (3, 28, 96, 200, 1, 1), (64, 1, 4096, 1000, 1, 1), (2, 30, 128, 128, 3, 1),
])  # fmt: skip
def test_layers_of_real_networks_equal_the_cpu(T, N, size, C, O, kernel, stride):
    """Sizes at which each tile, split-K and the wide stores are chosen."""
    g = torch.Generator().manual_seed(T + size + C)
    planes = (T + 7) // 8
    x = (torch.rand((planes, N, size, size, C, 8), generator=g) < 0.15).to(torch.uint8)
    x = (x << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)
    if planes == T:
        x &= 1
    w = torch.randint(-2000, 2001, (kernel, kernel, C, O), generator=g, dtype=torch.int16)
    bias = torch.randint(-500, 2000, (O,), generator=g, dtype=torch.int32)
    threshold = torch.full((O,), 2 * int(1200 * (0.15 * kernel * kernel * C) ** 0.5), dtype=torch.int32)
    geometry = [kernel, kernel, stride, stride, kernel // 2, kernel // 2, 1, 1, 1]
    args = ([x], [w], geometry, [], [], None, bias, threshold, T)
    want = torch.ops.qcfs_fast.conv2d_if(*args)
    rate = sum(float(((want[t // 8] >> (t % 8)) & 1).float().mean()) for t in range(T)) / T
    assert 0.05 < rate < 0.95
    assert torch.equal(want, torch.ops.qcfs_fast.conv2d_if(*on_gpu(args)).cpu())


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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_input():
    snn, images = converted(4)
    want = snn(images)
    snn = snn.to("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(want, snn(images.to("cuda:1")).cpu())
    assert torch.cuda.current_device() == 0
