"""
Tables of docs/pruning.md, from benchmarks/results: pruning.json, pruning-other-text.json and pruning-together/evaluation.json.

    python benchmarks/pruning_report.py    # writes them into docs/pruning.md
"""

import argparse
import statistics

from pages import between_marks, read_result, redraw

from dijiang.evaluate.report.tables import markdown_table, number

RESULTS = ("pruning", "pruning-other-text", "pruning-together/evaluation")
BASELINE = "SparseGPT"


def perplexities(rows: list[dict], method: str, sparsity: float) -> dict[int, float]:
    """Perplexity of the pruned model by seed."""
    chosen = [row for row in rows if (row["method"], row["asked"]) == (method, sparsity)]
    return {row["seed"]: row["perplexity"]["pruned"] for row in chosen}


def change(rows: list[dict], method: str, sparsity: float) -> float | None:
    """Median over seeds of the perplexity over SparseGPT's of the same seed, less 1; None where a seed lacks one of them."""
    ours, base = (perplexities(rows, name, sparsity) for name in (method, BASELINE))
    shared = ours.keys() & base.keys()
    return statistics.median(ours[seed] / base[seed] - 1 for seed in shared) if shared else None


def cell(rows: list[dict], method: str, sparsity: float) -> str:
    """Median and range over seeds, and the change against SparseGPT."""
    values = list(perplexities(rows, method, sparsity).values())
    if not values:
        return "-"
    median = f"{statistics.median(values):,.{1 if min(values) < 1000 else 0}f}"
    spread = f" ({min(values):,.1f}-{max(values):,.1f})" if len(values) > 1 else ""
    difference = change(rows, method, sparsity)
    against = "" if difference is None or method == BASELINE else f", {difference:+.1%}"
    return median + spread + against


def method_table(result: dict, *studies: str) -> str:
    rows = [row for row in result["rows"] if row["study"] in studies]
    sparsities = sorted({row["asked"] for row in rows})
    names = dict.fromkeys(row["method"] for row in rows)
    return markdown_table(
        ["", *(f"{sparsity:.0%}" for sparsity in sparsities)],
        # all rows of the result, because the baseline is in the main study
        [[name, *(cell(result["rows"], name, sparsity) for sparsity in sparsities)] for name in names],
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
    return markdown_table(["", *titles.values()], rows)


def fill(page: str, result: dict, other: dict, together: dict) -> str:
    """The text of docs/pruning.md with its tables."""
    tables = {study: method_table(result, study) for study in ("methods", "own", "parts")}
    tables["other"] = method_table(other, "methods", "own")
    return between_marks(page, tables | {"together": together_table(together)})


def main() -> None:
    results = [read_result(name) for name in RESULTS]
    redraw("pruning", lambda page: fill(page, *results))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
