"""The network and images that ship: they are what their provenance says, and the demo shows what they give."""

import hashlib
import json

import numpy as np
import pytest
import torch

import qcfs_fast
from qcfs_fast.study import shipped


@pytest.fixture(scope="module")
def answers():
    return shipped.answers()


def test_files_are_those_of_the_provenance():
    about = json.loads((shipped.FOLDER / "provenance.json").read_text())
    for part in ("network", "images"):
        content = (shipped.FOLDER / about[part]["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == about[part]["sha256"]
    assert sum(p.stat().st_size for p in shipped.FOLDER.iterdir()) < 1 << 20
    _, trained = shipped.network()
    assert about["network"]["command"].startswith(trained.recipe)
    assert f"{trained.accuracy:.2%}".replace("%", " %") in about["network"]["accuracy"]


def test_images_are_as_published():
    with np.load(shipped.FOLDER / "images.npz") as file:
        assert file["images"].shape == (300, 1, 28, 28)
        assert file["labels"][:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]  # as in the data set's own test file
    x, labels = shipped.images().batch(range(300))
    assert x.shape == (300, 1, 32, 32)
    assert len(labels.unique()) == 10


def test_offset_neurons_win_back_what_plain_ones_lose(answers):
    labels, ann, found = answers
    right = {mode: (a == labels).float().mean(1).tolist() for mode, a in found.items()}
    of_ann = float((ann == labels).float().mean())
    assert of_ann > 0.9
    loss = of_ann - right["plain"][1]  # at T = 2
    assert loss > 0.05
    assert right["offset"][1] - right["plain"][1] > 0.75 * loss
    same = float((found["sum"][2] == ann).float().mean())  # at T = L it is the ANN
    assert same >= 0.99


def test_answers_are_those_of_plain_calls(answers):
    model, about = shipped.network()
    x, _ = shipped.images().batch(range(20))
    snn = qcfs_fast.convert(model, T=2, max_T=8, neuron="offset", input_shape=about.shape)
    assert torch.equal(snn(x).argmax(1), answers[2]["offset"][1, :20])


def test_table_and_picture(answers, tmp_path):
    pytest.importorskip("matplotlib")
    labels, ann, found = answers
    text = shipped.table(labels, ann, found)
    assert max(map(len, text.splitlines())) <= 80
    for i, T in enumerate(shipped.STEPS):
        row = [f"{float((a[i] == labels).float().mean()):.1%}" for a in found.values()]
        assert [str(T), *row] in [line.split() for line in text.splitlines()]
    shipped.picture(labels, found, tmp_path / "fashion.png")
    assert (tmp_path / "fashion.png").read_bytes().startswith(b"\x89PNG")
