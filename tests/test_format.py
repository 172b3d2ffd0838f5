"""The saved file: what version 0.1.0 wrote still gives the same bytes, and docs/format.md suffices to read it.

tests/data holds two networks with every type of node, written by version 0.1.0, and that version's answers: images
[4, 3, 8, 8] and, for T = 9, the running logits of the 16-bit and the 8-bit network.
"""

import json
from pathlib import Path

import format_reader
import numpy as np
import pytest
import torch

import qcfs_fast
from qcfs_fast.network.layers import LAYERS

DATA = Path(__file__).parent / "data"
STORED = {bits: DATA / f"version-0.1.0-{bits}-bit.safetensors" for bits in (16, 8)}
T = 9


@pytest.fixture(scope="module")
def answers():
    with np.load(DATA / "version-0.1.0.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("bits", STORED)
def test_a_file_of_version_0_1_0_gives_the_bytes_it_gave(bits, answers, tmp_path):
    snn, images = qcfs_fast.load(STORED[bits]), torch.from_numpy(answers["images"])
    assert snn(images, T, per_step=True).numpy().tobytes() == answers[f"logits_{bits}"].tobytes()
    snn.save(tmp_path / "again")
    again = qcfs_fast.load(tmp_path / "again")
    assert again(images, T, per_step=True).numpy().tobytes() == answers[f"logits_{bits}"].tobytes()


@pytest.mark.parametrize("bits", STORED)
def test_the_format_has_grown_only(bits, tmp_path):
    """Loaded and saved again, every field and every tensor is what version 0.1.0 wrote, but for the neuron."""
    qcfs_fast.load(STORED[bits]).save(tmp_path / "again")
    (before, old), (after, new) = format_reader.read(STORED[bits]), format_reader.read(tmp_path / "again")
    assert before.pop("written_by") == "0.1.0"
    assert after.pop("written_by") == qcfs_fast.__version__
    assert len(after.pop("crc32")) == 8
    assert (before.pop("format_version"), after.pop("format_version")) == (1, 2)
    assert after.pop("neuron") == {"mode": "plain", "window": 4, "iterations": 1}
    assert json.dumps(before) == json.dumps(after)
    assert old.keys() == new.keys()
    assert all(old[k].dtype == new[k].dtype and np.array_equal(old[k], new[k]) for k in old)


def test_the_stored_networks_have_every_type_of_node():
    for bits, path in STORED.items():
        header, tensors = format_reader.read(path)
        assert {node["type"] for node in header["graph"]} == set(LAYERS)
        configs = [node["config"] for node in header["graph"] if node["type"] == "SpikingLayer"]
        assert any("analog_geometry" in c for c in configs)
        assert any(len(c["peaks"]) > len(c["weight_index"]) for c in configs)
        assert any(g not in (0, 1) for c in configs for g in c["geometry"][8::9])
        assert any(c["vector"] for c in configs)
        assert any(t.dtype == np.int8 for t in tensors.values()) == (bits == 8)


def compare_with_the_page(path, images, snn, steps):
    """The reader of format_reader.py and the network: the same spikes of every layer and the same answers."""
    spikes, logits = format_reader.run(path, images.numpy(), steps)
    ours = qcfs_fast.trace(snn, images, steps)
    rates = []
    for name, found in spikes.items():
        maps = np.moveaxis(found, -1, 2)[: ours[name].shape[0]].reshape(ours[name].shape)
        assert np.array_equal(maps, ours[name].numpy().astype(np.int64)), name
        rates.append(np.abs(found).mean() / (steps if snn.neuron.mode == "sum" else 1))
    assert 0.02 < min(rates) < max(rates) < 0.98
    answer = snn(images, steps)[None] if snn.neuron.mode == "sum" else snn(images, steps, per_step=True)
    assert logits.tobytes() == answer.numpy().tobytes()
    return spikes, logits


@pytest.mark.parametrize("bits", STORED)
def test_a_reader_that_knows_the_page_alone_computes_the_same_bytes(bits, answers):
    images = torch.from_numpy(answers["images"])
    _, logits = compare_with_the_page(STORED[bits], images, qcfs_fast.load(STORED[bits]), T)
    assert logits.tobytes() == answers[f"logits_{bits}"].tobytes()


@pytest.mark.parametrize(
    ("neuron", "steps"),
    [
        *[(qcfs_fast.Neuron("offset", w, i), t) for w, i, t in ((4, 1, 2), (4, 1, 9), (8, 2, 8), (1, 1, 1))],
        *[(qcfs_fast.Neuron("masked", w), t) for w, t in ((4, 2), (3, 9))],
        *[(qcfs_fast.Neuron("signed"), t) for t in (1, 4, 9)],
        *[(qcfs_fast.Neuron("sum"), t) for t in (1, 4)],
    ],
    ids=lambda v: str(v).replace(" ", "_"),
)
@pytest.mark.parametrize("bits", STORED)
def test_every_mode_is_as_the_page_says(bits, neuron, steps, answers, tmp_path):
    snn, images = qcfs_fast.load(STORED[bits]), torch.from_numpy(answers["images"])
    snn.neuron = neuron
    snn.save(tmp_path / "net")
    again = qcfs_fast.load(tmp_path / "net")
    assert again.neuron == neuron
    spikes, _ = compare_with_the_page(tmp_path / "net", images, again, steps)
    if neuron.mode == "signed" and steps > 1:
        assert any((s < 0).any() for s in spikes.values()), "no neuron took a spike back: the test is void"


def test_unknown_fields_are_ignored(answers, tmp_path):
    """As docs/format.md promises, so that a later release may add fields that change no result."""
    from safetensors.torch import load_file, save_file

    header, _ = format_reader.read(STORED[16])
    header["colour"] = "blue"
    for node in header["graph"]:
        node["colour"] = node["config"]["colour"] = "blue"
        node["config"].get("pool", {})["colour"] = "blue"
    save_file(load_file(STORED[16]), tmp_path / "net", metadata={"qcfs_fast": json.dumps(header)})
    logits = qcfs_fast.load(tmp_path / "net")(torch.from_numpy(answers["images"]), T, per_step=True)
    assert logits.numpy().tobytes() == answers["logits_16"].tobytes()


def test_the_page_names_everything_in_the_files():
    page = (DATA.parent.parent / "docs" / "format.md").read_text()
    for path in STORED.values():
        header, tensors = format_reader.read(path)
        names = {*header, *LAYERS, "name", "type", "inputs", "config", "tensors"}
        for node in header["graph"]:
            names |= {*node["config"], *node["config"].get("pool", ())}
        names |= {key.split("/")[1] for key in tensors} - {"weight_1", "weight_2"}
        names |= {field for details in header["details"].values() for field in details} - {"max_T"}
        missing = [n for n in names if f"`{n}`" not in page and f"### {n}" not in page]
        assert not missing, missing


def test_a_file_of_format_2_gives_the_bytes_it_gave():
    """Signed neurons, biases by step, weights of 24 bits: written before version 0.2, with that state's answers."""
    with np.load(DATA / "format-2.npz") as stored:
        images, logits = torch.from_numpy(stored["images"]), stored["logits"]
    snn = qcfs_fast.load(DATA / "format-2-24-bit-signed.safetensors")
    assert (snn.neuron.mode, snn.weight_bits, snn.max_T) == ("signed", 24, 5)
    assert snn(images, per_step=True).numpy().tobytes() == logits.tobytes()
    assert any(int(s.min()) < 0 for s in qcfs_fast.trace(snn, images).values())
