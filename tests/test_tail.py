"""What a model does to its logits: it follows the mean over the steps, is saved, and stands at the end alone."""

import json

import networks
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import qcfs_fast
from qcfs_fast import QCFS, ConversionError, FormatError

SHAPE = (3, 6, 5)


class Net(nn.Module):
    """Two spiking layers on a grid, `outputs` of the readout, and the tail."""

    def __init__(self, tail, outputs=5, dense=False):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3)
        self.act, self.act_b = QCFS(4), QCFS(4)
        self.c = nn.Conv2d(8, outputs, 1) if dense else nn.Linear(8 * 12, outputs)
        self.tail, self.dense = tail, dense

    def logits(self, x):
        y = self.act_b(self.b(self.act(self.a(x))))
        return self.c(y if self.dense else y.flatten(1))

    def forward(self, x):
        return self.tail(self.logits(x))


TAILS = {
    "F.softmax": (lambda y: F.softmax(y, dim=1), {}, [("softmax", 1)]),
    "Softmax": (nn.Softmax(dim=-1), {}, [("softmax", 1)]),
    "method": (lambda y: y.softmax(-1), {}, [("softmax", 1)]),
    "log_softmax": (lambda y: F.log_softmax(y, 1), {}, [("log_softmax", 1)]),
    "LogSoftmax": (nn.LogSoftmax(1), {}, [("log_softmax", 1)]),
    "sigmoid, squeezed": (lambda y: torch.sigmoid(y).squeeze(-1), {"outputs": 1}, [("sigmoid",), ("squeeze", 1)]),
    "squeezed, sigmoid": (lambda y: y.squeeze(1).sigmoid(), {"outputs": 1}, [("squeeze", 1), ("sigmoid",)]),
    "nothing to squeeze": (lambda y: torch.squeeze(y, 1), {}, []),
    "by pixel": (lambda y: y.softmax(-3), {"dense": True}, [("softmax", 1)]),
    "one map": (lambda y: y.squeeze(1).tanh(), {"dense": True, "outputs": 1}, [("squeeze", 1), ("tanh",)]),
}


def model_and_images(tail, **options):
    model = networks.on_grid(Net(tail, **options), seed=3)
    return model, networks.images(SHAPE, 3, grid=16)


@pytest.mark.filterwarnings("ignore:convert. no threshold")
@pytest.mark.parametrize("name", TAILS)
def test_a_tail_follows_every_running_mean(name, tmp_path):
    tail, options, steps = TAILS[name]
    model, x = model_and_images(tail, **options)
    bare, _ = model_and_images(nn.Identity(), **options)
    snn = qcfs_fast.convert(model, T=8, input_shape=SHAPE)
    logits = qcfs_fast.convert(bare, T=8, input_shape=SHAPE)(x, per_step=True)
    assert snn.tail == tuple(steps)
    expected = torch.stack([tail(mean.double()).float() for mean in logits])
    assert torch.equal(snn(x, per_step=True), expected)
    assert torch.equal(snn(x), expected[-1])
    stream = snn.stream()
    assert torch.equal(stream(x, steps=3), expected[2])
    assert torch.equal(stream(steps=5, per_step=True), expected[3:])
    torch.testing.assert_close(snn(x), qcfs_fast.simulate(model, x, 8)[-1].float(), rtol=1e-5, atol=1e-6)
    spikes = qcfs_fast.simulate(model, x, 8, spikes=True).spikes
    assert all(torch.equal(v, spikes[k]) for k, v in qcfs_fast.trace(snn, x).items())
    assert all(0.05 < float(v.double().mean()) < 0.95 for v in spikes.values())
    snn.save(tmp_path / "net.safetensors")
    loaded = qcfs_fast.load(tmp_path / "net.safetensors")
    assert loaded.tail == snn.tail
    assert torch.equal(loaded(x, per_step=True), expected)
    snn.tail = ()
    assert torch.equal(snn(x), logits[-1])


@pytest.mark.filterwarnings("ignore:convert. no threshold")
def test_predict_stops_by_logits():
    model, x = model_and_images(nn.Softmax(1))
    bare, _ = model_and_images(nn.Identity())
    found, plain = (qcfs_fast.convert(m, T=8, input_shape=SHAPE).predict(x, 0.5) for m in (model, bare))
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert len(set(found.steps.tolist())) > 1


@pytest.mark.filterwarnings("ignore:convert. no threshold")
@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (
            lambda y: y * torch.sigmoid(y),
            r"works on the result of sigmoid.*Remedy for a gate, as that of squeeze-and-excitation",
        ),
        (lambda y: y.softmax(0), "softmax over dimension 0 takes in the batch"),
        (lambda y: y.squeeze(), r"also squeezes a batch of one image.*name the dimensions"),
    ],
)
def test_what_is_no_tail_is_refused(tail, message):
    with pytest.raises(ConversionError, match=message):
        qcfs_fast.convert(model_and_images(tail)[0], input_shape=SHAPE)


@pytest.mark.filterwarnings("ignore:convert. no threshold")
@pytest.mark.parametrize(
    "tail",
    [[["softmax"]], [["sigmoid", 1]], [["softmax", 2]], [["squeeze", 1], ["softmax", 1]], [["exec", 1]], {}, [1], "x"],
)
def test_damaged_tails_are_refused(tail, tmp_path):
    path = tmp_path / "net.safetensors"
    qcfs_fast.convert(model_and_images(nn.Softmax(1))[0], input_shape=SHAPE).save(path)
    with safe_open(path, framework="pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - not a mapping
        header = json.loads(f.metadata()["qcfs_fast"])
    assert header["format_version"] == 3
    header["tail"] = tail
    del header["crc32"]
    save_file(tensors, path, metadata={"qcfs_fast": json.dumps(header)})
    with pytest.raises(FormatError, match="tail"):
        qcfs_fast.load(path)


@pytest.mark.filterwarnings("ignore:convert. no threshold")
def test_a_tail_is_no_obstacle_to_the_native_call():
    snn = qcfs_fast.convert(model_and_images(nn.Softmax(1))[0], input_shape=SHAPE)
    snn(networks.images(SHAPE))
    assert "one native call" in repr(snn)
