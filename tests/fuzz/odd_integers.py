"""Every integer of every operator in turn, at every power of two and its neighbours, all other operands sound.

ROUND cases in a row have the same sound operands, and are more than there are integers and powers.
"""

import functools

import numpy as np

from . import operators

ROUND = 2**16


@functools.lru_cache(1)
def places(number):
    """(operator, operands, name of an operand with integers, index in it), of a round."""
    rng, found = np.random.default_rng(number), []
    for name in operators.KINDS:
        for _ in range(100):
            operands = operators.sound(rng, name)
            if operands.get("x") != [] and all(t.numel() for t in [operands.get("x")] if hasattr(t, "numel")):
                break
        for key, value in operands.items():
            if isinstance(value, int) and not isinstance(value, bool):
                found.append((name, operands, key, None))
            elif isinstance(value, list):
                found += [(name, operands, key, i) for i, v in enumerate(value) if isinstance(v, int)]
    assert len(found) * len(operators.POWERS) <= ROUND
    return found


def run(case):
    found = places(case // ROUND)
    every = len(found) * len(operators.POWERS)
    case = case % ROUND * 7919 % every  # so that a part of a round has something of each
    name, operands, key, index = found[case % len(found)]
    power = operators.POWERS[case // len(found)]
    value = power if index is None else [*operands[key][:index], power, *operands[key][index + 1 :]]
    return operators.compare(name, {**operands, key: value})
