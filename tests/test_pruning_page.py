"""The tables of docs/pruning.md are those of the result files, and budgets were equal."""

import json
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import pruning_report

    return pruning_report


@pytest.fixture
def result() -> dict:
    return json.loads((RESULTS / "pruning.json").read_text(encoding="utf-8"))


def test_tables_are_those_of_the_results(report, result):
    page = (ROOT / "docs" / "pruning.md").read_text(encoding="utf-8")
    names = ("pruning-other-text.json", "pruning-together/evaluation.json")
    other, together = (json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in names)
    assert report.fill(page, result, other, together) == page
    assert f"on the held-out text is {result['dense']:.2f} before pruning" in page
    assert f"perplexity {other['dense']:.2f} before" in page


def test_the_readme_shows_the_medians(report, result):
    shown = {
        "Wanda": "Wanda",
        "SparseGPT": "SparseGPT",
        "mixed sparsity (ISC, arXiv 2310.09499)": "ISC + weight",
        "ours, the options above": "OBS + loss + rows + matrix",
    }
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for title, method in shown.items():
        medians = [statistics.median(report.perplexities(result["rows"], method, share).values()) for share in (0.5, 0.6, 0.7)]
        assert f"| {title} | {' | '.join(f'{x:.1f}' for x in medians)} |" in readme
    assert f"dense {result['dense']:.2f}, with" in readme


def test_budgets_are_equal(result):
    assert all(abs(row["sparsity"] - row["asked"]) < 1e-4 for row in result["rows"])


def test_changes_are_between_rows_of_one_seed(report):
    def row(method, seed, pruned):
        return {"method": method, "asked": 0.5, "seed": seed, "perplexity": {"pruned": pruned}}

    rows = [row("SparseGPT", 0, 10.0), row("SparseGPT", 1, 20.0), row("ours", 0, 9.0), row("ours", 1, 10.0)]
    assert report.change(rows, "ours", 0.5) == pytest.approx(-0.3)
    assert report.change(rows, "ours", 0.7) is None
    assert report.cell(rows, "ours", 0.5) == "9.5 (9.0-10.0), -30.0%"
    assert report.cell(rows, "SparseGPT", 0.5) == "15.0 (10.0-20.0)" and report.cell(rows, "none", 0.5) == "-"
