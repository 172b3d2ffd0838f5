"""The result file of the benchmark.

The file grows: a run replaces the cases it measured and keeps the others, so a long benchmark can be cut into parts.
All results in a file come from one machine and one version of the software; others are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...files import read_json, require_folder_of, update_json
from .measure import NOT_MEASURED, machine, matrix_peak

FORMAT = "qcfs_fast benchmark"
FORMAT_VERSION = 1
KIND = "result file of qcfs-fast bench"  # as errors call it


class Results:
    """The result file of one machine: opened or begun; each added case is on disk when `add` returns."""

    def __init__(self, path: Path, device: torch.device) -> None:
        require_folder_of(path)
        self.path = path
        here = machine(device)
        if path.exists():
            self.data = read(path)
            there = self.data["machine"]
            differing = [k for k in here if here[k] != there.get(k)]
            if differing:
                raise ValueError(
                    f"{path} holds results of other conditions ({', '.join(differing)} differ); give another file, or "
                    "remove this one"
                )
        else:
            self.data = {"format": FORMAT, "version": FORMAT_VERSION, "machine": here, "peak": {}, "cases": []}
        if not isinstance(self.data["peak"].get("int8 macs per second"), float):
            self.data["peak"]["int8 macs per second"] = matrix_peak()

    def add(self, case: Mapping[str, Any]) -> None:
        def added(there: Any) -> dict[str, Any]:
            keep = [c for c in (there or self.data)["cases"] if case_key(c) != case_key(case)]
            return {**self.data, "cases": sorted([*keep, dict(case)], key=case_key)}

        self.data = update_json(self.path, added)


def case_key(case: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells one case from another: a new result replaces the old one of the same key.

    A case says its threads only where they are not those of the file's machine.
    """
    return (case["kind"], case["name"], case["batch"], case["T"], case.get("threads", 0))


def on_other_threads(case: Mapping[str, Any]) -> str:
    """How a case's name goes on, such as ", 1 thread"; nothing where its threads are those of the file's machine."""
    count = case.get("threads")
    return "" if count is None else f", {count} thread{'s' if count > 1 else ''}"


def _is_ours(found: Any) -> bool:
    if found["format"] == FORMAT and found.get("version") != FORMAT_VERSION:
        return True  # which has an error of its own
    sorted(found["cases"], key=case_key)  # fails where a case lacks what tells it from others
    return found["format"] == FORMAT and all(isinstance(found[part], dict) for part in ("machine", "peak"))


def read(path: Path) -> dict[str, Any]:
    """A result file, checked for its form."""
    data: dict[str, Any] = read_json(path, KIND, _is_ours)
    if data.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: written in version {data.get('version')} of the result format, need {FORMAT_VERSION}"
        )
    return data


def summary(case: Mapping[str, Any]) -> str:
    """One line: times, and how many times as long each contender takes as ours in 16 bits."""
    rows = case["contenders"]
    ours = next((r["seconds"] for n, r in rows.items() if n.startswith("qcfs_fast 16-bit") and "error" not in r), None)
    cells = []
    for name, row in rows.items():
        if "error" in row:
            cells.append(f"{name} {NOT_MEASURED} ({row['error']})")
        else:
            ratio = f" (x{row['seconds'] / ours:.2f})" if ours and not name.startswith("qcfs_fast 16-bit") else ""
            cells.append(f"{name} {1e3 * row['seconds']:.3f} ms{ratio}")
    name = f"{case['name']}, batch {case['batch']}, T={case['T']}{on_other_threads(case)}"
    return f"{name}, firing rate {case['firing rate']:.1%}: " + ", ".join(cells)
