"""The order of GPU backends and its overrides, with fakes in place of the backends."""

import inspect
from pathlib import Path

import pytest
import torch

import qcfs_fast
from qcfs_fast import backend
from qcfs_fast.backend import registration as ops
from qcfs_fast.operators import reference

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


@pytest.mark.parametrize(
    ("version", "says"), [(None, "Triton is not installed"), ("3.2.0", "Triton 3.2.0 is too old; 3.3 or newer")]
)
def test_without_a_usable_triton_only_info_changes(version, says, monkeypatch):
    monkeypatch.setattr(backend, "triton_version", lambda: version)
    monkeypatch.setitem(backend.absence, "cuda", lambda: "no cuda here")
    backend._triton_absence.cache_clear()
    try:
        facts = qcfs_fast.info()
        assert facts["triton"] == version
        assert facts["gpu backends"]["triton"].startswith(says)
        assert facts["gpu backends"]["in use"] == "reference"
        assert backend.describe() in ("reference", *(name for name, _ in backend.kernel_sets()))
        z, n = torch.tensor([[3]], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
        assert torch.ops.qcfs_fast.encode(z, n, 4).item() == 0b1011  # membranes 5, 4, 3, 6
        with backend.force(gpu="triton"), pytest.raises(RuntimeError, match=f"asked for, but {says[:20]}"):
            backend.gpu_backend()
    finally:
        backend._triton_absence.cache_clear()


def test_a_broken_triton_is_passed_over(usable, monkeypatch):
    usable("reference")
    monkeypatch.setattr(backend, "triton_version", lambda: "3.9.0")
    monkeypatch.setitem(backend.absence, "triton", backend._triton_absence)

    def broken(name, package=None):
        raise OSError("libtriton.so: file too short")

    backend._triton_absence.cache_clear()
    monkeypatch.setattr(backend.importlib, "import_module", broken)
    try:
        assert backend.gpu_backend() == "reference"
        assert "OSError: libtriton.so: file too short" in backend.describe_gpu()["triton"]
    finally:
        backend._triton_absence.cache_clear()


@pytest.mark.parametrize("name", backend.BACKENDS)
def test_environment(name, monkeypatch):
    monkeypatch.setenv("QCFS_FAST_BACKEND", name)
    assert backend._chosen_backend() == name


def test_unknown_name_lists_the_known(monkeypatch):
    monkeypatch.setenv("QCFS_FAST_BACKEND", "tritn")
    with pytest.raises(ValueError, match="'tritn' is unknown; known backends: auto, cuda, triton, reference"):
        backend._chosen_backend()


def test_every_name_and_variable_is_documented():
    text = (Path(__file__).resolve().parent.parent / "docs" / "backends.md").read_text()
    for name in (
        *backend.BACKENDS, "QCFS_FAST_BACKEND", "QCFS_FAST_MAX_ISA", "QCFS_FAST_ENGINE", "QCFS_FAST_TRITON_TUNE",
        "QCFS_FAST_CACHE_DIR", "TRITON_INTERPRET",
    ):  # fmt: skip
        assert f"`{name}" in text, name
