"""Write the tables and plots of docs/accuracy.md from the studies in docs/studies.

    python tools/write_accuracy.py

Each study is results.json of `qcfs-fast study` under its own name. The page has a place for each,
<!-- study NAME --> ... <!-- end -->; what stands between is replaced.
"""

import json
import re
import sys
from pathlib import Path

from qcfs_fast.study import sweep_page

ROOT = Path(__file__).resolve().parent.parent
PLACE = r"(<!-- study ([\w-]+) -->\n).*?(<!-- end -->)"


def written(page: str, folder: Path) -> str:
    """The page with its tables as the studies say."""

    def table(place: re.Match[str]) -> str:
        results = json.loads((folder / f"{place[2]}.json").read_text())
        return f"{place[1]}\n{sweep_page.markdown(results)}\n\n{place[3]}"

    return re.sub(PLACE, table, page, flags=re.S)


def main() -> None:
    page = ROOT / "docs" / "accuracy.md"
    page.write_text(written(page.read_text(), ROOT / "docs" / "studies"))
    for name in sys.argv[1:]:  # studies whose plots the pages show
        results = json.loads((ROOT / "docs" / "studies" / f"{name}.json").read_text())
        folder = ROOT / "docs" / "images"
        for path in sweep_page.write_plots(results, folder):
            path.replace(folder / f"{name}-{path.name}")


if __name__ == "__main__":
    main()
