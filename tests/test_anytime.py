"""predict: each sample stops when it is clear, and its answer is the full run's prefix."""

from itertools import pairwise

import networks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qcfs_fast
from qcfs_fast import QCFS
from qcfs_fast.network import anytime


@pytest.fixture(scope="module")
def case():
    """A network whose answers settle at many different steps, with images."""
    model = qcfs_fast.prepare(networks.randomize(networks.Small(classes=4), seed=1), levels=4)
    model.head.weight.data *= 8  # clear answers for some images
    x = torch.randn(40, *networks.SHAPES[networks.Small], generator=torch.Generator().manual_seed(1))
    qcfs_fast.calibrate(model, [x], progress=False)
    return qcfs_fast.convert(model, T=11), x


def plain_steps(by_step, confidence):
    """The rule, sample by sample."""
    found = []
    for n in range(by_step.shape[1]):
        for t in range(by_step.shape[0]):
            p = sorted(torch.softmax(by_step[t, n].double(), 0).tolist())
            if p[-1] - p[-2] >= confidence or t == by_step.shape[0] - 1:
                found.append(t + 1)
                break
    return torch.tensor(found)


@pytest.mark.parametrize("neuron", ["plain", "offset", "masked", "signed"])
@pytest.mark.parametrize("confidence", [0.3, 0.7, 0.9])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"T": 16},
        {"T": 1},
        {"schedule": [11]},
        {"schedule": (2, 3, 7, 11)},
        {"batch_size": 7},
        {"T": 9, "schedule": [4, 9], "batch_size": 1},
    ],
)
def test_equals_the_prefix_of_the_full_run(case, confidence, options, neuron, monkeypatch):
    snn, x = case
    monkeypatch.setattr(snn, "_neuron", qcfs_fast.Neuron(neuron))
    full = snn(x, T=options.get("T"), per_step=True)
    found = snn.predict(x, confidence, **options)
    steps = plain_steps(full, confidence)
    assert torch.equal(found.steps, steps)
    assert torch.equal(found.logits, full[steps - 1, torch.arange(len(x))])
    assert torch.equal(found.labels, found.logits.argmax(1))
    assert found.logits.dtype == torch.float32
    assert found.steps.dtype == found.labels.dtype == torch.int64
    if full.shape[0] > 8:
        assert len(steps.unique()) >= (3 if neuron == "plain" else 2), "the samples stop together: the test is void"


def test_samples_that_are_done_leave_the_batch(case, monkeypatch):
    snn, x = case
    calls = []
    execute = type(snn)._execute

    def spy(self, x, run, watch=None):
        out = execute(self, x, run, watch)
        calls.append((out.shape[1], run.before, run.T))
        return out

    monkeypatch.setattr(type(snn), "_execute", spy)
    steps = snn.predict(x, 0.7).steps
    # The steps of the next length run for those that the lengths before did not settle; none runs twice.
    want = [(int((steps > a).sum()), a, b - a) for a, b in ((0, 1), (1, 2), (2, 4), (4, 8), (8, 11))]
    assert calls == want
    assert calls[1][0] < calls[0][0]
    assert calls[-1][0] > 0

    calls.clear()
    snn.predict(x, 0.7, batch_size=16, schedule=[4, 11])
    left = [int((part > 4).sum()) for part in steps.split(16)]
    assert calls == [call for n, m in zip((16, 16, 8), left, strict=True) for call in ((n, 0, 4), (m, 4, 7)) if call[0]]
    calls.clear()
    assert snn.predict(x, 0).steps.tolist() == [1] * len(x)
    assert calls == [(len(x), 0, 1)]

    calls.clear()
    snn.neuron = "offset"  # no state: all steps so far run again
    try:
        steps = snn.predict(x, 0.7).steps
    finally:
        snn.neuron = "plain"
    assert calls == [(int((steps > a).sum()), 0, b) for a, b in ((0, 1), (1, 2), (2, 4), (4, 8), (8, 11))][: len(calls)]


def test_limits_of_confidence(case):
    snn, x = case
    assert torch.equal(snn.predict(x, 1.0).logits, snn(x))
    assert snn.predict(x, 1).steps.tolist() == [11] * len(x)


def test_one_image_and_none(case):
    snn, x = case
    one = snn.predict(x[:1])
    assert torch.equal(one.logits, snn.predict(x).logits[:1])
    none = snn.predict(x[:0])
    assert none.labels.shape == none.steps.shape == (0,)
    assert none.logits.shape == (0, 4)


def test_margin():
    logits = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 1e4, -1e4]])
    e2 = torch.e**2
    want = torch.tensor([0.0, (e2 - 1) / (e2 + 2), 1.0], dtype=torch.float64)
    assert torch.allclose(anytime.margins(logits), want, rtol=0, atol=1e-15)
    assert anytime.margins(logits).dtype == torch.float64


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(1, 5), st.randoms(use_true_random=False))
def test_trade_off_is_what_the_rule_gives(T, N, random):
    margin = torch.tensor([[random.choice([0.1, 0.5, 0.9]) for _ in range(N)] for _ in range(T)])
    labels = torch.tensor([[random.randrange(3) for _ in range(N)] for _ in range(T)])
    targets = torch.tensor([random.randrange(3) for _ in range(N)])
    (point,) = anytime.trade_off(margin.double(), labels, targets, [0.5])
    steps = [next((t for t in range(T) if margin[t, n] >= 0.5), T - 1) for n in range(N)]
    answers = [int(labels[t, n]) for n, t in enumerate(steps)]
    assert point["mean_steps"] == pytest.approx(sum(steps) / N + 1)
    assert point["accuracy"] == pytest.approx(sum(a == int(y) for a, y in zip(answers, targets, strict=True)) / N)
    assert point["agreement"] == pytest.approx(sum(a == int(labels[-1, n]) for n, a in enumerate(answers)) / N)


@pytest.mark.parametrize("T", [1, 2, 3, 4, 7, 8, 9, 64])
def test_doubling(T):
    lengths = anytime.doubling(T)
    assert (lengths[0], lengths[-1]) == (1, T)
    assert all(a < b <= 2 * a for a, b in pairwise(lengths))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"confidence": 1.5}, ValueError, "confidence is a difference of probabilities, from 0 to 1; got 1.5"),
        ({"confidence": -0.1}, ValueError, "from 0 to 1"),
        ({"confidence": float("nan")}, ValueError, "from 0 to 1"),
        ({"confidence": "0.9"}, TypeError, "confidence must be a number"),
        ({"confidence": True}, TypeError, "confidence must be a number"),
        ({"T": 0}, ValueError, "T must be at least 1"),
        ({"schedule": []}, TypeError, "schedule must be a sequence of ints"),
        ({"schedule": [1.0, 11]}, TypeError, "schedule must be a sequence of ints"),
        ({"schedule": [4, 4, 11]}, ValueError, "schedule must rise"),
        ({"schedule": [0, 11]}, ValueError, "schedule must rise from at least 1"),
        ({"schedule": [1, 4]}, ValueError, r"schedule must end with T=11, got \[1, 4\]"),
        ({"batch_size": 0}, ValueError, "batch_size must be a positive int"),
        ({"x": torch.zeros(1, 1, 4, 4)}, ValueError, "expected an input of shape"),
    ],
)
def test_bad_arguments(case, monkeypatch, options, error, message):
    snn, x = case
    monkeypatch.setattr(type(snn), "run", lambda *a, **k: pytest.fail("a kernel ran"))
    with pytest.raises(error, match=message):
        snn.predict(**{"x": x, **options})


def test_modules_may_have_the_names_of_methods(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.report, self.act = nn.Conv2d(1, 4, 1), QCFS(4)
            self.predict = nn.Sequential(nn.Linear(4, 8), QCFS(4), nn.Linear(8, 3))
            self.act.thresh.data.fill_(0.5)

        def forward(self, x):
            return self.predict(self.act(self.report(x)).mean((2, 3)))

    x = torch.rand(3, 1, 4, 4)
    snn = qcfs_fast.convert(Named().eval(), T=4, input_shape=(1, 4, 4))
    assert list(snn.spiking_layers) == ["act", "predict.1"]
    assert "predict.1" in dict(snn.named_modules())
    snn.save(tmp_path / "named.safetensors")
    loaded = qcfs_fast.load(tmp_path / "named.safetensors").to("cpu")
    assert torch.equal(loaded.predict(x, 1.0).logits, snn(x))
    assert "act" in loaded.report()


def test_output_must_be_class_scores():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), QCFS(4), nn.Conv2d(4, 3, 1)).eval()
    model[1].thresh.data.fill_(1.5)
    snn = qcfs_fast.convert(model, T=2)
    with pytest.raises(ValueError, match=r"not a list of at least two class scores, but of shape .*per_step=True"):
        snn.predict(torch.rand(2, 1, 3, 3))
