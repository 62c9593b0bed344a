"""The tables of docs/memory.md and README.md are those of the result file, and what the pages say of them is so."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import recall_report

    return recall_report


@pytest.fixture
def result() -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / "recall-frontier.json").read_text(encoding="utf-8"))


def test_tables_are_those_of_the_result(report, result):
    for name, fill in (("docs/memory.md", report.fill_memory), ("README.md", report.fill_readme)):
        page = (ROOT / name).read_text(encoding="utf-8")
        assert fill(page, result) == page


def test_the_memories_recall_what_the_window_forgets(result):
    rows = {row["name"]: row for row in result["rows"]}
    ours, window = rows["7 heads + 128 slots"], rows["window 64"]
    assert window["recall_share"]["all"]["value"] < 0.2 < 0.8 < ours["recall_share"]["all"]["value"]
    assert ours["recall_share"]["needle"]["value"] == 1.0
    sizes = {name: row["memory"]["bytes_per_sequence"]["4096"] for name, row in rows.items()}
    assert sizes["7 heads + 128 slots"] * 6 < sizes["teacher"]
