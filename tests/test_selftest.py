"""qcfs-fast selftest: it covers all that can run, and a kernel that is wrong in one comparison does not pass."""

import json

import pytest
import torch

import qcfs_fast
from qcfs_fast import backend
from qcfs_fast.backend import native
from qcfs_fast.operators import reference
from qcfs_fast.study import command_line, selftest

needs_native = pytest.mark.skipif(native.module is None, reason="needs the native module")


@needs_native
def test_success_names_every_kernel_set_and_engine(capsys):
    assert command_line.main(["selftest"]) == 0
    lines = capsys.readouterr().out.splitlines()
    ways = {f"cpu {name}, {engine}" for name, _ in backend.kernel_sets() for engine in backend.ENGINES}
    assert {line[:26].strip() for line in lines if line.endswith("as the reference") and "answers as" in line} >= ways
    assert lines[-1].startswith("SUCCESS: ")
    assert max(map(len, lines)) <= 80


@needs_native
def test_engines_really_run():
    """Each engine that was asked for ran at least one layer of the network."""
    snn = qcfs_fast.convert(selftest.network(), T=selftest.T)
    for engine in ("events", "dense", "table"):
        with backend.force(cpu_engine=engine):
            snn(selftest.images())
        assert engine in [getattr(layer, "engine", "") for layer in snn.spiking_layers.values()]


@needs_native
def test_a_strict_comparison_is_found(monkeypatch, capsys):
    """Where v > n stands for v >= n, spikes differ: the network's membranes do meet their thresholds."""

    def strict(currents, n, v, limit, sent=None):
        return plain(currents, n + 1, v, limit, sent)

    plain = reference._run
    monkeypatch.setattr(reference, "_run", strict)
    assert command_line.main(["selftest", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["passed"] is False
    assert said["report"][-1] == "FAILURE: see above"
    assert any("answers FAILED" in line for line in said["report"])
    assert any("16 bits, plain: spikes of join:" in line for line in said["report"])


@needs_native
def test_an_error_in_one_way_leaves_the_others(monkeypatch):
    first = backend.kernel_sets()[0]
    monkeypatch.setattr(backend, "kernel_sets", lambda: [("none", 1 << 30), first])
    monkeypatch.setattr(selftest, "SETTINGS", selftest.SETTINGS[:1])
    found = list(selftest.checks())
    assert len(found) == 2 * len(backend.ENGINES)
    assert all(f"{check.faults}".count("lacks some of the instruction sets") for check in found[: len(backend.ENGINES)])
    assert not any(check.faults for check in found[len(backend.ENGINES) :])


def test_an_absent_native_module_is_a_failure(monkeypatch):
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "error", "no such file")
    lines = []
    assert selftest.selftest(lines.append) is False
    assert "the native module cannot be loaded: no such file" in "".join(lines)


def test_silent_neurons_prove_nothing(monkeypatch, capsys):
    model = selftest.network()
    model.block.bias.data = torch.full_like(model.block.bias, -100.0)
    monkeypatch.setattr(selftest, "network", lambda: model)
    assert command_line.main(["selftest"]) == 1
    assert "spikes of join have a rate of 0.000, which proves nothing" in capsys.readouterr().err


def test_gpu_backends_that_can_run_are_among_the_ways(monkeypatch):
    """Names, settings and devices; the kernels themselves are those of tests/test_cuda_device.py."""
    absence = {"cuda": lambda: "", "triton": lambda: "too old", "reference": lambda: ""}
    monkeypatch.setattr(backend, "absence", absence)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = [(name, device) for name, _, device in selftest._ways() if not name.startswith("cpu")]
    assert gpu == [("gpu cuda", "cuda"), ("gpu reference", "cuda")]
    assert [selftest._not_run(name) for name in ("cuda", "triton")] == ["", "too old"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert all(name.startswith("cpu") for name, _, _ in selftest._ways())
    assert selftest._not_run("cuda") == "torch sees no GPU"
