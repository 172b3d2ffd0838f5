"""Releases: the wheels that cibuildwheel is told to make, what the workflow runs, and how the module is linked."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qcfs_fast.backend import native

SOURCE = Path(__file__).resolve().parent.parent


WHEELS = [
    ("linux", "x86_64", "manylinux_x86_64"),
    ("linux", "aarch64", "manylinux_aarch64"),
    ("macos", "arm64", "macosx_arm64"),
]


@pytest.mark.parametrize(("platform", "arch", "name"), WHEELS)
def test_wheels(platform, arch, name):
    pytest.importorskip("cibuildwheel")
    command = [sys.executable, "-m", "cibuildwheel", "--platform", platform, "--archs", arch]
    done = subprocess.run(
        [*command, "--print-build-identifiers"], cwd=SOURCE, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"cp3{minor}-{name}" for minor in (10, 11, 12, 13)]


def test_workflow():
    """It must be sound YAML, and its jobs call the scripts that stand beside the sources."""
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((SOURCE / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    steps = {name: [step.get("run") or step["uses"] for step in job["steps"]] for name, job in jobs.items()}
    assert ".ci/run" in steps["check"]
    assert any(step.startswith("pypa/cibuildwheel@v") for step in steps["wheels"])
    assert jobs["publish"]["needs"] == ["check", "wheels", "sdist"]
    assert jobs["publish"]["if"] == "startsWith(github.ref, 'refs/tags/v')"
    named = set(re.findall(r"test_\w+\.py", " ".join(steps["exchange"])))
    assert {"test_nir.py", "test_spikingjelly.py", "test_batch.py"} <= named
    assert all((SOURCE / "tests" / file).exists() for file in named)


@pytest.mark.skipif(
    native.module is None or not sys.platform.startswith("linux") or shutil.which("readelf") is None,
    reason="needs the native module of Linux, and readelf",
)
def test_the_native_module_is_hardened():
    """Symbols are bound at load and their table is then read-only; stacks hold canaries and no code."""
    said = subprocess.run(
        ["readelf", "-dlW", native.module.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "BIND_NOW" in said
    assert "GNU_RELRO" in said
    assert re.search(r"GNU_STACK.* RW +0x", said)
    symbols = subprocess.run(["readelf", "--dyn-syms", "-W", native.module.__file__], capture_output=True, text=True)
    assert "__stack_chk_fail" in symbols.stdout
