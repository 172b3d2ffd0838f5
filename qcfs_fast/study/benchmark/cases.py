"""What the benchmark measures: networks, each with a batch and a number of time steps T, and single layers.

Before anything is timed the answers are compared, because figures mean little if contenders compute different things:
ours with the float64 simulation, spike by spike; every simulator with ours, spike by spike; each ANN with the prepared
network.

Networks have random weights. Their thresholds are calibrated and then scaled so that the mean firing rate is
TARGET_RATE, because a silent or a saturated network measures something else. (Trained QCFS networks fire at 5 to 15 %
a step.) The rate is part of the result.
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...conversion.builder import convert
from ...conversion.preparation import prepare
from ...model.calibration import calibrate
from ...model.qcfs import QCFS
from ...model.simulation import simulate
from ...model.tracing import symbolic_trace
from ...network.layers import Layer, SpikingLayer
from ...network.recording import trace
from ...network.snn import SNN
from ...operators import masks, reference
from ...operators.signature import Conv2dIf
from ..demo import DigitsNet
from ..networks import SMALL, small_network
from ..spikes import count_differing, mean_rate
from ..zoo import torchvision_network
from .contenders import DTYPES, PLAIN, STREAM, Contenders, activations, channels_last, count_differences, quantised
from .measure import Effort, allocated_bytes, describe_error, interleaved, live_bytes, share_outside

TARGET_RATE, MIN_RATE, MAX_RATE = 0.169, 0.08, 0.18  # mean firing rate; at T = 1 random networks fire at half of it
CLASSES = 100
NETWORKS = {  # torchvision's, the paper's for small images, and three tiny ones: name and shape of an image
    "resnet18 224": ("resnet18", (3, 224, 224)),
    "vgg16_bn 32": ("vgg16_bn", (3, 32, 32)),
    "vgg16_bn 224": ("vgg16_bn", (3, 224, 224)),
    "resnet20 32": ("cifar-resnet20", (3, 32, 32)),
    "resnet18 32": ("cifar-resnet18", (3, 32, 32)),
    "vgg16 32": ("cifar-vgg16", (3, 32, 32)),
    "demo 8": ("demo", (1, 8, 8)),
    "lenet 32": ("lenet", (1, 32, 32)),
    "mlp 28": ("mlp", (1, 28, 28)),
}
BATCHES = (1, 8, 32, 128)
STEPS = (1, 2, 4, 8, 16)
LATENCY_ROUNDS = 200  # at batch 1, where percentiles are asked for; only of what is fast enough for the effort
OURS = {  # neuron and weight bits of our networks; that of sum mode is an integer ANN, for T up to what its bytes hold
    PLAIN: ("plain", 16),
    "qcfs_fast 8-bit": ("plain", 8),
    "qcfs_fast 24-bit": ("plain", 24),
    "qcfs_fast offset 16-bit": ("offset", 16),
    "qcfs_fast offset 8-bit": ("offset", 8),
    "qcfs_fast integer ANN 8-bit": ("sum", 8),
}
QUICK = {
    ("resnet18 224", 1): STEPS,
    ("resnet18 224", 8): (4,),
    ("vgg16_bn 32", 1): STEPS,
    ("vgg16_bn 32", 32): (4,),
    ("resnet20 32", 1): (4,),
    ("resnet20 32", 32): (4,),
    ("resnet18 32", 1): (4,),
    ("demo 8", 1): (4,),
    ("lenet 32", 1): (4,),
    ("mlp 28", 1): (4,),
}


def batches(label: str) -> tuple[int, ...]:
    """The batches of a network: the largest for small images alone."""
    return BATCHES if NETWORKS[label][1][-1] <= 32 else BATCHES[:-1]


# ------------------------------------------------------------------------------------------ networks


def spiking_macs(snn: SNN, images: Tensor, T: int) -> dict[str, int]:
    """Dense multiply-accumulates of the spiking layers over all T steps, one per weight and output.

    A kernel for 16-bit weights makes two int8 products of each.
    """
    total = 0

    def watch(name: str, layer: Layer, value: Any) -> None:
        nonlocal total
        if isinstance(layer, SpikingLayer):
            pixels = value[0].numel() // value.shape[-1]
            total += T * pixels * sum(source.weight.numel() for source in layer.sources())

    snn.run(images, T, watch=watch)
    return {"macs": total}


def lenet() -> nn.Module:
    """LeNet-5 (LeCun et al., 1998) with average pools."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), QCFS(4), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), QCFS(4), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), QCFS(4), nn.Linear(120, 84), QCFS(4), nn.Linear(84, 10),
    )  # fmt: skip


def mlp() -> nn.Module:
    """Two hidden layers on flattened images."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 512), QCFS(4), nn.Linear(512, 256), QCFS(4), nn.Linear(256, 10))


TINY: dict[str, Callable[[], nn.Module]] = {"demo": DigitsNet, "lenet": lenet, "mlp": mlp}


def random_network(name: str, size: int) -> nn.Module:
    """A network with random weights and QCFS activations."""
    if name in TINY:
        return symbolic_trace(TINY[name]().eval())
    if name in SMALL:
        return symbolic_trace(small_network(name, CLASSES, size=size, levels=4).eval())
    return prepare(torchvision_network(name, CLASSES), levels=4)


def firing_network(name: str, shape: tuple[int, int, int]) -> nn.Module:
    """A network with random weights whose layers fire at TARGET_RATE on uniform noise, over four steps."""
    torch.manual_seed(0)
    model = random_network(name, shape[-1])
    images = torch.rand(4, *shape)
    calibrate(model, [images], progress=False)
    thresholds = [m.thresh for m in activations(model).values()]
    start = [t.detach().clone() for t in thresholds]
    low, high = 0.5, 4.0
    for _ in range(12):
        factor = (low * high) ** 0.5
        with torch.no_grad():
            for t, s in zip(thresholds, start, strict=True):
                t.copy_(s * factor)
        found = simulate(model, images[:1], 4, torch.float32, spikes=True)
        assert not isinstance(found, Tensor)
        if abs(mean_rate(found.spikes) - TARGET_RATE) < 0.003:
            break
        low, high = (factor, high) if mean_rate(found.spikes) > TARGET_RATE else (low, factor)
    return model


class NetworkCases:
    """One network, converted, and its cases; contenders are made per batch."""

    def __init__(self, label: str, device: torch.device, compiled: bool = True) -> None:
        self.label = label
        name, self.shape = NETWORKS[label]
        self.device, self.compiled = device, compiled
        self.model = firing_network(name, self.shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # VGG's first linear layer, repeated 49-fold at 32 pixels, has 13 bits
            self.snns = {
                name: convert(
                    self.model, T=4, weight_bits=bits, max_T=max(STEPS), neuron=neuron, input_shape=self.shape
                )
                for name, (neuron, bits) in OURS.items()
            }

    def ours(self, batch: int, T: int) -> Callable[[], Tensor]:
        """The call of the 16-bit network alone."""
        snn = copy.deepcopy(self.snns[PLAIN]).to(self.device)
        images = torch.rand(batch, *self.shape).to(self.device)
        return lambda: snn(images, T)

    def check_ours(self, name: str) -> float:
        """Share of spikes that differ from the float64 simulation, layer by layer; raises if it is large."""
        image = torch.rand(1, *self.shape)
        spikes = trace(self.snns[name], image, 4)
        forced = simulate(self.model, image, 4, spikes=True, force=spikes, neuron=OURS[name][0])
        assert not isinstance(forced, Tensor)
        return check_share(f"{self.label}: {name} and float64", *count_differing(spikes, forced.spikes), 1e-4)

    def cases(self, batch: int, steps: tuple[int, ...], effort: Effort, only: str = "") -> Iterator[dict[str, Any]]:
        """One result per T. `only` keeps the contenders whose name contains it."""
        torch.manual_seed(batch)
        if self.compiled:
            torch._dynamo.reset()  # or the next batch is compiled for sizes in general
        images = torch.rand(batch, *self.shape)
        if batch == 1:
            effort = replace(effort, rounds=max(effort.rounds, LATENCY_ROUNDS))
        peers = Contenders(self.model, self.snns, images.to(self.device), self.compiled)
        peers.calls = {n: c for n, c in peers.calls.items() if only in n}
        checks = self.check(peers, images)
        anns: dict[str, float] = {}
        loops: dict[str, float] = {}
        for T in steps:
            spikes = trace(self.snns[PLAIN], images[:2], T)
            rate = mean_rate(spikes)
            if not MIN_RATE <= rate <= MAX_RATE:
                raise AssertionError(f"{self.label}, T={T}: firing rate {rate:.1%} is not in 8 to 18 %")
            calls = {n: partial(c, T) for n, c in peers.calls.items()}
            expected = anns | {n: per_step * T for n, per_step in loops.items()}
            rows = interleaved(calls, effort, self.device, expected)
            for name, row in rows.items():
                if "error" in row:
                    continue
                if name.startswith("ANN"):
                    anns[name] = row["seconds"]
                else:
                    loops[name] = row["seconds"] / T
                if row["seconds"] < 2:
                    row["allocated"] = allocated_bytes(calls[name], self.device)
                if self.device.type == "cpu" and name in peers.ours:
                    row["outside"] = share_outside(peers.ours[name], calls[name], effort.rounds_of(row["seconds"]))
            yield {
                "kind": "network",
                "name": self.label,
                "batch": batch,
                "T": T,
                "firing rate": rate,
                "check": checks,
                "live bytes": live_bytes(self.snns[PLAIN], images, T),
                **spiking_macs(self.snns[PLAIN], images, T),
                "contenders": {**rows, **{n: {"error": e} for n, e in peers.errors.items() if only in n}},
            }
            gc.collect()

    def check(self, peers: Contenders, images: Tensor, T: int = 4) -> dict[str, float]:
        """Compare each contender with what it should compute; raises where it computes something else.

        Spikes (of simulators) and levels (of QCFS networks) are compared layer by layer. Compiled networks are compared
        with the eager ones by their logits, and loosely: in a network with random weights one flipped spike spreads.
        """
        found = {
            f"{name}, spikes apart from float64": self.check_ours(name)
            for name, (neuron, bits) in OURS.items()
            if bits > 8 and neuron != "sum"
        }
        spikes = trace(self.snns[PLAIN], images, T)
        levels = quantised(self.model, images)
        logits: dict[str, Tensor] = {}
        for restart in peers.restart_streams:
            restart()
        for name, call in list(peers.calls.items()):
            try:
                out = logits[name] = call(T).float().cpu()
            except Exception as error:
                peers.errors[name] = describe_error(error)
                del peers.calls[name]
                continue
            eager = name.removesuffix(" compiled")
            if name.startswith(STREAM) or (name.startswith("qcfs_fast") and self.device.type == "cuda"):
                own = PLAIN if name.startswith(STREAM) else name.rsplit(" ", 1)[0]
                if not torch.equal(out, self.snns[own](images, T)):
                    raise AssertionError(f"{name}: differs from {own} on the CPU")
                continue
            if name in peers.networks and "ReLU" not in name:
                wanted = levels if name.startswith("ANN") else spikes
                wrong, total = count_differences(call, peers.networks[name], wanted, T)
                limit = 0.05 if "bf16" in name else 1e-4
                found[f"{name}, apart"] = check_share(f"{self.label}: {name}, apart", wrong, total, limit)
            elif eager != name and eager in logits:
                found[f"{name}, logits"] = relative_distance(out, logits[eager])
                if not found[f"{name}, logits"] <= 0.5:
                    raise AssertionError(f"{self.label}: {name}: logits unlike the eager ones ({found})")
        return found


def check_share(what: str, wrong: int, total: int, limit: float) -> float:
    """The share that differs; raises if it exceeds the limit (three differences are allowed in any case)."""
    if wrong > 3 + limit * total:
        raise AssertionError(f"{what}: {wrong} of {total} differ")
    return wrong / total


def relative_distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# -------------------------------------------------------------------------------------------- layers

LAYERS: dict[str, tuple[int, int, int, int]] = {  # kernel, size, channels in and out
    "3x3 56x56 64->64": (3, 56, 64, 64),
    "3x3 28x28 128->128": (3, 28, 128, 128),
    "3x3 14x14 256->256": (3, 14, 256, 256),
    "3x3 7x7 512->512": (3, 7, 512, 512),
    "linear 25088->4096": (1, 1, 25088, 4096),
}


class LayerCase:
    """One spiking layer alone on the CPU at batch 1, on random spikes with the rate of a trained network."""

    def __init__(self, label: str, T: int = 4, rate: float = 0.12) -> None:
        self.label, self.T = label, T
        self.kernel, self.size, self.inputs, self.outputs = LAYERS[label]
        k, g = self.kernel, torch.Generator().manual_seed(0)
        self.spikes = torch.rand((T, 1, self.size, self.size, self.inputs), generator=g) < rate
        self.x = masks.pack(self.spikes)
        self.geometry = [k, k, 1, 1, k // 2, k // 2, 1, 1, 1]
        wide = torch.randint(-32639, 32640, (k, k, self.inputs, self.outputs), dtype=torch.int16, generator=g)
        self.weights = {16: wide, 8: (wide // 256).clamp(-127, 127).to(torch.int8)}
        self.unit = 2 * int(32639 * (k * k * self.inputs * rate) ** 0.5 / 2)
        self.bias = torch.zeros(self.outputs, dtype=torch.int32)
        self.threshold = torch.full_like(self.bias, self.unit)
        self.linear = self.kernel == self.size == 1
        # Kept, because packed weights are cached per tensor: a view made for each call would be packed for each call.
        self.matrices = {bits: w.flatten(0, 2) for bits, w in self.weights.items()}

    def ours(self, bits: int) -> Tensor:
        tail: Any = ([], [], None, self.bias, self.threshold, self.T)
        if self.linear:
            return torch.ops.qcfs_fast.linear_if([self.x.flatten(2)], [self.matrices[bits]], *tail)
        return torch.ops.qcfs_fast.conv2d_if([self.x], [self.weights[bits]], self.geometry, *tail)

    def fired(self) -> Tensor:
        """Spikes [T, 1, O, ...] by the plain-torch reference; raises if ours differ."""
        tail: Any = ([], [], None, self.bias, self.threshold, self.T)
        want = reference.conv2d_if(Conv2dIf.checked([self.x], [self.weights[16]], self.geometry, *tail))
        if not torch.equal(self.ours(16).reshape(want.shape), want):
            raise AssertionError(f"{self.label}: differs from the reference")
        spikes = masks.unpack(want, self.T).bool().permute(0, 1, 4, 2, 3)
        if not 0.01 < float(spikes.float().mean()) < 0.95:
            raise AssertionError(f"{self.label}: the layer fires at {float(spikes.float().mean()):.1%}")
        return spikes.flatten(2) if self.linear else spikes

    def floats(self, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
        """The float layer in units of the threshold, and the spikes [T, ...] it gets."""
        weight = self.weights[16].float() / self.unit
        if self.linear:
            layer: nn.Module = nn.Linear(self.inputs, self.outputs, bias=False)
            layer.weight.data = weight.reshape(self.inputs, self.outputs).t().contiguous()
            return layer.to(dtype), self.spikes.flatten(0, 1).flatten(1).to(dtype)
        layer = nn.Conv2d(self.inputs, self.outputs, self.kernel, padding=self.kernel // 2, bias=False)
        layer.weight.data = weight.permute(3, 2, 0, 1)
        layer = channels_last(layer.to(dtype))
        return layer, self.spikes.flatten(0, 1).to(dtype).permute(0, 3, 1, 2)

    def case(self, effort: Effort) -> dict[str, Any]:
        """The layer's result."""
        T, fired, check = self.T, self.fired(), {}
        calls: dict[str, Callable[[], Any]] = {f"qcfs_fast {b}-bit": partial(self.ours, b) for b in self.weights}
        for name, dtype in DTYPES.items():
            layer, steps = self.floats(dtype)
            image = steps[:1].contiguous(memory_format=torch.contiguous_format if self.linear else torch.channels_last)

            def loop(layer: nn.Module = layer, steps: Tensor = steps) -> Tensor:  # currents of all T at once
                currents = layer(steps).unflatten(0, (T, 1))
                v, spikes = torch.full_like(currents[0], 0.5), []
                for current in currents:
                    v = v + current
                    spikes.append((v >= 1).to(v.dtype))
                    v = v - spikes[-1]
                return torch.stack(spikes)

            check[f"T-loop {name}, apart"] = float((loop().bool() != fired).float().mean())
            calls[f"ANN {name}"] = partial(layer, image)
            calls[f"T-loop {name}"] = loop
        if check["T-loop fp32, apart"] > 1e-3:
            raise AssertionError(
                f"{self.label}: {check['T-loop fp32, apart']:.1e} of the loop's spikes differ from ours"
            )
        return {
            "kind": "layer",
            "name": self.label,
            "batch": 1,
            "T": T,
            "firing rate": float(self.spikes.float().mean()),
            "check": check,
            "macs": T * self.size**2 * self.weights[16].numel(),
            "contenders": interleaved(calls, effort, torch.device("cpu"), {}),
        }
