"""Weights repacked into a kernel's layout: made at first use, kept for as long as the weights live.

One cache serves every backend, under one rule:

    key            the layout's name (backend and kernel in it) and the identity of the weight tensors
    stale when     a weight's version counter or address has changed since before they were packed
    packed again   into new memory, because a kernel in another thread may be reading the old; but on a GPU into the
                   same memory (`in_place`), because CUDA graphs that were captured before go on reading it
    never kept     weights without a version counter (made under torch.inference_mode()), and what is packed while a
                   CUDA graph is captured: the capture only records it, and its result exists in replays alone
    other streams  may read what was packed on a GPU, so the stream that packs it is waited for, once; and its memory is
                   given to nobody before they have read it, even if the weights are gone

A change through .data or .numpy() does not raise the version counter and is not noticed; never change weights that way.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..operators.finite import capturing

Packed = Sequence[Tensor]


@dataclass(slots=True)
class Packing:
    """A packed form that a kernel wants: its layout, the weights it is made of, and how."""

    layout: str
    weights: Sequence[Tensor]
    make: Callable[[], Packed]
    in_place: bool = False


@dataclass(slots=True)
class _Entry:
    weights: tuple[weakref.ref[Tensor], ...]
    states: tuple[tuple[int, int], ...]
    packed: Packed
    streams: set[int] = field(default_factory=set)  # that have read it

    def fresh(self, weights: Sequence[Tensor]) -> bool:
        for w, ref, state in zip(weights, self.weights, self.states, strict=True):
            if ref() is not w or (w._version, w.data_ptr()) != state:
                return False
        return True

    def lent(self) -> Packed:
        """What was packed, to be read on the current stream. The allocator knows only the stream that made it."""
        if self.packed[0].is_cuda:
            stream = torch.cuda.current_stream(self.packed[0].device)
            if stream.cuda_stream not in self.streams:
                self.streams.add(stream.cuda_stream)
                for t in self.packed:
                    t.record_stream(stream)
        return self.packed


class PackedWeights:
    def __init__(self) -> None:
        self._entries: dict[tuple[str, tuple[int, ...]], _Entry] = {}

    def get(self, packing: Packing) -> Packed:
        """The packed form of exactly these weights as they are now."""
        weights = packing.weights
        key = (packing.layout, tuple(map(id, weights)))
        entry = self._entries.get(key)
        if entry is not None and entry.fresh(weights):
            return entry.lent()
        # Normal tensors even under inference_mode: a later call outside of it may have to write to them.
        with torch.inference_mode(False), torch.no_grad():
            if any(w.is_inference() for w in weights) or capturing(weights[0]):
                return packing.make()
            states = tuple((w._version, w.data_ptr()) for w in weights)  # before: a change meanwhile must show
            packed = packing.make()
            if packing.in_place and entry is not None and _alike(entry.packed, packed):
                for old, new in zip(entry.packed, packed, strict=True):
                    old.copy_(new)
                packed = entry.packed
        if weights[0].is_cuda:
            torch.cuda.current_stream(weights[0].device).synchronize()
        refs = tuple(weakref.ref(w, lambda _: self._entries.pop(key, None)) for w in weights)
        made = self._entries[key] = _Entry(refs, states, packed)
        return made.lent()

    def forget(self, weights: Iterable[Tensor]) -> None:
        """Let go of what was made of these weights; it is made again at their next use."""
        gone = set(map(id, weights))
        for key in [key for key in self._entries if not gone.isdisjoint(key[1])]:
            self._entries.pop(key, None)


@functools.cache
def window_table(windows: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Pooling windows on a GPU, [out, 3]. One copy for each layer shape is kept for good: captured graphs read it."""
    return torch.tensor(windows, dtype=dtype, device=device).reshape(-1, 3)


def _alike(a: Packed, b: Packed) -> bool:
    return [(t.shape, t.dtype, t.device) for t in a] == [(t.shape, t.dtype, t.device) for t in b]


packed_weights = PackedWeights()
