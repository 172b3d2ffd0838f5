"""qcfs-fast export: a saved network as a file for other programs."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from ...exchange.integers import integer_program
from ...exchange.nir import NEURONS, to_nir
from ...files import written_atomically
from ...network.loading import load
from ...network.snn import SNN
from ...operators.neuron import MODES
from .common import add_window_options, asked_neurons, command, positive


def add_export(commands: Any) -> None:
    c = command(
        commands,
        "export",
        _export,
        "write a saved network in a format of other programs",
        "qcfs-fast export net.safetensors --format nir --input-shape 3 32 32 --output net.nir\n"
        "         qcfs-fast export net.safetensors --format c-header -T 2 --neuron offset --output net.h",
    )
    c.add_argument("network", type=Path, help="file written by convert or snn.save")
    c.add_argument(
        "--format",
        choices=("nir", "c-header", "npz"),
        required=True,
        help="nir: docs/nir.md; c-header, npz: integers, docs/c-api.md",
    )
    c.add_argument("--output", type=Path, required=True, help="file to write; beside a C header also the C file")
    c.add_argument(
        "--input-shape", type=positive, nargs="+", metavar="SIZE", help="C H W of the images (default: the network's)"
    )
    c.add_argument(
        "--neurons",
        choices=NEURONS,
        help="nir: a node whose metadata says how it resets, or nodes that say it themselves (default if)",
    )
    c.add_argument("-T", type=positive, help="integers: time steps (default: the network's)")
    c.add_argument("--neuron", choices=MODES, help="integers: mode of the neurons (default: the network's)")
    add_window_options(c)


def _export(o: argparse.Namespace) -> int:
    snn = load(o.network)
    facts, text = (_nir if o.format == "nir" else _integers)(o, snn)
    if o.json:
        print(json.dumps({"output": str(o.output), "format": o.format, **facts}))
    else:
        print(f"wrote {o.output}: {text}")
    return 0


def _nir(o: argparse.Namespace, snn: SNN) -> tuple[dict[str, Any], str]:
    if o.T or o.neuron or o.window or o.iterations:
        raise ValueError("-T, --neuron, --window and --iterations go with integers; a NIR graph has no steps")
    neurons = o.neurons or NEURONS[0]
    graph = to_nir(snn, o.input_shape, neurons)
    with written_atomically(o.output) as temporary:
        importlib.import_module("nir").write(temporary, graph)
    return {"neurons": neurons, "nodes": len(graph.nodes)}, f"{len(graph.nodes)} nodes, {len(graph.edges)} edges"


def _integers(o: argparse.Namespace, snn: SNN) -> tuple[dict[str, Any], str]:
    if o.neurons:
        raise ValueError("--neurons goes with nir; integers have the modes of --neuron")
    own = snn.neuron
    snn.neuron = asked_neurons(o, [o.neuron or own.mode], own)[0]
    snn.T = o.T or snn.T
    made = integer_program(snn, o.input_shape)
    (made.npz if o.format == "npz" else made.c_header)(o.output)
    facts = {"T": snn.T, "neuron": str(snn.neuron), "operations": len(made.operations)}
    facts |= {"parameter_bytes": sum(a.nbytes for a in made.arrays.values()), "arena_bytes": made.facts["arena"]}
    text = (
        f"{facts['operations']} operations at T = {snn.T}, {facts['neuron']} neurons, {facts['parameter_bytes']} bytes "
        f"of parameters, {facts['arena_bytes']} of maps"
    )
    return facts, text
