"""Saved networks: one safetensors file, the graph as JSON in its metadata (docs/format.md).

There is no pickle in it, so loading runs no code. This file knows the container alone: what stands in the header is the
network's business (SNN.save).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..files import written_atomically
from ..version import __version__

FORMAT = "qcfs_fast"  # the key of the header in the file's metadata
FORMAT_VERSION = (
    4  # written where a pool spreads pixels; 3 where the network has a tail; otherwise 2, for older programs
)


def header_text(fields: Mapping[str, Any]) -> str:
    """The header of a network: its fields, and who wrote them in which format."""
    pools = [p for node in fields["graph"] for p in _pools(node["config"])]
    newest = "outputs" in fields or any("spread" in p for p in pools)
    version = FORMAT_VERSION if newest else 3 if "tail" in fields else 2
    return json.dumps({"format_version": version, "written_by": __version__, **fields})


def _pools(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The pools of a node."""
    return [p for term in config.get("pools", []) for p in term] + [config[k] for k in ("pool",) if k in config]


def save(path: str | PathLike[str], header: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a network's header and tensors; a reader never sees half of the file.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    dense = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with written_atomically(path) as temporary:
        save_file(dense, temporary, metadata={FORMAT: header})
