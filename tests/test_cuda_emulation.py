"""The CUDA kernels, run on the CPU: index arithmetic, copies, barriers, tensor-core fragments and all.

First against plain loops in C++ under ASan and UBSan, then, through the same Python launchers that a GPU would
use, against the CPU kernels. Each mutation of the kernels' source must be noticed.
"""

import os
import shutil
import subprocess
from types import SimpleNamespace

import emulated_cuda
import pytest
import torch
from torch import nn

import qcfs_fast
from qcfs_fast import cuda_backend, ops

pytestmark = pytest.mark.skipif(emulated_cuda.compiler is None, reason="g++ is not installed")
SANITIZER = {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}


def run(program, seed, layers):
    return subprocess.run(
        [str(program), str(seed), str(layers)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, **SANITIZER},
    )


@pytest.fixture(scope="session")
def checked(tmp_path_factory):
    """The C++ test with ASan and UBSan."""
    return emulated_cuda.build_test(tmp_path_factory.mktemp("checked"))


def test_kernels_against_plain_loops(checked):
    totals = {}
    for seed in (1, 2, 3):
        result = run(checked, seed, 40)
        assert result.returncode == 0, result.stdout + result.stderr
        words = result.stdout.split()
        for name, value in zip(words[0::2], words[1::2], strict=True):
            totals.setdefault(name, []).append(float(value))
    assert all(0.05 < rate < 0.95 for rate in totals.pop("rate")), "the test is void: silent or saturated neurons"
    sums = {name: sum(values) for name, values in totals.items()}
    assert sums["layers"] == 120
    # Every path was taken, and thresholds were met exactly (>= and > differ).
    least = {
        "ties": 500, "tensor": 30, "direct": 30, "split": 8, "several": 8, "long": 20, "counted": 15, "extreme": 8,
        "wide": 5, "small": 8, "counts": 8, "other": 120,
    }  # fmt: skip
    assert {n: sums[n] for n in least if sums[n] < least[n]} == {}


# One line of the kernels changed, as a slip of the pen would.
MUTATIONS = {
    "swizzle of the copy only": (
        "kernels/conv_if.h",
        "stage + chunk_offset(row, column);",
        "stage + row * 64 + column * 16;",
    ),
    "row of the second fragment half": ("kernels/conv_if.h", "lane / 4 + r / 2 * 8", "lane / 4 + r / 2 * 4"),
    "no wait for the copies": ("kernels/conv_if.h", "copies_wait<stages - 2>();", "copies_wait<stages - 1>();"),
    "no barrier": ("kernels/conv_if.h", "    __syncthreads();    // everyone's", "    // everyone's"),
    "strict comparison": ("../core/neuron.h", "v >= threshold;", "v > threshold;"),
    "pixel column past the edge": ("kernels/conv_if.h", "x >= 0 && x < q.width;", "x >= 0 && x <= q.width;"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_noticed(mutation, tmp_path):
    path, old, new = MUTATIONS[mutation]
    csrc = tmp_path / "csrc"
    shutil.copytree(emulated_cuda.ROOT / "csrc", csrc)
    file = csrc / "cuda" / path
    text = file.read_text()
    assert text.count(old) == 1, f"{mutation}: the line to mutate is gone; choose another"
    file.write_text(text.replace(old, new))
    # No sanitizer: the comparison itself must notice.
    program = emulated_cuda.build_test(tmp_path / "build", csrc, ["-O0"])
    result = run(program, 1, 60)
    assert result.returncode == 1
    assert "FAILED: conv_if" in result.stdout


# --------------------------------------------------------------------------- through the Python launchers


@pytest.fixture(scope="session")
def emulated_module(tmp_path_factory):
    return emulated_cuda.build_module(tmp_path_factory.mktemp("module"))


@pytest.fixture
def launchers(emulated_module, monkeypatch):
    """torch.ops.qcfs_fast, with every operator going through the CUDA launchers; counts the calls."""
    monkeypatch.setattr(cuda_backend, "module", emulated_module)
    monkeypatch.setattr(cuda_backend, "_where", lambda x: (0, 0))
    monkeypatch.setattr(cuda_backend, "_capturing", lambda: False)
    monkeypatch.setattr(cuda_backend, "_packed", {})
    cuda_backend._window_table.cache_clear()
    calls = {}

    def through(name):
        def call(*args):
            out = getattr(ops, f"_fake_{name}")(*args)
            for t in out if isinstance(out, tuple) else (out,):
                t.fill_(77)  # what a kernel leaves unwritten must show
            getattr(cuda_backend, name)(out, *args)
            calls[name] = calls.get(name, 0) + 1
            return out

        return call

    namespace = SimpleNamespace(**{name: through(name) for name in ops.NAMES})
    yield SimpleNamespace(ops=namespace, calls=calls)
    cuda_backend._window_table.cache_clear()


def net():
    """Convolutions with a projection shortcut, a depthwise layer, both poolings, count planes and a linear layer."""
    torch.manual_seed(3)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(2))
            self.a = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1, stride=2), nn.ReLU())
            self.b = nn.Conv2d(24, 24, 3, padding=1)
            self.short = nn.Conv2d(16, 24, 1, stride=2)
            self.relu = nn.ReLU()
            self.depthwise = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.ReLU())
            self.c = nn.Sequential(nn.Conv2d(24, 40, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.head = nn.Sequential(nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 10))

        def forward(self, x):
            x = self.stem(x)
            x = self.relu(self.b(self.a(x)) + self.short(x))
            return self.head(self.c(self.depthwise(x) + x))

    return Net()


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("T", [1, 4, 10])
def test_a_network_through_the_launchers(launchers, monkeypatch, bits, T):
    model = qcfs_fast.prepare(net(), levels=4)
    images = torch.randn(2, 3, 16, 16)
    qcfs_fast.calibrate(model, [images], progress=False)
    snn = qcfs_fast.convert(model, T=T, weight_bits=bits, input_shape=(3, 16, 16))
    want_traces = {}
    want = snn.run(images, T, per_step=True, watch=lambda n, layer, v: want_traces.update({n: v}))
    monkeypatch.setattr(torch.ops, "qcfs_fast", launchers.ops)
    traces = {}
    got = snn.run(images, T, per_step=True, watch=lambda n, layer, v: traces.update({n: v}))
    assert torch.equal(want, got)
    rates = []
    for name, layer in snn.spiking_layers.items():
        assert torch.equal(want_traces[name], traces[name]), name
        bits_set = sum(float(((traces[name][t // 8] >> (t % 8)) & 1).float().mean()) for t in range(T)) / T
        rates.append(bits_set)
        assert layer is not None
    assert 0.05 < sum(rates) / len(rates) < 0.95
    assert launchers.calls["conv2d_if"] >= 4
    assert {"quantize_input", "conv2d_encode", "pool", "count", "readout"} <= set(launchers.calls)
    # Half inputs and other memory formats are the same image.
    half = images.half()
    cpu_half = snn(half)
    assert torch.equal(cpu_half, snn(half.to(memory_format=torch.channels_last)))


def test_packed_weights_follow_the_weight(launchers):
    """Packed once while the tensor lives, again after an in-place change, forgotten with it."""
    torch.manual_seed(0)
    weight = torch.randint(-300, 300, (3, 3, 32, 16), dtype=torch.int16)
    x = torch.randint(0, 256, (1, 1, 5, 5, 32), dtype=torch.uint8)
    bias, threshold = torch.full((16,), 40, dtype=torch.int32), torch.full((16,), 1000, dtype=torch.int32)
    geometry = [3, 3, 1, 1, 1, 1, 1, 1, 1]

    def both(weight):
        args = ([x], [weight], geometry, [], [], None, bias, threshold, 4)
        return launchers.ops.conv2d_if(*args), torch.ops.qcfs_fast.conv2d_if(*args)

    got, first = both(weight)
    assert torch.equal(got, first)
    packed = cuda_backend._packed[id(weight)][2]
    both(weight)
    assert cuda_backend._packed[id(weight)][2] is packed
    weight.neg_()
    got, second = both(weight)
    assert torch.equal(got, second)
    assert not torch.equal(first, second)
    assert cuda_backend._packed[id(weight)][2] is packed  # the same memory: captured graphs read it
    with torch.inference_mode():
        frozen = torch.randint(-300, 300, (3, 3, 32, 16), dtype=torch.int16)
        for _ in range(2):
            args = ([x], [frozen], geometry, [], [], None, bias, threshold, 4)
            assert torch.equal(launchers.ops.conv2d_if(*args), torch.ops.qcfs_fast.conv2d_if(*args))
            frozen.neg_()
    assert id(frozen) not in cuda_backend._packed
    del weight
    assert cuda_backend._packed == {}


def test_nan_raises_as_on_the_cpu(launchers):
    x = torch.zeros(2, 3, 4, 4)
    x[1, 2, 3, 1] = float("nan")
    args = (x, torch.arange(3), torch.ones(3), torch.zeros(3))
    with pytest.raises(ValueError, match="NaN or infinity") as gpu:
        launchers.ops.quantize_input(*args)
    with pytest.raises(ValueError, match="NaN or infinity") as cpu:
        torch.ops.qcfs_fast.quantize_input(*args)
    assert str(gpu.value) == str(cpu.value)


def test_too_many_sources_use_the_reference(launchers):
    torch.manual_seed(1)
    residual = [torch.randint(0, 16, (1, 2, 3, 3, 8), dtype=torch.uint8) for _ in range(20)]
    amplitude = [torch.randint(0, 90, (8,), dtype=torch.int32) for _ in residual]
    threshold = torch.full((8,), 1000, dtype=torch.int32)
    args = ([], [], [], residual, amplitude, None, torch.zeros(8, dtype=torch.int32), threshold, 4)
    assert torch.equal(launchers.ops.conv2d_if(*args), torch.ops.qcfs_fast.conv2d_if(*args))


def test_a_cuda_error_names_the_operator_and_shapes(launchers, monkeypatch):
    def broken(*args):
        raise RuntimeError("pool: an illegal memory access was encountered")

    monkeypatch.setattr(cuda_backend, "module", SimpleNamespace(pool=broken))
    x = torch.zeros((1, 2, 4, 4, 3), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"qcfs_fast::max_pool: .*illegal.*uint8 \[1, 2, 4, 4, 3\] on cpu"):
        launchers.ops.max_pool(x, [0, 2, 1], [0, 2, 1])
