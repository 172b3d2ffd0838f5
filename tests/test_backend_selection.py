"""The order of GPU backends and its overrides, with fakes in place of the backends."""

import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from layers import random_case

import qcfs_fast
from qcfs_fast import backend
from qcfs_fast.backend import choice, registration
from qcfs_fast.backend.protocol import last_engine
from qcfs_fast.operators.signature import OPERATORS, LinearIf

ORDER = ("cuda", "triton", "reference")


@pytest.fixture
def usable(monkeypatch):
    def only(*names):
        for name in ORDER:
            monkeypatch.setitem(
                backend.absence, name, lambda index=0, name=name: "" if name in names else f"no {name} here"
            )

    return only


def test_order(usable):
    assert choice.GPU_ORDER == ORDER
    with backend.force(gpu="auto"):
        for i, name in enumerate(ORDER):
            usable(*ORDER[i:])
            assert backend.gpu_backend() == name
            assert backend.describe_gpu()["in use"] == name


def test_each_gpu_has_its_own_backend(monkeypatch):
    """A GPU that the CUDA module holds no code for leaves the others to it, and is told of once."""
    monkeypatch.setitem(backend.absence, "cuda", lambda index=0: "no code for GPU 1" if index == 1 else "")
    monkeypatch.setitem(backend.absence, "triton", lambda index=0: "")
    monkeypatch.setattr(choice, "_cuda_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    choice._tell_once.cache_clear()
    with backend.force(gpu="auto"):
        assert choice.backend_on(torch.device("cuda:0")) == "cuda"
        with pytest.warns(RuntimeWarning, match="triton kernels run on cuda:1, since no code for GPU 1"):
            assert choice.backend_on(torch.device("cuda:1")) == "triton"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choice.backend_on(torch.device("cuda:1")) == "triton"
        assert backend.describe_gpu() == {
            "cuda": "GPU 0: usable; GPU 1: no code for GPU 1", "triton": "usable",
            "in use": "GPU 0: cuda; GPU 1: triton",
        }  # fmt: skip
    with backend.force(gpu="cuda"), pytest.raises(RuntimeError, match="asked for, but no code for GPU 1"):
        choice.backend_on(torch.device("cuda:1"))


def test_without_a_cuda_module_nothing_is_told(usable, monkeypatch):
    monkeypatch.setattr(choice, "_cuda_built", lambda: False)
    usable("triton", "reference")
    choice._tell_once.cache_clear()
    with backend.force(gpu="auto"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.backend_on(torch.device("cuda:0")) == "triton"


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


@pytest.mark.parametrize("name", ["cpu", "cuda", "triton", "reference"])
def test_every_operator_has_a_kernel(name):
    """A linear layer is a convolution to all of them."""
    if name == "triton":
        pytest.importorskip("triton")
    kinds = set(registration.kernels(name).by_kind) & set(OPERATORS)  # the page on adding one registers its own
    assert kinds == {kind for kind in OPERATORS if not issubclass(kind, LinearIf)}


def test_threads_force_their_own():
    """Two threads inside `force` at once: each keeps its own choice, and the one that leaves first undoes nothing."""
    inside, leave = threading.Barrier(2), threading.Barrier(2)
    mask = min((m for _, m in backend.kernel_sets()), default=0)
    seen = {}

    def work(name, **asked):
        before = backend.settings()
        with backend.force(**asked):
            inside.wait(timeout=30)
            seen[name] = backend.settings()
            if name == "second":
                leave.wait(timeout=30)
                seen["second, alone"] = backend.settings()
        if name == "first":
            leave.wait(timeout=30)
        seen[f"{name}, after"] = backend.settings() == before

    threads = [
        threading.Thread(target=work, args=("first",), kwargs={"cpu_engine": "events", "reference": True}),
        threading.Thread(target=work, args=("second",), kwargs={"cpu_engine": "dense", "isa_mask": mask}),
    ]
    outside = backend.settings()
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert (seen["first"].engine, seen["first"].reference) == ("events", True)
    assert (seen["second"].engine, seen["second"].isa) == ("dense", mask)
    assert seen["second"].reference == outside.reference
    assert seen["second, alone"] == seen["second"]
    assert seen["first, after"]
    assert seen["second, after"]
    assert backend.settings() == outside


def test_a_forced_choice_is_what_runs_in_each_thread():
    """The results and the engine that ran, of operators called in threads that force different engines."""
    if backend.native.module is None:
        pytest.skip("needs the native module")

    def takes(case, engine):
        with backend.force(cpu_engine=engine):
            torch.ops.qcfs_fast.conv2d_if(*case.operands)
            return last_engine.get() == engine

    cases = (random_case(seed, 4, max_pixels=6) for seed in range(3, 100))
    # One that both take: without VNNI, dense takes no counts above 127.
    case = next(case for case in cases if takes(case, "events") and takes(case, "dense"))
    failures = []

    def work(engine):
        for _ in range(50):
            with backend.force(cpu_engine=engine):
                out = torch.ops.qcfs_fast.conv2d_if(*case.operands)
                if last_engine.get() != engine or not np.array_equal(out.numpy(), case.want.masks):
                    failures.append(engine)

    threads = [threading.Thread(target=work, args=(engine,)) for engine in ("events", "dense") * 2]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


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
            assert choice.triton_on_cpu() is expected


def test_triton_versions():
    assert "not installed" in choice.triton_absence(None)
    for version in ("2.1.0", "3.2.0", "3.2.1+git123"):
        assert f"{version} is too old" in choice.triton_absence(version)
    for version in ("3.3.0", "3.3.1+gitc8757738", "3.10.0", "4.0"):
        assert choice.triton_absence(version) == ""


@pytest.mark.parametrize(
    ("version", "says"), [(None, "Triton is not installed"), ("3.2.0", "Triton 3.2.0 is too old; 3.3 or newer")]
)
def test_without_a_usable_triton_only_info_changes(version, says, monkeypatch):
    monkeypatch.setattr(choice, "triton_version", lambda: version)
    monkeypatch.setitem(backend.absence, "cuda", lambda index=0: "no cuda here")
    choice._triton_absence.cache_clear()
    try:
        facts = qcfs_fast.info()
        assert facts["triton"] == version
        assert facts["gpu backends"]["triton"].startswith(says)
        assert facts["gpu backends"]["in use"] == "reference"
        assert backend.describe() in ("reference", *(name for name, _ in backend.kernel_sets()))
        z, n = torch.tensor([[3]], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
        masks = torch.ops.qcfs_fast.linear_if([], [], [], [], z, torch.zeros_like(n), n, 4)
        assert masks.item() == 0b1011  # membranes 5, 4, 3, 6
        with backend.force(gpu="triton"), pytest.raises(RuntimeError, match=f"asked for, but {says[:20]}"):
            backend.gpu_backend()
    finally:
        choice._triton_absence.cache_clear()


def test_a_broken_triton_is_passed_over(usable, monkeypatch):
    usable("reference")
    monkeypatch.setattr(choice, "triton_version", lambda: "3.9.0")
    monkeypatch.setitem(backend.absence, "triton", choice._triton_absence)

    def broken(name, package=None):
        raise OSError("libtriton.so: file too short")

    choice._triton_absence.cache_clear()
    monkeypatch.setattr(choice.importlib, "import_module", broken)
    try:
        assert backend.gpu_backend() == "reference"
        assert "OSError: libtriton.so: file too short" in backend.describe_gpu()["triton"]
    finally:
        choice._triton_absence.cache_clear()


@pytest.mark.parametrize("name", choice.BACKENDS)
def test_environment(name, monkeypatch):
    monkeypatch.setenv("QCFS_FAST_BACKEND", name)
    assert choice._chosen_backend() == name


def test_unknown_name_lists_the_known(monkeypatch):
    monkeypatch.setenv("QCFS_FAST_BACKEND", "tritn")
    with pytest.raises(ValueError, match="'tritn' is unknown; known backends: auto, cuda, triton, reference"):
        choice._chosen_backend()


def test_every_name_and_variable_is_documented():
    text = (Path(__file__).resolve().parent.parent / "docs" / "backends.md").read_text()
    for name in (
        *choice.BACKENDS, "QCFS_FAST_BACKEND", "QCFS_FAST_MAX_ISA", "QCFS_FAST_ENGINE", "QCFS_FAST_TRITON_TUNE",
        "QCFS_FAST_CACHE_DIR", "TRITON_INTERPRET",
    ):  # fmt: skip
        assert f"`{name}" in text, name
