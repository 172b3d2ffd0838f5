"""The documentation's site: every page is in it, the API page holds all public names, it builds without a warning."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qcfs_fast

SOURCE = Path(__file__).resolve().parent.parent


def test_every_page_is_in_the_menu():
    nav = (SOURCE / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    pages = [*(SOURCE / "docs").glob("*.md"), *(SOURCE / "docs").glob("gallery/*.ipynb")]
    assert sorted(re.findall(r": (\S+\.(?:md|ipynb))", nav)) == sorted(
        str(p.relative_to(SOURCE / "docs")) for p in pages
    )


def test_the_api_page_holds_every_public_name():
    named = re.findall(r"^::: qcfs_fast\.(\S+)$", (SOURCE / "docs" / "api.md").read_text(), re.M)
    assert len(named) == len(set(named))
    assert {name for name in named if "." not in name} == set(qcfs_fast.__all__) - {"__version__"}
    assert {name for name in named if "." in name} == {f"exchange.{name}" for name in qcfs_fast.exchange.__all__}


def test_public_functions_describe_their_arguments():
    functions = [getattr(qcfs_fast, name) for name in qcfs_fast.__all__ if inspect.isfunction(getattr(qcfs_fast, name))]
    assert len(functions) > 10
    for function in functions:
        silent = [p for p in inspect.signature(function).parameters if not re.search(rf"\b{p}\b", function.__doc__)]
        assert silent == [], function.__name__


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="needs mkdocs-material")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("mkdocs_jupyter")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "site" / "api" / "index.html").read_text()
    assert 'id="qcfs_fast.SNN.predict"' in page
    assert "https://fonts" not in page
    for notebook in (SOURCE / "docs" / "gallery").glob("*.ipynb"):
        assert "jp-OutputArea" in (tmp_path / "site" / "gallery" / notebook.stem / "index.html").read_text()
