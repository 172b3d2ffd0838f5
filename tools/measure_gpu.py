"""Everything that needs a GPU, in one command of ten minutes: builds, tests, sanitizers, benchmark, profile.

    make gpu                                  into build/gpu/results; or python tools/measure_gpu.py --output FOLDER
    make gpu GPU_ARGS="--budget 1500"         with more time for the benchmark
    make gpu GPU_ARGS="--device cpu"          tries it out without a GPU; nothing is measured

It needs torch, nvcc, cmake, ninja, pybind11, setuptools and pytest, and no network. The package is built into
build/gpu/package for the architecture of the GPU at hand, and on Hopper a second time with wgmma, into build/gpu/wgmma.
Steps run in the order of their worth, each in a process of its own and with a limit of its own. A step that fails, is
stopped at its limit or finds no time left is named, and the others go on; the exit status is 1 then. A step whose tool
is missing says so.

The folder of results holds summary.md, gpu.json (of benchmarks/gpu.py; a second run goes on with it) and what each step
printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build/gpu"
TESTS = str(ROOT / "tests/test_cuda_device.py")
# For the sanitizers, under which a kernel takes many times as long.
FEW = [f"{TESTS}::test_a_few_layers", f"{TESTS}::test_a_network_equals_the_cpu[4-16]"]
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
PROFILED = ((28, 128), (7, 512))  # size and channels of two layers of ResNet-18
HOPPER = (9, 0)


@dataclass
class Step:
    name: str
    limit: float  # seconds
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    needs: Step | None = None  # which must have succeeded
    tool: str = ""  # a program that may not be there
    state: str = ""
    seconds: float = 0.0

    def run(self, log: Path, left: float) -> None:
        """Settle `state`: "ok", or what went wrong. At the limit the children of the command end, too."""
        start = time.monotonic()
        limit = min(self.limit, left)
        with log.open("w") as out:
            print("$", *self.command, file=out, flush=True)
            try:
                process = subprocess.Popen(
                    self.command,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    cwd=log.parent,
                    env=os.environ | self.environment,
                    start_new_session=True,
                )
                code = process.wait(limit)
                self.state = "ok" if code == 0 else f"failed with exit status {code}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self.state = f"failed: stopped after {limit:.0f} s"
            except OSError as error:
                self.state = f"failed: {error}"
        self.seconds = time.monotonic() - start


def plan(results: Path, device: str, left: Callable[[], float]) -> Iterator[Step]:
    """The steps, those of the greatest worth first; each is asked for when the one before has ended."""
    gpu = device != "cpu"
    capability = torch.cuda.get_device_capability() if gpu else HOPPER
    paths = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    path = {"PATH": os.pathsep.join(paths)}

    def build(name: str, target: str, options: str) -> Step:
        settings = {
            "TORCH_CUDA_ARCH_LIST": ".".join(map(str, capability)),
            "QCFS_FAST_CUDA": "on",
            "CMAKE_ARGS": options,
        }
        pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps", "--upgrade"]
        return Step(name, 240 if gpu else 3600, [*pip, "--target", str(BUILD / target), str(ROOT)], path | settings)

    def using(target: str) -> dict[str, str]:
        folders = [str(BUILD / target)] if (BUILD / target).exists() else []
        return path | {"PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}

    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    yield (package := build("build", "package", ""))
    second = []
    if capability == HOPPER:
        yield (wgmma := build("build with wgmma", "wgmma", "-DQCFS_FAST_WGMMA=ON"))
        kernels = ["-k", "layers or large_batches or count_planes or network_equals"]
        yield (tested := Step("tests with wgmma", 90, [*pytest, TESTS, *kernels], using("wgmma"), wgmma))
        second = ["--wgmma", str(BUILD / "wgmma")] if tested.state == "ok" and gpu else []
    yield (tested := Step("tests", 150, [*pytest, TESTS], using("package"), package))
    if tested.state.startswith("failed") and gpu:  # whose fault is it?
        for what in ("clusters", "dependent-launches"):
            without = using("package") | {"QCFS_FAST_CUDA_WITHOUT": what}
            yield Step(f"tests without {what}", 60, [*pytest, TESTS], without, package)

    bench = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--device", device, "--output", str(results / "gpu.json")]
    if not gpu:
        bench += ["--nets", "cifar-resnet20", "--batches", "1", "--steps", "1", "--rounds", "1"]
        bench += ["--only", "16-bit eager"]
        yield Step("benchmark", 120, bench, using("package"), package)
        return
    aims = ["--nets", "resnet18", "cifar-resnet20", "--batches", "1", "128", "256", "--steps", "4", "--budget", "130"]
    aims += ["--only", "fp16|qcfs_fast|wgmma|Triton"]
    yield (measured := Step("benchmark", 200, [*bench, *aims, *second], using("package"), package))
    for tool in SANITIZERS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *pytest, "-x", *FEW]
        uncached = using("package") | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        yield Step(tool, 60, command, uncached, package, "compute-sanitizer")
    profile = ["ncu", "--set", "full", "--clock-control", "none", "--profile-from-start", "off"]
    profile += [sys.executable, str(Path(__file__).resolve()), "--profiled"]
    yield Step("profile", 60, profile, using("package"), package, "ncu")
    rest = ["--budget", f"{left() - 60:.0f}", *second]
    yield Step("rest of the benchmark", left(), [*bench, *rest], using("package"), measured)


def run(steps: Iterator[Step], results: Path, left: Callable[[], float], skipped: list[str]) -> list[Step]:
    """Run the steps; returns them with their states."""
    done = []
    for step in steps:
        done.append(step)
        if step.name in skipped:
            step.state = "left out"
        elif step.needs is not None and step.needs.state not in ("ok", "left out"):
            step.state = f"not run: needs {step.needs.name}"
        elif step.tool and shutil.which(step.tool, path=step.environment.get("PATH")) is None:
            step.state = f"not measured: {step.tool} was not found"
        elif left() <= 0:
            step.state = "not run: no time was left"
        else:
            step.run(results / f"{step.name.replace(' ', '-')}.txt", left())
        print(f"{step.name}: {step.state} ({step.seconds:.0f} s)", flush=True)
    return done


def summary(steps: list[Step], results: Path) -> str:
    """The steps, the aims and the contenders at T = 4, as Markdown."""
    lines = ["| step | state | seconds |", "| --- | --- | --- |"]
    lines += [f"| {s.name} | {s.state} | {s.seconds:.0f} |" for s in steps]
    file = results / "gpu.json"
    if not file.exists():
        return "\n".join([*lines, ""])
    found = json.loads(file.read_text())
    lines = [f"{found['device']}, torch {found['torch']}. {found.get('note', '')}".strip(), "", *lines]
    lines += ["", "| network | batch | aim | found | state |", "| --- | --- | --- | --- | --- |"]
    for row in found["aims"]:
        value = row["found"] if isinstance(row["found"], str) else f"{row['found']:.2f}"
        lines.append(f"| {row['net']} | {row['batch']} | {row['aim']} | {value} | {row['state']} |")
    for entry in found["results"]:
        rows = entry.get("T=4", {}).get("contenders", {})
        if rows:
            lines += ["", f"| {entry['net']}, batch {entry['batch']}, T = 4 | ms |", "| --- | --- |"]
        lines += [
            f"| {n} | {r['error'] if 'error' in r else format(1e3 * r['seconds'], '.3f')} |" for n, r in rows.items()
        ]
    return "\n".join([*lines, ""])


def run_profiled() -> int:
    """Two layers, once to pack their weights and once for the profiler; at batch 1 and 256."""
    import qcfs_fast  # noqa: F401 - registers the operators

    torch.manual_seed(0)
    calls = []
    for size, channels in PROFILED:
        weight = torch.randint(-2000, 2000, (3, 3, channels, channels), dtype=torch.int16, device="cuda")
        bias = torch.zeros(channels, dtype=torch.int32, device="cuda")
        for batch in (1, 256):
            shape = (1, batch, size, size, channels)
            bits = [torch.rand(shape, device="cuda") < 0.15 for _ in range(4)]
            x = sum(bit.to(torch.uint8) << t for t, bit in enumerate(bits))
            calls.append(([x], [weight], [3, 3, 1, 1, 1, 1, 1, 1, 1], [], [], None, bias, bias + 50000, 4))
    for call in calls:
        torch.ops.qcfs_fast.conv2d_if(*call)
    with torch.cuda.profiler.profile():
        for call in calls:
            torch.ops.qcfs_fast.conv2d_if(*call)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=BUILD / "results", help="folder of results")
    parser.add_argument("--budget", type=float, default=590, metavar="SECONDS", help="for everything")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the steps out")
    parser.add_argument(
        "--skip", nargs="+", default=[], metavar="STEP", help="leave out; what needs it takes what is there"
    )
    parser.add_argument("--profiled", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        print("torch sees no GPU here: nothing was run")
        return 2
    if args.profiled:
        return run_profiled()
    results = args.output.resolve()
    results.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.budget
    left = lambda: end - time.monotonic()  # noqa: E731
    steps = run(plan(results, args.device, left), results, left, args.skip)
    (results / "summary.md").write_text(summary(steps, results))
    failed = [s.name for s in steps if s.state.startswith(("failed", "not run"))]
    print(f"written to {results}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
