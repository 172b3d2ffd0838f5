"""Saved networks: round trips, and every kind of damage refused by name."""

import json
import stat
import struct
import warnings

import networks
import pytest
import torch
from networks import converted

import qcfs_fast
from qcfs_fast import FormatError
from qcfs_fast.backend import native
from qcfs_fast.network import saving


@pytest.fixture
def saved(tmp_path):
    snn, x = converted(networks.Small, T=5)
    snn.save(tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors", snn, x


@pytest.mark.parametrize("kind", list(networks.SHAPES), ids=lambda k: k.__name__)
@pytest.mark.parametrize("bits", [8, 16, 24])
def test_round_trip(kind, bits, tmp_path):
    snn, x = converted(kind, T=5, weight_bits=bits)
    path = tmp_path / "net.safetensors"
    snn.save(path)
    again = qcfs_fast.load(path)
    assert torch.equal(snn(x, per_step=True), again(x, per_step=True))
    assert str(snn) == str(again)
    assert snn.report() == again.report()
    assert (again.T, again.max_T, again.weight_bits, again.input_shape) == (5, snn.max_T, bits, snn.input_shape)
    state, other = snn.state_dict(), again.state_dict()
    assert list(state) == list(other)
    assert all(torch.equal(state[k], other[k]) for k in state)
    again.save(tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_eight_bits_take_half_the_room(tmp_path):
    sizes = {}
    for bits in (8, 16):
        converted(networks.Small, weight_bits=bits)[0].save(tmp_path / f"{bits}")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            snn = qcfs_fast.load(tmp_path / f"{bits}")
        sizes[bits] = sum(
            b.numel() * b.element_size() for n, b in snn.named_buffers() if ".weight_" in n and "head" not in n
        )
    assert sizes[16] == 2 * sizes[8]


def test_writing_is_atomic(saved, monkeypatch):
    path, snn, _ = saved
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(qcfs_fast.files, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        snn.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_file_mode_is_the_usual_one(saved):
    assert stat.S_IMODE(saved[0].stat().st_mode) & 0o600 == 0o600
    assert stat.S_IMODE(saved[0].stat().st_mode) & 0o044


def test_missing_places(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder .* does not exist"):
        saved[1].save(tmp_path / "none" / "net.safetensors")
    with pytest.raises(FileNotFoundError, match="no file"):
        qcfs_fast.load(tmp_path / "other")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_truncated(saved, share):
    path = saved[0]
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(FormatError, match="not a complete safetensors file"):
        qcfs_fast.load(path)


def test_another_safetensors_file(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3)}, tmp_path / "x")
    with pytest.raises(FormatError, match="not a network saved by qcfs_fast"):
        qcfs_fast.load(tmp_path / "x")


def rewrite(path, change_header=None, change_tensors=None):
    """Alter a saved file as an editor would, keeping the container valid."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(str(path), framework="pt") as f:
        header = json.loads(f.metadata()["qcfs_fast"])
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    del header["crc32"]  # as in a file without one: what is tested are the checks behind it
    if change_header:
        change_header(header)
    if change_tensors:
        change_tensors(tensors)
    save_file(tensors, path, metadata={"qcfs_fast": json.dumps(header)})


def test_a_bit_that_flipped_is_found(saved):
    """Anywhere in the tensors' bytes; before there was a checksum such a file loaded and gave other answers."""
    path = saved[0]
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    for at in range(8 + length, len(data), (len(data) - length) // 200):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        path.write_bytes(bytes(changed))
        with pytest.raises(FormatError, match=rf"{path}: its checksum does not fit .*copy it again from its source"):
            qcfs_fast.load(path)


def test_a_graph_that_was_altered_is_found(saved):
    path = saved[0]
    data = path.read_bytes()
    assert data.count(b'\\"window\\": 4') == 1
    path.write_bytes(data.replace(b'\\"window\\": 4', b'\\"window\\": 5'))
    with pytest.raises(FormatError, match="its checksum does not fit"):
        qcfs_fast.load(path)


ABOUT = {"dataset": "CIFAR-10 \u00fc", "accuracy": 0.9312, "layers": [1, None, {"deep": True}]}


def test_metadata(saved, tmp_path):
    path, snn, x = saved
    assert (snn.metadata, qcfs_fast.load(path).metadata) == ({}, {})
    snn.save(path, metadata=ABOUT)
    again = qcfs_fast.load(path)
    assert again.metadata == ABOUT
    assert torch.equal(again(x), snn(x))
    again.save(tmp_path / "again")
    assert path.read_bytes() == (tmp_path / "again").read_bytes()
    again.metadata["note"] = "one more"
    again.save(tmp_path / "again")
    assert qcfs_fast.load(tmp_path / "again").metadata == {**ABOUT, "note": "one more"}
    again.save(tmp_path / "again", metadata={})
    assert qcfs_fast.load(tmp_path / "again").metadata == {}


@pytest.mark.parametrize(
    "metadata", [[1], "text", {1: 2}, {"a": (1, 2)}, {"a": float("nan")}, {"a": torch.zeros(1)}, {"a": {1, 2}}]
)
def test_metadata_that_json_does_not_have(saved, metadata):
    path, snn, _ = saved
    before = path.read_bytes()
    with pytest.raises((ValueError, TypeError)):
        snn.save(path, metadata=metadata)
    assert path.read_bytes() == before


def node(header, kind):
    return next(n for n in header["graph"] if n["type"] == kind)


# fmt: off
HEADERS = {
    "version": (lambda h: h.update(format_version=99), "written in format 99.*upgrade"),
    "no version": (lambda h: h.pop("format_version"), "no format version"),
    "T": (lambda h: h.update(T=0), "T is 0"),
    "T kind": (lambda h: h.update(T="4"), "T is '4'"),
    "T bound": (lambda h: h.update(T=10**6), "overflow bound"),
    "T memory": (lambda h: h.update(T=10**8), "would compute"),
    "bits": (lambda h: h.update(weight_bits=7), "weight_bits is 7"),
    "neuron": (lambda h: h["neuron"].update(mode="fast"), "neuron is damaged.*one of plain"),
    "window": (lambda h: h["neuron"].update(mode="offset", window=99), "neuron is damaged.*window must be"),
    "no neuron": (lambda h: h.update(neuron=[]), "neuron is damaged"),
    "no graph": (lambda h: h.pop("graph"), "field is missing"),
    "no details": (lambda h: h.update(details={}), "details do not match"),
    "kind": (lambda h: node(h, "SpikePool").update(type="Evil"), "unknown kind of layer 'Evil'"),
    "input name": (
        lambda h: node(h, "SpikingLayer").update(inputs=["nowhere", "nowhere"]), "no earlier node|inputs do not match"),
    "forward reference": (
        lambda h: node(h, "SpikePool").update(inputs=["block2.relu_1"]), "reads 'block2.relu_1', which is no earlier"),
    "geometry": (lambda h: node(h, "SpikingLayer")["config"].update(geometry=[3, 3]), "geometry is damaged"),
    "negative": (lambda h: node(h, "SpikingLayer")["config"]["geometry"].__setitem__(2, -1), "geometry is damaged"),
    "peaks": (lambda h: node(h, "SpikingLayer")["config"].update(peaks=[]), "peaks are damaged"),
    "pool": (lambda h: node(h, "SpikePool")["config"]["pool"].update(kind="sum"), "pool is damaged"),
    "geometry of zero": (
        lambda h: node(h, "SpikingLayer")["config"]["geometry"].__setitem__(0, 0), "geometry is damaged"),
    "groups": (
        lambda h: node(h, "SpikingLayer")["config"]["geometry"].__setitem__(8, 3),
        r"weight_0 of shape \[3, 3, 8, 8\] does not fit the geometry"),
    "absurd": (lambda h: node(h, "SpikingLayer")["config"]["geometry"].__setitem__(4, 2**40), "geometry is damaged"),
    "stride of a pool": (
        lambda h: node(h, "SpikePool")["config"]["pool"].update(stride=[0, 2]), "pool is damaged .*stride"),
    "section of a pool": (
        lambda h: node(h, "SpikePool")["config"]["pool"].update(section=[1, 1, 0, 1]), "pool is damaged .*section"),
    "multiple": (lambda h: node(h, "SpikePool")["config"]["pool"].update(kind="avg", multiple=0), "multiple is 0"),
    "divisor": (
        lambda h: node(h, "SpikePool")["config"]["pool"].update(divisor_override=[]), "pool is damaged .*divisor"),
    "no kernel": (lambda h: node(h, "SpikePool")["config"]["pool"].update(kernel=[]), "pool is damaged .*kernel"),
    "shape": (lambda h: h.update(input_shape=[4, 10, 12]), "input_shape .* is none that the image input takes"),
    "empty shape": (lambda h: h.update(input_shape=[]), "input_shape .* is none that the image input takes"),
    "small shape": (lambda h: h.update(input_shape=[3, 1, 1]), "cannot run on an image of the shape"),
    "huge shape": (lambda h: h.update(input_shape=[3, 2**24, 2**24]), "more than 137438953472 elements"),
    "details": (lambda h: h["details"].update({"stem.2": 3}), "stem.2: details are damaged"),
    "bits used": (lambda h: h["details"]["stem.2"].update(weight_bits_used="all"), "details lack weight_bits_used"),
    "many bits used": (
        lambda h: h["details"]["stem.2"].update(weight_bits_used=2**63), "details lack weight_bits_used"),
    "kind of input": (
        lambda h: node(h, "EncodingLayer").update(inputs=["stem.2"]), "no earlier node"),
    "reads the image": (lambda h: node(h, "SpikePool").update(inputs=["input"]), "a pool reads maps of spikes"),
    "metadata": (lambda h: h.update(metadata=[1]), "metadata must be a dict"),
    "word for a line": (lambda h: node(h, "ImageInput")["config"].update(line="x"), "line"),
    "null for a line": (lambda h: node(h, "ImageInput")["config"].update(line=None), "line"),
    "number for a line": (lambda h: node(h, "ImageInput")["config"].update(line=1), "line"),
    "list for a line": (lambda h: node(h, "ImageInput")["config"].update(line=[]), "line"),
    "rows of a line": (
        lambda h: [node(h, "ImageInput")["config"].update(line=True), h.update(input_shape=[3, 10, 12])],
        r"input_shape \[3, 10, 12\] is none that the image input takes, which is \[3, L\]"),
    "vector and line": (
        lambda h: node(h, "ImageInput")["config"].update(line=True, vector=True), "is a line or a vector"),
    "form of outputs": (lambda h: h.update(outputs=["tuple", [0, 1]]), "outputs do not match the readouts"),
    "kind of outputs": (lambda h: h.update(outputs=["dict", [0]]), "is no form"),
    "no outputs": (lambda h: h.update(outputs=["list", []]), "outputs do not match the readouts"),
    "tensor": (lambda h: node(h, "SpikingLayer")["tensors"].remove("bias"), "unknown tensors|bias must have"),
    "duplicate": (lambda h: h["graph"].insert(1, dict(h["graph"][1])), "is missing|two nodes are called"),
    "order": (lambda h: h["graph"].reverse(), "no earlier node|first node"),
    "false peaks": (
        lambda h: [
            n["config"].update(peaks=[1] * len(n["config"]["peaks"])) for n in h["graph"] if "peaks" in n["config"]],
        "peaks are less than what its inputs can send"),
    "infinite bound": (lambda h: h["details"]["stem.2"].update(max_T=float("inf")), "details lack max_T"),
    "bare details": (lambda h: h["details"].update({"stem.2": {"max_T": 9}}), "details lack channels"),
    "bias steps": (lambda h: node(h, "EncodingLayer")["config"].update(bias_steps=4), "bias must have values"),
    "bound": (lambda h: [d.update(max_T=10**6) for d in h["details"].values()], "free of overflow up to T=1000000"),
}
# fmt: on


@pytest.mark.parametrize("fault", HEADERS)
def test_altered_header(saved, fault):
    change, message = HEADERS[fault]
    rewrite(saved[0], change_header=change)
    with pytest.raises((FormatError, ValueError), match=message):
        qcfs_fast.load(saved[0])
    if native.module is not None:
        with pytest.raises((native.module.NetworkError, MemoryError)):
            native.module.Network(*saving.read(saved[0]))


TENSORS = {
    "missing": (lambda t: t.pop("block1.relu/bias"), "tensor block1.relu/bias is missing"),
    "extra": (lambda t: t.update({"more": torch.zeros(1)}), "unknown tensors"),
    "dtype": (
        lambda t: t.update({"block1.relu/bias": t["block1.relu/bias"].float()}),
        "bias must be a vector of torch.int32",
    ),
    "odd": (lambda t: t["block1.relu/threshold"].add_(1), "thresholds must be even and positive"),
    "zero": (lambda t: t["block1.relu/threshold"].zero_(), "thresholds must be even and positive"),
    "huge": (lambda t: t["block1.relu/bias"].fill_(2**30), "claims to be free of overflow"),
    "length": (lambda t: t.update({"block1.relu/bias": torch.zeros(3, dtype=torch.int32)}), "bias must have 8 values"),
    "nan": (lambda t: t["head/offset"].fill_(float("nan")), "offset is not finite"),
    "range": (lambda t: t["stem.2/high"].fill_(2**30), "current's range is damaged"),
    "reversed range": (lambda t: t["stem.2/high"].fill_(-1), "current's range is damaged"),
    "image threshold": (lambda t: t["stem.2/threshold"].fill_(2**28), "a threshold exceeds 33554432"),
    "weight": (lambda t: t.update({"block1.relu/weight_0": t["block1.relu/weight_0"].float()}), "weight_0 has dtype"),
    "digits": (lambda t: t["block1.relu/weight_0"].fill_(32640), "weight_0 exceeds 32639"),
    "shape": (
        lambda t: t.update({"block1.relu/weight_0": t["block1.relu/weight_0"][..., :7].contiguous()}),
        "weight_0 does not fit the layer's 8 channels",
    ),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_altered_tensors(saved, fault):
    change, message = TENSORS[fault]
    rewrite(saved[0], change_tensors=change)
    with pytest.raises(FormatError, match=message):
        qcfs_fast.load(saved[0])


def nested(depth):
    """A value whose innermost list is so many levels below it."""
    found = []
    for _ in range(depth):
        found = [found]
    return found


LONE = "\ud800"
TEXTS = {
    "a layer": (lambda h: node(h, "SpikingLayer")["config"].update(layers=[LONE]), "'graph' holds"),
    "metadata": (lambda h: h.update(metadata={"note": ["x", {"y": LONE}]}), "'metadata' holds"),
    "a name in metadata": (lambda h: h.update(metadata={LONE: 1}), "'metadata' holds"),
    "a field": (lambda h: h.update({LONE: 1}), r"'\\ud800' holds '\\ud800', half of a character"),
    **{
        f"{depth} levels of {field}": (
            lambda h, f=field, d=depth: h.update({f: nested(d)}), f"'{field}' is nested deeper")
        for field in ("later", "metadata", "tail", "details") for depth in (63, 940)
    },
}  # fmt: skip


@pytest.mark.parametrize("fault", TEXTS)
def test_texts_and_nesting(saved, fault):
    change, message = TEXTS[fault]
    rewrite(saved[0], change_header=change)
    with pytest.raises(FormatError, match=message):
        qcfs_fast.load(saved[0])
    with pytest.raises((native.module.NetworkError, MemoryError)):
        native.module.Network(*saving.read(saved[0]))


def test_the_deepest_that_both_readers_take(saved):
    path, snn, x = saved
    rewrite(path, change_header=lambda h: h.update(metadata={"a": nested(60)}, later=nested(62)))
    again = qcfs_fast.load(path)
    assert torch.equal(again(x), snn(x))
    assert again.metadata == {"a": nested(60)}
    native.module.Network(*saving.read(path))
    with pytest.raises(FormatError, match="'metadata' is nested deeper than 64 levels"):
        again.save(path, metadata={"a": nested(62)})
    with pytest.raises(ValueError, match="metadata is nested deeper than 64 levels"):
        again.save(path, metadata={"a": nested(5000)})
    with pytest.raises(FormatError, match=r"'metadata' holds '\\ud800'"):
        again.save(path, metadata={"a": LONE})
    qcfs_fast.load(path)


@pytest.mark.parametrize(
    "shape", [(3, -1, 5), "abc", (3, 2**70, 1), (4, 10, 12), (3, 10), 7, (3, 1, 1), (3, 10**6, 10**6)]
)
def test_nothing_is_saved_that_cannot_be_loaded(saved, shape):
    path, snn, _ = saved
    before = path.read_bytes()
    snn.input_shape = shape
    try:
        with pytest.raises(FormatError, match=r"set another snn\.input_shape, or None, which leaves it open"):
            snn.save(path)
    finally:
        snn.input_shape = None
    assert path.read_bytes() == before
    snn.save(path)
    qcfs_fast.load(path)


@pytest.mark.parametrize("path", [".", "/dev/zero"])
def test_what_is_no_regular_file(path):
    with pytest.raises(FileNotFoundError, match=f"load: {path} is no regular file"):
        qcfs_fast.load(path)


def test_fields_of_a_later_version_are_ignored(saved):
    path, snn, x = saved
    rewrite(path, change_header=lambda h: h["neuron"].update(later=1))
    assert torch.equal(qcfs_fast.load(path)(x), snn(x))


def test_random_damage_never_crashes(saved):
    """Bytes flipped anywhere: a FormatError, or a network that still runs (a changed weight is not detectable)."""
    import numpy as np

    path, _, x = saved
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for at in rng.integers(0, 8 + length, 3):
            damaged[at] = int(rng.integers(0, 256))
        path.write_bytes(bytes(damaged))
        try:
            snn = qcfs_fast.load(path)
        except (FormatError, ValueError):
            refused += 1
        else:
            try:
                snn(x)
            except (ValueError, TypeError, RuntimeError):
                refused += 1
    assert refused > 100
