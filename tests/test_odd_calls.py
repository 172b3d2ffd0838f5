"""Operators called directly with integers at every power of two and with tensors in odd forms (tests/fuzz).

Each call is refused by a Python exception or gives what the reference gives. The calls run in a child process: a crash
or a hang is a failure of the test, not its end.
"""

import numpy as np
import pytest
import torch
from fuzz import harness, odd_integers, operators

from qcfs_fast import backend
from qcfs_fast.operators import limits

OPS = torch.ops.qcfs_fast


@pytest.mark.slow
def test_integers_at_powers_of_two():
    """An eighth of all; `make fuzz` has every integer at every power."""
    found = odd_integers.places(0)
    assert {name for name, *_ in found} == set(operators.KINDS)
    assert {-(2**63), -1, 0, 2**57, 2**60 + 1, 2**63 - 1} <= set(operators.POWERS)
    cases = len(found) * len(operators.POWERS) // 8
    seen = harness.fuzz("odd_integers", 0, cases)
    assert sum(seen.values()) == cases
    assert not harness.BAD & set(seen)
    assert seen["refused"] > 0.7 * cases
    assert seen["equal"] > 0.02 * cases


@pytest.mark.slow
def test_random_alterations():
    seen = harness.fuzz("operators", 0, 500)
    assert not harness.BAD & set(seen)
    assert seen["equal"] > 100
    assert seen["refused"] > 200


@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (2, 0, 4, 4), (2, 2, 0, 4), (2, 2, 4, 0)])
def test_an_empty_image(shape):
    """Only the batch may be empty."""
    source, scale, shift = torch.zeros(3, dtype=torch.int64), torch.ones(3), torch.zeros(3)
    if shape[0] == 0:
        assert OPS.quantize_input(torch.ones(shape), source, scale, shift)[0].shape == (0, 4, 4, 3)
    else:
        with pytest.raises(ValueError, match=r"x must have shape \[from 0, from 1, from 1, from 1\]"):
            OPS.quantize_input(torch.ones(shape), source, scale, shift)


@pytest.mark.parametrize("reference", [False, True])
def test_none_in_the_place_of_a_tensor(reference):
    rng = np.random.default_rng(0)
    operands = operators.image(rng, False)
    with backend.force(reference=reference):
        for name in ("gain", "weight"):
            with pytest.raises(TypeError, match=rf"conv2d_current: {name} must be a tensor, got None"):
                OPS.conv2d_current(*{**operands, name: None}.values())
        with pytest.raises(TypeError, match="quantize_input: x must be a tensor, got None"):
            OPS.quantize_input(None, torch.zeros(1, dtype=torch.int64), torch.ones(1), torch.zeros(1))


def test_bounds_that_cross():
    """The upper one holds, as torch.clamp has it, in every backend."""
    rng = np.random.default_rng(0)
    operands = {**operators.image(rng, False), "low": None, "high": None}
    O = operands["gain"].numel()
    operands["low"], operands["high"] = (torch.full((O,), v, dtype=torch.int32) for v in (70, -30))
    for settings in ({}, {"reference": True}, {"gpu": "triton"}):
        with backend.force(**settings):
            assert bool((OPS.conv2d_current(*operands.values()) == -30).all())


@pytest.mark.parametrize("source", [-1, 2, 2**40])
def test_a_source_that_is_no_channel(source):
    for reference in (False, True):
        with (
            backend.force(reference=reference),
            pytest.raises((ValueError, RuntimeError, IndexError), match=r"out of (range|DATA bounds)"),
        ):
            OPS.quantize_input(torch.ones(1, 2, 4, 4), torch.tensor([0, source]), torch.ones(2), torch.zeros(2))


def test_sizes_that_no_memory_holds():
    x = torch.zeros((), dtype=torch.uint8).expand(1, 2**20, 2**10, 2**10, 1)
    with pytest.raises(ValueError, match=f"x of shape .* has more than {limits.MAX_ELEMENTS} elements"):
        OPS.max_pool(x, [0, 1, 1], [0, 1, 1])
    with pytest.raises(ValueError, match=f"no integer may exceed {limits.MAX_EXTENT}"):
        OPS.conv2d_current(
            *{**operators.image(np.random.default_rng(1), False), "geometry": [1] * 8 + [2**25]}.values()
        )
    with pytest.raises(ValueError, match="T must be at most"):
        OPS.count(torch.zeros(1, 1, dtype=torch.uint8), 2**31, False)
