"""to_nir and from_nir: a converted network as a graph of the Neuromorphic Intermediate Representation, and back.

NIR (Pedersen et al., "Neuromorphic intermediate representation: a unified instruction set for interoperable brain-
inspired computing", Nature Communications 2024) describes a network as nodes and edges; what arrives at a node by
several edges is added. The graph made here counts as the converted network does: weights are the integers of the
network, a threshold is the even integer n of its channel, and a spike is 1. In float64 every sum of them is exact.

    ImageInput    Input, and a 1x1 convolution where the image is scaled or its channels are picked
    EncodingLayer Conv2d or Affine                   -+
    SpikingLayer  one of them for each source,        +- added up -> IF (or the composite below)
                  a diagonal one for each residual   -+
    SpikePool     SumPool2d: its divisor is in the weights that read it
    Readout       SumPool2d, Flatten, Affine -> Output: the current of each step; the answer is its mean over T steps

A layer's bias is that of its first convolution. Convolutions are dense and square, with zeros where groups or the
kernel have nothing: NIR's own check of shapes knows no other, and SpikingJelly reads no other.

NIR's IF starts at 0, fires where v > threshold and is reset to a value. Ours starts at n/2, fires where v >= n and
subtracts n. No field of IF says so; its metadata does (reset, comparison, v_init, spikes_per_step), and simulators.py
follows it. neurons="composite" needs no metadata. It says the same by nodes whose meaning is plain:

    current -> I (integrates) -> Threshold (v > n/2 - 1/2) -> spikes
               ^----- Scale by -n <------'                     an edge back takes one step

With v' = v - n/2, in integers, v >= n is v' > n/2 - 1/2.

The metadata of the graph holds the header of the saved network (docs/format.md), and that of nodes what NIR has no
field for, so from_nir gives the very same network. It takes weights, thresholds and biases from the nodes, and refuses
a graph whose nodes say something else than its header.

What no NIR node says is refused by name: max pools, concatenations as residuals or before an activation, pools of
uneven windows, pixels that move but for even borders and strides, neurons but plain ones, biases by step. A softmax or
the like behind the logits (`snn.tail`) is in the header alone.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..conversion.units import split
from ..errors import WRONG_FORM, ConversionError, FormatError
from ..network import saving
from ..network.layers import (
    DIGITS,
    EncodingLayer,
    ImageInput,
    Readout,
    SpikePool,
    SpikingLayer,
    pieces,
)
from ..network.loading import load
from ..network.schema import Geometry, printable
from ..network.snn import SNN
from ..operators.geometry import POINTWISE, convolution_size
from ..operators.windows import PoolSpec

OURS = "qcfs_fast"  # the key of what only from_nir reads, in the metadata of the graph and of nodes
OUTPUT = "output"
NEURON = {"reset": "subtract", "comparison": ">=", "spikes_per_step": 1}
NEURONS = ("if", "composite")
READING = 600  # seconds that a file may take


def _nir() -> Any:
    try:
        return importlib.import_module("nir")
    except ImportError as error:
        raise ImportError("NIR graphs need the package nir: pip install 'qcfs-fast[nir]'") from error


def to_nir(snn: SNN, input_shape: Sequence[int] | None = None, neurons: str = "if") -> Any:
    """A converted network as a NIR graph, with the same spikes in exact arithmetic.

    Args:
        snn: with plain neurons.
        input_shape: [C, H, W] of the images, or [features]; default ``snn.input_shape``. NIR's nodes have sizes.
        neurons: "if", a NIR IF per layer whose metadata says how it starts, compares and resets; or "composite", which
            is exact by the nodes alone (nir.py draws it) and which few readers run.

    Returns:
        nir.NIRGraph; ``nir.write(path, graph)`` writes it. Its output is the current of the last layer at each step, in
        the units of the logits; ``snn(x, T)`` is the mean over T steps, or where there is a ``snn.tail`` (a softmax),
        what that makes of the mean: NIR has no node for it, and it comes back by :func:`from_nir` alone.

    Raises:
        ConversionError: NIR cannot express a part of the network; the message names it.
        ImportError: the package nir is not installed.
        TypeError, ValueError: an argument is none that this function takes.

    The image enters the network as integers of 24 bits, and the current of a layer that reads it is rounded to whole
    units. NIR has no rounding, so a simulator's spikes are ours for certain where image and first weights lie on a
    grid that both hold; elsewhere they may differ where such a current is within half a unit of a threshold.
    """
    if not isinstance(snn, SNN):
        raise TypeError(f"to_nir: expected a converted network (SNN), got {type(snn).__name__}")
    if neurons not in NEURONS:
        raise ValueError(f"to_nir: neurons must be one of {', '.join(NEURONS)}, got {neurons!r}")
    if snn.neuron.mode != "plain":
        raise ConversionError(
            f'to_nir: NIR has no {snn.neuron.mode} neurons; set snn.neuron = "plain", or convert with plain neurons'
        )
    snn.refuse_several_outputs("to_nir")
    first = dict(snn.layers)["input"].config
    shape = snn.as_map(input_shape or snn.input_shape)
    if shape is None and first.vector:
        shape = (first.channels,)
    if shape is None:
        raise ValueError("to_nir: NIR graphs have sizes; give input_shape=[C, H, W]")
    shape = tuple(int(d) for d in shape)
    snn.image_shape(shape)
    return _Writer(snn, shape, neurons).graph()


class _Writer:
    """Makes the nodes of a graph, in the order of the network; `shapes` of their outputs, without the batch."""

    def __init__(self, snn: SNN, shape: tuple[int, ...], neurons: str) -> None:
        self.nir, self.snn, self.shape, self.neurons = _nir(), snn, shape, neurons
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.names: dict[str, str] = {}  # of the NIR node that sends what a node of the network sends

    def graph(self) -> Any:
        writers: dict[type, Any] = {
            ImageInput: self.image,
            EncodingLayer: self.encoding,
            SpikingLayer: self.spiking,
            SpikePool: self.spike_pool,
            Readout: self.readout,
        }
        for name, layer in self.snn.layers.items():
            if type(layer) not in writers:
                remedy = "put an activation after the concatenation"
                if pieces(name, layer):
                    remedy = f"activate each of these before the concatenation in place of {name} behind it"
                raise ConversionError(
                    f"to_nir: {name} concatenates {' and '.join(layer.inputs)}, which no NIR node does; {remedy}"
                )
            self.names[name] = writers[type(layer)](name, layer)
        about = {OURS: self.snn.saved()[0], "T": self.snn.T, "units": "integers: thresholds are even, a spike is 1"}
        return self.nir.NIRGraph(self.nodes, self.edges, metadata=about)

    # ------------------------------------------------------------------------------ the network's nodes

    def image(self, name: str, layer: Any) -> str:
        if layer.config.moves:
            raise ConversionError(f"to_nir: {name} pads, crops or enlarges the image; do that before the network")
        tensors = {key: layer.buffer(key).numpy() for key in ("source", "scale", "shift")}
        node = self.nir.Input({"input": np.array(self.shape)}, metadata={OURS: tensors})
        found = self.add(name, node, [], self.shape)
        source, scale, shift = tensors.values()
        C = self.shape[0]
        if np.array_equal(source, np.arange(C)) and (scale == 1).all() and (shift == 0).all():
            return found
        weight = np.zeros((1, 1, C, source.size))
        weight[0, 0, source, np.arange(source.size)] = scale
        return self.convolution(f"{name}_scaled", found, weight, POINTWISE, shift)

    def encoding(self, name: str, layer: Any) -> str:
        if layer.config.bias_steps is not None:
            raise self.refused_steps(name)
        weight = _numpy(layer.whole("weight")) * _numpy(layer.gain)
        current = self.convolution(
            f"{name}_image", self.names[layer.inputs[0]], weight, layer.config.geometry, layer.offset
        )
        held = {key: layer.buffer(key).numpy() for key in ("gain", "low", "high")}
        return self.fire(name, layer, [self.flat(current) if layer.config.vector else current], held)

    def spiking(self, name: str, layer: Any) -> str:
        if layer.config.bias_steps is not None:
            raise self.refused_steps(name)
        vector, bias = layer.config.vector, _numpy(layer.bias)
        silent = np.zeros_like(bias)
        currents: list[str] = []
        for i, source in enumerate(layer.sources()):
            weight = _numpy(source.weight) * (256 if source.weight.dtype == torch.int8 else 1)
            write = self.linear if vector else self.convolution
            node = self.names[source.node]
            currents.append(write(f"{name}_source_{i}", node, weight, source.geometry, silent if currents else bias))
        for i, r in enumerate(layer.residuals()):
            node = self.names[r.node]
            weight = np.diag(_numpy(r.amplitude))[None, None]
            node = self.flat(node) if vector else node
            named = f"{name}_residual_{i}"
            currents.append(self.convolution(named, node, weight, POINTWISE, silent if currents else bias))
        held = {}
        if (analog := layer.analog) is not None:
            weight = _numpy(analog.weight) * _numpy(layer.gain)
            offset = _numpy(layer.offset) + (silent if currents else bias)
            node = self.names[analog.node]
            current = self.convolution(f"{name}_image", node, weight, analog.geometry, offset)
            currents.append(self.flat(current) if vector else current)
            held = {key: layer.buffer(key).numpy() for key in ("gain", "low", "high")}
            held["bias"] = layer.bias.numpy()  # the image's share of the sum is not told apart
        return self.fire(name, layer, currents, held)

    def spike_pool(self, name: str, layer: Any) -> str:
        return self.pool(name, self.names[layer.inputs[0]], layer.spec, layer.spec.multiple)

    def readout(self, name: str, layer: Any) -> str:
        currents: list[str] = []
        offset = _numpy(layer.offset)
        for i, term in enumerate(layer.terms()):
            node, multiple = self.names[term.node], 1
            for k, spec in enumerate(term.pools):
                found = spec.common_multiple(*self.shapes[node][1:])
                node = self.pool(f"{name}_pool_{i}_{k}", node, spec, found)
                multiple *= found
            gain = _numpy(term.gain) / multiple
            bias = np.zeros_like(offset) if currents else offset
            empty = term.weight.numel() == 0
            weight = np.diag(gain)[None, None] if empty else _numpy(term.weight) * gain
            if term.vector and not empty:
                current = self.linear(f"{name}_term_{i}", node, weight[0, 0], term.geometry, bias)
            else:
                node = self.flat(node) if term.vector else node
                geometry = POINTWISE if empty else term.geometry
                current = self.convolution(f"{name}_term_{i}", node, weight, geometry, bias)
            currents.append(self.flat(current) if layer.config.vector or layer.config.flattened else current)
        shape = self.shapes[currents[0]]
        held = {"offset": layer.offset.numpy(), **{f"gain_{i}": t.gain.numpy() for i, t in enumerate(layer.terms())}}
        node = self.nir.Output({"output": np.array(shape)}, metadata={OURS: held})
        return self.add(OUTPUT, node, currents, shape)

    def refused_steps(self, name: str) -> ConversionError:
        return ConversionError(f"to_nir: {name} has a bias for each step, which NIR has not; convert without step_bias")

    # --------------------------------------------------------------------------------------- NIR's nodes

    def add(self, name: str, node: Any, inputs: Sequence[str], shape: tuple[int, ...]) -> str:
        if name in self.nodes:
            raise ConversionError(f"to_nir: two nodes would be called {name!r}; rename that module of the model")
        self.nodes[name], self.shapes[name] = node, shape
        self.edges += [(source, name) for source in inputs]
        return name

    def convolution(self, name: str, source: str, weight: np.ndarray, geometry: Geometry, bias: Any) -> str:
        """Weight [KH, KW, C / groups, O] over maps; over vectors it is 1x1, and an Affine."""
        shape, bias = self.shapes[source], _numpy(bias)
        if len(shape) == 1:
            return self.add(name, self.nir.Affine(weight[0, 0].T.copy(), bias), [source], bias.shape)
        square, padding = _dense_and_square(name, weight, geometry)
        node = self.nir.Conv2d(shape[1:], square, geometry[2:4], padding, geometry[6:8], 1, bias)
        return self.add(name, node, [source], (bias.size, *convolution_size(shape[1], shape[2], geometry)))

    def linear(self, name: str, source: str, weight: np.ndarray, geometry: Geometry, bias: Any) -> str:
        """Weight [H * W * C, O], the channel fastest; NIR flattens maps with the column fastest."""
        shape = self.shapes[source]
        if len(shape) == 3:
            C, H, W = shape
            weight = weight.reshape(H, W, C, -1).transpose(2, 0, 1, 3).reshape(weight.shape)
        return self.convolution(name, self.flat(source), weight[None, None], geometry, bias)

    def flat(self, source: str) -> str:
        shape = self.shapes[source]
        name = f"{source}_flat"
        if len(shape) == 1 or name in self.nodes:
            return source if len(shape) == 1 else name
        node = self.nir.Flatten({"input": np.array(shape)}, 0, -1)
        return self.add(name, node, [source], (int(np.prod(shape)),))

    def pool(self, name: str, source: str, spec: PoolSpec, multiple: int) -> str:
        C, H, W = self.shapes[source]
        sizes = (H, W)
        windows = [spec.windows(size, axis) for axis, size in enumerate(sizes)]
        moves = all(end - first <= 1 for w in windows for first, end in zip(w[0::3], w[1::3], strict=True))
        if spec.kind == "max" and not moves:
            raise ConversionError(f"to_nir: {name} is a max pool, which NIR has not; use average pools")
        sides = [_regular(w, size, spec, axis) for axis, (w, size) in enumerate(zip(windows, sizes, strict=True))]
        whole = spec.section == (0, 1, 0, 1)
        if not whole or None in sides or max(multiple, 1) != sides[0][3] * sides[1][3]:  # type: ignore[index]
            what = f"averages windows of different sizes on maps of {H}x{W}"
            remedy = "use images whose maps the pool divides evenly"
            if spec.spreads:
                what = "enlarges maps (an upsampling, a PixelShuffle, a ConvTranspose2d)"
                remedy = "use layers that keep or divide the size of maps"
            elif moves:
                what = "cuts maps, or pads their sides unlike each other"
                remedy = "use convolutions with padding, strides and average pools"
            elif not whole:
                what = "is one of the sections of an average whose sums do not fit a byte"
                remedy = "use smaller pools, one behind the other"
            raise ConversionError(f"to_nir: {name} {what}, which NIR cannot say; {remedy}")
        kernel, stride, padding = (np.array([side[k] for side in sides if side]) for k in range(3))
        outputs = tuple(len(w) // 3 for w in windows)
        return self.add(name, self.nir.SumPool2d(kernel, stride, padding), [source], (C, *outputs))

    def fire(self, name: str, layer: Any, currents: list[str], held: dict[str, np.ndarray]) -> str:
        shape = self.shapes[currents[0]]
        n = _numpy(layer.threshold).reshape(-1, *[1] * (len(shape) - 1)) * np.ones(shape)
        metadata = {**NEURON, "v_init": n / 2, **({OURS: held} if held else {})}
        if self.neurons == "if":
            return self.add(name, self.nir.IF(np.ones(shape), n, metadata=metadata), currents, shape)
        integrator = self.add(f"{name}_membrane", self.nir.I(np.ones(shape)), currents, shape)
        fired = self.nir.Threshold(n / 2 - 0.5, **({"metadata": {OURS: held}} if held else {}))
        self.add(name, fired, [integrator], shape)
        self.edges.append((self.add(f"{name}_reset", self.nir.Scale(-n), [name], shape), integrator))
        return name


def _numpy(x: Any) -> np.ndarray:
    """float64, in which all integers of a network are exact."""
    found: np.ndarray = np.asarray(x.cpu() if isinstance(x, Tensor) else x).astype(np.float64)
    return found


def _dense_and_square(name: str, weight: np.ndarray, g: Geometry) -> tuple[np.ndarray, tuple[int, ...]]:
    """[KH, KW, C / groups, O] as [O, C, K, K] with zeros, and the padding that goes with it."""
    kh, kw, inner, O = weight.shape
    groups, K = g[8], max(kh, kw)
    if (K - kh) % 2 or (K - kw) % 2:
        raise ConversionError(
            f"to_nir: {name} has a kernel of {kh}x{kw}; NIR's check of shapes takes kernels for square ones, and zeros "
            "make it square only where the sides differ by an even number"
        )
    top, left = (K - kh) // 2, (K - kw) // 2
    dense = np.zeros((O, inner * groups, K, K))
    for i in range(groups):
        rows, own = slice(i * inner, (i + 1) * inner), slice(i * O // groups, (i + 1) * O // groups)
        dense[own, rows, top : top + kh, left : left + kw] = weight[..., own].transpose(3, 2, 0, 1)
    return dense, (g[4] + top * g[6], g[5] + left * g[7])


def _regular(windows: tuple[int, ...], size: int, spec: PoolSpec, axis: int) -> tuple[int, int, int, int] | None:
    """Kernel, stride, padding and divisor along one axis where all windows have the same; else None."""
    first, end, divisors = windows[0::3], windows[1::3], set(windows[2::3])
    tries = [(end[0] - first[0], first[1] - first[0] if len(first) > 1 else max(1, end[0] - first[0]), 0)]
    if spec.kernel is not None:
        tries.insert(0, (spec.kernel[axis], spec.stride[axis], spec.padding[axis]))
    for k, s, p in tries:
        if s < 1:  # windows that repeat
            continue
        starts = range(-p, size + p - k + 1, s)
        same = [(max(a, 0), min(a + k, size)) for a in starts] == list(zip(first, end, strict=True))
        if same and len(divisors) == 1:
            return k, s, p, divisors.pop()
    return None


# ------------------------------------------------------------------------------------------------- back


def from_nir(graph: Any) -> SNN:
    """The network of a NIR graph that :func:`to_nir` made, with the same integers.

    Args:
        graph: a nir.NIRGraph, or the path of a file of one.

    Raises:
        FormatError: the graph's nodes and its header do not say the same, or the header is damaged.
        ConversionError: the graph is of another program. Its IF neurons start, compare and reset in another way, and
            NIR has no field that could say otherwise.
        FileNotFoundError: no such file.
        ImportError: the package nir is not installed.
    """
    nir = _nir()
    if isinstance(graph, (str, Path)):
        if not Path(graph).is_file():
            raise FileNotFoundError(f"from_nir: no file {graph}")
        _refuse_damaged(Path(graph))
        graph = nir.read(graph)
    if not isinstance(graph, nir.NIRGraph):
        raise TypeError(f"from_nir: expected a nir.NIRGraph or a path, got {type(graph).__name__}")
    text = graph.metadata.get(OURS)
    if not isinstance(text, str):
        raise ConversionError(
            "from_nir: this graph was not made by to_nir. NIR's IF starts at 0, compares strictly and resets hard, so "
            "it is another neuron; build the network in PyTorch with qcfs_fast.QCFS activations, and convert it"
        )
    try:
        snn = _read(text, graph)
        composite = any(isinstance(node, nir.Threshold) for node in graph.nodes.values())
        shape = tuple(int(d) for d in graph.nodes["input"].input_type["input"])
        different = _first_difference(graph, to_nir(snn, shape, "composite" if composite else "if"))
    except (ConversionError, FormatError):
        raise
    except WRONG_FORM as error:
        raise FormatError(
            f"from_nir: the graph lacks what its header names ({type(error).__name__}: {error})"
        ) from error
    if different:
        raise FormatError(
            f"from_nir: {different} is not what the header of the graph says; it was altered after to_nir made it"
        )
    return snn


def _refuse_damaged(path: Path) -> None:
    """FormatError where a file cannot be read, which is tried in a process of its own: HDF5 can end it, or hang."""
    # -I: a module that lies where the user works is not imported in place of one that is installed.
    command = "import sys; path, *sys.path = sys.argv[1:]; import nir; nir.read(path)"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", command, str(path.resolve()), *map(os.path.abspath, sys.path)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=READING, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise FormatError(f"{path}: not a NIR graph (HDF5 reads it for more than {READING} seconds)") from error
    if done.returncode < 0:
        raise FormatError(f"{path}: not a NIR graph (HDF5 ended by signal {-done.returncode}); write it again")
    if done.returncode > 0:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise FormatError(f"{path}: not a NIR graph ({printable(said)}); write it again")


def _read(text: str, graph: Any) -> SNN:
    """The network of a header and of the nodes that hold its tensors, by way of a saved file, which is checked."""
    header = json.loads(text)
    tensors: dict[str, Tensor] = {}
    for node in header["graph"]:
        found = _tensors(node, graph, header["weight_bits"])
        tensors.update((f"{node['name']}/{key}", found[key]) for key in node["tensors"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        saving.save(path, text, tensors)
        return load(path)


def _tensors(node: Any, graph: Any, bits: int) -> dict[str, Tensor]:
    """The tensors of one node of the header."""
    name, kind, config, nodes = node["name"], node["type"], node["config"], graph.nodes
    if kind == "SpikePool":
        return {}
    holder = nodes[OUTPUT if kind == "Readout" else name]
    found = {key: np.asarray(value) for key, value in holder.metadata.get(OURS, {}).items()}
    if kind == "EncodingLayer":
        image = nodes[f"{name}_image"]
        found["offset"] = image.bias
        _add_words(found, "weight", _words(image, config["geometry"], found["gain"]), bits)
    elif kind == "SpikingLayer":
        sources = range(len(config["weight_index"]))
        residuals = range(len(config["peaks"]) - len(sources))
        currents = [nodes[f"{name}_source_{i}"] for i in sources] + [nodes[f"{name}_residual_{i}"] for i in residuals]
        if "bias" not in found:
            found["bias"] = _whole(currents[0].bias, np.int32)
        for i in sources:
            if config["vector"]:
                w = _vector_words(graph, f"{name}_source_{i}")
            else:
                w = _words(currents[i], config["geometry"][9 * i : 9 * i + 9])
            _add_digits(found, f"weight_{i}", w, bits)
        for i in residuals:
            w = currents[len(sources) + i].weight
            found[f"amplitude_{i}"] = _whole(np.diagonal(w.reshape(w.shape[:2])), np.int32)
        if config.get("analog_geometry") is not None:
            image = nodes[f"{name}_image"]
            found["offset"] = image.bias - (0 if currents else found["bias"])
            _add_words(found, "analog_weight", _words(image, config["analog_geometry"], found["gain"]), bits)
    elif kind == "Readout":
        _add_readout(found, node, graph, bits)
    if kind in ("EncodingLayer", "SpikingLayer"):
        n = holder.v_threshold if hasattr(holder, "v_threshold") else 2 * holder.threshold + 1
        found["threshold"] = _whole(n.reshape(n.shape[0], -1)[:, 0], np.int32)
    return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in found.items()}


def _add_readout(found: dict[str, np.ndarray], node: Any, graph: Any, bits: int) -> None:
    name, config = node["name"], node["config"]
    for i, vector in enumerate(config["vectors"]):
        if not config["layers"][i]:  # spikes as they are
            _add_words(found, f"weight_{i}", np.zeros(0, np.int64), bits)
            continue
        multiple = 1
        for k in range(len(config["pools"][i])):
            multiple *= int(np.prod(graph.nodes[f"{name}_pool_{i}_{k}"].kernel_size))
        gain, current = found[f"gain_{i}"] / multiple, f"{name}_term_{i}"
        if vector:
            w = _vector_words(graph, current, gain)[None, None]
        else:
            w = _words(graph.nodes[current], config["geometry"][9 * i : 9 * i + 9], gain)
        _add_words(found, f"weight_{i}", w, bits)


def _whole(values: np.ndarray, dtype: Any = np.int64) -> np.ndarray:
    whole: np.ndarray = np.rint(values).astype(np.int64).astype(dtype)
    return whole


def _words(node: Any, geometry: Sequence[int], gain: Any = 1.0) -> np.ndarray:
    """The integers of a Conv2d or Affine, [KH, KW, C / groups, O]."""
    weight = node.weight
    if weight.ndim == 2:
        return _whole(weight.T / gain)[None, None]
    kh, kw, groups = geometry[0], geometry[1], geometry[8]
    O, C, K, _ = weight.shape
    top, left, inner = (K - kh) // 2, (K - kw) // 2, C // groups
    cut = weight[:, :, top : top + kh, left : left + kw]
    parts = [cut[i * O // groups : (i + 1) * O // groups, i * inner : (i + 1) * inner] for i in range(groups)]
    return _whole(np.concatenate(parts).transpose(2, 3, 1, 0) / gain)


def _vector_words(graph: Any, name: str, gain: Any = 1.0) -> np.ndarray:
    """The integers [H * W * C, O] of an Affine; behind a Flatten its columns are in the order C, H, W."""
    weight = _whole(graph.nodes[name].weight.T / gain)
    before = next(graph.nodes[source] for source, target in graph.edges if target == name)
    if type(before).__name__ != "Flatten":
        return weight
    C, H, W = (int(d) for d in before.input_type["input"])
    return weight.reshape(C, H, W, -1).transpose(1, 2, 0, 3).reshape(weight.shape)


def _add_words(found: dict[str, np.ndarray], key: str, whole: np.ndarray, bits: int) -> None:
    """A weight that meets the image or counts: int16, and the last digit of 24 bits in a second one."""
    if bits == 24:
        whole, low = split(whole)
        found[key + DIGITS[2]] = low.astype(np.int16)
    found[key] = whole.astype(np.int16)


def _add_digits(found: dict[str, np.ndarray], key: str, whole: np.ndarray, bits: int) -> None:
    """A weight that meets spikes: int16; with 8 bits the upper digit alone; with 24 three of them."""
    if bits == 16:
        found[key] = whole.astype(np.int16)
        return
    upper, low = split(whole)
    if bits == 8:
        found[key] = upper.astype(np.int8)
        return
    for digit, part in zip(DIGITS, (*split(upper), low), strict=True):
        found[key + digit] = part.astype(np.int8)


def _first_difference(a: Any, b: Any) -> str:
    """The name of a node, or an edge, that two graphs do not share; "" where they are the same."""
    if set(map(tuple, a.edges)) != set(b.edges):
        return f"edge {sorted(set(map(tuple, a.edges)) ^ set(b.edges))[0]}"
    for name in a.nodes.keys() | b.nodes.keys():
        one, other = a.nodes.get(name), b.nodes.get(name)
        if type(one) is not type(other):
            return f"node {name!r}"
        if not _same(one.to_dict(), other.to_dict()):
            return f"node {name!r}"
    return ""


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, str) or isinstance(b, str):
        return bool(a == b)
    return np.array_equal(np.asarray(a), np.asarray(b))
