"""A network as a list of integer operations for images of one size: for FPGAs, microcontrollers, any C compiler.

A saved network leaves the size of images open, and with it the windows of pools, the sizes of maps and the memory. Here
all of that is settled. Every operation has its operands and sizes as numbers, every array stands beside it, and the
maps between operations have places in one arena, where maps that do not live at the same time share bytes. `npz` writes
it for programs that make hardware of it, `c_header` for C; integers.c runs the header and gives the network's bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import write_text_atomically, written_atomically
from ..network.layers import DIGITS, INPUT, EncodingLayer, ImageInput, Layer, Readout, SpikePool, SpikingLayer, signs
from ..network.schema import printable
from ..network.snn import SNN
from ..operators.geometry import POINTWISE, convolution_size
from ..operators.neuron import MODES
from ..operators.windows import PoolSpec
from ..version import __version__

_RUNNER = Path(__file__).with_name("integers.c")
_COUNT_BYTES = 4
_LINE = 16  # values of an array in a line of the header


@dataclass
class Program:
    """The operations of a network at one size of images.

    Attributes:
        facts: what the whole network has: T, steps, neuron, sizes.
        operations: in order; a map is [at, steps, height, width, channels], an array its name.
        arrays: by name.
    """

    facts: dict[str, Any]
    operations: list[dict[str, Any]] = field(default_factory=list)
    arrays: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    def npz(self, path: str | PathLike[str]) -> None:
        """Write one .npz file: the arrays, and `program`, which is the rest as JSON text."""
        text = json.dumps({**self.facts, "operations": self.operations})
        with written_atomically(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, program=np.array(text), **self.arrays)

    def c_header(self, path: str | PathLike[str]) -> None:
        """Write a C header, and beside it the C file that runs it, of the same name."""
        path = Path(path)
        runner = path.with_suffix(".c")
        if runner == path:
            raise ValueError(f"{path}: name the header (.h); the C file is written beside it")
        write_text_atomically(runner, _RUNNER.read_text())
        write_text_atomically(path, _header(self))


def integer_program(snn: SNN, input_shape: Sequence[int] | None = None) -> Program:
    """The operations of a network for its T and its neurons, on images of one size.

    They end at the readout: what follows it in floats (`snn.tail`, such as a softmax) is the caller's.

    Args:
        snn: a network on the CPU.
        input_shape: (C, H, W) of the images; default: of those on which the network was converted. A network that takes
            vectors needs none.

    Raises:
        ValueError: the shape is not known, or does not fit the network.
    """
    snn.refuse_several_outputs("integer_program")
    return _Settling(snn, input_shape).program


class _Settling:
    """One walk over the graph. A value is a map without its place yet: [number, steps, height, width, channels]."""

    def __init__(self, snn: SNN, input_shape: Sequence[int] | None) -> None:
        first = snn.layers[INPUT]
        assert isinstance(first, ImageInput)
        channels = first.config.channels
        if first.config.moves:
            raise ValueError(f"{INPUT} pads, crops or enlarges the image; convert a model that is given it so")
        asked = (channels,) if first.config.vector else input_shape or snn.input_shape
        if asked is None:
            raise ValueError("the network takes images of any size; give input_shape=(C, H, W)")
        shape = snn.image_shape(asked)
        height, width = (1, 1, *shape[1:])[-2:]
        self._T = snn.T
        self._item = 2 if snn.neuron.mode == "signed" else 1  # bytes of a value
        self._maps: dict[str, list[int]] = {}
        self._lives: list[list[int]] = []  # of a map: bytes, first and last operation
        facts = {
            "written_by": f"qcfs_fast {__version__}",
            "T": snn.T,
            "steps": snn.neuron.steps(snn.T),
            "mode": MODES.index(snn.neuron.mode),
            "window": snn.neuron.window,
            "iterations": snn.neuron.iterations,
            "channels": channels,
            "height": height,
            "width": width,
            "sources": first.source.numel(),
            "image_bits": first.bits,
        }
        self.program = Program(facts)
        for name in ("source", "scale", "shift"):
            self._array(f"qcfs_{name}", first.buffer(name).to(torch.int32 if name == "source" else torch.float32))
        # Sizes of maps follow from a run.
        snn.run(torch.zeros(1, *shape), watch=self._visit)
        self._place()

    def _visit(self, name: str, layer: Layer, out: Any) -> None:
        if isinstance(layer, Readout):
            self._answer(layer, out)
        elif not isinstance(layer, ImageInput):
            shape = tuple(signs(out)[0].shape[2:])
            size = (1, 1, *shape) if len(shape) == 1 else shape
            self._maps[name] = self._map(self.program.facts["steps"], size, self._item)
            if isinstance(layer, EncodingLayer | SpikingLayer):
                self._fire(name, layer)
            elif isinstance(layer, SpikePool):
                self._pool(self._maps[layer.inputs[0]], self._maps[name], layer.spec, layer.spec.multiple, counts=False)
            else:
                self._concatenate(layer, self._maps[name])

    # ------------------------------------------------------------------------------------------------ operations

    def _fire(self, name: str, layer: EncodingLayer | SpikingLayer) -> None:
        first = isinstance(layer, EncodingLayer)
        operation: dict[str, Any] = {"kind": "fire", "first": first, "products": [], "residuals": [], "image": None}
        prefix = f"layer{len(self.program.operations)}"
        operation["layer"], operation["out"] = name, self._maps[name]
        reads = []
        analog = layer.analog
        if analog is not None:
            weight = "weight" if first else "analog_weight"
            names = {"weight": weight, "low_digit": weight + DIGITS[2]}
            names |= {key: key for key in ("gain", "offset", "low", "high")}
            operation["image"] = {"kernel": list(analog.geometry)} | {
                key: self._array(f"{prefix}_{buffer}", layer.buffer(buffer)) if buffer in layer._buffers else None
                for key, buffer in names.items()
            }
        if isinstance(layer, SpikingLayer):
            for i, source in enumerate(layer.sources()):
                at, steps, *size = reads_from = self._maps[source.node]
                if layer.config.vector:
                    reads_from = [at, steps, 1, 1, size[0] * size[1] * size[2]]
                geometry = list(POINTWISE if layer.config.vector else source.geometry)
                weight = f"{prefix}_weight_{layer.config.weight_index[i]}"
                unit = 256 if source.weight.dtype == torch.int8 else 1
                product = {"x": reads_from, "weight": self._array(weight, source.weight), "unit": unit}
                operation["products"].append({**product, "kernel": geometry})
                reads.append(reads_from)
            for i, residual in enumerate(layer.residuals()):
                amplitude = self._array(f"{prefix}_amplitude_{i}", residual.amplitude)
                operation["residuals"].append({"x": self._maps[residual.node], "amplitude": amplitude})
                reads.append(self._maps[residual.node])
        bias = layer._buffers.get("bias")
        operation["bias"] = None if bias is None else self._array(f"{prefix}_bias", bias)
        operation["bias_step"] = 0 if bias is None or bias.dim() == 1 else bias.shape[1]
        operation["threshold"] = self._array(f"{prefix}_threshold", layer.threshold)
        self._add(operation, reads)

    def _pool(self, x: list[int], out: list[int], spec: PoolSpec, multiple: int, counts: bool) -> None:
        prefix = f"pool{len(self.program.operations)}"
        operation: dict[str, Any] = {"kind": "pool", "x": x, "out": out, "maximum": spec.kind == "max"}
        for axis, name in enumerate(("rows", "columns")):
            windows = torch.tensor(spec.windows(x[2 + axis], axis), dtype=torch.int32).reshape(-1, 3)
            operation[name] = self._array(f"{prefix}_{name}", windows)
        self._add({**operation, "multiple": multiple, "counts": counts}, [x])

    def _concatenate(self, layer: Layer, out: list[int]) -> None:
        channel = 0
        for node in layer.inputs:
            self._add({"kind": "copy", "x": self._maps[node], "out": out, "channel": channel}, [self._maps[node]])
            channel += self._maps[node][-1]

    def _answer(self, layer: Readout, out: Tensor) -> None:
        values = []
        for node, max_pools, average_pools, vector in layer.plan:
            x, multiple = self._maps[node], 1
            for spec in max_pools:
                x = self._pooled(x, spec, 0, counts=False)
            counted = self._map(1, x[2:], _COUNT_BYTES)
            self._add({"kind": "count", "x": x, "out": counted}, [x])
            x = counted
            for spec in average_pools:
                common = spec.common_multiple(x[2], x[3])
                multiple *= common
                x = self._pooled(x, spec, common, counts=True)
            values.append(([*x[:2], 1, 1, x[2] * x[3] * x[4]] if vector else x, multiple))
        terms = []
        for i, name, worth in layer.products:
            x, multiple = values[i]
            term: dict[str, Any] = {"x": x, "kernel": list(layer.config.geometry[i])}
            term["divisor"] = float(self._T * multiple)
            weight = layer.buffer(name)
            term["weight"] = self._array(f"answer_{name}", weight) if weight.numel() else None
            term["gain"] = self._array(f"answer_gain_{i}_times_{worth}", layer.buffer(f"gain_{i}") * worth)
            terms.append(term)
        height, width = convolution_size(terms[0]["x"][2], terms[0]["x"][3], terms[0]["kernel"])
        operation = {"kind": "answer", "height": height, "width": width, "channels": layer.offset.numel()}
        self.program.facts["answers"] = out[0].numel()
        offset = self._array("answer_offset", layer.offset)
        self._add({**operation, "terms": terms, "offset": offset}, [t["x"] for t in terms])

    def _pooled(self, x: list[int], spec: PoolSpec, multiple: int, counts: bool) -> list[int]:
        size = [len(spec.windows(x[2 + axis], axis)) // 3 for axis in (0, 1)]
        out = self._map(x[1], [*size, x[4]], _COUNT_BYTES if counts else self._item)
        self._pool(x, out, spec, multiple, counts)
        return out

    # ---------------------------------------------------------------------------------------------------- memory

    def _array(self, name: str, values: Tensor) -> str:
        self.program.arrays.setdefault(name, values.detach().cpu().numpy())
        return name

    def _map(self, steps: int, size: Any, item: int) -> list[int]:
        """A map that lives from the next operation on."""
        height, width, channels = (int(v) for v in size)
        here = len(self.program.operations)
        self._lives.append([steps * height * width * channels * item, here, here])
        return [len(self._lives) - 1, steps, height, width, channels]

    def _add(self, operation: dict[str, Any], reads: list[list[int]]) -> None:
        for x in reads:
            self._lives[x[0]][2] = len(self.program.operations)
        self.program.operations.append(operation)

    def _place(self) -> None:
        """Give each map the lowest place where it meets no other that lives at the same time, the largest first."""
        places: dict[int, int] = {}
        for i in sorted(range(len(self._lives)), key=lambda i: -self._lives[i][0]):
            size, first, last = self._lives[i]
            at = 0
            for other in sorted(places, key=lambda k: places[k]):
                their_size, their_first, their_last = self._lives[other]
                begin, end = places[other], places[other] + their_size
                if their_first <= last and first <= their_last and begin < at + size and at < end:
                    at = -(-end // _COUNT_BYTES) * _COUNT_BYTES
            places[i] = at
        self.program.facts["arena"] = max((places[i] + self._lives[i][0] for i in places), default=1)
        for operation in self.program.operations:
            parts = [operation, *operation.get("products", []), *operation.get("residuals", [])]
            for part in parts + operation.get("terms", []):
                for key in ("x", "out"):
                    if key in part:
                        part[key] = [places[part[key][0]], *part[key][1:]]


# ------------------------------------------------------------------------------------------------- the header for C

_C_TYPES = {"int8": "int8_t", "int16": "int16_t", "int32": "int32_t", "float32": "float", "float64": "double"}

# Fields of structs in their order.
_ORDER = {
    "image": ("weight", "low_digit", "kernel", "gain", "offset", "low", "high"),
    "pool": ("x", "out", "rows", "columns", "maximum", "multiple", "counts"),
    "copy": ("x", "out", "channel"),
    "count": ("x", "out"),
}


def _literal(value: Any) -> str:
    if isinstance(value, np.floating):
        return float(value).hex() + ("f" if value.dtype == np.float32 else "")
    return "(-2147483647 - 1)" if value == -(2**31) else str(value)


def _c_array(name: str, values: np.ndarray[Any, Any]) -> str:
    flat = [_literal(v) for v in values.reshape(-1)]
    lines = [", ".join(flat[i : i + _LINE]) for i in range(0, len(flat), _LINE)]
    body = ",\n  ".join(lines)
    return f"static const {_C_TYPES[values.dtype.name]} {name}[{len(flat)}] = {{\n  {body}}};"


def _c(value: Any) -> str:
    """A field of a struct: a name, a number, or a list of them."""
    if isinstance(value, list | tuple):
        return "{" + ", ".join(map(_c, value)) + "}"
    return "0" if value is None else str(int(value)) if isinstance(value, bool) else str(value)


class _CText:
    """The operations as constants, each after those that it points to."""

    def __init__(self, program: Program) -> None:
        self.lines: list[str] = []
        self._arrays = program.arrays
        self.operations = [[f"QCFS_{o['kind'].upper()}", self._struct(i, o)] for i, o in enumerate(program.operations)]

    def _define(self, kind: str, name: str, fields: list[Any]) -> str:
        self.lines.append(f"static const struct qcfs_{kind} {name} = {_c(fields)};")
        return f"&{name}"

    def _list(self, kind: str, name: str, items: list[list[Any]]) -> str | None:
        """A list of structs; null where it is empty."""
        if not items:
            return None
        body = ",\n  ".join(map(_c, items))
        self.lines.append(f"static const struct qcfs_{kind} {name}[{len(items)}] = {{\n  {body}}};")
        return name

    def _weight(self, part: dict[str, Any]) -> list[Any]:
        return [part["weight"], self._arrays[part["weight"]].dtype.itemsize, part["unit"]]

    def _struct(self, i: int, o: dict[str, Any]) -> str:
        name = f"operation{i}"
        if o["kind"] == "fire":
            self.lines.append(f"/* {printable(o['layer']).replace('/', '_')} */")
            products = [[p["x"], self._weight(p), p["kernel"]] for p in o["products"]]
            residuals = [[r["x"], r["amplitude"]] for r in o["residuals"]]
            lists = [self._list("product", f"{name}_products", products)]
            lists.append(self._list("residual", f"{name}_residuals", residuals))
            image = o["image"]
            if image is not None:
                image = self._define("image", f"{name}_image", [image[key] for key in _ORDER["image"]])
            rest = [image, o["bias"], o["threshold"], o["bias_step"], o["first"]]
            fields = [o["out"], len(products), len(residuals), *lists, *rest]
        elif o["kind"] == "answer":
            terms = [[t["x"], t["weight"], t["kernel"], t["gain"], t["divisor"]] for t in o["terms"]]
            listed = self._list("term", f"{name}_terms", terms)
            fields = [o["height"], o["width"], o["channels"], len(terms), listed, o["offset"]]
        else:
            fields = [o[key] for key in _ORDER[o["kind"]]]
        return self._define(o["kind"], name, fields)


def _header(program: Program) -> str:
    facts, text = program.facts, _CText(program)
    value = "int16_t" if MODES[facts["mode"]] == "signed" else "uint8_t"
    sizes = {key: size for key, size in facts.items() if key != "written_by"}
    sizes["currents"] = max(facts["steps"], facts["T"], facts["window"])  # of a neuron
    lines = [
        f"/* A network as integers, for images of {facts['channels']} x {facts['height']} x {facts['width']}, "
        f"T = {facts['T']}, {MODES[facts['mode']]} neurons; written by {facts['written_by']}.",
        " * The C file beside it runs it and says what the fields mean. */",
        *(f"#define QCFS_{key.upper()} {size}" for key, size in sizes.items()),
        f"typedef {value} qcfs_value;",
        *(_c_array(name, values) for name, values in program.arrays.items()),
        *text.lines,
        "static const struct qcfs_operation qcfs_operations[] = {\n  "
        + ",\n  ".join(_c(o) for o in text.operations)
        + "};",
    ]
    return "\n".join(lines) + "\n"
