"""Tile shapes of the Triton matrix kernel: a short list, timed once per layer shape, remembered on disk.

The list is short because a bad tile is bad for few reasons:

    accumulators    BM * BN * steps int32 (twice that with separate digit sums): at most 32 a thread. A thread has 255
                    registers, but ptxas needs many for operands, masks and the epilogue's loads: with 64 it spills
                    on some architectures, with 32 on none (test_triton_compile.py reads it from the cubins);
    few pixels      7x7 maps at batch 1 have 49 rows: BM = 16 or 32 keeps padding small and fills more processors;
    many pixels     a tall tile reads each weight more seldom, a wide one each mask: 64x64 balances the two,
                    128 rows pay where steps are few. More warps make room for more
                    steps, but 16 leave a thread 128 registers, which is too few;
    few outputs     BN = 16 or 32 for grouped layers and the last stage of small nets;
    BK              64 where there are that many inputs (two matrix instructions deep), else 32, the least there is.

Timings use `triton.testing.do_bench` on the launch itself, which may be repeated because no launch reads what it
writes. The result goes to triton-tiles.json in $QCFS_FAST_CACHE_DIR (default ~/.cache/qcfs_fast), written to a
temporary file and moved, so that readers never see half a file. (Triton's own `cache_results` exists only in newer
releases and would not cover 3.3.) QCFS_FAST_TRITON_TUNE=0, a CUDA graph under capture and the interpreter take the
first candidate untimed; that is decided by shape alone. No tile changes a result.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

REGISTERS = 32  # accumulators a thread may hold


@dataclass(frozen=True)
class Tile:
    m: int
    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Problem:
    """What a tile must fit. `variant` names the kernel's other compile-time choices."""

    rows: int
    outputs: int
    groups: int
    inputs: int
    depth: int
    steps: int
    accumulators: int
    variant: str

    def key(self, device: str) -> str:
        rows = 1 << max(self.rows - 1, 0).bit_length()  # times hardly change within a factor of two
        shape = f"{rows}x{self.groups}x{self.outputs}x{self.inputs}/{self.depth}"
        return f"{device}, triton {triton.__version__}: {shape} {self.variant}"


# BM, BN, warps.
SHAPES = ((64, 64, 8), (128, 64, 8), (64, 32, 4), (64, 32, 8), (32, 32, 4), (32, 32, 8))
SMALL = (16, 32, 4)  # for any number of steps
INTERPRETER = Tile(16, 16, 32, 4, 1)


def candidates(problem: Problem) -> list[Tile]:
    """Tiles worth timing, best guess first; never empty."""
    k = 64 if problem.inputs > 32 else 32
    found = []
    for m, n, warps in (*SHAPES, SMALL):
        fits = m * n * problem.accumulators <= REGISTERS * 32 * warps
        padded = (m > 32 and m >= 2 * problem.rows) or (n > 32 and n >= 2 * problem.outputs)
        if fits and not padded:
            found.append(Tile(m, n, k, warps, 3))
    return found or [Tile(*SMALL[:2], k, SMALL[2], 3)]


def direct(outputs: int, interpreted: bool) -> Tile:
    """spiking_direct: 8 accumulators an element; neighbouring threads on neighbouring outputs."""
    if interpreted:
        return INTERPRETER
    n = 64 if outputs > 32 else 32 if outputs > 16 else 16
    return Tile(1024 // n, n, 0, 4, 1)


def analog(outputs: int, interpreted: bool) -> Tile:
    """The analog convolution: 64-bit accumulators, 4 a thread."""
    tile = direct(outputs, interpreted)
    return tile if interpreted else Tile(tile.m // 2, tile.n, 0, tile.warps, 1)


# ---------------------------------------------------------------------------------------- disk cache


def cache_file() -> Path:
    folder = os.environ.get("QCFS_FAST_CACHE_DIR") or Path.home() / ".cache" / "qcfs_fast"
    return Path(folder) / "triton-tiles.json"


def read_cache(path: Path) -> dict[str, Tile]:
    """Remembered tiles; anything unreadable counts as absent."""
    try:
        entries = json.loads(path.read_text())
        return {str(key): Tile(*(int(v) for v in values)) for key, values in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_cache(path: Path, tiles: dict[str, Tile]) -> None:
    """Add entries to the file in one move; a folder that cannot be written only costs timing again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        merged = {**read_cache(path), **tiles}
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump({key: astuple(tile) for key, tile in merged.items()}, file, indent=1)
        os.replace(name, path)


_known: dict[str, Tile] | None = None


def _milliseconds(run: Callable[[], None]) -> float:
    return float(triton.testing.do_bench(run))


def fastest(
    tiles: list[Tile], run: Callable[[Tile], None], milliseconds: Callable[[Callable[[], None]], float]
) -> Tile:
    """Time each tile; one that does not fit the device (too much shared memory, say) is out."""
    times: list[tuple[float, int]] = []
    for i, tile in enumerate(tiles):
        with contextlib.suppress(triton.runtime.errors.OutOfResources):
            times.append((milliseconds(lambda tile=tile: run(tile)), i))  # type: ignore[misc]
    return tiles[min(times)[1]] if times else tiles[-1]


def choose(problem: Problem, run: Callable[[Tile], None], device: Any, interpreted: bool) -> Tile:
    """The tile for one launch: remembered, timed now, or the first guess where timing is off."""
    global _known
    if interpreted:
        return INTERPRETER
    options = candidates(problem)
    if len(options) == 1 or os.environ.get("QCFS_FAST_TRITON_TUNE", "1") == "0":
        return options[0]
    key = problem.key(torch.cuda.get_device_name(device))
    if _known is None:
        _known = read_cache(cache_file())
    if _known.get(key) in options:
        return _known[key]
    if torch.cuda.is_current_stream_capturing():
        return options[0]
    _known[key] = fastest(options, run, _milliseconds)
    write_cache(cache_file(), {key: _known[key]})
    return _known[key]
