"""Saved networks: one safetensors file, the graph as JSON in its metadata (docs/format.md).

There is no pickle in it, so loading runs no code. This file knows the container alone: what stands in the header is the
network's business (SNN.save). The header ends with a checksum of itself and all tensors, because a bit that flipped in
a weight would change answers and nothing else. It is no key of its own in the file's metadata: safetensors writes those
in any order, and the same network shall give the same bytes.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from torch import Tensor

from ..errors import FormatError
from ..files import write_tensors_atomically
from ..operators.windows import PoolSpec
from ..version import __version__
from .schema import require

FORMAT = "qcfs_fast"  # the key of the header in the file's metadata
# 5 is written where a pool has a border of pixels or leaves masks among zeros, where the image is moved, or a tail adds
# a dimension; 4 where a pool spreads pixels or there are several outputs; 3 where the network has a tail; otherwise 2,
# for older programs.
FORMAT_VERSION = 5
MAX_NESTING = 64  # of the header's JSON; libqcfs takes no more (csrc/network/json.cpp)
SEALED = re.compile(r'(.*), "crc32": "([0-9a-f]{8})"}', re.DOTALL)


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of a text, then of each tensor's name and bytes, in the order of the names' bytes."""
    found = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0].encode()):
        values: Any = tensor.numpy()
        found = zlib.crc32(values, zlib.crc32(name.encode(), found))
    return f"{found:08x}"


def header_text(fields: Mapping[str, Any]) -> str:
    """The header of a network: its fields, and who wrote them in which format."""
    pools = [p for node in fields["graph"] for p in _pools(node["config"])]
    since_4 = "outputs" in fields or any("spread" in p for p in pools)
    newest = any(map(_since_5, pools)) or any("moves" in node["config"] for node in fields["graph"])
    newest |= "unsqueeze" in json.dumps(fields.get("tail", ""))
    version = FORMAT_VERSION if newest else 4 if since_4 else 3 if "tail" in fields else 2
    return json.dumps({"format_version": version, "written_by": __version__, **fields})


def parsed(header: str) -> Any:
    """The fields of a header's text, of which nothing more is known than that it can be read, written and printed.

    Raises:
        FormatError: it is no JSON, a field is nested too deeply, or a text in it is none that UTF-8 can hold.
    """
    try:
        found = json.loads(header)
    except (TypeError, ValueError, RecursionError) as error:  # also of an integer of thousands of digits
        raise FormatError(f"the graph in the file's metadata is damaged ({error})") from error
    for name, value in found.items() if isinstance(found, dict) else ():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
            deep = _levels(value) >= MAX_NESTING  # the header itself is one
        except UnicodeEncodeError as error:
            lone = error.object[error.start : error.end]
            raise FormatError(f"{name!a} holds {lone!a}, half of a character; no text may have one") from None
        except RecursionError:
            deep = True
        require(not deep, f"{name!a} is nested deeper than {MAX_NESTING} levels")
    return found


def _levels(value: Any) -> int:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_levels, inside), default=0)


def checked_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a user says of a network; ValueError or TypeError where JSON has no such value."""
    try:
        same = isinstance(metadata, Mapping) and json.loads(json.dumps(dict(metadata), allow_nan=False)) == metadata
    except RecursionError:
        raise ValueError(f"metadata is nested deeper than {MAX_NESTING} levels") from None
    if not same:
        raise ValueError("metadata must be a dict of what JSON has: names, texts, numbers, lists and dicts of them")
    return dict(metadata)


def _pools(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The pools of a node."""
    alone = [config["pool"]] if "pool" in config else config.get("moves", [])
    return [*alone, *(p for term in config.get("pools", []) for p in term)]


def _since_5(pool: Mapping[str, Any]) -> bool:
    """Whether older programs cannot read a pool, or take a window of none for a negative spike."""
    spec = PoolSpec.from_dict(pool)
    return spec.border is not None or (spec.kind == "max" and spec.moves and spec.leaves_zeros)


def save(path: str | PathLike[str], header: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a network's header and tensors; a reader never sees half of the file.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    dense = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = header.removesuffix("}")
    write_tensors_atomically(path, dense, {FORMAT: f'{text}, "crc32": "{checksum(text, dense)}"}}'})


def read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The header and the tensors of a saved network's file, its checksum compared; files of before have none.

    Raises:
        FormatError: the file is truncated, damaged or of another kind.
    """
    data = path.read_bytes()  # of a mapped file, what is written into it later would change the network, or end us
    try:
        tensors = tensors_of(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    except (SafetensorError, ValueError, TypeError, RuntimeError, KeyError) as error:  # also of types torch has not
        raise FormatError(f"not a complete safetensors file ({error}); copy it again from its source") from error
    text = metadata.get(FORMAT)
    if text is None:
        raise FormatError("a safetensors file, but not a network saved by qcfs_fast")
    sealed = SEALED.fullmatch(text)
    if sealed and sealed[2] != checksum(sealed[1], tensors):
        raise FormatError("its checksum does not fit its contents; the file was damaged, copy it again from its source")
    return text, tensors
