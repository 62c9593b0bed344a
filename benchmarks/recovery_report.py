"""
Tables and the plot of docs/recovery.md, from benchmarks/results/ablation.json and recovery.json.

    python benchmarks/recovery_report.py    # writes them into docs/recovery.md, and docs/recovery.png
"""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
TICKS = (1, 1.2, 1.5, 2, 3, 4, 6)
PAGE = Path(__file__).parents[1] / "docs" / "recovery.md"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean(runs: dict[str, dict], key: str) -> str:
    """Over seeds, with the range if there are several; a dash where nothing was measured."""
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
    return table(header, rows)


def loss_table(ablation: dict) -> str:
    """Variants of the loss and the start, of wdcf with m = d and no decay."""
    rows = []
    for window in ("window", "no window"):
        base = f"wdcf m=d, {window}, none decay"
        for name, runs in ablation["runs"].items():
            if name == base or name.startswith(base + ", "):
                variant = name.removeprefix(base).removeprefix(", ") or "combined output"
                keys = ("perplexity_ratio", "relative_error", "linear_only_perplexity_ratio")
                rows.append([f"{variant}, {window}", *(mean(runs, key) for key in keys)])
    return table(["loss", "perplexity ratio", "relative error", "branch alone"], rows)


def forgetting_table(ablation: dict) -> str:
    """Maps without a window, with learned decay: training the projections too, shorter spans, exact sinks, one on another."""
    base = ", no window, learned decay"
    suffixes = ["", *(f"{forgetting}, projections too" for forgetting in ("", ", short spans", ", short spans, sinks"))]
    rows = []
    for name in dict.fromkeys(name.split(", ")[0] for name in ablation["runs"]):
        if f"{name}{base}{suffixes[-1]}" in ablation["runs"]:
            found = (ablation["runs"][f"{name}{base}{suffix}"] for suffix in suffixes)
            rows.append([name, *(mean(runs, "perplexity_ratio") for runs in found)])
    return table(["map", "kernel trains", "projections too", "and short spans", "and sinks"], rows)


def recovery_table(recovery: dict) -> str:
    """Every stage of every run: tokens and perplexity over the teacher's, with the controls."""
    rows = []
    for run, found in recovery["runs"].items():
        for stage, measured in found["stages"].items():
            controls = [measured.get("window_only", {}).get(length) for length in ("1024", "4096")]
            linear = measured.get("linear_only", {}).get("1024")
            numbers = [measured["ratio"]["1024"], measured["ratio"]["4096"], *controls, linear]
            shown = ["-" if x is None else f"{x:,.3f}" for x in numbers]
            rows.append([f"{run}: {stage}", f"{measured['tokens']:,}", *shown])
    header = [
        "run: stage",
        "tokens",
        "1,024",
        "4,096",
        "branch silenced, 1,024",
        "branch silenced, 4,096",
        "branch alone, 1,024",
    ]
    return table(header, rows)


def plot(recovery: dict, path: Path) -> None:
    """Held-out perplexity over the teacher's against tokens of distillation, one line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, run in recovery["runs"].items():
        if run["curve"]:
            teacher = run["teacher_in_the_run"]
            tokens, values = zip(*run["curve"], strict=True)
            axes.plot(tokens, [value / teacher for value in values], "o-", markersize=3, label=name)
    axes.axhline(1.0, color="#4c566a", linewidth=1)
    axes.set_xlabel("tokens of distillation")
    axes.set_ylabel("held-out perplexity / teacher's")
    axes.set_yscale("log")
    axes.set_yticks(TICKS, [str(tick) for tick in TICKS])
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def between_marks(page: str, tables: dict[str, str]) -> str:
    """`page` with each table between its marks, `<!-- name:start -->` and `<!-- name:end -->`."""
    for name, rows in tables.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        before, rest = page.split(start)
        page = f"{before}{start}\n{rows}\n{end}{rest.split(end)[1]}"
    return page


def fill(page: str, ablation: dict, recovery: dict) -> str:
    """docs/recovery.md with its tables."""
    tables = {
        "maps": map_table(ablation),
        "forgetting": forgetting_table(ablation),
        "losses": loss_table(ablation),
        "runs": recovery_table(recovery),
    }
    return between_marks(page, tables)


def main() -> None:
    ablation, recovery = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("ablation", "recovery"))
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), ablation, recovery), encoding="utf-8")
    plot(recovery, PAGE.with_suffix(".png"))


if __name__ == "__main__":
    main()
