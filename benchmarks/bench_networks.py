"""Whole networks: ours at T = 4 against the ANN (BatchNorm folded, channels_last) and the step loop.

Weights are random, thresholds calibrated on random images, so that layers fire as in trained networks; the rate is
printed. Labels of random networks mean nothing: the check is that spikes agree with the float64 simulation.
"""

import pytest
import torch
from torch import nn
from torchvision_models import models

import qcfs_fast
from qcfs_fast.simulation import step_network

T = 4
NETWORKS = [("resnet18", 224, 1), ("resnet18", 224, 8), ("vgg16_bn", 32, 1), ("vgg16_bn", 32, 32)]


class Folded(nn.Module):
    """The QCFS network with BatchNorm folded into its convolutions, in channels_last: the ANN at its fastest."""

    def __init__(self, prepared):
        super().__init__()
        from torch.fx.experimental.optimization import fuse

        self.network = fuse(prepared.eval(), no_trace=True).to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.network(x)


@pytest.mark.parametrize(("name", "size", "batch"), NETWORKS)
def bench_network(compare, name, size, batch):
    torch.manual_seed(0)
    prepared = qcfs_fast.prepare(getattr(models, name)(weights=None, num_classes=100), levels=4)
    x = torch.rand(batch, 3, size, size)
    qcfs_fast.calibrate(prepared, [torch.rand(4, 3, size, size)], progress=False)
    nets = {bits: qcfs_fast.convert(prepared, T=T, weight_bits=bits) for bits in (16, 8)}
    spikes = qcfs_fast.trace(nets[16], x[:1])
    forced = qcfs_fast.simulate(prepared, x[:1], T, spikes=True, force=spikes)
    neurons = sum(s.numel() for s in spikes.values())
    assert sum(int((spikes[k] != forced.spikes[k]).sum()) for k in spikes) < 1e-4 * neurons
    rate = sum(int(s.sum()) for s in spikes.values()) / neurons

    ann, loops = Folded(prepared), {}
    for dtype in (torch.float32, torch.bfloat16):
        network, neurons_by_name = step_network(prepared, dtype)
        loops[dtype] = (network.to(memory_format=torch.channels_last), neurons_by_name)
    low = Folded(prepared).bfloat16()
    image = x.contiguous(memory_format=torch.channels_last)

    def loop(dtype):
        network, neurons_by_name = loops[dtype]
        for neuron in neurons_by_name.values():
            neuron.reset()
        return torch.stack([network(image.to(dtype)) for _ in range(T)]).mean(0)

    calls = {
        "qcfs_fast 16-bit": lambda: nets[16](x),
        "qcfs_fast 8-bit": lambda: nets[8](x),
        "ANN fp32": lambda: ann(image),
        "ANN bf16": lambda: low(image.bfloat16()),
        "T-loop fp32": lambda: loop(torch.float32),
        "T-loop bf16": lambda: loop(torch.bfloat16),
    }
    compare(f"{name} at {size}, batch {batch}, T={T}", calls, rate, rounds=9)
