"""The CUDA kernels, run on the CPU: index arithmetic, copies, barriers, tensor-core fragments and all.

First against plain loops in C++ under ASan and UBSan, then, through the same Python launchers that a GPU would
use, against the CPU kernels. Each mutation of the kernels' source must be noticed.
"""

import contextlib
import os
import shutil
import subprocess
from collections import Counter
from types import SimpleNamespace

import emulated_cuda
import numpy as np
import oracle
import pytest
import torch
from layers import Evidence, random_case
from test_gpu_host import check_flags, check_nothing_is_kept_by_a_call
from torch import nn

import qcfs_fast
from qcfs_fast import backend
from qcfs_fast.backend import choice, protocol
from qcfs_fast.backend import cuda as cuda_backend
from qcfs_fast.backend.packing import PackedWeights
from qcfs_fast.operators.neuron import MODES
from qcfs_fast.operators.signature import Operator, QuantizeInput

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.native,
    pytest.mark.skipif(emulated_cuda.compiler is None, reason="g++ is not installed"),
]
SANITIZER = {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}


def run(program, *arguments):
    return subprocess.run(
        [str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, **SANITIZER},
    )


@pytest.fixture(scope="session")
def checked(tmp_path_factory):
    """The C++ test with ASan and UBSan."""
    folder = tmp_path_factory.mktemp("checked")
    return emulated_cuda.link(
        emulated_cuda.test_objects(folder, ["-Og", *emulated_cuda.SANITIZE]),
        folder / "emulation_test",
        *emulated_cuda.SANITIZE,
    )


@pytest.mark.slow
def test_kernels_against_plain_loops(checked):
    totals = {}
    for seed in (2, 4):
        result = run(checked, seed, 50)
        assert result.returncode == 0, result.stdout + result.stderr
        words = result.stdout.split()
        for name, value in zip(words[0::2], words[1::2], strict=True):
            totals.setdefault(name, []).append(float(value))
    assert all(0.05 < rate < 0.95 for rate in totals.pop("rate")), "the test is void: silent or saturated neurons"
    sums = {name: sum(values) for name, values in totals.items()}
    assert sums["layers"] == 100
    # Every path was taken, and thresholds were met exactly (>= and > differ).
    least = {
        "ties": 300, "tensor": 20, "direct": 20, "split": 5, "clusters": 5, "several": 5, "long": 15, "counted": 10,
        "extreme": 5, "wide": 3, "small": 5, "counts": 5, "images": 8, "other": 80,
        "states": 5, "alone": 3, "plain": 15, "offset": 8, "masked": 8, "signed": 8, "sum": 8,
    }  # fmt: skip
    assert {n: sums[n] for n in least if sums[n] < least[n]} == {}


@pytest.fixture(scope="session")
def plain_objects(tmp_path_factory):
    """Without sanitizers: the comparison itself must notice a mutation. -O1 is the fastest to build and run."""
    return emulated_cuda.test_objects(tmp_path_factory.mktemp("plain"), ["-O1"])


# One line of the kernels changed, as a slip of the pen would.
CONV, IMAGE = "cuda/kernels/conv_if_tensor.h", "cuda/kernels/image_tensor.h"
WALK, END = "cuda/kernels/walk.h", "cuda/kernels/tile_end.h"
EPILOGUE, PARAMETERS = "cuda/kernels/epilogue.h", "cuda/kernels/parameters.h"
MUTATIONS = {
    "none": (CONV, "copies_wait<0>();", "copies_wait<0>();"),
    "swizzle of the copy only": (CONV, "tiles + chunk_offset(thread / 4, thread % 4);", "tiles + thread * 16;"),
    "row of the second fragment half": (END, "+ 8 * half + lane / 4,", "+ 4 * half + lane / 4,"),
    "half of K twice": (CONV, "lane / 8 % 2) ^ 32 * half;", "lane / 8 % 2) ^ 16 * half;"),
    "no wait for the copies": (CONV, "copies_wait<stages - 2>();", "copies_wait<stages - 1>();"),
    "no barrier": (CONV, "      __syncthreads();    // everyone's", "      // everyone's"),
    "slot refilled while it is read": (CONV, "write = (stages - 1) * Conv::bytes;", "write = 0;"),
    "no barrier within the warp": (END, "      sync_warp();\n      currents.end", "      currents.end"),
    "pixel column past the edge": (CONV, "(k.x[i] + k.dx) < static", "(k.x[i] + k.dx) <= static"),
    "weights of the next stage": (WALK, "weight += weights;", "weight += weights + 64;"),
    "second digit without its shift": (CONV, "walk.digit - before.digit)", "0)"),
    "the product of the stage": (WALK, "enter(p, product + 1, 0, rest);", "enter(p, product, 0, rest);"),
    "sign of a scale": (PARAMETERS, "from.negative != to.negative ? -1", "from.negative != to.negative ? 1"),
    "the last scale": (
        CONV,
        "multiply_sums(scale_of(p.products[walk.product]));",
        "multiply_sums(scale_of(p.products[0]));",
    ),
    "bias of the first step": (EPILOGUE, "value = from[t * step];", "value = from[t / 4 * step];"),
    "one spike too many": (EPILOGUE, "least - n + 1;", "least - n;"),
    "one spike too few": (EPILOGUE, "left >= n && spikes < window", "left >= n"),
    "masked at zero": (EPILOGUE, "more = end > 0;", "more = end >= 0;"),
    "negative spikes unpaid": (EPILOGUE, "v < 0 && sent > 0", "v < 0 && sent >= 0"),
    "membrane limit": (EPILOGUE, "v > limit ? limit", "v > 2 * limit ? limit"),
    "slices of a split": (END, "p.partial + blockIdx.z * p.steps", "p.partial + blockIdx.z / 2 * p.steps"),
    "a cluster without its barrier": (END, "    cluster_barrier();\n    currents.end", "    currents.end"),
    "a block of the cluster twice": (END, "(blockIdx.z) + block) % blocks", "(blockIdx.z) + block / 2) % blocks"),
    "a block's share of a cluster": (END, "blockIdx.z * threads + threadIdx.x, p.cluster", "threadIdx.x, p.cluster"),
    "an early copy's weights": (CONV, "if (s >= early) Conv", "if (s > early) Conv"),
    "bits of a pair's second neuron": (EPILOGUE, "- 1) * 0x101u;", "- 1) * 0x81u;"),
    "the wrong half of a residual": (EPILOGUE, "1u << (8 * k + t)", "1u << (8 * (k ^ 1) + t)"),
    "digits of the image": (IMAGE, "pick_bytes(low01, low23, 0x7632)", "pick_bytes(low01, low23, 0x7362)"),
    "channels of the image": (IMAGE, "channel / 8 * 2 + channel % 2", "channel / 8 + channel % 2 * 4"),
    "image read beyond its edge": (IMAGE, "x + piece.y < W", "x + piece.y <= W"),
    "pieces of the first stages": (IMAGE, "if ((stage + 1) % image_known_stages == 0)", "if (stage < 0)"),
    "buffer of the image filled while it is read": (IMAGE, "copies_at += to_other;", "copies_at += 0;"),
    "half a stage too few": (IMAGE, "2 * stage + half == p.half_stages", "2 * stage + half >= p.half_stages - 1"),
    "no wait for the image's weights": (IMAGE, "copies_wait<0>();", ""),
    "strict comparison": ("core/neuron.h", "v >= threshold;", "v > threshold;"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_noticed(mutation, plain_objects, tmp_path):
    path, old, new = MUTATIONS[mutation]
    csrc = tmp_path / "csrc"
    shutil.copytree(emulated_cuda.CSRC, csrc)
    text = (csrc / path).read_text()
    assert text.count(old) == 1, f"{mutation}: the line to mutate is gone; choose another"
    (csrc / path).write_text(text.replace(old, new))
    # Layers of four steps: the other units need no mutation. First in the link order, it gives the shared templates.
    unit = "cuda/cuda.cu" if path == IMAGE else "cuda/conv_if_4.cu"
    changed = emulated_cuda.compile_all([csrc / unit], tmp_path, ["-O1"], csrc)
    program = emulated_cuda.link(
        changed | {k: v for k, v in plain_objects.items() if k not in changed}, tmp_path / "mutated"
    )
    result = run(program, 1, 40, 4)
    assert result.returncode == (0 if mutation == "none" else 1), result.stdout
    assert (("FAILED: analog" if path == IMAGE else "FAILED: conv_if") in result.stdout) == (mutation != "none")


@pytest.mark.slow
@pytest.mark.parametrize("mutated", [False, True])
def test_hopper_products_of_four_warps(mutated, plain_objects, tmp_path):
    """The option QCFS_FAST_WGMMA, with the weights behind a descriptor; a wrong distance in it must be noticed."""
    csrc = tmp_path / "csrc"
    shutil.copytree(emulated_cuda.CSRC, csrc)
    text = (csrc / "cuda/device.h").read_text()
    assert text.count("{512 >> 4}") == 1
    (csrc / "cuda/device.h").write_text(text.replace("{512 >> 4}", "{256 >> 4}") if mutated else text)
    flags = ["-O1", "-DQCFS_FAST_WGMMA"]
    changed = emulated_cuda.compile_all([csrc / "cuda/conv_if_4.cu"], tmp_path, flags, csrc)
    program = emulated_cuda.link(changed | {k: v for k, v in plain_objects.items() if k not in changed}, tmp_path / "t")
    result = run(program, 2, 30, 4)
    assert result.returncode == (1 if mutated else 0), result.stdout
    assert ("FAILED: conv_if" in result.stdout) == mutated


# --------------------------------------------------------------------------- through the Python launchers


@pytest.fixture(scope="session")
def emulated_module(tmp_path_factory):
    return emulated_cuda.build_module(tmp_path_factory.mktemp("module"))


def filled(empty):
    def fill(a):
        made = empty(a)
        for t in made if isinstance(made, tuple) else (made,):
            t.fill_(77)
        return made

    return fill


@pytest.fixture
def on_cuda(emulated_module, monkeypatch):
    """A context in which torch.ops.qcfs_fast takes the path of GPU tensors, over the emulated kernels.

    The context yields a Counter of the operators called.
    """
    monkeypatch.setattr(cuda_backend, "module", emulated_module)
    monkeypatch.setattr(cuda_backend, "_where", lambda x: (0, 0))
    monkeypatch.setattr(protocol, "packed_weights", PackedWeights())
    empty = cuda_backend._empty
    monkeypatch.setattr(cuda_backend, "_empty", lambda *a: empty(*a).fill_(77))  # what stays unwritten must show
    for kind in (Operator, QuantizeInput):
        monkeypatch.setattr(kind, "empty", filled(kind.empty))
    monkeypatch.setitem(backend.absence, "cuda", lambda index=0: "")
    calls = Counter()

    def counted(kind, operator):
        def call(*args):
            calls[kind.name] += 1
            return operator(*args)

        return call

    operators = {kind: counted(kind, f) for kind, f in cuda_backend.KERNELS.by_kind.items()}

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch, backend.force(gpu="cuda"):
            patch.setattr(cuda_backend.KERNELS, "by_kind", operators)
            patch.setattr(choice, "triton_on_cpu", lambda: True)  # CPU tensors go where GPU tensors do
            yield calls

    return context


def test_random_layers_against_the_oracle(on_cuda):
    evidence = Evidence()
    with on_cuda() as calls:
        for seed in range(40):
            case = random_case(seed, max_pixels=6)
            got = torch.ops.qcfs_fast.conv2d_if(*case.operands)
            assert np.array_equal(got.numpy(), case.want.masks), f"seed {seed}"
            evidence.add(case.want)
    assert calls == {"conv2d_if": 40}
    evidence.check()


@pytest.mark.parametrize("mode", MODES)
def test_random_layers_of_every_mode(on_cuda, mode):
    """Scales, a bias and a current by step, and states come with them; T on both sides of a launch's eight steps."""
    evidence = Evidence()
    with on_cuda() as calls:
        for seed in range(24):
            linear = seed % 3 == 2
            case = random_case(3000 + seed, max_T=20, max_pixels=5, modes=(mode,), linear=linear)
            case.check("linear_if" if linear else "conv2d_if")
            evidence.add(case.want)
    assert sum(calls.values()) == 24
    assert (calls["conv2d_if_from"] > 0) == (mode in ("plain", "signed"))
    evidence.check()


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_of_the_image_alone(on_cuda, mode):
    """Its membranes are held within 32 thresholds."""
    rng = np.random.default_rng(8)
    T = 1 if mode == "sum" else 19
    n = np.full(5, 512, dtype=np.int32)
    current = rng.integers(-31 * 512, 31 * 512 + 1, (T, 2, 3, 3, 5)).astype(np.int32)
    current[:, 0] = np.abs(current[:, 0])  # reaches the limit
    settings = mode, {"offset": 6, "masked": 3, "sum": 15}.get(mode, 0), {"offset": 3, "masked": 1}.get(mode, 0)
    levels = 15 if mode == "sum" else 1
    want = oracle.fire(current.astype(np.int64) * levels, n, *settings, alone=True)
    zero = torch.zeros(5, dtype=torch.int32)
    neuron = [MODES.index(mode), *settings[1:]]
    with on_cuda():
        got = torch.ops.qcfs_fast.conv2d_if(
            [], [], [], [], [], torch.from_numpy(current), zero, torch.from_numpy(n), T, [], neuron
        )
    assert np.array_equal(got.numpy(), want.masks)


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


@pytest.mark.parametrize(("T", "bits"), [(1, 16), (4, 16), (4, 8), (10, 8), (4, 24)])
def test_a_network_through_the_launchers(on_cuda, T, bits):
    model = qcfs_fast.prepare(net(), levels=4)
    images = torch.randn(2, 3, 16, 16)
    qcfs_fast.calibrate(model, [images], progress=False)
    snn = qcfs_fast.convert(model, T=T, weight_bits=bits, input_shape=(3, 16, 16))
    want, want_traces = snn(images, per_step=True), qcfs_fast.trace(snn, images)
    rate = sum(float(s.float().mean()) for s in want_traces.values()) / len(want_traces)
    assert 0.05 < rate < 0.95
    with on_cuda() as calls:
        assert torch.equal(want, snn(images, per_step=True))
        for name, spikes in qcfs_fast.trace(snn, images).items():
            assert torch.equal(want_traces[name], spikes), name
    assert calls["conv2d_if"] >= 4
    first = "conv2d_current" if bits == 24 else "conv2d_encode"
    assert {"quantize_input", first, "pool", "count", "readout"} <= set(calls)


def test_image_layouts_and_types(on_cuda):
    """Channels last, halves and slices are images like any other."""
    torch.manual_seed(5)
    images = torch.randn(3, 4, 6, 8)
    operands = (torch.tensor([2, 0, 3]), torch.rand(3) + 0.5, torch.randn(3))
    for x in (
        images,
        images.to(memory_format=torch.channels_last),
        images.half(),
        images.bfloat16().to(memory_format=torch.channels_last),
        images.double(),
        images[1:, :, ::2, 3:],
        torch.zeros(0, 4, 6, 8),
    ):
        want = torch.ops.qcfs_fast.quantize_input(x, *operands)
        with on_cuda():
            got = torch.ops.qcfs_fast.quantize_input(x, *operands)
        assert torch.equal(want[0], got[0])
        assert torch.equal(want[1], got[1])


def test_an_empty_batch(on_cuda):
    model = qcfs_fast.prepare(net(), levels=4)
    qcfs_fast.calibrate(model, [torch.randn(2, 3, 16, 16)], progress=False)
    snn = qcfs_fast.convert(model, T=4, input_shape=(3, 16, 16))
    with on_cuda():
        assert snn(torch.randn(0, 3, 16, 16), per_step=True).shape == (4, 0, 10)


def test_packed_weights_follow_the_weight(on_cuda):
    """Packed once while the tensor lives, again after an in-place change, forgotten with it."""
    torch.manual_seed(0)
    weight = torch.randint(-300, 300, (3, 3, 32, 16), dtype=torch.int16)
    x = torch.randint(0, 256, (1, 1, 5, 5, 32), dtype=torch.uint8)
    bias, threshold = torch.full((16,), 40, dtype=torch.int32), torch.full((16,), 1000, dtype=torch.int32)
    geometry = [3, 3, 1, 1, 1, 1, 1, 1, 1]

    def both(weight):
        args = ([x], [weight], geometry, [], [], None, bias, threshold, 4)
        with on_cuda():
            got = torch.ops.qcfs_fast.conv2d_if(*args)
        return got, torch.ops.qcfs_fast.conv2d_if(*args)

    got, first = both(weight)
    assert torch.equal(got, first)
    entries = protocol.packed_weights._entries
    on_gpu = ("cuda", (id(weight),))
    packed = entries[on_gpu].packed
    both(weight)
    assert entries[on_gpu].packed is packed
    weight.neg_()
    got, second = both(weight)
    assert torch.equal(got, second)
    assert not torch.equal(first, second)
    assert entries[on_gpu].packed is packed  # the same memory: captured graphs read it
    with torch.inference_mode():
        frozen = torch.randint(-300, 300, (3, 3, 32, 16), dtype=torch.int16)
        for _ in range(2):
            assert torch.equal(*both(frozen))
            frozen.neg_()
    assert ("cuda", (id(frozen),)) not in entries
    del weight
    assert entries == {}


def test_nan_raises_as_on_the_cpu(on_cuda):
    x = torch.zeros(2, 3, 4, 4)
    x[1, 2, 3, 1] = float("nan")
    args = (x, torch.arange(3), torch.ones(3), torch.zeros(3))
    with pytest.raises(ValueError, match="NaN or infinity") as gpu, on_cuda():
        torch.ops.qcfs_fast.quantize_input(*args)
    with pytest.raises(ValueError, match="NaN or infinity") as cpu:
        torch.ops.qcfs_fast.quantize_input(*args)
    assert str(gpu.value) == str(cpu.value)


def test_a_capture_keeps_the_flag_of_nan(on_cuda, monkeypatch):
    """It cannot raise; the sample comes out as zeros."""
    with on_cuda():
        check_flags(monkeypatch, float("nan"))


def test_too_many_sources_use_the_reference(on_cuda):
    torch.manual_seed(1)
    residual = [torch.randint(0, 16, (1, 2, 3, 3, 8), dtype=torch.uint8) for _ in range(20)]
    amplitude = [torch.randint(0, 90, (8,), dtype=torch.int32) for _ in residual]
    threshold = torch.full((8,), 1000, dtype=torch.int32)
    args = ([], [], [], residual, amplitude, None, torch.zeros(8, dtype=torch.int32), threshold, 4)
    want = torch.ops.qcfs_fast.conv2d_if(*args)
    with on_cuda():
        assert torch.equal(torch.ops.qcfs_fast.conv2d_if(*args), want)


def test_a_cuda_error_names_the_operator_and_shapes(on_cuda, monkeypatch):
    def broken(*args):
        raise RuntimeError("pool: an illegal memory access was encountered")

    monkeypatch.setattr(cuda_backend, "module", SimpleNamespace(pool=broken))
    x = torch.zeros((1, 2, 4, 4, 3), dtype=torch.uint8)
    message = r"qcfs_fast::max_pool: .*illegal.*uint8 \[1, 2, 4, 4, 3\] on cpu"
    with on_cuda(), pytest.raises(RuntimeError, match=message):
        torch.ops.qcfs_fast.max_pool(x, [0, 2, 1], [0, 2, 1])


def test_nothing_is_launched_on_another_device_than_the_current_one(on_cuda, monkeypatch):
    monkeypatch.setattr(cuda_backend, "_where", lambda x: (1, 0))
    x = torch.zeros((1, 2, 4, 4, 3), dtype=torch.uint8)
    with on_cuda(), pytest.raises(RuntimeError, match="the operands are on GPU 1, but GPU 0 is the current one"):
        torch.ops.qcfs_fast.count(x, 4, False, [0, 4])


def test_a_cuda_error_of_a_linear_layer_is_told_once(on_cuda, monkeypatch):
    def broken(*args):
        raise RuntimeError("conv2d_if: an illegal memory access was encountered")

    monkeypatch.setattr(cuda_backend, "module", SimpleNamespace(SpikingLayer=broken, MAX_PRODUCTS=64, MAX_RESIDUALS=16))
    x, w = torch.zeros((1, 2, 3), dtype=torch.uint8), torch.zeros((3, 5), dtype=torch.int16)
    zero = torch.zeros(5, dtype=torch.int32)
    with on_cuda(), pytest.raises(RuntimeError) as raised:
        torch.ops.qcfs_fast.linear_if([x], [w], [], [], None, zero, zero + 2, 4)
    assert str(raised.value).count("qcfs_fast::linear_if") == 1
    assert str(raised.value).count("operands") == 1


def test_which_gpus_the_code_covers():
    default = "7.5 8.0 8.6 9.0 10.0 12.0+PTX"
    for capability in ((7, 5), (8, 0), (8, 7), (8, 9), (9, 0), (10, 3), (12, 1), (13, 0)):
        assert cuda_backend.covers(default, capability), capability
    for capability in ((7, 0), (7, 2), (6, 1), (11, 0)):
        assert not cuda_backend.covers(default, capability), capability
    assert not cuda_backend.covers("9.0a", (9, 1))
    assert cuda_backend.covers("9.0a", (9, 0))
    assert not cuda_backend.covers("8.6", (8, 0))
    assert cuda_backend.covers("8.0+PTX", (9, 0))


def test_a_gpu_the_code_does_not_cover_is_a_reason(monkeypatch):
    """Then `auto` goes on to the next backend there, and info() says what to do. Other GPUs do not matter."""
    monkeypatch.setattr(cuda_backend, "module", SimpleNamespace(device_count=lambda: 2, ARCHITECTURES="9.0 12.0+PTX"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((9, 0), (8, 6))[i])
    assert cuda_backend.unavailable(0) == ""
    assert cuda_backend.unavailable(1).endswith("build again with TORCH_CUDA_ARCH_LIST=8.6")


def test_a_driver_older_than_the_module_is_a_reason(monkeypatch):
    def broken():
        raise RuntimeError("cudaGetDeviceCount: CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(cuda_backend, "module", SimpleNamespace(device_count=broken))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert cuda_backend.unavailable().endswith(
        "update the driver, or build again with an nvcc of CUDA 12.6, as torch was"
    )


def test_a_network_gets_ready_when_it_is_moved(on_cuda):
    with on_cuda():
        check_nothing_is_kept_by_a_call()
