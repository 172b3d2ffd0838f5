"""The operators as citizens of torch: opcheck, compile, export, devices, forked processes."""

import copy
import multiprocessing

import networks
import numpy as np
import pytest
import torch
from layers import random_case, random_spikes, tensor
from markers import slow_but
from networks import converted

from qcfs_fast.backend import registration as ops
from qcfs_fast.operators.geometry import POINTWISE
from qcfs_fast.operators.neuron import MODES

OPS = torch.ops.qcfs_fast


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Dynamo counts recompilations of SNN.forward over all networks of a process."""
    torch._dynamo.reset()


def samples():
    """Arguments for every operator."""
    rng = np.random.default_rng(0)
    masks, counts = (
        tensor(random_spikes(rng, (2, 6, 5, 7), 9, False)),
        tensor(random_spikes(rng, (2, 6, 5, 7), 3, True)),
    )
    one = torch.ones(4, dtype=torch.float64)
    n = torch.full((4,), 64, dtype=torch.int32)
    analog = (
        tensor(rng.integers(-9, 9, (2, 6, 5, 3)).astype(np.int32)), torch.zeros(2, dtype=torch.int32),
        tensor(rng.integers(-9, 9, (3, 3, 3, 4)).astype(np.int16)), [3, 3, 1, 1, 1, 1, 1, 1, 1], one, one, -n, n,
    )  # fmt: skip
    yield "quantize_input", (torch.randn(2, 3, 4, 5), torch.arange(3), torch.ones(3), torch.zeros(3))
    yield "conv2d_current", analog
    yield "conv2d_encode", (*analog, n, 9)
    for seed in range(4):
        yield "conv2d_if", random_case(seed, 1 + 7 * seed, max_channels=9, max_pixels=4).operands
    for mode in MODES:
        for seed in range(3):
            for linear, operator in ((False, "conv2d_if"), (True, "linear_if")):
                case = random_case(seed, 9, max_channels=9, max_pixels=4, modes=(mode,), linear=linear)
                yield operator + "_from" * (case.state is not None), case.operands
    x, w = tensor(random_spikes(rng, (2, 7), 9, False)), torch.ones(7, 4, dtype=torch.int16)
    yield "linear_if", ([x], [w], [], [], None, n // 2, n, 9)
    yield "pool", (masks, [0, 2, 2, 2, 4, 2], [0, 2, 2], 4, 9)
    yield "max_pool", (masks, [0, 2, 2, 2, 4, 2], [0, 2, 2])
    yield "count", (masks, 9, True)
    yield "count", (counts, 3, False)
    yield "pool_counts", (counts.int(), [0, 6, 6], [0, 5, 5], 30)
    yield (
        "readout",
        ([counts.int()], [torch.ones(1, 1, 7, 4, dtype=torch.int16)], list(POINTWISE), [one], [3], one, 3),
    )


@pytest.mark.parametrize(
    ("name", "arguments"), [pytest.param(n, a, id=f"{n}-{i}") for i, (n, a) in enumerate(samples())]
)
def test_opcheck(name, arguments):
    torch.library.opcheck(getattr(OPS, name).default, arguments)


def test_every_operator_is_checked():
    assert {n for n, _ in samples()} == set(ops.NAMES)


@pytest.mark.parametrize(
    "kind",
    slow_but(
        [networks.Small, networks.Branches],
        [networks.Small, networks.Branches, networks.Image, networks.Perceptron, networks.Pools],
    ),
)
def test_compile_whole_graph(kind):
    snn, x = converted(kind)
    compiled = torch.compile(snn, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), snn(x))
    assert torch.equal(compiled(x, T=9), snn(x, T=9))
    assert torch.equal(compiled(x, per_step=True), snn(x, per_step=True))


@pytest.mark.parametrize("mode", slow_but(["plain"], MODES, pytest.mark.native))
def test_compile_with_inductor(mode):
    snn, x = converted(networks.Small, neuron=mode)
    assert torch.equal(torch.compile(snn, fullgraph=True)(x), snn(x))


def test_what_a_compiled_network_refuses():
    """Without a break of the graph torch shows the error of the traced code within its own."""
    snn, x = converted(networks.Small, T=4)
    compiled = torch.compile(snn, fullgraph=True, backend="eager")
    compiled(x)
    snn.neuron = "offset"
    beyond = "mode .layer block1.relu.; convert again with max_T=[0-9]+ and this neuron"
    for T, why in ((snn.max_T + 1, beyond), (0, "at least 1 time step, got 0")):
        with pytest.raises(torch._dynamo.exc.Unsupported, match=why):
            compiled(x, T=T)


@pytest.mark.parametrize("kind", list(networks.SHAPES), ids=lambda k: k.__name__)
def test_export(kind):
    snn, x = converted(kind)
    program = torch.export.export(snn, (x,))
    assert torch.equal(program.module()(x), snn(x))


def test_export_with_a_dynamic_batch(tmp_path):
    snn, x = converted(networks.Small)
    program = torch.export.export(snn, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    for n in (1, 2, 3):
        assert torch.equal(loaded(x[:n]), snn(x[:n]))


def test_fake_network_has_the_right_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    snn, x = converted(networks.Small)
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = snn(torch.empty(x.shape), per_step=True)
    assert out.shape == (4, 3, 5)
    assert out.dtype == torch.float32


def test_deepcopy_and_state_dict():
    snn, x = converted(networks.Small)
    other = copy.deepcopy(snn)
    assert torch.equal(other(x), snn(x))
    other.load_state_dict(snn.state_dict())
    assert torch.equal(other(x), snn(x))


def _in_child(snn, x, queue):
    queue.put(snn(x).numpy())


def test_forked_process():
    """A pool of the parent does not exist in the child: the child makes its own instead of waiting for ever."""
    snn, x = converted(networks.Small)
    x = x.repeat(20, 1, 1, 1)
    want = snn(x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(snn, x, queue))
    child.start()
    try:
        assert np.array_equal(queue.get(timeout=60), want.numpy())
    finally:
        child.join(timeout=10)
        child.kill()


def test_other_operators_may_run_between():
    """Results do not depend on what the caching allocator hands out: outputs are written in full."""
    snn, x = converted(networks.Small, T=11)
    want = snn(x, per_step=True)
    for _ in range(5):
        junk = [torch.full((2**k,), 255, dtype=torch.uint8) for k in range(4, 18)]
        del junk
        assert torch.equal(snn(x, per_step=True), want)
