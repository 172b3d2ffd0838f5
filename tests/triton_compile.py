"""Compiles the Triton kernels for one target without a GPU; prints one JSON line per variant. See its test.

Usage: triton_compile.py cuda 80 | triton_compile.py hip gfx942
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qcfs_fast import triton_backend, triton_kernels, triton_tiles

BYTES, WORDS = "*u8", "*i32"
SPIKING = {
    **dict.fromkeys(("r0", "r1", "out"), BYTES),
    **dict.fromkeys(
        ("amplitude0", "amplitude1", "current", "bias", "threshold", "v_in", "v_out", "partial_in", "partial_out"),
        WORDS,
    ),
}
PLAIN = {
    "STEPS": 4, "R": 1, "RCOUNT0": False, "RCOUNT1": False, "CURRENT": False, "PARTIAL": False, "FIRE": True,
    "CONTINUED": False, "CONTINUES": False,
}  # fmt: skip
CONTINUED = {"CONTINUED": True, "CONTINUES": True, "R": 2, "RCOUNT1": True, "CURRENT": True, "PARTIAL": True}
ANALOG = {
    "x": "*i16", "exponent": WORDS, "w": "*i16", "gain": "*fp64", "offset": "*fp64", "low": WORDS, "high": WORDS,
    "threshold": WORDS,
}  # fmt: skip
POOL = {"rows": "*i64", "cols": "*i64"}
QUANTIZE = {
    "x": "*fp32", "source": "*i64", "scale": "*fp32", "shift": "*fp32", "most": WORDS, "out": "*i16", "exponent": WORDS,
}  # fmt: skip
READOUT = {
    "counts": WORDS, "w": "*i16", "gain": "*fp64", "offset": "*fp64", "total": "*fp64", "out": "*fp32",
}  # fmt: skip


def dot(ptx, inputs=128, tile=None, **changes):
    """The matrix kernel with the tile that an untimed launch of a large layer takes."""
    flags = {**PLAIN, "PRODUCTS": 1, "DIGITS": 2, "HORNER": True, "COUNT0": False, "COUNT1": False, **changes}
    accumulators = flags["STEPS"] * (1 if flags["HORNER"] else 2)
    problem = triton_tiles.Problem(100000, 128, 1, inputs, 9 * inputs, flags["STEPS"], accumulators, "")
    tile = tile or triton_tiles.candidates(problem)[0]
    pointers = {"x0": BYTES, "w0": "*i8", "sums0": WORDS, "x1": BYTES, "w1": "*i8", "sums1": WORDS, **SPIKING}
    constants = {**flags, "PTX": ptx, "BM": tile.m, "BN": tile.n, "BK": tile.k}
    return triton_kernels.spiking_dot, pointers, constants, tile.warps, tile.stages


def direct(**changes):
    flags = {**PLAIN, "PRODUCTS": 1, "SCALE": 1, "GROUPED": True, "COUNT": False, **changes}
    tile = triton_tiles.direct(64, False)
    pointers = {"x": BYTES, "w": "*i16", **SPIKING}
    return triton_kernels.spiking_direct, pointers, {**flags, "BM": tile.m, "BN": tile.n}, tile.warps, 3


def variants(matrix, ptx, every):
    """(name, kernel and operands, whether it must hold matrix instructions)."""
    if matrix:
        for steps in range(1, 9):
            yield f"dot T={steps}", dot(ptx, STEPS=steps), True
        for steps in (1, 4, 8):
            counts = {"HORNER": False, "COUNT0": True}
            yield f"dot counts T={steps}", dot(ptx, STEPS=steps, **counts), True
        yield "dot 8 bit", dot(ptx, DIGITS=1), True
        yield "dot two products", dot(ptx, PRODUCTS=2, inputs=32), True
        yield "dot everything", dot(ptx, PRODUCTS=2, STEPS=8, HORNER=False, COUNT1=True, **CONTINUED), True
        yield "dot partial", dot(ptx, FIRE=False, R=0), True
        if every:
            for steps in (1, 2, 4, 8):
                problem = triton_tiles.Problem(100000, 128, 1, 128, 1152, steps, steps, "")
                for tile in triton_tiles.candidates(problem)[1:]:
                    yield f"dot T={steps} {tile}", dot(ptx, STEPS=steps, tile=tile), True
    for steps in (1, 4, 8):
        yield f"direct T={steps}", direct(STEPS=steps), False
    yield "direct dense everything", direct(STEPS=8, GROUPED=False, COUNT=True, **CONTINUED), False
    yield "direct no product", direct(PRODUCTS=0), False
    tile = triton_tiles.analog(64, False)
    for fire in (False, True):
        out = BYTES if fire else WORDS
        constants = {"GROUPED": False, "FIRE": fire, "BM": tile.m, "BN": tile.n}
        yield f"analog fire={fire}", (triton_kernels.analog, {**ANALOG, "out": out}, constants, tile.warps, 3), False
    for last in (False, True):
        constants = {"IDENTITY": False, "GROUPED": False, "FIRST": not last, "LAST": last, "BN": 64, "BK": 32}
        yield f"readout last={last}", (triton_kernels.readout, READOUT, constants, 4, 3), False
    maps = {"x": BYTES, "out": BYTES, **POOL}
    for count in (False, True):
        yield f"pool count={count}", (triton_kernels.pool, maps, {"COUNT": count, "BC": 64}, 2, 3), False
        constants = {"COUNT": count, "PREFIX": count, "BLOCK": 512}
        yield f"count count={count}", (triton_kernels.count, {"x": BYTES, "out": WORDS}, constants, 4, 3), False
    yield "max_pool", (triton_kernels.max_pool, maps, {"BC": 64}, 1, 3), False
    counts = {"x": WORDS, "out": WORDS, **POOL}
    yield "pool_counts", (triton_kernels.pool_counts, counts, {"BC": 64}, 1, 3), False
    spikes = {"current": WORDS, "threshold": WORDS, "out": BYTES}
    yield "encode", (triton_kernels.encode, spikes, {"BLOCK": 1024}, 4, 3), False
    yield "largest_input", (triton_kernels.largest_input, QUANTIZE, {"BLOCK": 1024}, 4, 3), False
    yield "quantize", (triton_kernels.quantize, QUANTIZE, {"BLOCK": 1024}, 4, 3), False


ALIGNED = ("C0", "K0", "KP0", "C1", "K1", "KP1", "O", "C")  # sizes that are multiples of 16 in large networks


def compile_one(target, kernel, pointers, constants, warps, stages):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    attrs = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*") or n in ALIGNED
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


def nvidia_facts(asm):
    """Instructions from the machine code, stack (spills) from the cubin's resource table."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(v) for v in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    matrix = re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*?(?:s8\.s8|i8)\S*", asm["ptx"])
    fused = len(re.findall(r"\bfma\.rn\.f(?:32|64)\b", asm["ptx"]))
    return {"matrix": sorted(set(matrix)), "registers": registers, "stack": stack, "fused": fused}


def amd_facts(asm):
    text = asm["amdgcn"]
    stack = int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", text).group(1))
    spills = sum(int(v) for v in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text))
    registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text).group(1))
    matrix = sorted(set(re.findall(r"\bv_mfma_i32_\w*i8\b", text)))
    fused = len(re.findall(r"\bv_fma(?:c)?_f64\b", text))
    return {"matrix": matrix, "registers": registers, "stack": stack + spills, "fused": fused}


def main():
    backend, arch, every = sys.argv[1], sys.argv[2], "every" in sys.argv[3:]
    cuda = backend == "cuda"
    target = GPUTarget(backend, int(arch) if cuda else arch, 32 if cuda else 64)
    version = tuple(int(v) for v in re.findall(r"\d+", triton.__version__)[:3])
    matrix = triton_backend.has_matrix_units(backend, arch, version)
    assert os.environ.get("TRITON_INTERPRET", "0") == "0"
    for name, (kernel, *rest), wanted in variants(matrix, cuda, every):
        compiled = compile_one(target, kernel, *rest)
        facts = nvidia_facts(compiled.asm) if cuda else amd_facts(compiled.asm)
        print(json.dumps({"name": name, "kernel": kernel.__name__, "wanted": wanted, **facts}), flush=True)


if __name__ == "__main__":
    main()
