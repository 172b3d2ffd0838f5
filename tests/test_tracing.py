"""What torch.fx does not see by itself: the traced graph must be the model, or conversion refuses."""

import contextlib
import copy

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

import qcfs_fast
from qcfs_fast import ConversionError
from qcfs_fast.model.tracing import symbolic_trace


class Net(nn.Module):
    """Two layers, what `between` makes of their outputs, and a readout."""

    def __init__(self, between, **modules):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu, self.end, self.identity = nn.ReLU(inplace=True), nn.Linear(8, 5), nn.Identity()
        self.between = between
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.end(torch.relu(self.between(self, x)).mean((2, 3)))


def same_function(model, x, **options):
    """Fine steps make QCFS a ReLU."""
    with torch.no_grad():
        wanted = model.eval()(x.clone())
        found = qcfs_fast.prepare(model, levels=1 << 16, threshold=64.0, **options).eval()(x.clone())
    return float((found - wanted).abs().max() / wanted.abs().max()) < 5e-3


def statement(change):
    """A forward that changes a tensor and reads it by its old name."""

    def between(net, x):
        y = net.a(x)
        change(net, y)
        return net.b(y)

    return between


def augmented(net, x):
    y = torch.relu(net.a(x))
    z = y
    y += net.b(y)
    return y + z


def pre_activation(net, x):
    y = net.a(x)
    return net.b(net.relu(y)) + y


def on_a_piece(net, x):
    first, second = net.a(x).chunk(2, 1)
    first.relu_()
    return net.b(torch.cat([first, torch.relu(second)], 1))


def identity_of(net, x):
    y = net.a(x)
    shortcut = net.identity(y)
    return net.b(net.relu(y)) + shortcut


def a_number(net, x):
    y = torch.relu(net.a(x))
    n = m = y.size(1)
    n += 1
    return net.b(torch.cat([y[:, : n - 1], y[:, :m]], 1)[:, 8:])


IN_PLACE = {
    "F.relu_": statement(lambda net, y: F.relu_(y)),
    "method": statement(lambda net, y: y.relu_()),
    "module": statement(lambda net, y: net.relu(y)),
    "argument": statement(lambda net, y: F.relu(y, inplace=True)),
    "by position": statement(lambda net, y: F.hardtanh(y, 0.0, 40.0, True)),
    "clamp_": statement(lambda net, y: y.clamp_(min=0).mul_(2)),
    "add_ and more": statement(lambda net, y: (torch.relu_(y), y.mul_(0.5))),
    "augmented": augmented,
    "pre-activation": pre_activation,
    "a piece": on_a_piece,
    "identity": identity_of,
    "a number": a_number,
}


@pytest.mark.parametrize("between", IN_PLACE.values(), ids=IN_PLACE)
def test_what_is_changed_in_place_is_read_changed(between):
    x = torch.rand(4, 3, 8, 8)
    model = Net(between)
    before = copy.deepcopy(model.state_dict())
    assert same_function(model, x)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    traced = torch.fx.symbolic_trace(model.eval())  # in which torch.fx itself left it
    assert not symbolic_trace(traced).graph.find_nodes(op="call_method", target="relu_")


def view_changed(net, x):
    y = net.a(x)
    F.relu_(y[:, :4])
    return net.b(y)


def base_changed(net, x):
    y = net.a(x)
    first = y[:, :4]
    y.relu_()
    return net.b(torch.cat([first, first], 1))


@pytest.mark.parametrize("between", [view_changed, base_changed])
def test_a_view_that_is_changed_is_refused(between):
    with pytest.raises(ConversionError, match=r"relu_ in .*: changes in place what is read later.*Remedy"):
        qcfs_fast.prepare(Net(between))


# ------------------------------------------------------------------------- what a module does besides its class


KINDS = {
    "ReLU": nn.ReLU(), "ReLU6": nn.ReLU6(), "Hardtanh": nn.Hardtanh(0, 1), "LeakyReLU": nn.LeakyReLU(0),
    "MaxPool2d": nn.MaxPool2d(2),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_what_prepare_replaces_are_refused(kind, register):
    model = Net(lambda net, x: net.b(net.it(torch.relu(net.a(x)))), it=copy.deepcopy(KINDS[kind]))
    qcfs_fast.prepare(model)
    getattr(model.it, register)(lambda *a: None)
    with pytest.raises(ConversionError, match=r"^it: has a forward hook"):
        qcfs_fast.prepare(model)


@pytest.mark.parametrize("path", ["relu", "a", ""])
def test_a_forward_on_the_object_is_refused(path):
    model = Net(lambda net, x: net.b(net.relu(net.a(x))))
    patched = model.get_submodule(path)
    forward = patched.forward
    patched.forward = lambda x: forward(x) * 2
    with pytest.raises(ConversionError, match=f"^{path or 'the model itself'}: its forward was replaced"):
        qcfs_fast.prepare(model)


class Foreign(nn.Module):
    """As the authors': thresholds and levels, and a forward of its own."""

    def __init__(self, shift=0.5, scale=1.0, channels=1):
        super().__init__()
        self.thresh, self.L = nn.Parameter(torch.full((channels,), 1.5)), 4
        self.shift, self.scale = shift, scale

    def forward(self, x):
        theta = self.thresh.reshape(1, -1, *[1] * (x.dim() - 2))
        return torch.floor((x / theta).clamp(0, 1) * self.L + self.shift) / self.L * theta * self.scale


class Cut(qcfs_fast.QCFS):
    def forward(self, x):
        return super().forward(x) - 0.25


@pytest.mark.parametrize("channels", [1, 8])
def test_an_activation_of_another_formula_is_refused(channels):
    def net(activation):
        return nn.Sequential(nn.Conv2d(3, 8, 3), activation, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    x = torch.rand(2, 3, 9, 9)
    model = net(Foreign(channels=channels)).eval()
    with torch.no_grad():
        torch.testing.assert_close(qcfs_fast.convert(model, T=4, neuron="sum")(x), model(x), rtol=1e-3, atol=1e-4)
    for other in (Foreign(shift=0.0, channels=channels), Foreign(scale=3.0, channels=channels), Cut(4, 1.5)):
        with pytest.raises(ConversionError, match=r"^1: has a thresh and levels L, and its forward computes something"):
            qcfs_fast.convert(net(other), T=4)


def test_a_graph_that_is_not_the_model_is_refused():
    """torch.fx hands a forward something that is no tensor."""
    model = Net(lambda net, x: net.b(torch.relu(net.a(x)) * (2 if isinstance(x, torch.Tensor) else 1)))
    with pytest.raises(ConversionError, match=r"computes something else than what torch\.fx traced of it.*Remedy"):
        qcfs_fast.prepare(model)
    assert not same_function(model, torch.rand(2, 3, 8, 8), check=False)
    trained = nn.Sequential(nn.Conv2d(3, 8, 3), qcfs_fast.QCFS(4, 1.5), Asking(), nn.Flatten(), nn.Linear(288, 5))
    with pytest.raises(ConversionError, match="computes something else"):
        qcfs_fast.convert(trained, input_shape=(3, 8, 8))
    qcfs_fast.convert(trained, input_shape=(3, 8, 8), check=False)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = networks.Small()
    with pytest.raises(ConversionError, match=r"has no weights.*Remedy"):
        qcfs_fast.prepare(model)


class Asking(nn.Module):
    def forward(self, x):
        return x * (2 if type(x) is torch.Tensor else 1)


# --------------------------------------------------------------------------------------- wrappers and questions


WRAPPERS = {
    "DataParallel": nn.DataParallel, "compile": torch.compile, "AveragedModel": AveragedModel,
    "both": lambda m: torch.compile(nn.DataParallel(m)),
}  # fmt: skip


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_taken_off(wrap):
    x = torch.rand(2, 3, 8, 8)
    plain = qcfs_fast.calibrate(qcfs_fast.prepare(Net(lambda net, x: net.b(net.relu(net.a(x))))), [x], progress=False)
    wanted = qcfs_fast.convert(plain)(x)
    assert torch.equal(qcfs_fast.convert(wrap(plain))(x), wanted)
    inside = qcfs_fast.prepare(Net(lambda net, x: net.b(net.part(net.a(x))), part=wrap(nn.Sequential(nn.ReLU()))))
    qcfs_fast.calibrate(inside, [x], progress=False)
    assert torch.equal(qcfs_fast.convert(inside)(x), wanted)
    assert [*qcfs_fast.prepare(wrap(networks.Small())).state_dict()] == [
        *qcfs_fast.prepare(networks.Small()).state_dict()
    ]


def shuffled(net, x):
    y = torch.relu(net.a(x))
    return net.b(torch.cat([2 * part for part in y.chunk(4, 1)][::-1], 1))


def counted(net, x):
    y = torch.relu(net.a(x))
    parts = y.split(2, 1)
    return net.b(torch.cat([parts[i] for i in reversed(range(len(parts)))], 1))


def by_channel(net, x):
    y = torch.relu(net.a(x))
    return net.b(torch.cat([y[:, i : i + 1] for i in range(int(y.size(1)) - 1, -1, -1)], 1))


def star(net, x):
    y = torch.relu(net.a(x))
    return net.b(y.view(-1, *y.shape[1:]) * np.float32(0.5))


def square_root(net, x):
    y = torch.relu(net.a(x))
    return net.b(y / float(y.shape[1]) ** 0.5)


@pytest.mark.parametrize("between", [shuffled, counted, by_channel, star, square_root])
def test_constant_sizes_are_numbers(between):
    assert same_function(Net(between), torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize("ask", [len, lambda y: y.sum().item(), lambda y: range(y.size(2)), lambda y: int(y.size(0))])
def test_what_images_answer_differently_is_no_number(ask):
    def between(net, x):
        y = torch.relu(net.a(x))
        return net.b(y * len(str(ask(y))))

    with pytest.raises(ConversionError):
        qcfs_fast.prepare(Net(between))


# --------------------------------------------------------------------------------------------- sizes of maps


WHOLE = {
    "avg": lambda y: F.avg_pool2d(y, y.size(3)), "avg of both": lambda y: F.avg_pool2d(y, y.shape[2:]),
    "max": lambda y: F.max_pool2d(y, kernel_size=y.size()[2:]),
    "mean of sums": lambda y: y.sum((2, 3), keepdim=True) / (y.shape[2] * y.shape[3]),
}  # fmt: skip


@pytest.mark.parametrize("max_pool", ["avg", "keep"])
@pytest.mark.parametrize("pool", WHOLE.values(), ids=WHOLE)
def test_a_pool_of_the_whole_map_is_one_at_other_sizes(pool, max_pool):
    """At the size that it was converted for, and at others the mean or maximum of the whole map, or refused."""
    x = torch.rand(4, 3, 8, 8)
    model = Net(lambda net, x: pool(net.b(torch.relu(net.a(x))).relu()))
    prepared = qcfs_fast.prepare(model, levels=4, max_pool=max_pool).eval()
    prepared = qcfs_fast.calibrate(prepared, [x], progress=False)
    snn = qcfs_fast.convert(prepared, T=4, neuron="sum", input_shape=(3, 8, 8))
    for side in (8, 12, 16):
        x = torch.rand(4, 3, side, side)
        with contextlib.suppress(ValueError) if side != 8 else contextlib.nullcontext(), torch.no_grad():
            torch.testing.assert_close(snn(x), prepared(x), rtol=2e-3, atol=1e-3)


PARTS = {
    "stride": lambda y: F.avg_pool2d(y, 2, y.shape[2] // 4), "window": lambda y: F.avg_pool2d(y, y.shape[2] // 2),
    "factor": lambda y: y * y.shape[2], "over eight": lambda y: y * (8 / y.shape[2]),
    "summand": lambda y: y + y.shape[3] / 8, "crop": lambda y: y[:, :, y.shape[2] - 7 :],
    "largest": lambda y: y.amax((2, 3), keepdim=True) / (y.shape[2] * y.shape[3]),
    "sum over a side": lambda y: y.sum((2, 3), keepdim=True) / y.shape[2],
    "step": lambda y: y[:, :, :: y.shape[2] // 4], "adaptive": lambda y: F.adaptive_avg_pool2d(y, y.shape[2] // 2),
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_number_made_of_sizes_is_refused(part):
    model = Net(lambda net, x: net.b(part(torch.relu(net.a(x)))))
    prepared = qcfs_fast.prepare(model, check=False)
    with pytest.raises(ConversionError, match=r"of the size of maps.*Remedy"):
        qcfs_fast.convert(prepared, input_shape=(3, 8, 8))
