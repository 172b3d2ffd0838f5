"""NIR: a network goes through a file and comes back the same; four simulators spike as ours when they run that file.

Weights, thresholds and images lie on a coarse grid, so that floats are exact and membranes meet thresholds. A simulator
that is not installed skips its tests, and all skip without the package nir.
"""

import contextlib
import copy
import importlib.util
import json

import networks
import numpy as np
import pytest
import test_constructs as constructs
import torch
from torch import nn

import qcfs_fast
from qcfs_fast import ConversionError, FormatError
from qcfs_fast.study import command_line, shipped

nir = pytest.importorskip("nir")

from qcfs_fast.exchange import in_simulator  # noqa: E402 - what it imports is known to be there
from qcfs_fast.exchange import nir as exchange  # noqa: E402

KINDS = [
    networks.Small, networks.Groups, networks.Image, networks.Perceptron, networks.AllConvolution, networks.SpikesOut,
]  # fmt: skip
LIBRARIES = [
    pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs {name}"))
    for name in ("torch", "snntorch", "sinabs", "norse", "spikingjelly")
]
T = 9


def named(kind):
    return kind.__name__


def on_grid(kind):
    shape = networks.SHAPES[kind]
    model = networks.on_grid(qcfs_fast.prepare(kind(), levels=4))
    return qcfs_fast.convert(model, T=T), networks.images(shape, grid=8), shape


def through_a_file(graph, tmp_path):
    nir.write(tmp_path / "net.nir", graph)
    return tmp_path / "net.nir"


def assert_same_network(snn, again):
    state, other = snn.state_dict(), again.state_dict()
    assert list(state) == list(other)
    assert all(torch.equal(state[k], other[k]) and state[k].dtype == other[k].dtype for k in state)
    assert str(snn) == str(again)
    assert snn.report() == again.report()


# ------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("neurons", ["if", "composite"])
@pytest.mark.parametrize("bits", [8, 16, 24])
@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_round_trip_through_a_file(kind, bits, neurons, tmp_path):
    snn, x = networks.converted(kind, T=5, weight_bits=bits)
    path = through_a_file(qcfs_fast.to_nir(snn, networks.SHAPES[kind], neurons), tmp_path)
    again = qcfs_fast.from_nir(path)
    assert_same_network(snn, again)
    assert torch.equal(snn(x, per_step=True), again(x, per_step=True))


def test_scaled_images_and_shared_pools(tmp_path):
    """An image whose channels are picked and scaled; averages before a layer and before the readout."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, (3, 1), padding=(1, 0))
            self.c = nn.Linear(4 * 2 * 3, 5)

        def forward(self, x):
            x = torch.cat([x[:, 2].unsqueeze(1) * 0.5 + 0.25, x[:, 0].unsqueeze(1) * 2.0], 1)
            x = torch.relu(self.a(x))
            x = nn.functional.avg_pool2d(x, 2, 2)
            x = torch.relu(self.b(x))
            return self.c(nn.functional.avg_pool2d(x, 2, 2).flatten(1))

    model = networks.on_grid(qcfs_fast.prepare(Net(), levels=4))
    snn, x = qcfs_fast.convert(model, T=T), networks.images((3, 8, 12), grid=8)
    path = through_a_file(qcfs_fast.to_nir(snn, (3, 8, 12)), tmp_path)
    assert_same_network(snn, qcfs_fast.from_nir(path))
    out, spikes = in_simulator(path, "torch").spikes(x, T)
    assert all(torch.equal(spikes[k], s) for k, s in qcfs_fast.trace(snn, x).items())
    torch.testing.assert_close(out.float(), snn(x))


# ------------------------------------------------------------------------------------- spikes of simulators


def assert_same_spikes(snn, x, steps, simulation):
    want = qcfs_fast.trace(snn, x, steps)
    out, got = simulation.spikes(x, steps)
    assert list(got) == list(want)
    for name, spikes in want.items():
        assert 0.05 < spikes.float().mean() < 0.95, f"{name}: the test is void"
        assert torch.equal(got[name], spikes), name
    torch.testing.assert_close(out.float(), snn(x, steps), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_spikes_of_simulators(kind, library, tmp_path):
    snn, x, shape = on_grid(kind)
    assert_same_spikes(snn, x, T, in_simulator(through_a_file(qcfs_fast.to_nir(snn, shape), tmp_path), library))


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_spikes_of_the_composite(kind, tmp_path):
    """Integrator, threshold and feedback, which need no metadata."""
    snn, x, shape = on_grid(kind)
    graph = qcfs_fast.to_nir(snn, shape, neurons="composite")
    assert {type(node).__name__ for node in graph.nodes.values()}.isdisjoint({"IF"})
    for node in graph.nodes.values():
        node.metadata = {}
    assert_same_spikes(snn, x, T, in_simulator(through_a_file(graph, tmp_path), "torch"))


class Convolutional(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 1, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(8 * 8 * 8, 10),
        )  # fmt: skip


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU())
        self.blocks = nn.Sequential(networks.Residual(6, 6), networks.Residual(6, 8, 2))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", [Convolutional, Residual], ids=named)
def test_spikes_on_real_images(kind, library, tmp_path):
    """All test images that ship with the package, as multiples of 1/256."""
    model = networks.on_grid(qcfs_fast.prepare(kind(), levels=4))
    snn = qcfs_fast.convert(model, T=4)
    x = shipped.images().batch(range(300))[0]
    x = torch.round((x - x.min()) / (x.max() - x.min()) * 256) / 256
    path = through_a_file(qcfs_fast.to_nir(snn, x.shape[1:]), tmp_path)
    assert_same_spikes(snn, x, 4, in_simulator(path, library))


@pytest.mark.parametrize("library", LIBRARIES)
def test_trained_network_whose_weights_are_on_no_grid(library):
    """Integers are exact in float64 whatever they stand for; thresholds differ from channel to channel."""
    snn = qcfs_fast.convert(shipped.network()[0], T=3)
    first = next(iter(snn.spiking_layers))
    assert all(d["lossless"] == 0 for name, d in snn.details.items() if name != first)
    x = torch.round(shipped.images().batch(range(8))[0] * 256) / 256
    want = qcfs_fast.trace(snn, x)
    got = in_simulator(qcfs_fast.to_nir(snn, x.shape[1:]), library).spikes(x, 3)[1]
    assert all(torch.equal(got[name], spikes) for name, spikes in want.items())


def test_a_run_begins_anew_after_reset():
    snn, x, shape = on_grid(networks.Small)
    for neurons in ("if", "composite"):
        simulation = in_simulator(qcfs_fast.to_nir(snn, shape, neurons), "torch")
        first, second = simulation(x), simulation(x)
        assert not torch.equal(first, second)
        simulation.reset()
        assert torch.equal(simulation(x), first)


@pytest.mark.parametrize("library", LIBRARIES)
def test_another_batch_needs_a_reset(library):
    snn, x, shape = on_grid(networks.AllConvolution)
    simulation = in_simulator(qcfs_fast.to_nir(snn, shape), library)
    both = simulation(x)
    with pytest.raises(ValueError, match=r"cannot go on with \[1, 3, 8, 8\]; call reset\(\) first"):
        simulation(x[:1])
    simulation.reset()
    assert torch.equal(simulation(x[:1]), both[:1])


# -------------------------------------------------------------------------------------------- refusals


class Strided(nn.Sequential):
    def __init__(self, *layers):
        super().__init__(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), *layers, nn.Flatten(), nn.LazyLinear(5))


def refused(model, shape=(3, 8, 8), prepare=None, **options):
    model(torch.zeros(1, *shape))
    model = networks.on_grid(qcfs_fast.prepare(model, levels=4, **(prepare or {})))
    snn = qcfs_fast.convert(model, T=4, input_shape=shape, **options)
    with pytest.raises(ConversionError) as error:
        qcfs_fast.to_nir(snn, shape)
    return str(error.value)


def test_what_nir_cannot_say_is_refused_by_name():
    keep = {"max_pool": "keep"}
    pooled = Strided(nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    assert "maxpool_1 is a max pool" in refused(pooled, prepare=keep)
    assert "is a max pool, which NIR has not" in refused(Strided(nn.MaxPool2d(2)), prepare=keep)
    assert "windows of different sizes on maps of 8x8" in refused(Strided(nn.AdaptiveAvgPool2d(3)))
    assert "3_source_0 has a kernel of 2x1" in refused(Strided(nn.Conv2d(4, 4, (2, 1)), nn.ReLU()))
    assert 'no offset neurons; set snn.neuron = "plain"' in refused(Strided(), neuron="offset")
    snn, _ = networks.converted(networks.Branches)
    with pytest.raises(ConversionError, match="concat_1 concatenates relu_1 and relu_2"):
        qcfs_fast.to_nir(snn, networks.SHAPES[networks.Branches])


CUT, LARGER = "cuts maps, or pads their sides unlike each other", "enlarges maps"
CONCATENATED = r"concatenates relu_.\[0\] and relu_.\[1\], which no NIR node does; activate each of these"
UNSAID = {
    "a dense block": CONCATENATED,
    "scale of joined": CONCATENATED,
    "and pooled to the maximum": LARGER,
    "to the size of another": LARGER,
    "of a pointwise sum": LARGER,
    "PixelUnshuffle": CUT,
    "slices of phases": CUT,
    "every second pixel": CUT,
    **{name: CUT for name in constructs.SPATIAL if "crop" in name},
    **dict.fromkeys(("uneven pad", "far pad", "ZeroPad2d", "negative pad"), CUT),
    **{name: LARGER for name in constructs.SPATIAL if "nearest" in name or ("huffle" in name and "Un" not in name)},
    **{name: LARGER for name in constructs.SPATIAL if name == "Upsample" or "ConvTranspose2d" in name},
}
UNSAID["ConvTranspose2d, stride 1"] = ""  # a convolution
CONSTRUCTS = [
    *((constructs.arithmetic, name) for name in constructs.ARITHMETIC),
    *((constructs.image, name) for name in constructs.IMAGES),
    *((constructs.spatial, name) for name in constructs.SPATIAL),
    (lambda _: constructs.dense(), "a dense block"),
]


@pytest.mark.filterwarnings("ignore:convert. no threshold")
@pytest.mark.parametrize(("make", "name"), CONSTRUCTS, ids=[name for _, name in CONSTRUCTS])
def test_every_construct_has_equal_spikes_or_is_refused_by_name(make, name, tmp_path):
    shape = constructs.SHAPE
    snn, x = qcfs_fast.convert(networks.on_grid(make(name)), T=4, input_shape=shape), networks.images(shape, grid=64)
    if refusal := UNSAID.get(name):
        with pytest.raises(ConversionError, match=refusal):
            qcfs_fast.to_nir(snn, shape)
        return
    path = through_a_file(qcfs_fast.to_nir(snn, shape), tmp_path)
    assert_same_network(snn, qcfs_fast.from_nir(path))
    out, got = in_simulator(path, "torch").spikes(x, 4)
    want = qcfs_fast.trace(snn, x)
    assert set(got) == set(want)
    assert all(torch.equal(got[layer], spikes) for layer, spikes in want.items())
    torch.testing.assert_close(out.float(), snn(x), rtol=1e-6, atol=1e-6)


def test_what_follows_the_logits_comes_back():
    """NIR has no softmax: simulators give logits, and from_nir gives the network whole, with what is said of it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5), nn.Softmax(1))
    snn = qcfs_fast.convert(networks.on_grid(qcfs_fast.prepare(model, levels=4)), T=4, input_shape=(3, 8, 8))
    snn.metadata = {"source": "a test"}
    x = networks.images((3, 8, 8), grid=8)
    graph = qcfs_fast.to_nir(snn)
    again = qcfs_fast.from_nir(graph)
    assert (again.tail, again.metadata) == (snn.tail, snn.metadata) == ((("softmax", 1),), {"source": "a test"})
    assert torch.equal(again(x, per_step=True), snn(x, per_step=True))
    logits, _ = in_simulator(graph, "torch").spikes(x, 4)
    torch.testing.assert_close(logits.softmax(1).float(), snn(x), rtol=1e-6, atol=1e-6)


def test_sections_of_an_average_are_refused():
    wide = Strided(nn.AvgPool2d(17), nn.Conv2d(4, 4, 1), nn.ReLU())
    assert "sections of an average whose sums do not fit a byte" in refused(wide, (3, 34, 34))


def test_biases_by_step_are_refused():
    model = networks.on_grid(qcfs_fast.prepare(networks.AllConvolution(), levels=4))
    x = networks.images((3, 8, 8))
    snn = qcfs_fast.convert(model, T=4, step_bias=qcfs_fast.step_biases(model, [x], T=4, progress=False))
    with pytest.raises(ConversionError, match="1 has a bias for each step"):
        qcfs_fast.to_nir(snn, (3, 8, 8))


def test_arguments():
    snn, _, shape = on_grid(networks.AllConvolution)
    with pytest.raises(TypeError, match="expected a converted network"):
        qcfs_fast.to_nir(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"give input_shape=\[C, H, W\]"):
        qcfs_fast.to_nir(snn)
    with pytest.raises(ValueError, match=r"input_shape \(4, 8, 8\) is none .* which is \[3, H, W\]"):
        qcfs_fast.to_nir(snn, (4, 8, 8))
    with pytest.raises(ValueError, match="neurons must be one of if, composite, got 'lif'"):
        qcfs_fast.to_nir(snn, shape, neurons="lif")
    with pytest.raises(ValueError, match="library must be one of torch, snntorch"):
        in_simulator(qcfs_fast.to_nir(snn, shape), "brian")


def test_graphs_of_others_are_refused():
    graph = nir.NIRGraph.from_list(nir.Affine(np.ones((3, 2)), np.zeros(3)), nir.IF(np.ones(3), np.ones(3)))
    with pytest.raises(ConversionError, match="not made by to_nir"):
        qcfs_fast.from_nir(graph)
    with pytest.raises(ConversionError, match="if is an IF that does not say how it starts"):
        in_simulator(graph, "torch")
    graph = nir.NIRGraph.from_list(nir.Affine(np.ones((3, 2)), np.zeros(3)), nir.Delay(np.ones(3)))
    with pytest.raises(ConversionError, match="delay is a Delay"):
        in_simulator(graph, "torch")
    with pytest.raises(TypeError, match=r"expected a nir\.NIRGraph or a path"):
        qcfs_fast.from_nir({})


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        qcfs_fast.from_nir(tmp_path / "none.nir")
    (tmp_path / "bad.nir").write_bytes(b"no HDF5")
    with pytest.raises(FormatError, match="not a NIR graph"):
        qcfs_fast.from_nir(tmp_path / "bad.nir")


def test_damaged_files_are_refused(tmp_path):
    """Cut off anywhere, or altered where HDF5 describes its data."""
    snn, _, shape = on_grid(networks.Small)
    path = through_a_file(qcfs_fast.to_nir(snn, shape), tmp_path)
    whole = path.read_bytes()
    for part in range(8):
        path.write_bytes(whole[: part * len(whole) // 8])
        with pytest.raises(FormatError, match=r"net.nir: not a NIR graph"):
            qcfs_fast.from_nir(path)
    for place in range(8, 400, 49):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with contextlib.suppress(FormatError):
            assert_same_network(qcfs_fast.from_nir(path), snn)


@pytest.mark.parametrize(
    ("reads", "said"),
    [
        ("import os; os.abort()", r"HDF5 ended by signal 6"),
        ("import time; time.sleep(60)", r"HDF5 reads it for more than 0.5 seconds"),
        ("raise RuntimeError('bad local heap')", r"RuntimeError: bad local heap"),
    ],
)
def test_a_library_that_fails_on_a_file_ends_no_process_of_ours(tmp_path, monkeypatch, reads, said):
    (tmp_path / "net.nir").write_bytes(b"some HDF5")
    (tmp_path / "nir.py").write_text(f"def read(path):\n    {reads}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(exchange, "READING", 0.5 if "sleep" in reads else 60)
    with pytest.raises(FormatError, match=rf"net.nir: not a NIR graph \({said}"):
        qcfs_fast.from_nir(tmp_path / "net.nir")


def _half_a_unit(graph):
    graph.nodes["3_source_0"].weight = graph.nodes["3_source_0"].weight + 0.5


def _another_stride(graph):
    graph.nodes["3_source_0"].stride = (2, 2)


def _one_threshold(graph):
    graph.nodes["3"].v_threshold = graph.nodes["3"].v_threshold.copy()
    graph.nodes["3"].v_threshold[0, 0, 0] += 2


def _odd_thresholds(graph):
    graph.nodes["3"].v_threshold = graph.nodes["3"].v_threshold + 1


def _lost_edge(graph):
    graph.edges = graph.edges[1:]


def _lost_node(graph):
    del graph.nodes["3_source_0"]


def _header(graph):
    header = json.loads(graph.metadata["qcfs_fast"])
    header["details"]["3"]["max_T"] = 2**31 - 2
    graph.metadata["qcfs_fast"] = json.dumps(header)


def _deep_header(graph):
    graph.metadata["qcfs_fast"] = "[" * 10**6


def _no_group(graph):
    header = json.loads(graph.metadata["qcfs_fast"])
    next(n for n in header["graph"] if n["type"] == "SpikingLayer")["config"]["geometry"][8] = 0
    graph.metadata["qcfs_fast"] = json.dumps(header)


def _no_shape(graph):
    graph.nodes["input"].input_type = {"input": [np.inf, 8, 8]}


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (_half_a_unit, "node '3_source_0' is not what the header"),
        (_another_stride, "node '3_source_0' is not what the header"),
        (_one_threshold, "node '3' is not what the header"),
        (_odd_thresholds, "thresholds must be even"),
        (_lost_edge, "edge .* is not what the header"),
        (_lost_node, "lacks what its header names .*3_source_0"),
        (_header, "claims to be free of overflow up to T=2147483646"),
        (_deep_header, "lacks what its header names .*RecursionError"),
        (_no_group, "lacks what its header names .*ZeroDivisionError"),
        (_no_shape, "lacks what its header names .*OverflowError"),
    ],
)
def test_altered_graphs_are_refused(alter, message):
    model = Strided(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    model(torch.zeros(1, 3, 8, 8))
    snn = qcfs_fast.convert(networks.on_grid(qcfs_fast.prepare(model, levels=4)), T=4)
    graph = copy.deepcopy(qcfs_fast.to_nir(snn, (3, 8, 8)))
    assert_same_network(snn, qcfs_fast.from_nir(graph))
    alter(graph)
    with pytest.raises(FormatError, match=message):
        qcfs_fast.from_nir(graph)


# ----------------------------------------------------------------------------------------- command line


def test_export(tmp_path, capsys):
    snn, x, shape = on_grid(networks.Small)
    snn.save(tmp_path / "net.safetensors")
    wanted = ["export", str(tmp_path / "net.safetensors"), "--format", "nir", "--output", str(tmp_path / "net.nir")]
    assert command_line.main([*wanted, "--input-shape", *map(str, shape)]) == 0
    assert "wrote" in capsys.readouterr().out
    assert_same_network(snn, qcfs_fast.from_nir(tmp_path / "net.nir"))
    assert command_line.main([*wanted, "--input-shape", *map(str, shape), "--neurons", "composite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["neurons"] == "composite"
    assert_same_spikes(snn, x, T, in_simulator(tmp_path / "net.nir", "torch"))


def test_export_that_cannot_be(tmp_path, capsys):
    snn, _ = networks.converted(networks.Branches)
    snn.save(tmp_path / "net.safetensors")
    shape = map(str, networks.SHAPES[networks.Branches])
    arguments = ["export", str(tmp_path / "net.safetensors"), "--format", "nir", "--output", str(tmp_path / "net.nir")]
    assert command_line.main([*arguments, "--input-shape", *shape]) == 1
    assert "concatenates" in capsys.readouterr().err
    assert not (tmp_path / "net.nir").exists()
