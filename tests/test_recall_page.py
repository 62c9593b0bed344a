"""The tables of docs/memory.md and README.md are those of the result files, and what the page says of them is so."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import recall_report

    return recall_report


@pytest.fixture
def results() -> tuple[dict, dict]:
    frontier, lengths = (json.loads((RESULTS / f"recall-{name}.json").read_text("utf-8")) for name in ("frontier", "lengths"))
    return frontier, lengths


def test_tables_are_those_of_the_results(report, results):
    for name, fill in (("docs/memory.md", report.fill_memory), ("README.md", report.fill_readme)):
        page = (ROOT / name).read_text(encoding="utf-8")
        assert fill(page, *results) == page


def test_both_files_are_of_one_model_and_one_window(results):
    frontier, lengths = results
    assert frontier["teacher"] == lengths["teacher"] and frontier["dtype"] == lengths["dtype"]
    assert frontier["settings"]["attention_window"] == lengths["settings"]["attention_window"] == 64
    shared = {row["name"] for row in frontier["rows"]} & {row["name"] for row in lengths["rows"]}
    assert {"teacher", "7 heads + 128 slots"} <= shared
