"""Compiles the Triton kernels for one target without a GPU; prints one JSON line per kernel. See its test.

Usage: triton_compile.py cuda 80 | triton_compile.py hip gfx942 | triton_compile.py cuda 80 thorough

The launchers of the package run as they do for users, on tensors without data (device "meta"), up to the launch
itself: a stand-in for Triton's driver names the target, and JITFunction.run compiles and returns. So signatures,
specialisations (sizes of 1, multiples of 16, planes beyond 32 bits) and options are those of real launches.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from qcfs_fast.backend.triton import launch as tb
from qcfs_fast.backend.triton import tiles as triton_tiles
from qcfs_fast.operators.signature import OPERATORS

POINTWISE = (1, 1, 1, 1, 0, 0, 1, 1)
CUBE = (3, 3, 1, 1, 1, 1, 1, 1)


def empty(dtype, *shape):
    return torch.empty(shape, dtype=dtype, device="meta")


def words(*shape):
    return empty(torch.int32, *shape)


def call(name, *operands):
    kind = next(o for o in OPERATORS if o.name == name)
    tb.KERNELS(kind.checked(*operands))


class Layer:
    """Operands of a spiking layer on a map of `size` pixels, one source after another."""

    def __init__(self, T, O=128, batch=64, size=14):
        self.T, self.O, self.batch, self.size = T, O, batch, size
        self.x, self.w, self.geometry, self.residual, self.amplitude, self.current = [], [], [], [], [], None

    def planes(self, count):
        return self.T if count else (self.T + 7) // 8

    def product(self, C=128, groups=1, bits=16, count=False, geometry=CUBE):
        self.x.append(empty(torch.uint8, self.planes(count), self.batch, self.size, self.size, C))
        dtype = torch.int16 if bits == 16 else torch.int8
        self.w.append(empty(dtype, geometry[0], geometry[1], C // groups, self.O))
        self.geometry += [*geometry, groups]
        return self

    def add(self, count=False):
        self.residual.append(empty(torch.uint8, self.planes(count), self.batch, self.size, self.size, self.O))
        self.amplitude.append(words(self.O))
        return self

    def constant(self):
        self.current = words(self.batch, self.size, self.size, self.O)
        return self

    def run(self):
        sources = (self.x, self.w, self.geometry, self.residual, self.amplitude, self.current)
        call("conv2d_if", *sources, words(self.O), words(self.O), self.T)


def matrix_layers(thorough):
    for T in range(2, 9):
        yield f"T={T}", Layer(T).product()
    yield "8 steps before 1", Layer(9).product()  # and T = 1 of masks
    for T in range(1, 9) if thorough else (1, 4):  # 8 below
        yield f"counts T={T}", Layer(T).product(count=True)
    yield "8 bit", Layer(4).product(bits=8)
    everything = Layer(16).product(48, count=True).product(40, geometry=POINTWISE).constant().add().add(count=True)
    yield "everything", everything
    if thorough:
        yield "groups", Layer(4).product(groups=8)
        yield "projection", Layer(4).product().add().product(64, geometry=POINTWISE)
        yield "beyond 32 bits", Layer(12, batch=2**14, size=64).product().add()
        yield "one neuron", Layer(4, O=1, batch=1, size=1).product(64, geometry=POINTWISE)


def direct_layers(thorough):
    for T in range(2, 9) if thorough else (4,):
        yield f"T={T}", Layer(T).product(groups=128)
    yield "8 steps before 1", Layer(9).product(groups=128)
    yield "counts, all else", Layer(16).product(3, count=True).constant().add().add(count=True).add()
    if thorough:
        yield "8 bit, counts", Layer(8).product(128, 128, 8, True)
        yield "beyond 32 bits", Layer(9, batch=2**14, size=64).product(groups=128).add()
        yield "one neuron", Layer(4, O=1, batch=1, size=1).product(1, geometry=POINTWISE)


def other_operators(thorough):
    sizes = ((64, 14, 128, 128), (1, 1, 1, 1), (2**14, 64, 128, 128))
    for batch, size, C, O in sizes if thorough else sizes[:1]:
        pixels = batch, size, size
        for groups in {1, O}:
            vectors = [empty(torch.float64, O), empty(torch.float64, O), words(O), words(O)]
            image, exponent = words(*pixels, C), words(batch)
            analog = image, exponent, empty(torch.int16, 1, 1, C // groups, O), (*POINTWISE, groups), *vectors
            call("conv2d_current", *analog)
            call("conv2d_encode", *analog, words(O), 4)
        current = words(*pixels, C)
        for neuron in ([0, 0, 0], [1, 4, 1], [2, 4, 1], [3, 0, 0]):
            for T in (4, 9):
                call("conv2d_if", [], [], [], [], [], current, words(C), words(C), T, [], neuron)
        call("conv2d_if", [], [], [], [], [], words(9, *pixels, C), words(9, C), words(C), 9)
        totals = empty(torch.uint8, 1, *pixels, C)
        call("conv2d_if", [], [], [], [totals], [words(C)], None, words(C), words(C), 1, [], [4, 8, 0])
        windows = [0, 1, 1] * size
        for T, planes in ((4, 1), (4, 4)):
            maps = empty(torch.uint8, planes, *pixels, C)
            call("pool", maps, windows, windows, 1, T)
            call("count", maps, T, False)
            call("count", maps, T, True)
        call("max_pool", maps, windows, windows)
        call("max_pool", maps, windows, windows, True)
        counts = words(1, *pixels, C)
        call("pool_counts", counts, windows, windows, 0)
        for terms in (1, 2):
            w = [empty(torch.int16, 1, 1, C, O), empty(torch.int16, 0)][:terms]
            gains = [empty(torch.float64, O)] * terms
            inputs = [counts, words(1, *pixels, O)][:terms]
            call("readout", inputs, w, [*POINTWISE, 1] * terms, gains, [1] * terms, empty(torch.float64, O), 4)
    # The check for NaN reads its result: tensors with data.
    for C in (1, 16):
        call("quantize_input", torch.zeros(2, C, 16, 16), torch.arange(C), torch.ones(C), torch.zeros(C))


MAX_TILES = 8


def cases(matrix, thorough):
    """Names, what to call, and which of the candidate tiles to take."""
    if matrix:
        yield from ((name, layer.run, 0) for name, layer in matrix_layers(thorough))
    yield from ((name, layer.run, 0) for name, layer in direct_layers(thorough))
    yield "others", lambda: other_operators(thorough), 0
    if matrix and thorough:
        layers = [Layer(T).product(count=count) for T in (3, 5, 8) for count in (False, True)]
        for tile in range(1, MAX_TILES):
            yield from ((f"tile {tile}", layer.run, tile) for layer in layers)


# ---------------------------------------------------------------------------------- what came out


def nvidia_facts(asm):
    """Instructions from PTX, stack (spills) from the machine code's resource table.

    PTX may fuse mul and add only where they name no rounding, so each must say .rn; .ftz would lose small numbers.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(v) for v in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    matrix = re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*?(?:s8\.s8|i8)\S*", asm["ptx"])
    floats = re.findall(r"\b((?:fma|mad|mul|add|sub|div|rcp)\.\S*f(?:32|64))\b", asm["ptx"])
    inexact = [f for f in floats if not re.fullmatch(r"(?:mul|add|sub|div)\.rn\.f(?:32|64)", f)]
    return {"matrix": sorted(set(matrix)), "registers": registers, "spilled": stack, "inexact": inexact}


def amd_facts(asm):
    """A division of doubles is a chain with five multiply-adds, exact by construction; no other may be there.

    Spilled is what goes to memory (the private segment): scalar registers that do not fit move to lanes of vector
    registers, vector registers to accumulation registers, and LLVM's counts of spills have those in them.
    """
    text = asm["amdgcn"]
    spilled = int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", text).group(1))
    registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text).group(1))
    matrix = sorted(set(re.findall(r"\bv_mfma_i32_\w*i8\b", text)))
    fused = re.findall(r"\bv_(?:pk_)?fma(?:c|mk|ak)?_f64", text)
    inexact = fused[5 * len(re.findall(r"\bv_div_fixup_f64", text)) :]
    # Integer division uses v_fmamk_f32 with constants; a contraction of variables would be one of these.
    inexact += re.findall(r"\bv_(?:pk_)?(?:fma|fmac|mac|mad)_f32", text)
    flags = r"\bf(?:add|sub|mul|div)\b[^,]*\b(?:fast|contract|reassoc|arcp|afn)\b|@llvm\.fm(?:a|uladd)\."
    inexact += re.findall(flags, asm["llir"])
    return {"matrix": matrix, "registers": registers, "spilled": spilled, "inexact": inexact}


class Target:
    """As much of a Triton driver as compilation needs."""

    def __init__(self, backend, arch):
        self.target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def main():
    backend, arch, thorough = sys.argv[1], sys.argv[2], "thorough" in sys.argv[3:]
    assert os.environ.get("TRITON_INTERPRET", "0") == "0"
    triton.runtime.driver.set_active(Target(backend, arch))
    matrix = tb.has_matrix_units(backend, arch, tb.triton_version())
    tb.HIP = backend == "hip"
    tb._matrix_units = lambda device: matrix
    compile_or_launch = triton.JITFunction.run
    case, tile, seen = "", 0, set()

    def take(problem, run, device, interpreted):
        found = triton_tiles.candidates(problem, tb.HIP)
        return found[min(tile, len(found) - 1)]

    tb.tiles.choose = take

    def compile_only(kernel, *args, grid, warmup, **options):
        compiled = compile_or_launch(kernel, *args, grid=grid, warmup=True, **options)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            facts = nvidia_facts(compiled.asm) if backend == "cuda" else amd_facts(compiled.asm)
            facts |= {"shared": compiled.metadata.shared, "steps": options.get("STEPS"), "count": options.get("COUNT0")}
            print(json.dumps({"kernel": kernel.__name__, "case": case, **facts}), flush=True)
        return compiled

    triton.JITFunction.run = compile_only
    for case, call, tile in cases(matrix, thorough):  # noqa: B007 - read above
        call()


if __name__ == "__main__":
    main()
