"""Everything that README.md and docs/*.md show is run: python blocks and cheap commands, in order, in an empty folder.

A page is one namespace, as a reader types it into one session. A ```console block runs too, through the command line in
this process, unless the line before it is <!-- not run by the tests: REASON -->; then its commands must still parse.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torchvision_models  # noqa: F401 - makes torchvision importable here

import qcfs_fast
from qcfs_fast.study import command_line

SOURCE = Path(__file__).resolve().parent.parent
PAGES = [
    SOURCE / "README.md",
    SOURCE / "CONTRIBUTING.md",
    SOURCE / "CHANGELOG.md",
    *sorted((SOURCE / "docs").glob("*.md")),
]
BLOCK = re.compile(r"(?:<!-- not run by the tests: ([^>]+) -->\n)?```(\w+)\n(.*?)^```", re.S | re.M)


def blocks(page, *kinds):
    """(line, reason to skip or None, kind, text) of a page's blocks, in order."""
    text = page.read_text()
    return [(text.count("\n", 0, m.start(3)) + 1, m[1], m[2], m[3]) for m in BLOCK.finditer(text) if m[2] in kinds]


def commands(text):
    """The lines of a console block, without comments; continued lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QCFS_FAST_BACKEND", raising=False)
    results = SOURCE / "docs" / "benchmark-results.json"
    if results.exists():
        shutil.copy(results, tmp_path)
    namespace = {"__name__": "__main__"}
    for line, reason, kind, text in blocks(page, "python", "console"):
        if kind == "python" and reason is None:
            exec(compile("\n" * (line - 1) + text, str(page), "exec"), namespace)
        elif kind == "console" and reason is None:
            for command in commands(text):
                words = shlex.split(command)
                assert words[0] == "qcfs-fast", f"{page.name}:{line}: mark {command!r} as not run by the tests"
                assert command_line.main(words[1:]) == 0, f"{page.name}:{line}: {command}\n{capsys.readouterr().err}"


def test_commands_not_run_are_understood():
    parser, found = command_line._parser(), 0
    for page in PAGES:
        for line, _, _, text in blocks(page, "console"):
            for command in commands(text):
                words = shlex.split(command)
                if "qcfs_fast" in words:
                    words = words[words.index("qcfs_fast") :]
                if words[0] in ("qcfs-fast", "qcfs_fast"):
                    found += 1
                    assert parser.parse_args(words[1:]).run, f"{page.name}:{line}: {command}"
                elif words[0] == "make":
                    assert re.search(rf"^{words[1]}:", (SOURCE / "Makefile").read_text(), re.M), command
    assert found > 5


def test_a_wrong_block_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "text\n```python\nx = 1\n```\n<!-- not run by the tests: slow -->\n```console\nqcfs-fast demo\n```\n"
    )
    found = blocks(page, "python", "console")
    assert found == [(3, None, "python", "x = 1\n"), (7, "slow", "console", "qcfs-fast demo\n")]


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_variable_is_documented():
    code = "\n".join(p.read_text() for p in [*(SOURCE / "qcfs_fast").rglob("*.py"), SOURCE / "setup.py"])
    read = set(re.findall(r"environ\.get\(\"(\w+)\"", code))
    text = (SOURCE / "README.md").read_text() + (SOURCE / "docs" / "backends.md").read_text()
    assert read
    assert not [name for name in read if not re.search(rf"`{name}\b", text)]


def test_every_page_states_the_version_of_the_package():
    assert f"\nversion: {qcfs_fast.__version__}\n" in (SOURCE / "CITATION.cff").read_text()
    assert re.findall(r"^## (\d\S+) - ", (SOURCE / "CHANGELOG.md").read_text(), re.M)[0] == qcfs_fast.__version__


def test_sources_are_ascii():
    for folder in ("csrc", "qcfs_fast", "tests", "benchmarks", "examples", "tools"):
        for path in (SOURCE / folder).rglob("*"):
            if path.suffix in {".py", ".h", ".cpp", ".inc", ".cu", ".cuh"}:
                path.read_text(encoding="ascii")
    for page in PAGES:
        page.read_text(encoding="ascii")
    assert os.access(SOURCE / ".ci" / "run", os.X_OK)


def test_the_neuron_is_drawn_by_its_script(tmp_path):
    pytest.importorskip("matplotlib")
    run = [sys.executable, str(SOURCE / "tools" / "draw_neuron.py"), str(tmp_path)]
    subprocess.run(run, check=True, timeout=120)
    drawn = (tmp_path / "neuron.svg").read_text()
    assert "<svg" in drawn
    assert len(drawn) > 10000


@pytest.fixture(scope="module")
def write_accuracy():
    spec = importlib.util.spec_from_file_location("write_accuracy", SOURCE / "tools" / "write_accuracy.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_the_three_numbers_are_of_one_study(write_accuracy):
    readme = (SOURCE / "README.md").read_text()
    assert readme.count("<!-- numbers shipped -->") == 1
    assert write_accuracy.written(readme, SOURCE / "docs" / "studies") == readme
    found = json.loads((SOURCE / "docs" / "studies" / "shipped.json").read_text())
    seconds = {"ANN QCFS fp32": 0.009, "ANN QCFS fp32 compiled": 0.006, "ANN QCFS bf16": 0.001}
    seconds |= {"T-loop fp32, T = 4": 0.050, "T-loop fp32 compiled, T = 4": 0.040, "T-loop fp32, T = 2": 0.001}
    seconds |= {f"{cell}, T = {T}": 0.001 * T for cell in found["cells"] for T in found["steps"]}
    where = {"device": "a processor", "threads": 2, "kernels": "avx2", "versions": {"torch": "9.8"}}
    found["latency"] = {"1": {"machine": where, "seconds": seconds}}
    text = " ".join(write_accuracy.numbers("shipped", found).split())
    kept = " / ".join(f"{right / 100:.1f}" for right in found["cells"]["offset (window 4), 16 bits"]["right"])
    for said in (
        f"ANN {found['ann']['fp32']['right'] / 100:.1f} %",
        f"at T = 1 / 2 / 4 / 8, offset neurons {kept} %",
        "T = 4, batch 1: plain neurons are 10.0 times as fast",
        "offset neurons at T = 2 are 3.0 times as fast, plain neurons at T = 4 1.5 times",
        "a processor, 2 threads, kernels avx2, torch 9.8",
    ):
        assert said in text


def test_accuracy_is_what_the_studies_say(write_accuracy):
    page = (SOURCE / "docs" / "accuracy.md").read_text()
    shown = re.findall("<!-- (?:study|seeds) (.+) -->", page)
    assert {name for names in shown for name in names.split()} == {
        path.stem for path in (SOURCE / "docs" / "studies").glob("*.json")
    }
    assert write_accuracy.written(page, SOURCE / "docs" / "studies") == page
