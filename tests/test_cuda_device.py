"""The CUDA backend on a real GPU against the CPU kernels, with ==. Skips where there is none.

compute-sanitizer runs this file too, see docs/cuda.md.
"""

import pytest
import torch
from torch import nn

import qcfs_fast
from qcfs_fast import backend, cuda_backend, ops

problem = "torch sees no GPU" if not torch.cuda.is_available() else cuda_backend.unavailable()
pytestmark = pytest.mark.skipif(problem != "", reason=problem or "runs")


@pytest.fixture(autouse=True)
def native_cuda_kernels(monkeypatch):
    """Whatever QCFS_FAST_BACKEND says, these tests are about the CUDA kernels."""
    monkeypatch.setattr(backend, "gpu_backend", lambda: cuda_backend)


def spikes(shape, T, count, generator, rate=0.3):
    planes = T if count else (T + 7) // 8
    bits = torch.rand((planes, *shape, 1 if count else 8), generator=generator) < rate
    if count:
        return (bits[..., 0] * torch.randint(1, 5, (planes, *shape), generator=generator)).to(torch.uint8)
    return (bits * (1 << torch.arange(8))).sum(-1).to(torch.uint8)


def layer(seed):
    """Arguments of conv2d_if, thresholds such that neurons fire at some steps and some membranes meet them."""
    g = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=g))]

    T, O, N = pick(1, 2, 3, 4, 5, 8, 9, 17), pick(1, 8, 16, 24, 33, 64, 96, 130), pick(1, 2, 5)
    oh, ow = pick(1, 3, 7, 12), pick(1, 4, 9, 14)
    dtype = pick(torch.int16, torch.int16, torch.int8)
    grouped = pick(False, False, False, True)
    x, w, geometry = [], [], []
    for _ in range(pick(1, 1, 2, 3)):
        k, s = pick(1, 3, 5), pick(1, 2)
        groups = O if grouped else 1
        C = groups * pick(1, 2) if grouped else pick(1, 3, 8, 16, 31, 32, 64, 100)
        height, width = (oh - 1) * s + k - 2 * (k // 2), (ow - 1) * s + k - 2 * (k // 2)
        x.append(spikes((N, height, width, C), T, pick(False, False, True), g))
        step = 1 if dtype == torch.int8 else 64
        w.append((torch.randint(-4, 5, (k, k, C // groups, O), generator=g) * step).to(dtype))
        geometry += [k, k, s, s, k // 2, k // 2, 1, 1, groups]
    residual = [spikes((N, oh, ow, O), T, pick(False, True), g) for _ in range(pick(0, 1, 2))]
    unit = 256 if dtype == torch.int8 else 64
    amplitude = [(torch.randint(0, 5, (O,), generator=g) * unit).to(torch.int32) for _ in residual]
    current = (torch.randint(-3, 4, (N, oh, ow, O), generator=g) * unit).to(torch.int32) if pick(False, True) else None
    bias = (torch.randint(-2, 6, (O,), generator=g) * unit).to(torch.int32)
    threshold = (torch.randint(2, 12, (O,), generator=g) * 2 * unit).to(torch.int32)
    return (x, w, geometry, residual, amplitude, current, bias, threshold, T)


def on_gpu(args, device="cuda"):
    def move(a):
        if isinstance(a, torch.Tensor):
            return a.to(device)
        return [move(v) for v in a] if isinstance(a, list) else a

    return tuple(move(a) for a in args)


def test_random_layers_equal_the_cpu():
    fired = total = ties = 0
    for seed in range(150):
        args = layer(seed)
        want = torch.ops.qcfs_fast.conv2d_if(*args)
        got = torch.ops.qcfs_fast.conv2d_if(*on_gpu(args))
        assert torch.equal(want, got.cpu()), f"seed {seed}"
        T = args[-1]
        fired += sum(int(((want[t // 8] >> (t % 8)) & 1).sum()) for t in range(T))
        total += want[0].numel() * T
        # A threshold one unit higher (and n / 2 with it) tells neurons that met it exactly from those beyond.
        above = list(args)
        above[6], above[7] = args[6] - 1, args[7]
        ties += int((torch.ops.qcfs_fast.conv2d_if(*above)[0] & 1 != want[0] & 1).sum())
    assert 0.05 < fired / total < 0.95
    assert ties > 0


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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_input():
    snn, images = converted(4)
    want = snn(images)
    snn = snn.to("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(want, snn(images.to("cuda:1")).cpu())
    assert torch.cuda.current_device() == 0


def test_every_operator_has_a_launcher():
    assert all(callable(getattr(cuda_backend, name)) for name in ops.NAMES)
