"""The tables of docs/memory.md and README.md are those of the result file, and what the pages say of them is so."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import recall_report

    return recall_report


def test_tables_are_those_of_the_results(report):
    results = report.read_results()
    for name, fill in (("docs/memory.md", report.fill_memory), ("README.md", report.fill_readme)):
        page = (ROOT / name).read_text(encoding="utf-8")
        assert fill(page, results) == page


def shares(result: dict, kind: str) -> dict[str, float]:
    return {row["name"]: row["recall_share"][kind]["value"] for row in result["rows"]}


def test_the_memories_recall_what_the_window_forgets(report):
    result = report.read_results()["frontier"]
    of_all = shares(result, "all")
    assert (
        of_all["window 64"] < 0.2 < 0.8 < of_all["7 heads + 128 slots"]
        and shares(result, "needle")["7 heads + 128 slots"] == 1.0
    )
    sizes = {row["name"]: row["memory"]["bytes_per_sequence"]["4096"] for row in result["rows"]}
    assert sizes["7 heads + 128 slots"] * 6 < sizes["teacher"]
    constant = next(row for row in result["rows"] if row["name"].startswith("7 heads of"))
    assert constant["memory"]["constant"] and sizes[constant["name"]] < 12 * 2**20
