"""What depends on the size of maps: true at the size that it was converted for, and at others true or refused."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from test_tracing import Net, agrees, converted
from torch import nn

import qcfs_fast
from qcfs_fast import ConversionError


class Ends(nn.Module):
    """Two spiking layers, what `end` makes of their spikes, and a readout of it, or a hidden layer and a readout."""

    def __init__(self, end, hidden=False, features=8):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.end = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), end
        self.linear = nn.Sequential(nn.Linear(features, 6), nn.ReLU()) if hidden else nn.Identity()
        self.out = nn.Linear(6 if hidden else features, 5)

    def forward(self, x):
        return self.out(self.linear(self.end(torch.relu(self.b(torch.relu(self.a(x)))))))


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
    model = Ends(lambda y: pool(y).flatten(1))
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
    with pytest.raises(ConversionError, match=r"of (the size of maps|images).*Remedy"):
        qcfs_fast.convert(prepared, input_shape=(3, 8, 8))


SUMS = {
    "both sides": lambda y: y.sum((2, 3)), "one by one": lambda y: y.sum(3).sum(2),
    "the last two": lambda y: y.sum((-1, -2)), "laid": lambda y: y.flatten(2).sum(-1),
    "kept, then flat": lambda y: y.sum((2, 3), keepdim=True).flatten(1),
    "kept one by one": lambda y: y.sum(2, True).sum(3, True)[:, :, 0, 0],
    "squeezed": lambda y: y.sum((2, 3), True).squeeze(3).squeeze(2), "of means": lambda y: y.mean(3).sum(2),
    "of sums, the mean": lambda y: y.sum(3).mean(2), "over a number": lambda y: y.sum((2, 3)) / 64,
    "of averages": lambda y: F.avg_pool2d(y, 2).sum((2, 3)),
    "beside a mean": lambda y: y.sum((2, 3)) + y.mean((2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("of", SUMS.values(), ids=SUMS)
def test_sums_of_pixels_are_those_of_one_size(of, hidden):
    x = torch.rand(3, 3, 8, 8)
    prepared, snn = converted(Ends(of, hidden), x)
    agrees(prepared, snn, x)
    agrees(prepared, snn, x[:1])
    refused = 0
    for side in (4, 9, 10, 16):
        x = torch.rand(2, 3, side, side)
        try:
            snn(x)
        except ValueError:
            refused += 1
        else:
            agrees(prepared, snn, x)  # where a pool before made the same size of it
    assert refused >= 3


def test_sums_that_stay_maps_are_refused_and_means_convert():
    for of in (lambda y: y.sum(3, keepdim=True), lambda y: y.sum((2, 3), keepdim=True)):
        with pytest.raises(ConversionError, match=r"how many pixels they have depends on the size of images.*Remedy"):
            converted(Net(lambda net, x, of=of: net.b(of(torch.relu(net.a(x))))), torch.rand(1, 3, 8, 8))
    x = torch.rand(2, 3, 8, 8)  # the remedy
    prepared, snn = converted(Net(lambda net, x: net.b(torch.relu(net.a(x)).mean((2, 3), True) * 64)), x)
    agrees(prepared, snn, x)


def joined(net, x):
    y = torch.relu(net.a(x))
    return F.interpolate(torch.relu(net.b(F.avg_pool2d(y, 2))), size=y.shape[2:]) + y


def padded(net, x):
    y = torch.relu(net.a(x))
    z = F.interpolate(torch.relu(net.b(F.avg_pool2d(y, 2))), scale_factor=2)
    return y + F.pad(z, (0, y.shape[3] - z.shape[3], 0, y.shape[2] - z.shape[2]))


def cropped(net, x):
    y = torch.relu(net.a(x))
    z = F.interpolate(torch.relu(net.b(F.max_pool2d(y, 2, ceil_mode=True))), scale_factor=2)
    return y + z[:, :, : y.shape[2], : y.shape[3]]


def expanded(net, x):
    y = net.b(torch.relu(net.a(x)))
    return y * net.scale.expand_as(y) + net.scale.expand(y.size(0), -1, y.size(2), y.size(3))


@pytest.mark.parametrize("between", [joined, padded, cropped, expanded])
def test_maps_of_computed_sizes_agree_or_are_refused(between):
    x = torch.rand(2, 3, 8, 8)
    prepared, snn = converted(Net(between, scale=nn.Parameter(torch.rand(1, 8, 1, 1))), x, max_pool="avg")
    for height, width in ((8, 8), (10, 12), (9, 11)):
        x = torch.rand(2, 3, height, width)
        with contextlib.suppress(ValueError) if height == 9 else contextlib.nullcontext():
            agrees(prepared, snn, x)


def two_padded(net, x):
    y = torch.relu(net.a(x))
    pad = (0, y.shape[3] % 4, 0, y.shape[2] % 4)
    return F.pad(net.b(y), pad) + F.pad(net.a(x), pad)


def two_resized(net, x):
    y = torch.relu(net.a(x))
    found = [F.interpolate(torch.relu(net.b(F.avg_pool2d(y, k))), size=y.shape[2:]) for k in (2, 4)]
    return found[0] / y.shape[1] + torch.cat(found[1].chunk(2, 1), 1)


ALONE = {  # sizes that hold for one size of images, and meet nothing that they have to fit
    "a pad of none": lambda net, x: F.pad(net.b(torch.relu(net.a(x))), (0, x.shape[3] % 4)),
    "two alike": two_padded, "two resized": two_resized,
    "a crop of none": lambda net, x: net.b(torch.relu(net.a(x)))[:, :, : x.shape[2]],
}  # fmt: skip


@pytest.mark.parametrize("between", ALONE.values(), ids=ALONE)
def test_a_computed_size_that_meets_no_other_is_refused(between):
    with pytest.raises(ConversionError, match="Remedy"):
        qcfs_fast.convert(qcfs_fast.prepare(Net(between), check=False), input_shape=(3, 8, 8))


def test_square_windows_of_one_side():
    """A map that is wider than high has several of them."""
    with pytest.raises(ConversionError, match=r"square windows.*Remedy"):
        converted(Squares(), torch.rand(1, 3, 8, 8))


class Squares(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        y = torch.relu(self.a(x))
        return self.out(F.avg_pool2d(y, y.size(3)))


def test_flattened_maps_of_different_sizes():
    def end(y):
        return torch.cat([F.adaptive_avg_pool2d(y, k).flatten(1) for k in (1, 2, 4)], 1)

    with pytest.raises(ConversionError, match=r"flattened maps of different sizes.*Remedy"):
        converted(Ends(end, features=8 * 21), torch.rand(1, 3, 8, 8))

    def alike(y):
        return torch.cat([F.adaptive_avg_pool2d(part, 2).flatten(1) for part in (y[:, :6], y)], 1)

    x = torch.rand(2, 3, 8, 8)
    agrees(*converted(Ends(alike, features=14 * 4), x), x)


def test_images_of_another_size_that_do_not_fit_are_refused_with_a_remedy():
    model = qcfs_fast.prepare(Ends(lambda y: y.flatten(1), features=8 * 64), levels=4)
    qcfs_fast.calibrate(model, [torch.rand(4, 3, 8, 8)], progress=False)
    snn = qcfs_fast.convert(model, T=4, input_shape=(3, 8, 8))
    wrong = r"does not fit 1152 input channels.*\[3, 12, 12\].*converted for \[3, 8, 8\].*input_shape=\(3, 12, 12\)"
    for call in (snn, snn.stream()):
        with pytest.raises(ValueError, match=wrong):
            call(torch.rand(2, 3, 12, 12))
    with pytest.raises(ValueError, match=wrong):
        snn(torch.rand(4, 2, 3, 12, 12))  # over time
