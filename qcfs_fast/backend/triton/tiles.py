"""Tile shapes of the Triton matrix kernel: a short list, timed once per layer shape, remembered on disk.

The list is short because a bad tile is bad for few reasons:

    accumulators    BM * BN * steps int32 (twice that with separate digit sums): at most 32 a thread. A thread has 255
                    registers, but ptxas needs many for operands, masks and the epilogue's loads: with 64 it spills
                    on some architectures, with 32 on none (test_triton_compile.py reads it from the machine code).
                    On AMD 64 a lane, always with four wavefronts: a lane then has 512 registers, with eight 256,
                    of which a 32x32 matrix instruction for each of 8 steps takes half;
    few pixels      7x7 maps at batch 1 have 49 rows: BM = 16 or 32 keeps padding small and fills more processors;
    many pixels     a tall tile reads each weight more seldom, a wide one each mask: 64x64 balances the two,
                    128 rows pay where steps are few. More warps make room for more
                    steps, but 16 leave a thread 128 registers, which is too few;
    few outputs     BN = 32 for grouped layers and the last stage of small nets;
    BK              64 where there are that many inputs (two matrix instructions deep), else 32, the least there is.

Timings use `triton.testing.do_bench` on the launch itself, which may be repeated because no launch reads what it
writes. The result goes to triton-tiles.json in $QCFS_FAST_CACHE_DIR (default ~/.cache/qcfs_fast), written to a
temporary file and moved, so that readers never see half a file; of two processes that write at once one may lose its
entry and time it again. (Triton's own `cache_results` exists only in newer releases and would not cover 3.3.)
QCFS_FAST_TRITON_TUNE=0 and a CUDA graph under capture take the first candidate untimed; that is decided by shape
alone. No tile changes a result.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from ...files import write_text_atomically
from ...version import __version__

REGISTERS = 32  # accumulators an NVIDIA thread may hold
REGISTERS_HIP = 64  # an AMD lane, with four wavefronts


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
        return f"{device}, triton {triton.__version__}, qcfs_fast {__version__}: {shape} {self.variant}"


# BM, BN, warps.
SHAPES = ((64, 64, 8), (128, 64, 8), (64, 32, 4), (64, 32, 8), (32, 32, 4), (32, 32, 8))
SHAPES_HIP = ((64, 64, 4), (128, 64, 4), (64, 32, 4), (32, 32, 4))
SMALL = (16, 32, 4)  # for any number of steps
INTERPRETER = Tile(32, 16, 32, 4, 1)


def candidates(problem: Problem, hip: bool = torch.version.hip is not None) -> list[Tile]:
    """Tiles worth timing, best guess first; never empty."""
    k = 64 if problem.inputs > 32 else 32
    shapes, warp = (SHAPES_HIP, 64 * REGISTERS_HIP) if hip else (SHAPES, 32 * REGISTERS)
    found = []
    for m, n, warps in (*shapes, SMALL):
        fits = m * n * problem.accumulators <= warp * warps
        padded = (m > 32 and m >= 2 * problem.rows) or (n > 32 and n >= 2 * problem.outputs)
        if fits and not padded:
            found.append(Tile(m, n, k, warps, 3))
    return found or [Tile(*SMALL[:2], k, SMALL[2], 3)]


def plain(outputs: int, accumulators: int, interpreted: bool) -> Tile:
    """Kernels without matrix units: 32 accumulators a thread, neighbouring threads on neighbouring outputs.

    `accumulators` is what one neuron needs of them: 1 to 8.
    """
    if interpreted:
        return INTERPRETER
    n = 64 if outputs > 32 else 32 if outputs > 16 else 16
    elements = 1024 if accumulators <= 4 else 512
    return Tile(elements // n, n, 0, 4, 1)


# ---------------------------------------------------------------------------------------- disk cache


def cache_file() -> Path | None:
    """None: a user without a home folder, nothing is kept."""
    folder = os.environ.get("QCFS_FAST_CACHE_DIR")
    try:
        return (Path(folder) if folder else Path.home() / ".cache" / "qcfs_fast") / "triton-tiles.json"
    except RuntimeError:
        return None


def read_cache(path: Path | None) -> dict[str, Tile]:
    """Remembered tiles; anything unreadable counts as absent."""
    if path is None:
        return {}
    try:
        entries = json.loads(path.read_text())
        return {str(key): Tile(*(int(v) for v in values)) for key, values in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_cache(path: Path | None, tiles: dict[str, Tile]) -> None:
    """Add entries to the file in one move; a folder that cannot be written only costs timing again."""
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        merged = {**read_cache(path), **tiles}
        write_text_atomically(path, json.dumps({key: astuple(tile) for key, tile in merged.items()}, indent=1))


_known: dict[str, Tile] | None = None


def _milliseconds(run: Callable[[], None]) -> float:
    return float(triton.testing.do_bench(run, warmup=5, rep=20))


def _tuning() -> bool:
    value = os.environ.get("QCFS_FAST_TRITON_TUNE", "1")
    if value not in ("0", "1"):
        raise ValueError(
            f"QCFS_FAST_TRITON_TUNE={value!r} is unknown; it is 0 (take the first guess) or 1 (time tiles)"
        )
    return value == "1"


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
    if len(options) == 1 or not _tuning():
        return options[0]
    key = problem.key(torch.cuda.get_device_name(device))
    if _known is None:
        _known = read_cache(cache_file())
    if _known.get(key) in options:
        return _known[key]
    if torch.cuda.is_current_stream_capturing():
        return options[0]
    _known[key] = fastest(options, run, _milliseconds)  # on the current device, the operands' (protocol.py)
    write_cache(cache_file(), {key: _known[key]})
    return _known[key]
