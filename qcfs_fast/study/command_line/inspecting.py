"""qcfs-fast inspect: what stands in a saved network's file. It is loaded, and so checked, and not run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ...network.loading import opened
from ...network.schema import printable
from .common import command


def add_inspect(commands: Any) -> None:
    c = command(
        commands,
        "inspect",
        _inspect,
        "show what stands in a saved network's file; nothing is run",
        "qcfs-fast inspect net.safetensors",
    )
    c.add_argument("network", type=Path, help="file written by convert or snn.save")


def _inspect(o: argparse.Namespace) -> int:
    facts = facts_of(o.network)
    print(json.dumps(facts, indent=2) if o.json else text_of(facts))
    return 0


def facts_of(path: Path) -> dict[str, Any]:
    """The file, how the network is set, and its nodes; plain data.

    Raises:
        FileNotFoundError, FormatError: as of :func:`qcfs_fast.load`.
    """
    snn, text = opened(path)
    header = json.loads(text)
    nodes = [
        {
            "name": name,
            "type": type(layer).__name__,
            "reads": layer.inputs,
            "integers": sum(t.numel() for _, t in layer.tensors() if not t.is_floating_point()),
            "bytes": sum(t.numel() * t.element_size() for _, t in layer.tensors()),
            "what": layer.extra_repr(),
        }
        for name, layer in snn.layers.items()
    ]
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "format": header["format_version"],
        "written by": header.get("written_by"),
        "T": snn.T,
        "max_T": snn.max_T,
        "weight_bits": snn.weight_bits,
        "neuron": str(snn.neuron),
        "input_shape": None if snn.input_shape is None else list(snn.input_shape),
        "metadata": snn.metadata,
        "nodes": nodes,
        "layers": snn.details,
    }


def text_of(facts: dict[str, Any]) -> str:
    shape = facts["input_shape"]
    rows = [("node", "type", "integers", "bytes", "")]
    rows += [
        (printable(n["name"]), n["type"], f"{n['integers']:,}", f"{n['bytes']:,}", printable(n["what"]))
        for n in facts["nodes"]
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    table = [
        f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}".rstrip() for a, b, c, d, e in rows
    ]
    head = [
        f"{facts['file']}: {facts['bytes']:,} bytes, format {facts['format']}, written by {facts['written by']}",
        f"T = {facts['T']}, at most {facts['max_T']}; {facts['weight_bits']}-bit weights; neurons: {facts['neuron']}"
        + ("" if shape is None else f"; settled for images of {shape}"),
    ]
    about = [f"{name}: {_short(json.dumps(value))}" for name, value in facts["metadata"].items()]
    return "\n".join([*map(printable, (*head, *about)), "", *table])


def _short(text: str) -> str:
    return text if len(text) <= 400 else f"{text[:400]} ... (whole with --json)"
