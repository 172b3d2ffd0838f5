"""The notebooks of docs/gallery run as they stand, and the outputs kept in them are what they print today."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "docs" / "gallery").glob("*.ipynb"))


def words(text):
    """A text but for its numbers: some depend on the machine's floating point."""
    return re.sub(r"[\s\d.,]+", " ", text)


def test_there_are_three():
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    namespace, pictures = {"__name__": "__main__"}, 0
    for number, cell in enumerate(json.loads(path.read_text(encoding="ascii"))["cells"]):
        if cell["cell_type"] != "code":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), namespace)
        kinds = [output["output_type"] for output in cell["outputs"]]
        kept = "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")
        assert words(kept) == words(printed.getvalue()), f"cell {number}: run `make gallery`"
        assert set(kinds) <= {"stream", "display_data"}
        pictures += sum("image/png" in o["data"] for o in cell["outputs"] if o["output_type"] == "display_data")
    assert path.stem == "convert-a-checkpoint" or pictures == 1
