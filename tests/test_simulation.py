"""The float64 simulation: every mode of the neuron by hand, against plain integers, and in whole networks.

A model that is one activation makes the rules visible: input that changes with time is then its current.
"""

import pytest
import torch
from networks import Branches, Image, Perceptron, Pools, Small, images, lively, on_grid, randomize
from oracle import fire_neuron
from torch import nn

import qcfs_fast
from qcfs_fast import QCFS
from qcfs_fast.model import neurons as float_neuron
from qcfs_fast.model.simulation import step_network
from qcfs_fast.operators import limits
from qcfs_fast.operators import neuron as integer_neuron

MODES = ("plain", "offset", "masked", "signed", "sum")
U = 2.0**-26  # what offset adds to a shift, in thresholds


def neuron(theta=1.0, channels=None):
    return nn.Sequential(QCFS(4, theta, channels))


def run(currents, theta=1.0, **options):
    """Currents [T][neurons] of one image -> (spikes, membranes) as lists [T][neurons]."""
    x = torch.tensor(currents, dtype=torch.float64).unsqueeze(1)
    found = qcfs_fast.simulate(neuron(theta), x, len(currents), spikes=True, **options)
    return found.spikes["0"][:, 0], found.membranes["0"][:, 0]


BY_HAND = [
    # a membrane that is exactly theta fires, and one that is exactly 0 does not
    ("plain", 1, [0.5, 0, -0.25, 1.25], [1, 0, 0, 1], [1, 0, -0.25, 1]),
    ("plain", 1, [3, -3, 0, 0], [1, 0, 0, 0], [3.5, -0.5, -0.5, -0.5]),
    # below 0 a spike is taken back, at 0 not; never more than were sent
    ("signed", 1, [0.5, 0, -0.25, -1, -1], [1, 0, -1, 0, 0], [1, 0, -0.25, -0.25, -1.25]),
    ("signed", 1, [-0.75, 1.25, 0, 0], [0, 1, 0, 0], [-0.25, 1, 0, 0]),
    ("signed", 1, [1.5, 1.5, -4, 0, 0], [1, 1, -1, -1, 0], [2, 2.5, -2.5, -1.5, -0.5]),
    # one spike too many: shifted by theta, or by just enough where that is more
    ("offset", 1, [1, -1, 0, 0], [0, 0, 0, 0], [0.5, -0.5, -0.5, -0.5]),
    ("offset", 1, [2, -2, 0, 0], [0, 0, 0, 0], [1 - U, -1 - U, -1 - U, -1 - U]),
    # one too few: shifted until the pause with the largest membrane fires
    ("offset", 1, [-1, 0, 2, 2], [1, 0, 1, 1], [1 + U, U, 2 + U, 3 + U]),
    # the residual exactly 0 (kept) and exactly theta (raised)
    ("offset", 1, [0.5, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]),
    ("offset", 1, [-0.5, 0, 0, 2], [1, 0, 0, 1], [1 + U, U, U, 2 + U]),
    # saturated: no further spike is possible; beyond the window the neuron goes on as it is
    ("offset", 1, [2, 2, 2, 2, -4, 0], [1, 1, 1, 1, 0, 0], [2.5, 3.5, 4.5, 5.5, 0.5, 0.5]),
    # never fired, nothing to remove
    ("offset", 1, [-2, 0, 0, 0], [0, 0, 0, 0], [-1.5, -1.5, -1.5, -1.5]),
    # the second iteration finds what the first left
    ("offset", 1, [-2, 0, 3, 3], [1, 0, 1, 1], [1 + U, U, 3 + U, 5 + U]),
    ("offset", 2, [-2, 0, 3, 3], [1, 1, 1, 1], [2 + U, 1 + U, 3 + U, 5 + U]),
    # v = 0 at the end of the window is silent, above 0 is not; later steps do not count
    ("masked", 1, [0.5, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]),
    ("masked", 1, [0.5, 0.25, 0, 0], [1, 0, 0, 0], [1, 0.25, 0.25, 0.25]),
    ("masked", 1, [0.5, 0, 0, -1, 3, 0], [0] * 6, [1, 0, 0, -1, 2, 1]),
    ("masked", 1, [0.5, 0, 0, 0.25, -1, 2], [1, 0, 0, 0, 0, 1], [1, 0, 0, 0.25, -0.75, 1.25]),
]


@pytest.mark.parametrize(("mode", "iterations", "currents", "spikes", "membranes"), BY_HAND)
@pytest.mark.parametrize("theta", [1.0, 0.5, 3.0])
def test_by_hand(mode, iterations, currents, spikes, membranes, theta):
    got, v = run([[c * theta] for c in currents], theta, neuron=mode, iterations=iterations)
    assert got[:, 0].tolist() == spikes
    assert v[:, 0].tolist() == [m * theta for m in membranes]
    assert got.dtype == (torch.int8 if mode == "signed" else torch.bool)


def test_sum_by_hand():
    """Halves round up, and counts are clipped to 0 .. T."""
    x = torch.tensor([[-9.0, -0.125, 0.0, 0.1249, 0.125, 0.375, 0.8749, 0.875, 9.0]], dtype=torch.float64)
    found = qcfs_fast.simulate(neuron(), x, 4, spikes=True, neuron="sum")
    assert found.spikes["0"].tolist() == [[[0, 0, 0, 0, 1, 2, 3, 4, 4]]]
    assert found.membranes["0"][0, 0].tolist() == (4 * x + 0.5)[0].tolist()
    assert found.output.tolist() == [[[0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1]]]


@pytest.mark.parametrize(
    ("mode", "iterations"), [("plain", 1), ("offset", 1), ("offset", 3), ("masked", 1), ("signed", 1)]
)
@pytest.mark.parametrize(("T", "window"), [(4, 4), (8, 4), (5, 1), (8, 8), (11, 3)])
def test_random_currents_against_integers(mode, T, window, iterations):
    """The integer contract of one neuron, on a grid that float64 holds exactly; thresholds differ by channel."""
    g = torch.Generator().manual_seed(T * 10 + window)
    n, neurons = 16, 400
    currents = torch.randint(-24, 34, (T, 1, neurons), generator=g)
    theta = 0.5 + torch.randint(0, 8, (neurons,), generator=g) / 4
    model = neuron(channels=neurons)
    model[0].thresh.data = theta
    x = currents.double() * theta.double() / n
    found = qcfs_fast.simulate(model, x, T, spikes=True, neuron=mode, window=window, iterations=iterations)
    spikes, membranes, changed, ties = found.spikes["0"][:, 0], found.membranes["0"][:, 0], 0, 0
    for i in range(neurons):
        column = currents[:, 0, i].tolist()
        want, before, _ = fire_neuron(column, n, mode, window, iterations)
        assert spikes[:, i].tolist() == want
        error = membranes[:, i] / theta[i].double() * n - torch.tensor(before)
        assert error.abs().max() <= (1 + 1e-6 if mode == "offset" else 0)  # lowered by one unit of another size
        changed += want != fire_neuron(column, n)[0]
        ties += before.count(n) + before.count(0)
    assert 0.05 < spikes.double().abs().mean() < 0.95
    assert ties > 0
    assert (changed > 0) == (mode != "plain" and (mode, window) != ("offset", 1))  # one step cannot be wrong


def test_random_totals_against_integers():
    g = torch.Generator().manual_seed(0)
    n, T = 16, 8
    total = torch.randint(-40, T * n + 40, (1, 500), generator=g)
    counts = qcfs_fast.simulate(neuron(0.75), total * (0.75 / n / T), T, spikes=True, neuron="sum").spikes["0"]
    assert counts[0, 0].tolist() == [fire_neuron([int(i)], n, "sum", T)[0][0] for i in total[0]]


def test_what_the_modes_are_for():
    """Wrong counts of uneven currents in a window of 4: plain has many, the others fewer, offset few."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn((4, 1, 20000), generator=g, dtype=torch.float64) * 0.6 + 0.3
    want = torch.clamp(torch.floor(x.sum(0) + 0.5), 0, 4)

    def wrong(mode, **options):
        spikes = qcfs_fast.simulate(neuron(), x, 4, spikes=True, neuron=mode, **options).spikes["0"]
        return (spikes.sum(0) != want).double().mean().item()

    plain, offset = wrong("plain"), wrong("offset")
    assert plain > 0.1
    assert offset < plain / 10
    assert wrong("offset", iterations=4) <= offset
    assert wrong("signed") < plain / 2
    assert wrong("masked") < plain


def test_rounding_undoes_no_shift():
    """Thresholds and currents off every grid: a shift that just removes a spike, or just adds one, still does."""
    e = 2 + torch.rand((1, 1, 2000), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for theta in (0.7, 0.9):
        for currents, want in (((e, -e, 0 * e, 0 * e), [0, 0, 0, 0]), ((-e, 0 * e, 2 * e, e), [1, 0, 1, 1])):
            x = torch.cat(currents) * theta
            spikes = qcfs_fast.simulate(neuron(theta), x, 4, spikes=True, neuron="offset").spikes["0"]
            assert (spikes == torch.tensor(want).reshape(4, 1, 1)).all()


def test_the_integer_network_has_the_same_modes_and_limits():
    assert float_neuron.MODES == integer_neuron.MODES == MODES
    assert float_neuron.LOOKS_AHEAD == integer_neuron.LOOKS_AHEAD
    assert (float_neuron.MAX_WINDOW, float_neuron.MAX_ITERATIONS) == (limits.MAX_WINDOW, limits.MAX_ITERATIONS)


# ------------------------------------------------------------ networks


def loops(model, currents_in, theta, T, steps, mode, window, iterations):
    """Linear, neurons, linear, neurons, linear in plain Python floats; every value is dyadic, so none is rounded.

    `currents_in` is [steps][features] of one image. Returns the last currents by step.
    """
    values = currents_in
    for i, layer in enumerate(m for m in model if isinstance(m, nn.Linear)):
        weight, bias = layer.weight.tolist(), layer.bias.tolist()
        rows = list(zip(weight, bias, strict=True))
        currents = [[sum(w * v for w, v in zip(row, step, strict=True)) + b for row, b in rows] for step in values]
        if i == 2:
            return currents
        n = 2**12  # theta in units of 2^-12
        columns = []
        for k in range(len(weight)):
            integers = [round(step[k] / theta[i] * n) for step in currents]
            assert all(c * theta[i] / n == step[k] for c, step in zip(integers, currents, strict=True))
            if mode == "sum":
                columns.append([fire_neuron([integers[0] * T], n, "sum", T)[0][0] / T])
            else:
                columns.append(fire_neuron(integers, n, mode, window, iterations)[0])
        values = [[theta[i] * column[t] for column in columns] for t in range(steps)]
    raise AssertionError


def steps_inside(mode, T, window):
    return {"sum": 1, "offset": max(T, window), "masked": max(T, window)}.get(mode, T)


NETWORK_RUNS = [
    (mode, T, window, changing)
    for mode in MODES
    for T, window in [(1, 4), (2, 2), (4, 4), (8, 4), (2, 8)]
    for changing in (False, True)
    if not changing or (mode != "sum" and steps_inside(mode, T, window) == T)
]


@pytest.mark.parametrize(("mode", "T", "window", "changing"), NETWORK_RUNS)
def test_networks_against_loops(mode, T, window, changing):
    """Still images and such that change with time; fewer and more steps than the window; delayed readout."""
    steps = steps_inside(mode, T, window)
    options = {"neuron": mode, "window": window, "iterations": 2 if mode == "offset" else 1}
    theta = (1.0, 0.5)
    model = on_grid(nn.Sequential(nn.Linear(6, 9), QCFS(4), nn.Linear(9, 8), QCFS(4), nn.Linear(8, 3)))
    model[1].thresh.data.fill_(theta[0])
    model[3].thresh.data.fill_(theta[1])
    x = images((T, 6) if changing else (6,), 7, grid=16)
    x = x.transpose(0, 1).contiguous() if changing else x
    got = qcfs_fast.simulate(model, x, T, **options)
    per_step = []
    for i in range(7):
        rows = x[:, i].tolist() if changing else [x[i].tolist()] * steps
        last = loops(model, rows, theta, T, steps, mode, window, 2)[: len(got)]
        per_step.append([[sum(last[s][k] for s in range(t + 1)) / (t + 1) for k in range(3)] for t in range(len(got))])
    assert torch.equal(got, torch.tensor(per_step, dtype=torch.float64).transpose(0, 1))
    assert got.shape == (1 if mode == "sum" else T, 7, 3)
    assert got.std() > 0
    if mode != "sum":
        for skip in {0, 1, T - 1} - {T}:
            late = qcfs_fast.simulate(model, x, T, skip=skip, **options)
            totals = got * torch.arange(1, T + 1).reshape(-1, 1, 1)
            before = totals[skip - 1] if skip else 0
            assert late.shape[0] == T - skip
            torch.testing.assert_close(late[-1], (totals[-1] - before) / (T - skip), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [Small, Pools, Perceptron, Branches, Image])
@pytest.mark.parametrize("levels", [4, 6])
def test_sum_is_the_network_itself(kind, levels):
    """With T = L the sum mode is the trained QCFS network."""
    shape = {Perceptron: (20,), Pools: (3, 12, 11), Small: (3, 10, 12)}.get(kind, (3, 9, 9))
    model = lively(randomize(kind()), shape, levels=levels)
    x = images(shape, 5).double()
    found = qcfs_fast.simulate(model, x, levels, spikes=True, neuron="sum")
    with torch.no_grad():
        torch.testing.assert_close(found.output[0], model.double()(x), rtol=1e-9, atol=1e-9)
    assert all(0.02 < c.double().mean() / levels < 0.98 for c in found.spikes.values())


@pytest.mark.parametrize("kind", [Small, Image])
def test_the_folded_network_is_the_step_loop(kind):
    shape = (3, 8, 8)
    model = lively(randomize(kind()), shape)
    x = images(shape, 5).double()
    network, neurons = step_network(model)
    with torch.no_grad():
        for _ in range(2):
            steps = torch.stack([network(x) for _ in range(6)])
            for each in neurons.values():
                each.reset()
    want = steps.cumsum(0) / torch.arange(1, 7).reshape(-1, 1, 1)
    torch.testing.assert_close(qcfs_fast.simulate(model, x, 6), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_images_do_not_know_of_each_other(mode):
    """Images run in parts, as many as memory has room for; forced spikes follow them."""
    model = lively(randomize(Small()), (3, 8, 8))
    x = images((3, 8, 8), 11)
    together = qcfs_fast.simulate(model, x, 5, spikes=True, neuron=mode)
    for i in (0, 10):
        alone = qcfs_fast.simulate(model, x[i : i + 1], 5, spikes=True, neuron=mode)
        for name, spikes in alone.spikes.items():
            assert torch.equal(spikes[:, 0], together.spikes[name][:, i])
    again = qcfs_fast.simulate(model, x, 5, spikes=True, neuron=mode, force=together.spikes)
    assert all(torch.equal(again.spikes[name], together.spikes[name]) for name in together.spikes)
    assert torch.allclose(again.output, together.output)
    name = next(reversed(together.spikes))
    silent = {**together.spikes, name: torch.zeros_like(together.spikes[name])}
    assert not torch.allclose(qcfs_fast.simulate(model, x, 5, neuron=mode, force=silent), together.output)
    assert qcfs_fast.simulate(model, x[:0], 5, neuron=mode).shape == (1 if mode == "sum" else 5, 0, 5)


def test_max_pools_of_signed_spikes():
    """The maximum of a window is -theta only where all of it is."""
    currents = torch.zeros(3, 1, 1, 1, 4)
    currents[:, 0, 0, 0] = torch.tensor([[1.0, 1.0, 1.0, -9.0], [-2.0, -2.0, -2.0, 0.0], [0.0, 0.0, 2.0, 0.0]])
    model = nn.Sequential(QCFS(4, 1.0), nn.MaxPool2d((1, 2)))
    found = qcfs_fast.simulate(model, currents, 3, spikes=True, neuron="signed")
    assert found.spikes["0"][:, 0, 0, 0].tolist() == [[1, 1, 1, 0], [-1, -1, -1, 0], [0, 0, 1, 0]]
    steps = found.output[:, 0, 0, 0] * torch.tensor([[1], [2], [3]])
    torch.testing.assert_close(steps, torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 2.0]], dtype=torch.float64))


def test_events_are_bytes():
    """uint8 input that changes with time is its numbers; one repeated image is that image."""
    model = lively(randomize(Small()), (3, 8, 8))
    g = torch.Generator().manual_seed(0)
    events = torch.randint(0, 4, (4, 5, 3, 8, 8), generator=g, dtype=torch.uint8)
    assert torch.equal(qcfs_fast.simulate(model, events, 4), qcfs_fast.simulate(model, events.float(), 4))
    still = events[:1].expand(4, -1, -1, -1, -1)
    assert torch.equal(qcfs_fast.simulate(model, still, 4), qcfs_fast.simulate(model, events[0], 4))
    assert not torch.equal(qcfs_fast.simulate(model, events, 4), qcfs_fast.simulate(model, still, 4))


@pytest.mark.parametrize("mode", ["plain", "signed"])
@pytest.mark.parametrize("dims", [0, 2])
def test_step_bias_is_subtracted_from_currents(mode, dims):
    g = torch.Generator().manual_seed(1)
    x = torch.randint(-20, 30, (4, 3, 5, *[6] * dims), generator=g) / 16
    bias = torch.randint(-8, 8, (7, 5), generator=g) / 16  # a table for more steps than are run
    ours = qcfs_fast.simulate(neuron(), x, 4, spikes=True, neuron=mode, step_bias={"0": bias})
    shifted = x - bias[:4].reshape(4, 1, 5, *[1] * dims)
    want = qcfs_fast.simulate(neuron(), shifted, 4, spikes=True, neuron=mode)
    assert torch.equal(ours.spikes["0"], want.spikes["0"])
    assert torch.equal(ours.membranes["0"], want.membranes["0"])
    assert not torch.equal(ours.spikes["0"], qcfs_fast.simulate(neuron(), x, 4, spikes=True, neuron=mode).spikes["0"])


def test_the_model_is_left_alone():
    prepared = qcfs_fast.prepare(Small(), levels=4).train()
    before = {k: v.clone() for k, v in prepared.state_dict().items()}
    code = prepared.code
    qcfs_fast.simulate(prepared, images((3, 8, 8)), 2, neuron="offset")
    assert prepared.training
    assert prepared.code == code
    assert all(torch.equal(v, before[k]) for k, v in prepared.state_dict().items())


STILL, CHANGING = torch.zeros(2, 3), torch.zeros(3, 2, 3)


@pytest.mark.parametrize(
    ("x", "T", "options", "error", "message"),
    [
        (STILL, 0, {}, ValueError, "T must be a positive int"),
        (
            STILL,
            2,
            {"neuron": "cos"},
            ValueError,
            "neuron must be one of plain, offset, masked, signed, sum, got 'cos'",
        ),
        (STILL, 2, {"neuron": "offset", "window": 9}, ValueError, "window must be an int of 1 to 8 steps, got 9"),
        (STILL, 2, {"neuron": "masked", "window": True}, ValueError, "window must be an int"),
        (STILL, 2, {"neuron": "offset", "iterations": 0}, ValueError, "iterations must be an int of 1 to 8 for offset"),
        (STILL, 2, {"neuron": "masked", "iterations": 2}, ValueError, "1 for all others, got 2 for masked"),
        (STILL, 2, {"skip": 2}, ValueError, "skip must be an int of 0 to T - 1 steps, and 0 in sum mode, got 2"),
        (STILL, 2, {"skip": 1, "neuron": "sum"}, ValueError, "and 0 in sum mode, got 1"),
        (STILL.long(), 2, {}, TypeError, "x must be a tensor of floating point or uint8, got torch.int64"),
        ([0.0], 2, {}, TypeError, "got list"),
        (torch.zeros(3), 2, {}, ValueError, r"x must be images \[N, C, H, W\] or vectors .* got shape \(3,\)"),
        (CHANGING, 4, {}, ValueError, "x has 3 steps .* so T must be that, got 4"),
        (CHANGING, 3, {"neuron": "offset"}, ValueError, "offset neurons look at 4 steps .* and x has 3; use window=3"),
        (CHANGING, 3, {"neuron": "sum"}, ValueError, "sum mode has no time steps"),
        (STILL, 2, {"force": {}}, ValueError, "force has no spikes for 0"),
        (STILL, 2, {"force": {"0": torch.zeros(1, 2, 3)}}, ValueError, "force must hold 2 steps and 2 images"),
        (
            STILL,
            2,
            {"force": {"0": torch.zeros(2, 2, 4)}},
            ValueError,
            r"spikes of shape \(2, 1, 4\) for an activation",
        ),
        (STILL, 2, {"force": {"0": torch.zeros(2, 2, 3)}, "neuron": "offset"}, ValueError, "must hold 4 steps"),
        (STILL, 2, {"step_bias": {}}, ValueError, "step_bias has no biases for 0"),
        (STILL, 2, {"step_bias": {"0": torch.zeros(1, 3)}}, ValueError, r"\[at least T = 2, channels\], got \(1, 3\)"),
        (STILL, 2, {"step_bias": {"0": torch.zeros(2, 4)}}, ValueError, "4 channels for an activation of 3"),
        (
            STILL,
            2,
            {"step_bias": {"0": torch.zeros(2, 3)}, "neuron": "sum"},
            ValueError,
            "sum neurons take no step_bias",
        ),
    ],
)
def test_bad_arguments(x, T, options, error, message):
    with pytest.raises(error, match=message):
        qcfs_fast.simulate(neuron(), x, T, **options)
