"""Releases: which wheels the configuration of cibuildwheel makes, and that the workflow runs what a developer runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert named == {"test_nir.py", "test_spikingjelly.py"}
    assert all((SOURCE / "tests" / file).exists() for file in named)
