"""The tables of docs/recovery.md are those of the result files."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import recovery_report

    return recovery_report


def test_tables_are_those_of_the_results(report):
    ablation, recovery = (
        json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("ablation", "recovery")
    )
    page = (ROOT / "docs" / "recovery.md").read_text(encoding="utf-8")
    assert report.fill(page, ablation, recovery) == page
    assert page.count("\n| --- |") == 4


def test_the_readme_says_what_the_runs_came_to():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    runs = json.loads((ROOT / "benchmarks" / "results" / "recovery.json").read_text(encoding="utf-8"))["runs"]
    for name in ("window", "window_only", "linear"):
        stage = runs[name]["stages"]["distill"]
        minutes = round(sum(stage["seconds"]) / 60)
        ratios = " | ".join(f"{stage['ratio'][length]:.3f}" for length in ("1024", "4096"))
        assert f"| {stage['tokens']:,} | {minutes} min | {ratios} |" in readme


def test_means_and_ranges_over_seeds(report):
    assert report.mean({"0": {"x": 1.0}, "1": {"x": 2.0}}, "x") == "1.500 (1.000-2.000)"
    assert report.mean({"0": {"x": 1.0}}, "x") == "1.000" and report.mean({"0": {}}, "x") == "-"
