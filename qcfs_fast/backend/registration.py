"""torch.ops.qcfs_fast: every operator of signature.py as a torch operator.

An operator gets its schema, a fake kernel for torch.compile and torch.export (the checks, then an empty result), and
one function that checks the call and hands it to the backend that choice.py names for the device.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from ..operators import reference
from ..operators.signature import OPERATORS, LinearIf, Operator
from . import choice
from .cpu import CPU
from .protocol import Kernels

library = torch.library.Library("qcfs_fast", "FRAGMENT")
NAMES = tuple(o.name for o in OPERATORS)

REFERENCE = Kernels("reference", dense=False)
for _kind in OPERATORS:
    if not issubclass(_kind, LinearIf):  # a Conv2dIf to every backend
        REFERENCE.operator(_kind)(getattr(reference, _kind.name))


def kernels(name: str) -> Kernels:
    """A backend by name. The GPU backends are imported when an operator first needs them."""
    if name == "cpu":
        return CPU
    if name == "reference":
        return REFERENCE
    module = {"cuda": "qcfs_fast.backend.cuda", "triton": "qcfs_fast.backend.triton.launch"}[name]
    found: Kernels = importlib.import_module(module).KERNELS
    return found


def register(library: torch.library.Library, kind: type[Operator]) -> None:
    """Define an operator in a library: schema, fake kernel, and the way to a backend."""

    def call(*operands: Any) -> Any:
        a = kind.checked(*operands)
        return kernels(choice.backend_on(a.device))(a)

    library.define(kind.schema())
    for device in ("CPU", "CUDA"):
        library.impl(kind.name, call, device)
    fake: Callable[..., Any] = lambda *operands: kind.checked(*operands).empty()  # noqa: E731
    torch.library.register_fake(f"{library.ns}::{kind.name}", fake, lib=library)


for _kind in OPERATORS:
    register(library, _kind)
