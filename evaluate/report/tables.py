"""Results as tables: cells, Markdown and the console."""

import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

NOTHING = "–"
CONSTANT = "constant"  # in place of the bytes per token, where memory does not grow
FEW_ZEROS = 0.005  # a share that dense weights may have too
SHORT = {
    "teacher": "teacher",
    "window_sinks": "training-free",
    "student": "DiJiang",
    "window_only": "window alone",
    "no_memory": "no exact memory",
    "linear_only": "linear alone",
    "no_attention": "no attention",
}


def mib(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:,.1f} MiB"


def number(value: float | None) -> str:
    """Three digits after the point, fewer of large values, two significant ones of small ones; a dash for None."""
    if value is None:
        return NOTHING
    if 0 < abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.2f}" if abs(value) < 10000 else f"{value:,.0f}"


def percent(share: float) -> str:
    return f"{share:.0%}"


def with_interval(score: dict | None, shown: Callable[[float], str] = number) -> str:
    """A score and, if known, its interval; a dash for a score that was left out or is not finite."""
    if score is None or score.get("value") is None:
        return NOTHING
    ends = [score.get("low"), score.get("high")]
    return shown(score["value"]) + ("" if None in ends else " [{}, {}]".format(*map(shown, ends)))


def heading(key: str, title: str = "") -> str:
    """
    Heading of the column of the variant `key`; that of a user's baseline is its name. `window_only` of a student that has kept
    heads or an exact memory, which its title tells, leaves more than the window.
    """
    if key == "window_only" and "without" in title:
        return "no linear branch"
    return SHORT.get(key) or key.partition(":")[2]


def headings(evaluation: dict) -> list[str]:
    """Headings of the columns of all variants."""
    return [heading(key, title) for key, title in evaluation["subjects"].items()]


def memory_rows(evaluation: dict) -> dict[str, list[str]]:
    """
    By title, a row of cells for all variants: bytes that every token adds, and memory of a sequence by its length. Nothing for
    results of earlier versions, which do not know it.
    """
    memory = evaluation.get("memory")
    if not memory:
        return {}
    uses = [memory["variants"].get(key) for key in evaluation["subjects"]]
    growth = [NOTHING if use is None else CONSTANT if use["constant"] else f"+{use['bytes_per_token']:,}" for use in uses]
    rows = {"bytes per token": growth}
    for length in next(iter(memory["variants"].values()))["bytes_per_sequence"]:
        sizes = [NOTHING if use is None else mib(use["bytes_per_sequence"][length]) for use in uses]
        rows[f"sequence of {int(length):,} tokens"] = sizes
    return rows


def share_headings(evaluation: dict) -> list[str]:
    """Headings of the recovered-share columns; they name the student if there are a user's baselines too."""
    shares = ["recovered", "over training-free"]
    return [f"{SHORT['student']} {share}" for share in shares] if evaluation.get("beside") else shares


def sparsity(evaluation: dict, key: str) -> str | None:
    """Share of zeros in the weights of a variant's layers; None if it is unknown or small."""
    model = evaluation.get(key) or evaluation.get("beside", {}).get(key) or {}
    zeros = model.get("zeros") or 0
    return percent(zeros) if zeros >= FEW_ZEROS else None


def score_table(evaluation: dict) -> tuple[list[str], list[list[str]]]:
    """
    Header and rows: each task with the value of every variant, and the student's share recovered over either floor; then the
    memory of every variant.
    """
    header = ["", *headings(evaluation), *share_headings(evaluation)]
    rows = []
    for task in evaluation["tasks"]:
        values = [task["values"][key] for key in evaluation["subjects"]]
        shown = [number((x or {}).get("value")) for x in values]
        shares = (task[key] for key in ("recovered", "over_training_free"))
        shown += [NOTHING if share is None else percent(share["value"]) for share in shares]
        rows.append([f"{task['kind'].replace('_', '-')}: {task['name']}", *shown])
    rows += [[f"memory: {title}", *cells, NOTHING, NOTHING] for title, cells in memory_rows(evaluation).items()]
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
    """A Markdown table, all columns but the first aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def wide_console() -> Console:
    """A console as wide as the terminal, or 160 columns where there is none."""
    return Console(width=None if sys.stdout.isatty() else 160)


def print_table(console: Console, header: list[str], rows: list[list[str]]) -> None:
    table = Table(*map(escape, header))
    for column in table.columns[1:]:
        column.justify = "right"
        column.overflow = "fold"  # so that no names or digits are cut off
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
