"""Streams: a run that goes on from call to call is one run, to the bit; and images that change with time."""

import contextlib

import networks
import pytest
import torch
from networks import converted

import qcfs_fast
from qcfs_fast import backend

KINDS = [networks.Small, networks.Branches, networks.Image, networks.Perceptron, networks.Pools]
CAUSAL = ("plain", "signed")


def of_kind(kind, mode="plain", T=11):
    snn, x = converted(kind)
    snn.T = T
    snn.neuron = mode
    return snn, x


@pytest.mark.parametrize("mode", CAUSAL)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_steps_and_then_more_are_the_steps_at_once(kind, mode):
    snn, x = of_kind(kind, mode)
    whole = snn(x, 11, per_step=True)
    assert len({t.numpy().tobytes() for t in whole}) > 3, "the answer hardly changes: the test is void"
    stream = snn.stream()
    assert torch.equal(stream(x, steps=1), whole[0])
    assert torch.equal(stream(steps=2), whole[2])  # on the same image
    assert torch.equal(stream(x.clone(), steps=5, per_step=True), whole[3:8])
    assert torch.equal(stream(steps=3, per_step=True), whole[8:])
    assert stream.steps == 11
    stream.reset()
    assert torch.equal(stream(x[:1], steps=11), whole[-1, :1])


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("mode", CAUSAL)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_native_calls_and_operators_take_up_what_the_other_left(kind, mode, first):
    snn, x = of_kind(kind, mode)
    whole = snn(x, 11, per_step=True)
    stream, chosen = snn.stream(), torch.arange(len(x))
    for i, (image, steps) in enumerate([(x, 2), (None, 1), (x.expand(2, *x.shape), 2), (x, 1), (None, 2), (None, 3)]):
        if i == 4:
            chosen = torch.tensor([1, 0])
            stream.keep(chosen)
        with backend.force(reference=True) if i % 2 == first else contextlib.nullcontext():
            found = stream(image, steps, per_step=True)
        native = "operators" if i % 2 == first or backend.native.module is None else "one native call"
        assert snn._executor.path == native
        assert torch.equal(found, whole[stream.steps - steps : stream.steps, chosen])
    assert stream.steps == 11


@pytest.mark.skipif(backend.native.module is None, reason="operators take new memory")
@pytest.mark.parametrize("mode", CAUSAL)
def test_a_reset_keeps_memory_and_nothing_else(mode):
    snn, x = of_kind(networks.Small, mode)
    stream = snn.stream()
    stream(x, steps=4)
    memory = stream._state.abandoned()
    stream.reset()
    memory.fill_(0x55555555)
    assert torch.equal(stream(x.flip(0), steps=3), snn(x.flip(0), 3))
    assert stream._state.abandoned() is memory
    stream.reset()
    assert torch.equal(stream(x[:1], steps=3), snn(x[:1], 3))  # another size takes memory of its own
    assert stream._state.abandoned() is not memory
    assert torch.equal(stream(steps=1), snn(x[:1], 4))


def test_an_interrupted_call_resets_the_stream(monkeypatch):
    """The native call replaces membranes in place: what it left when it was interrupted belongs to no step."""
    snn, x = of_kind(networks.Small)
    stream = snn.stream()
    stream(x, steps=2)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(snn, "_execute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream(steps=1)
    assert stream.steps == 0
    assert torch.equal(stream(x, steps=3), snn(x, 3))


def test_images_that_are_refused_leave_the_stream_as_it_was():
    snn, x = of_kind(networks.Small)
    stream = snn.stream()
    stream(x, steps=2)
    with pytest.raises(ValueError, match="NaN"):
        stream(torch.full_like(x, float("nan")))
    with pytest.raises(ValueError, match="got"):
        stream(x[:1])
    assert stream.steps == 2
    assert torch.equal(stream(steps=3), snn(x, 5))


@pytest.mark.parametrize("mode", CAUSAL)
def test_rows_can_be_dropped(mode):
    snn, x = of_kind(networks.Branches, mode)
    whole = snn(x, 9, per_step=True)
    stream = snn.stream()
    stream(x, steps=4)
    index = torch.tensor([len(x) - 1, 0])
    stream.keep(index)
    assert torch.equal(stream(steps=2), whole[5, index])
    stream.keep(torch.tensor([False, True]))
    assert torch.equal(stream(x[:1], steps=3), whole[8, :1])


@pytest.mark.parametrize("mode", ["plain", "offset", "masked", "signed"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_an_image_that_does_not_change_is_an_image(kind, mode):
    """The first layer takes another way for images over time. It gives the same spikes."""
    snn, x = of_kind(kind, mode)
    over_time = x.expand(11, *x.shape)
    assert torch.equal(snn(over_time, per_step=True), snn(x, per_step=True))
    for a, b in zip(qcfs_fast.trace(snn, over_time).values(), qcfs_fast.trace(snn, x).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", CAUSAL)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_images_over_time(kind, mode):
    """In one call, frame by frame, and against float64, which runs the model itself."""
    snn, x = of_kind(kind, mode, T=8)
    generator = torch.Generator().manual_seed(3)
    frames = x + torch.randn(8, *x.shape, generator=generator) * x.std()
    # A sample has one exponent for all its frames, and frame by frame one for each: powers of two are exact in both.
    frames = (frames * 64).round() / 64
    whole = snn(frames, per_step=True)
    assert not torch.equal(whole[-1], snn(frames[0], 8))
    stream = snn.stream()
    assert torch.equal(torch.cat([stream(f, per_step=True) for f in frames]), whole)
    assert torch.equal(snn(frames), whole[-1])
    spikes = qcfs_fast.trace(snn, frames)
    assert all(s.shape[0] == 8 for s in spikes.values())


def test_counts_of_events_are_exact():
    """uint8 as float: every integer up to 255 is a pixel of 24 bits."""
    snn, x = of_kind(networks.Small, T=6)
    events = torch.randint(0, 256, (6, *x.shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    q, exponent = snn._program[0][1]({"<image>": events}, snn._settled_run(events, None, False, 0))
    steps = q.permute(0, 3, 1, 2).double() * 2.0 ** exponent[:, None, None, None]
    assert torch.equal(steps, events.flatten(0, 1).double())
    assert torch.equal(snn(events), snn(events.float()))


def test_delayed_readout():
    snn, x = of_kind(networks.Small)
    totals = snn(x, 11, per_step=True).double() * torch.arange(1, 12, dtype=torch.float64)[:, None, None]
    late = snn(x, 11, per_step=True, skip=4)
    want = (totals[4:] - totals[3]) / torch.arange(1, 8, dtype=torch.float64)[:, None, None]
    assert late.shape == want.shape
    assert torch.allclose(late.double(), want, atol=1e-4)
    assert torch.equal(snn(x, 11, skip=4), late[-1])


def test_rows_can_be_dropped_between_images():
    """A time axis shorter than the batch, whose currents are of no use to the next call."""
    snn, x = of_kind(networks.Image)
    stream = snn.stream()
    stream(x[None])
    index = torch.tensor([len(x) - 1])
    stream.keep(index)
    assert torch.equal(stream(x[index], steps=4), snn(x, 5)[index])


def test_a_first_call_that_raises_leaves_a_new_stream():
    snn, x = of_kind(networks.Small)
    stream = snn.stream()
    with pytest.raises(ValueError, match="NaN"):
        stream(torch.full_like(x, float("nan")))
    assert torch.equal(stream(x[:1], steps=3), snn(x[:1], 3))


def test_what_a_stream_refuses():
    snn, x = of_kind(networks.Small)
    for mode in ("offset", "masked", "sum"):
        snn.neuron = mode
        with pytest.raises(ValueError, match=f"{mode}.* mode have no state"):
            snn.stream()
    snn.neuron = "plain"
    stream = snn.stream()
    with pytest.raises(ValueError, match="which images"):
        stream(steps=2)
    with pytest.raises(ValueError, match="no batch yet"):
        stream.keep(torch.tensor([0]))
    before = stream(x, steps=2)
    nan = torch.full_like(x, float("nan"))
    for wrong, match in ((x[:1], "call reset"), (nan, "NaN"), (x[:, :1], "expected an input of shape")):
        with pytest.raises(ValueError, match=match):
            stream(wrong, steps=2)
    for steps in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="positive int"):
            stream(x, steps=steps)
    with pytest.raises(ValueError, match=f"bound of {snn.max_T} steps"):
        stream(x, steps=snn.max_T - 1)
    with pytest.raises(ValueError, match="a bool for each"):
        stream.keep(torch.tensor([True]))
    with pytest.raises(IndexError, match="positions below"):
        stream.keep(torch.tensor([99]))
    for wrong in (torch.tensor([0.5]), [0]):
        with pytest.raises(TypeError, match="int64 positions"):
            stream.keep(wrong)
    assert stream.steps == 2  # none of these changed it
    assert torch.equal(stream(steps=9), snn(x))
    assert not torch.equal(before, snn(x))
    snn.neuron = "signed"
    with pytest.raises(ValueError, match="it began with plain neurons"):
        stream(steps=1)


def test_what_images_over_time_refuse():
    snn, x = of_kind(networks.Small, T=4)
    frames = x.expand(4, *x.shape)
    with pytest.raises(ValueError, match="the input has 4 steps, but T=5"):
        snn(frames, T=5)
    with pytest.raises(TypeError, match="scale images to floats first"):
        snn(x.to(torch.uint8))
    with pytest.raises(TypeError, match="floating-point"):
        snn(frames.to(torch.int32))
    with pytest.raises(ValueError, match="predict: one image"):
        snn.predict(frames)
    snn.neuron = "sum"
    with pytest.raises(ValueError, match="sum mode adds up"):
        snn(frames)
    snn.neuron = "offset"
    with pytest.raises(ValueError, match="at least 4 steps"):
        snn(frames[:2])
    with pytest.raises(ValueError, match="bound of"):
        snn(x.expand(snn.max_T + 1, *x.shape))
