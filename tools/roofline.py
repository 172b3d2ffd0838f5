"""Estimates how long the layers of two networks take on a GPU, and what binds them. None of it is measured.

    python tools/cuda_report.py --output report.json
    python tools/roofline.py report.json [--layers]

The tile and split of K of a layer are what csrc/cuda/cost_model.h chooses, asked through a program that g++ compiles.
The report has the instructions that a stage, 64 bytes of K, executes. A block of S stages needs, in cycles,

    tensor   S * rows * cols * 64 * T / macs             in the first layer six products of digits, and T = 1
    issue    warps / 4 * (S * stage + outside) / 0.75    instructions; a quarter of the slots is lost to waiting
    L2       S * (rows + cols) * 64 / l2
    fp64     outputs * double                            in the first layer

A layer takes the largest of these times the blocks of a multiprocessor, or its fixed cost where that is more: rounds of
blocks, two at once, each of which begins, waits for every stage as if alone, and ends. Launches come on top. What is
only moved takes its bytes at the memory's rate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parent.parent / "csrc"
T = 4


class Gpu(NamedTuple):
    """Rates of data sheets, by cycle and multiprocessor where nothing else is said."""

    capability: int
    multiprocessors: int
    gigahertz: float
    macs: float  # int8, of mma.sync: on Hopper 62 % of the rate, as is reported
    l2: float  # bytes
    memory: float  # bytes a nanosecond, of the whole GPU
    double: float  # cycles an output of the first layer: three double operations and two conversions
    shared: int  # bytes that a block may have
    launch: float = 1.0  # microseconds between dependent kernels of a graph


GPUS = {
    "H100": Gpu(90, 132, 1.755, 2560, 24, 3350, 3 / 64 + 2 / 16, 232448),
    "A100": Gpu(80, 108, 1.41, 2048, 24, 2039, 3 / 32 + 2 / 16, 166912),
    "RTX 4090": Gpu(89, 128, 2.52, 1024, 24, 1008, 5 / 2, 101376),
}
# Image and first layer: size, kernel, stride; whether a pool follows. Then blocks of a stage, and channels.
NETWORKS = {
    "ResNet-18 at 224": (224, 7, 2, True, 2, (64, 128, 256, 512)),
    "ResNet-20 at 32": (32, 3, 1, False, 3, (16, 32, 64)),
}
# Instructions of a warp outside of its stages: along the branches taken at four steps, counted by hand for sm_90.
OUTSIDE = {"conv_if_kernel": 1700, "image_tensor_kernel": 1400}
PLANS = """
#include <cstdio>
#include <cstdlib>
#include "cuda/kernels/tensor_layout.h"
using namespace qcfs::cuda;
int main(int, char** argv) {
  const int capability = std::atoi(argv[2]);
  const bool hopper = capability >= 90;
  const Device device{std::atoi(argv[1]), capability, std::atoi(argv[3]), hopper ? 8 : 1, hopper};
  Work w{};
  int from, projected;
  while (std::scanf("%ld %ld %ld %d %d %d", &w.pixels, &w.out_channels, &w.steps, &w.digits, &from, &projected) == 6) {
    w.stages = stages_of(9, from) + stages_of(1, projected);
    const Choice c = choose_tile(w, device);
    const int T = compiled_steps(w.steps);
    const TileShape s = tile_shape(T, c.tile);
    const double beside = c.cluster ? cluster_overhead : c.splits > 1 ? second_launch : 0;
    std::printf("%ld %d %d %d %d %d %f %f %f\\n", w.stages, s.rows, s.cols, s.warps, c.splits,
                together(s, T, c.cluster, device.capability), stage_latency, block_overhead, beside);
  }
}
"""


class Plan(NamedTuple):
    stages: float  # of K, for one digit of the weights
    rows: int
    cols: int
    warps: int
    splits: int
    together: int  # blocks on a multiprocessor
    latency: float  # cycles: of a stage, of a block, of joining split sums
    overhead: float
    joining: float


class Cost(NamedTuple):
    layer: str
    milliseconds: float
    binds: str
    cycles: Mapping[str, float]  # of a multiprocessor, by what may bind


def convolutions(network: str) -> list[tuple[int, int, int, int]]:
    """Of each spiking layer: output's size, its channels, input's channels, those of a projection shortcut's input."""
    size, _, stride, pooled, blocks, widths = NETWORKS[network]
    size //= stride * (2 if pooled else 1)
    layers, before = [], widths[0]
    for width, _ in itertools.product(widths, range(blocks)):
        size //= 2 if width != before else 1
        layers += [(size, width, before, 0), (size, width, width, before if width != before else 0)]
        before = width
    return layers


def plans(network: str, batch: int, digits: int, gpu: Gpu, program: Path) -> list[Plan]:
    """Of each spiking layer, by `program`, which is PLANS, compiled."""
    lines = [f"{batch * n**2} {out} {T} {digits} {c} {more}" for n, out, c, more in convolutions(network)]
    command = [str(program), *map(str, (gpu.multiprocessors, gpu.capability, gpu.shared))]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=True)
    return [Plan(*map(float, line.split())) for line in done.stdout.splitlines()]


def estimate(network: str, batch: int, digits: int, gpu: Gpu, stage: Mapping[str, int], program: Path) -> list[Cost]:
    """Of each layer; `stage` comes from stages_in()."""
    size, kernel, stride, pooled, _, widths = NETWORKS[network]

    def moved(layer: str, size: float, launches: int) -> Cost:
        return Cost(layer, batch * size / gpu.memory * 1e-6 + launches * gpu.launch * 1e-3, "memory", {})

    def multiplied(layer: str, code: str, pixels: int, width: int, S: float, p: Plan) -> Cost:
        """`S` stages a block, for all digits."""
        first = code == "image_tensor_kernel"
        blocks = math.ceil(pixels / p.rows) * math.ceil(width / p.cols) * p.splits
        on_sm = math.ceil(blocks / gpu.multiprocessors)
        tensor = S * p.rows * p.cols * 64 * (6 if first else T) / gpu.macs
        cycles = {
            "tensor": on_sm * tensor,
            "issue": on_sm * p.warps / 4 * (S * stage[code] + OUTSIDE[code.split("<")[0]]) / 0.75,
            "L2": on_sm * S * (p.rows + p.cols) * 64 / gpu.l2,
            "fp64": on_sm * p.rows * p.cols * gpu.double * first,
            "fixed": math.ceil(on_sm / p.together) * (tensor + S * p.latency + p.overhead) + p.joining,
        }
        binds = max(cycles, key=lambda what: cycles[what])
        return Cost(layer, cycles[binds] / gpu.gigahertz * 1e-6 + gpu.launch * 1e-3, binds, cycles)

    chosen, out, S = plans(network, batch, digits, gpu, program), size // stride, math.ceil(kernel**2 / 8) / 2
    first = Plan(S, 32, 64, 4, 1, 4, chosen[0].latency, chosen[0].overhead, 0)
    costs = [moved("quantize", 36 * size**2, 3)]
    costs.append(multiplied("image", "image_tensor_kernel", batch * out**2, widths[0], S, first))
    if pooled:
        costs.append(moved("max pool", 1.25 * out**2 * widths[0], 1))
    for (n, width, c, more), p in zip(convolutions(network), chosen, strict=True):
        name = f"{c}{f'+{more}' if more else ''} to {width} at {n}: {p.rows:.0f}x{p.cols:.0f}, K/{p.splits:.0f}"
        code, S = f"conv_if_kernel<{T}, 1, {p.cols:.0f},", digits * math.ceil(p.stages / p.splits)
        costs.append(multiplied(name, code, batch * n**2, width, S, p))
    return [*costs, moved("count, pool, readout", 5 * n**2 * width, 3)]


def stages_in(report: Mapping, gpu: Gpu) -> dict[str, int]:
    """Instructions that a stage executes, by the beginning of the kernel's name, of the code that this GPU takes."""
    built = {int(r["arch"].rstrip("a")) for r in report["kernels"]}
    served = max(a for a in built if a <= gpu.capability and a // 10 == gpu.capability // 10)
    loops = {r["kernel"]: r["loop"] for r in report["kernels"] if r["arch"].rstrip("a") == str(served)}
    names = ["image_tensor_kernel", *(f"conv_if_kernel<{T}, 1, {cols}," for cols in (64, 32))]
    return {n: min(loop["executed"] for k, loop in loops.items() if k.startswith(n) and loop) for n in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="JSON of tools/cuda_report.py")
    parser.add_argument("--layers", action="store_true", help="a line for each layer, not only sums")
    args = parser.parse_args()
    report = json.loads(args.report.read_text())
    print("estimates in ms, none measured")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "plans")
        subprocess.run(
            ["g++", "-std=c++17", f"-I{CSRC}", "-xc++", "-", "-o", program], input=PLANS, text=True, check=True
        )
        for name, network, batch, digits in itertools.product(GPUS, NETWORKS, (1, 256), (2, 1)):
            costs = estimate(network, batch, digits, GPUS[name], stages_in(report, GPUS[name]), program)
            image, spiking = (sum(c.milliseconds for c in costs if w in c.layer) for w in ("image", " to "))
            rest = sum(c.milliseconds for c in costs) - image - spiking
            print(f"{name:9}{network}, batch {batch:3}, {8 * digits:2} bits: ", end="")
            print(f"image {image:.3f}, spiking {spiking:.3f}, rest {rest:.3f}, all {image + spiking + rest:.3f}")
            for c in costs if args.layers else ():
                cycles = "  ".join(f"{what} {n:.0f}" for what, n in c.cycles.items())
                print(f"    {c.layer:36}{c.milliseconds:8.4f}  {c.binds:7} {cycles}")


if __name__ == "__main__":
    main()
