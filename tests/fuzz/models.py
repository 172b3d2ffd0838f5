"""Models as training never gives them: thresholds and weights of NaN, infinity, denormal or huge, variances of zero,
L = 1 and 2^20, one channel and 5000, 200 layers.

convert refuses one by an exception that names the thing. Or it answers: natively as the reference does, finite where
the model is, and so does the file of it.

Tracing a model, and finding the shapes in it, takes most of a conversion and asks no parameter. So SHARED cases in a
row have one model, traced once, and parameters of their own; the shapes found for it are kept.
"""

import functools

import numpy as np
import torch
from torch import nn

import qcfs_fast
from qcfs_fast import QCFS, backend
from qcfs_fast.conversion import lowering, shapes
from qcfs_fast.model.tracing import symbolic_trace
from qcfs_fast.network import loading

SHARED = 128
ODD = [0.0, -0.0, 1.0, -1.0, 5e-324, 1e-45, 1e-38, 1e-20, 1e-6, 1e6, 1e20, 3e38]
ODD += [float("inf"), float("-inf"), float("nan")]


class Block(nn.Module):
    """A sum of two branches, one of which may be the input itself."""

    def __init__(self, channels, width, groups):
        super().__init__()
        self.main = nn.Conv2d(channels, width, 3, padding=1, groups=groups)
        self.other = nn.Identity() if channels == width else nn.Conv2d(channels, width, 1)

    def forward(self, x):
        return self.main(x) + self.other(x)


def build(rng):
    depth = int(rng.choice([1, 2, 3, 5, 200], p=[0.5, 0.35, 0.1, 0.049, 0.001]))
    width = int(rng.choice([1, 2, 7, 33, 65], p=[0.3, 0.2, 0.3, 0.15, 0.05]))
    if depth == 200:
        width = min(width, 7)
    elif rng.random() < 0.004:
        depth, width = 1, 5000
    levels = int(rng.choice([1, 2, 4, 8, 2**10, 2**20]))
    flat = rng.random() < 0.3
    layers, channels = [], int(rng.integers(1, 4))
    image = (channels,) if flat else (channels, 5, 6)
    for i in range(depth):
        groups = channels if channels == width and rng.random() < 0.2 else 1
        if flat:
            layers.append(nn.Linear(channels, width))
        elif i and rng.random() < 0.3:
            layers.append(Block(channels, width, groups))
        else:
            layers.append(nn.Conv2d(channels, width, 3, int(rng.choice([1, 1, 2])) if i == 0 else 1, 1, groups=groups))
        if rng.random() < 0.4 and not flat:
            layers.append(nn.BatchNorm2d(width))
        layers.append(QCFS(levels, float(rng.choice([0.5, 1.0, 2.0])), [None, width][rng.integers(2)]))
        if rng.random() < 0.1 and not flat:
            layers.append([nn.AvgPool2d(2, 1, 1), nn.MaxPool2d(2, 1, 1)][rng.integers(2)])
        channels = width
    layers += [nn.Linear(channels, 3)] if flat else [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)]
    return nn.Sequential(*layers).eval(), image


@functools.lru_cache(1)
def traced(number):
    """A model, traced; the shape of its images; and its parameters, which cases change and put back."""
    torch.manual_seed(number)
    model, image = build(np.random.default_rng(number))
    gm = symbolic_trace(model)
    found = functools.cache(lambda shape: shapes.propagate_shapes(gm, shape))
    return gm, image, {name: t.clone() for name, t in gm.state_dict().items()}, found


def spoil(rng, model):
    """One number, or all of a tensor, replaced by an odd one; or all multiplied by one."""
    tensors = [t for t in model.state_dict().values() if t.is_floating_point()]
    if rng.random() < 0.5:  # thresholds and variances are few, and matter most
        tensors = [t for name, t in model.state_dict().items() if name.endswith(("thresh", "running_var"))] or tensors
    t = tensors[rng.integers(len(tensors))]
    value = ODD[rng.integers(len(ODD))]
    way = rng.integers(3)
    if way == 0:
        t.fill_(value)
    elif way == 1:
        t.mul_(value)
    else:
        t.view(-1)[rng.integers(t.numel())] = value


def run(seed):
    gm, image, parameters, found = traced(seed // SHARED)
    rng = np.random.default_rng(seed)
    gm.load_state_dict(parameters)
    if rng.random() < 0.5:  # other weights, of the same sizes
        with torch.no_grad():
            for name, t in gm.state_dict().items():
                if name.endswith(("weight", "bias")):
                    t.copy_(torch.from_numpy(rng.standard_normal(t.shape) * rng.choice([0.03, 0.3, 3.0])))
    with torch.no_grad():
        for _ in range(rng.integers(0, 3)):
            spoil(rng, gm)
    x = torch.from_numpy(rng.standard_normal((2, *image))).float() * float(rng.choice([1e-30, 1.0, 1.0, 1e30]))
    options = {"weight_bits": int(rng.choice([8, 16, 24])), "input_shape": image, "check": bool(rng.random() < 0.02)}
    options["neuron"] = str(rng.choice(["plain", "plain", "offset", "masked", "signed", "sum"]))
    own = lowering.propagate_shapes
    lowering.propagate_shapes = lambda _, shape: found(tuple(shape))
    try:
        snn = qcfs_fast.convert(gm, T=4, progress=False, **options)
        out = snn(x)
    except ValueError as error:
        if not str(error):
            raise
        # Where one amplitude is 1e38 times the others, a weight's bits do not reach down to those.
        return "refused by the self-check" if "fault of qcfs_fast" in str(error) else "refused"
    finally:
        lowering.propagate_shapes = own
    # An infinite variance is one: its channel is constant.
    sound = all(
        bool((torch.isfinite(t) | (t == float("inf")) & name.endswith("running_var")).all())
        for name, t in gm.state_dict().items()
        if t.is_floating_point()
    )
    assert sound or bool(torch.isfinite(out).all()), "a model with NaN or infinity was converted, and answers so"
    with backend.force(reference=True):
        assert torch.equal(out, snn(x)) or not bool(torch.isfinite(out).all())
    if rng.random() < 0.1:
        again = loading.network_of(*snn.saved())
        assert torch.equal(out, again(x)) or not bool(torch.isfinite(out).all())
    return "equal"
