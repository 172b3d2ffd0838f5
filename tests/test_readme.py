"""The README's code runs as printed, and its table of variables is complete."""

import os
import re
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent


def test_code_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (SOURCE / "README.md").read_text(), re.S)
    assert blocks
    header = f"import sys; sys.path.insert(0, {str(SOURCE / 'tests')!r}); import torchvision_models\n"
    for code in blocks:
        run = [sys.executable, "-c", header + code]
        out = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert out.returncode == 0, out.stderr
    assert (tmp_path / "snn.safetensors").stat().st_size > 0


def test_every_variable_is_documented():
    code = "\n".join(p.read_text() for p in [*(SOURCE / "qcfs_fast").glob("*.py"), SOURCE / "setup.py"])
    read = set(re.findall(r"environ\.get\(\"(\w+)\"", code))
    text = (SOURCE / "README.md").read_text()
    assert read
    assert not [name for name in read if f"`{name}`" not in text]


def test_sources_are_ascii():
    for folder in ("csrc", "qcfs_fast", "tests", "benchmarks", "examples"):
        for path in (SOURCE / folder).rglob("*"):
            if path.suffix in {".py", ".h", ".cpp", ".inc", ".cu", ".cuh"}:
                path.read_text(encoding="ascii")
    assert os.access(SOURCE / ".ci" / "run", os.X_OK)
