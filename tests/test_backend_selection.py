"""The order of GPU backends and its overrides, with fakes in place of the backends."""

import inspect
import os
import subprocess
import sys

import pytest

from qcfs_fast import backend, ops, reference

ORDER = ("cuda", "triton", "reference")


@pytest.fixture
def usable(monkeypatch):
    def only(*names):
        for name in ORDER:
            monkeypatch.setitem(backend.absence, name, lambda name=name: "" if name in names else f"no {name} here")

    return only


def test_order(usable):
    assert backend.GPU_ORDER == ORDER
    with backend.force(gpu="auto"):
        for i, name in enumerate(ORDER):
            usable(*ORDER[i:])
            assert backend.gpu_backend() == name
            assert backend.describe_gpu()["in use"] == name


def test_a_backend_asked_for_is_never_replaced(usable):
    for name, other in (("cuda", "triton"), ("triton", "cuda")):
        usable(name, "reference")
        for chosen in (name, "reference"):
            with backend.force(gpu=chosen):
                assert backend.gpu_backend() == chosen
        with backend.force(gpu=other):
            with pytest.raises(RuntimeError, match=f"no {other} here"):
                backend.gpu_backend()
            assert f"no {other} here" in backend.describe_gpu()["in use"]
    with pytest.raises(ValueError, match="auto, cuda, triton, reference"), backend.force(gpu="opencl"):
        pass


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_every_operator_has_a_launcher(name):
    """All take the arguments that the reference takes, so that ops.py need not know which one runs."""
    if name == "triton":
        pytest.importorskip("triton")
    operators = backend.operators(name)
    assert set(operators) == set(ops.NAMES)
    for operator, function in operators.items():
        wanted = list(inspect.signature(getattr(reference, operator)).parameters)
        assert list(inspect.signature(function).parameters)[: len(wanted)] == wanted


def test_cpu_tensors_take_triton_only_when_interpreted(usable, monkeypatch):
    usable("triton", "reference")
    for interpret, requested, expected in (
        ("1", "triton", True),
        ("0", "triton", False),
        ("1", "auto", False),
        ("1", "reference", False),
    ):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        with backend.force(gpu=requested):
            assert backend.triton_on_cpu() is expected


def test_triton_versions():
    assert "not installed" in backend.triton_absence(None)
    for version in ("2.1.0", "3.2.0", "3.2.1+git123"):
        assert f"{version} is too old" in backend.triton_absence(version)
    for version in ("3.3.0", "3.3.1+gitc8757738", "3.10.0", "4.0"):
        assert backend.triton_absence(version) == ""


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-P", "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_import_does_not_load_triton():
    done = run("import qcfs_fast, sys; print('triton' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("name", backend.BACKENDS)
def test_environment(name):
    done = run("from qcfs_fast import backend; print(backend.requested)", QCFS_FAST_BACKEND=name)
    assert done.stdout.strip() == name, done.stderr


def test_unknown_name_lists_the_known():
    done = run("import qcfs_fast", QCFS_FAST_BACKEND="tritn")
    assert done.returncode != 0
    assert "auto, cuda, triton, reference" in done.stderr
