"""Figures of the latency benchmark, from its JSON (after figure 4 of arXiv 2403.19928)."""

from pathlib import Path

from .style import BASELINE_COLOR, STUDENT_COLOR, TEACHER_COLOR, drawn, lengths_axis, plain

LOOKS = {
    "softmax": (TEACHER_COLOR, "softmax, growing cache"),
    "softmax static": (BASELINE_COLOR, "softmax, static cache"),
    "dijiang": (STUDENT_COLOR, "DiJiang"),
}
TIMES = {"prefill": "time to the first token, s", "decode": "decoding step, ms"}
MEMORY = dict.fromkeys(TIMES, "MiB")


def draw_latency(result: dict, folder: Path) -> list[Path]:
    """
    Write `latency.png` (medians with their quartiles; dotted, the least that the machine allows for a decoding step) and
    `memory.png` (cache or state, and dashed the peak above the weights) into `folder`: phases from top to bottom, batches
    from left to right. Returns their paths, none if every row was left out.
    """
    measured = [row for row in result["rows"] if "left_out" not in row]
    if not measured:
        return []
    phases = list(dict.fromkeys(row["phase"] for row in measured))
    batches = sorted({row["batch"] for row in measured})
    paths = []
    for name, panel, titles in (("latency.png", draw_times, TIMES), ("memory.png", draw_memory, MEMORY)):
        size = (max(6.4, 1 + 3.4 * len(batches)), 1.2 + 2.8 * len(phases))
        paths.append(folder / name)
        with drawn(paths[-1], len(phases), len(batches), size=size) as (figure, _):
            panels = figure.axes  # row by row
            for i, phase in enumerate(phases):
                for j, batch in enumerate(batches):
                    axes = panels[i * len(batches) + j]
                    rows = [row for row in measured if (row["phase"], row["batch"]) == (phase, batch)]
                    if not rows:
                        axes.axis("off")
                        continue
                    rows.sort(key=lambda row: row["context"])
                    panel(axes, rows)
                    lengths_axis(axes, [row["context"] for row in rows])
                    axes.margins(x=0.1)
                    plain(axes, x="context, tokens", y=titles[phase], legend=False)
                    axes.set_title(f"{phase}, batch {batch}", fontsize=10)
                    lines = axes.get_legend_handles_labels()  # those of the last panel: decoding, if it was measured, has most
            figure.legend(*lines, loc="outside lower center", ncols=len(LOOKS), fontsize=8, frameon=False)
            figure.suptitle(f"{result['name']}, {result['dtype']}, {result['device']}", fontsize=10)
    return paths


def draw_times(axes, rows: list[dict]) -> None:
    """Draw the times of one phase and batch against context."""
    phase, contexts = rows[0]["phase"], [row["context"] for row in rows]
    unit = 1e3 if phase == "decode" else 1.0
    for name, (color, label) in LOOKS.items():
        low, median, high = ([unit * row["timings"][name][key] for row in rows] for key in ("q1_s", "median_s", "q3_s"))
        axes.plot(contexts, median, "o-", color=color, label=label, markersize=4)
        axes.fill_between(contexts, low, high, color=color, alpha=0.25, linewidth=0)
        if phase == "decode":
            floors = [unit * row["floor_s"][name] for row in rows]
            axes.plot(contexts, floors, ":", color=color, label=f"{label}, at best", linewidth=1.5)
    axes.set_ylim(bottom=0)


def draw_memory(axes, rows: list[dict]) -> None:
    """Draw the memory of one phase and batch against context."""
    from matplotlib.ticker import LogLocator, ScalarFormatter

    contexts = [row["context"] for row in rows]
    for name, (color, label) in LOOKS.items():
        cache, peak = ([row[key][name] / 2**20 for row in rows] for key in ("cache_bytes", "peak_bytes"))
        axes.plot(contexts, cache, "o-", color=color, label=label, markersize=4)
        axes.plot(contexts, peak, "s--", color=color, label=f"{label}, peak", markersize=3, linewidth=1)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(LogLocator(subs=()))
