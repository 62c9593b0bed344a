"""
Tables of docs/memory.md and the first one of README.md, from benchmarks/results/recall-frontier.json and recall-lengths.json.

    python benchmarks/recall_report.py    # writes them
"""

import argparse

from pages import ROOT, between_marks, read_result, redraw

from dijiang.evaluate.recall_frontier.report import bytes_of, frontier_page, value_only
from dijiang.evaluate.report.tables import CONSTANT, markdown_table, mib, percent, with_interval

# configurations of README's table, and what it calls them
SHOWN = {
    "teacher": "the softmax model",
    "window 64": "window of 64 tokens, 4 sinks",
    "7 heads + 128 slots, no linear branch": "+ 7 kept heads + exact memory",
    "7 heads + 128 slots": "+ linear state: what `convert --fit` makes",
    "7 heads of 4096 slots + 128 slots": "the same with constant memory",
}
KINDS = ("needle", "associative recall")


def recall_of(row: dict, kind: str, result: dict) -> dict:
    """The values of a row for a kind of recall, by length."""
    tasks = [task for task in result["tasks"] if task["settings"].get("kind") == kind]
    return {task["settings"]["length"]: row["values"][task["key"]] for task in tasks}


def share_of_answers(score: dict | None) -> str:
    return with_interval(score, lambda value: f"{value:.2f}")


def ratio(score: dict | None) -> str:
    return with_interval(score and value_only(score), lambda value: f"{value:.3f}x")


def readme_table(frontier: dict, lengths: dict) -> str:
    """What is remembered and what it costs: the 48-sample values where there are any, all kinds from the frontier."""
    reference = frontier["settings"]["reference_length"]
    rows = []
    for name, title in SHOWN.items():
        row = next(row for row in frontier["rows"] if row["name"] == name)
        exact = next((other for other in lengths["rows"] if other["name"] == name), None)
        source, result = (row, frontier) if exact is None else (exact, lengths)
        values = [
            with_interval(value_only(recall_of(source, kind, result)[1024]), lambda value: f"{value:.2f}") for kind in KINDS
        ]
        share = with_interval(value_only(row["recall_share"]["all"]), percent)
        perplexity = [ratio((exact or row)["perplexity_ratio"][length]) for length in ("1024", "4096")]
        memory = row["memory"]
        growth = CONSTANT if memory["constant"] else f"+{memory['bytes_per_token']:,}"
        rows.append([title, *values, share, *perplexity, mib(bytes_of(row, frontier)), growth])
    header = ["", "needle", "word pairs", "six kinds of recall", "perplexity at 1,024", "at 4,096"]
    return markdown_table([*header, f"memory at {reference:,} tokens", "bytes per token"], rows)


def lengths_table(result: dict) -> str:
    """Needle and associative recall by length, with intervals."""
    lengths = result["settings"]["recall_lengths"]
    header = ["", *(f"{kind}, {length:,}" for kind in KINDS for length in lengths)]
    header += [f"perplexity at {int(length):,}" for length in result["rows"][0]["perplexity_ratio"]]
    rows = []
    for row in result["rows"]:
        cells = [recall_of(row, kind, result).get(length) for kind in KINDS for length in lengths]
        shown = [share_of_answers(cell) for cell in cells]
        rows.append([row["name"], *shown, *(ratio(score) for score in row["perplexity_ratio"].values())])
    return markdown_table(header, rows)


def fill_memory(page: str, frontier: dict, lengths: dict) -> str:
    """docs/memory.md with its tables."""
    return between_marks(page, {"frontier": frontier_page(frontier).strip(), "lengths": lengths_table(lengths)})


def fill_readme(page: str, frontier: dict, lengths: dict) -> str:
    """README.md with its first table."""
    return between_marks(page, {"recall": readme_table(frontier, lengths)})


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = read_result("recall-frontier"), read_result("recall-lengths")
    redraw("memory", lambda page: fill_memory(page, *results))
    readme = ROOT / "README.md"
    readme.write_text(fill_readme(readme.read_text(encoding="utf-8"), *results), encoding="utf-8")


if __name__ == "__main__":
    main()
