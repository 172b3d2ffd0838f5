"""Each fault gets a clear exception that names the thing and the remedy, before any kernel runs."""

import warnings

import networks
import numpy as np
import pytest
import torch
from torch import nn

import qcfs_fast
from qcfs_fast import QCFS, ConversionError

OPS = torch.ops.qcfs_fast


def net(*layers):
    return nn.Sequential(*layers).eval()


def trained(*layers):
    model = net(*layers)
    for m in model.modules():
        if isinstance(m, QCFS):
            m.thresh.data.fill_(1.5)
    return model


@pytest.fixture(scope="module")
def snn():
    return qcfs_fast.convert(
        trained(nn.Conv2d(3, 4, 3), QCFS(4), nn.Conv2d(4, 4, 3), QCFS(4), nn.Flatten(), nn.Linear(64, 2)), T=4
    )


# ------------------------------------------------------------------------------------- calls of a network


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((1, 3, 8, 8)), TypeError, "expected a torch.Tensor, got ndarray"),
        (
            torch.zeros(1, 4, 8, 8),
            ValueError,
            r"expected an input of shape \[N, 3, H, W\], or \[T, N, 3, H, W\] over time; got \[1, 4, 8, 8\]",
        ),
        (torch.zeros(3, 8, 8), ValueError, r"expected an input of shape \[N, 3, H, W\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "expected a floating-point input"),
        (torch.full((1, 3, 8, 8), float("nan")), ValueError, "NaN or infinity"),
        (torch.full((2, 3, 8, 8), float("inf")), ValueError, "NaN or infinity"),
        (torch.zeros(1, 3, 8, 8, requires_grad=True), RuntimeError, "requires grad"),
        (torch.zeros(1, 3, 4, 4), ValueError, "smaller than the kernel"),
        (torch.zeros(1, 3, 9, 9), ValueError, "does not fit"),
        (torch.zeros(1, 3, 8, 8, device="meta"), ValueError, "input is on meta, the network on cpu"),
    ],
)
def test_input(snn, x, error, message):
    with pytest.raises(error, match=message):
        snn(x)


def test_nan_in_one_sample_of_many(snn):
    x = torch.zeros(5, 3, 8, 8)
    x[3, 1, 2, 2] = float("nan")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with pytest.raises(ValueError, match="NaN or infinity"):
            snn(x)


@pytest.mark.parametrize(
    ("T", "error", "message"),
    [
        (0, ValueError, "at least 1"),
        (-3, ValueError, "at least 1"),
        (2.0, TypeError, "must be an int"),
        (True, TypeError, "must be an int"),
        (10**9, ValueError, "overflow bound of .* convert again with max_T=1000000000"),
    ],
)
def test_time_steps(snn, T, error, message):
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(error, match=message):
        snn(x, T=T)
    with pytest.raises(error, match=message):
        snn.T = T
    assert snn.T == 4


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_per_step_is_a_truth_value(snn, value):
    with pytest.raises(TypeError, match="per_step must be True or False, got"):
        snn(torch.zeros(1, 3, 10, 12), per_step=value)


def test_requires_grad_is_fine_without_grad_mode(snn):
    with torch.no_grad():
        assert snn(torch.zeros(1, 3, 8, 8, requires_grad=True)).shape == (1, 2)


# -------------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"T": 0}, ValueError, "T must be at least 1"),
        ({"T": 1.5}, TypeError, "T must be an int"),
        ({"weight_bits": 4}, ValueError, "weight_bits must be 8, 16 or 24"),
        ({"T": 8, "max_T": 4}, ValueError, "max_T=4 is below T=8"),
    ],
)
def test_conversion_arguments(options, error, message):
    with pytest.raises(error, match=message):
        qcfs_fast.convert(trained(nn.Linear(3, 2), QCFS(4), nn.Linear(2, 2)), **options)


class Sum(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.act, self.act2 = QCFS(4, 1.0), QCFS(4, 1.0)
        self.f = f

    def forward(self, x):
        return self.f(self, x)


# fmt: off
CASES = [
    (lambda: torch.nn.functional, TypeError, "expected a torch.nn.Module"),
    (lambda: net(nn.Conv2d(3, 4, 3), nn.ReLU()), ConversionError, "1: is a ReLU.*prepare"),
    (lambda: net(nn.Conv2d(3, 4, 3)), ConversionError, "no QCFS activation; call qcfs_fast.prepare"),
    (lambda: trained(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), QCFS(4)),
     ConversionError, "1: is a convolution of what a layer made of the image, with no activation.*Remedy"),
    (lambda: trained(nn.Conv2d(3, 4, 3), QCFS(4), nn.GELU(), nn.Conv2d(4, 4, 1)),
     ConversionError, "2: GELU has no spiking counterpart.*Remedy"),
    (lambda: trained(nn.Conv2d(3, 4, 3), QCFS(4), nn.ConstantPad2d(1, 0.5), nn.Conv2d(4, 4, 3), QCFS(4)),
     ConversionError, "2: pads with something else than zeros.*Remedy"),
    (lambda: trained(nn.Conv2d(3, 4, 2, padding="same", dilation=3), QCFS(4)),
     ConversionError, "0: padding='same' with an even kernel"),
    (lambda: trained(nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), QCFS(4)), ConversionError, "0: pools the image itself"),
    (lambda: trained(nn.Conv2d(3, 4, 3), QCFS(4), nn.Linear(4, 4)),
     ConversionError, "2: is a linear layer on a feature map; flatten it first"),
    (lambda: trained(nn.Conv2d(3, 4, 3), QCFS(4), nn.Flatten(), nn.Linear(7, 4)),
     ConversionError, "3: expects 7 features"),
    (lambda: trained(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), QCFS(4)),
     ConversionError, "1: BatchNorm without running statistics"),
    (lambda: Sum(lambda s, x: s.b(s.act(s.a(x))) * s.c(s.act(s.a(x)))),
     ConversionError, "multiplies two activations"),
    (lambda: Sum(lambda s, x: (s.b(s.act(s.a(x))), x)),
     ConversionError, "output, or one of them, is not a layer's output"),
    (lambda: Sum(lambda s, x: s.b(torch.softmax(s.act(s.a(x)), 1))),
     ConversionError, "b: works on the result of softmax, which no neuron computes"),
    (lambda: Sum(lambda s, x: s.b(s.act(s.a(x))) if x.sum() > 0 else x),
     ConversionError, "cannot be traced by torch.fx.*Remedy"),
    (lambda: Sum(lambda s, x: s.b(s.act(s.a(x))[:, :, None])), ConversionError, "indexes a tensor"),
    (lambda: Sum(lambda s, x: s.act(torch.cat([s.a(x).flatten(1), s.act(s.a(x)).flatten(1)], 1))),
     ConversionError, "concatenates flattened maps.*Remedy"),
    (lambda: Sum(lambda s, x: s.b(x.mean())), ConversionError, "mean"),
    (lambda: Sum(lambda s, x: s.act(s.a(x)).view(2, 3, -1)), ConversionError, "only flattening"),
    (lambda: Sum(lambda s, x: s.act2(s.b(s.act(s.a(x))) + s.a(x) + nn.functional.conv2d(x, s.a.weight, None, 1, 2, 2))),
     ConversionError, "the image enters twice"),
]
# fmt: on


@pytest.mark.parametrize(("make", "error", "message"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_models_that_do_not_convert(make, error, message):
    with pytest.raises(error, match=message):
        qcfs_fast.convert(make())


@pytest.mark.parametrize(
    ("theta", "why"),
    [(0.0, "divides by zero"), (-1.0, "negative inputs alone"), (float("nan"), "diverged"), (float("inf"), "diverged")],
)
def test_thresholds(theta, why):
    model = trained(nn.Linear(3, 4), QCFS(4), nn.Linear(4, 2))
    model[1].thresh.data.fill_(theta)
    with pytest.raises(ConversionError, match=rf"1: its trained threshold .*{why}.*calibrate"):
        qcfs_fast.convert(model)


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_weights_that_are_not_finite(layer):
    for value in (float("nan"), float("inf")):
        for what in ("weight", "bias"):
            model = trained(nn.Linear(3, 4), QCFS(4), nn.Linear(4, 4), QCFS(4), nn.Linear(4, 2))
            getattr(model[layer], what).data.view(-1)[0] = value
            with pytest.raises(ConversionError, match=r"(1|3|4|readout): .*not finite"):
                qcfs_fast.convert(model)


def test_untrained_thresholds_warn():
    with pytest.warns(UserWarning, match="no threshold of this model has been trained .all 1"):
        qcfs_fast.convert(net(nn.Linear(3, 4), QCFS(4), nn.Linear(4, 2)))
    with pytest.warns(UserWarning, match="no threshold"):
        qcfs_fast.convert(networks.randomize(networks.TheirResNet(20)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qcfs_fast.convert(trained(nn.Linear(3, 4), QCFS(4), nn.Linear(4, 2)))


def test_no_resolution_left():
    model = trained(nn.Linear(3, 4), QCFS(4), nn.Linear(4, 4), QCFS(4), nn.Linear(4, 2))
    model[3].thresh.data.fill_(1e-9)
    with pytest.raises(ConversionError, match=r"3: channel .* leaves no resolution in 32 bits"):
        qcfs_fast.convert(model)


def test_few_bits_warn():
    model = trained(nn.Linear(3, 3000), QCFS(4), nn.Linear(3000, 4), QCFS(4), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="3: 32 bits leave only .* bits for the weights"):
        qcfs_fast.convert(model, T=4, max_T=4000)


@pytest.mark.parametrize(("bits", "loud", "warns"), [(16, 1e4, True), (8, 1e3, True), (24, 1e4, False), (16, 1, False)])
def test_few_units_warn(bits, loud, warns):
    torch.manual_seed(0)
    model = trained(nn.Linear(3, 6), QCFS(4), nn.Linear(6, 4), QCFS(4), nn.Linear(4, 2))
    model[2].weight.data[1, 2] *= loud / model[2].weight.data[1, 2]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        snn = qcfs_fast.convert(model, T=4, weight_bits=bits)
    messages = [str(w.message) for w in found if "steps of their weights" in str(w.message)]
    assert all(m.startswith("3: the threshold of 1 of 4 channels") and "weight_bits=24" in m for m in messages)
    assert [bool(messages), "3: 1 channels have a threshold of few units" in snn.report()] == [warns, warns]


def test_size_dependent_pool_refuses_other_sizes():
    prepared = qcfs_fast.prepare(networks.Pools())
    qcfs_fast.calibrate(prepared, [torch.randn(2, 3, 12, 11)], progress=False)
    snn = qcfs_fast.convert(prepared)
    assert snn.input_shape == (3, 12, 11)
    with pytest.raises(ValueError, match=r"convert again with input_shape="):
        snn(torch.randn(1, 3, 17, 19))


def test_image_shape_that_does_not_run():
    with pytest.raises(ConversionError, match=r"does not run on images of shape.*input_shape="):
        qcfs_fast.convert(
            trained(
                nn.Conv2d(3, 4, 3),
                QCFS(4),
                nn.AdaptiveAvgPool2d(2),
                nn.Conv2d(4, 4, 2),
                QCFS(4),
                nn.Flatten(),
                nn.Linear(4, 2),
            ),
            input_shape=(3, 2, 2),
        )


# --------------------------------------------------------------------------------------------- operators


def operands(**changes):
    values = {
        "x": [torch.zeros(1, 2, 5, 5, 3, dtype=torch.uint8)],
        "weight": [torch.zeros(3, 3, 3, 4, dtype=torch.int16)],
        "geometry": [3, 3, 1, 1, 1, 1, 1, 1, 1],
        "residual": [torch.zeros(1, 2, 5, 5, 4, dtype=torch.uint8)],
        "amplitude": [torch.zeros(4, dtype=torch.int32)],
        "current": None,
        "bias": torch.zeros(4, dtype=torch.int32),
        "threshold": torch.full((4,), 2, dtype=torch.int32),
        "T": 4,
    }
    values.update(changes)
    return tuple(values.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"T": 0}, "T must be at least 1"),
        ({"T": 40}, "input 0 must have 5 mask planes or 40 count planes"),
        ({"x": []}, "0 inputs but 1 weights"),
        ({"x": [torch.zeros(1, 2, 5, 5, 3)]}, "input 0 must be torch.uint8, got torch.float32"),
        ({"x": [torch.zeros(1, 2, 5, 3, dtype=torch.uint8)]}, "input 0 must have shape"),
        ({"x": [torch.zeros(1, 2, 5, 5, 2, dtype=torch.uint8)]}, "does not fit 2 input channels"),
        (
            {
                "x": [torch.zeros(1, 2, 5, 5, 0, dtype=torch.uint8)],
                "weight": [torch.zeros(3, 3, 0, 4, dtype=torch.int16)],
            },
            "input 0 must have shape",
        ),
        ({"x": [torch.zeros(1, 2, 6, 5, 3, dtype=torch.uint8)]}, "residual 0 gives an output of shape"),
        ({"weight": [torch.zeros(3, 3, 3, 4)]}, "weight 0 must be torch.int16 or torch.int8"),
        ({"weight": [torch.zeros(3, 3, 3, 5, dtype=torch.int16)]}, "weight 0 must have shape"),
        ({"geometry": [3, 3, 1]}, "geometry must hold 9 ints"),
        ({"geometry": [3, 3, 0, 1, 1, 1, 1, 1, 1]}, "kernel, stride, dilation and groups must be positive"),
        ({"residual": []}, "0 residuals but 1 amplitudes"),
        ({"amplitude": [torch.zeros(3, dtype=torch.int32)]}, "amplitude 0 must have shape"),
        (
            {
                "residual": [torch.zeros(1, 2, 5, 5, 4, dtype=torch.uint8)] * 65,
                "amplitude": [torch.zeros(4, dtype=torch.int32)] * 65,
            },
            "at most 64 inputs and 64 residuals",
        ),
        ({"bias": torch.zeros(3, dtype=torch.int32)}, "bias must have shape"),
        ({"threshold": torch.zeros(4)}, "threshold must be torch.int32"),
        ({"current": torch.zeros(2, 4, 5, 4, dtype=torch.int32)}, "current gives an output of shape"),
    ],
)
def test_operator_operands(changes, message):
    with pytest.raises(ValueError, match=rf"qcfs_fast::conv2d_if: .*{message}"):
        OPS.conv2d_if(*operands(**changes))


def test_operators_without_sources():
    with pytest.raises(ValueError, match="needs at least one source"):
        OPS.conv2d_if(*operands(x=[], weight=[], geometry=[], residual=[], amplitude=[]))


def test_pool_operands():
    x = torch.zeros(1, 1, 4, 4, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="does not lie in"):
        OPS.pool(x, [0, 5, 1], [0, 4, 1], 0, 2)
    with pytest.raises(ValueError, match="is not divisible"):
        OPS.pool(x, [0, 3, 3], [0, 3, 3], 4, 2)
    with pytest.raises(ValueError, match="can reach 300, but count planes hold at most 255"):
        OPS.pool(torch.zeros(1, 1, 20, 15, 2, dtype=torch.uint8), [0, 20, 20], [0, 15, 15], 0, 2)
    with pytest.raises(ValueError, match="three ints"):
        OPS.pool(x, [0, 1], [0, 4, 1], 0, 2)


def test_grad_is_refused_by_the_operators():
    x = torch.zeros(1, 3, 4, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="requires grad, but spiking inference has no gradient"):
        OPS.quantize_input(x, torch.arange(3), torch.ones(3), torch.zeros(3))
    with pytest.raises(RuntimeError, match="requires grad"):
        OPS.readout(
            [torch.zeros(1, 1, 1, 1, 2, dtype=torch.int32)],
            [torch.zeros(0, dtype=torch.int16)],
            [1, 1, 1, 1, 0, 0, 1, 1, 1],
            [torch.ones(2, dtype=torch.float64, requires_grad=True)],
            [1],
            torch.zeros(2, dtype=torch.float64),
            1,
        )


def test_simulate_and_trace_arguments(snn):
    model = trained(nn.Linear(3, 4), QCFS(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="T must be a positive int"):
        qcfs_fast.simulate(model, torch.zeros(1, 3), 0)
    with pytest.raises(ValueError, match="force has no spikes for 1"):
        qcfs_fast.simulate(model, torch.zeros(1, 3), 2, force={})
    with pytest.raises(TypeError, match="expected a converted network"):
        qcfs_fast.trace(model, torch.zeros(1, 3))
    with pytest.raises(TypeError, match="converted already"):
        qcfs_fast.convert(snn)
