"""The tail of a network: what the model does to its readout, in floats, such as a softmax.

A tail has no spikes. It follows the mean over the time steps, since that mean is what stands for the model's logits:
the softmax of a mean is not the mean of softmaxes. With per_step it is applied to every running mean. It is computed in
float64 and rounded, so that answers do not depend on the batch: torch's vectors and their ends differ by an ulp.

A step is a name and, but for functions of one number, a dimension of the answer [N, ...], from 1 on. In a saved file a
tail is a list of such lists, [["squeeze", 1], ["sigmoid"]].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .schema import is_int, require

Step = tuple[Any, ...]
OF_NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}
OF_DIMENSIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "softmax": torch.softmax,
    "log_softmax": torch.log_softmax,
    "squeeze": torch.squeeze,
}


def checked(steps: Iterable[Any], dims: int) -> tuple[Step, ...]:
    """The steps as tuples; FormatError where one does not fit an answer of so many dimensions, the batch among them."""
    found = []
    require(isinstance(steps, (list, tuple)), "tail is not a list")
    for step in steps:
        require(isinstance(step, (list, tuple)) and len(step) in (1, 2), f"tail: {step!r} is no step")
        name, *dim = step
        require(
            isinstance(name, str) and name in (OF_DIMENSIONS if dim else OF_NUMBERS), f"tail: unknown step {step!r}"
        )
        require(not dim or (is_int(dim[0], 1) and dim[0] < dims), f"tail: {step!r} of an answer of {dims} dimensions")
        dims -= name == "squeeze"
        found.append((name, *dim))
    return tuple(found)


def applied(steps: Iterable[Step], out: Tensor) -> Tensor:
    """The tail of answers [S, N, ...]."""
    exact = out.to(torch.float64)
    for name, *dim in steps:
        exact = OF_DIMENSIONS[name](exact, dim[0] + 1) if dim else OF_NUMBERS[name](exact)
    return exact.to(out.dtype)
