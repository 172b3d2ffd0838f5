"""NaN and infinity in an image are an error of the call. A CUDA graph cannot raise it, so its capture keeps the flags.

Every backend writes zeros for a sample that holds such a value, and hands its flags to `refuse_not_finite`. An eager
call waits for them. Under capture nothing may wait: the flags, which every replay writes anew, are left in the list of
`kept_flags`, and CudaGraph.check() looks at them after a replay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .signature import NOT_FINITE

# Values, and the least of them that tells of NaN or infinity.
Flags = list[tuple[Tensor, int]]
_kept: ContextVar[Flags | None] = ContextVar("qcfs_fast_kept_flags", default=None)


def capturing(x: Tensor) -> bool:
    """Whether work on x is being recorded into a CUDA graph, which cannot wait for a result."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@contextmanager
def kept_flags() -> Iterator[Flags]:
    """The flags of what this thread captures until the end of the `with`."""
    flags: Flags = []
    token = _kept.set(flags)
    try:
        yield flags
    finally:
        _kept.reset(token)


def raise_flags(flags: Flags) -> None:
    """ValueError if a flag tells of NaN or infinity. Waits for the GPU."""
    if any(value >= least for values, least in flags for value in values.tolist()):
        raise ValueError(NOT_FINITE)


def refuse_not_finite(values: Tensor, least: int = 1) -> None:
    """ValueError if one of these values, [N], is `least` or more; under capture they are kept for later."""
    if not capturing(values):
        raise_flags([(values, least)])
    elif (flags := _kept.get()) is not None:
        flags.append((values, least))
