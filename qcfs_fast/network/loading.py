"""Loading a saved network (docs/format.md). Nothing in the file is taken on trust.

saving.py reads the container and compares its checksum. The header is checked here; each node checks its own fields and
tensors when it is made (schema.py). Then comes what nodes ask of each other: kinds, channels, peaks. Where the file
states the shape of the images, all that a run on one would ask is asked too (rehearsal.py). The bound on T that rules
out overflow is computed again from the integers.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import WRONG_FORM, FormatError
from ..operators.limits import MAX_SUM
from ..operators.neuron import Neuron
from .layers import (
    IMAGE,
    LAYERS,
    Channels,
    EncodingLayer,
    ImageInput,
    Layer,
    Run,
    SpikeConcat,
    SpikePool,
    SpikingLayer,
)
from .rehearsal import rehearsed
from .saving import FORMAT_VERSION, checked_metadata, parsed, read
from .schema import is_int, require, whole
from .snn import SNN, check_graph

# Numbers in the details of a spiking layer, which report and profile show.
DETAILS = ("channels", "lossless", "threshold_min", "threshold_max", "max_T")


def load(path: Any) -> SNN:
    """Read a network written by ``snn.save(path)``.

    Raises:
        FileNotFoundError: no such file, or a folder or a device.
        FormatError: the file is truncated, altered, of another kind or of a newer version.
    """
    return opened(Path(path))[0]


def opened(path: Path) -> tuple[SNN, str]:
    """The network of a file, and the header's text; raises what `load` does."""
    if not path.is_file():
        raise FileNotFoundError(f"load: {path} is no regular file" if path.exists() else f"load: no file {path}")
    try:
        header, tensors = read(path)
        return network_of(header, tensors), header
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error


def network_of(header: str, tensors: Mapping[str, Tensor]) -> SNN:
    """The network of a header's text and its tensors, which may come from anywhere.

    Raises:
        FormatError: whatever is wrong with them.
    """
    fields = parsed(header)
    try:
        for key, t in tensors.items():
            plain = type(t) is Tensor and t.layout is torch.strided and t.is_contiguous()
            require(plain and not t.is_neg() and not t.requires_grad, f"{key} is not a plain tensor")
        return _Reader(fields, tensors).read()
    except FormatError:
        raise
    except WRONG_FORM as error:
        raise FormatError(f"a field is missing or has the wrong form ({type(error).__name__}: {error})") from error


def _reduced(snn: SNN) -> tuple[Any, ...]:
    header, tensors = snn.saved()
    return network_of, (header, {key: t.contiguous() for key, t in tensors.items()})


# A pickle of a network is what a file is, a header and tensors, read with the same checks. So torch.load need not be
# told to trust it, and tensors in shared memory stay there on their way to another process.
copyreg.pickle(SNN, _reduced)
torch.serialization.add_safe_globals([network_of])


def _check_channels(layers: Sequence[tuple[str, Layer]]) -> None:
    """What each node reads has the kind and the channels that its weights take."""
    sent: dict[str, Channels] = {}
    for name, layer in layers:
        with _named(name):
            sent[name] = layer.check_channels([sent[node] for node in layer.inputs if node != IMAGE])


def _check_peaks(layers: Sequence[tuple[str, Layer]], sizes: Mapping[str, tuple[int, int]]) -> None:
    """The largest integer that each input can have, as the nodes before it say: the overflow bounds are made of it.

    Args:
        sizes: height and width of what each node reads, for windows that depend on it; empty where that is not known.
    """
    peaks: dict[str, int] = {}
    for name, layer in layers:
        found = [peaks.get(node, 1) for node in layer.inputs]
        if isinstance(layer, SpikingLayer):
            said = layer.config.peaks
            require(
                all(s >= f for s, f in zip(said, found, strict=False)),
                f"{name}: peaks are less than what its inputs can send",
            )
        if isinstance(layer, SpikeConcat):
            peaks[name] = max(found)
        elif isinstance(layer, SpikePool):
            spec = replace(layer.spec, size=sizes[name]) if name in sizes else layer.spec
            known = spec.kind == "avg" and (name in sizes or not spec.depends_on_size)
            peaks[name] = found[0] * (spec.largest_value() if known else 1)


@contextmanager
def _named(node: str) -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{node}: {error}") from error


class _Reader:
    """Makes a network of a header and the tensors of its file; takes tensors away as nodes claim them."""

    def __init__(self, header: Any, tensors: Mapping[str, Tensor]) -> None:
        require(isinstance(header, dict), "the header is not an object")
        version: Any = header.get("format_version")
        require(is_int(version, 1), "the header names no format version")
        require(
            version <= FORMAT_VERSION,
            f"written in format {version}, this version of qcfs_fast reads up to {FORMAT_VERSION}; upgrade qcfs_fast",
        )
        self.header = header
        self.tensors = dict(tensors)

    def read(self) -> SNN:
        h = self.header
        require(h["weight_bits"] in (8, 16, 24), f"weight_bits is {h['weight_bits']!r}, not 8, 16 or 24")
        require(is_int(h["T"], 1), f"T is {h['T']!r}, not a positive integer")
        shape = h["input_shape"]
        require(isinstance(h["graph"], list) and isinstance(h["details"], dict), "the graph is missing")
        neuron = self._neuron()
        layers = [self._layer(node) for node in h["graph"]]
        require(not self.tensors, f"unknown tensors {sorted(self.tensors)[:3]}")
        check_graph(layers)
        _check_channels(layers)
        sizes: dict[str, tuple[int, int]] = {}
        if shape is not None:
            shape, sizes = rehearsed(layers, shape, Run(min(h["T"], MAX_SUM), neuron))
        _check_peaks(layers, sizes)
        spiking = {n: layer for n, layer in layers if isinstance(layer, (EncodingLayer, SpikingLayer))}
        require(set(spiking) == set(h["details"]), "the layers' details do not match the graph")
        for name, layer in spiking.items():
            said = h["details"][name]
            require(isinstance(said, dict), f"{name}: details are damaged")
            missing = [key for key in DETAILS if not whole(0, 2**63 - 1).fits(said.get(key))]
            bits = said.get("weight_bits_used")
            if not (isinstance(bits, float) or whole(0).fits(bits)):
                missing.append("weight_bits_used")
            require(not missing, f"{name}: details lack {', '.join(missing)}")
            bound = layer.overflow_free_steps(Neuron())
            require(
                is_int(said["max_T"], 1) and said["max_T"] <= bound,
                f"{name}: claims to be free of overflow up to T={said['max_T']}, but its "
                f"weights allow {bound}; the file was altered",
            )
        snn = SNN(layers, h["T"], h["weight_bits"], h["details"], shape, neuron, h.get("tail", ()), h.get("outputs"))
        snn.metadata = checked_metadata(h.get("metadata", {}))
        return snn

    def _neuron(self) -> Neuron:
        """The mode of the neurons; a file of format 1 has plain ones."""
        said = self.header.get("neuron", {})
        require(isinstance(said, dict), "neuron is damaged")
        try:
            return Neuron(**{f.name: said[f.name] for f in fields(Neuron) if f.name in said})
        except (TypeError, ValueError) as error:
            raise FormatError(f"neuron is damaged ({error})") from error

    def _layer(self, node: Any) -> tuple[str, Layer]:
        name, kind, inputs, config = node["name"], node["type"], node["inputs"], node["config"]
        require(isinstance(name, str) and name != "", "a node has no name")
        require(kind in LAYERS, f"{name}: unknown kind of layer {kind!r}")
        require(isinstance(inputs, list) and all(isinstance(i, str) for i in inputs), f"{name}: inputs are damaged")
        require(isinstance(config, dict), f"{name}: config is damaged")
        tensors = {}
        for key in node["tensors"]:
            full = f"{name}/{key}"
            require(full in self.tensors, f"tensor {full} is missing")
            tensors[key] = self.tensors.pop(full)
        layer_type = LAYERS[kind]
        if layer_type is ImageInput and inputs == [name]:
            inputs = [IMAGE]  # a file has one name for the image and for the node that quantises it
        with _named(name):
            return name, layer_type(inputs, layer_type.config_type.from_dict(config), tensors)
