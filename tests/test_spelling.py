"""One network in many spellings: each converts to the same integers as the plain spelling, or is refused by name."""

import importlib
import math

import networks
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import torchvision_models  # noqa: F401 - makes torchvision importable here
from torch import nn

import qcfs_fast
from qcfs_fast import QCFS, ConversionError

ops = importlib.import_module("torchvision.ops")
stochastic_depth = importlib.import_module("torchvision.ops.stochastic_depth")
pytestmark = pytest.mark.filterwarnings("ignore:convert. no threshold")
SHAPE = (1, 10, 8)


class Net(nn.Module):
    """conv - ReLU - flatten - linear - ReLU - linear; `activate` and `flatten` are spelled by the test."""

    def __init__(self, flatten=None, activate=None, first=None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.Linear(4 * 48, 9), nn.Linear(9, 5)
        self.spelling = flatten or (lambda y: torch.flatten(y, 1))
        self.activation = activate or torch.relu
        self.first = first or (lambda net, x: net.a(x))
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, x):
        y = self.activation(self.first(self, x))
        return self.c(torch.relu(self.b(self.spelling(y))))


def converted(model, shape=SHAPE, **options):
    """The network, calibrated on images, and its conversion, whose spikes agree with float64 layer by layer."""
    x = networks.images(shape, 6)
    prepared = qcfs_fast.calibrate(qcfs_fast.prepare(model.eval(), levels=4, **options), [x], progress=False)
    snn = qcfs_fast.convert(prepared, T=4)
    spikes = qcfs_fast.trace(snn, x, 4)
    forced = qcfs_fast.simulate(prepared, x, 4, spikes=True, force=spikes)
    different = sum(int((spikes[k] != forced.spikes[k].bool()).sum()) for k in spikes)
    assert different <= 1e-3 * sum(s.numel() for s in spikes.values())
    assert sum(int(s.sum()) for s in spikes.values()) > 50
    return snn, x


@pytest.fixture(scope="module")
def plain():
    snn, x = converted(Net())
    return snn(x)


def unpacked(y):
    n, c, h, w = y.shape
    return y.reshape(n, c * h * w)


def asserted(y):
    torch._assert(y.ndim == 4, f"expected 4 dimensions, got {y.ndim}")
    torch._assert(y.dim() == 4, "expected 4 dimensions")
    return y.flatten(1)


FLATTEN = {
    "view(-1, features)": lambda y: y.view(-1, 4 * 48),
    "reshape(size(0), -1)": lambda y: y.reshape(y.size(0), -1),
    "products of sizes": lambda y: y.view(y.shape[0], y.shape[1] * y.shape[2] * y.shape[3]),
    "size(i)": lambda y: y.view(y.size(0), y.size(1) * y.size(2) * y.size(3)),
    "unpacked": unpacked,
    "asserted": asserted,
    "start and end": lambda y: y.flatten(start_dim=1, end_dim=3),
    "channels apart, then flat": lambda y: y.view(y.size(0), 2, 2, 8, 6).flatten(1),
    "as it was, then flat": lambda y: y.reshape(y.size(0), 4, 8, 6).flatten(1),
}


AVERAGED = {  # over the pixels of a map, which is what the first one does
    "adaptive": lambda y: F.adaptive_avg_pool2d(y, 1).flatten(1),
    "one dimension after the other": lambda y: y.mean(-1).mean(-1),
    "height first": lambda y: y.mean(2).mean(2),
    "kept, then indexed": lambda y: y.mean((2, 3), keepdim=True)[:, :, 0, 0],
    "one indexed, one squeezed": lambda y: F.adaptive_avg_pool2d(y, 1)[..., 0].squeeze(2),
    "squeezed": lambda y: F.adaptive_avg_pool2d(y, 1).squeeze(-1).squeeze(-1),
    "squeezed at once": lambda y: F.adaptive_avg_pool2d(y, 1).squeeze((2, 3)),
    "pixels in one dimension": lambda y: y.flatten(2).mean(2),
    "viewed": lambda y: y.view(y.size(0), y.size(1), -1).mean(-1),
    "the whole map": lambda y: F.avg_pool2d(y, y.size()[2:]).view(y.size(0), -1),
    "its side": lambda y: F.avg_pool2d(y, kernel_size=y.shape[-2:]).flatten(1),
    "summed": lambda y: y.sum((2, 3)) / 48,
    "summed one by one": lambda y: y.sum(3).sum(2) / (y.shape[2] * y.shape[3]),
    "amax": lambda y: y.amax((2, 3)),
    "adaptive maximum": lambda y: F.adaptive_max_pool2d(y, 1).flatten(1),
}


CLAMPED = {
    "clamp_min": lambda y: y.clamp_min(0),
    "torch.clamp_min": lambda y: torch.clamp_min(y, min=0),
    "leaky_relu without a slope": lambda y: F.leaky_relu(y, 0.0),
    "named slope": lambda y: F.leaky_relu(y, negative_slope=0),
    "leaky_relu_": lambda y: F.leaky_relu_(y, 0.0),
    "Threshold": nn.Threshold(0, 0),
    "threshold": lambda y: F.threshold(y, 0, value=0.0),
    "threshold_": lambda y: torch.threshold_(y, 0, 0),
    "torch.threshold": lambda y: torch.threshold(y, 0, 0),
    "clamp_": lambda y: torch.clamp_(y, 0),
    "clip_": lambda y: torch.clip_(y, min=0),
    "clamp_min_": lambda y: torch.clamp_min_(y, 0),
    "hardtanh_": lambda y: F.hardtanh_(y, 0.0, 1e9),
    "RReLU": nn.RReLU(0, 0),
    "rrelu": lambda y: F.rrelu(y, 0, upper=0),
    "maximum": lambda y: torch.maximum(y, torch.zeros(())),
    "maximum of a named zero": lambda y: y.maximum(other=torch.tensor([0.0])),
    "max": lambda y: torch.max(y, torch.tensor(0)),
    "fmax": lambda y: torch.fmax(y, torch.tensor(0.0)),
    "clamp by a tensor": lambda y: y.clamp(min=torch.tensor(0.0)),
    "twice": lambda y: torch.relu(y).clamp(-1).clamp_min(0).relu(),
}


@pytest.mark.parametrize("how", CLAMPED)
def test_more_rectifiers(how, plain):
    snn, x = converted(Net(activate=CLAMPED[how]))
    assert torch.equal(snn(x), plain)


def test_slopes_are_refused():
    slopes = (F.leaky_relu, lambda y: F.leaky_relu(y, 0.1), F.rrelu, nn.RReLU(-0.1, 0.1))
    bounds = (lambda y: y.clamp_min(0.5), nn.Threshold(0, -1), lambda y: F.threshold(y, 0.5, 0), F.hardtanh)
    others = (lambda y: torch.maximum(y, torch.ones(())), lambda y: y.max(torch.zeros(4, 1, 1)))
    for activate in (*slopes, *bounds, *others):
        with pytest.raises(ConversionError, match="no spiking counterpart"):
            qcfs_fast.prepare(Net(activate=activate).eval())


CUT = {
    "clamp behind relu": lambda y: torch.relu(y).clamp(max=0.5),
    "clamp behind clamp": lambda y: y.clamp(min=0).clamp(max=0.5),
    "clamp_max": lambda y: torch.clamp_max(F.hardtanh(y, 0, 4), 0.5),
    "minimum": lambda y: torch.minimum(y.relu(), torch.tensor(0.5)),
    "cut before": lambda y: torch.clip(F.hardtanh_(y, 0, 0.5), -1, 2),
    "a module": nn.Sequential(nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-1, 0.5)),
}


@pytest.mark.parametrize("how", CUT)
def test_a_cut_behind_a_relu_is_its_ceiling(how):
    clamped = Net(activate=lambda y: y.clamp(0, 0.5)).eval()
    model = Net(activate=CUT[how]).eval()
    prepared = qcfs_fast.prepare(model)
    sites = [m for m in prepared.modules() if isinstance(m, QCFS)]
    assert [m.ceiling for m in sites] == [0.5, float("inf")]
    (snn, x), (meant, _) = converted(model), converted(clamped)
    assert torch.equal(model(x), clamped(x))
    assert not torch.equal(model(x), Net().eval()(x))
    assert torch.equal(snn(x), meant(x))


def test_other_cuts_are_refused():
    for activate in (lambda y: y.clamp(max=0.5), lambda y: torch.relu(y).clamp(max=-1), lambda y: y.relu().clamp(1, 2)):
        with pytest.raises(ConversionError, match=r"clamp in .* has no spiking counterpart"):
            qcfs_fast.prepare(Net(activate=activate))


SAME = {
    "matmul": lambda net, x: net.a(x).relu().flatten(1) @ net.b.weight.t() + net.b.bias,
    "narrowed": lambda net, x: net.b(net.a(x).relu().narrow(1, 0, 4).flatten(1)),
    "float()": lambda net, x: net.b(net.a(x.float()).relu().flatten(1)),
    "to(dtype)": lambda net, x: net.b(net.a(x.to(torch.float32)).relu().to(net.b.weight.device).flatten(1)),
    "by a computed size": lambda net, x: net.b((y := net.a(x).relu()).flatten(1) * (8 / (2 * y.shape[1]))),
    "by a power of a size": lambda net, x: net.b((y := net.a(x).relu()).flatten(1) / (y.size(1) ** -0.5 * 2)),
    "by a root of a size": lambda net, x: net.b((y := net.a(x).relu()).flatten(1) * (2 / math.sqrt(y.size(1)))),
    "by other arithmetic": lambda net, x: net.b((y := net.a(x).relu()).flatten(1) * (-(6 // -y.size(1)) - 9 % y.ndim)),
    "by a rectified product": lambda net, x: net.b(net.a(x).relu().flatten(1) * torch.relu(net.one * net.one)),
    "by a rectified constant": lambda net, x: net.b(net.a(x).relu().flatten(1) * F.relu(net.one)),
}


class Dropping(Net):
    def __init__(self, drop):
        super().__init__()
        self.drop = drop

    def forward(self, x):
        return self.c(torch.relu(self.b(self.drop(self, torch.relu(self.a(x))).flatten(1))))


DROPOUTS = {
    "dropout3d": lambda net, y: F.dropout3d(y, training=net.training),
    "torch.dropout": lambda net, y: torch.dropout(y, 0.5, net.training),
    "torch.dropout by name": lambda net, y: torch.dropout(y, p=0.5, train=net.training),
    "torch.feature_dropout": lambda net, y: torch.feature_dropout(y, 0.5, train=net.training),
    "torch.alpha_dropout": lambda net, y: torch.alpha_dropout(y, 0.5, net.training),
    "torch.feature_alpha_dropout": lambda net, y: torch.feature_alpha_dropout(y, 0.5, net.training),
    "alpha_dropout": lambda net, y: F.alpha_dropout(y, 0.5),  # the one that is off by default
    "stochastic_depth": lambda net, y: stochastic_depth.stochastic_depth(y, 0.5, "row", net.training),
    "drop_block2d": lambda net, y: ops.drop_block.drop_block2d(y, 0.5, 3, training=net.training),
    "of nothing": lambda net, y: F.dropout(y, 0.0),
}


@pytest.mark.parametrize("how", DROPOUTS)
def test_dropouts_are_off(how, plain):
    snn, x = converted(Dropping(DROPOUTS[how]))
    assert torch.equal(snn(x), plain)


def test_modules_that_drop_are_off(plain):
    for drop in (nn.Dropout3d(), nn.FeatureAlphaDropout(), nn.AlphaDropout(), ops.DropBlock2d(0.5, 3)):
        snn, x = converted(Net(activate=nn.Sequential(nn.ReLU(), drop)))
        assert torch.equal(snn(x), plain)


ALWAYS = {
    "the default": lambda net, y: F.dropout(y, 0.5),
    "dropout2d": lambda net, y: F.dropout2d(y),
    "torch.dropout": lambda net, y: torch.dropout(y, 0.5, True),
    "alpha_dropout": lambda net, y: F.alpha_dropout(y, 0.5, True),
    "drop_block2d": lambda net, y: ops.drop_block.drop_block2d(y, 0.5, 3),
    "of a weight": lambda net, y: y * F.dropout(net.a.bias[:, None, None], 0.5),
}


@pytest.mark.parametrize("how", ALWAYS)
def test_dropouts_that_are_never_off_are_refused(how):
    with pytest.raises(ConversionError, match=r"drops values at random in eval mode too.*training=self\.training"):
        qcfs_fast.prepare(Dropping(ALWAYS[how]).eval())


@pytest.mark.parametrize("how", SAME)
def test_what_changes_nothing(how, plain):
    class Spelled(Net):
        def forward(self, x):
            return self.c(torch.relu(SAME[how](self, x)))

    snn, x = converted(Spelled())
    assert torch.equal(snn(x), plain)


def test_integers_within_the_network_are_refused():
    with pytest.raises(
        ConversionError,
        match=r"to in the model's own forward \(test_spelling\.py, line \d+\): rounds values to integers",
    ):
        qcfs_fast.prepare(Net(lambda y: y.to(torch.int64).float().flatten(1)))


class Averaged(Net):
    def __init__(self, spelling):
        super().__init__(spelling)
        self.b = nn.Linear(4, 9)


@pytest.mark.parametrize("how", AVERAGED)
def test_averages_over_pixels(how):
    snn, x = converted(Averaged(AVERAGED[how]))
    expected, _ = converted(Averaged(AVERAGED["adaptive"]))
    torch.testing.assert_close(snn(x), expected(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["amax", "adaptive maximum"])
def test_maxima_over_pixels_of_each_step(how):
    snn, _ = converted(Averaged(AVERAGED[how]), max_pool="keep")
    assert any("max" in name for name in snn.layers)


@pytest.mark.parametrize("how", FLATTEN)
def test_flattening(how, plain):
    snn, x = converted(Net(FLATTEN[how]))
    assert torch.equal(snn(x), plain)


@pytest.mark.parametrize(
    "mixing",
    [
        lambda y: y.view(y.size(0), y.size(2), y.size(1), y.size(3)).flatten(1),
        lambda y: y.view(y.size(0), 2, 2, 6, 8).flatten(1),
        lambda y: y.view(-1, y.size(1)).view(-1, 4 * 48),
    ],
)
def test_reshapes_that_move_pixels_are_refused(mixing):
    with pytest.raises(ConversionError, match=r"reshapes \[N, .*\] to .*only (flattening|channels)"):
        converted(Net(mixing))


def test_a_reshape_of_an_unknown_shape_is_refused():
    class Trained(Net):
        def __init__(self):
            super().__init__(FLATTEN["unpacked"], QCFS(4, 1.0))

        def forward(self, x):
            return self.c(self.activation(self.b(self.spelling(self.activation(self.a(x))))))

    with pytest.raises(
        ConversionError, match=r"reshapes a value whose shape is not known; give convert\(..., input_shape"
    ):
        qcfs_fast.convert(Trained().eval())
    assert qcfs_fast.convert(Trained().eval(), input_shape=SHAPE)(networks.images(SHAPE, 2)).shape == (2, 5)


ACTIVATE = {
    "clamp(min)": lambda y: y.clamp(min=0),
    "torch.clamp": lambda y: torch.clamp(y, 0),
    "LeakyReLU(0)": nn.LeakyReLU(0.0),
    "Hardtanh": nn.Hardtanh(0.0, 1e9),
    "clip_": lambda y: y.clip_(0),
}


@pytest.mark.parametrize("how", ACTIVATE)
def test_activations(how, plain):
    snn, x = converted(Net(activate=ACTIVATE[how]))
    assert torch.equal(snn(x), plain)


@pytest.mark.parametrize("activate", [lambda y: y.clamp(min=0.1), lambda y: torch.clamp(y, -1, 1), nn.LeakyReLU(0.1)])
def test_other_clamps_are_no_relu(activate):
    with pytest.raises(ConversionError):
        qcfs_fast.prepare(Net(activate=activate))


@pytest.mark.parametrize(("make", "ceiling"), [(nn.ReLU6, 6.0), (lambda: nn.Hardtanh(0, 3.0), 3.0)])
@pytest.mark.parametrize("method", ["mse", "percentile"])
def test_what_is_cut_is_calibrated_cut(make, ceiling, method):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), make(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    model[0].weight.data.mul_(60)
    x = networks.images(SHAPE, 6)
    assert float(model[0](x).detach().max()) > 2 * ceiling
    prepared = qcfs_fast.prepare(model, levels=16)
    qcfs_fast.calibrate(prepared, [x], method=method, percentile=100, progress=False)
    assert float(prepared.get_submodule("1").thresh) == ceiling
    error = (qcfs_fast.convert(prepared, T=256, max_T=256)(x) - model(x)).norm() / model(x).norm()
    assert error < 0.01


# ------------------------------------------------------------------------------- parameters and functions


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * 2, self.bias, self.stride, "valid")


class Inherits(nn.Conv2d):
    pass


def test_subclasses_and_functions():
    plain = Net()
    plain.a.weight.data.mul_(2)
    want, x = converted(plain)
    for kind in (OwnForward, Inherits):
        model = Net()
        model.a = kind(1, 4, 3)
        model.a.load_state_dict(Net().a.state_dict())
        if kind is Inherits:
            model.a.weight.data.mul_(2)
        assert torch.equal(converted(model)[0](x), want(x))
    model = Net(first=lambda net, x: F.conv2d(x, net.a.weight + net.a.weight, net.a.bias))
    assert torch.equal(converted(model)[0](x), want(x))
    with pytest.raises(ConversionError, match="weights depend on the image"):
        qcfs_fast.prepare(Net(first=lambda net, x: F.conv2d(x, net.a(x), net.a.bias)))


class NormAct(nn.BatchNorm2d):
    """BatchNorm and activation in one module, by the function, as some model collections write it."""

    def forward(self, x):
        torch._assert(x.ndim == 4, "expected four dimensions")
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return F.relu(y)


def test_batch_norm_by_function():
    models = []
    for kind in (nn.BatchNorm2d, NormAct):
        norm = kind(4)
        torch.manual_seed(3)
        for values in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
            values.copy_(torch.rand(4) + 0.5)
        models.append(Net(first=None, activate=norm if kind is NormAct else nn.Sequential(norm, nn.ReLU())))
    (want, x), (got, _) = (converted(m) for m in models)
    assert torch.equal(got(x), want(x))


def reparametrised(kind, layer):
    return {
        "weight_norm": torch.nn.utils.weight_norm,
        "spectral_norm": torch.nn.utils.spectral_norm,
        "pruned": lambda m: torch.nn.utils.prune.l1_unstructured(m, "weight", 0.5),
        "parametrized": torch.nn.utils.parametrizations.weight_norm,
    }[kind](layer)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "pruned", "parametrized"])
def test_weights_made_by_hooks_are_the_loaded_ones(kind):
    model = Net()
    model.a = reparametrised(kind, model.a)
    x = networks.images(SHAPE, 6)
    model.eval()(x)
    prepared = qcfs_fast.calibrate(qcfs_fast.prepare(model, levels=4), [x], progress=False)
    changed = {k: v * 1.5 if k.startswith("a.") and "mask" not in k else v for k, v in prepared.state_dict().items()}
    prepared.load_state_dict(changed)  # and no forward runs
    got = qcfs_fast.convert(prepared, T=4, input_shape=SHAPE)
    assert type(prepared.get_submodule("a").weight) in (torch.Tensor, nn.Parameter)
    prepared(x)  # now the hooks have run
    assert torch.equal(got(x), qcfs_fast.convert(prepared, T=4)(x))


# -------------------------------------------------------------------------------------------------- hooks


@pytest.mark.parametrize("where", ["a", "b", ""])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_refused(where, kind):
    model = Net()
    getattr(model.get_submodule(where), kind)(lambda module, *rest: None)
    name = where or "the model itself"
    with pytest.raises(ConversionError, match=f"^{name}: has a forward hook .*handle.remove"):
        qcfs_fast.prepare(model)
    prepared = qcfs_fast.prepare(Net())
    getattr(prepared.get_submodule(where), kind)(lambda module, *rest: None)
    with pytest.raises(ConversionError, match=f"^{name}: has a forward hook"):
        qcfs_fast.convert(prepared)


def test_a_tracing_error_names_its_module():
    class Asks(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(nn.ReLU(), Asks()))
    with pytest.raises(ConversionError, match=r"^1\.1: cannot be traced"):
        qcfs_fast.prepare(model)


# -------------------------------------------------------------------------------------------------- names

NAMES = (
    "T", "max_T", "_T", "layers", "spiking_layers", "order", "details", "weight_bits", "input_shape", "neuron", "_drop",
    "_program", "_bounds", "run", "save", "report", "stream", "predict",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_modules_of_any_name(name, tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Conv2d(1, 4, 3)
            self.add_module("b", nn.Identity())
            self._modules[name] = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
            self.f = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

        def forward(self, x):
            return self.f(self._modules[name](self.a(x)))

    snn, x = converted(Named())
    snn.save(tmp_path / "snn.safetensors")
    assert torch.equal(qcfs_fast.load(tmp_path / "snn.safetensors")(x), snn(x))
    assert f"{name}.0" in snn.layers
    assert name in str(snn)


def test_an_activation_called_input():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.input = nn.Conv2d(1, 4, 3), nn.ReLU()
            self.f = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

        def forward(self, x):
            return self.f(self.input(self.a(x)))

    snn, x = converted(Named())
    assert list(qcfs_fast.trace(snn, x)) == ["input_1"]


# ----------------------------------------------------------------------------- whole networks of tutorials


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.c, self.d = nn.Linear(16 * 9, 30), nn.Linear(30, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        x = F.relu(F.max_pool2d(self.b(x), 2))
        return self.d(F.relu(self.c(x.view(-1, 16 * 9))))


def test_maxima_of_which_the_values_are_read():
    class Largest(nn.Module):
        def __init__(self, largest):
            super().__init__()
            torch.manual_seed(0)
            self.largest, self.a, self.b = largest, nn.Conv2d(1, 6, 3), nn.Linear(6, 4)

        def forward(self, x):
            return self.largest(self, F.relu(self.a(x)).flatten(2))

    def unpacked(net, x):
        values, _ = (x * 0.5).max(2)
        return net.b(values)

    ways = [unpacked, lambda n, x: n.b(torch.max(x, dim=-1).values / 2), lambda n, x: n.b(x.max(2)[0] * 0.5)]
    answers = [converted(Largest(way), (1, 9, 7), max_pool="keep") for way in ways]
    assert all(torch.equal(snn(x), answers[0][0](answers[0][1])) for snn, x in answers)

    def places(net, x):
        _, places = x.max(2)
        return net.b(places.float())

    refused = [
        places,
        lambda n, x: (n.b(x.mean(2)), x.max(2)),
        lambda n, x: x.max(2),
        lambda n, x: x.max(2)[1],
        lambda n, x: x.max(),
        lambda n, x: torch.max(x, x * 2),
    ]
    for way in refused:
        with pytest.raises(ConversionError, match=r"max in .*compares activations.*Remedy"):
            qcfs_fast.prepare(Largest(way))


def test_a_first_tutorial():
    converted(LeNet(), (1, 20, 20))


@pytest.mark.parametrize("max_pool", ["avg", "keep"])
def test_a_pool_before_the_activation_moves_behind_it(max_pool):
    def model(*middle):
        torch.manual_seed(0)
        rest = (nn.Flatten(), nn.Linear(4 * 4 * 3, 3))
        return nn.Sequential(nn.Conv2d(1, 4, 3), *middle, *rest)

    before, x = converted(model(nn.MaxPool2d(2), nn.ReLU()), max_pool=max_pool)
    behind, _ = converted(model(nn.ReLU(), nn.MaxPool2d(2)), max_pool=max_pool)
    assert torch.equal(before(x), behind(x))


class Mlp(nn.Module):
    def __init__(self, flatten):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(80, 20), nn.Linear(20, 12), nn.Linear(12, 4)
        self.flatten = flatten

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(self.flatten(x))))))


@pytest.mark.parametrize("flatten", [lambda x: torch.flatten(x, 1), lambda x: x.view(-1, 80), nn.Flatten()])
def test_a_flattened_image(flatten, tmp_path):
    snn, x = converted(Mlp(flatten))
    vectors, _ = converted(Mlp(nn.Identity()), (80,))
    flat = x.flatten(1)
    assert snn.layers["relu"].config.vector
    assert float((snn(x) - vectors(flat)).abs().max()) < 0.5  # calibrated on other images
    snn.save(tmp_path / "snn.safetensors")
    assert torch.equal(qcfs_fast.load(tmp_path / "snn.safetensors")(x), snn(x))


def test_a_flattened_image_needs_its_shape():
    model = nn.Sequential(nn.Flatten(), nn.Linear(80, 20), QCFS(4, 1.0), nn.Linear(20, 3)).eval()
    with pytest.raises(ConversionError, match=r"flattens the image, whose shape is not known; give convert"):
        qcfs_fast.convert(model)
    x = networks.images(SHAPE, 2)
    assert qcfs_fast.convert(model, input_shape=SHAPE)(x).shape == (2, 3)
    with pytest.raises(ConversionError, match=r"does not run on images of shape \(1, 8, 8\)"):
        qcfs_fast.convert(nn.Sequential(nn.Flatten(), *model[1:]), input_shape=(1, 8, 8))


# ------------------------------------------------------------------- layers without an activation between


class Bottleneck(nn.Module):
    """MobileNetV2's block: expand, depthwise, project without an activation; its sums are of such projections."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        hidden = 3 * inputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.body(x) if self.skip else self.body(x)


LINEAR = {
    "bottlenecks": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), Bottleneck(6, 4, 1), Bottleneck(4, 4, 1), Bottleneck(4, 8, 2),
        Bottleneck(8, 8, 1), nn.Conv2d(8, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    ),
    "depthwise, then pointwise": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 8, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    ),
    "strided and grouped": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(8, 8, 1, stride=2, groups=4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    ),
    "low-rank linear": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3), nn.Linear(3, 12),
        nn.ReLU(), nn.Linear(12, 4), nn.Linear(4, 3),
    ),
    "the image's layer": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LINEAR)
def test_layers_without_an_activation_between(kind):
    torch.manual_seed(0)
    converted(networks.randomize(LINEAR[kind]()))


def test_what_composes_is_one_layer():
    torch.manual_seed(0)
    first, second = nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(6, 5, 1)
    merged = nn.Conv2d(4, 5, 3, 2, 1)
    for layer in (first, second):  # whole numbers, so that products of weights are exact
        for parameter in layer.parameters():
            parameter.data.copy_(torch.randint(-3, 4, parameter.shape))
    w = second.weight.data[:, :, 0, 0]
    merged.weight.data.copy_(torch.einsum("oc,cikl->oikl", w, first.weight.data))
    merged.bias.data.copy_(w @ first.bias.data + second.bias.data)

    def network(*middle):
        torch.manual_seed(1)
        head = (QCFS(4, 4.0), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))
        return nn.Sequential(nn.Conv2d(1, 4, 3), QCFS(4, 0.5), *middle, *head).eval()

    x = networks.images(SHAPE, 5)
    got, want = (qcfs_fast.convert(network(*m))(x) for m in ((first, second), (merged,)))
    assert torch.equal(got, want)


def test_what_does_not_compose_is_refused():
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)]
    with pytest.raises(
        ConversionError, match=r"^1: is a convolution of what a layer made of the image, with no activation"
    ):
        qcfs_fast.prepare(nn.Sequential(*layers))


class Dense(nn.Module):
    """DenseNet's block: each layer reads all before it, with a BatchNorm and an activation of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(3))
        self.layers = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, padding=1, bias=False) for i in range(3))
        self.last = nn.Sequential(
            nn.BatchNorm2d(18), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(18, 3)
        )

    def forward(self, x):
        features = [self.first(x)]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            features.append(layer(torch.relu(norm(torch.cat(features, 1)))))
        return self.last(torch.cat(features, 1))


def test_concatenated_currents():
    torch.manual_seed(0)
    converted(networks.randomize(Dense()))


class Branches(nn.Module):
    """Questions with the same answer for all images; `last` is one more."""

    def __init__(self, last=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.short, self.out, self.last = nn.Conv2d(1, 4, 1, 2), nn.Linear(4, 5), last

    def forward(self, x):
        if x.ndim == 3:
            x = x.unsqueeze(0)
        if not x.is_floating_point():
            x = x / 255
        y = self.b(torch.relu(self.a(x)))
        if x.shape != y.shape:
            x = self.short(x)
        assert x.size(1) == 4, f"{x.shape}"
        y = self.last(torch.relu(x + y if x.dim() == y.dim() and x.size(2) == y.size(2) else y))
        return self.out(nn.Flatten()(F.adaptive_avg_pool2d(y, 1)))


class Plain(Branches):
    def forward(self, x):
        y = torch.relu(self.short(x) + self.b(torch.relu(self.a(x))))
        return self.out(y.mean((2, 3)))


def test_branches_on_shapes():
    snn, x = converted(Branches())
    expected, _ = converted(Plain())
    assert torch.equal(snn(x), expected(x))


def smaller(y):
    return F.avg_pool2d(y, 2) if y.shape[-1] < 20 else y


def brighter(y):
    return y * 2 if y.sum() > 0 else y


def test_branches_that_images_take_differently_are_refused():
    with pytest.raises(
        ConversionError, match=r"the model's own forward: asks for the size.*\[1, 224, 224\].*\[1, 32, 32\]"
    ):
        qcfs_fast.prepare(Branches(smaller))
    with pytest.raises(ConversionError, match="control flow that depends on tensor values"):
        qcfs_fast.prepare(Branches(brighter))


def test_a_size_that_was_not_tried_is_asserted():
    model = qcfs_fast.prepare(Branches(lambda y: F.avg_pool2d(y, 2) if y.shape[-1] > 1 else y))
    model(torch.rand(2, 1, 8, 8))
    with pytest.raises(AssertionError, match="another branch"):
        model(torch.rand(2, 1, 1, 1))


def test_batch_norms_of_several_processes():
    norm = nn.SyncBatchNorm(4)
    norm.running_mean, norm.running_var = torch.rand(4), torch.rand(4) + 0.5
    same = nn.BatchNorm2d(4)
    same.load_state_dict(norm.state_dict())
    found = []
    for n in (norm, same):
        net = Net(first=lambda net, x: net.norm(net.a(x)))
        net.norm = n
        snn, x = converted(net)
        found.append(snn(x))
    assert torch.equal(*found)


def test_lines_that_are_flattened_before_an_activation():
    layers = (nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    torch.manual_seed(0)
    x = networks.images((2, 24), 6)
    prepared = qcfs_fast.prepare(nn.Sequential(*layers, nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval(), levels=4)
    snn = qcfs_fast.convert(qcfs_fast.calibrate(prepared, [x], progress=False), T=4)
    answer = qcfs_fast.simulate(prepared, x, 4)[-1]
    assert answer.abs().max() > 0.1
    torch.testing.assert_close(snn(x).double(), answer, rtol=1e-3, atol=1e-3)
