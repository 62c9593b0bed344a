"""
Table of docs/memory.md and the first one of README.md, from benchmarks/results/recall-frontier.json.

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
    "7 heads": "window, 7 kept heads, linear state",
    "7 heads + 128 slots, no linear branch": "window, 7 kept heads, 128 slots",
    "7 heads + 128 slots": "all of it: what `convert --fit` makes",
}


def ratio(score: dict | None) -> str:
    return with_interval(score and value_only(score), lambda value: f"{value:.3f}x")


def readme_table(result: dict) -> str:
    """What is remembered and what it costs."""
    rows = []
    for name, title in SHOWN.items():
        row = next(row for row in result["rows"] if row["name"] == name)
        shares = [with_interval(value_only(row["recall_share"].get(kind)), percent) for kind in ("needle", "all")]
        perplexity = [ratio(row["perplexity_ratio"][length]) for length in ("1024", "4096")]
        memory = row["memory"]
        growth = CONSTANT if memory["constant"] else f"+{memory['bytes_per_token']:,}"
        rows.append([title, *shares, *perplexity, mib(bytes_of(row, result)), growth])
    reference = f"memory at {result['settings']['reference_length']:,} tokens"
    header = ["", "needle", "all kinds of recall", "perplexity at 1,024", "at 4,096", reference, "bytes per token"]
    return markdown_table(header, rows)


def fill_memory(page: str, result: dict) -> str:
    """docs/memory.md with its table."""
    return between_marks(page, {"frontier": frontier_page(result).strip()})


def fill_readme(page: str, result: dict) -> str:
    """README.md with its first table."""
    return between_marks(page, {"recall": readme_table(result)})


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    result = read_result("recall-frontier")
    redraw("memory", lambda page: fill_memory(page, result))
    readme = ROOT / "README.md"
    readme.write_text(fill_readme(readme.read_text(encoding="utf-8"), result), encoding="utf-8")


if __name__ == "__main__":
    main()
