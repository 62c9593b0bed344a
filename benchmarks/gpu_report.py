"""
Tables and the plot of docs/gpu.md, from benchmarks/results/gpu/<card>/<step>.json, and the table of docs/corpus.md.

    python benchmarks/gpu_report.py    # writes them into the pages, and docs/gpu_op.png where the op was measured
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from measure import target
from pages import DOCS, RESULTS, between_marks, read_result, redraw

from dijiang.evaluate.latency.measure import PAPER_CONTEXT, PAPER_SPEEDS
from dijiang.evaluate.report.style import drawn, plain
from dijiang.evaluate.report.tables import markdown_table

GPU_RESULTS = RESULTS / "gpu"
BEFORE = "model_without_triton_step"  # the step `model` before there was a Triton kernel
STEPS = ("tests", "op", "model", BEFORE, "recovery_linear", "recovery_window")
NOTHING = "Not measured yet."
MAIN_LENGTH = 16384  # tokens at which all variants of the op are compared
HELD_OUT_LENGTHS = ("1024", "4096")
RECOVERY_GOAL = 1.15  # perplexity of the pure linear model over its teacher's
OP_COLUMNS = {
    "flash": "FlashAttention",
    "dijiang": "ours",
    "graph": "ours, CUDA graph",
    "fla": "ours by fla",
    "torch": "by torch",
}
DECODE_COLUMNS = {
    "softmax": "default cache",
    "softmax static": "static cache",
    "softmax static graph": "static, CUDA graph",
    "dijiang": "ours",
    "dijiang graph": "ours, CUDA graph",
}


Results = dict[str, dict[str, dict]]  # by name of the card and of the step


def load(folder: Path = GPU_RESULTS) -> Results:
    """All results below `folder`."""
    results: Results = {}
    for path in sorted(folder.glob("*/*.json")):
        if path.stem in STEPS:
            result = json.loads(path.read_text(encoding="utf-8"))
            results.setdefault(result["device"], {})[path.stem] = result
    return results


def rows_of(results: Results, step: str) -> list[tuple[str, list[dict]]]:
    """Each card with the rows that a step measured there."""
    return [(card, steps[step].get("rows", [])) for card, steps in results.items() if step in steps]


def recoveries(results: Results) -> list[tuple[str, dict]]:
    """Each card with the result of a recovery step there."""
    return [(card, result) for card, steps in results.items() for step, result in steps.items() if step.startswith("recovery")]


def by_contender(rows: list[dict]) -> Iterator[tuple[tuple[str, int, int], dict[str, dict]]]:
    """Rows by contender, for each shape, batch and context."""
    for key in dict.fromkeys((row["shape"], row["batch"], row["context"]) for row in rows):
        yield key, {row["contender"]: row for row in rows if (row["shape"], row["batch"], row["context"]) == key}


def table_or_note(header: list[str], rows: list[list[str]]) -> str:
    return markdown_table(header, rows) if rows else NOTHING


def in_cell(text: str) -> str:
    """`text` without what would end a cell."""
    return text.replace("|", " ")


def number(value: float | None, digits: int = 2) -> str:
    """A number in few digits, or a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}" if value < 100 else f"{value:,.0f}"


def formatted(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def ratio(above: float | None, below: float | None) -> str:
    return number(above / below if above and below else None)


def cards_table(results: Results) -> str:
    """Each card with its rates, from which floors are computed, and the versions of the software."""
    rows = []
    for card, steps in results.items():
        versions = next(iter(steps.values()))["versions"]
        limits = next((steps[step]["limits"] for step in ("op", "model") if "limits" in steps.get(step, {})), None)
        rates = [limits["product_gflops"]["bfloat16"] / 1e3, limits["copy_bytes_per_s"] / 1e12] if limits else [None, None]
        names = ("torch", "triton", "transformers", "flash-linear-attention")
        rows.append([card, *(number(rate) for rate in rates), *(versions.get(name) or "none" for name in names)])
    return table_or_note(["card", "bfloat16 products, TFLOP/s", "copy, TB/s", "torch", "triton", "transformers", "fla"], rows)


def tests_table(results: Results) -> str:
    """Outcomes of `pytest -m gpu`, and the failures."""
    rows = []
    failures = []
    for card, steps in results.items():
        if tests := steps.get("tests"):
            counts = [str(tests[key]) for key in ("passed", "failed", "errors", "skipped")]
            rows.append([card, *counts, "yes" if tests.get("complete") else "no, stopped at its limit"])
            failed = [x for x in tests["details"] if x["outcome"] != "skipped"]
            failures += [f"* {card}: `{x['test']}`: {in_cell(x['reason']).replace('`', '')}" for x in failed[:20]]
    table = table_or_note(["card", "passed", "failed", "errors", "skipped", "finished"], rows)
    return "\n".join([table, "", *failures]) if failures else table


def op_table(results: Results, kind: str) -> str:
    """Times of the op by length in milliseconds, by variant; the fastest of ours is compared with FlashAttention."""
    columns = [name for name in OP_COLUMNS if name != "graph" or kind == "forward"]
    rows = []
    for card, measured in rows_of(results, "op"):
        own = [row for row in measured if row["pass"] == kind and "median_s" in row]
        for batch, tokens, features in sorted({(r["batch"], r["tokens"], r["features"]) for r in own if r["features"]}):
            here = [r for r in own if (r["batch"], r["tokens"]) == (batch, tokens) and r["features"] in (features, None)]
            times = {r["variant"]: r["median_s"] for r in here}
            ours = min((r for r in here if r["variant"] != "flash"), key=lambda r: r["median_s"])
            cells = [number(times[name] * 1e3 if name in times else None) for name in columns]
            gains = [ratio(times.get("flash"), ours["median_s"]), number(ours["of_floor"]), ours["variant"]]
            rows.append([card, f"{tokens:,}", str(batch), str(features), *cells, *gains])
    header = ["card", "tokens", "batch", "m", *(OP_COLUMNS[name] for name in columns)]
    return table_or_note([*header, "times faster than FlashAttention", "time / floor", "by"], rows)


def variants_table(results: Results) -> str:
    """Every variant at the main length with batch 1: the forward pass and its parts."""
    rows = []
    for card, measured in rows_of(results, "op"):
        main = [r for r in measured if r["tokens"] == MAIN_LENGTH and r["batch"] == 1]
        own = [r for r in main if r["pass"] in ("forward", "parts")]
        flash = next((r.get("median_s") for r in own if r["variant"] == "flash"), None)
        for row in sorted(own, key=lambda r: (-(r["features"] or 0), r["pass"], r.get("median_s", 1e9))):
            if row["variant"] == "flash":
                continue
            error = row.get("relative_error", {}).get("o")
            note = row.get("left_out") or row.get("error") or ""
            time = row.get("median_s")
            faster = ratio(flash, time) if row["pass"] == "forward" else "-"
            cells = [number(time * 1e3 if time else None, 3), faster, number(row.get("of_floor"))]
            name = row["variant"] if row["pass"] == "forward" else f"part: {row['variant']}"
            error = "-" if error is None else f"{error:.1e}"
            rows.append([card, str(row["features"]), name, *cells, error, in_cell(note)])
    header = ["card", "m", "variant", "ms", "times faster than FlashAttention", "time / floor", "relative error", "note"]
    return table_or_note(header, rows)


def lengths_measured(results: Results) -> bool:
    """Whether the op was measured at several lengths, as the plot requires."""
    return any(len({row["tokens"] for row in rows if "median_s" in row}) > 1 for _, rows in rows_of(results, "op"))


def figure_line(results: Results) -> str:
    return "![Forward time of the op against tokens](gpu_op.png)" if lengths_measured(results) else NOTHING


def plot(results: Results, path: Path) -> None:
    """Draw the forward time of the op against tokens with batch 1, one line per variant."""
    card, measured = rows_of(results, "op")[0]
    own = [r for r in measured if r["pass"] == "forward" and r["batch"] == 1 and "median_s" in r]
    with drawn(path, size=(7, 4)) as (_, axes):
        for variant, features in dict.fromkeys((r["variant"], r["features"]) for r in own):
            chosen = [r for r in own if (r["variant"], r["features"]) == (variant, features)]
            points = sorted((r["tokens"], r["median_s"] * 1e3) for r in chosen)
            if len(points) > 1:
                label = OP_COLUMNS.get(variant, variant) + (f", m={features}" if features else "")
                axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=label)
        floors = sorted({(r["tokens"], r["floor_s"] * 1e3) for r in own if r["features"] == 128})
        if floors:
            axes.plot(*zip(*floors, strict=True), color="#4c566a", linewidth=1, linestyle="--", label="floor, m=128")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_title(card, fontsize=10)
        plain(axes, x="tokens", y="forward pass, ms", legend=False)
        axes.legend(frameon=False, fontsize=8)


def decode_rows(results: Results, wanted: Callable[[dict], bool]) -> Iterator[tuple[list[str], dict[str, dict]]]:
    """Cells of a line per card, shape, batch and context, and its rows by contender, for the rows that are `wanted`."""
    for card, measured in rows_of(results, "model"):
        for (shape, batch, context), rows in by_contender([r for r in measured if r["phase"] == "decode" and wanted(r)]):
            speeds = {name: row["tokens_per_s"] for name, row in rows.items() if "tokens_per_s" in row}
            ours = max((speeds[name] for name in speeds if name.startswith("dijiang")), default=None)
            static = max((speeds[name] for name in speeds if name.startswith("softmax static")), default=None)
            cells = [number(speeds.get(name), 0) for name in DECODE_COLUMNS]
            compiled = [name for name in ("softmax static compiled", "dijiang compiled") if name in speeds]
            note = ", ".join(f"{name} {number(speeds[name], 0)}" for name in compiled)
            gains = [ratio(ours, speeds.get("softmax")), ratio(ours, static)]
            yield [card, shape, str(batch), f"{context:,}", *cells, *gains, note], rows


def decode_table(results: Results) -> str:
    """The paper's Table 1: tokens/s at 2,048 tokens."""
    rows = []
    for (card, shape, batch, _, *cells, note), _ in decode_rows(results, lambda row: row["context"] == PAPER_CONTEXT):
        softmax, dijiang = PAPER_SPEEDS.get(shape, (None, None))
        rows.append([card, shape, batch, *cells, ratio(dijiang, softmax), note])
    header = ["card", "shape", "batch", *DECODE_COLUMNS.values(), "best over default", "best over static", "paper's ratio"]
    return table_or_note([*header, "compiled"], rows)


def lengths_table(results: Results) -> str:
    """The paper's Figure 4: tokens/s and memory against context."""
    decoding = [(card, row) for card, rows in rows_of(results, "model") for row in rows if row["phase"] == "decode"]
    keys = {(card, r["shape"], r["batch"]) for card, r in decoding if r["context"] != PAPER_CONTEXT}
    shown = ("softmax", "softmax static graph", "dijiang graph")
    rows = []
    for (card, shape, batch, context, *cells), measured in decode_rows(results, lambda row: True):
        if (card, shape, int(batch)) in keys:
            peaks = [measured.get(name, {}).get("peak_bytes") for name in shown]
            memory = [number(peak / 2**20 if peak else None, 0) for peak in peaks]
            speeds = [cells[list(DECODE_COLUMNS).index(name)] for name in shown]
            rows.append((shape, int(batch), int(context.replace(",", "")), [card, shape, batch, context, *speeds, *memory]))
    header = ["card", "shape", "batch", "context", "default cache", "static, CUDA graph", "ours, CUDA graph"]
    header += ["default cache, MiB", "static, MiB", "ours, MiB"]
    return table_or_note(header, [row[-1] for row in sorted(rows, key=lambda row: row[:3])])


def prefill_table(results: Results) -> str:
    """Prompts: milliseconds until the first token is known."""
    lines = []
    for card, measured in rows_of(results, "model"):
        for (shape, batch, context), rows in by_contender([r for r in measured if r["phase"] == "prefill"]):
            times = {name: row.get("median_s") for name, row in rows.items()}
            cells = [number(times.get(name) and times[name] * 1e3) for name in ("softmax", "dijiang")]
            ours = rows.get("dijiang", {})
            note = ours.get("flex_attention") or ours.get("left_out") or ""
            gain = ratio(times.get("softmax"), times.get("dijiang"))
            lines.append([card, shape, str(batch), f"{context:,}", *cells, gain, in_cell(note)])
    header = ["card", "shape", "batch", "prompt", "softmax, ms", "ours, ms", "times faster", "note"]
    return table_or_note(header, lines)


def step_table(results: Results) -> str:
    """Decoding steps in milliseconds, without and with the Triton kernel of the linear layer."""
    lines = []
    for card, steps in results.items():
        if not {"model", BEFORE} <= steps.keys():
            continue
        before, after = (
            {(r["shape"], r["batch"], r["contender"]): r["median_s"] for r in steps[name].get("rows", []) if "median_s" in r}
            for name in (BEFORE, "model")
        )
        for key in (key for key in after if key in before and key[2] in ("dijiang", "dijiang graph")):
            shape, batch, contender = key
            times = [number(1e3 * medians[key]) for medians in (before, after)]
            way = "CUDA graph" if contender.endswith("graph") else "eager"
            lines.append([card, shape, str(batch), way, *times, ratio(before[key], after[key])])
    header = ["card", "shape", "batch", "step", "by torch, ms", "by the Triton kernel, ms", "times faster"]
    return table_or_note(header, lines)


def ratio_at(recovery: dict, model: str, length: str) -> float | None:
    """Perplexity of a model over the teacher's on all held-out sources together."""
    return recovery.get("perplexity_ratio", {}).get(model, {}).get(length, {}).get("all")


def recovery_table(results: Results) -> str:
    """Every run: tokens, speed, perplexity over the teacher's before and after."""
    rows = []
    for card, recovery in recoveries(results):
        speed = [formatted(recovery.get("tokens"), ",.0f"), formatted(recovery.get("tokens_per_s"), ",.0f")]
        speed.append(formatted(recovery.get("share_of_measured_peak"), ".1%"))
        ratios = [ratio_at(recovery, model, length) for model in ("baseline", "student") for length in HELD_OUT_LENGTHS]
        state = recovery.get("error") or ("yes" if recovery["complete"] else "no")
        cells = [formatted(value, ",.3f") for value in ratios]
        rows.append([recovery.get("recipe", "-"), card, *speed, *cells, in_cell(state)])
    header = ["recipe", "card", "tokens of distillation", "tokens/s", "of the card's peak"]
    header += ["converted, 1,024", "converted, 4,096", "recovered, 1,024", "recovered, 4,096", "finished"]
    return table_or_note(header, rows)


def recall_table(results: Results) -> str:
    """Share of right answers of teacher and student, by task and length."""
    rows = []
    for card, recovery in recoveries(results):
        quality = recovery.get("quality", {})
        for task, lengths in quality.get("teacher", {}).get("recall", {}).items():
            for length, teacher in lengths.items():
                student = quality.get("student", {}).get("recall", {}).get(task, {}).get(length, {})
                shares = [formatted(x, ".2f") for x in (teacher["share"], student.get("share"), teacher["chance"])]
                rows.append([recovery["recipe"], card, task, f"{int(length):,}", *shares])
    return table_or_note(["recipe", "card", "task", "tokens", "teacher", "recovered", "chance"], rows)


def speed_table(results: Results) -> str:
    """The ways to compute a training step that were timed before the run."""
    rows = []
    for card, recovery in recoveries(results):
        for way in recovery.get("training_step", []):
            numbers = [str(way.get("micro_batch", "-")), formatted(way.get("step_s") and way["step_s"] * 1e3, ",.1f")]
            numbers.append(formatted(way.get("tokens_per_s"), ",.0f"))
            note = in_cell(str(way.get("error") or way.get("left_out") or ""))
            rows.append([recovery["recipe"], card, way["stage"], way["name"], *numbers, note])
    header = ["recipe", "card", "stage", "computed", "sequences at a time", "ms a step", "tokens/s", "note"]
    return table_or_note(header, rows)


def recovery_targets(step: str, recovery: dict) -> list[dict]:
    """The goals of the pure linear model."""
    if step != "recovery_linear":
        return []
    lines = []
    for length in HELD_OUT_LENGTHS:
        if (value := ratio_at(recovery, "student", length)) is not None:
            name = f"pure linear SmolLM2-135M: perplexity over the teacher's at {int(length):,} tokens"
            lines.append(target(name, RECOVERY_GOAL, value, at_most=True))
    return lines


def targets_table(results: Results) -> str:
    """All targets and whether they were met."""
    rows = []
    for card, steps in results.items():
        for step in STEPS:
            result = steps.get(step, {})
            for line in [*result.get("targets", []), *recovery_targets(step, result)]:
                rows.append([line["name"], card, line["target"], number(line["measured"]), "yes" if line["met"] else "no"])
    return table_or_note(["target", "card", "aimed for", "measured", "met"], rows)


def fill(page: str, results: Results) -> str:
    """The text of docs/gpu.md with its tables."""
    tables = {
        "cards": cards_table(results),
        "gpu-tests": tests_table(results),
        "op-forward": op_table(results, "forward"),
        "op-backward": op_table(results, "forward + backward"),
        "op-variants": variants_table(results),
        "op-figure": figure_line(results),
        "decode": decode_table(results),
        "step": step_table(results),
        "lengths": lengths_table(results),
        "prefill": prefill_table(results),
        "targets": targets_table(results),
        "recovery": recovery_table(results),
        "recall": recall_table(results),
        "training-speed": speed_table(results),
    }
    return between_marks(page, tables)


def corpus_table(facts: dict) -> str:
    """The sources in sources.json."""
    lines = [
        "| package | version | licence | documents | training tokens | held out as | held-out tokens |",
        "|---|---|---|---:|---:|---|---:|",
    ]
    for entry in facts["sources"]:
        licence = entry["licence"].replace("|", "/")
        lines.append(
            f"| {entry['package']} | {entry['version']} | {licence} | {entry['documents']:,} | {entry['tokens']:,} | "
            f"{entry['held_out'] or ''} | {entry['held_out_tokens'] or ''} |"
        )
    lines.append(f"| **all** | | | {facts['documents']:,} | {facts['tokens']:,} | | {facts['held_out_tokens']:,} |")
    return "\n".join(lines)


def fill_corpus(page: str) -> str:
    """The text of docs/corpus.md with its table."""
    return between_marks(page, {"corpus": corpus_table(read_result("gpu/corpus"))})


def main() -> None:
    results = load()
    redraw("corpus", fill_corpus)
    redraw("gpu", lambda page: fill(page, results))
    if lengths_measured(results):
        plot(results, DOCS / "gpu_op.png")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
