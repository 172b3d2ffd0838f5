"""prepare and calibrate: call sites, pooling, training, thresholds from data."""

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision_models import models

import qcfs_fast
from qcfs_fast import QCFS, ConversionError


def sites(model):
    return [n for n, m in model.named_modules() if isinstance(m, QCFS)]


def test_every_call_site_gets_its_own_activation():
    prepared = qcfs_fast.prepare(networks.Small(), levels=4, threshold=2.0)
    assert sites(prepared) == ["stem.2", "block1.relu", "block1.relu_1", "block2.relu", "block2.relu_1"]
    modules = [prepared.get_submodule(n) for n in sites(prepared)]
    assert len({id(m.thresh) for m in modules}) == 5
    assert all(m.L == 4 and m.thresh.item() == 2.0 for m in modules)


def test_torchvision_resnet_sites():
    prepared = qcfs_fast.prepare(models.resnet18(weights=None))
    assert len(sites(prepared)) == 17
    assert "layer1.0.relu" in sites(prepared)
    assert "layer1.0.relu_1" in sites(prepared)
    assert isinstance(prepared.maxpool, nn.AvgPool2d)
    assert (prepared.maxpool.kernel_size, prepared.maxpool.stride, prepared.maxpool.padding) == (3, 2, 1)


def test_all_spellings_of_relu():
    class Spellings(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(7))
            self.act = nn.ReLU(inplace=True)
            self.six = nn.ReLU6()

        def forward(self, x):
            a = self.layers
            x = self.act(a[0](x))
            x = F.relu(a[1](x), inplace=True)
            x = torch.relu(a[2](x))
            x = a[3](x).relu()
            x = a[4](x).relu_()
            x = self.six(a[5](x))
            return a[6](F.relu6(x)).mean((2, 3))

    prepared = qcfs_fast.prepare(Spellings())
    assert len(sites(prepared)) == 7
    assert not any(isinstance(m, (nn.ReLU, nn.ReLU6)) for m in prepared.modules())
    assert not any("relu" in str(n.target) and n.op != "call_module" for n in prepared.graph.nodes)


def test_weights_are_kept_and_values_agree_before_clipping():
    """With many levels and a large threshold QCFS is nearly a ReLU, so the prepared network nearly the original."""
    model = networks.randomize(networks.Groups()).double()
    prepared = qcfs_fast.prepare(model, levels=1 << 20, threshold=64.0)
    assert next(prepared.parameters()).dtype == torch.float64
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(prepared.double()(x), model(x), rtol=1e-3, atol=1e-3)


def test_functional_max_pool_becomes_average():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            x = F.max_pool2d(torch.relu(self.a(x)), 2, stride=1, padding=1, ceil_mode=True)
            return self.b(F.adaptive_max_pool2d(x, 1).flatten(1))

    prepared = qcfs_fast.prepare(Net())
    pools = [m for m in prepared.modules() if isinstance(m, (nn.AvgPool2d, nn.AdaptiveAvgPool2d))]
    assert [type(m) for m in pools] == [nn.AvgPool2d, nn.AdaptiveAvgPool2d]
    assert (pools[0].kernel_size, pools[0].stride, pools[0].padding, pools[0].ceil_mode) == (2, 1, 1, True)
    x = torch.randn(2, 3, 9, 9)
    assert prepared(x).shape == (2, 2)


def test_prepared_network_trains():
    torch.manual_seed(0)
    prepared = qcfs_fast.prepare(networks.Small().train(), levels=4, threshold=2.0)
    assert prepared.training
    before = {n: p.clone() for n, p in prepared.named_parameters()}
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1, weight_decay=5e-4)
    for _ in range(3):
        loss = F.cross_entropy(prepared(torch.randn(8, 3, 10, 12)), torch.randint(5, (8,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(not torch.equal(before[n], p) for n, p in prepared.named_parameters())


@pytest.mark.parametrize("method", qcfs_fast.model.calibration.METHODS)
def test_calibration_makes_the_network_follow_the_original(method):
    torch.manual_seed(0)
    model = networks.randomize(networks.Small())
    x = torch.randn(32, 3, 10, 12)
    reference = qcfs_fast.prepare(model, levels=1 << 20, threshold=1e3)(x)
    raw = qcfs_fast.prepare(model, levels=8)
    tuned = qcfs_fast.prepare(model, levels=8)
    assert qcfs_fast.calibrate(tuned, [(x[:16], None), (x[16:], None)], method=method, progress=False) is tuned
    before, after = ((m(x) - reference).norm() / reference.norm() for m in (raw, tuned))
    assert after < 0.8 * before
    assert after < 0.12
    assert len({m.thresh.item() for m in tuned.modules() if isinstance(m, QCFS)}) == 5


def test_percentile_is_a_percentile():
    model = nn.Sequential(nn.Identity(), QCFS(4))
    model.weight = nn.Parameter(torch.zeros(1))
    x = torch.arange(-500.0, 1001.0)[:, None]
    qcfs_fast.calibrate(model, [x], method="percentile", percentile=90.0, progress=False)
    assert model[1].thresh.item() == pytest.approx(900, abs=2)


def test_silent_site_is_named():
    model = nn.Sequential(nn.Linear(2, 3), QCFS(4), nn.Linear(3, 2))
    model[0].weight.data.zero_()
    model[0].bias.data.fill_(-1.0)
    with pytest.warns(UserWarning, match=r"calibrate: 1 received no positive input"):
        qcfs_fast.calibrate(model, [torch.randn(4, 2)], progress=False)
    assert model[1].thresh.item() == 8.0


@pytest.mark.parametrize(
    ("batches", "options", "error", "message"),
    [
        ([], {}, ValueError, "batches is empty"),
        ([torch.full((1, 3, 10, 12), float("nan"))], {}, ValueError, "NaN or infinity"),
        (["a"], {}, TypeError, "expected tensors"),
        ([torch.zeros(1, 3, 10, 12)], {"method": "magic"}, ValueError, "method must be one of percentile, mse"),
        ([torch.zeros(1, 3, 10, 12)], {"percentile": 0}, ValueError, "percentile must be in"),
    ],
)
def test_bad_calibration(batches, options, error, message):
    with pytest.raises(error, match=message):
        qcfs_fast.calibrate(qcfs_fast.prepare(networks.Small()), batches, progress=False, **options)


def test_bad_preparation():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        qcfs_fast.prepare(lambda x: x)
    with pytest.raises(ValueError, match="max_pool must be one of avg, keep"):
        qcfs_fast.prepare(networks.Small(), max_pool="min")
    with pytest.raises(ValueError, match="levels must be a positive integer"):
        qcfs_fast.prepare(networks.Small(), levels=0)
    with pytest.raises(ConversionError, match="no ReLU"):
        qcfs_fast.prepare(nn.Sequential(nn.Conv2d(3, 3, 1)))


class OtherActivations(nn.Module):
    """Each module that prepare(replace=...) knows, one of them called twice and from two places."""

    def __init__(self):
        super().__init__()
        self.acts = nn.ModuleList(
            (nn.SiLU(inplace=True), nn.Hardswish(), nn.GELU(), nn.LeakyReLU(0.1), nn.ELU(), nn.Mish())
        )
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(8))
        self.again = self.acts[0]

    def forward(self, x):
        for conv, act in zip(self.convs, (*self.acts, self.again), strict=False):
            x = act(conv(x))
        return self.convs[7](F.max_pool2d(x, 2))


def test_other_activations_become_qcfs_where_asked():
    prepare = qcfs_fast.prepare
    model = OtherActivations()
    every = {nn.SiLU, nn.Hardswish, nn.GELU, nn.LeakyReLU, nn.ELU, nn.Mish}
    prepared = prepare(model, levels=4, threshold=2.0, replace=every)
    assert sites(prepared) == [*(f"acts.{i}" for i in range(6)), "again"]
    assert isinstance(model.acts[0], nn.SiLU)  # the model itself stays
    x = torch.rand(2, 3, 4, 4)
    calibrated = qcfs_fast.calibrate(prepared, [x], progress=False)
    assert qcfs_fast.convert(calibrated, T=4)(x).shape == (2, 3, 2, 2)
    with pytest.raises(ConversionError, match=r"Mish has no spiking counterpart"):
        prepare(model, replace=every - {nn.Mish})


def test_what_replace_refuses():
    conv = nn.Conv2d(3, 3, 1)
    with pytest.raises(TypeError, match="a set of classes of modules"):
        qcfs_fast.prepare(conv, replace={nn.SiLU: nn.ReLU})
    with pytest.raises(TypeError, match="a set of classes of modules"):
        qcfs_fast.prepare(conv, replace=nn.SiLU)
    with pytest.raises(ValueError, match="Sigmoid"):
        qcfs_fast.prepare(conv, replace={nn.Sigmoid})

    class Function(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return self.conv(F.silu(self.conv(x)))

    with pytest.raises(ConversionError, match=r"silu in .*Remedy: .*nn\.SiLU\(\)"):
        qcfs_fast.prepare(Function(), replace={nn.SiLU})
    hooked = nn.Sequential(conv, nn.SiLU())
    hooked[1].register_forward_hook(lambda m, args, y: 2 * y)
    with pytest.raises(ConversionError, match="has a forward hook"):
        qcfs_fast.prepare(hooked, replace={nn.SiLU})
