"""Weights once more in the order that a kernel reads them, made at first use and kept as long as the weights live.

Entries are keyed by the identity of the weight tensors and checked against their version counters, so a change in place
packs again. Writes that escape the counter (through .data, .numpy() or another library) are not seen: do not. Tensors
made under torch.inference_mode() have no counter and are packed at every call; so are views made for a single call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

from torch import Tensor

_Key = tuple[str, tuple[int, ...]]
_Entry = tuple[tuple["weakref.ref[Tensor]", ...], tuple[int, ...], Tensor]


class PackedWeights:
    """A cache of packed forms by kind (a name that fixes the layout) and weights."""

    def __init__(self) -> None:
        self._entries: dict[_Key, _Entry] = {}

    def find(self, kind: str, weights: Sequence[Tensor]) -> Tensor | None:
        """The packed form of exactly these weights as they are now, or None."""
        entry = self._entries.get((kind, tuple(map(id, weights))))
        if entry is None:
            return None
        refs, versions, packed = entry
        for w, ref, version in zip(weights, refs, versions, strict=True):
            if ref() is not w or w._version != version:
                return None
        return packed

    def make(self, kind: str, weights: Sequence[Tensor], pack: Callable[[], Tensor]) -> Tensor:
        """Pack, and keep the result unless a weight has no version counter."""
        versions = tuple(-1 if w.is_inference() else w._version for w in weights)
        packed = pack()
        if min(versions, default=0) >= 0:
            key = (kind, tuple(map(id, weights)))
            refs = tuple(weakref.ref(w, lambda _: self._entries.pop(key, None)) for w in weights)
            self._entries[key] = (refs, versions, packed)
        return packed
