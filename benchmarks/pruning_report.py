"""
Tables of docs/pruning.md, from benchmarks/results: pruning.json, pruning-other-text.json and pruning-together/evaluation.json.

    python benchmarks/pruning_report.py    # writes them into docs/pruning.md
"""

import json
import statistics
from pathlib import Path

from recovery_report import between_marks, table

from dijiang.evaluate.report.tables import number

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "pruning.md"
BASELINE = "SparseGPT"


def perplexities(rows: list[dict], method: str, sparsity: float) -> dict[int, float]:
    """By seed."""
    found = [row for row in rows if (row["method"], row["asked"]) == (method, sparsity)]
    return {row["seed"]: row["perplexity"]["pruned"] for row in found}


def change(rows: list[dict], method: str, sparsity: float) -> float | None:
    """Median over seeds of the perplexity over SparseGPT's of the same seed, less 1; None where a seed lacks one of them."""
    ours, base = (perplexities(rows, name, sparsity) for name in (method, BASELINE))
    shared = ours.keys() & base.keys()
    return statistics.median(ours[seed] / base[seed] - 1 for seed in shared) if shared else None


def cell(rows: list[dict], method: str, sparsity: float) -> str:
    """Median and range over seeds, and the change beside SparseGPT."""
    values = list(perplexities(rows, method, sparsity).values())
    if not values:
        return "-"
    number = f"{statistics.median(values):,.{1 if min(values) < 1000 else 0}f}"
    spread = f" ({min(values):,.1f}-{max(values):,.1f})" if len(values) > 1 else ""
    moved = change(rows, method, sparsity)
    beside = "" if moved is None or method == BASELINE else f", {moved:+.1%}"
    return number + spread + beside


def method_table(result: dict, *studies: str) -> str:
    rows = [row for row in result["rows"] if row["study"] in studies]
    sparsities = sorted({row["asked"] for row in rows})
    names = dict.fromkeys(row["method"] for row in rows)
    known = result["rows"]  # the baseline is in the main study
    return table(
        ["", *(f"{sparsity:.0%}" for sparsity in sparsities)],
        [[name, *(cell(known, name, sparsity) for sparsity in sparsities)] for name in names],
    )


def together_table(evaluation: dict) -> str:
    """Teacher and student, dense and sparse, by task."""
    titles = {"teacher": "dense teacher", "student": "dense DiJiang"}
    titles |= {
        key: key.removeprefix("beside:").replace("-", " ") for key in evaluation["subjects"] if key.startswith("beside:")
    }
    rows = []
    for task in evaluation["tasks"]:
        values = [number(task["values"][key]["value"]) for key in titles]
        rows.append([f"{task['kind'].replace('_', '-')}: {task['name']}", *values])
    return table(["", *titles.values()], rows)


def fill(page: str, result: dict, other: dict, together: dict) -> str:
    tables = {study: method_table(result, study) for study in ("methods", "own", "parts")}
    tables["other"] = method_table(other, "methods", "own")
    return between_marks(page, tables | {"together": together_table(together)})


def main() -> None:
    names = ("pruning.json", "pruning-other-text.json", "pruning-together/evaluation.json")
    results = [json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in names]
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), *results), encoding="utf-8")


if __name__ == "__main__":
    main()
