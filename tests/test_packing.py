"""The one cache of packed weights: what is kept, when it is stale, and into which memory it is packed again."""

import ctypes
import gc
import os
import weakref
from pathlib import Path

import networks
import pytest
import torch
from torch import nn

import qcfs_fast
from qcfs_fast.backend import packing
from qcfs_fast.backend.packing import PackedWeights, Packing


@pytest.fixture
def cache():
    return PackedWeights()


class Maker:
    """A layout that adds its weights up, and counts how often it was asked to."""

    def __init__(self, *weights, layout="sum", in_place=False):
        self.made = 0
        self.packing = Packing(layout, weights, self.make, in_place)

    def make(self):
        self.made += 1
        return (sum(w.to(torch.int32) for w in self.packing.weights), torch.tensor([self.made]))


def weight(n=3):
    return torch.arange(n, dtype=torch.int16)


def test_packed_once_for_each_layout_and_set_of_weights(cache):
    a, b = weight(), weight()
    makers = [Maker(a), Maker(b), Maker(a, b), Maker(b, a), Maker(a, layout="other")]
    found = [cache.get(m.packing) for m in makers]
    for maker, packed in zip(makers, found, strict=True):
        assert cache.get(maker.packing) is packed
        assert maker.made == 1
    assert len({id(p) for p in found}) == len(found)


def test_a_change_packs_again(cache):
    """Into new memory: a kernel in another thread may be reading the old."""
    w = weight()
    maker = Maker(w)
    first = cache.get(maker.packing)
    w.mul_(2)
    second = cache.get(maker.packing)
    assert maker.made == 2
    assert first[0].tolist() == [0, 1, 2]
    assert second[0].tolist() == [0, 2, 4]


def test_a_change_while_weights_are_packed_is_seen_by_the_next_call(cache):
    w = weight()
    maker = Maker(w)

    def disturbed():
        packed = maker.make()
        w.mul_(2)  # as another thread may
        return packed

    maker.packing.make = disturbed
    cache.get(maker.packing)
    maker.packing.make = maker.make
    assert cache.get(maker.packing)[0].tolist() == [0, 2, 4]


def test_in_place_a_change_packs_again_into_the_same_memory(cache):
    """CUDA graphs that were captured before go on reading it."""
    w = weight()
    maker = Maker(w, in_place=True)
    first = cache.get(maker.packing)
    w.mul_(2)
    second = cache.get(maker.packing)
    assert maker.made == 2
    assert [t.data_ptr() for t in second] == [t.data_ptr() for t in first]
    assert second[0].tolist() == [0, 2, 4]


def test_another_address_is_another_weight(cache):
    w = weight()
    maker = Maker(w)
    cache.get(maker.packing)
    version = w._version
    w.set_(torch.tensor([7, 7, 7], dtype=torch.int16))
    while w._version < version:
        w.add_(0)
    assert cache.get(maker.packing)[0].tolist() == [7, 7, 7]


def test_of_another_size_it_gets_new_memory(cache):
    w = weight()
    maker = Maker(w, in_place=True)
    cache.get(maker.packing)
    w.set_(torch.ones(5, dtype=torch.int16))
    assert cache.get(maker.packing)[0].tolist() == [1] * 5


def test_inference_tensors_are_packed_at_every_call(cache):
    """They have no version counter, so a change could not be seen."""
    with torch.inference_mode():
        w = weight()
        maker = Maker(w)
        for n in (1, 2):
            assert cache.get(maker.packing)[0].tolist() == w.tolist()
            assert maker.made == n
            w.add_(1)
    assert cache._entries == {}


def test_what_inference_mode_packed_can_be_packed_again_outside(cache):
    w = weight()
    maker = Maker(w, in_place=True)
    with torch.inference_mode():
        first = cache.get(maker.packing)
    w.mul_(3)
    again = cache.get(maker.packing)
    assert again[0].data_ptr() == first[0].data_ptr()
    assert again[0].tolist() == [0, 3, 6]


def test_a_capture_keeps_nothing(cache, monkeypatch):
    """Packing is recorded then, not done: it must neither serve calls outside of it nor change the old memory."""
    w = weight()
    maker = Maker(w, in_place=True)
    monkeypatch.setattr(packing, "capturing", lambda x: True)
    cache.get(maker.packing)
    assert cache._entries == {}
    monkeypatch.setattr(packing, "capturing", lambda x: False)
    kept = cache.get(maker.packing)
    w.mul_(2)
    monkeypatch.setattr(packing, "capturing", lambda x: True)
    recorded = cache.get(maker.packing)
    assert recorded[0].tolist() == [0, 2, 4]
    assert kept[0].tolist() == [0, 1, 2]
    monkeypatch.setattr(packing, "capturing", lambda x: False)
    assert cache.get(maker.packing)[0].tolist() == [0, 2, 4]


def test_it_goes_with_the_weight(cache):
    a, b = weight(), weight()
    maker = Maker(a, b)
    cache.get(maker.packing)
    assert len(cache._entries) == 1
    maker.packing = None
    del maker, a
    gc.collect()
    assert cache._entries == {}


def test_packed_weights_end_with_their_network():
    """Those of the operators and those of the native network, whose memory is seen in the process."""
    gc.collect()
    before, resident = len(packing.packed_weights._entries), []
    trim = getattr(ctypes.CDLL(None), "malloc_trim", int)  # what is free, glibc keeps or not as it likes
    for _ in range(12):
        model = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 4))
        snn = qcfs_fast.convert(networks.lively(model, (64,)), T=2, progress=False, check=False)
        x = networks.images((64,))
        snn(x)
        qcfs_fast.trace(snn, x)  # by operators
        assert len(packing.packed_weights._entries) > before
        gone = weakref.ref(snn)
        del snn
        gc.collect()
        assert gone() is None
        assert len(packing.packed_weights._entries) == before
        trim(0)
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
    assert max(resident[6:]) < resident[5] + 24  # MiB; the weights of three networks would be so much
