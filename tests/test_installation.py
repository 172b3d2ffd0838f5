"""info, dispatch and environment variables, in processes of their own where they are read at import."""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import pytest

import qcfs_fast
from qcfs_fast import backend
from qcfs_fast.backend import choice, native
from qcfs_fast.study import command_line

SOURCE = Path(__file__).resolve().parent.parent


def python(*arguments, **environment):
    env = {**os.environ, **environment}
    run = [sys.executable, *arguments]
    return subprocess.run(run, capture_output=True, text=True, env=env, timeout=120, cwd=tempfile.gettempdir())


def test_info(capsys):
    facts = qcfs_fast.info()
    assert facts["qcfs_fast"] == qcfs_fast.__version__
    assert facts["native module"] == "loaded"
    assert facts["kernels in use (cpu)"] in facts["kernel sets this processor runs"]
    out = python("-m", "qcfs_fast", "info", "--json")
    assert out.returncode == 0
    assert json.loads(out.stdout)["kernel sets built"] == facts["kernel sets built"]
    assert command_line.main(["info"]) == 0
    assert re.search(r"kernels in use \(cpu\)\s+\w+", capsys.readouterr().out)


CODE = "import qcfs_fast, sys; print(qcfs_fast.info()['kernels in use (cpu)'])"


def test_instruction_set_cap():
    """`portable` is the set that any processor of the family runs: of the name portable on x86-64, neon on arm64."""
    capped = python("-W", "error", "-c", CODE, QCFS_FAST_MAX_ISA="portable")
    assert capped.stdout.strip() == backend.native.module.kernel_sets()[-1][0], capped.stderr
    assert capped.stdout.strip() in ("portable", "neon")
    bad = python("-c", CODE, QCFS_FAST_MAX_ISA="avx9000")
    assert bad.returncode != 0
    assert "known levels: portable, avx2, avxvnni, avx512, avx512vnni, amx, neon, neondot" in bad.stderr


def test_a_cap_leaves_the_set_of_its_name():
    host = native.host_isa
    for name, _ in backend.kernel_sets():
        assert native.kernel_set(choice.capped_isa(name, host)) == name


def test_backend_variable():
    assert python("-c", CODE, QCFS_FAST_BACKEND="reference").stdout.strip() == "reference"
    bad = python("-c", CODE, QCFS_FAST_BACKEND="abacus")
    assert bad.returncode != 0
    assert "known backends: auto" in bad.stderr


def test_cap_above_the_host_warns():
    with pytest.warns(UserWarning, match="QCFS_FAST_MAX_ISA=avx512 is above this processor"):
        assert choice.capped_isa("avx512", 0) == 0
    everything = native.level_mask("avx512")
    assert choice.capped_isa("", everything) == everything
    assert choice.capped_isa("avx2", everything) == native.level_mask("avx2")


def test_import_without_the_native_module():
    """A missing extension leaves the reference, and info says why."""
    code = (
        "import sys; sys.modules['qcfs_fast._cpu'] = None; import qcfs_fast, torch; "
        "f = qcfs_fast.info(); print(f['kernels in use (cpu)'], '|', f['native module']); "
        "m = torch.nn.Sequential(torch.nn.Linear(3, 4), qcfs_fast.QCFS(4, 1.0), torch.nn.Linear(4, 2)); "
        "m[1].thresh.data.fill_(0.5); print(qcfs_fast.convert(m)(torch.ones(2, 3)).shape)"
    )
    out = python("-c", code)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("reference | absent")
    assert "torch.Size([2, 2])" in out.stdout


def test_import_is_light():
    """Libraries of the demo, the plots and the tests are not needed to run a network."""
    heavy = ("sklearn", "matplotlib", "rich", "torchvision", "triton")
    code = f"import qcfs_fast, sys; print([m for m in {heavy} if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


def test_core_knows_no_torch():
    sources = [p for p in (SOURCE / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".inc", ".cu", ".cuh")]
    assert len(sources) > 10
    for path in sources:
        text = path.read_text(encoding="ascii")
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", text), path
    assert "torch" not in re.findall(r"^import (\w+)|^from (\w+)", (SOURCE / "setup.py").read_text(), re.M)


def test_a_missing_compiler_gives_one_clear_line(tmp_path):
    run = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "t")]
    env = {**os.environ, "PATH": str(tmp_path), "CXX": "no-such-compiler"}
    out = subprocess.run(run, capture_output=True, text=True, env=env, cwd=SOURCE, timeout=120)
    assert out.returncode != 0
    assert out.stderr.strip().splitlines()[-1].startswith("qcfs_fast: no C++ compiler found. Install g++ or clang++")


def test_entry_point():
    """qcfs-fast, where the package is installed and not run from its sources."""
    found = metadata.entry_points(group="console_scripts", name="qcfs-fast")
    declared = re.search(r'^qcfs-fast = "([\w.:]+)"$', (SOURCE / "pyproject.toml").read_text(), re.M)
    assert declared
    assert all(point.value == declared[1] for point in found)
    module, function = declared[1].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_command_line_errors(capsys):
    out = python("-m", "qcfs_fast", "demo", "--epochs", "0")
    assert out.returncode == 2
    assert "argument --epochs: must be at least 1" in out.stderr
    for words, status in (([], 2), (["demo", "--help"], 0)):
        with pytest.raises(SystemExit) as ended:
            command_line.main(words)
        assert ended.value.code == status
    assert "example:" in capsys.readouterr().out
