"""Saved networks that somebody altered: bytes of a file; or the graph in its header and the tensors, as they come out
of a file without a checksum, which spares most cases the container.

A file is refused by a FormatError, in Python and by the native reader alike. Or it is accepted: then it prints, saves
to a file that loads and saves to the same bytes, and runs, native and reference alike, on an image of the shape it
states.
"""

import copy
import functools
import json
import math
import re
import tempfile
from pathlib import Path

import networks
import numpy as np
import torch
from safetensors.torch import load as load_tensors

import qcfs_fast
from qcfs_fast import FormatError, backend
from qcfs_fast.backend import native
from qcfs_fast.network import loading, saving

from . import corpus

DATA = Path(__file__).parent.parent / "data"
VALUES = [0, 1, 2, 3, 5, 7, 8, 9, 16, 24, 63, 64, 65, 255, 256, -1, 1.5, 1e9, 2**15, 2**20, 2**24, 2**24 + 1, 2**31 - 1]
VALUES += [
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    10**30,
    -(2**31),
    None,
    True,
    False,
    "",
    "avg",
    "max",
    "input",
    [],
    {},
]
VALUES += ["sum", "signed", "EncodingLayer", "SpikePool", [1, 1], [0, 1, 0, 1], [1] * 9, {"mode": "sum"}, math.nan]


class Two(torch.nn.Module):
    """Two outputs, one with a tail: what libqcfs leaves to Python."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = torch.nn.Conv2d(1, 2, 3), torch.nn.Conv2d(2, 2, 1), torch.nn.Conv2d(2, 1, 1)

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.b(x), {"second": torch.sigmoid(self.c(x))}


def originals():
    """Sound files of every kind of node and neuron, with shapes stated and without: bytes, header and tensors."""
    found = [path.read_bytes() for path in sorted(DATA.glob("*.safetensors"))]
    with tempfile.TemporaryDirectory() as folder:
        for i, kind in enumerate(networks.SHAPES):
            snn, x = networks.converted(kind, T=3, weight_bits=(16, 8, 24)[i % 3])
            snn.input_shape = tuple(x.shape[1:])
            snn.save(Path(folder) / "net", {"about": [1, "two"]} if i % 2 else None)
            found.append((Path(folder) / "net").read_bytes())
        for build, shape in (*corpus.NEWER.values(), (Two, (1, 4, 4))):
            snn = corpus.converted(build, shape)
            snn.input_shape = shape
            snn.save(Path(folder) / "net")
            found.append((Path(folder) / "net").read_bytes())
    return [(data, header_of(data), load_tensors(data)) for data in found]


def header_of(data):
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["qcfs_fast"]


ORIGINALS = originals()


def places(tree, path=()):
    """Every place in a tree of JSON values."""
    yield path
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield from places(tree[key], (*path, key))


def alter_tree(rng, tree):
    """Another value at a place, or one that stands at another place, or none."""
    found = list(places(tree))
    *path, key = found[1 + rng.integers(len(found) - 1)]
    for step in path:
        tree = tree[step]
    way = rng.integers(8)
    if way == 0:
        del tree[key]
    elif way == 1 and isinstance(tree, list):
        tree.insert(key, copy.deepcopy(tree[rng.integers(len(tree))]))
    elif way == 2 and isinstance(tree[key], int):
        tree[key] += int(rng.choice([-1, 1]))
    else:
        tree[key] = copy.deepcopy(VALUES[rng.integers(len(VALUES))])


def damaged(rng, data):
    """The file cut off, bits of it flipped, or other bytes in the text of its container and header."""
    way = rng.integers(3)
    if way == 0:
        return data[: rng.integers(len(data))]
    changed = bytearray(data)
    end = len(data) if way == 1 else 8 + int.from_bytes(data[:8], "little")
    for at in rng.integers(0, end, rng.integers(1, 4)):
        changed[at] = changed[at] ^ 1 << int(rng.integers(8)) if way == 1 else int(rng.integers(256))
    return bytes(changed)


def altered(rng, text, tensors):
    """A header and tensors with one or two values of the graph replaced, and sometimes a tensor."""
    header, tensors = json.loads(text), dict(tensors)
    header.pop("crc32", None)
    for _ in range(rng.integers(1, 3)):
        alter_tree(rng, header)
    if rng.random() < 0.2:
        name = sorted(tensors)[rng.integers(len(tensors))]
        t = tensors[name].clone()
        if t.numel() and rng.random() < 0.5:
            t.view(-1)[rng.integers(t.numel())] = [0, 1, -1, 100, -128][rng.integers(5)]
            tensors[name] = t
        elif t.dim():
            tensors[name] = t.narrow(int(rng.integers(t.dim())), 0, 1 if t.numel() else 0).contiguous()
    return json.dumps(header), tensors


@functools.cache
def folder():
    return tempfile.TemporaryDirectory()


def run(seed):
    rng = np.random.default_rng(seed)
    path, again = (Path(folder().name) / name for name in ("a", "b"))
    data, text, tensors = ORIGINALS[rng.integers(len(ORIGINALS))]
    from_file = rng.random() < 0.375
    try:
        if from_file:
            path.write_bytes(damaged(rng, data))
            snn = qcfs_fast.load(path)
        else:
            text, tensors = altered(rng, text, tensors)
            snn = loading.network_of(text, tensors)
    except FormatError as error:
        if from_file and str(path) not in str(error):
            raise AssertionError("the message names no file") from error
        if from_file:
            try:
                text, tensors = saving.read(path)
            except FormatError:  # the container: of which libqcfs has a reader of its own (native/hostile_files.cpp)
                return "refused"
        if "elements; use" in str(error) or "metadata must be" in str(error) or refused_natively(text, tensors):
            return "refused"  # of metadata the native reader sees that it is an object, and looks no further
        raise AssertionError("the native reader takes what Python refuses") from error
    str(snn), snn.report()
    text, tensors = snn.saved()
    twin = loading.network_of(text, tensors)
    if from_file:
        snn.save(path)
        twin.save(again)
        assert path.read_bytes() == again.read_bytes()
    assert text == twin.saved()[0]
    assert all(torch.equal(t, tensors[name]) for name, t in twin.saved()[1].items())
    return outcome_of(rng, snn)


def outcome_of(rng, snn):
    """Whether a network that was accepted runs, natively as the reference does."""
    stated = snn.input_shape
    image = snn.layers["input"].config
    shape = stated or (image.channels, *[8] * (image.dims - 2))
    written = json.loads(snn._header())
    configs = json.dumps([node["config"] for node in written["graph"]])
    if math.prod(shape) > 10**5 or snn.T > 10**4 or max(map(int, re.findall(r"\d+", configs))) > 4096:
        return "large"  # what it computes, within the bound of loading, would take minutes
    several = sum(node["type"] == "Readout" for node in written["graph"]) > 1
    assert refused_natively(snn._header(), snn.saved()[1]) == several
    x = torch.from_numpy(rng.standard_normal((2, *shape))).float()
    T = min(snn.T, 4)
    try:
        out = snn(x, T)
    except (MemoryError, RuntimeError) as error:
        if "memory" in str(error):  # a padding of 2^24 is no damage
            return "large"
        raise
    except ValueError:
        assert stated is None, "an image of the shape that it states is refused"
        return "accepted"
    with backend.force(reference=True):
        expected = snn(x, T)
    for a, b in zip(leaves(out), leaves(expected), strict=True):
        assert torch.equal(a, b) or not torch.isfinite(a).all()
    return "ran"


def leaves(out):
    """The tensors of one output or several."""
    if isinstance(out, torch.Tensor):
        return [out]
    return [t for part in (out.values() if isinstance(out, dict) else out) for t in leaves(part)]


def refused_natively(text, tensors):
    """Whether the native reader refuses a header and tensors, or leaves it to what compares checksums."""
    if '"crc32"' in text:
        return True
    try:
        native.module.Network(text, tensors)
    except native.module.NetworkError:
        return True
    return False
