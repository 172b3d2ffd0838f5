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
from ..operators.limits import ANALOG_RANGE, MAX_SUM
from ..version import __version__
from .layers import IMAGE, INPUT, LAYERS, EncodingLayer, ImageInput, Layer, SpikingLayer
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
            "inputs": [INPUT if i == IMAGE else i for i in layer.inputs],
            "config": layer.config.to_dict(),
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
        layer_type = LAYERS[kind]
        if layer_type is ImageInput and inputs == [name]:
            inputs = [IMAGE]
        try:
            return name, layer_type(inputs, layer_type.config_type.from_dict(config), tensors)
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from error

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
            current = current + ANALOG_RANGE * n
        return int(((MAX_SUM - n // 2) // current.clamp(min=1)).min())
