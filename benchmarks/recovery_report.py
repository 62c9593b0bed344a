"""
Tables and the plot of docs/recovery.md, from benchmarks/results/ablation.json and recovery.json.

    python benchmarks/recovery_report.py    # writes them into docs/recovery.md, and docs/recovery.png
"""

import argparse
from functools import partial
from pathlib import Path

from pages import DOCS, between_marks, read_result, redraw

from dijiang.evaluate.report.style import drawn, plain
from dijiang.evaluate.report.tables import markdown_table

TICKS = (1, 1.2, 1.5, 2, 3, 4, 6)


def mean(runs: dict[str, dict], key: str) -> str:
    """The mean over seeds, with the range if there are several; a dash where nothing was measured."""
    values = [run[key] for run in runs.values() if key in run]
    if not values:
        return "-"
    spread = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.3f}{spread}"


def map_table(ablation: dict) -> str:
    """Feature maps x window x decay, by perplexity over the teacher's and by relative error."""
    rows = []
    names = list(dict.fromkeys(name.split(", ")[0] for name in ablation["runs"]))
    for name in names:
        row = [name]
        for window in ("window", "no window"):
            for decay in ("none", "learned"):
                row.append(mean(ablation["runs"].get(f"{name}, {window}, {decay} decay", {}), "perplexity_ratio"))
        for decay in ("none", "learned"):
            row.append(mean(ablation["runs"].get(f"{name}, window, {decay} decay", {}), "linear_only_perplexity_ratio"))
        rows.append(row)
    header = ["map", "window", "window, decay", "linear", "linear, decay", "branch alone", "branch alone, decay"]
    return markdown_table(header, rows)


def loss_table(ablation: dict) -> str:
    """Variants of the loss and of the start, for wdcf with m = d and no decay."""
    rows = []
    for window in ("window", "no window"):
        base = f"wdcf m=d, {window}, none decay"
        for name, runs in ablation["runs"].items():
            if name == base or name.startswith(base + ", "):
                variant = name.removeprefix(base).removeprefix(", ") or "combined output"
                keys = ("perplexity_ratio", "relative_error", "linear_only_perplexity_ratio")
                rows.append([f"{variant}, {window}", *(mean(runs, key) for key in keys)])
    return markdown_table(["loss", "perplexity ratio", "relative error", "branch alone"], rows)


def forgetting_table(ablation: dict) -> str:
    """Maps without a window, with learned decay: trained projections, shorter spans and exact sinks are added one by one."""
    base = ", no window, learned decay"
    suffixes = ["", *(f"{forgetting}, projections too" for forgetting in ("", ", short spans", ", short spans, sinks"))]
    rows = []
    for name in dict.fromkeys(name.split(", ")[0] for name in ablation["runs"]):
        if f"{name}{base}{suffixes[-1]}" in ablation["runs"]:
            cells = (mean(ablation["runs"][f"{name}{base}{suffix}"], "perplexity_ratio") for suffix in suffixes)
            rows.append([name, *cells])
    return markdown_table(["map", "kernel trains", "projections too", "and short spans", "and sinks"], rows)


def recovery_table(recovery: dict) -> str:
    """Every stage of every run: tokens and perplexity over the teacher's, with the ablations."""
    rows = []
    for name, run in recovery["runs"].items():
        for stage, measured in run["stages"].items():
            window = [measured.get("window_only", {}).get(length) for length in ("1024", "4096")]
            linear = measured.get("linear_only", {}).get("1024")
            ratios = [measured["ratio"]["1024"], measured["ratio"]["4096"], *window, linear]
            cells = ["-" if x is None else f"{x:,.3f}" for x in ratios]
            rows.append([f"{name}: {stage}", f"{measured['tokens']:,}", *cells])
    header = [
        "run: stage",
        "tokens",
        "1,024",
        "4,096",
        "branch silenced, 1,024",
        "branch silenced, 4,096",
        "branch alone, 1,024",
    ]
    return markdown_table(header, rows)


def plot(recovery: dict, path: Path) -> None:
    """Draw held-out perplexity over the teacher's against tokens of distillation, one line per run."""
    with drawn(path, size=(7, 4)) as (_, axes):
        for name, run in recovery["runs"].items():
            if run["curve"]:
                tokens, perplexities = zip(*run["curve"], strict=True)
                ratios = [perplexity / run["teacher_in_the_run"] for perplexity in perplexities]
                axes.plot(tokens, ratios, "o-", markersize=3, label=name)
        axes.axhline(1.0, color="#4c566a", linewidth=1)
        axes.set_yscale("log")
        axes.set_yticks(TICKS, [str(tick) for tick in TICKS])
        axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:,.0f}")
        plain(axes, x="tokens of distillation", y="held-out perplexity / teacher's")


def fill(page: str, ablation: dict, recovery: dict) -> str:
    """The text of docs/recovery.md with its tables."""
    tables = {
        "maps": map_table(ablation),
        "forgetting": forgetting_table(ablation),
        "losses": loss_table(ablation),
        "runs": recovery_table(recovery),
    }
    return between_marks(page, tables)


def main() -> None:
    recovery = read_result("recovery")
    redraw("recovery", partial(fill, ablation=read_result("ablation"), recovery=recovery))
    plot(recovery, DOCS / "recovery.png")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
