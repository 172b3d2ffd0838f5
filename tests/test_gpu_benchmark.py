"""benchmarks/gpu.py from end to end on a CPU: what it would do on a GPU, as far as possible; no figure is looked at."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks/gpu.py")
gpu_benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_benchmark)


def test_the_whole_script_on_a_cpu(monkeypatch, tmp_path, capsys):
    def no_compiler(model):
        raise RuntimeError("no compiler today")

    monkeypatch.setattr(torch, "compile", no_compiler)
    output = tmp_path / "gpu.json"
    command = "gpu.py --device cpu --nets cifar-resnet20 --batches 2 --steps 1 4 --rounds 1 --output"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(output)])
    assert gpu_benchmark.main() == 0
    result = json.loads(output.read_text())
    assert "no figure in it is a measurement" in result["note"]
    (entry,) = result["results"]
    assert entry["equal to CPU"] == {"16": True, "8": True}
    for T in (1, 4):
        found = entry[f"T={T}"]
        assert 0 < found["firing rate"] < 1
        contenders = found["contenders"]
        assert {n for n, r in contenders.items() if "error" not in r} == {
            "ANN fp16 eager", "ANN bf16 eager", "T-loop fp16 eager", "T-loop fp32 eager", "qcfs_fast 16-bit eager",
            "qcfs_fast 8-bit eager",
        }  # fmt: skip
        # What fails is listed with its error and has no figure.
        failed = contenders["T-loop fp16 compiled"]
        assert failed["seconds"] == "not measured"
        assert "no compiler today" in failed["error"]
        assert len(found["layers (16-bit)"]) == len(found["layers (8-bit)"]) == 18
    assert set(entry["aims"]) >= {"best T-loop / 16-bit (aim >= 4)"}
    printed = capsys.readouterr().out
    assert "equal to the CPU" in printed
    assert "not measured: RuntimeError: no compiler today" in printed


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
