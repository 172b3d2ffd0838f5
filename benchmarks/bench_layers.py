"""One 3x3 convolution + neuron at T = 4, batch 1: ours against the ANN's convolution and the step loop.

Masks fire at 12 % a step, as trained QCFS networks do (5 to 15 %). The step loop is what simulators run: a float
convolution of T images and the recursion over T in PyTorch.
"""

import copy

import pytest
import torch
from torch import nn

from qcfs_fast import reference

OPS = torch.ops.qcfs_fast
T, RATE = 4, 0.12


def neuron_loop(currents):
    v, spikes = torch.full_like(currents[0], 0.5), []
    for z in currents:
        v = v + z
        s = (v >= 1.0).to(v.dtype)
        v = v - s
        spikes.append(s)
    return torch.stack(spikes)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(("size", "channels"), [(56, 64), (28, 128), (14, 256), (7, 512)])
def bench_conv3x3(compare, size, channels, bits):
    g = torch.Generator().manual_seed(0)
    spikes = torch.rand((T, 1, size, size, channels), generator=g) < RATE
    x = reference.pack(spikes)
    if bits == 16:
        w = torch.randint(-32639, 32640, (3, 3, channels, channels), dtype=torch.int16, generator=g)
    else:
        w = torch.randint(-127, 128, (3, 3, channels, channels), dtype=torch.int8, generator=g)
    unit = 32639.0
    n = torch.full((channels,), 2 * int(unit * channels**0.5 / 2), dtype=torch.int32)
    bias, geometry = torch.zeros(channels, dtype=torch.int32), [3, 3, 1, 1, 1, 1, 1, 1, 1]

    def ours():
        return OPS.conv2d_if([x], [w], geometry, [], [], None, bias, n, T)

    out = ours()
    assert torch.equal(out, reference.conv2d_if([x], [w], geometry, [], [], None, bias, n, T))
    assert 0.01 < reference.unpack(out, T).float().mean() < 0.95

    conv = nn.Conv2d(channels, channels, 3, padding=1).to(memory_format=torch.channels_last).eval()
    scale = (256 if bits == 8 else 1) / float(n[0])
    conv.weight.data = (w.float() * scale).permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
    conv.bias.data.zero_()
    steps = spikes.flatten(0, 1).float().permute(0, 3, 1, 2)
    image = steps[:1].contiguous(memory_format=torch.channels_last)
    low, low_image, low_steps = copy.deepcopy(conv).bfloat16(), image.bfloat16(), steps.bfloat16()

    calls = {
        f"qcfs_fast {bits}-bit": ours,
        "ANN conv fp32": lambda: conv(image),
        "ANN conv bf16": lambda: low(low_image),
        "T-loop fp32": lambda: neuron_loop(conv(steps).unflatten(0, (T, 1))),
        "T-loop bf16": lambda: neuron_loop(low(low_steps).unflatten(0, (T, 1))),
    }
    loop = calls["T-loop fp32"]().permute(0, 1, 3, 4, 2)
    assert (loop != reference.unpack(out, T)).float().mean() < 1e-3  # the contenders compute the same thing
    compare(f"{size}x{size}, {channels} -> {channels}, T={T}", calls, float(spikes.float().mean()))
