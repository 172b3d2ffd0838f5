"""The network as one native call: the bytes of the operators in every mode, and who takes which way."""

import copy
import pickle
import threading

import networks
import pytest
import torch
from markers import slow_but
from torch.utils._python_dispatch import TorchDispatchMode

import qcfs_fast
from qcfs_fast import backend
from qcfs_fast.backend import native

pytestmark = pytest.mark.skipif(native.module is None, reason="needs the native module")

MODES = ("plain", "offset", "masked", "signed", "sum")
NATIVE = "one native call"


def by_operators(snn, x, T=None, per_step=False, skip=0):
    """The answer of the operators: whoever watches the nodes has them run."""
    out = snn.run(x, T, per_step, lambda *_: None, skip)
    return out if per_step else out[0]


def assert_same(snn, x, **call):
    got = snn(x, **call)
    assert snn._executor.path == NATIVE
    expected = by_operators(snn, x, **call)
    assert got.shape == expected.shape
    assert got.stride() == expected.stride()
    assert torch.equal(got, expected)
    return got


def calls(neuron, most):
    """Calls with T steps up to `most`, per step and delayed, as far as a mode has such."""
    for T in [T for T in (1, 4, 9) if most >= T]:
        yield {"T": T}
        if neuron != "sum":
            yield {"T": T, "per_step": True}
            yield {"T": T, "per_step": T > 1, "skip": T - 1}


@pytest.mark.parametrize("neuron", MODES)
@pytest.mark.parametrize("bits", slow_but([16], [16, 8, 24]))
@pytest.mark.parametrize("kind", list(networks.SHAPES), ids=lambda k: k.__name__)
def test_same_bytes_as_operators(kind, bits, neuron):
    snn, x = networks.converted(kind, T=4 if neuron == "sum" else 9, weight_bits=bits, neuron=neuron)
    rates = [s.float().mean() for s in qcfs_fast.trace(snn, x, T=4).values()]
    assert all(rate > 0 for rate in rates)
    assert any(0.05 < rate < 0.95 for rate in rates)
    for call in calls(neuron, snn.max_T):
        assert_same(snn, x, **call)


@pytest.mark.parametrize("kind", [networks.Small, networks.Groups, networks.Image], ids=lambda k: k.__name__)
def test_same_bytes_where_membranes_meet_thresholds(kind):
    """Integers on a coarse grid: many membranes are exactly at the threshold."""
    shape = networks.SHAPES[kind]
    model = networks.on_grid(qcfs_fast.prepare(kind(), levels=4))
    snn = qcfs_fast.convert(model, T=4)
    assert_same(snn, networks.images(shape, grid=8), per_step=True)


@pytest.mark.parametrize("neuron", ["plain", "signed"])
@pytest.mark.parametrize("kind", [networks.Small, networks.Image, networks.Perceptron], ids=lambda k: k.__name__)
def test_images_over_time(kind, neuron):
    snn, _ = networks.converted(kind, T=5, neuron=neuron)
    frames = torch.stack([networks.images(networks.SHAPES[kind], seed=t) for t in range(5)])
    assert_same(snn, frames, per_step=True)
    assert_same(snn, (frames * 40).clamp(0, 200).to(torch.uint8), skip=2)
    assert_same(snn, frames.transpose(-1, -2).contiguous().transpose(-1, -2))


def test_bias_of_each_step():
    model = networks.lively(networks.randomize(networks.Small()), networks.SHAPES[networks.Small])
    x = networks.images(networks.SHAPES[networks.Small])
    table = qcfs_fast.step_biases(model, [x], T=4)
    snn = qcfs_fast.convert(model, T=4, step_bias=table)
    assert_same(snn, x, per_step=True)
    assert_same(snn, x, T=2)


def test_any_strides_and_dtypes():
    snn, x = networks.converted(networks.Small)
    expected = snn(x)
    assert torch.equal(assert_same(snn, x.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(assert_same(snn, torch.cat([x, x], 3)[..., : x.shape[3]]), expected)
    assert torch.equal(assert_same(snn, x.double()), expected)
    assert torch.equal(assert_same(snn, x[:1].expand(4, -1, -1, -1)), expected[:1].expand(4, -1))
    assert_same(snn, x.half())
    assert assert_same(snn, x[:0]).shape == (0, 5)


def test_answer_that_is_a_map():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 5, 3))
    snn = qcfs_fast.convert(networks.lively(networks.randomize(model), (3, 8, 9)), T=4)
    assert assert_same(snn, networks.images((3, 8, 9))).shape == (3, 5, 6, 7)


@pytest.mark.parametrize(("name", "mask"), native.kernel_sets())
@pytest.mark.parametrize("engine", backend.ENGINES)
def test_settings_hold(name, mask, engine):
    snn, x = networks.converted(networks.Small, T=4)
    expected = by_operators(snn, x)
    with backend.force(isa_mask=mask, cpu_engine=engine):
        assert torch.equal(assert_same(snn, x), expected)
        snn(x)
        engines = {n: layer.engine for n, layer in snn.layers.items() if hasattr(layer, "engine")}
        by_operators(snn, x)
        assert engines == {n: layer.engine for n, layer in snn.layers.items() if hasattr(layer, "engine")}
        assert set(engines.values()) <= {"events", "dense", "table"}


def test_several_threads():
    """Threads with other shapes and T on one network: each gets the answer that it gets alone."""
    snn, x = networks.converted(networks.Small, T=4)
    wanted = {(n, T): by_operators(snn, x[:n], T) for n in (1, 2, 3) for T in (2, 4)}
    wrong = []

    def work(seed):
        keys = sorted(wanted)
        for i in range(60):
            n, T = keys[(i * 7 + seed) % len(keys)]
            if not torch.equal(snn(x[:n], T), wanted[n, T]):
                wrong.append((n, T))

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert snn._executor.path == NATIVE
    assert not wrong


def test_more_shapes_than_are_remembered():
    snn, x = networks.converted(networks.Small)
    x = networks.images((3, 30, 30), 1)
    for size in (*range(8, 30), 8):
        assert_same(snn, x[..., :size, :size])


# ------------------------------------------------------------------------------------- tensors that change


def test_changed_tensors_are_seen():
    snn, x = networks.converted(networks.Small, T=4)
    before = snn(x)
    layer = snn.layers["block1.relu"]
    layer.bias.neg_()
    assert not torch.equal(assert_same(snn, x), before)
    layer.bias = -layer.bias
    assert torch.equal(assert_same(snn, x), before)
    layer.weight_0.data = layer.weight_0.flip(0)
    assert not torch.equal(assert_same(snn, x), before)
    # The native reader checks the bound on T again. What the operators would compute all the same is left to them.
    layer.bias += layer.threshold
    answer = snn(x)
    assert "free of overflow" in repr(snn)
    assert torch.equal(answer, by_operators(snn, x))


def test_copies_run_for_themselves():
    snn, x = networks.converted(networks.Small, T=4)
    before = snn(x)
    for other in (copy.deepcopy(snn), pickle.loads(pickle.dumps(snn))):
        other.layers["block1.relu"].bias.zero_()
        assert not torch.equal(assert_same(other, x), before)
    assert torch.equal(assert_same(snn, x), before)


def test_mode_and_steps_may_be_set():
    snn, x = networks.converted(networks.Small, T=4, max_T=16)
    for neuron in MODES:
        snn.neuron = neuron
        assert_same(snn, x)
    snn.neuron, snn.T = "plain", 11
    assert_same(snn, x)


# ------------------------------------------------------------------------------------- who takes which way


class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen = getattr(self, "seen", 0) + ("qcfs_fast" in str(function))
        return function(*args, **(kwargs or {}))


def test_whoever_looks_sees_operators():
    snn, x = networks.converted(networks.Small, T=4)
    assert snn._executor.path == ""
    expected = snn(x)
    assert "one native call" in repr(snn)
    with Counting() as mode:
        assert torch.equal(snn(x), expected)
    assert mode.seen > 5
    with torch.profiler.profile() as profile:
        snn(x)
    assert any("qcfs_fast::conv2d_if" in e.key for e in profile.key_averages())
    seen = []
    handle = snn.layers["block1.relu"].register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(snn(x), expected)
    assert seen
    assert "operators: hooks" in repr(snn)
    handle.remove()
    assert_same(snn, x)
    with backend.force(reference=True):
        assert torch.equal(snn(x), expected)
        assert snn._executor.path == "operators"
    assert torch.equal(snn.stream()(x, steps=4), expected)
    assert snn._executor.path == NATIVE


def test_transforms_and_odd_tensors_take_operators():
    snn, x = networks.converted(networks.Perceptron)
    negated = torch.complex(x, -x).conj().imag
    assert negated.is_neg()
    assert torch.equal(snn(negated), snn(x))
    with torch.inference_mode():
        assert torch.equal(snn(x), by_operators(snn, x))
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert snn(mode.from_tensor(x)).shape == (3, 5)
    with torch.inference_mode():
        moved = copy.deepcopy(snn).to("cpu")
        for layer in moved.layers.values():
            for name in list(layer._buffers):
                layer._buffers[name] = layer._buffers[name].clone()
    assert torch.equal(moved(x), snn(x))


# ------------------------------------------------------------------------------------------------ bad input


def test_errors_are_those_of_the_operators():
    snn, x = networks.converted(networks.Small, T=4)
    snn(x)
    bad = x.clone()
    bad[1, 2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        snn(bad)
    assert snn._executor.path == NATIVE
    with pytest.raises(ValueError, match="smaller than the"):
        snn(x[..., :1, :1])
    assert_same(snn, x)


def test_peak_that_an_image_exceeds_takes_operators():
    """Of a pool whose windows follow the image's size, the peak is checked when there is one."""
    snn, x = networks.converted(networks.Pools)
    assert_same(snn, x)
    with pytest.raises(ValueError, match="input_shape="):
        snn(networks.images((3, 13, 17)))
