"""Several outputs, maps and features as outputs, and resized ones: in the form of the model, however it is run."""

import json

import networks
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from test_constructs import SHAPE, Net, spikes_of
from torch import nn
from torch.utils import _pytree as pytree
from torchvision_models import models

import qcfs_fast
from qcfs_fast import ConversionError, FormatError
from qcfs_fast.conversion.checking import layer_differences, share
from qcfs_fast.network.layers import is_constant

pytestmark = pytest.mark.filterwarnings("ignore:convert. no threshold")


def both(net, x):
    y = spikes_of(net, x)
    return y, net.relu_b(net.b(y))


OUTPUTS = {
    "tuple": lambda n, x: (n.c(both(n, x)[1]), n.d(both(n, x)[0])),
    "list": lambda n, x: [n.c(y) for y in both(n, x)],
    "dict": lambda n, x: {"out": n.fc(both(n, x)[1].flatten(1)), "aux": n.c(both(n, x)[0])},
    "nested": lambda n, x: {"maps": [n.c(y) for y in both(n, x)], "logits": (n.fc(both(n, x)[1].flatten(1)),)},
    "one of a tuple": lambda n, x: (n.c(both(n, x)[1]),),
    "features beside logits": lambda n, x: (n.fc(y := both(n, x)[1].flatten(1)), y),
    "spikes of two layers": both,
    "concatenated and chosen spikes": lambda n, x: (torch.cat(both(n, x), 1), both(n, x)[0][:, [3, 1]]),
    "logits and softmax": lambda n, x: (y := n.fc(both(n, x)[1].flatten(1)), y.softmax(1)),
    "two tails": lambda n, x: {"a": n.c(both(n, x)[1]).softmax(1), "b": torch.sigmoid(n.c(both(n, x)[0]))},
    "pyramid": lambda n, x: [n.c(y := both(n, x)[1]), n.d(F.avg_pool2d(y, 2)), n.b(F.interpolate(y, scale_factor=2))],
    "feature pyramid": lambda n, x: {
        "0": n.d(n.c(y := both(n, x)[1]) + F.interpolate(z := n.c(F.avg_pool2d(y, 2)), size=y.shape[-2:])),
        "1": (top := n.b(z)),
        "pool": F.max_pool2d(top, 1, 2, 0),
    },
    "resized to the image": lambda n, x: {
        "out": F.interpolate(n.c(F.avg_pool2d(both(n, x)[1], 2)), size=x.shape[-2:], mode="bilinear")
    },
    "resized by a factor": lambda n, x: (n.up(n.c(both(n, x)[1])).softmax(1), n.c(both(n, x)[0])),
    "resized to a size": lambda n, x: (F.interpolate(n.c(both(n, x)[1]), (5, 7), mode="bicubic", align_corners=True),),
}
SINGLE = {
    "map": lambda n, x: n.c(both(n, x)[1]),
    "resized": lambda n, x: F.interpolate(n.c(both(n, x)[1]), size=x.shape[2:], mode="bilinear", align_corners=False),
    "resized, and softmax": lambda n, x: n.up(n.c(both(n, x)[1])).softmax(1),
    "spikes": lambda n, x: both(n, x)[1],
    "concatenated spikes": lambda n, x: torch.cat(both(n, x), 1),
    "nearest logits": lambda n, x: F.interpolate(n.c(both(n, x)[1]), scale_factor=3),
}


def network(name):
    wiring = {**OUTPUTS, **SINGLE}[name]
    layers = {"fc": nn.Linear(8 * 48, 5), "up": nn.Upsample(scale_factor=2, mode="bilinear")}
    model = networks.on_grid(Net(wiring, head=False, **layers))
    return model, qcfs_fast.convert(model, T=5, input_shape=SHAPE)


def same(found, wanted, exact=True):
    assert pytree.tree_structure(found) == pytree.tree_structure(wanted)
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True):
        assert a.dtype == torch.float32
        if exact:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*OUTPUTS, *SINGLE])
def test_outputs_have_the_form_of_the_model(name, tmp_path):
    model, snn = network(name)
    x = networks.images(SHAPE, 3, grid=64)
    with torch.no_grad():
        assert pytree.tree_structure(snn(x)) == pytree.tree_structure(model(x))
        shapes = [t.shape for t in pytree.tree_leaves(model(x))]
    by_step = snn(x, per_step=True)
    assert [t.shape[1:] for t in pytree.tree_leaves(by_step)] == shapes
    same(by_step, qcfs_fast.simulate(model, x, 5), exact=False)
    assert all(0.02 < float(s.float().mean()) < 0.98 for s in qcfs_fast.trace(snn, x).values())
    same(snn(x), pytree.tree_map(lambda t: t[-1], by_step))
    same(snn(x, skip=2, per_step=True), qcfs_fast.simulate(model, x, 5, skip=2), exact=False)
    stream = snn.stream()
    same(stream(x, steps=2), pytree.tree_map(lambda t: t[1], by_step))
    same(stream(steps=3, per_step=True), pytree.tree_map(lambda t: t[2:], by_step))
    snn.save(tmp_path / "net.safetensors")
    loaded = qcfs_fast.load(tmp_path / "net.safetensors")
    assert (loaded.outputs, loaded.tail) == (snn.outputs, snn.tail)
    same(loaded(x, per_step=True), by_step)
    for mode in ("offset", "signed", "sum"):
        snn.neuron = mode
        same(snn(x, 4), pytree.tree_map(lambda t: t[-1], qcfs_fast.simulate(model, x, 4, neuron=mode)), exact=False)


def test_torch_compiles_several_outputs():
    _, snn = network("nested")
    x = networks.images(SHAPE, 2, grid=64)
    same(torch.compile(snn, backend="eager", fullgraph=True)(x), snn(x))


def test_a_resize_follows_the_size_of_the_image():
    model, snn = network("resized to the image")
    x = networks.images((3, 12, 16), 2, grid=64)
    assert snn(x)["out"].shape[2:] == (12, 16)
    same(snn(x), pytree.tree_map(lambda t: t[-1], qcfs_fast.simulate(model, x, 5)), exact=False)


def test_what_knows_one_output_refuses_several():
    _, snn = network("tuple")
    x = networks.images(SHAPE, 2)
    for call in (
        lambda: snn.predict(x),
        lambda: qcfs_fast.profile(snn, [x], progress=False),
        lambda: qcfs_fast.exchange.integers.integer_program(snn, SHAPE),
        lambda: qcfs_fast.to_nir(snn, SHAPE),
    ):
        with pytest.raises(ValueError, match="one output, and this one has 2"):
            call()
    assert snn(x)[0].shape == (2, 8, 8, 6)
    assert "operators: " in repr(snn)  # the native call gives one answer


REFUSED = {
    "nothing": (lambda n, x: (), "returns nothing"),
    "the image": (lambda n, x: (n.c(spikes_of(n, x)), x), "not a layer's output|depends on the image"),
    "a number": (lambda n, x: (n.c(spikes_of(n, x)), 3), "not a layer's output"),
    "keys": (lambda n, x: {1: n.c(spikes_of(n, x))}, "keys are no strings"),
    "resize of a softmax": (
        lambda n, x: F.interpolate(n.c(spikes_of(n, x)).softmax(1), (4, 4), mode="bilinear"),
        "first",
    ),
    "bilinear inside": (
        lambda n, x: n.c(F.interpolate(spikes_of(n, x), scale_factor=1.5, mode="bilinear")),
        "by a whole factor.*mode='nearest'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_outputs_that_have_no_meaning_are_refused(name):
    wiring, message = REFUSED[name]
    with pytest.raises(ConversionError, match=message):
        qcfs_fast.convert(Net(wiring, head=False), input_shape=SHAPE)


@pytest.mark.parametrize(
    "outputs",
    [
        0,
        2,
        ["tuple", [0]],
        ["tuple", [0, 2]],
        ["set", [0, 1]],
        ["tuple", {"a": 0, "b": 1}],
        ["dict", [0, 1]],
        "x",
        [0, 1],
    ],
)
def test_damaged_forms_are_refused(outputs, tmp_path):
    path = tmp_path / "net.safetensors"
    network("tuple")[1].save(path)
    with safe_open(path, framework="pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - not a mapping
        header = json.loads(f.metadata()["qcfs_fast"])
    assert header["format_version"] == 4
    header["outputs"] = outputs
    del header["crc32"]
    save_file(tensors, path, metadata={"qcfs_fast": json.dumps(header)})
    with pytest.raises(FormatError, match="outputs"):
        qcfs_fast.load(path)


@pytest.mark.parametrize(
    "how",
    [
        None,
        {},
        {"mode": "bilinear"},
        {"mode": "cubic"},
        {"size": [0, 3]},
        {"size": "map"},
        {"scale": [1.0, 2.0]},
        {"size": None},
    ],
)
def test_damaged_resizes_are_refused(how):
    _, snn = network("resized")
    ((name, sound),) = snn.tail
    assert (name, sound["size"]) == ("resize", "image")
    if how != {"mode": "bilinear"}:
        damaged = {**sound, **how} if how else how
        with pytest.raises(FormatError, match="tail"):
            snn.tail = [("resize", damaged)]


def calibrated(model, x):
    prepared = qcfs_fast.prepare(model, levels=4)
    with torch.no_grad():
        prepared.train()(x)
    return qcfs_fast.calibrate(prepared.eval(), [x], progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_torchvisions_segmentation_converts(name):
    torch.manual_seed(0)
    options = {"weights": None, "weights_backbone": None, "num_classes": 5}
    model = models.get_model(name, **options).eval()
    x = networks.images((3, 64, 96), 2)
    prepared = calibrated(model, x)
    snn = qcfs_fast.convert(prepared)
    assert snn(x)["out"].shape == (2, 5, 64, 96)
    assert share(layer_differences(prepared, snn, x, 2)) < 1e-4


class RetinaNet(nn.Module):
    """The network part of torchvision's, with a ReLU between the pyramid and the heads that all levels share."""

    def __init__(self, activated=True):
        super().__init__()
        detection = models.detection
        last = detection.backbone_utils.LastLevelMaxPool()
        options = {"weights": None, "norm_layer": nn.BatchNorm2d, "extra_blocks": last, "returned_layers": [2, 3, 4]}
        self.backbone = detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", **options)
        head = detection.retinanet.RetinaNetHead(256, 2, 5)
        self.classes, self.boxes = head.classification_head, head.regression_head
        self.activation = nn.ReLU() if activated else nn.Identity()

    def forward(self, x):
        levels = [self.activation(v) for v in self.backbone(x).values()]
        scores = [self.classes.cls_logits(self.classes.conv(v)) for v in levels]
        return {"scores": scores, "boxes": [self.boxes.bbox_reg(self.boxes.conv(v)) for v in levels]}


@pytest.mark.slow
def test_torchvisions_retinanet_converts():
    torch.manual_seed(0)
    model = RetinaNet().eval()
    for m in model.modules():
        if isinstance(m, nn.Conv2d) and m.bias is not None:
            nn.init.normal_(m.bias, 0, 0.1)  # torchvision's are zero before training
    x = networks.images((3, 64, 96), 2)
    prepared = calibrated(model, x)
    snn = qcfs_fast.convert(prepared)
    assert sum(map(is_constant, snn.spiking_layers)) == 3  # a bias in front of padding, on three levels
    found = snn(x)
    assert [v.shape[1:] for v in found["scores"]] == [(10, 8, 12), (10, 4, 6), (10, 2, 3), (10, 1, 2)]
    assert share(layer_differences(prepared, snn, x, 2)) < 1e-4


def test_what_a_detector_has_that_is_not_linear_is_refused():
    with pytest.raises(ConversionError, match=r"normalize.*not linear.*Remedy"):
        qcfs_fast.prepare(models.detection.ssd300_vgg16(weights=None, weights_backbone=None).backbone)


class Pyramid(nn.Module):
    """A feature pyramid with a shared head; with `activated`, a ReLU behind each sum of levels."""

    def __init__(self, activated):
        super().__init__()
        self.bottom = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.top = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU())
        self.lateral = nn.ModuleList((nn.Conv2d(4, 4, 1), nn.Conv2d(6, 4, 1)))
        self.merge = nn.ReLU() if activated else nn.Identity()
        self.smooth = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, x):
        fine = self.bottom(x)
        coarse = self.merge(self.lateral[1](self.top(fine)))
        fine = self.merge(self.lateral[0](fine) + nn.functional.interpolate(coarse, scale_factor=2))
        return {name: self.head(self.smooth(v)) for name, v in (("fine", fine), ("coarse", coarse))}


@pytest.mark.parametrize("activated", [True, False])
def test_a_feature_pyramid_with_and_without_activations_behind_its_sums(activated, tmp_path):
    model = networks.on_grid(qcfs_fast.prepare(Pyramid(activated), levels=4))
    snn = qcfs_fast.convert(model, T=5, input_shape=(3, 8, 8))
    x = networks.images((3, 8, 8), 3, grid=64)
    meaning = qcfs_fast.simulate(model, x, 5, spikes=True)
    for name, spikes in qcfs_fast.trace(snn, x).items():
        assert torch.equal(spikes, meaning.spikes[name]), name
    by_step = snn(x, per_step=True)
    assert {name: v.shape for name, v in by_step.items()} == {"fine": (5, 3, 5, 8, 8), "coarse": (5, 3, 5, 4, 4)}
    same(by_step, meaning.output, exact=False)
    snn.save(tmp_path / "snn.safetensors")
    same(qcfs_fast.load(tmp_path / "snn.safetensors")(x, per_step=True), by_step)
