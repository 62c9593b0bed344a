"""Table and plot of the frontier, from its JSON."""

from pathlib import Path

from ..report.quality_figures import label, spread
from ..report.style import ABLATION_COLOR, BASELINE_COLOR, STUDENT_COLOR, TEACHER_COLOR, drawn, plain
from ..report.tables import CONSTANT, markdown_table, mib, number, percent, with_interval

# marker and color of the points: memory that is constant or grows, proposals and what is there to compare with
POINTS = {
    (True, False): ("o", STUDENT_COLOR, "constant memory"),
    (False, False): ("^", BASELINE_COLOR, "memory grows"),
    (True, True): ("o", ABLATION_COLOR, "control, constant memory"),
    (False, True): ("^", ABLATION_COLOR, "control, memory grows"),
}
FEW_NAMES = 8
TEACHER_POINT = ("*", TEACHER_COLOR, "teacher")


def bytes_of(row: dict, result: dict) -> int:
    """Memory of a sequence of the reference length."""
    return row["memory"]["bytes_per_sequence"][str(result["settings"]["reference_length"])]


def recall_of(row: dict) -> dict | None:
    """Mean share of the teacher's recall; None where no recall was measured."""
    return row["recall_share"].get("all")


def perplexity_of(row: dict, result: dict) -> dict | None:
    """Ratio of perplexities at the longest length that was measured."""
    ratios = row["perplexity_ratio"]
    return ratios[max(ratios, key=int)] if ratios else None


def best_rows(result: dict, *, constant: bool) -> list[dict]:
    """
    The proposals with constant, or with growing, memory that no other one of these beats: no smaller or equal one has more
    recall. In the order of their memory.
    """
    rows = [row for row in result["rows"][1:] if row["memory"]["constant"] == constant and not row["control"]]
    best: list[dict] = []
    for row in sorted(rows, key=lambda row: (bytes_of(row, result), -(recall_of(row) or {"value": 0})["value"])):
        share = recall_of(row)
        if share and (not best or share["value"] > recall_of(best[-1])["value"]):
            best.append(row)
    return best


def frontier_table(result: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows: memory, shares of the teacher's recall by kind, ratios of perplexity by length; by memory."""
    kinds = list(result["rows"][0]["recall_share"])
    lengths = list(result["rows"][0]["perplexity_ratio"])
    reference = result["settings"]["reference_length"]
    header = ["configuration", f"{reference:,} tokens", "bytes per token"]
    header += [f"recall, {kind}" for kind in kinds] + [f"perplexity at {int(length):,}" for length in lengths]
    rows = []
    for row in sorted(result["rows"], key=lambda row: bytes_of(row, result)):
        memory = row["memory"]
        growth = CONSTANT if memory["constant"] else f"+{memory['bytes_per_token']:,}"
        shares = [with_interval(row["recall_share"].get(kind), percent) for kind in kinds[:1]]
        shares += [with_interval(value_only(row["recall_share"].get(kind)), percent) for kind in kinds[1:]]
        ratios = [with_interval(row["perplexity_ratio"].get(length), ratio) for length in lengths]
        rows.append([row["name"], mib(bytes_of(row, result)), growth, *shares, *ratios])
    return header, rows


def value_only(score: dict | None) -> dict | None:
    """A score without its interval, for narrow columns."""
    return score and {"value": score["value"]}


def ratio(value: float) -> str:
    return f"{number(value)}x"


def frontier_page(result: dict) -> str:
    """The table in Markdown, with what was left out."""
    lines = [markdown_table(*frontier_table(result))]
    lines += [f"Left out: {what}, since {why}." for what, why in result["left_out"].items()]
    return "\n\n".join(lines) + "\n"


def draw_frontier(result: dict, path: Path) -> Path:
    """
    Draw recall (left) and perplexity (right) against the memory of a sequence: circles for constant memory, triangles where it
    grows, a star for the teacher, controls gray. Names stand at the proposals that no smaller one beats in recall, or at all
    of them if they are few.
    """
    reference = result["settings"]["reference_length"]
    longest = max(result["rows"][0]["perplexity_ratio"], key=int, default=None)
    named = [row["name"] for constant in (True, False) for row in best_rows(result, constant=constant)]
    proposals = [row["name"] for row in result["rows"][1:] if not row["control"]]
    named = proposals if len(proposals) <= FEW_NAMES else named
    with drawn(path, 1, 2, size=(13.0, 5.6)) as (figure, (recall, perplexity)):
        for axes, score_of in ((recall, recall_of), (perplexity, lambda row: perplexity_of(row, result))):
            draw_points(axes, result, score_of)
            shown = [row for row in result["rows"] if row["name"] in named and score_of(row)]
            for i, row in enumerate(sorted(shown, key=lambda row: score_of(row)["value"])):
                at = (bytes_of(row, result) / 2**20, score_of(row)["value"])
                place = (14, 12 * (i - len(shown) / 2))  # in the order of the scores, so that names do not cover each other
                line = {"arrowstyle": "-", "lw": 0.5, "color": "gray"}
                axes.annotate(label(row["name"]), at, place, textcoords="offset points", fontsize=7, arrowprops=line)
            axes.axhline(1, color=TEACHER_COLOR, lw=0.8, zorder=0)
            axes.set_xscale("log")
        memory = f"MiB of a sequence of {reference:,} tokens ({result['settings']['dtype']}, log scale)"
        plain(recall, x=memory, y="share of the teacher's recall, mean over kinds and lengths", legend=False)
        at_length = "" if longest is None else f" at {int(longest):,} tokens"
        plain(perplexity, x=memory, y=f"perplexity{at_length} / the teacher's (log scale)", legend=False)
        perplexity.set_yscale("log")
        for set_formatter in (perplexity.yaxis.set_major_formatter, perplexity.yaxis.set_minor_formatter):
            set_formatter("{x:.2f}")
        handles, labels = recall.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return path


def draw_points(axes, result: dict, score_of) -> None:
    """One point with its interval for each configuration, those of controls below the others."""
    teacher, *students = result["rows"]
    for (constant, control), (marker, color, text) in POINTS.items():
        rows = [row for row in students if (row["memory"]["constant"], row["control"]) == (constant, control)]
        rows = [row for row in rows if score_of(row)]
        for i, row in enumerate(rows):
            score = score_of(row)
            hollow = {} if row["linear_branch"] else {"mfc": "white"}
            axes.errorbar(
                bytes_of(row, result) / 2**20, score["value"], yerr=spread(score), fmt=marker, color=color, ms=6, lw=0.8,
                zorder=2 if control else 3, label=text if i == 0 else None, **hollow,
            )  # fmt: skip
    marker, color, text = TEACHER_POINT
    if score_of(teacher):
        axes.plot(bytes_of(teacher, result) / 2**20, 1.0, marker, color=color, ms=11, ls="", label=text)
