"""What a network may be made of besides layers and sums: each on a grid, where every way to run it is exact.

A network of each is converted, and its spikes and answers must be those of float64, ties included. The native executor,
the operators, a saved file and (where there is a compiler) the C program of integers must then give the same bytes.
"""

import networks
import pytest
import torch
from test_integers import COMPILER, run_in_c
from torch import nn

import qcfs_fast
from qcfs_fast import QCFS
from qcfs_fast.exchange.integers import integer_program

pytestmark = pytest.mark.filterwarnings("ignore:convert. no threshold")
SHAPE = (3, 8, 6)


class Net(nn.Module):
    """Layers a to d, an activation behind each, put together by `wiring(net, x)`; the head reads what that returns."""

    def __init__(self, wiring, width=8, shape=SHAPE, head=True, **layers):
        super().__init__()
        self.wiring, self.relu_a, self.relu_b, self.relu_c, self.relu_d = wiring, *(QCFS(4) for _ in range(4))
        self.a, self.b = nn.Conv2d(shape[0], width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.c, self.d = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 3, padding=1)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.head = nn.Identity()
        if head:
            with torch.no_grad():
                self.head = nn.Linear(wiring(self, torch.zeros(1, *shape)).flatten(1).shape[1], 5)

    def forward(self, x):
        out = self.wiring(self, x)
        return out if isinstance(self.head, nn.Identity) else self.head(out.flatten(1))


def exact(model, folder, shape=SHAPE, c=True, T=5, **options):
    """Convert a network on a grid, and compare all ways to run it with float64 and with each other."""
    model = networks.on_grid(model)
    snn = qcfs_fast.convert(model, T=T, input_shape=shape, **options)
    assert all(d["lossless"] == d["channels"] for d in snn.details.values())
    x = networks.images(shape, 3, grid=64)
    meaning = qcfs_fast.simulate(model, x, T, spikes=True)
    spikes = qcfs_fast.trace(snn, x)
    assert list(spikes) == list(meaning.spikes)
    for name, theirs in meaning.spikes.items():
        assert torch.equal(spikes[name], theirs), name
    rates = [float(s.float().mean()) for s in spikes.values()]
    assert 0.05 < sum(rates) / len(rates) < 0.95
    by_step = snn(x, per_step=True)
    assert snn._executor.path == "one native call"
    torch.testing.assert_close(by_step, meaning.output.float(), rtol=2e-7, atol=1e-7)
    assert torch.equal(by_step[-1], snn(x))
    seen = []
    assert torch.equal(snn.answered(snn.run(x, per_step=True, watch=lambda *a: seen.append(a))), by_step)
    assert len(seen) == len(snn.layers)
    snn.save(folder / "snn.safetensors")
    assert torch.equal(qcfs_fast.load(folder / "snn.safetensors")(x, per_step=True), by_step)
    if c and COMPILER is not None:
        integer_program(snn, shape).c_header(folder / "network.h")
        assert torch.equal(run_in_c(folder, x, ("-std=c99", "-O1")), snn(x).flatten())
    return snn


# ----------------------------------------------------------------- concatenation before the activation


def dense_block(net, x):
    """As a DenseNet has it: each layer reads all before it, behind a BatchNorm and an activation of its own."""
    found = [net.relu_a(net.a(x))]
    for conv, norm, act in ((net.b, net.norm_b, net.relu_b), (net.narrow_c, net.norm_c, net.relu_c)):
        found.append(conv(act(norm(torch.cat(found, 1)))))
    return net.relu_d(net.norm_d(torch.cat(found, 1)))


def test_a_dense_block_has_weights_that_grow_with_its_channels(tmp_path):
    norms = {"norm_b": nn.BatchNorm2d(8), "norm_c": nn.BatchNorm2d(16), "norm_d": nn.BatchNorm2d(20)}
    snn = exact(Net(dense_block, narrow_c=nn.Conv2d(16, 4, 3, padding=1), **norms), tmp_path)
    widths = [layer.threshold.numel() for name, layer in snn.spiking_layers.items() if name.startswith("relu_d[")]
    assert widths == [8, 8, 4]  # one layer for each current: no zeros are stored, and none is multiplied


def test_currents_that_read_alike_are_one_layer(tmp_path):
    snn = exact(Net(lambda n, x: n.relu_b(torch.cat([n.b(y := n.relu_a(n.a(x))), n.d(y)], 1))), tmp_path)
    assert list(snn.spiking_layers) == ["relu_a", "relu_b"]
