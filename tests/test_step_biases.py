"""Biases by time step (FTBC) against plain loops, and what they promise: prefixes, weights of batches, fewer errors."""

import pytest
import torch
from networks import Branches, Image, Perceptron, Small, images, lively, on_grid, randomize
from torch import nn

import qcfs_fast
from qcfs_fast import QCFS
from qcfs_fast.errors import ConversionError
from qcfs_fast.study import shipped


def small_net():
    """Two linear layers with neurons and a readout; a threshold for each channel in the second."""
    model = on_grid(
        nn.Sequential(nn.Linear(6, 7), QCFS(4), nn.Linear(7, 4), QCFS(4, channels=4), nn.Linear(4, 3)), seed=2
    )
    model[1].thresh.data.fill_(2.0)
    model[3].thresh.data = torch.tensor([0.5, 1.0, 2.0, 1.0])
    return model


def dot(layer, values):
    rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    return [sum(w * v for w, v in zip(row, values, strict=True)) + b for row, b in rows]


def wrong(membranes, answers, theta, bias=0.0):
    """By how much each neuron's output is wrong in this step."""
    return [(theta if m - bias >= theta else 0.0) - a for m, a in zip(membranes, answers, strict=True)]


def ftbc(model, x, T, alpha, tried=4):
    """The method in plain Python floats, one neuron of one image at a time; x is [N][6].

    Of the corrections tried, none among them, the first that leaves the least error is taken.
    """
    ann = x.tolist()  # what enters a layer of the QCFS network, by image
    snn = [[image] * T for image in ann]  # and of the spiking one, by image and step
    tables = {}
    for i, name in ((0, "1"), (2, "3")):
        thetas, L = model[i + 1].thresh.tolist(), model[i + 1].L
        channels = model[i].weight.shape[0]
        thetas = thetas * channels if len(thetas) == 1 else thetas
        z = [dot(model[i], image) for image in ann]
        ann = [
            [theta * max(0.0, min(1.0, (u * L / theta + 0.5) // 1 / L)) for u, theta in zip(row, thetas, strict=True)]
            for row in z
        ]
        currents = [[dot(model[i], step) for step in image] for image in snn]
        table = [[0.0] * channels for _ in range(T)]
        for c, theta in enumerate(thetas):
            potentials, answers = [theta / 2] * len(currents), [row[c] for row in ann]
            for t in range(T):
                m = [v + image[t][c] for v, image in zip(potentials, currents, strict=True)]
                d = wrong(m, answers, theta)
                choices = [0.0] + [alpha * sum(d) / len(d) / 2**k for k in range(tried)]
                left = [abs(sum(wrong(m, answers, theta, bias))) for bias in choices]
                table[t][c] = choices[left.index(min(left))]
                m = [u - e for u, e in zip(m, d, strict=True)]
                potentials = [u - theta if u >= theta else u for u in m]
        snn = [[[0.0] * channels for _ in range(T)] for _ in currents]
        for k, image in enumerate(currents):
            for c, theta in enumerate(thetas):
                v = theta / 2
                for t in range(T):
                    v += image[t][c] - table[t][c]
                    if v >= theta:
                        v -= theta
                        snn[k][t][c] = theta
        tables[name] = table
    return tables


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("sizes", [(64,), (40, 1, 23)])
def test_against_plain_loops(alpha, sizes):
    """All values are dyadic (64 images), so nothing is rounded. Batches count by their images."""
    model, x = small_net(), images((6,), 64, grid=64)
    found = qcfs_fast.step_biases(model, x.split(sizes), 5, alpha)
    want = ftbc(model, x, 5, alpha)
    assert list(found) == ["1", "3"]
    for name, table in found.items():
        assert table.dtype == torch.float64
        assert table.tolist() == want[name]
        assert 0.1 < (table != 0).double().mean() < 0.9  # some corrections would have left a larger error
    spikes = [qcfs_fast.simulate(model, x, 5, spikes=True, step_bias=b).spikes["1"] for b in (None, found)]
    assert not torch.equal(*spikes)  # so the second table depends on the first


def test_what_makes_it_worse_is_not_done():
    """Half of the currents are equal, as those of a background: the published step would carry all of them across."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), QCFS(4), nn.Linear(1, 2))
    model[0].weight.data.fill_(1.0)
    model[1].thresh.data.fill_(1.0)
    x = torch.tensor([0.4375] * 8 + [0, 0, 0, 0.4609375] + [0.625] * 4)[:, None]
    with torch.no_grad():
        answer = model[1](model[0](x)).mean()
    wrong = [float((x + 0.5 - bias >= 1).float().mean() - answer) for bias in (0.0, -0.109375, -0.0546875)]
    assert wrong == [-0.21875, 0.34375, -0.15625]  # as it is; after half of the error; after a quarter of it
    assert qcfs_fast.step_biases(model, [x], T=1, alpha=0.5)["1"].item() == -0.0546875
    assert qcfs_fast.step_biases(model, [x[x != 0.4609375][:, None]], T=1, alpha=0.5)["1"].item() == 0


def test_a_residual_network_gains():
    """The published step takes it from 163 right answers to 153 at T = 1, and from 171 to 162 at T = 2."""
    model, _ = shipped.network()
    x, labels = shipped.images().batch(range(300))
    table = qcfs_fast.step_biases(model, [x[:100]], T=2)
    right = [
        (qcfs_fast.simulate(model, x[100:], 2, torch.float32, step_bias=bias).argmax(2) == labels[100:]).sum(1)
        for bias in (None, table)
    ]
    assert (right[1] > right[0]).all(), right


def test_means_cover_images_and_positions():
    """A 1x1 convolution over positions is a linear layer over as many images."""
    linear = small_net()
    conv = nn.Sequential(nn.Conv2d(6, 7, 1), QCFS(4), nn.Conv2d(7, 4, 1), QCFS(4, channels=4), nn.Conv2d(4, 3, 1))
    conv.load_state_dict({k: v.reshape(*v.shape, 1, 1) if v.dim() == 2 else v for k, v in linear.state_dict().items()})
    x = images((6,), 16, grid=64)
    pictures = x.reshape(2, 2, 4, 6).permute(0, 3, 1, 2)
    want = qcfs_fast.step_biases(linear, [x], 3)
    found = qcfs_fast.step_biases(conv, [(pictures, None)], 3)
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("kind", [Small, Branches, Image, Perceptron])
def test_a_table_serves_fewer_steps(kind):
    shape = (20,) if kind is Perceptron else (3, 9, 9)
    model, x = lively(randomize(kind()), shape), images(shape, 12)
    long = qcfs_fast.step_biases(model, x.split(5), T=8)
    short = qcfs_fast.step_biases(model, x.split(5), T=3)
    again = qcfs_fast.step_biases(model, x.split(5), T=8)
    names = list(qcfs_fast.simulate(model, x, 1, spikes=True).spikes)
    assert list(long) == list(short) == names
    for name in names:
        assert torch.equal(long[name][:3], short[name])
        assert torch.equal(long[name], again[name])
    assert torch.isfinite(qcfs_fast.simulate(model, x, 6, step_bias=long)).all()


def test_means_come_nearer_to_the_network():
    """What the biases are for: each channel's mean output, on images that they have not seen."""
    model = lively(randomize(Small()), (3, 12, 12))
    biases = qcfs_fast.step_biases(model, images((3, 12, 12), 200, seed=3).split(50), 4)
    x, answers = images((3, 12, 12), 100, seed=4), {}
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: answers.update({name: output.double()}))
        for name, module in model.named_modules()
        if isinstance(module, QCFS)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()

    def error(T, **options):
        total = 0.0
        for name, spikes in qcfs_fast.simulate(model, x, T, spikes=True, **options).spikes.items():
            ours = model.get_submodule(name).thresh.detach() * spikes.double().mean(0)
            total += (ours - answers[name]).mean([0, 2, 3]).square().sum().item()
        return total**0.5

    for T in (1, 2, 4):
        assert error(T, step_bias=biases) < 0.95 * error(T)


def test_the_model_is_left_alone(capsys):
    model = qcfs_fast.prepare(Small(), levels=4).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [(*m._forward_hooks, *m._forward_pre_hooks) for m in model.modules()]
    qcfs_fast.step_biases(model, [images((3, 8, 8))], 2, progress=True)
    assert "step biases: 100%" in capsys.readouterr().err
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert hooks == [(*m._forward_hooks, *m._forward_pre_hooks) for m in model.modules()]
    qcfs_fast.step_biases(model, [images((3, 8, 8))], 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("batches", "options", "error", "message"),
    [
        ([torch.zeros(2, 6)], {"T": 0}, ValueError, "T must be a positive int"),
        ([torch.zeros(2, 6)], {"T": True}, ValueError, "T must be a positive int"),
        ([torch.zeros(2, 6)], {"alpha": 0.0}, ValueError, r"alpha must be in \(0, 1\], got 0.0"),
        ([torch.zeros(2, 6)], {"alpha": 1.5}, ValueError, r"alpha must be in \(0, 1\], got 1.5"),
        ([], {}, ValueError, "step_biases: batches is empty"),
        ([torch.full((2, 6), torch.nan)], {}, ValueError, "step_biases: a batch holds NaN"),
        (["image"], {}, TypeError, r"step_biases: expected tensors or \(tensor, ...\) tuples, got str"),
    ],
)
def test_bad_arguments(batches, options, error, message):
    with pytest.raises(error, match=message):
        qcfs_fast.step_biases(small_net(), batches, **options)


def test_a_model_without_activations():
    with pytest.raises(ConversionError, match="step_biases: the model has no QCFS activation"):
        qcfs_fast.step_biases(nn.Linear(6, 2), [torch.zeros(2, 6)])
