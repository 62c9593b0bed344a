"""Figures of attention maps: the maps side by side, and their distance and reach by layer."""

from pathlib import Path

import numpy as np

from ..quality.attention_maps import unpack_map
from .style import ABLATION_COLOR, BASELINE_COLOR, STUDENT_COLOR, TEACHER_COLOR, drawn, plain

COLOR_MAP = "magma_r"
SATURATED = 0.98  # quantile of the teacher's weights at which the colors end
MOST_HEADS = 8
LINES = {  # side: color, label
    "teacher": (TEACHER_COLOR, "teacher"),
    "student": (STUDENT_COLOR, "DiJiang"),
    "window_sinks": (ABLATION_COLOR, "training-free window + sinks"),
    "performer": (BASELINE_COLOR, "Performer"),
}


def draw_maps(result: dict, folder: Path) -> list[Path]:
    """Write four PNG files into `folder` from the result of `measure_maps`, and return their paths."""
    names = ("attention_maps", "attention_heads", "effective_context", "map_distance")
    paths = [folder / f"{name}.png" for name in names]
    for path, draw in zip(paths, (draw_layers, draw_heads, draw_context, draw_distance), strict=True):
        draw(result, path)
    return paths


def titles(result: dict) -> dict[str, str]:
    """Titles of the sides that pictures show."""
    return {"teacher": "teacher", "student": "DiJiang", "performer": f"Performer, {result['features']} features"}


def draw_layers(result: dict, path: Path) -> None:
    """Draw the maps of every pictured layer, the mean over heads (after figure 3 of arXiv 2403.19928)."""
    records = result["maps"]
    with drawn(path, len(records), 3, size=(8.4, 2.7 * len(records) + 0.9)) as (figure, panels):
        panels = np.atleast_2d(panels)
        for row, (layer, record) in zip(panels, records.items(), strict=True):
            maps = {side: unpack_map(record[side]).mean(0) for side in record}
            distance = result["layers"][int(layer)]["distance"]
            for axes, side in zip(row, titles(result), strict=True):
                image = show(axes, maps[side], maps["teacher"])
                if side == "student" and result["layers"][int(layer)]["layer_type"] == "linear_attention":
                    outline_linear_branch(axes, len(maps[side]), result["window"], result["sinks"])
                if side != "teacher":
                    axes.set_xlabel(f"distance {np.mean(distance[side]):.2f}", fontsize=10)
            row[0].set_ylabel(f"layer {layer}", fontsize=12)
            top = image.norm.vmax
            options = {"ticks": [0, top / 4, top], "format": "%.2g", "extend": "max", "label": "weight"}
            figure.colorbar(image, ax=row, shrink=0.75, pad=0.02, **options)
        for axes, title in zip(panels[0], titles(result).values(), strict=True):
            axes.set_title(title)
        dashed = "Dashed: the linear branch's part. " if any(axes.get_lines() for axes in panels.flat) else ""
        figure.suptitle(
            f"Attention of {len(maps['teacher'])} tokens (rows) to one another (columns), the mean over heads\n"
            f"{dashed}Distance: total variation over {result['tokens']} tokens"
        )


def outline_linear_branch(axes, n: int, window: int, sinks: int) -> None:
    """Outline the keys of an n x n map that have left the window and are no sinks."""
    if n > window + sinks:
        left = sinks - 0.5
        bottom = n - 0.5
        top = window + sinks - 0.5
        axes.plot((left, left, n - window - 0.5, left), (top, bottom, bottom, top), "--", color=STUDENT_COLOR, linewidth=1.0)


def draw_heads(result: dict, path: Path) -> None:
    """Draw heads of one pictured layer, at most `MOST_HEADS`, teacher above student above Performer."""
    layer = list(result["maps"])[len(result["maps"]) // 2]
    maps = {side: unpack_map(record) for side, record in result["maps"][layer].items()}
    H = len(maps["teacher"])
    heads = np.unique(np.linspace(0, H - 1, min(H, MOST_HEADS)).round().astype(int))
    with drawn(path, 3, len(heads), size=(1.55 * len(heads) + 0.5, 5.6)) as (figure, panels):
        distance = result["layers"][int(layer)]["distance"]
        for row, (side, title) in zip(panels.reshape(3, -1), titles(result).items(), strict=True):
            for axes, head in zip(row, heads, strict=True):
                show(axes, maps[side][head], maps["teacher"][head])
                axes.set_xlabel("" if side == "teacher" else f"{distance[side][head]:.2f}", fontsize=9)
                if side == "teacher":
                    axes.set_title(f"head {head}", fontsize=10)
            row[0].set_ylabel(title.replace(", ", ",\n"))
        figure.suptitle(f"Layer {layer}; below each map its distance from the teacher's")


def show(axes, weights: np.ndarray, teacher: np.ndarray):
    """Draw one map (n, n), keys to the right, its colors by the square root of the weight, on the scale of the teacher's."""
    from matplotlib.colors import PowerNorm

    n = len(weights)
    future = np.triu(np.ones((n, n), dtype=bool), 1)
    top = max(np.quantile(teacher[~future], SATURATED), 1e-3)
    image = axes.imshow(np.ma.masked_array(weights, future), norm=PowerNorm(0.5, 0, top), cmap=COLOR_MAP, interpolation="none")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["top", "right"]].set_visible(False)
    return image


def draw_context(result: dict, path: Path) -> None:
    """Draw the reach of teacher and student by layer."""
    window, sinks = result["window"], result["sinks"]
    panels = {"effective_context": ("recent tokens with 90 % of the weight", "tokens")}
    if sinks:
        panels["effective_context_past_sinks"] = (f"the same, the first {sinks} tokens left out", "tokens")
    if window:
        panels["beyond_window"] = (f"weight beyond window and sinks ({window} + {sinks})", "share")
    with drawn(path, 1, len(panels), size=(4 * len(panels), 3.6)) as (_, row):
        row = np.atleast_1d(row)
        for axes, (measure, (title, y)) in zip(row, panels.items(), strict=True):
            for side in ("teacher", "student"):
                draw_by_layer(axes, result, measure, side)
            if y == "tokens" and window:
                axes.axhline(window, color="black", linestyle=":", linewidth=1.0)
            if axes is row[0] and window:
                axes.annotate("window", (0.85, window), (0, 3), ("axes fraction", "data"), "offset points", fontsize=9)
            axes.set_ylim(bottom=0)
            axes.set_title(title, fontsize=11)
            plain(axes, x="layer", y=y, legend=axes is row[-1])


def draw_distance(result: dict, path: Path) -> None:
    """Draw the distance from the teacher's maps by layer."""
    with drawn(path, size=(7, 3.6)) as (_, axes):
        for side in ("performer", "window_sinks", "student"):
            if side in result["layers"][0]["distance"]:
                draw_by_layer(axes, result, "distance", side)
        axes.set_ylim(0, 1)
        plain(axes, x="layer", y="total variation distance\nfrom the teacher's map")


def draw_by_layer(axes, result: dict, measure: str, side: str) -> None:
    """Draw the median over heads as a line, and the band between their quartiles."""
    values = np.array([layer[measure][side] for layer in result["layers"]])
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=1)
    x = range(len(values))
    axes.xaxis.get_major_locator().set_params(integer=True)
    color, label = LINES[side]
    axes.plot(x, middle, "o-", color=color, label=label, markersize=3, linewidth=1.6)
    axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
