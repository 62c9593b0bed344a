"""Pages of docs/ whose tables are drawn from result files."""

import json
from collections.abc import Callable
from pathlib import Path

from dijiang.evaluate.report.results import use_new_names

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"


def read_result(name: str) -> dict:
    """The content of benchmarks/results/NAME.json."""
    return use_new_names(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))


def between_marks(page: str, tables: dict[str, str]) -> str:
    """`page` with each table between its marks, `<!-- name:start -->` and `<!-- name:end -->`."""
    for name, rows in tables.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        before, rest = page.split(start)
        page = f"{before}{start}\n{rows}\n{end}{rest.split(end)[1]}"
    return page


def redraw(name: str, fill: Callable[[str], str]) -> None:
    """Replace docs/NAME.md by what `fill` returns for its text."""
    path = DOCS / f"{name}.md"
    path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
