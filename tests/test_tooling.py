"""Habits of people who use torch: copies, pickles, state_dicts, shared memory, workers and other processes.

A child process runs the network and returns spikes and logits; they must be those of the parent. Forked children matter
most: the parent's threads do not exist in them, so a pool that believed in them would wait for ever. Each child has a
time limit for that reason.
"""

import copy
import copyreg
import io
import pickle
import threading
from multiprocessing.reduction import ForkingPickler

import networks
import pytest
import torch
import torch.multiprocessing as mp
from markers import slow_but
from torch.utils.data import DataLoader, Dataset

import qcfs_fast

LIMIT = 120  # seconds, for a child


@pytest.fixture(scope="module")
def network():
    return networks.converted(networks.Small, T=5)


def same(snn, other, x):
    answers = torch.equal(snn(x, per_step=True), other(x, per_step=True))
    spikes = zip(qcfs_fast.trace(snn, x).items(), qcfs_fast.trace(other, x).items(), strict=True)
    return answers and all(a == b and torch.equal(s, t) for (a, s), (b, t) in spikes)


def test_a_deep_copy_is_a_network_of_its_own(network):
    snn, x = network
    snn(x)
    twin = copy.deepcopy(snn)
    assert same(snn, twin, x)
    before = snn(x)
    twin.T = 2
    twin.neuron = "offset"
    for buffer in twin.buffers():
        buffer.zero_()
    assert (snn.T, snn.neuron.mode) == (5, "plain")
    assert torch.equal(snn(x), before)


def test_a_pickle_gives_the_same_network(network):
    snn, x = network
    again = pickle.loads(pickle.dumps(snn))
    assert same(snn, again, x)
    assert (again.T, again.max_T, str(again.neuron), again.details) == (snn.T, snn.max_T, str(snn.neuron), snn.details)


@pytest.mark.parametrize("weights_only", [True, False])
def test_torch_save_and_load(weights_only, network):
    """Reading a pickle of a network runs the checks of a file and no other code, so torch needs no trust."""
    snn, x = network
    file = io.BytesIO()
    torch.save({"net": snn, "epoch": 3}, file)
    file.seek(0)
    found = torch.load(file, weights_only=weights_only)
    assert found["epoch"] == 3
    assert same(snn, found["net"], x)


def test_a_pickle_names_no_code_but_the_loader(network):
    snn, _ = network
    known = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        file = io.BytesIO()
        torch.save(snn, file)
        file.seek(0)
        assert torch.serialization.get_unsafe_globals_in_checkpoint(file) == ["qcfs_fast.network.loading.network_of"]
    finally:
        torch.serialization.add_safe_globals(known)


def test_every_mode_and_what_was_set_travels(network):
    snn, x = network
    snn = copy.deepcopy(snn)
    for mode in ("offset", "signed", "sum"):
        snn.neuron, snn.T = mode, 2
        again = pickle.loads(pickle.dumps(snn))
        assert (again.T, again.neuron) == (2, snn.neuron)
        assert torch.equal(again(x), snn(x))


def test_a_damaged_pickle_is_refused(network):
    snn, _ = network
    restore, (header, tensors) = copyreg.dispatch_table[qcfs_fast.SNN](snn)
    name = next(key for key, t in tensors.items() if t.dtype == torch.int16)
    t = tensors[name]
    views = [t.to(torch.float32), t.mT, t.to_sparse(), t[..., :1].expand_as(t), torch.nn.Parameter(t, False), 3]
    for bad in views:
        with pytest.raises(qcfs_fast.FormatError, match=r"tensor|dtype|wrong form"):
            restore(header, {**tensors, name: bad})
    for bad in (None, b"", "{", "[]", "{}", header[:-1], header.replace('"T": 5', '"T": 10000000')):
        with pytest.raises(qcfs_fast.FormatError):
            restore(bad, tensors)
    for bad in (None, [], {1: 2}):
        with pytest.raises(qcfs_fast.FormatError):
            restore(header, bad)
    assert restore(header, tensors).T == snn.T


def test_a_shallow_copy_shares_tensors_alone(network):
    snn, x = network
    twin = copy.copy(snn)
    twin.T = 2
    assert snn.T == 5
    assert {t.data_ptr() for t in twin.buffers()} == {t.data_ptr() for t in snn.buffers()}
    assert torch.equal(twin(x, 5), snn(x))


def test_a_state_dict_goes_into_a_network_of_the_same_shape(network):
    snn, x = network
    file = io.BytesIO()
    torch.save(snn.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(snn)
    for buffer in other.buffers():
        buffer.zero_()
    assert not torch.equal(other(x), snn(x))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same(snn, other, x)


def test_shared_memory(network):
    snn, x = network
    shared = copy.deepcopy(snn).share_memory()
    assert all(b.is_shared() for b in shared.buffers())
    assert same(snn, shared, x)


def test_shared_tensors_are_sent_and_not_copied(network):
    snn, x = network
    shared = copy.deepcopy(snn).share_memory()
    there = pickle.loads(ForkingPickler.dumps(shared))  # as to a spawned process
    assert same(shared, there, x)
    for buffer in shared.buffers():
        buffer.zero_()
    assert not any(buffer.any() for buffer in there.buffers())


# ------------------------------------------------------------------------------------ other processes


def _child(snn, x, queue):
    queue.put((snn(x).numpy(), {name: s.numpy() for name, s in qcfs_fast.trace(snn, x).items()}))


def answered_by_a_child(method, snn, x):
    context = mp.get_context(method)
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(snn, x, queue))
    child.start()
    found = []
    reader = threading.Thread(target=lambda: found.append(queue.get()), daemon=True)
    reader.start()
    reader.join(LIMIT)
    child.join(5 if found else 0)
    if child.is_alive():
        child.kill()
    assert found, f"the child gave no answer within {LIMIT} s"
    assert child.exitcode == 0
    logits, spikes = found[0]
    assert torch.equal(torch.from_numpy(logits), snn(x))
    assert all(torch.equal(torch.from_numpy(spikes[name]), s) for name, s in qcfs_fast.trace(snn, x).items())


@pytest.mark.parametrize("method", slow_but(["fork"], ["fork", "spawn"]))
@pytest.mark.parametrize("shared", [False, True], ids=["copied", "shared"])
def test_child_processes(method, shared, network):
    snn, x = network
    snn = copy.deepcopy(snn)
    if shared:
        snn.share_memory()
    torch.set_num_threads(2)
    snn(x)  # threads and plans exist before the fork
    answered_by_a_child(method, snn, x)


class Spikes(Dataset):
    """Images that a worker turns into spikes with its network."""

    def __init__(self, snn, images):
        self.snn, self.images = snn, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        x = self.images[i : i + 1]
        return self.snn(x)[0], next(reversed(qcfs_fast.trace(self.snn, x).values()))[:, 0]


@pytest.mark.parametrize("method", slow_but(["fork"], ["fork", "spawn"]))
def test_workers_of_a_data_loader(method, network):
    snn, x = network
    snn(x)
    loader = DataLoader(Spikes(snn, x), batch_size=2, num_workers=2, multiprocessing_context=method, timeout=LIMIT)
    logits, spikes = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert torch.equal(logits, snn(x))
    assert torch.equal(spikes.transpose(0, 1), next(reversed(qcfs_fast.trace(snn, x).values())))
