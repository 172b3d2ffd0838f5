"""The lowering as a property: random graphs of what converts, on coarse grids, where every spike must be exact.

Weights, thresholds, images and averages are dyadic, so the float64 simulation does not round, nor does conversion.
Each layer's spikes are then the simulation's, ties included, whatever graph the layers form.
"""

import warnings
from collections import Counter

import networks
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import qcfs_fast
from qcfs_fast import QCFS
from qcfs_fast.operators.neuron import MODES

STEPS = ("layer", "projection", "identity", "image", "pool", "concatenation")
FIRING = STEPS[:4]


@st.composite
def plans(draw):
    """A list of steps (kind, other source, numbers), and the head. Each step reads the value before it."""
    values, plan, joined = [(3, 8), (draw(st.integers(1, 6)), 8)], [], False  # channels and size; image, first layer
    plan.append(("layer", 0, {"out": values[1][0], "kernel": 3, "stride": 1, "groups": 1}))
    for _ in range(draw(st.integers(1, 6))):
        kind, (channels, size) = draw(st.sampled_from(STEPS)), values[-1]
        fitting = [i for i, (_, s) in enumerate(values) if i > 0 and s == size]
        other = draw(st.sampled_from(fitting))
        out, groups = draw(st.integers(1, 6)), 1
        stride = draw(st.sampled_from((1, 2))) if kind == "layer" and size > 2 else 1
        if kind == "layer" and not joined and draw(st.booleans()):  # groups of a concatenation are refused
            groups, out = channels, channels * draw(st.integers(1, 2))
        if kind == "identity":
            out = values[other][0]
        if kind == "image" and size != 8:
            kind = "projection"
        if kind == "pool":
            if size <= 2:
                continue
            out, stride = channels, 2
        if kind == "concatenation":
            out = channels + values[other][0]
        plan.append(
            (kind, other, {"out": out, "kernel": draw(st.sampled_from((1, 3))), "stride": stride, "groups": groups})
        )
        values.append((out, size // stride))
        joined = kind == "concatenation" or (kind == "pool" and joined)
    return plan, draw(st.sampled_from(("linear", "pooled", "convolution")))


class Random(nn.Module):
    """The network of a plan, each activation its own QCFS."""

    def __init__(self, plan, head):
        super().__init__()
        self.plan, self.head = plan, head
        channels, sizes = [3], [8]
        for i, (kind, other, p) in enumerate(plan):
            out, k = p["out"], p["kernel"]
            if kind not in ("pool", "concatenation"):
                options = {"stride": p["stride"], "padding": k // 2, "groups": p["groups"], "bias": i % 2 == 0}
                self.add_module(f"conv{i}", nn.Conv2d(channels[-1], out, k, **options))
                self.add_module(f"norm{i}", nn.BatchNorm2d(out) if i % 3 == 2 else nn.Identity())
                self.add_module(f"act{i}", QCFS(4))
            if kind in ("projection", "image"):
                self.add_module(f"other{i}", nn.Conv2d(3 if kind == "image" else channels[other], out, 1))
            channels.append(out)
            sizes.append(sizes[-1] // p["stride"])
        self.pool = nn.AvgPool2d(2)
        self.wide = nn.AdaptiveAvgPool2d(1)
        features = channels[-1] * (sizes[-1] ** 2 if head == "linear" else 1)
        self.out = nn.Conv2d(channels[-1], 4, 1) if head == "convolution" else nn.Linear(features, 4)

    def forward(self, x):
        values = [x]
        for i, (kind, other, _) in enumerate(self.plan):
            last = values[-1]
            if kind == "pool":
                values.append(self.pool(last))
                continue
            if kind == "concatenation":
                values.append(torch.cat([last, values[other]], 1))
                continue
            y = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(last))
            if kind == "identity":
                y = y + values[other]
            elif kind in ("projection", "image"):
                y = y + getattr(self, f"other{i}")(x if kind == "image" else values[other])
            values.append(getattr(self, f"act{i}")(y))
        if self.head == "convolution":
            return self.wide(self.out(values[-1])).flatten(1)
        return self.out((self.wide(values[-1]) if self.head == "pooled" else values[-1]).flatten(1))


@st.composite
def neurons(draw):
    """A neuron and the steps T of a run."""
    mode = draw(st.sampled_from(MODES))
    window = draw(st.integers(1, 8)) if mode in ("offset", "masked") else 4
    iterations = draw(st.integers(1, 3)) if mode == "offset" else 1
    # In sum mode the simulation is the ANN, whose activations are T-th parts: in float64 it rounds thirds.
    steps = (1, 2, 4) if mode == "sum" else (1, 3, 4, 9, 16)
    return qcfs_fast.Neuron(mode, window, iterations), draw(st.sampled_from(steps))


def run(snn, x, T):
    return snn(x, T)[None] if snn.neuron.mode == "sum" else snn(x, T, per_step=True)


def test_random_networks_on_a_grid_convert_exactly():
    seen, spikes, sites, ties = Counter(), 0, 0, 0

    @settings(max_examples=60, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    @given(plans(), st.integers(0, 2**31), neurons(), st.sampled_from((8, 16, 24)), st.booleans(), st.booleans())
    def check(plan, seed, mode, bits, over_time, by_step):
        nonlocal spikes, sites, ties
        neuron, T = mode
        options = {"neuron": neuron.mode, "window": neuron.window, "iterations": neuron.iterations}
        biases = None
        if by_step and neuron.causal:
            generator = torch.Generator().manual_seed(seed)
            channels = {f"act{i}": p["out"] for i, (kind, _, p) in enumerate(plan[0]) if kind in FIRING}
            biases = {k: torch.randint(-4, 5, (T, c), generator=generator) / 16 for k, c in channels.items()}
            seen["biases by step"] += 1
        model = networks.on_grid(Random(*plan), seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # thresholds may be those of a model without training
            snn = qcfs_fast.convert(model, T=T, weight_bits=bits, input_shape=(3, 8, 8), step_bias=biases, **options)
        assert all(d["lossless"] == d["channels"] for d in snn.details.values())
        x = networks.images((3, 8, 8), 2, seed=seed, grid=64)
        if over_time and neuron.steps(T) == T and neuron.mode != "sum":
            x = networks.images((3, 8, 8), 2 * T, seed=seed, grid=64).reshape(T, 2, 3, 8, 8)
            seen["over time"] += 1
        meaning = qcfs_fast.simulate(model, x, T, spikes=True, step_bias=biases, **options)
        found = qcfs_fast.trace(snn, x)
        assert list(found) == list(meaning.spikes)
        for name, theirs in meaning.spikes.items():
            assert torch.equal(found[name].to(theirs.dtype), theirs), name
            share = theirs.double().abs().sum() / (T if neuron.mode == "sum" else 1)
            spikes, sites = spikes + float(share), sites + theirs.numel()
            ties += int((meaning.membranes[name] == model.get_submodule(name).thresh.item()).sum())
        torch.testing.assert_close(run(snn, x, T), meaning.output.float(), rtol=2e-7, atol=1e-7)
        seen.update([plan[1], neuron.mode, *(kind for kind, *_ in plan[0])])

    check()
    assert {*STEPS, *MODES, "linear", "pooled", "convolution", "over time", "biases by step"} <= set(seen)
    assert 0.05 < spikes / sites < 0.95
    assert ties > 0
