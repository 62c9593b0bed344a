"""Results as tables: cells, Markdown and the console."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

SHORT = {
    "teacher": "teacher",
    "window_sinks": "training-free window",
    "student": "DiJiang",
    "window_only": "its window alone",
    "linear_only": "its linear branch alone",
    "no_attention": "no attention",
}


def mib(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:,.1f} MiB"


def number(value: float) -> str:
    """Four significant digits or so, thousands with commas."""
    if value == 0 or 0.01 <= abs(value) < 100:
        return f"{value:.3f}"
    return f"{value:,.1f}" if abs(value) < 10000 else f"{value:,.0f}"


def interval(value: dict | None) -> str:
    """A value and its interval."""
    if value is None:
        return "not finite"
    if "left_out" in value:
        return "-"
    if value["low"] is None:
        return number(value["value"])
    return f"{number(value['value'])} [{number(value['low'])}, {number(value['high'])}]"


def share(value: dict | None) -> str:
    """A share and its interval in percent; a dash where there is none."""
    if value is None:
        return "-"
    ends = "" if value["low"] is None else f" [{value['low']:.0%}, {value['high']:.0%}]"
    return f"{value['value']:.1%}{ends}"


def score_table(evaluation: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each task with the value of every subject, and what the student recovered, over either floor."""
    header = ["", *(SHORT[key] for key in evaluation["subjects"]), "recovered", "over training-free"]
    rows = []
    for task in evaluation["tasks"]:
        values = [task["values"][key] for key in evaluation["subjects"]]
        shown = [number(x["value"]) if "value" in (x or {}) else "-" for x in values]
        shares = (task[key] for key in ("recovered", "over_training_free"))
        shown += ["-" if share is None else f"{share['value']:.0%}" for share in shares]
        rows.append([f"{task['metric']}: {task['name']}", *shown])
    return header, rows


def decode_table(latency: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows: tokens per second of decoding and bytes of cache or state, by context and batch."""
    header = [
        "context",
        "batch",
        "softmax tokens/s",
        "with a static cache",
        "DiJiang tokens/s",
        "softmax cache",
        "DiJiang state",
    ]
    rows = []
    for row in latency["rows"]:
        if row["phase"] == "decode" and "left_out" not in row:
            speeds = [f"{row['tokens_per_s'][name]:.1f}" for name in ("softmax", "softmax static", "dijiang")]
            sizes = [mib(row["cache_bytes"][name]) for name in ("softmax", "dijiang")]
            rows.append([f"{row['context']:,}", str(row["batch"]), *speeds, *sizes])
    return header, rows


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def print_table(console: Console, header: list[str], rows: list[list[str]]) -> None:
    table = Table(*header)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console.print(table)
