"""qcfs-fast export: a saved network as a file for other programs."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from ...exchange.nir import NEURONS, to_nir
from ...files import written_atomically
from ...network.loading import load
from .common import command, positive


def add_export(commands: Any) -> None:
    c = command(
        commands,
        "export",
        _export,
        "write a saved network in a format of other programs",
        "qcfs-fast export net.safetensors --format nir --input-shape 3 32 32 --output net.nir",
    )
    c.add_argument("network", type=Path, help="file written by convert or snn.save")
    c.add_argument("--format", choices=("nir",), required=True, help="nir: docs/nir.md")
    c.add_argument("--output", type=Path, required=True, help="file to write")
    c.add_argument(
        "--input-shape", type=positive, nargs="+", metavar="SIZE", help="C H W of the images (default: the network's)"
    )
    c.add_argument(
        "--neurons",
        choices=NEURONS,
        default=NEURONS[0],
        help="a node whose metadata says how it resets, or nodes that say it themselves (default if)",
    )


def _export(o: argparse.Namespace) -> int:
    graph = to_nir(load(o.network), o.input_shape, o.neurons)
    with written_atomically(o.output) as temporary:
        importlib.import_module("nir").write(temporary, graph)
    if o.json:
        print(
            json.dumps({"output": str(o.output), "format": o.format, "neurons": o.neurons, "nodes": len(graph.nodes)})
        )
    else:
        print(f"wrote {o.output}: {len(graph.nodes)} nodes, {len(graph.edges)} edges")
    return 0
