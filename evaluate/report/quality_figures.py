"""Figures of an evaluation, drawn from its JSON: perplexity, recall, recovered share, training."""

import math
from collections.abc import Collection
from pathlib import Path

from .style import ABLATION_COLOR, BASELINE_COLOR, STUDENT_COLOR, TEACHER_COLOR, drawn, lengths_axis, plain

# color and line style of the variants of every evaluation
STYLE = {
    "teacher": (TEACHER_COLOR, "-"),
    "window_sinks": (BASELINE_COLOR, "--"),
    "student": (STUDENT_COLOR, "-"),
    "window_only": (STUDENT_COLOR, ":"),
    "linear_only": (ABLATION_COLOR, "-."),
    "no_attention": (ABLATION_COLOR, ":"),
    "no_memory": (STUDENT_COLOR, "-."),
}
# of a user's baselines, colors first
EXTRA_COLORS = ("#5a9a3c", "#8a4fa3", "#c0394b", "#1f9d94", "#b8930f")
EXTRA_LINES = ("-", "--", "-.", ":")
# inches, of a legend in small letters
LEGEND_ROW = 0.18
LEGEND_HANDLE = 0.5
CHARACTER = 0.06
PANELS = 3  # in a row of a figure
NEAR_TEACHER = ("teacher", "window_sinks", "student", "window_only", "no_memory")  # the other ablations would flatten the axis


def styles(variants: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Color and line style of each variant."""
    extra = [key for key in variants if key not in STYLE]
    lines = [(color, line) for line in EXTRA_LINES for color in EXTRA_COLORS]
    return {key: STYLE[key] if key in STYLE else lines[extra.index(key) % len(lines)] for key in variants}


def label(text: str) -> str:
    """`text` with its dollar signs escaped, between which matplotlib would set a formula."""
    return text.replace("$", r"\$")


def draw_quality(result: dict, folder: Path) -> list[Path]:
    """Write the figures of an evaluation into `folder`; returns their paths."""
    tasks = {kind: [task for task in result["tasks"] if task["kind"] == kind] for kind in ("perplexity", "recall")}
    variants = {key: label(title) for key, title in result["subjects"].items()}
    paths = []
    if tasks["perplexity"]:
        paths.append(draw_perplexity(tasks["perplexity"], variants, folder / "perplexity.png"))
        paths.append(draw_by_position(tasks["perplexity"], variants, folder / "perplexity_by_position.png"))
    if tasks["recall"]:
        paths.append(draw_recall(tasks["recall"], variants, folder / "recall.png"))
    if any(task["recovered"] for task in result["tasks"]):
        paths.append(draw_recovered(result["tasks"], folder / "recovered.png"))
    if any(curve["points"] for curve in result["training"]):
        paths.append(draw_training(result["training"], folder / "training.png"))
    return paths


def spread(value: dict) -> tuple[list[float], list[float]] | None:
    """Distances from a value to the ends of its interval, in the form that error bars take."""
    if value["low"] is None:
        return None
    return [max(value["value"] - value["low"], 0.0)], [max(value["high"] - value["value"], 0.0)]


def legend_columns(labels: Collection[str], width: float) -> int:
    """Columns of a legend that fits into `width` inches."""
    return 2 if 2 * (LEGEND_HANDLE + CHARACTER * max(map(len, labels))) <= width else 1


def legend_height(labels: Collection[str], width: float) -> float:
    return LEGEND_ROW * math.ceil(len(labels) / legend_columns(labels, width))


def legend_below(figure) -> None:
    """Put the legend of the first panel, whose lines stand for those of all panels, below the panels."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = legend_columns(labels, figure.get_figwidth())
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def draw_perplexity(tasks: list[dict], variants: dict[str, str], path: Path) -> Path:
    """Draw a bar for each variant, a panel for each text and length."""
    height = 2.5 + 0.25 * (len(variants) - len(STYLE))
    with drawn(path, len(tasks), 1, size=(7.5, 0.4 + height * len(tasks))) as (figure, _):
        for axes, task in zip(figure.axes, tasks, strict=True):
            shown = {key: value for key, value in task["values"].items() if "value" in (value or {})}
            for row, (key, value) in enumerate(shown.items()):
                color = styles(variants)[key][0]
                axes.barh(row, value["value"], xerr=spread(value), color=color, error_kw={"ecolor": "#3b4252", "lw": 1})
                end = value["high"] or value["value"]
                axes.annotate(
                    f"{value['value']:,.2f}", (end, row), (4, 0), textcoords="offset points", va="center", fontsize=8
                )
            axes.set_yticks(range(len(shown)), [variants[key] for key in shown], fontsize=8)
            axes.set_xscale("log")
            axes.margins(x=0.15)
            axes.invert_yaxis()
            axes.set_title(task["name"], fontsize=9, loc="left")
            plain(axes, x="perplexity (log scale, less is better)", y="", legend=False)
    return path


def draw_by_position(tasks: list[dict], variants: dict[str, str], path: Path) -> Path:
    """Draw perplexity against the position in the window, a panel for each text and length."""
    shown = {key: style for key, style in styles(variants).items() if key in NEAR_TEACHER or key not in STYLE}
    width = max(6.0, 3.8 * len(tasks))
    height = 3.2 + legend_height([variants[key] for key in shown], width)
    with drawn(path, 1, len(tasks), size=(width, height)) as (figure, _):
        for axes, task in zip(figure.axes, tasks, strict=True):
            for key, (color, line) in shown.items():
                if key in task["detail"]:
                    x = task["detail"][key]["by_position"]
                    filled = [i for i, weight in enumerate(x["weights"]) if weight]
                    values = [math.exp(x["totals"][i] / x["weights"][i]) for i in filled]
                    axes.plot([x["edges"][i] for i in filled], values, f"o{line}", color=color, label=variants[key], ms=3)
            lengths_axis(axes, x["edges"])
            axes.set_title(task["name"], fontsize=9, loc="left")
            plain(axes, x="position in the window, up to", y="perplexity", legend=False)
        legend_below(figure)
    return path


def draw_recall(tasks: list[dict], variants: dict[str, str], path: Path) -> Path:
    """Draw accuracy against length with its intervals, and the chance level, a panel for each kind."""
    kinds = list(dict.fromkeys(task["settings"]["kind"] for task in tasks))
    columns = min(len(kinds), PANELS)
    rows = math.ceil(len(kinds) / columns)
    width = max(6.0, 4.4 * columns)
    height = 3.1 * rows + legend_height([*variants.values(), "chance"], width)
    with drawn(path, rows, columns, size=(width, height)) as (figure, _):
        for empty in figure.axes[len(kinds) :]:
            empty.remove()
        for axes, kind in zip(figure.axes, kinds, strict=True):
            of_kind = [task for task in tasks if task["settings"]["kind"] == kind]
            lengths = [task["settings"]["length"] for task in of_kind]
            for key, (color, line) in styles(variants).items():
                points = [task["values"][key] for task in of_kind]
                if not all("value" in (point or {}) for point in points):
                    continue
                axes.plot(lengths, [point["value"] for point in points], f"o{line}", color=color, label=variants[key], ms=4)
                if key in ("teacher", "student") and all(point["low"] is not None for point in points):
                    ends = ([point[end] for point in points] for end in ("low", "high"))
                    axes.fill_between(lengths, *ends, color=color, alpha=0.12, lw=0)
            axes.plot(lengths, [task["chance"] for task in of_kind], color="#d8dee9", lw=3, zorder=0, label="chance")
            lengths_axis(axes, lengths)
            axes.set_ylim(-0.03, 1.03)
            axes.set_title(kind, fontsize=10, loc="left")
            plain(axes, x="tokens", y="accuracy", legend=False)
        legend_below(figure)
    return path


def draw_recovered(tasks: list[dict], path: Path) -> Path:
    """Draw the recovered share with its interval, a row for each task that has one."""
    shown = [task for task in tasks if task["recovered"]]
    with drawn(path, size=(7.5, 0.9 + 0.3 * len(shown))) as (_, axes):
        for row, task in enumerate(shown):
            share = task["recovered"]
            axes.errorbar(share["value"], row, xerr=spread(share), fmt="o", color=STUDENT_COLOR, ms=5, lw=1.2)
        axes.axvline(1, color=TEACHER_COLOR, lw=1)
        axes.axvline(0, color=ABLATION_COLOR, lw=1)
        axes.set_yticks(range(len(shown)), [f"{task['kind']}: {task['name']}" for task in shown], fontsize=8)
        axes.invert_yaxis()
        plain(axes, x="recovered share (0: the floor, 1: the teacher)", y="", legend=False)
    return path


def draw_training(curves: list[dict], path: Path) -> Path:
    """Draw training loss and held-out perplexity against the tokens trained on, stage after stage."""
    with drawn(path, 1, 2, size=(8.5, 3.2)) as (_, (loss, quality)):
        before, teacher = 0, []
        for curve, color in zip(curves, (BASELINE_COLOR, STUDENT_COLOR, TEACHER_COLOR), strict=False):
            points = curve["points"]
            losses = [(before + p["tokens"], p["loss"]) for p in points if "loss" in p]
            held = [(before + p["tokens"], p["eval_perplexity"]) for p in points if "eval_perplexity" in p]
            teacher += [p["eval_teacher_perplexity"] for p in points if "eval_teacher_perplexity" in p]
            if losses:
                loss.plot(*zip(*losses, strict=True), color=color, label=curve["stage"], lw=1.2)
            if held:
                quality.plot(*zip(*held, strict=True), "o-", color=color, label=curve["stage"], ms=3)
            before += max((p["tokens"] for p in points if "tokens" in p), default=0)
        if teacher:
            quality.axhline(teacher[-1], color=TEACHER_COLOR, lw=1, ls="--", label="teacher")
        loss.set_yscale("log")
        plain(loss, x="tokens", y="training loss", legend=bool(loss.lines))
        plain(quality, x="tokens", y="held-out perplexity", legend=bool(quality.lines))
    return path
