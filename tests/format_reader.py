"""A reader of saved networks written from docs/format.md alone: numpy, json, and the neuron of oracle.py."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import oracle

DTYPES = {"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64, "F32": np.float32, "F64": np.float64}


def read(path):
    """The header, and the tensors by name."""
    data = Path(path).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:end])
    metadata = entries.pop("__metadata__")
    header = json.loads(metadata["qcfs_fast"])
    tensors = {}
    for name, entry in entries.items():
        first, last = entry["data_offsets"]
        tensors[name] = np.frombuffer(data[end + first : end + last], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    check(metadata["qcfs_fast"], tensors)
    return header, tensors


def check(header, tensors):
    before, found, seal = header.rpartition(', "crc32": "')
    if found and seal.endswith('"}') and len(seal) == 10:
        parts = [
            before.encode(),
            *(p for n in sorted(tensors, key=str.encode) for p in (n.encode(), tensors[n].tobytes())),
        ]
        assert seal[:8] == format(zlib.crc32(b"".join(parts)), "08x")


def quantize(x, t, bits):
    limit = 2 ** (bits - 1) - 1
    z = (x[:, t["source"]] * t["scale"][:, None, None] + t["shift"][:, None, None]).astype(np.float64)
    exponents = []
    for largest in np.abs(z).reshape(len(z), -1).max(1):
        e = math.frexp(largest / limit)[1] if largest else 0
        exponents.append(e - 1 if largest and largest <= limit * 2.0 ** (e - 1) else e)
    e = np.array(exponents)
    return np.rint(z * 2.0 ** -e[:, None, None, None]).astype(np.int64).transpose(0, 2, 3, 1), e


def current(image, name, geometry, t):
    def convolved(name, gain, offset, low, high):
        scale = gain * 2.0 ** e[:, None]
        z = oracle.convolve(q, t[name], geometry) * scale[:, None, None] + offset
        return np.clip(np.rint(z), low, high).astype(np.int64)

    q, e = image
    if name + "_low" not in t:
        return convolved(name, t["gain"], t["offset"], t["low"], t["high"])
    n = t["threshold"]
    half, wide = n // 2, (-31 * n, 31 * n) if name == "weight" else (t["low"], t["high"])
    upper = convolved(name, t["gain"] * 256, t["offset"], *wide)
    return np.clip(upper + convolved(name + "_low", t["gain"], 0.0, -half, half), t["low"], t["high"])


def whole(t, name):
    """A weight of one digit or several, in units, int64."""
    digits = [t[n].astype(np.int64) for n in (name, name + "_middle", name + "_low") if n in t]
    if len(digits) == 1:
        return digits[0] * (256 if t[name].dtype == np.int8 else 1)
    return sum(d * 256**i for i, d in enumerate(reversed(digits)))


def windows(pool, size, axis):
    """(rows or columns, divisor) of each window; plain pools alone, which is what the stored files have."""
    assert not pool["ceil_mode"]
    assert pool["count_include_pad"]
    assert pool["output"] is pool["divisor_override"] is None
    k, s, p = pool["kernel"][axis], pool["stride"][axis], pool["padding"][axis]
    part, parts = pool["section"][2 * axis : 2 * axis + 2]
    found = []
    for i in range((size + 2 * p - k) // s + 1):
        first, last = max(i * s - p, 0), min(i * s - p + k, size)
        length = last - first
        found.append((range(first + length * part // parts, first + length * (part + 1) // parts), k))
    return found


def pooled(x, pool, multiple):
    """Integers [T, N, H, W, C] pooled: maxima, or sums * (multiple / divisor)."""
    rows, cols = windows(pool, x.shape[2], 0), windows(pool, x.shape[3], 1)
    out = np.zeros((*x.shape[:2], len(rows), len(cols), x.shape[4]), np.int64)
    for i, (ys, ky) in enumerate(rows):
        for j, (xs, kx) in enumerate(cols):
            part = x[:, :, ys][:, :, :, xs]
            out[:, :, i, j] = part.max((2, 3)) if pool["kind"] == "max" else part.sum((2, 3)) * (multiple // (ky * kx))
    return out


class Neurons:
    """The neurons of a network, for an answer after T steps. Spikes travel as integers [steps, N, ...]."""

    def __init__(self, header, T):
        said = header.get("neuron", {"mode": "plain", "window": 4, "iterations": 1})
        self.mode, self.T, self.window, self.iterations = said["mode"], T, said["window"], said["iterations"]
        looks_ahead = self.mode in ("offset", "masked")
        self.steps = 1 if self.mode == "sum" else max(T, self.window) if looks_ahead else T
        self.levels = T if self.mode == "sum" else 1

    def fire(self, currents, threshold):
        window = self.T if self.mode == "sum" else self.window
        masks = oracle.fire(currents, threshold, self.mode, window, self.iterations).masks
        if self.mode == "sum":
            return masks.astype(np.int64)
        if self.mode == "signed":
            positive, negative = np.split(masks, 2)
            return oracle.unpack(positive, self.steps) - oracle.unpack(negative, self.steps)
        return oracle.unpack(masks, self.steps)

    def bias(self, t):
        return t["bias"] if t["bias"].ndim == 1 else t["bias"][: self.steps]


def encoding(node, t, values, neurons):
    """The first layer: a constant current within 0 .. n, or with biases that differ one that may be anything."""
    constant = current(values["input"], "weight", node["config"]["geometry"], t)
    if "bias" in t:
        wide = {**t, "low": -31 * t["threshold"], "high": 31 * t["threshold"]}
        constant = current(values["input"], "weight", node["config"]["geometry"], wide)
        return neurons.fire(constant[None] + neurons.bias(t)[:, None, None, None].astype(np.int64), t["threshold"])
    if neurons.mode == "sum":  # the count of a plain neuron
        spikes = oracle.integrate_and_fire(np.broadcast_to(constant, (neurons.T, *constant.shape)), t["threshold"])
        return oracle.unpack(spikes.masks, neurons.T).sum(0, keepdims=True)
    return neurons.fire(np.broadcast_to(constant, (neurons.steps, *constant.shape)), t["threshold"])


def spiking(node, t, values, neurons):
    config = node["config"]
    index, g = config["weight_index"], config["geometry"]
    x = [values[name] for name in node["inputs"]]
    image = x.pop() if "analog_geometry" in config else None
    constant = None if image is None else current(image, "analog_weight", config["analog_geometry"], t)
    products = []
    for i, k in enumerate(index):
        weight, source = whole(t, f"weight_{k}"), x[i]
        if config["vector"]:
            weight, source = weight[None, None], source.reshape(*source.shape[:2], 1, 1, -1)
        products.append((source, weight, g[9 * i : 9 * i + 9]))
    residuals = [(r, t[f"amplitude_{i}"]) for i, r in enumerate(x[len(index) :])]
    currents = oracle.currents(products, residuals, constant, neurons.bias(t), neurons.steps, levels=neurons.levels)
    return neurons.fire(currents, t["threshold"])


def overflow_free_steps(node, t):
    config = node["config"]
    total = np.abs(t["bias"].astype(np.int64)).reshape(-1, t["threshold"].size).max(0)
    for k, peak in zip(config["weight_index"], config["peaks"], strict=False):
        total = total + peak * np.abs(whole(t, f"weight_{k}")).reshape(-1, total.size).sum(0)
    for i, peak in enumerate(config["peaks"][len(config["weight_index"]) :]):
        total = total + peak * np.abs(t[f"amplitude_{i}"].astype(np.int64))
    n = t["threshold"].astype(np.int64)
    total = total + (64 * n if "analog_geometry" in config else 0)
    return int(((2**31 - 1 - n // 2) // np.maximum(total, 1)).min())


def readout(node, t, values, neurons):
    """Running answers [T, N, O]; in sum mode the one answer [1, N, O]."""
    T = neurons.T
    config, terms = node["config"], []
    for i, name in enumerate(node["inputs"]):
        x, multiple = values[name], 1
        for pool in config["pools"][i]:
            assert pool["kind"] == "max" or pool["padding"] == [0, 0]
            product = 1 if pool["kind"] == "max" else pool["kernel"][0] * pool["kernel"][1]
            x, multiple = pooled(x, pool, product), multiple * product
        counts = x[:T].cumsum(0)
        if config["vectors"][i]:
            counts = counts.reshape(*counts.shape[:2], 1, 1, -1)
        steps = np.arange(T + 1 - len(counts), T + 1, dtype=np.float64)[:, None, None, None, None]
        terms.append((f"weight_{i}", t[f"gain_{i}"], counts, config["geometry"][9 * i : 9 * i + 9], steps * multiple))
    if "weight_bits" in config:
        terms = [(w, gain * 256, *rest) for w, gain, *rest in terms] + [(f"{w}_low", *rest) for w, *rest in terms]
    total = 0.0
    for weight, gain, counts, geometry, divisor in terms:
        sums = np.stack([oracle.convolve(c, t[weight], geometry) for c in counts]).astype(np.float64)
        total = total + sums * gain / divisor
    assert config["vector"]
    return (total + t["offset"]).astype(np.float32)[:, :, 0, 0]


def run(path, x, T):
    """Spikes [steps, N, ...] of every spiking layer by name, and the running answers, for images x [N, C, H, W]."""
    header, tensors = read(path)
    assert header["format_version"] in (1, 2)
    neurons = Neurons(header, T)
    values, spikes, answers = {}, {}, None
    for node in header["graph"]:
        name, config = node["name"], node["config"]
        t = {key: tensors[f"{name}/{key}"] for key in node["tensors"]}
        if node["type"] == "ImageInput":
            values[name] = quantize(x, t, config.get("bits", 16))
        elif node["type"] == "EncodingLayer":
            spikes[name] = encoding(node, t, values, neurons)
        elif node["type"] == "SpikingLayer":
            assert T <= header["details"][name]["max_T"] <= overflow_free_steps(node, t)
            spikes[name] = spiking(node, t, values, neurons)
        elif node["type"] == "SpikePool":
            values[name] = pooled(values[node["inputs"][0]], config["pool"], config["pool"]["multiple"])
        elif node["type"] == "SpikeConcat":
            values[name] = np.concatenate([values[i] for i in node["inputs"]], -1)
        else:
            assert node["type"] == "Readout"
            answers = readout(node, t, values, neurons)
        if name in spikes:
            values[name] = spikes[name]
    return spikes, answers
