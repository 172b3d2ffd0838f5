"""profile: its counts against the traced spikes, hand counts, brute force, and VGG-16's arithmetic."""

import copy
import functools
import json
import re
import sys
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcfs_fast
from qcfs_fast import QCFS, backend
from qcfs_fast.network.layers import EncodingLayer, Readout, SpikeConcat, SpikePool, SpikingLayer
from qcfs_fast.operators import masks
from qcfs_fast.study.profiling import record

SOURCE = Path(__file__).resolve().parent.parent
MAX_POOLS = "Small with max pools"
NAMES = [*networks.SHAPES, MAX_POOLS]


@functools.cache
def converted(which, images=5):
    """A lively network of tests/networks.py, its model, and images."""
    kind, options = (networks.Small, {"max_pool": "keep"}) if which == MAX_POOLS else (which, {})
    model = networks.lively(networks.randomize(kind()), networks.SHAPES[kind], **options)
    x = networks.images(networks.SHAPES[kind], images)
    return qcfs_fast.convert(model, T=4), model, x


def profiled(snn, x, **options):
    return qcfs_fast.profile(snn, [x[:3], x[3:]] if len(x) > 3 else [x], progress=False, **options)


def by_name(p):
    return {row.name: row for row in p.layers}


# --------------------------------------------------------------------------------------- hand counts


def by_hand():
    """On a 3x3 image: two channels that fire at every step where the image is 1, then channels that fire at every,
    no and every second step."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1), QCFS(4), nn.Conv2d(2, 3, 3, padding=1), QCFS(4), nn.Flatten(), nn.Linear(27, 4)
    ).eval()
    model[1].thresh.data.fill_(1.0)
    model[3].thresh.data.fill_(1.0)
    model[0].weight.data.fill_(1.0)
    model[0].bias.data.zero_()
    model[2].weight.data.zero_()  # synapses of weight zero are synapses
    model[2].bias.data = torch.tensor([1.0, -1.0, 0.5])
    image = torch.zeros(1, 1, 3, 3)
    image[0, 0, 0, 0] = image[0, 0, 1, 1] = 1.0
    return qcfs_fast.convert(model, T=2), image


def test_hand_count():
    snn, image = by_hand()
    p = qcfs_fast.profile(snn, [image], progress=False)
    first, second, head = (by_name(p)[n] for n in ("1", "3", "5"))

    assert (first.kind, first.neurons, first.shape) == ("analog", 18, (2, 3, 3))
    assert first.spikes_by_step == [4, 4]  # two channels, two pixels
    assert (first.dead, first.saturated) == (14, 4)
    assert first.multiply_accumulates == first.synapses == 18  # 9 pixels, 1 -> 2 channels
    assert first.accumulates == 0
    assert first.energy_pj == pytest.approx(18 * 4.6)

    # A 3x3 convolution with padding 1: the corner pixel lies in 2x2 windows, the centre in 3x3; three output channels.
    assert second.accumulates_by_step == [2 * (4 + 9) * 3] * 2
    assert second.synapses == 7 * 7 * 2 * 3  # 2 + 3 + 2 taps per axis
    assert second.synapses_with_padding == 81 * 2 * 3
    assert second.spikes_by_step == [18, 9]
    assert second.rate_by_step == [18 / 27, 9 / 27]
    assert second.rate == 0.5
    assert (second.dead, second.saturated, second.updates) == (9, 9, 54)
    assert [i for i, n in enumerate(second.rate_histogram) if n] == [0, 10, 19]
    assert second.energy_pj == pytest.approx(156 * 0.9)
    assert second.ann_energy_pj == pytest.approx(294 * 4.6)

    assert (head.kind, head.shape) == ("readout", (4,))
    assert head.accumulates_by_step == [18 * 4, 9 * 4]
    assert head.synapses == 108

    t = p.totals
    assert (t["neurons"], t["dead"], t["saturated"]) == (45, 23, 13)
    assert t["rate"] == 35 / 90
    assert t["accumulates_per_image"] == 156 + 108
    assert t["synapses"] == 18 + 294 + 108
    assert t["energy_pj"] == pytest.approx(264 * 0.9 + 18 * 4.6)
    assert t["ann_energy_pj"] == pytest.approx(420 * 4.6)

    repeated = qcfs_fast.profile(snn, [image], analog_every_step=True, progress=False)
    assert by_name(repeated)["1"].multiply_accumulates == 36
    assert repeated.totals["energy_pj"] == pytest.approx(264 * 0.9 + 36 * 4.6)


class PoolAndShortcut(nn.Module):
    """4x4 image, 2x2 average pool, a pointwise layer with a residual, a global pool before the head."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False), nn.Linear(1, 3)
        self.pool, self.act, self.join = nn.AvgPool2d(2), QCFS(4), QCFS(4)

    def forward(self, x):
        x = self.pool(self.act(self.a(x)))
        return self.out(self.join(self.b(x) + x).mean((2, 3)))


def test_hand_count_of_pools_and_residuals():
    model = PoolAndShortcut().eval()
    for p in model.parameters():
        p.data.fill_(1.0)
    image = torch.zeros(2, 1, 4, 4)
    image[:, :, 0, :] = 1.0  # the first row: two spikes in either of two windows, a count of 2 each
    p = profiled(qcfs_fast.convert(model, T=3), image)
    join = by_name(p)["join"]
    # Per image and step 4 spikes pass the pool; each reaches one synapse of b and one residual connection.
    assert join.accumulates_by_step == [2 * 8] * 3
    assert join.residual_accumulates == 2 * 4 * 3
    assert join.synapses == 4  # the residual is no multiplication
    assert p.totals["residual_accumulates_per_image"] == 12
    # The sum b(x) + x is 0.5 + 0.5 in both windows: they fire at every step, and every spike reaches 3 classes.
    assert join.spikes_by_step == [4] * 3
    assert by_name(p)["out"].accumulates_by_step == [12] * 3
    assert by_name(p)["out"].synapses == 3


# ------------------------------------------------------------------------------ trace and brute force


@pytest.mark.parametrize("which", NAMES, ids=str)
@pytest.mark.parametrize("T", [1, 9])
def test_rates_are_those_of_the_trace(which, T):
    snn, _, x = converted(which)
    p = profiled(snn, x, T=T)
    traced = qcfs_fast.trace(snn, x, T)
    rows = {r.name: r for r in p.layers if r.neurons}
    assert list(rows) == list(traced)
    for name, spikes in traced.items():
        row, by_neuron = rows[name], spikes.sum((0, 1)).flatten()
        assert row.shape == tuple(spikes.shape[2:])
        assert row.spikes_by_step == [int(s.sum()) for s in spikes]
        assert row.spikes == int(spikes.sum())
        assert row.rate == int(spikes.sum()) / spikes.numel()
        assert row.dead == int((by_neuron == 0).sum())
        assert row.saturated == int((by_neuron == T * len(x)).sum())
        share = by_neuron.double() / (T * len(x))
        assert sum(row.rate_histogram) == row.neurons == by_neuron.numel()
        assert row.rate_histogram[0] == int((share < 0.05).sum())
        assert row.rate_histogram[-1] == int((share >= 0.95).sum())
    assert 0.02 < p.totals["rate"] < 0.95
    assert sum(r.neurons for r in p.layers) == p.totals["neurons"]


def window_sums(x, spec):
    """Spikes per window of [.., H, W, C], unscaled; a maximum pool lets one through."""
    rows, cols = spec.windows(x.shape[-3], 0), spec.windows(x.shape[-2], 1)
    sums = np.stack(
        [
            np.stack([x[..., a:b, c:d, :].sum((-3, -2)) for c, d in zip(cols[0::3], cols[1::3], strict=True)], -2)
            for a, b in zip(rows[0::3], rows[1::3], strict=True)
        ],
        -3,
    )
    return np.minimum(sums, 1) if spec.kind == "max" else sums


def dense_operations(x, weight, g, vector):
    """Accumulates per step by running the layer with weights of one on how many spikes are at each place."""
    T = x.shape[0]
    if vector:
        return (x.reshape(T, -1).sum(1) * weight.shape[-1]).tolist()
    kh, kw, sh, sw, ph, pw, dh, dw, groups = g
    maps = torch.from_numpy(x.astype(np.float64)).flatten(0, 1).permute(0, 3, 1, 2)
    ones = torch.ones(weight.shape[3], weight.shape[2], kh, kw, dtype=torch.float64)
    out = F.conv2d(maps, ones, None, (sh, sw), (ph, pw), (dh, dw), groups)
    return [int(v) for v in out.reshape(T, -1).sum(1)]


def brute_force(snn, x, T):
    """Accumulates per step and multiply-accumulates per image of every layer."""
    values, operations, dense = {}, {}, {}

    def watch(name, layer, value):
        if isinstance(layer, (EncodingLayer, SpikingLayer)):
            spikes = masks.unpack(value, T).numpy()
            values[name] = spikes[:, :, None, None] if spikes.ndim == 3 else spikes
        elif isinstance(layer, SpikePool):
            values[name] = window_sums(values[layer.inputs[0]], layer.spec)
        elif isinstance(layer, SpikeConcat):
            values[name] = np.concatenate([values[n] for n in layer.inputs], -1)
        else:
            values[name] = np.ones((1, *value[0].shape)) if not isinstance(layer, Readout) else None
        operations[name], dense[name] = [0] * T, 0
        if isinstance(layer, (EncodingLayer, SpikePool, SpikeConcat)) or name == "input":
            sources = []
        elif isinstance(layer, Readout):
            sources = []
            for i, term in enumerate(layer.terms()):
                plane = values[term.node]
                for spec in sorted(term.pools, key=lambda s: s.kind != "max"):
                    plane = window_sums(plane, spec)
                sources.append((plane, term.weight, term.geometry, term.vector, i))
        else:
            index, vector = layer.config.weight_index, layer.config.vector
            sources = [
                (values[s.node], s.weight, s.geometry, vector, k) for s, k in zip(layer.sources(), index, strict=True)
            ]
            sources += [(values[r.node], torch.empty(0), None, False, None) for r in layer.residuals()]
        seen = set()
        for plane, weight, g, vector, k in sources:
            if weight.numel() == 0:
                found = plane.reshape(T, -1).sum(1).tolist()
            else:
                found = dense_operations(plane, weight, g, vector)
                dense[name] += 0 if k in seen else dense_operations(np.ones_like(plane[:1, :1]), weight, g, vector)[0]
                seen.add(k)
            operations[name] = [a + b for a, b in zip(operations[name], found, strict=True)]
        analog = getattr(layer, "analog", None)
        if analog is not None:
            dense[name] += dense_operations(values["input"][:, :1], analog.weight, analog.geometry, False)[0]

    snn.run(x, T, False, watch)
    return operations, dense


@pytest.mark.parametrize("which", NAMES, ids=str)
def test_operations_by_brute_force(which):
    snn, _, x = converted(which)
    for T in (1, 3, 9):
        rows = by_name(profiled(snn, x, T=T))
        operations, dense = brute_force(snn, x, T)
        assert list(rows) == list(operations)
        for name, row in rows.items():
            assert (row.accumulates_by_step or [0] * T) == operations[name], name
            assert row.synapses == dense[name], name
            assert row.synapses <= row.synapses_with_padding
    assert sum(r.accumulates for r in rows.values()) > 0


def test_operations_from_the_model_itself():
    """A spike's synapses as the model's own convolutions show them, on the same spikes; no pools here."""
    snn, model, x = converted(networks.Groups)
    spikes = qcfs_fast.trace(snn, x, 3)
    counts = {}

    def hook(name):
        def run(module, args):  # on the images of step 0, then those of step 1, ...
            fired = (args[0] != 0).double()
            if isinstance(module, nn.Linear):
                operations = fired * module.out_features
            else:
                ones = torch.ones_like(module.weight)
                operations = F.conv2d(fired, ones, None, module.stride, module.padding, module.dilation, module.groups)
            counts[name] = counts.get(name, 0) + operations.reshape(3, -1).sum(1)

        return run

    handles = [
        m.register_forward_pre_hook(hook(name)) for name, m in model.named_modules() if name in ("b", "c", "d", "out")
    ]
    qcfs_fast.simulate(model, x, 3, spikes=True, force=spikes)
    for handle in handles:
        handle.remove()
    rows = {row.ann_layers[0]: row for row in profiled(snn, x, T=3).layers if row.ann_layers}
    assert set(counts) == {"b", "c", "d", "out"}
    for name, found in counts.items():
        assert rows[name].accumulates_by_step == found.tolist(), name


@pytest.mark.parametrize("mode", ["offset", "masked", "signed", "sum"])
def test_what_a_mode_really_costs(mode):
    snn, _, x = converted(networks.Groups)
    T, window = 3, 4
    plain = {row.name: row for row in profiled(snn, x, T=4).layers}
    snn.neuron = mode
    p = profiled(snn, x, T=T)
    json.dumps(p.to_dict())
    assert mode in p.summary()
    spikes = qcfs_fast.trace(snn, x, T)
    for row in p.layers:
        if row.kind == "spiking" and mode == "sum":
            assert (row.accumulates, row.multiply_accumulates) == (0, row.synapses * len(x))
            assert row.spikes == int(spikes[row.name].sum())
        if row.kind not in ("spiking", "analog"):
            continue
        if mode in ("offset", "masked"):  # the window's four steps, and once more for the first run
            assert row.updates == len(x) * row.neurons * (window + window)
            assert len(row.spikes_by_step) == window
        elif mode == "signed":
            assert row.spikes == int(spikes[row.name].abs().sum())
            assert row.negative_spikes == int((spikes[row.name] < 0).sum())
    first = next(name for name, row in plain.items() if row.accumulates)
    if mode == "offset":  # what arrives at the first spiking layer is as in plain mode at T = 4, and is added up twice
        assert p.layers[list(plain).index(first)].accumulates == 2 * plain[first].accumulates
    if mode == "signed":
        assert sum(row.negative_spikes for row in p.layers) > 0


@pytest.mark.slow
def test_vgg16_arithmetic():
    """The figures that docs/report.md spells out, on the full-size network for 32x32 images."""
    model = networks.randomize(networks.TheirVGG("vgg16", divide=1))
    for m in model.modules():
        if isinstance(m, networks.TheirIF):
            m.thresh.data.fill_(2.0)
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    snn = qcfs_fast.convert(model, T=2, max_T=8)
    p = qcfs_fast.profile(snn, [x], progress=False)
    rows = [r for r in p.layers if r.synapses]
    assert len(rows) == 16

    sizes = [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    convolutions = [(3 * n - 2) ** 2 * widths[i] * widths[i + 1] for i, n in enumerate(sizes)]
    linear = [512 * 4096, 4096 * 4096, 4096 * 10]
    assert [r.synapses for r in rows] == convolutions + linear
    padded = [9 * n * n * widths[i] * widths[i + 1] for i, n in enumerate(sizes)]
    assert [r.synapses_with_padding for r in rows] == padded + linear
    page = (SOURCE / "docs" / "report.md").read_text()
    for figure in (
        sum(convolutions + linear),
        sum(padded + linear),
        convolutions[1],
        padded[1],
        convolutions[-1],
        padded[-1],
    ):
        assert f"{figure:,}" in page

    spikes = qcfs_fast.trace(snn, x)
    first = spikes["layer1.2"].sum(2).long()  # [T, N, H, W]
    corners = first[..., 0, 0] + first[..., 0, -1] + first[..., -1, 0] + first[..., -1, -1]
    edges = first[..., 0, :].sum(-1) + first[..., -1, :].sum(-1) + first[..., :, 0].sum(-1) + first[..., :, -1].sum(-1)
    edges = edges - 2 * corners
    inner = first.sum((-2, -1)) - edges - corners
    assert min(int(corners.sum()), int(edges.sum()), int(inner.sum())) > 0
    want = 64 * (4 * corners + 6 * edges + 9 * inner)
    assert rows[1].accumulates_by_step == want.sum(1).tolist()
    # Behind a 2x2 pool: pixel (y, x) of layer1.6 lies in pooled pixel (y/2, x/2), which 2 or 3 taps an axis read.
    second = spikes["layer1.6"].sum(2).long()
    taps = torch.tensor([2] + [3] * 14 + [2]).repeat_interleave(2)
    assert rows[2].accumulates_by_step == [int((s * taps * taps[:, None]).sum()) * 128 for s in second]
    assert rows[-1].accumulates == 10 * int(spikes["classifier.5"].sum())
    assert p.totals["energy_pj"] == pytest.approx(0.9 * sum(r.accumulates for r in rows) + 4.6 * convolutions[0])
    assert 0.05 < p.totals["rate"] < 0.95


# ----------------------------------------------------------------------------- data, labels, the curve


def test_batches_do_not_matter():
    snn, _, x = converted(networks.Branches)
    with backend.force(cpu_engine="events"):  # left to itself it is chosen for each batch
        one, many = profiled(snn, x[:3]), qcfs_fast.profile(snn, x[:3].split(1), progress=False)
    assert one.images == many.images == 3
    for a, b in zip(one.layers, many.layers, strict=True):
        a.seconds = b.seconds
        assert a == b
    assert one.agreement_by_step == many.agreement_by_step
    assert qcfs_fast.profile(snn, x[:3], progress=False).images == 3  # a bare tensor is one batch


def test_accuracy_and_the_anytime_curve():
    snn, _, x = converted(networks.Small, images=30)
    by_step = snn(x, T=12, per_step=True)
    labels = by_step[-1].argmax(1)
    labels[::3] = (labels[::3] + 1) % 5
    p = profiled(snn, x, T=12, labels=labels)
    want = (by_step.argmax(2) == labels).double().mean(1)
    assert p.accuracy_by_step == want.tolist()
    assert 0 < p.accuracy_by_step[-1] < 1
    assert p.agreement_by_step[-1] == 1
    for point in p.anytime:
        found = snn.predict(x, point["confidence"], T=12)
        assert point["mean_steps"] == float(found.steps.double().mean())
        assert point["accuracy"] == float((found.labels == labels).double().mean())
        assert point["agreement"] == float((found.labels == by_step[-1].argmax(1)).double().mean())
    assert len({point["mean_steps"] for point in p.anytime}) > 5
    pairs = qcfs_fast.profile(snn, [(x[:9], labels[:9]), [x[9:], labels[9:].tolist()]], T=12, progress=False)
    assert pairs.accuracy_by_step == p.accuracy_by_step
    unlabelled = profiled(snn, x, T=12)
    assert unlabelled.accuracy_by_step is None
    assert unlabelled.anytime[3]["accuracy"] is None
    assert "none was given" in unlabelled.summary()


def test_raster_holds_the_first_images_spikes():
    snn, _, x = converted(networks.Small)
    p = profiled(snn, x, T=9, raster_layer="block1.relu")
    spikes = qcfs_fast.trace(snn, x, 9)["block1.relu"].permute(0, 1, 3, 4, 2).flatten(2)
    r = p.raster
    assert (r["layer"], r["of_neurons"], len(r["neurons"]), len(r["steps"])) == ("block1.relu", 240, 128, 3)
    assert r["neurons"] == [i * 240 // 128 for i in range(128)]
    for n, image in enumerate(r["steps"]):
        for neuron, fired in zip(r["neurons"], image, strict=True):
            assert fired == spikes[:, n, neuron].nonzero().flatten().tolist()
    assert profiled(snn, x).raster["layer"] == "block2.relu_1"


def test_bounds_engines_and_times():
    snn, _, x = converted(networks.Small)
    snn = copy.deepcopy(snn)
    p = profiled(snn, x)
    rows = by_name(p)
    for name, detail in snn.details.items():
        assert rows[name].max_T == detail["max_T"]
        assert rows[name].threshold == (detail["threshold_min"], detail["threshold_max"])
    assert p.totals["max_T"] == snn.max_T
    engine = snn.spiking_layers["block1.relu"].engine
    assert engine in ("events", "dense")
    assert rows["block1.relu"].engine == f"{engine}, {qcfs_fast.backend.describe()}"
    assert all(row.seconds > 0 for row in p.layers)
    assert p.totals["seconds"] == sum(row.seconds for row in p.layers)
    assert list(rows) == list(snn.layers)
    assert p.environment["batches"] == "2 of 2 to 3 images"
    assert p.environment["processor"] == qcfs_fast.info()["processor"] != ""


def test_dense_output_has_rates_but_no_accuracy():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), QCFS(4), nn.Conv2d(4, 3, 1)).eval()
    model[1].thresh.data.fill_(0.5)
    snn = qcfs_fast.convert(model, T=2)
    x = torch.rand(2, 1, 3, 5)
    p = qcfs_fast.profile(snn, [x], progress=False)
    assert p.agreement_by_step is None
    assert p.anytime is None
    assert p.layers[-1].shape == (3, 3, 5)
    with pytest.raises(ValueError, match="output is not a list of at least two class scores"):
        qcfs_fast.profile(snn, [x], labels=[0, 1], progress=False)


# -------------------------------------------------------------------------------------------- output


def test_json(tmp_path):
    snn, _, x = converted(networks.Groups)
    p = profiled(snn, x, labels=[0, 1, 2, 3, 4])
    p.to_json(tmp_path / "profile.json")
    read = json.loads((tmp_path / "profile.json").read_text())
    assert read == json.loads(json.dumps(p.to_dict()))
    assert read["format"] == "qcfs_fast profile 1"
    assert read["picojoules"] == {"accumulate": 0.9, "multiply_accumulate": 4.6}
    assert [r["name"] for r in read["layers"]] == list(snn.layers)
    assert any("GPU" in c for c in read["caveats"])


def test_plain_table():
    p = qcfs_fast.profile(*by_hand(), progress=False)
    lines = p.table().splitlines()
    assert lines[0].split()[:4] == ["layer", "kind", "shape", "rate"]
    cells = {line.split()[0]: re.split(r"\s{2,}", line) for line in lines[1:6]}
    assert cells["3"][1:9] == ["spiking", "3x3x3", "50.0%", "27", "156", "294", "140 pJ", "1.35 nJ"]
    assert cells["5"][1:5] == ["readout", "4", "108", "108"]
    assert cells["total"][1:4] == ["38.9%", "35", "264"]
    assert "23 never fired, 13 always did" in p.table()
    assert "no statement about a CPU or GPU" in p.table()
    assert "\x1b" not in p.table()


def test_table_on_a_terminal(monkeypatch):
    p = qcfs_fast.profile(*by_hand(), progress=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    plain = re.sub("\x1b\\[[0-9;]*m", "", p.table())
    assert "\x1b[" in p.table()
    for cell in ("accumulates", "156", "1.35 nJ", "saturated", "total"):
        assert cell in plain
    monkeypatch.setitem(sys.modules, "rich.table", None)
    assert "\x1b" not in p.table()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00k"), (12345, "12.3k"), (313478144, "313M"), (2.5e9, "2.50G")],
)
def test_counts_in_words(value, text):
    assert record.format_count(value) == text


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("batches", "options", "error", "message"),
    [
        ([], {}, ValueError, "batches is empty; give at least one batch"),
        ([np.zeros((1, 3, 10, 12))], {}, TypeError, r"expected tensors or \(tensor, labels\) tuples, got ndarray"),
        ([torch.zeros(1, 3, 10, 12), torch.zeros(1, 3, 12, 12)], {}, ValueError, "one size.*batch 2 differs"),
        ([torch.zeros(1, 2, 10, 12)], {}, ValueError, "expected an input of shape"),
        ([torch.zeros(2, 3, 10, 12)], {"labels": [1]}, ValueError, "labels must be 2 whole numbers"),
        ([torch.zeros(2, 3, 10, 12)], {"labels": [1, 2, 3]}, ValueError, "3 labels for 2 images"),
        ([torch.zeros(2, 3, 10, 12)], {"labels": [1.0, 2.0]}, ValueError, "whole numbers, one per image"),
        ([torch.zeros(2, 3, 10, 12)], {"labels": [1, 5]}, ValueError, "labels run from 1 to 5, .* 5 classes"),
        ([(torch.zeros(1, 3, 10, 12), [1])], {"labels": [1]}, ValueError, "give one of them"),
        ([(torch.zeros(1, 3, 10, 12), [1]), torch.zeros(1, 3, 10, 12)], {}, ValueError, "some batches have labels"),
        ([torch.zeros(1, 3, 10, 12)], {"raster_layer": "no"}, ValueError, "no spiking layer is called 'no'; there are"),
        ([torch.zeros(1, 3, 10, 12)], {"T": 10**9}, ValueError, "overflow bound"),
    ],
)
def test_bad_input(batches, options, error, message):
    snn, _, _ = converted(networks.Small)
    with pytest.raises(error, match=message):
        qcfs_fast.profile(snn, batches, progress=False, **options)


def test_not_a_network():
    with pytest.raises(TypeError, match=r"profile: expected a converted network \(SNN\), got Linear"):
        qcfs_fast.profile(nn.Linear(2, 2), [], progress=False)
