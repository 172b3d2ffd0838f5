"""What torch.fx does not see by itself: the traced graph must be the model, or conversion refuses."""

import copy
import pickle
from collections import namedtuple

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


def converted(model, x, max_pool="keep"):
    prepared = qcfs_fast.prepare(model.eval(), levels=4, max_pool=max_pool)
    prepared = qcfs_fast.calibrate(prepared, [x], progress=False).eval()
    return prepared, qcfs_fast.convert(prepared, T=4, input_shape=x.shape[1:])


def agrees(prepared, snn, x):
    return torch.testing.assert_close(snn(x), qcfs_fast.simulate(prepared, x, 4)[-1].float(), rtol=1e-3, atol=1e-4)


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


# --------------------------------------------------------------------------------------------- what is hidden


class Counts(Net):
    """A forward that counts its calls in a buffer, and uses the number or not."""

    def __init__(self, used):
        super().__init__(None)
        self.used = used
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1)
        y = torch.relu(self.b(torch.relu(self.a(x))))
        return self.end(y.mean((2, 3))) * (self.calls if self.used else 1)


def test_a_forward_that_changes_buffers():
    with pytest.raises(ConversionError, match=r"another output when it is given the same image again.*Remedy"):
        qcfs_fast.prepare(Counts(True))
    model = Counts(False).eval()
    x = torch.rand(2, 3, 8, 8)
    prepared = qcfs_fast.prepare(model)
    assert model.calls.item() == 0
    agrees(prepared, qcfs_fast.convert(prepared, T=4, input_shape=(3, 8, 8)), x)


def hooked():
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, found: None)
    return Net(lambda net, x: net.b(torch.relu(net.a(x)))), handle.remove


def replaced():
    net = Net(lambda net, x: net.b(torch.relu(net.a(x))))
    inner = net.a._conv_forward
    net.a._conv_forward = lambda x, weight, bias: inner(x, 2 * weight, bias)
    return net, None


def loose():
    net = Net(lambda net, x: net.b(torch.relu(net.a(x))))
    weight = net.a.weight.data
    del net.a.weight
    net.a.weight = weight
    return net, None


def edited():
    prepared = qcfs_fast.prepare(Net(lambda net, x: net.b(torch.relu(net.a(x)))))
    next(node for node in prepared.graph.nodes if node.target == "b").target = "identity"
    return prepared, None


def exported():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    return torch.export.export(net, (torch.rand(2, 3, 8, 8),)).module(), None


HIDDEN = {
    "hooks on all modules": (hooked, "forward hooks on all modules"),
    "a method of the forward": (replaced, "a: its _conv_forward was replaced on the object"),
    "a tensor that is no parameter": (loose, "a: its weight is a tensor that is neither a parameter nor a buffer"),
    "a graph that is not its forward": (edited, "graph was changed"),
    "an exported graph": (exported, r"a graph of torch\.export"),
}


@pytest.mark.parametrize(("make", "words"), HIDDEN.values(), ids=HIDDEN)
def test_what_the_converted_network_would_not_run(make, words):
    model, undo = make()
    try:
        with pytest.raises(ConversionError, match=words + ".*Remedy"):
            qcfs_fast.convert(qcfs_fast.prepare(model) if make is not edited else model)
    finally:
        if undo is not None:
            undo()


def assigned(net, x):
    y = torch.relu(net.a(x))
    y[:, :2] = 0
    return net.b(y)


SAID = {  # what a forward does: the words of its refusal
    "a layer made there": (lambda net, x: nn.Conv2d(8, 8, 1)(torch.relu(net.a(x))), "in __init__"),
    "an assignment": (assigned, r"torch\.cat"),
    "a branch by the batch": (lambda net, x: net.a(x) if x.shape[0] > 2 else net.b(x), "in batches of 64"),
    "a number of a parameter": (lambda net, x: net.b(net.a(x).relu() * float(net.b.weight.sum())), "leave values"),
    "a script": (lambda net, x: net.b(net.script(x).relu()), r"before torch\.jit\.script"),
    "a type asked for": (lambda net, x: net.b(net.a(x).relu() * (2 if x.dtype == torch.float64 else 1)), "dtype"),
}  # fmt: skip


@pytest.mark.parametrize(("between", "words"), SAID.values(), ids=SAID)
def test_refusals_name_what_helps(between, words):
    net = Net(between, script=torch.jit.script(nn.Conv2d(3, 8, 3)))
    with pytest.raises(ConversionError, match=words):
        qcfs_fast.prepare(net)


Pair = namedtuple("Pair", ["logits", "spikes"])


def test_outputs_that_are_none_of_a_network():
    for end in (lambda x: Pair(x, x), lambda x: (x, None), lambda x: (x, x.shape)):
        with pytest.raises(ConversionError, match="Remedy: return"):
            qcfs_fast.prepare(Outputs(end))


class Outputs(Net):
    def __init__(self, end):
        super().__init__(lambda net, x: net.b(torch.relu(net.a(x))))
        self.made = end

    def forward(self, x):
        return self.made(super().forward(x))


def test_parts_of_the_readout_are_outputs():
    x = torch.rand(2, 3, 8, 8)
    prepared, snn = converted(Outputs(lambda y: y.split((2, 3), 1)), x)
    for found, meant in zip(snn(x), qcfs_fast.simulate(prepared, x, 4), strict=True):
        torch.testing.assert_close(found, meant[-1].float(), rtol=1e-3, atol=1e-4)


VALUES = {
    "item": lambda net, x: net.b(torch.relu(net.a(x)) * net.a.bias.abs().sum().item()),
    "a mask": lambda net, x: net.part(torch.relu(net.a(x))[:, net.mask]),
    "precisions": lambda net, x: net.b(torch.relu(net.a(x)).half().double().type_as(x).to(x.dtype).to(x.device)),
}


@pytest.mark.parametrize("between", VALUES.values(), ids=VALUES)
def test_values_of_parameters_and_precisions(between):
    net = Net(between, part=nn.Conv2d(4, 8, 3))
    net.register_buffer("mask", torch.arange(8) % 2 == 0)
    x = torch.rand(2, 3, 8, 8)
    agrees(*converted(net, x), x)


def test_prepared_models_are_pickled():
    x = torch.rand(2, 3, 8, 8)
    prepared, snn = converted(Net(lambda net, x: net.b(torch.relu(net.a(x)))), x)
    copied = pickle.loads(pickle.dumps(prepared))
    assert torch.equal(qcfs_fast.convert(copied, T=4, input_shape=(3, 8, 8))(x), snn(x))
