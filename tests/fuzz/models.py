"""Models as training never gives them: thresholds and weights of NaN, infinity, denormal or huge, variances of zero,
L = 1 and 2^20, one channel, 200 layers.

convert refuses one by an exception that names the thing. Or it answers: natively as the reference does, finite where
the model is, and so does the file of it.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import qcfs_fast
from qcfs_fast import QCFS, backend

ODD = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    5e-324,
    1e-45,
    1e-38,
    1e-20,
    1e-6,
    1e6,
    1e20,
    3e38,
    float("inf"),
    float("-inf"),
    float("nan"),
]


def build(rng):
    depth = int(rng.choice([1, 1, 2, 2, 3, 5, 200], p=[0.2, 0.2, 0.2, 0.18, 0.1, 0.1, 0.02]))
    width = int(rng.choice([1, 1, 2, 7, 33, 65]))
    if depth == 200:
        width = min(width, 7)
    levels = int(rng.choice([1, 2, 4, 8, 2**10, 2**20]))
    flat = rng.random() < 0.3
    layers, channels = [], int(rng.integers(1, 4))
    image = (channels,) if flat else (channels, 5, 6)
    for _ in range(depth):
        layers.append(nn.Linear(channels, width) if flat else nn.Conv2d(channels, width, 3, padding=1))
        if rng.random() < 0.4 and not flat:
            layers.append(nn.BatchNorm2d(width))
        layers.append(QCFS(levels, float(rng.choice([0.5, 1.0, 2.0]))))
        if rng.random() < 0.1 and not flat:
            layers.append([nn.AvgPool2d(2, 1, 1), nn.MaxPool2d(2, 1, 1)][rng.integers(2)])
        channels = width
    layers += [nn.Linear(channels, 3)] if flat else [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)]
    return nn.Sequential(*layers).eval(), image


def spoil(rng, model):
    """One number, or all of a tensor, replaced by an odd one."""
    tensors = [t for t in model.state_dict().values() if t.is_floating_point()]
    if rng.random() < 0.5:  # thresholds and variances are few, and matter most
        tensors = [t for name, t in model.state_dict().items() if name.endswith(("thresh", "running_var"))] or tensors
    t = tensors[rng.integers(len(tensors))]
    value = ODD[rng.integers(len(ODD))]
    if rng.random() < 0.5:
        t.fill_(value)
    else:
        t.view(-1)[rng.integers(t.numel())] = value


def run(seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model, image = build(rng)
    with torch.no_grad():
        for _ in range(rng.integers(0, 3)):
            spoil(rng, model)
    x = torch.from_numpy(rng.standard_normal((2, *image))).float() * float(rng.choice([1e-30, 1.0, 1.0, 1e30]))
    options = {"weight_bits": int(rng.choice([8, 16, 24])), "input_shape": image}
    options["neuron"] = str(rng.choice(["plain", "plain", "offset", "masked", "signed", "sum"]))
    try:
        snn = qcfs_fast.convert(model, T=4, progress=False, **options)
        out = snn(x)
    except (ValueError, RuntimeError) as error:
        if str(error):
            return "refused"
        raise
    sound = all(bool(torch.isfinite(t).all()) for t in model.state_dict().values() if t.is_floating_point())
    assert sound or bool(torch.isfinite(out).all()), "a model with NaN or infinity was converted, and answers so"
    with backend.force(reference=True):
        assert torch.equal(out, snn(x)) or not bool(torch.isfinite(out).all())
    with tempfile.TemporaryDirectory() as folder:
        snn.save(Path(folder) / "net")
        again = qcfs_fast.load(Path(folder) / "net")
    assert torch.equal(out, again(x)) or not bool(torch.isfinite(out).all())
    return "equal"
