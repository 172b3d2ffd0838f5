"""Reports what nvcc made of the CUDA kernels. It reads the built module with cuobjdump; it needs no nvcc and no GPU.

    python tools/cuda_report.py [--module qcfs_fast/_cuda....so] [--output report.json]

The report gives for each kernel and architecture the registers, stack and local memory (where a spill shows), shared
memory, and the machine instructions that matter. Where there are tensor-core products it also counts, by kind, the
instructions of the loop around them, and those that an ordinary round executes. A spill is a problem, and so are the
lack of an instruction that should be there (tensor-core products, matrix loads, asynchronous copies, 16-byte accesses)
and more registers or instructions than a limit allows. A problem makes the exit status 1.

cuobjdump comes with the CUDA toolkit and with the Triton wheel.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = ("75", "80", "86", "90", "100", "120")
# What a kernel must contain: instruction (a regular expression) by least and largest architecture.
EXPECTED = (
    ("conv_if_kernel", "tensor-core product", r"IMMA\.16832\.U8\.S8|IGMMA\.64x\d+x32\.U8\.S8", 80, 999),
    ("conv_if_kernel", "tensor-core product", r"IMMA\.8816\.U8\.S8", 75, 75),
    ("conv_if_kernel", "matrix load", r"LDSM\.16\.M88\.4", 75, 999),
    ("conv_if_kernel", "asynchronous 16-byte copy", r"LDGSTS\.E\.BYPASS\.128", 80, 999),
    ("conv_if_kernel", "16-byte load", r"LDG\.E\.128", 75, 75),
    ("conv_if_kernel", "16-byte store", r"STG\.E\.128", 75, 999),
    ("image_tensor_kernel", "asynchronous 16-byte copy", r"LDGSTS\.E\.BYPASS\.128", 80, 999),
    ("image_tensor_kernel", "16-byte store to shared memory", r"STS\.128", 75, 999),
    ("largest_kernel", "reduction of a warp", r"C?REDUX\.MAX", 80, 999),
    ("largest_kernel", "reduction of a warp", r"SHFL\.BFLY", 75, 75),
)
# What a kernel may take at most. With 128 registers four blocks of the first layer share a multiprocessor. In the loop
# of a spiking layer whose inputs are masks in whole pieces, nothing is read that is the same for the whole layer, and
# the first product waits for little more than the matrix loads.
LIMITS = (
    ("image_tensor_kernel", "registers", 128),
    ("image_tensor_kernel", "beside products", 240),
    (r"conv_if_kernel<\d, \d, \d+, \d, \d, 1, 0>", "before products", 40),
    (r"conv_if_kernel<\d, \d, \d+, \d, \d, 1, 0>", "layer's values", 0),
)
LISTED = re.compile(r"(IMMA|IGMMA|LDSM|LDGSTS|LDG|STG|LDL|STL|STS|REDUX|CREDUX|SHFL)\b")
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][A-Z0-9_.x]*)([^;]*);")
KINDS = (
    ("products", r"IMMA|IGMMA"),
    ("matrix loads", r"LDSM"),
    ("copies", r"LDGSTS|LDG|STS"),
    ("constants", r"LDC|LDCU|ULDC"),
    ("branches and barriers", r"BRA|BSSY|BSYNC|BAR|LDGDEPBAR|DEPBAR|EXIT|CALL|WARPSYNC"),
)


def find_cuobjdump() -> str | None:
    homes = [os.environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    folders = [f"{h}/bin" for h in homes] + os.environ.get("PATH", "").split(os.pathsep) + ["/usr/local/cuda/bin"]
    if found := shutil.which("cuobjdump", path=os.pathsep.join(folders)):
        return found
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        path = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        if path.exists():
            return str(path)
    return None


def find_module() -> Path | None:
    """The built CUDA module of the installed package, without loading it."""
    package = importlib.util.find_spec("qcfs_fast")
    folders = package.submodule_search_locations if package else None
    return next((p for folder in folders or () for p in Path(folder).glob("_cuda*.so")), None)


def plain_name(mangled: str) -> str:
    """_ZN4qcfs4cuda14conv_if_kernelILi4ELi1E... -> conv_if_kernel<4, 1, ...>."""
    name = re.search(r"\d+([a-z_]+_kernel)", mangled)
    numbers = re.findall(r"L[ib](\d+)E", mangled)
    return (name.group(1) if name else mangled) + (f"<{', '.join(numbers)}>" if numbers else "")


def _output(command: list[str]) -> Iterable[str]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield from process.stdout
    if process.wait() != 0:
        raise RuntimeError(f"{' '.join(command)} failed")


def resources(module: Path, cuobjdump: str) -> list[dict]:
    """Registers, stack, local and static shared memory of each kernel, as ptxas settled them."""
    rows: list[dict] = []
    arch = kernel = ""
    for line in _output([cuobjdump, "-res-usage", str(module)]):
        if line.startswith("arch = sm_"):
            arch = line.strip().removeprefix("arch = sm_")
        elif found := re.search(r"Function (\w+):", line):
            kernel = plain_name(found.group(1))
        elif "REG:" in line:
            values = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            row = {"kernel": kernel, "arch": arch, "registers": values["REG"], "stack": values["STACK"]}
            rows.append(row | {"local": values["LOCAL"], "static_shared": values["SHARED"]})
    return rows


def has_ptx(module: Path, cuobjdump: str) -> list[str]:
    """Architectures for which the module holds PTX."""
    return sorted(
        {m for line in _output([cuobjdump, "-lptx", str(module)]) for m in re.findall(r"sm_(\d+)\.ptx", line)}
    )


class Instruction(NamedTuple):
    at: int
    name: str
    target: int | None  # of a branch
    conditional: bool


def instruction(line: re.Match) -> Instruction:
    at, predicate, name, operands = line.groups()
    target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
    conditional = predicate is not None or re.match(r"\s*!?U?P", operands) is not None
    return Instruction(int(at, 16), name, int(target.group(1), 16) if target else None, conditional)


def executed(loop: list[Instruction]) -> int:
    """Instructions of the shortest way through a loop, of those with the most products and copies."""
    best: dict[int, tuple[int, int, int]] = {}  # from an address to the end: products, copies, minus instructions
    after = (0, 0, 0)
    for i in reversed(loop):
        ways = [after] if i.target is None or i.conditional or i is loop[-1] else []
        ways += [best[i.target]] if i.target in best else []
        products, copies, rest = max(ways or [after])
        is_copy = i.name.startswith(("LDGSTS", "LDG"))
        after = best[i.at] = (products + ("MMA" in i.name), copies + is_copy, rest - 1)
    return -after[2]


def product_loop(code: list[Instruction]) -> dict[str, int]:
    """Instructions by kind of the smallest loop (a branch back) with tensor-core products, and what LIMITS asks."""
    best: list[Instruction] = []
    for i in code:
        if i.target is None or i.target >= i.at:
            continue
        body = [j for j in code if i.target <= j.at <= i.at]
        if any("MMA" in j.name for j in body) and (not best or len(body) < len(best)):
            best = body
    counts = {kind: sum(bool(re.match(rf"(?:{names})\b", i.name)) for i in best) for kind, names in KINDS}
    arithmetic = len(best) - sum(counts.values())
    if not best:
        return {}
    names = [i.name for i in best]
    barrier = next((n for n, name in enumerate(names) if name.startswith("BAR")), 0)
    return counts | {
        "arithmetic": arithmetic,
        "executed": executed(best),
        "beside products": executed(best) - counts["products"],
        "before products": len(list(itertools.takewhile(lambda n: "MMA" not in n, names[barrier + 1 :]))),
        "layer's values": sum(bool(re.match(r"(S2U?R|LDC)\b", n)) for n in names),
    }


def disassemble(module: Path, cuobjdump: str) -> dict[tuple[str, str], dict]:
    """By (kernel, architecture): counts of the listed instructions and, where there are products, their loop."""
    found: dict[tuple[str, str], dict] = {}
    arch = ""
    code: list[Instruction] = []

    def finish(key: tuple[str, str] | None) -> None:
        if key is not None:
            listed = Counter(i.name for i in code if LISTED.match(i.name))
            found[key] = {"instructions": listed, "loop": product_loop(code) if any("MMA" in n for n in listed) else {}}
        code.clear()

    key: tuple[str, str] | None = None
    for line in _output([cuobjdump, "-sass", str(module)]):
        if line.startswith("arch = sm_"):
            finish(key)
            key, arch = None, line.strip().removeprefix("arch = sm_")
        elif "Function :" in line:
            finish(key)
            key = (plain_name(line.split(":")[1].strip()), arch)
        elif m := LINE.search(line):
            code.append(instruction(m))
    finish(key)
    return found


def missing_instructions(counts: dict[tuple[str, str], Counter]) -> list[str]:
    """What EXPECTED asks of a kernel and is not there, and local-memory accesses that should not be."""
    problems = []
    for (kernel, arch), found in counts.items():
        for where, what, pattern, least, largest in EXPECTED:
            if not kernel.startswith(where) or not least <= int(arch.rstrip("af")) <= largest:
                continue
            if not any(re.match(pattern, name) for name in found):
                problems.append(f"{kernel} for sm_{arch} has no {what} ({pattern})")
        local = sorted(name for name in found if name.startswith(("LDL", "STL")))
        if local:
            problems.append(f"{kernel} for sm_{arch} uses local memory ({', '.join(local)})")
    return problems


def exceeded_limits(rows: list[dict]) -> list[str]:
    problems = []
    for row in rows:
        for where, what, most in LIMITS:
            # Products of a warpgroup are asynchronous: a stage's masks are all cut before the first.
            if not re.match(where, row["kernel"]) or (what == "before products" and row["arch"] == "90a"):
                continue
            found = (row["loop"] | {"registers": row["registers"]})[what]
            if found > most:
                problems.append(f"{row['kernel']} for sm_{row['arch']}: {what} {found}, more than {most}")
    return problems


def make_report(module: Path, cuobjdump: str) -> dict:
    rows = resources(module, cuobjdump)
    code = disassemble(module, cuobjdump)
    for row in rows:
        row |= code[row["kernel"], row["arch"]]
    problems = [
        f"{r['kernel']} for sm_{r['arch']} spills: {r['stack']} bytes of stack, {r['local']} of local memory"
        for r in rows
        if r["stack"] or r["local"]
    ]
    problems += missing_instructions({key: found["instructions"] for key, found in code.items()})
    problems += exceeded_limits(rows)
    return {"module": module.name, "ptx": has_ptx(module, cuobjdump), "kernels": rows, "problems": problems}


def table(report: dict) -> str:
    kernels = sorted({r["kernel"] for r in report["kernels"]})
    architectures = sorted({r["arch"] for r in report["kernels"]}, key=lambda a: int(a.rstrip("af")))
    rows = {(r["kernel"], r["arch"]): r for r in report["kernels"]}
    lines = ["registers per thread".ljust(44) + "".join(f"sm_{a}".rjust(8) for a in architectures)]
    for k in kernels:
        values = (str(rows[k, a]["registers"]) if (k, a) in rows else "-" for a in architectures)
        lines.append(k.ljust(44) + "".join(v.rjust(8) for v in values))
    for a in architectures:
        loops = {k: rows[k, a]["loop"] for k in kernels if (k, a) in rows and rows[k, a]["loop"]}
        if loops:
            kinds = ("products", "matrix loads", "copies", "executed", "before products", "layer's values")
            lines += ["", f"loop around the products, sm_{a}".ljust(44) + "  ".join(kinds)]
            lines += [
                k.ljust(44) + "  ".join(str(v[kind]).rjust(len(kind)) for kind in kinds) for k, v in loops.items()
            ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", type=Path, help="default: that of the installed package")
    parser.add_argument("--output", type=Path, help="also write everything as JSON")
    args = parser.parse_args()
    module, cuobjdump = args.module or find_module(), find_cuobjdump()
    if module is None:
        print("the package was built without its CUDA module; build it where nvcc is found (docs/cuda.md)")
        return 2
    if cuobjdump is None:
        print("cuobjdump was not found; it comes with the CUDA toolkit and with the Triton wheel")
        return 2
    report = make_report(module, cuobjdump)
    if args.output:
        args.output.write_text(json.dumps(report, indent=1))
    print(table(report))
    print(f"PTX for {', '.join('sm_' + a for a in report['ptx']) or 'no architecture'}")
    for problem in report["problems"]:
        print(f"PROBLEM: {problem}")
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
