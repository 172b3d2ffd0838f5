"""The lowering as a property: random graphs of what converts, on coarse grids, where every spike must be exact.

Weights, thresholds, images and averages are dyadic, so the float64 simulation does not round, nor does conversion.
Each layer's spikes are then the simulation's, ties included, whatever graph the layers form.
"""

import warnings
from collections import Counter

import networks
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

import qcfs_fast
from qcfs_fast import QCFS
from qcfs_fast.operators.limits import IMAGE_MEMBRANE
from qcfs_fast.operators.neuron import MODES

REFUSED = (  # a limit of residuals, and one of inputs that a layer sums, which signed neurons halve
    "concatenates spikes and averages, and adds the result as a residual",
    "inputs, and signed neurons send two kinds of spikes",
)
FIRING = ("layer", "projection", "identity", "image", "joined", "pyramid")
MOVES = {  # and the size of what comes out
    "nearest": (lambda x, line: F.interpolate(x, scale_factor=2), lambda n: 2 * n),
    "crop": (lambda x, line: x[:, :, 1:] if line else x[:, :, 1:, :-1], lambda n: n - 1),
    "pad": (lambda x, line: F.pad(x, (0, 1) if line else (0, 1, 1, 0)), lambda n: n + 1),
    "reflected": (lambda x, line: F.pad(x, (1, 0) if line else (1, 0, 0, 1), "reflect"), lambda n: n + 1),
    "circular": (lambda x, line: F.pad(x, (2, 0) if line else (2, 0, 1, 1), "circular"), lambda n: n + 2),
    "bilinear": (
        lambda x, line: F.interpolate(x, scale_factor=2, mode="linear" if line else "bilinear"),
        lambda n: 2 * n,
    ),
}
KINDS = ("Conv", "BatchNorm", "AvgPool", "MaxPool", "AdaptiveAvgPool")
STEPS = (*FIRING, "pool", "max pool", "concatenation", *MOVES)
CHANNELS = ("all", "shuffled", "chosen")
FACTORS = (1, -1, 0.5, -2)  # of what is added


def size_after(kind, size, stride):
    """Of a map; a pool leaves out what no whole window covers, a convolution with padding does not."""
    if kind in MOVES:
        return MOVES[kind][1](size)
    if kind == "averaged":
        return size - 1
    return size // stride if kind in ("pool", "max pool") else (size - 1) // stride + 1


@st.composite
def plans(draw):
    """A list of steps (kind, other source, numbers), and the head. Each step reads the value before it."""
    first = draw(st.integers(1, 6))
    values, spikes = [(3, 8), (first, 8)], [False, True]  # channels and size; whether it is no average: image, layer
    plan = [("layer", 0, {"out": first, "kernel": 3, "stride": 1, "groups": 1, "mixed": 0, "channels": "all"})]
    plan[0][2].update(normalised=draw(st.booleans()), moved=draw(st.booleans()), lateral=0, averaged=False)
    if draw(st.integers(0, 3)) == 0:  # the first layer reads an average of the image
        plan[0][2].update(kernel=1, averaged_image=True)
        values[1] = (first, 4)
    for _ in range(draw(st.integers(1, 7))):
        kind, (channels, size) = draw(st.sampled_from(STEPS)), values[-1]
        fitting = [i for i, (_, s) in enumerate(values) if i > 0 and s == size]
        other = draw(st.sampled_from(fitting))
        stride = draw(st.sampled_from((1, 2))) if kind == "layer" and size > 2 else 1
        which = draw(st.sampled_from(tuple(CHANNELS)))
        if (which == "shuffled" and channels % 2) or (which == "chosen" and channels < 2):
            which = "all"
        if kind in FIRING and which == "chosen":
            channels -= 1
        out, groups = draw(st.integers(1, 6)), 1
        mixed = draw(st.integers(0, 4))  # channels between two layers without an activation, in two cases of five
        if kind == "layer" and draw(st.booleans()):
            groups, out = channels, channels * draw(st.integers(1, 2))
        if kind == "identity":
            out = values[other][0]
        if kind == "image" and size != 8:
            kind = "projection"
        if kind == "pyramid" and size % 2:
            kind = "projection"
        if kind == "max pool" and not spikes[-1]:
            kind = "pool"
        if kind in ("pool", "max pool"):
            if size <= 2:
                continue
            out, stride = channels, 2
        if kind in MOVES:
            out = channels
            if not 2 <= MOVES[kind][1](size) <= 9 or (kind in ("reflected", "circular") and size < 3):
                continue
        if kind == "concatenation":
            out = channels + values[other][0]
        numbers = {"kernel": draw(st.sampled_from((1, 3))), "stride": stride, "groups": groups, "channels": which}
        numbers["factor"] = draw(st.sampled_from(FACTORS))
        # A layer without an activation before this one, whose bias meets padding; or an average behind it.
        numbers["lateral"] = 3 if kind == "pyramid" or (kind in FIRING and draw(st.integers(0, 3)) == 0) else 0
        numbers["taps"] = draw(st.sampled_from((1, 1, 3)))  # of that layer, and with three its border is padded too
        numbers["averaged"] = kind == "layer" and stride == 1 and size > 2 and draw(st.integers(0, 3)) == 0
        if numbers["lateral"]:
            groups = 1
        numbers["groups"] = groups
        plan.append((kind, other, {"out": out, "mixed": mixed if groups == 1 and mixed > 2 else 0, **numbers}))
        after = size_after("averaged" if numbers["averaged"] else kind, size, stride)
        values.append((out + 2 * (kind == "joined"), after))
        masks = kind in ("max pool", "nearest", "crop", "reflected", "circular")
        kept = spikes[-1] and (masks or (kind == "concatenation" and spikes[other]))
        spikes.append(kind in FIRING or kept)
    return plan, draw(st.sampled_from(("linear", "pooled", "convolution"))), draw(st.integers(0, 3)) == 0


class Random(nn.Module):
    """The network of a plan, each activation its own QCFS; of maps, or of lines."""

    def __init__(self, plan, head, line):
        super().__init__()
        self.plan, self.head, self.line, self.shape = plan, head, line, (3, 8) if line else (3, 8, 8)
        made = {kind: getattr(nn, f"{kind}{2 - line}d") for kind in KINDS}
        self.register_buffer("mean", torch.tensor([0.25, 0.0, -0.5]).reshape(3, *[1] * (2 - line)))
        channels, sizes = [3], [8]
        for i, (kind, other, p) in enumerate(plan):
            out, k = p["out"], p["kernel"]
            if kind in FIRING:
                options = {"stride": p["stride"], "padding": k // 2, "groups": p["groups"], "bias": i % 2 == 0}
                read = channels[-1] - (p["channels"] == "chosen")
                if p["lateral"]:
                    self.add_module(f"lateral{i}", made["Conv"](read, p["lateral"], p["taps"], padding=p["taps"] // 2))
                    read = p["lateral"]
                self.add_module(f"conv{i}", made["Conv"](read, p["mixed"] or out, k, **options))
                self.add_module(f"mix{i}", made["Conv"](p["mixed"], out, 1) if p["mixed"] else nn.Identity())
                self.add_module(f"norm{i}", made["BatchNorm"](out) if i % 3 == 2 else nn.Identity())
                self.add_module(f"act{i}", QCFS(4))
            if kind == "pyramid":
                self.add_module(f"other{i}", made["Conv"](channels[other], p["lateral"], 1))
            if kind in ("projection", "image"):
                self.add_module(f"other{i}", made["Conv"](3 if kind == "image" else channels[other], out, 1))
            if kind == "joined":
                self.add_module(f"other{i}", made["Conv"](channels[other], 2, 3, padding=1))
                out += 2
            channels.append(out)
            size = 4 if p.get("averaged_image") else sizes[-1]
            sizes.append(size_after("averaged" if p.get("averaged") else kind, size, p["stride"]))
        self.pool, self.maximum, self.sliding = made["AvgPool"](2), made["MaxPool"](2), made["AvgPool"](2, 1)
        self.wide = made["AdaptiveAvgPool"](1)
        features = channels[-1] * (sizes[-1] ** (2 - line) if head == "linear" else 1)
        self.out = made["Conv"](channels[-1], 4, 1) if head == "convolution" else nn.Linear(features, 4)

    def forward(self, x):
        if self.plan[0][2]["moved"]:
            x = F.pad(x, (2, 0) if self.line else (2, 0, 0, 0), "circular")[..., :-2]
        if self.plan[0][2]["normalised"]:
            x = (x - self.mean) / 0.5
        values = [x]
        for i, (kind, other, p) in enumerate(self.plan):
            last = values[-1]
            if kind in MOVES:
                values.append(MOVES[kind][0](last, self.line))
                continue
            if kind in ("pool", "max pool"):
                values.append(self.pool(last) if kind == "pool" else self.maximum(last))
                continue
            if kind == "concatenation":
                values.append(torch.cat([last, values[other]], 1))
                continue
            read = self.conv_input(self.pool(last) if p.get("averaged_image") else last, p["channels"])
            read = getattr(self, f"lateral{i}")(read) if p["lateral"] else read
            if kind == "pyramid":
                coarse = getattr(self, f"other{i}")(self.pool(values[other]))
                read = read + F.interpolate(coarse, scale_factor=2)
            y = getattr(self, f"norm{i}")(getattr(self, f"mix{i}")(getattr(self, f"conv{i}")(read)))
            y = self.sliding(y) if p["averaged"] else y
            if kind == "identity":
                y = torch.add(y, values[other], alpha=p["factor"])
            elif kind == "joined":
                y = torch.cat([getattr(self, f"other{i}")(values[other]), y], 1)
            elif kind in ("projection", "image"):
                z = getattr(self, f"other{i}")(x if kind == "image" else values[other])
                y = y - z if p["factor"] == -1 else y + z * p["factor"]
            values.append(getattr(self, f"act{i}")(y))
        if self.head == "convolution":
            return self.wide(self.out(values[-1])).flatten(1)
        return self.out((self.wide(values[-1]) if self.head == "pooled" else values[-1]).flatten(1))

    def conv_input(self, x, which):
        """The channels that a convolution reads."""
        if which == "shuffled":
            return F.channel_shuffle(x, 2)
        return torch.cat(x.split(2, 1)[::-1], 1)[:, 1:] if which == "chosen" else x


def planned(kind, factor=1, channels="all", first=(), **numbers):
    """A plan of two steps, the second of this kind: behind a layer of 4 channels of 8 pixels."""
    one = {"stride": 1, "groups": 1, "mixed": 0, "lateral": 0, "taps": 1, "averaged": False, "channels": channels}
    start = {**one, "out": 4, "kernel": 3, "channels": "all", "normalised": False, "moved": False, **dict(first)}
    step = {**one, "out": 4, "kernel": 3, "factor": factor, **numbers}
    if kind in ("pool", "max pool"):
        step["stride"] = 2
    if kind == "concatenation":
        step["out"] = 8
    if kind == "pyramid":
        step["lateral"] = 3
    return [("layer", 0, start), (kind, 1, step)]


# Every kind of step, choice and neuron, so that none is left to chance: plan, head, line, neuron and T, bits.
PLANNED = [
    *((planned(kind), "linear", i % 2 == 0, ("plain", 4), 16) for i, kind in enumerate(STEPS)),
    *((planned("layer", channels=which), "pooled", False, ("signed", 3), 24) for which in CHANNELS),
    *((planned("identity", factor), "convolution", True, ("plain", 9), 16) for factor in FACTORS),
    *((planned("projection", factor), "convolution", False, ("signed", 4), 8) for factor in FACTORS),
    *((planned("layer", kernel=1), "linear", False, (mode, 4), 16) for mode in MODES),
    (planned("layer", lateral=3), "pooled", True, ("plain", 3), 16),
    (planned("layer", lateral=3, taps=3), "linear", False, ("plain", 3), 16),
    (planned("layer", mixed=3), "pooled", False, ("plain", 4), 16),
    (planned("layer", averaged=True), "pooled", False, ("plain", 4), 16),
    (planned("layer", groups=4), "linear", True, ("plain", 4), 16),
    (planned("layer", first={"normalised": True, "moved": True}), "pooled", False, ("plain", 4), 16),
    (planned("layer", first={"kernel": 1, "averaged_image": True}), "pooled", False, ("plain", 4), 16),
]  # fmt: skip


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


@pytest.mark.parametrize("graphs", [125, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.long])])
def test_random_networks_on_a_grid_convert_exactly(graphs):
    seen, spikes, sites, ties = Counter(), 0, 0, 0

    def kinds(check):
        for i, (plan, head, line, (mode, T), bits) in enumerate(PLANNED):
            neuron = qcfs_fast.Neuron(mode)
            check = example((plan, head, line), i, (neuron, T), bits, i % 2 == 0, i % 3 == 0)(check)
        return check

    @settings(
        max_examples=graphs,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
    )
    @kinds
    @given(plans(), st.integers(0, 2**31), neurons(), st.sampled_from((8, 16, 24)), st.booleans(), st.booleans())
    def check(plan, seed, mode, bits, over_time, by_step):
        nonlocal spikes, sites, ties
        neuron, T = mode
        options = {"neuron": neuron.mode, "window": neuron.window, "iterations": neuron.iterations}
        biases = None
        if by_step and neuron.causal:
            generator = torch.Generator().manual_seed(seed)
            firing = [(i, kind, p["out"]) for i, (kind, _, p) in enumerate(plan[0]) if kind in FIRING]
            channels = {f"act{i}": out + 2 * (kind == "joined") for i, kind, out in firing}
            biases = {k: torch.randint(-4, 5, (T, c), generator=generator) / 16 for k, c in channels.items()}
            seen["biases by step"] += 1
        model = networks.on_grid(Random(*plan), seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # thresholds may be those of a model without training
            try:
                snn = qcfs_fast.convert(
                    model, T=T, weight_bits=bits, input_shape=model.shape, step_bias=biases, **options
                )
            except ValueError as error:
                if not any(words in str(error) for words in REFUSED):
                    raise
                seen["refused"] += 1
                return
            if bits == 8 and any(d["lossless"] < d["channels"] for d in snn.details.values()):
                seen["more than 8 bits"] += 1  # as of two weights that meet the same spikes, or of layers that are one
                snn = qcfs_fast.convert(model, T=T, input_shape=model.shape, step_bias=biases, **options)
        assert all(d["lossless"] == d["channels"] for d in snn.details.values())
        x = networks.images(model.shape, 2, seed=seed, grid=64)
        still = x.dim()
        if over_time and neuron.steps(T) == T and neuron.mode != "sum":
            x = networks.images(model.shape, 2 * T, seed=seed, grid=64).reshape(T, 2, *model.shape)
        meaning = qcfs_fast.simulate(model, x, T, spikes=True, step_bias=biases, **options)
        # Membranes of a layer of the image alone are held within so many thresholds. Only images over time go farther.
        reached = meaning.membranes["act0"].abs().max() / model.act0.thresh.item()
        assume(x.dim() == still or reached <= IMAGE_MEMBRANE)
        seen["over time"] += x.dim() > still
        seen["lines"] += plan[2]
        found = qcfs_fast.trace(snn, x)
        assert list(found) == list(meaning.spikes)
        for name, theirs in meaning.spikes.items():
            assert torch.equal(found[name].to(theirs.dtype), theirs), name
            share = theirs.double().abs().sum() / (T if neuron.mode == "sum" else 1)
            spikes, sites = spikes + float(share), sites + theirs.numel()
            ties += int((meaning.membranes[name] == model.get_submodule(name).thresh.item()).sum())
        torch.testing.assert_close(run(snn, x, T), meaning.output.float(), rtol=2e-7, atol=1e-7)
        seen.update([plan[1], neuron.mode, *(kind for kind, *_ in plan[0])])
        seen.update(p["channels"] for kind, _, p in plan[0] if kind in FIRING)
        seen.update(p["factor"] for kind, _, p in plan[0] if kind in ("identity", "projection"))
        for name in ("normalised", "moved"):
            seen[name] += plan[0][0][2][name]
        seen["lateral with a border"] += any(p.get("lateral") and p["taps"] == 3 for _, _, p in plan[0])
        for name in ("lateral", "averaged", "averaged_image"):
            seen[name] += any(p.get(name) for _, _, p in plan[0])
        seen["mixed"] += any(p["mixed"] for kind, _, p in plan[0] if kind in FIRING)

    check()
    assert seen["refused"] <= graphs // 50
    assert {
        *STEPS,
        *CHANNELS,
        *MODES,
        *FACTORS,
        "normalised",
        "moved",
        "lateral with a border",
        "mixed",
        "lateral",
        "averaged",
        "averaged_image",
        "lines",
        "linear",
        "pooled",
        "convolution",
        "over time",
        "biases by step",
    } <= set(seen)
    assert seen["more than 8 bits"] < graphs / 2
    assert 0.05 < spikes / sites < 0.95
    assert ties > 0
