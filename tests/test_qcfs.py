"""The activation: forward and both gradients against the formulas, in exact rationals where it matters."""

from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qcfs_fast
from qcfs_fast import QCFS

OPS = torch.ops.qcfs_fast


def formula(z, theta, L):
    """theta * clip(floor(zL/theta + 1/2)/L, 0, 1) in rationals."""
    z, theta = Fraction(z), Fraction(theta)
    return theta * min(max(Fraction(floor(z * L / theta + Fraction(1, 2)), L), Fraction(0)), Fraction(1))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.integers(-300, 900), st.integers(-2, 3), st.sampled_from([1, 2, 4, 8, 16]))
def test_forward_on_a_dyadic_grid_is_exact(numerator, log_theta, L):
    """z on multiples of theta/64 includes every tie; halves round up."""
    theta = 2.0**log_theta
    z = numerator / 64 * theta
    layer = QCFS(levels=L, threshold=theta).double()
    assert layer(torch.tensor([z], dtype=torch.float64)).item() == float(formula(z, theta, L))


def test_halves_round_up():
    layer = QCFS(levels=4, threshold=1.0)
    z = torch.tensor([-0.2, -0.125, 0.0, 0.125, 0.375, 0.625, 0.875, 0.8749, 1.0, 5.0])
    assert torch.equal(layer(z), torch.tensor([0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 1.0, 1.0]))


@pytest.mark.parametrize("L", [1, 2, 4, 8, 7])
def test_gradients(L):
    theta = 1.7
    layer = QCFS(levels=L, threshold=theta).double()
    theta = layer.thresh.item()
    z = torch.linspace(-2, 4, 601, dtype=torch.float64) + 1e-4
    z.requires_grad_(True)
    layer(z).sum().backward()
    inside = (z.detach() > 0) & (z.detach() < theta)
    assert torch.equal(z.grad, inside.double())
    ratio = z.detach() / theta
    quantised = torch.clamp(torch.floor(ratio * L + 0.5) / L, 0, 1)
    d_theta = torch.where(ratio > 1, 1.0, torch.where(ratio < 0, 0.0, quantised - ratio))
    assert layer.thresh.grad.item() == pytest.approx(d_theta.sum().item(), rel=1e-12)


def test_threshold_gradient_is_per_channel():
    layer = QCFS(4, 1.0, channels=3)
    x = torch.tensor([[0.3, 2.0, -1.0]], requires_grad=True)
    layer(x).sum().backward()
    assert layer.thresh.shape == (3,)
    assert layer.thresh.grad.tolist() == pytest.approx([0.25 - 0.3, 1.0, 0.0])


@pytest.mark.parametrize("T", [1, 2, 3, 4, 8, 16, 70])
def test_spike_count_of_a_constant_current_is_qcfs_with_L_equal_T(T):
    """simulate, the converted network and the activation agree: Bu et al., theorem 2 with matching T and L."""
    model = torch.nn.Sequential(
        torch.nn.Linear(1, 1, bias=False), QCFS(T, 0.75), torch.nn.Linear(1, 1, bias=False)
    ).eval()
    model[0].weight.data.fill_(1.0)
    model[2].weight.data.fill_(1.0)
    x = torch.arange(-256, 768)[:, None] / 512  # exact in the 16 bits of the analog input; ties included
    snn = qcfs_fast.convert(model, T=T, max_T=70)
    want = model(x)
    assert torch.allclose(snn(x), want, atol=1e-6)
    assert torch.allclose(qcfs_fast.simulate(model, x, T)[-1].float(), want, atol=1e-6)
    counts = qcfs_fast.trace(snn, x)["1"].sum(0)
    assert 0.05 < counts.float().mean() / T < 0.95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": 0}, "levels must be a positive integer"),
        ({"levels": 2.5}, "levels must be a positive integer"),
        ({"levels": True}, "levels must be a positive integer"),
        ({"threshold": 0}, "threshold must be a positive finite number"),
        ({"threshold": -1.0}, "threshold must be a positive finite number"),
        ({"threshold": float("nan")}, "threshold must be a positive finite number"),
        ({"channels": 0}, "channels must be None or a positive integer"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        QCFS(**arguments)


def test_per_channel_thresholds_must_fit():
    with pytest.raises(ValueError, match="3 thresholds do not fit"):
        QCFS(4, 1.0, channels=3)(torch.zeros(2, 4, 5, 5))
