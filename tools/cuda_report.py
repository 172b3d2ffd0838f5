"""Compiles the CUDA kernels for every architecture and reports what came out; needs nvcc, no GPU.

    python tools/cuda_report.py [--output FOLDER] [--arch 80 90] [--jobs 2]

Warnings are errors. Registers, spills and static shared memory of each kernel are read from ptxas, dynamic shared
memory is in docs/cuda.md; a spill fails. Where cuobjdump is found (CUDA toolkit, or the Triton wheel) the machine
code is searched for the instructions that should be there: tensor-core products, matrix loads, asynchronous
copies, 16-byte accesses.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
UNITS = ("conv_if_2", "conv_if_4", "conv_if_8", "conv_if_1", "cuda")
# What conv_if_kernel must contain: instruction (a regular expression) by least and largest architecture.
EXPECTED = (
    ("tensor-core product", r"IMMA\.16832\.U8\.S8", 80, 999),
    ("tensor-core product", r"IMMA\.8816\.U8\.S8", 75, 75),
    ("matrix load", r"LDSM\.16\.M88\.4", 75, 999),
    ("asynchronous 16-byte copy", r"LDGSTS\.E\.BYPASS\.128", 80, 999),
    ("16-byte load", r"LDG\.E\.128", 75, 75),
    ("16-byte store", r"STG\.E\.128", 75, 999),
)
INSTRUCTION = re.compile(r"\b(IMMA|LDSM|LDGSTS|LDG|STG|LDL|STL)((?:\.[A-Z0-9]+)*)\b")


def find_nvcc() -> str | None:
    homes = [os.environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    folders = [f"{h}/bin" for h in homes] + os.environ.get("PATH", "").split(os.pathsep) + ["/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def find_cuobjdump() -> str | None:
    nvcc = find_nvcc()
    beside = str(Path(nvcc).resolve().parent / "cuobjdump") if nvcc else ""
    if beside and Path(beside).exists():
        return beside
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    roots = [Path(triton.origin).parent] if triton and triton.origin else []
    for root in roots:
        for path in (root / "cuobjdump", root / "backends/nvidia/bin/cuobjdump"):
            if path.exists():
                return str(path)
    return None


def plain_name(mangled: str) -> str:
    """_ZN4qcfs4cuda14conv_if_kernelILi4ELi1E... -> conv_if_kernel<4, 1, ...>."""
    name = re.search(r"\d+([a-z_]+_kernel)", mangled)
    numbers = re.findall(r"Li(\d+)E", mangled)
    return (name.group(1) if name else mangled) + (f"<{', '.join(numbers)}>" if numbers else "")


def compile_unit(unit: str, architectures: list[str], folder: Path) -> list[dict]:
    """One object with code for all architectures; returns one row per kernel and architecture."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    targets[-1] = f"-gencode=arch=compute_{architectures[-1]},code=[sm_{architectures[-1]},compute_{architectures[-1]}]"
    nvcc = find_nvcc()
    assert nvcc is not None
    command = [
        nvcc, "-std=c++17", "-O3", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-fPIC", "-Xptxas=-v",
        f"-I{ROOT / 'csrc'}", *targets, "-c", str(ROOT / f"csrc/cuda/{unit}.cu"), "-o", str(folder / f"{unit}.o"),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{unit}.cu does not compile:\n{result.stdout}{result.stderr}")
    rows: list[dict] = []
    for line in result.stderr.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for 'sm_(\d+)\w?'", line):
            rows.append({"unit": unit, "kernel": plain_name(entry.group(1)), "arch": entry.group(2)})
        elif spill := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, spill.groups())
            rows[-1] |= {"stack": stack, "spill_stores": stores, "spill_loads": loads}
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            rows[-1] |= {"registers": int(used.group(1)), "static_shared": int(shared.group(1)) if shared else 0}
    return rows


def disassemble(unit: str, folder: Path, cuobjdump: str) -> dict[tuple[str, str], Counter]:
    """Instruction counts by (kernel, architecture)."""
    process = subprocess.Popen([cuobjdump, "-sass", str(folder / f"{unit}.o")], stdout=subprocess.PIPE, text=True)
    counts: dict[tuple[str, str], Counter] = {}
    arch, current = "", Counter()
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("arch = sm_"):
            arch = line.strip().removeprefix("arch = sm_")
        elif "Function :" in line:
            current = counts.setdefault((plain_name(line.split(":")[1].strip()), arch), Counter())
        elif found := INSTRUCTION.search(line):
            current[found.group(1) + found.group(2)] += 1
    if process.wait() != 0:
        raise RuntimeError(f"cuobjdump failed on {unit}.o")
    return counts


def missing_instructions(counts: dict[tuple[str, str], Counter]) -> list[str]:
    """What EXPECTED asks of conv_if_kernel and is not there, and local-memory accesses that should not be."""
    problems = []
    for (kernel, arch), found in counts.items():
        if kernel.startswith("conv_if_kernel"):
            for what, pattern, least, largest in EXPECTED:
                if least <= int(arch) <= largest and not any(re.match(pattern, name) for name in found):
                    problems.append(f"{kernel} for sm_{arch} has no {what} ({pattern})")
        local = sorted(name for name in found if name.startswith(("LDL", "STL")))
        if local:
            problems.append(f"{kernel} for sm_{arch} uses local memory ({', '.join(local)})")
    return problems


def make_report(folder: Path, architectures: list[str], jobs: int, sass: bool = True) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        rows = [r for rows in pool.map(lambda u: compile_unit(u, architectures, folder), UNITS) for r in rows]
        cuobjdump = find_cuobjdump() if sass else None
        instructions: list[dict] = []
        problems = [
            f"{r['kernel']} for sm_{r['arch']} spills {r['spill_stores']} + {r['spill_loads']} bytes"
            for r in rows
            if r["spill_stores"] or r["spill_loads"] or r["stack"]
        ]
        if cuobjdump:
            for counts in pool.map(lambda u: disassemble(u, folder, cuobjdump), UNITS):
                problems += missing_instructions(counts)
                instructions += [{"kernel": k, "arch": a, "instructions": dict(c)} for (k, a), c in counts.items()]
    return {
        "kernels": rows,
        "instructions": instructions if cuobjdump else "not searched: no cuobjdump",
        "problems": problems,
    }


def table(report: dict) -> str:
    kernels = sorted({r["kernel"] for r in report["kernels"]})
    architectures = sorted({r["arch"] for r in report["kernels"]}, key=int)
    registers = {(r["kernel"], r["arch"]): r["registers"] for r in report["kernels"]}
    lines = ["registers per thread".ljust(44) + "".join(f"sm_{a}".rjust(8) for a in architectures)]
    lines += [k.ljust(44) + "".join(str(registers.get((k, a), "-")).rjust(8) for a in architectures) for k in kernels]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=None, help="folder for objects and report.json (default: none kept)"
    )
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS", "2")))
    args = parser.parse_args()
    if find_nvcc() is None:
        print("nvcc was not found; set CUDA_HOME or put it on the PATH")
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output or Path(temporary)
        report = make_report(folder, args.arch, args.jobs)
        (folder / "report.json").write_text(json.dumps(report, indent=1))
    print(table(report))
    if isinstance(report["instructions"], str):
        print(f"instructions {report['instructions']}")
    for problem in report["problems"]:
        print(f"PROBLEM: {problem}")
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
