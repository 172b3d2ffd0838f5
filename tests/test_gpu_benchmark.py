"""benchmarks/gpu.py and tools/measure_gpu.py (make gpu) from end to end on a CPU, as far as possible.

No figure is looked at.
"""

import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import qcfs_fast

ROOT = Path(__file__).resolve().parent.parent


def script(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu_benchmark, measure_gpu = script("benchmarks/gpu.py"), script("tools/measure_gpu.py")


def no_compiler(model):
    raise RuntimeError("no compiler today")


def run(monkeypatch, output, *options):
    command = "gpu.py --device cpu --nets cifar-resnet20 --batches 2 --rounds 1 --output"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(output), *options])
    return gpu_benchmark.main()


def test_the_whole_script_on_a_cpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # put back at the end
    output = tmp_path / "gpu.json"
    assert run(monkeypatch, output, "--steps", "4", "1") == 0
    result = json.loads(output.read_text())
    assert "no figure in it is a measurement" in result["note"]
    (entry,) = result["results"]
    for T in (1, 4):
        found = entry[f"T={T}"]
        assert 0 < found["firing rate"] < 1
        contenders = found["contenders"]
        assert {n for n, r in contenders.items() if "error" not in r} == {
            "ANN fp16 eager", "ANN bf16 eager", "T-loop fp16 eager", "T-loop fp32 eager", "qcfs_fast 16-bit eager",
            "qcfs_fast 8-bit eager", "qcfs_fast 8-bit sum eager",
        }  # fmt: skip
        # What fails is listed with its error and has no figure.
        failed = contenders["T-loop fp16 compiled"]
        assert failed["seconds"] == "not measured"
        assert "no compiler today" in failed["error"]
        assert len(found["layers (16-bit)"]) == len(found["layers (8-bit)"]) == 18
    assert {row["state"] for row in result["aims"]} == {"not measured"}
    printed = capsys.readouterr().out
    assert "equal to the CPU" in printed
    assert "not measured: RuntimeError: no compiler today" in printed


def test_a_run_goes_on_where_the_last_one_ended(monkeypatch, tmp_path):
    """And one whose time is up begins no part."""
    output = tmp_path / "gpu.json"
    assert run(monkeypatch, output, "--only", "16-bit eager", "--steps", "1", "--budget", "-1") == 0
    assert json.loads(output.read_text())["results"] == []
    assert run(monkeypatch, output, "--only", "16-bit eager", "--steps", "1") == 0
    (entry,) = json.loads(output.read_text())["results"]
    assert list(entry["T=1"]["contenders"]) == ["qcfs_fast 16-bit eager"]
    asked = []
    monkeypatch.setattr(gpu_benchmark, "measure_network", lambda *a: asked.append(a[-1]) or [])
    assert run(monkeypatch, output, "--steps", "2", "1") == 0
    assert asked == [[2]]
    assert json.loads(output.read_text())["results"] == [entry]


def test_a_wrong_answer_in_any_row_is_not_timed(monkeypatch, tmp_path):
    """Of images that the CPU did not see, too: what is compared is the call that is timed, on the whole batch."""

    class Network:
        wrong = torch.zeros(30)

        def __call__(self, x, T):
            return x.sum((1, 2, 3)) + self.wrong[: len(x)]

        def cpu(self):
            return Network()

    snn, images = Network(), torch.randn(30, 1, 2, 2)
    table = gpu_benchmark.Table(gpu_benchmark.Clock(torch.device("cpu")), 1)
    expected = gpu_benchmark.Expected(snn, images, 4)
    table.attempt("right", lambda: lambda: snn(images, 4), expected.equals)
    for row in (0, 5, 29):
        snn.wrong = torch.eye(30)[row]
        table.attempt(f"wrong in {row}", lambda: lambda: snn(images, 4), expected.equals)
    assert list(table.contenders) == ["right"]
    assert all("another answer" in error for error in table.errors.values())
    assert len(table.errors) == 3


def test_who_takes_part_on_a_gpu(monkeypatch):
    """With fakes of what needs one: graphs of everybody, Triton, and the kernels of a second module."""
    clock = type("Fake", (), {"__call__": lambda self, run: 1.0, "events": True})()
    table = gpu_benchmark.Table(clock, 1, "16-bit|fp16")
    images = torch.randn(9, 3, 8, 8)
    monkeypatch.setattr(gpu_benchmark, "graphed", lambda run: run)
    monkeypatch.setattr(gpu_benchmark, "on_triton", contextlib.nullcontext)
    own, second, seen = gpu_benchmark.cuda_backend.module, object(), []

    class Graph:
        def __init__(self, snn, images, T):
            seen.append(gpu_benchmark.cuda_backend.module)
            self.output, self.graph = None, SimpleNamespace(replay=lambda: setattr(self, "output", snn(images, T)))

    monkeypatch.setattr(qcfs_fast, "cuda_graph", Graph)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    prepared = qcfs_fast.prepare(model, levels=4)
    qcfs_fast.calibrate(prepared, [images], progress=False)
    gpu_benchmark.ann_contenders(table, model, images)
    gpu_benchmark.loop_contenders(table, gpu_benchmark.loop_steps(prepared, images), 4)
    gpu_benchmark.snn_contenders(table, {"16-bit": qcfs_fast.convert(prepared)}, images, 4, second)
    assert table.errors == {}
    assert seen == [own, second]
    assert gpu_benchmark.cuda_backend.module is own
    forms = ("eager", "compiled", "CUDA graph", "compiled, CUDA graph")
    loops = ("eager", "compiled", "eager, CUDA graph", "compiled, CUDA graph")
    assert set(table.contenders) == {
        *(f"ANN fp16 {form}" for form in forms), *(f"T-loop fp16 {form}" for form in loops),
        *(f"{kernels} 16-bit {form}" for kernels in ("qcfs_fast", "wgmma") for form in ("eager", "CUDA graph")),
        "Triton 16-bit eager",
    }  # fmt: skip


def test_the_aims_compare_with_the_best_ann():
    """The compiled one that is a CUDA graph is among its forms."""
    times = {
        "ANN fp16 eager": 5.0, "ANN fp16 compiled": 4.0, "ANN fp16 CUDA graph": 3.0,
        "ANN fp16 compiled, CUDA graph": 1.0, "ANN bf16 CUDA graph": 0.1,
        "qcfs_fast 16-bit eager": 2.0, "qcfs_fast 16-bit CUDA graph": 0.55, "qcfs_fast 8-bit sum CUDA graph": 0.5,
        "T-loop fp16 compiled, CUDA graph": 3.0, "T-loop fp32 eager": 30.0,
    }  # fmt: skip
    table = {name: {"seconds": seconds} for name, seconds in times.items()}
    entries = [{"net": "resnet18", "batch": b, "T=4": {"contenders": table}} for b in (1, 256)]
    found = gpu_benchmark.aims({"results": entries})
    assert [row["state"] for row in found] == ["met", "missed", "met", "met", "not measured", "met"]
    assert [row["found"] for row in found[:4]] == pytest.approx([0.55, 3 / 0.55, 0.55, 2.0])
    table["qcfs_fast 16-bit eager"]["error"] = f"AssertionError: {gpu_benchmark.UNEQUAL}"
    assert gpu_benchmark.aims({"results": entries})[-1]["state"] == "missed"


def test_without_a_gpu_nothing_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(output)])
    assert gpu_benchmark.main() == 2
    assert "nothing was measured" in capsys.readouterr().out
    assert not output.exists()


@pytest.mark.parametrize("name", gpu_benchmark.NETS)
def test_the_networks_of_the_table(name):
    make, size = gpu_benchmark.NETS[name]
    assert size == (32 if name.startswith("cifar") else 224)
    with torch.device("meta"):
        assert make()(torch.empty(2, 3, size, size)).shape[0] == 2


def test_the_one_command_on_a_cpu(monkeypatch, tmp_path, capsys):
    """Without the builds, which take minutes: what is installed is measured."""
    monkeypatch.setenv("PYTHONPATH", str(Path(qcfs_fast.__file__).parent.parent))
    command = ["measure_gpu.py", "--device", "cpu", "--output", str(tmp_path), "--skip", "build", "build with wgmma"]
    monkeypatch.setattr(sys, "argv", [*command, "tests with wgmma", "tests"])
    assert measure_gpu.main() == 0
    summary = (tmp_path / "summary.md").read_text()
    assert "| build | left out | 0 |" in summary
    assert "| benchmark | ok |" in summary
    assert "| all | all | equal to the CPU kernels |  | not measured |" in summary
    assert "no figure in it is a measurement" in summary
    assert "written to" in (tmp_path / "benchmark.txt").read_text()
    assert "failed" not in capsys.readouterr().out


def test_a_step_that_fails_is_named_and_the_others_go_on(tmp_path):
    def step(name, code="", **more):
        return measure_gpu.Step(name, more.pop("limit", 60), [sys.executable, "-c", code], **more)

    broken = step("broken", "print('because'); raise SystemExit(3)")
    slow = step("slow", "import time; time.sleep(600)", limit=0.5)
    rows = [broken, slow, step("after", needs=broken), step("tool", tool="no-such-tool"), step("fine")]
    rows += [step("skipped"), step("late")]
    left = iter([9, 9, 9, 9, 9, 9, 0])  # asked twice by a step that runs
    steps = measure_gpu.run(iter(rows), tmp_path, lambda: next(left), ["skipped"])
    assert [s.state for s in steps] == [
        "failed with exit status 3", "failed: stopped after 0 s", "not run: needs broken",
        "not measured: no-such-tool was not found", "ok", "left out", "not run: no time was left",
    ]  # fmt: skip
    assert "because" in (tmp_path / "broken.txt").read_text()
    assert "| slow | failed: stopped after 0 s | 0 |" in measure_gpu.summary(steps, tmp_path).replace("| 1 |", "| 0 |")


def test_the_steps_on_a_gpu(monkeypatch, tmp_path):
    """On Hopper a second build, which is timed beside the first where its tests passed."""
    for capability, wgmma in (((9, 0), "ok"), ((9, 0), "failed"), ((8, 9), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        steps = []
        for step in measure_gpu.plan(tmp_path, "cuda", lambda: 100.0):
            step.state = wgmma if step.name == "tests with wgmma" else "ok"
            steps.append(step)
        names = [s.name for s in steps]
        assert ("build with wgmma" in names) == (capability == (9, 0))
        assert all("--wgmma" in s.command for s in steps if "benchmark" in s.name) == (wgmma == "ok")
        assert steps[0].environment["TORCH_CUDA_ARCH_LIST"] == f"{capability[0]}.{capability[1]}"
        assert names[-8:] == [
            "tests", "benchmark", "memcheck", "racecheck", "synccheck", "initcheck", "profile", "rest of the benchmark"
        ]  # fmt: skip
