"""
Tables of docs/memory.md and the first one of README.md, from recall-*.json and memories.json of benchmarks/results.

    python benchmarks/recall_report.py    # writes them
"""

import argparse

from pages import ROOT, between_marks, read_result, redraw

from dijiang.evaluate.recall_frontier.report import frontier_page, value_only
from dijiang.evaluate.report.tables import CONSTANT, markdown_table, mib, number, percent, with_interval

STUDIES = ("frontier", "controls", "lengths", "trained", "trained-lengths")

# configurations of README's table, and what it calls them
SHOWN = {
    "teacher": "the softmax model",
    "window 64": "window of 64 tokens, 4 sinks",
    "7 heads": "window, 7 kept heads, linear state",
    "7 heads + 128 slots, no linear branch": "window, 7 kept heads, 128 slots: what `convert --fit` makes",
    "7 heads of 2000 slots + 192 slots, no linear branch": "constant memory: 2,000 slots in place of every token",
    "7 heads + 128 slots": "window, 7 kept heads, 128 slots, linear state",
}


def ratio(score: dict | None) -> str:
    return with_interval(score and value_only(score), lambda value: f"{value:.3f}x")


def readme_table(result: dict) -> str:
    """What is remembered and what it costs."""
    reference = result["settings"]["reference_length"]
    rows = []
    for name, title in SHOWN.items():
        row = next(row for row in result["rows"] if row["name"] == name)
        shares = [with_interval(value_only(row["recall_share"].get(kind)), percent) for kind in ("needle", "all")]
        perplexity = [ratio(row["perplexity_ratio"][length]) for length in ("1024", "4096")]
        # a checkpoint has its linear state even where the branch is silent
        memory = next((other for other in result["rows"] if f"{other['name']}, no linear branch" == name), row)["memory"]
        growth = CONSTANT if memory["constant"] else f"+{memory['bytes_per_token']:,}"
        rows.append([title, *shares, *perplexity, mib(memory["bytes_per_sequence"][str(reference)]), growth])
    header = [
        "",
        "needle",
        "all kinds of recall",
        "perplexity at 1,024",
        "at 4,096",
        f"memory at {reference:,} tokens",
        "bytes per token",
    ]
    return markdown_table(header, rows)


def length_table(result: dict) -> str:
    """Share of the answers that each configuration gives, by kind and length, and as a share of the teacher's."""
    tasks = [task for task in result["tasks"] if task["kind"] == "recall"]
    header = ["configuration", *(f"{task['settings']['kind']}, {task['settings']['length']:,}" for task in tasks)]
    rows = [[row["name"], *(with_interval(row["values"][task["key"]], percent) for task in tasks)] for row in result["rows"]]
    return markdown_table(header, rows)


def speed_table(result: dict) -> str:
    """Reading over SDPA, and decoding over the same model without memories."""
    rows = []
    for r in result["read"]:
        peer, ours = (1e3 * r["timings"][name]["median_s"] for name in ("sdpa", "memories"))
        times = [f"{peer:,.0f} ms", f"{ours:,.0f} ms", f"{number(r['ratio'])}x"]
        rows.append([f"reading {r['tokens']:,} tokens, {r['dtype']}, over SDPA", *times])
    for r in result["decode"]:
        speeds = [f"{r['tokens_per_s'][name]:,.1f} tokens/s" for name in ("window", "memories")]
        rows.append(
            [f"decoding after {r['tokens']:,} tokens, {r['dtype']}, over no memories", *speeds, f"{number(r['ratio'])}x"]
        )
    return markdown_table(["", "peer", "with memories", "times as fast"], rows)


def fill_memory(page: str, results: dict[str, dict]) -> str:
    """docs/memory.md with its tables."""
    tables = {name: frontier_page(results[name]).strip() for name in ("frontier", "controls", "trained")}
    tables["trained_lengths"] = length_table(results["trained-lengths"])
    tables |= {"lengths": length_table(results["lengths"]), "memories": speed_table(results["memories"])}
    return between_marks(page, tables)


def fill_readme(page: str, results: dict[str, dict]) -> str:
    """README.md with its first table."""
    return between_marks(page, {"recall": readme_table(results["frontier"])})


def read_results() -> dict[str, dict]:
    """The results by study, and `memories`."""
    return {name: read_result(f"recall-{name}") for name in STUDIES} | {"memories": read_result("memories")}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = read_results()
    redraw("memory", lambda page: fill_memory(page, results))
    readme = ROOT / "README.md"
    readme.write_text(fill_readme(readme.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
