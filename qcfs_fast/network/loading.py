"""Saved networks: one safetensors file, the graph as JSON in its metadata. No pickle, so loading runs no code.

The file is written beside its target and renamed, so a reader never sees half of one. Loading takes nothing on
trust: every field is checked, and the bound that rules out overflow is computed again from the integers.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import FormatError
from ..operators.geometry import GEOMETRY
from ..operators.limits import ANALOG_RANGE, MAX_SUM
from ..operators.windows import spec_from
from ..version import __version__
from .layers import LAYERS, EncodingLayer, ImageInput, Layer, Readout, SpikePool, SpikingLayer
from .snn import SNN, check_graph

FORMAT = "qcfs_fast"
FORMAT_VERSION = 1


def save(snn: SNN, path: Any) -> None:
    """Write a network; see :meth:`SNN.save`."""
    path = Path(path)
    graph = [
        {
            "name": name,
            "type": type(layer).__name__,
            "inputs": layer.inputs,
            "config": layer.config,
            "tensors": sorted(layer._buffers),
        }
        for name, layer in snn.layers.items()
    ]
    header = {
        "format_version": FORMAT_VERSION,
        "written_by": __version__,
        "T": snn.T,
        "weight_bits": snn.weight_bits,
        "input_shape": snn.input_shape,
        "details": snn.details,
        "graph": graph,
    }
    tensors = {
        f"{name}/{key}": t.detach().cpu().contiguous()
        for name, layer in snn.layers.items()
        for key, t in layer._buffers.items()
        if t is not None
    }
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save: the folder {path.parent} does not exist; create it first")
    handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={FORMAT: json.dumps(header)})
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def load(path: Any) -> SNN:
    """Read a network written by ``snn.save(path)``.

    Raises:
        FileNotFoundError: no such file.
        FormatError: the file is truncated, altered, of another kind or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load: no file {path}")
    try:
        with safe_open(str(path), framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise FormatError(
            f"{path}: not a complete safetensors file ({error}); copy it again from its source"
        ) from error
    if FORMAT not in metadata:
        raise FormatError(f"{path}: a safetensors file, but not a network saved by qcfs_fast")
    try:
        header = json.loads(metadata[FORMAT])
    except json.JSONDecodeError as error:
        raise FormatError(f"{path}: the graph in the file's metadata is damaged ({error})") from error
    try:
        return _Reader(header, tensors).read()
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise FormatError(
            f"{path}: a field is missing or has the wrong form ({type(error).__name__}: {error})"
        ) from error


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise FormatError(what)


def _is_int(x: Any, least: int) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= least


# Names of a layer's buffers: dtype and, after the dimensions that are free (-1), nothing else.
_VECTORS = {
    "source": torch.int64,
    "scale": torch.float32,
    "shift": torch.float32,
    "gain": torch.float64,
    "offset": torch.float64,
    "low": torch.int32,
    "high": torch.int32,
    "threshold": torch.int32,
    "bias": torch.int32,
    "amplitude": torch.int32,
}


class _Reader:
    def __init__(self, header: Any, tensors: Mapping[str, Tensor]) -> None:
        _need(isinstance(header, dict), "the header is not an object")
        version = header.get("format_version")
        _need(_is_int(version, 1), "the header names no format version")
        _need(
            version <= FORMAT_VERSION,
            f"written in format {version}, this version of qcfs_fast reads up to {FORMAT_VERSION}; upgrade qcfs_fast",
        )
        self.header = header
        self.tensors = dict(tensors)

    def read(self) -> SNN:
        h = self.header
        _need(h["weight_bits"] in (8, 16), f"weight_bits is {h['weight_bits']!r}, not 8 or 16")
        _need(_is_int(h["T"], 1), f"T is {h['T']!r}, not a positive integer")
        shape = h["input_shape"]
        _need(
            shape is None or (isinstance(shape, list) and all(_is_int(d, 1) for d in shape)), "input_shape is damaged"
        )
        _need(isinstance(h["graph"], list) and isinstance(h["details"], dict), "the graph is missing")
        layers = [self._layer(node) for node in h["graph"]]
        _need(not self.tensors, f"unknown tensors {sorted(self.tensors)[:3]}")
        check_graph(layers)
        names = {n for n, layer in layers if isinstance(layer, (EncodingLayer, SpikingLayer))}
        _need(names == set(h["details"]), "the layers' details do not match the graph")
        for name, layer in layers:
            if isinstance(layer, SpikingLayer):
                bound = self._max_steps(layer)
                said = h["details"][name]["max_T"]
                _need(
                    _is_int(said, 1) and said <= bound,
                    f"{name}: claims to be free of overflow up to T={said}, but its "
                    f"weights allow {bound}; the file was altered",
                )
        return SNN(layers, h["T"], h["weight_bits"], h["details"], shape)

    def _layer(self, node: Any) -> tuple[str, Layer]:
        name, kind, inputs, config = node["name"], node["type"], node["inputs"], node["config"]
        _need(isinstance(name, str) and name != "", "a node has no name")
        _need(kind in LAYERS, f"{name}: unknown kind of layer {kind!r}")
        _need(isinstance(inputs, list) and all(isinstance(i, str) for i in inputs), f"{name}: inputs are damaged")
        _need(isinstance(config, dict), f"{name}: config is damaged")
        tensors = {}
        for key in node["tensors"]:
            full = f"{name}/{key}"
            _need(full in self.tensors, f"tensor {full} is missing")
            tensors[key] = self.tensors.pop(full)
            self._check_tensor(name, key, tensors[key])
        layer = LAYERS[kind](inputs, config, tensors)
        CHECKS[kind](name, layer)
        return name, layer

    @staticmethod
    def _check_tensor(name: str, key: str, t: Tensor) -> None:
        stem = key.rsplit("_", 1)[0] if key.rsplit("_", 1)[-1].isdigit() else key
        if stem in ("weight", "analog_weight"):
            _need(t.dtype in (torch.int16, torch.int8), f"{name}: {key} has dtype {t.dtype}")
        else:
            _need(stem in _VECTORS, f"{name}: unknown tensor {key}")
            _need(t.dtype == _VECTORS[stem] and t.dim() == 1, f"{name}: {key} must be a vector of {_VECTORS[stem]}")
        if t.is_floating_point():
            _need(bool(torch.isfinite(t).all()), f"{name}: {key} is not finite")
        if key == "threshold":
            _need(
                t.numel() > 0 and bool((t >= 2).all()) and bool((t % 2 == 0).all()),
                f"{name}: thresholds must be even and positive",
            )

    @staticmethod
    def _max_steps(layer: Layer) -> int:
        n = layer.threshold.to(torch.int64)
        current = layer.bias.to(torch.int64).abs()
        peaks = list(layer.config["peaks"])
        weights = layer.indexed("weight")
        totals = [
            w.reshape(-1, w.shape[-1]).to(torch.int64).abs().sum(0) * (256 if w.dtype == torch.int8 else 1)
            for w in weights
        ]
        for i in layer.config["weight_index"]:
            current = current + totals[i] * peaks.pop(0)
        for a in layer.indexed("amplitude"):
            current = current + a.to(torch.int64).abs() * peaks.pop(0)
        if "analog_geometry" in layer.config:
            _need(
                bool((layer.high.to(torch.int64) <= ANALOG_RANGE * n).all() and (layer.low >= -layer.high).all()),
                "the analog current's range is damaged",
            )
            current = current + ANALOG_RANGE * n
        return int(((MAX_SUM - n // 2) // current.clamp(min=1)).min())


def _same_length(name: str, layer: Layer, keys: tuple[str, ...], length: int) -> None:
    for key in keys:
        t = getattr(layer, key, None)
        _need(isinstance(t, Tensor) and t.numel() == length, f"{name}: {key} must have {length} values")


def _check_geometry(name: str, layer: Layer, key: str, count: int) -> None:
    g = layer.config[key]
    _need(
        isinstance(g, list) and len(g) == GEOMETRY * count and all(_is_int(v, 0) for v in g),
        f"{name}: {key} is damaged",
    )


def _check_input(name: str, layer: Layer) -> None:
    _same_length(name, layer, ("source", "scale", "shift"), layer.source.numel())
    _need(_is_int(layer.config["channels"], 1), f"{name}: channels is damaged")
    _need(
        bool((layer.source >= 0).all()) and bool((layer.source < layer.config["channels"]).all()),
        f"{name}: source is damaged",
    )
    _need(isinstance(layer.config["vector"], bool), f"{name}: vector is damaged")


def _check_encoding(name: str, layer: Layer) -> None:
    _check_geometry(name, layer, "geometry", 1)
    O = layer.threshold.numel()
    _need(layer.weight.dim() == 4 and layer.weight.shape[3] == O, f"{name}: weight does not fit the thresholds")
    _same_length(name, layer, ("gain", "offset", "low", "high"), O)
    _need(
        bool((layer.low >= 0).all()) and bool((layer.high <= layer.threshold).all()),
        f"{name}: the current's range is damaged",
    )
    _need(isinstance(layer.config["vector"], bool), f"{name}: vector is damaged")


def _check_spiking(name: str, layer: Layer) -> None:
    weights, amplitudes = layer.indexed("weight"), layer.indexed("amplitude")
    analog = "analog_geometry" in layer.config
    index = layer.config["weight_index"]
    _need(isinstance(index, list) and set(index) == set(range(len(weights))), f"{name}: weight_index is damaged")
    _need(
        len(layer.inputs) == len(index) + len(amplitudes) + analog and bool(layer.inputs),
        f"{name}: inputs do not match the weights",
    )
    _check_geometry(name, layer, "geometry", len(index))
    O = layer.threshold.numel()
    _same_length(name, layer, ("bias",), O)
    dims = 2 if layer.config["vector"] else 4
    for w in weights:
        _need(w.dim() == dims and w.shape[-1] == O, f"{name}: weight does not fit the thresholds")
    for a in amplitudes:
        _need(a.numel() == O, f"{name}: amplitude does not fit the thresholds")
    peaks = layer.config["peaks"]
    _need(
        isinstance(peaks, list)
        and len(peaks) == len(index) + len(amplitudes)
        and all(_is_int(p, 1) and p <= 255 for p in peaks),
        f"{name}: peaks are damaged",
    )
    if analog:
        _check_geometry(name, layer, "analog_geometry", 1)
        _same_length(name, layer, ("gain", "offset", "low", "high"), O)


def _check_pool(name: str, layer: Layer) -> None:
    spec = spec_from(layer.config["pool"])
    _need(len(layer.inputs) == 1, f"{name}: a pool has one input")
    _need(spec.kind in ("avg", "max") and _is_int(spec.multiple, 0), f"{name}: pool is damaged")
    _need((spec.kernel is None) != (spec.output is None), f"{name}: pool is damaged")


def _check_concat(name: str, layer: Layer) -> None:
    _need(len(layer.inputs) > 1, f"{name}: a concatenation has several inputs")


def _check_readout(name: str, layer: Layer) -> None:
    weights, gains = layer.indexed("weight"), layer.indexed("gain")
    n = len(layer.inputs)
    _need(n > 0 and len(weights) == n and len(gains) == n, f"{name}: inputs do not match the weights")
    _check_geometry(name, layer, "geometry", n)
    _need(len(layer.config["pools"]) == n and len(layer.config["vectors"]) == n, f"{name}: pools are damaged")
    for g in gains:
        _need(g.numel() == layer.offset.numel(), f"{name}: gain does not fit the offset")
    for pools in layer.config["pools"]:
        for p in pools:
            spec_from(p)


CHECKS = {
    ImageInput.__name__: _check_input,
    EncodingLayer.__name__: _check_encoding,
    SpikingLayer.__name__: _check_spiking,
    SpikePool.__name__: _check_pool,
    "SpikeConcat": _check_concat,
    Readout.__name__: _check_readout,
}
