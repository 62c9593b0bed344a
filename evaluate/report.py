"""Draws the report of a conversion from its JSON: a Markdown table and two plots."""

from pathlib import Path

PERPLEXITY_ROWS = {
    "teacher": "teacher (softmax attention)",
    "window_sinks": "window + sinks only, no training",
    "converted": "DiJiang, converted",
    "aligned": "DiJiang, aligned",
    "distilled": "DiJiang, aligned and distilled",
    "window_only_distilled": "window + sinks only, distilled",
    "linear_only_converted": "linear branch alone, converted",
    "linear_only_distilled": "linear branch alone, distilled",
}
TEACHER_COLOUR, STUDENT_COLOUR, CONTROL_COLOUR = "#4c566a", "#2a7fba", "#b8c4cf"


def mib(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:,.1f} MiB"


def recovered_share(perplexity: dict[str, float]) -> float:
    """Share of the perplexity that window + sinks loses against the teacher which the distilled model wins back."""
    lost = perplexity["window_sinks"] - perplexity["teacher"]
    return (perplexity["window_sinks"] - perplexity["distilled"]) / lost


def quality_rows(report: dict) -> list[tuple[str, str, str]]:
    """(what, perplexity, tokens trained on) for every model measured."""
    trained = {"aligned": report["align"]["tokens"]} | {key: report["tokens"] for key in PERPLEXITY_ROWS if "distilled" in key}
    return [(title, f"{report['perplexity'][key]:,.2f}", f"{trained.get(key, 0):,}") for key, title in PERPLEXITY_ROWS.items()]


def decode_rows(report: dict) -> list[tuple[str, ...]]:
    """(context, teacher tokens/s, student tokens/s, teacher cache, student state) per context length."""
    rows = []
    for context, sides in report["decode"].items():
        speeds = (f"{sides[side]['tokens_per_second']:.1f}" for side in ("teacher", "student"))
        sizes = (mib(sides[side]["cache_bytes"]) for side in ("teacher", "student"))
        rows.append((f"{int(context):,}", *speeds, *sizes))
    return rows


def markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) + ("---:",) * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


QUALITY_HEADER = ("", "perplexity", "tokens trained on")
DECODE_HEADER = ("context", "teacher tokens/s", "DiJiang tokens/s", "teacher cache", "DiJiang state")


def markdown(report: dict) -> str:
    """The report as a Markdown page."""
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    held_out, align, distill = report["held_out"], report["align"], report["distill"]
    return f"""# {report["source"]}: DiJiang beside its teacher

Perplexity on {held_out["tokens"]:,} held-out tokens in blocks of {held_out["block_size"]}. Attention transfer on
{align["tokens"]:,} tokens ({align["seconds"]:.0f} s) and distillation on {distill["tokens"]:,} tokens
({distill["seconds"]:.0f} s) win back {recovered_share(report["perplexity"]):.0%} of what window + sinks loses against the
teacher. Window + sinks of the distilled model without its linear branch shows how much of that the branch carries.

{markdown_table(QUALITY_HEADER, quality_rows(report))}

Decoding one sequence, one token a step, after a context of so many tokens; cache and state in bytes of all layers.

{markdown_table(DECODE_HEADER, decode_rows(report))}

![Perplexity](perplexity.png)
![Decoding](decode.png)

The checkpoint in `model/` was loaded by a fresh process that cannot import `dijiang`; its logits differ from this process's
by at most {report["reload_max_abs_diff"]:.1e}.

Sample, greedy. Prompt: {report["sample"]["prompt"]!r}

* teacher: {report["sample"]["teacher"]!r}
* DiJiang: {report["sample"]["student"]!r}

Made by `{report["command"]}` in {report["seconds"]:.0f} s with {report["threads"]} CPU threads, {report["dtype"]}, peak memory
{report["peak_memory_bytes"] / 2**30:.1f} GiB; {versions}.
"""


def plot(report: dict, folder: Path) -> list[Path]:
    """Write `perplexity.png` and `decode.png` into `folder`; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = [folder / "perplexity.png", folder / "decode.png"]
    keys = list(PERPLEXITY_ROWS)
    colours = {"teacher": TEACHER_COLOUR} | dict.fromkeys(("converted", "aligned", "distilled"), STUDENT_COLOUR)
    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    bars = axes.barh(
        [PERPLEXITY_ROWS[key] for key in keys],
        [report["perplexity"][key] for key in keys],
        color=[colours.get(key, CONTROL_COLOUR) for key in keys],
    )
    axes.bar_label(bars, fmt="{:,.1f}", padding=3)
    axes.set_xscale("log")
    axes.set_xlim(left=1)  # the best possible perplexity
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel("held-out perplexity (log scale)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(paths[0], dpi=150)
    pyplot.close(figure)

    contexts = [int(context) for context in report["decode"]]
    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for side, colour in (("teacher", TEACHER_COLOUR), ("student", STUDENT_COLOUR)):
        points = [sides[side] for sides in report["decode"].values()]
        label = "DiJiang" if side == "student" else side
        speed.plot(contexts, [point["tokens_per_second"] for point in points], "o-", color=colour, label=label)
        memory.plot(contexts, [point["cache_bytes"] / 2**20 for point in points], "o-", color=colour, label=label)
    speed.set_ylabel("tokens/s")
    memory.set_ylabel("cache or state, MiB")
    speed.set_ylim(bottom=0)
    memory.set_yscale("log")
    for axes in (speed, memory):
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.set_xlabel("context, tokens")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(paths[1], dpi=150)
    pyplot.close(figure)
    return paths
