"""
Tables and the plot of docs/gpu.md, from benchmarks/results/gpu/<card>/<step>.json, and the table of docs/corpus.md.

    python benchmarks/gpu_report.py    # writes them into the pages, and docs/gpu_op.png where the op was measured
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from corpus_licences import corpus_table
from gpu_recovery_tables import recall_table, recovery_table, recovery_targets, speed_table
from recovery_report import between_marks, table

RESULTS = Path(__file__).parent / "results" / "gpu"
PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
CORPUS_PAGE = PAGE.with_name("corpus.md")
BEFORE = "model_without_triton_step"  # of the same programme, before the kernel was there
STEPS = ("tests", "op", "model", BEFORE, "recovery_linear", "recovery_window")
NOTHING = "Not measured yet."
MAIN = 16384  # tokens at which all variants of the op are compared
CONTEXT = 2048  # of the paper's Table 1
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


def load(folder: Path = RESULTS) -> dict[str, dict[str, dict]]:
    """What there is, by card and step; a card is called by its own name."""
    found: dict[str, dict[str, dict]] = {}
    for path in sorted(folder.glob("*/*.json")):
        if path.stem in STEPS:
            result = json.loads(path.read_text(encoding="utf-8"))
            found.setdefault(result["device"], {})[path.stem] = result
    return found


def rows_of(results: dict, step: str) -> list[tuple[str, list[dict]]]:
    """Cards and the rows that a step measured there."""
    return [(card, steps[step].get("rows", [])) for card, steps in results.items() if step in steps]


def drawn(header: list[str], rows: list[list[str]]) -> str:
    return table(header, rows) if rows else NOTHING


def number(value: float | None, digits: int = 2) -> str:
    """A number in few digits, or a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}" if value < 100 else f"{value:,.0f}"


def ratio(above: float | None, below: float | None) -> str:
    return number(above / below if above and below else None)


def cards_table(results: dict) -> str:
    """What each card is, and the rates that floors are made of."""
    rows = []
    for card, steps in results.items():
        versions = next(iter(steps.values()))["versions"]
        limits = next((steps[step]["limits"] for step in ("op", "model") if "limits" in steps.get(step, {})), None)
        rates = [limits["product_gflops"]["bfloat16"] / 1e3, limits["copy_bytes_per_s"] / 1e12] if limits else [None, None]
        names = ("torch", "triton", "transformers", "flash-linear-attention")
        rows.append([card, *(number(rate) for rate in rates), *(versions.get(name) or "none" for name in names)])
    return drawn(["card", "bfloat16 products, TFLOP/s", "copy, TB/s", "torch", "triton", "transformers", "fla"], rows)


def tests_table(results: dict) -> str:
    """Outcomes of `pytest -m gpu`, and what went wrong."""
    rows, lines = [], []
    for card, steps in results.items():
        if found := steps.get("tests"):
            counts = [str(found[key]) for key in ("passed", "failed", "errors", "skipped")]
            rows.append([card, *counts, "yes" if found.get("complete") else "no, stopped at its limit"])
            wrong = [x for x in found["details"] if x["outcome"] != "skipped"]
            lines += [f"* {card}: `{x['test']}`: {x['reason'].replace('|', ' ').replace('`', '')}" for x in wrong[:20]]
    shown = drawn(["card", "passed", "failed", "errors", "skipped", "finished"], rows)
    return "\n".join([shown, *([""] if lines else []), *lines])


def op_table(results: dict, kind: str) -> str:
    """Times of the op by length, milliseconds: columns are variants, the best of ours is compared."""
    shown = [name for name in OP_COLUMNS if name != "graph" or kind == "forward"]
    rows = []
    for card, found in rows_of(results, "op"):
        own = [row for row in found if row["pass"] == kind and "median_s" in row]
        for batch, tokens, features in sorted({(r["batch"], r["tokens"], r["features"]) for r in own if r["features"]}):
            here = [r for r in own if (r["batch"], r["tokens"]) == (batch, tokens) and r["features"] in (features, None)]
            times = {r["variant"]: r["median_s"] for r in here}
            ours = min((r for r in here if r["variant"] != "flash"), key=lambda r: r["median_s"])
            cells = [number(times[name] * 1e3 if name in times else None) for name in shown]
            gains = [ratio(times.get("flash"), ours["median_s"]), number(ours["of_floor"]), ours["variant"]]
            rows.append([card, f"{tokens:,}", str(batch), str(features), *cells, *gains])
    header = ["card", "tokens", "batch", "m", *(OP_COLUMNS[name] for name in shown)]
    return drawn([*header, "times faster than FlashAttention", "time / floor", "by"], rows)


def variants_table(results: dict) -> str:
    """Every variant at the main length, batch 1: forward pass and parts of it."""
    rows = []
    for card, found in rows_of(results, "op"):
        own = [r for r in found if r["tokens"] == MAIN and r["batch"] == 1 and r["pass"] in ("forward", "parts")]
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
            rows.append([card, str(row["features"]), name, *cells, error, note.replace("|", " ")])
    header = ["card", "m", "variant", "ms", "times faster than FlashAttention", "time / floor", "relative error", "note"]
    return drawn(header, rows)


def decode_rows(results: dict, wanted) -> list[list[str]]:
    """A line per card, shape, batch and context that is `wanted`: tokens/s by contender, then ratios."""
    lines = []
    for card, found in rows_of(results, "model"):
        own = [row for row in found if row["phase"] == "decode" and wanted(row)]
        for key in dict.fromkeys((row["shape"], row["batch"], row["context"]) for row in own):
            here = {row["contender"]: row for row in own if (row["shape"], row["batch"], row["context"]) == key}
            speeds = {name: row["tokens_per_s"] for name, row in here.items() if "tokens_per_s" in row}
            ours = max((speeds[name] for name in speeds if name.startswith("dijiang")), default=None)
            static = max((speeds[name] for name in speeds if name.startswith("softmax static")), default=None)
            cells = [number(speeds.get(name), 0) for name in DECODE_COLUMNS]
            extra = [name for name in ("softmax static compiled", "dijiang compiled") if name in speeds]
            note = ", ".join(f"{name} {number(speeds[name], 0)}" for name in extra)
            shape, batch, context = key
            gains = [ratio(ours, speeds.get("softmax")), ratio(ours, static)]
            lines.append([card, shape, str(batch), f"{context:,}", *cells, *gains, note, here])
    return lines


def decode_table(results: dict) -> str:
    """The paper's Table 1: tokens/s at 2,048 tokens."""
    from dijiang.evaluate.latency.measure import PAPER_SPEEDS

    rows = []
    for line in decode_rows(results, lambda row: row["context"] == CONTEXT):
        card, shape, batch, _, *cells, note, _ = line
        softmax, dijiang = PAPER_SPEEDS.get(shape, (None, None))
        rows.append([card, shape, batch, *cells, ratio(dijiang, softmax), note])
    header = ["card", "shape", "batch", *DECODE_COLUMNS.values(), "best over default", "best over static", "paper's ratio"]
    return drawn([*header, "compiled"], rows)


def lengths_table(results: dict) -> str:
    """The paper's Figure 4: tokens/s and memory against context."""
    rows = []
    keys = {(c, r["shape"], r["batch"]) for c, found in rows_of(results, "model") for r in found
            if r["phase"] == "decode" and r["context"] != CONTEXT}  # fmt: skip
    for card, shape, batch, context, *cells, _, here in decode_rows(results, lambda row: True):
        if (card, shape, int(batch)) not in keys:
            continue
        peaks = [here.get(name, {}).get("peak_bytes") for name in ("softmax", "softmax static graph", "dijiang graph")]
        memory = [number(peak / 2**20 if peak else None, 0) for peak in peaks]
        speeds = [cells[list(DECODE_COLUMNS).index(x)] for x in ("softmax", "softmax static graph", "dijiang graph")]
        rows.append((shape, int(batch), int(context.replace(",", "")), [card, shape, batch, context, *speeds, *memory]))
    header = ["card", "shape", "batch", "context", "default cache", "static, CUDA graph", "ours, CUDA graph"]
    header += ["default cache, MiB", "static, MiB", "ours, MiB"]
    return drawn(header, [row[-1] for row in sorted(rows, key=lambda row: row[:3])])


def prefill_table(results: dict) -> str:
    """Prompts: milliseconds until the first token is known."""
    rows = []
    for card, found in rows_of(results, "model"):
        own = [row for row in found if row["phase"] == "prefill"]
        for key in dict.fromkeys((row["shape"], row["batch"], row["context"]) for row in own):
            here = {row["contender"]: row for row in own if (row["shape"], row["batch"], row["context"]) == key}
            times = {name: row.get("median_s") for name, row in here.items()}
            cells = [number(times.get(name) and times[name] * 1e3) for name in ("softmax", "dijiang")]
            note = here.get("dijiang", {}).get("flex_attention") or here.get("dijiang", {}).get("left_out") or ""
            shape, batch, context = key
            gain = ratio(times.get("softmax"), times.get("dijiang"))
            rows.append([card, shape, str(batch), f"{context:,}", *cells, gain, note.replace("|", " ")])
    return drawn(["card", "shape", "batch", "prompt", "softmax, ms", "ours, ms", "times faster", "note"], rows)


def targets_table(results: dict) -> str:
    """What was aimed for and whether it was met."""
    rows = []
    for card, steps in results.items():
        for step in STEPS:
            found = steps.get(step, {})
            for line in [*found.get("targets", []), *recovery_targets(step, found)]:
                rows.append([line["name"], card, line["target"], number(line["measured"]), "yes" if line["met"] else "no"])
    return drawn(["target", "card", "aimed for", "measured", "met"], rows)


def plot(results: dict, path: Path) -> None:
    """Forward time of the op against tokens, batch 1, one line per variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    card, found = rows_of(results, "op")[0]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    own = [r for r in found if r["pass"] == "forward" and r["batch"] == 1 and "median_s" in r]
    for variant, features in dict.fromkeys((r["variant"], r["features"]) for r in own):
        points = sorted(
            (r["tokens"], r["median_s"] * 1e3) for r in own if (r["variant"], r["features"]) == (variant, features)
        )
        if len(points) > 1:
            label = OP_COLUMNS.get(variant, variant) + (f", m={features}" if features else "")
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=label)
    floors = sorted({(r["tokens"], r["floor_s"] * 1e3) for r in own if r["features"] == 128})
    if floors:
        axes.plot(*zip(*floors, strict=True), color="#4c566a", linewidth=1, linestyle="--", label="floor, m=128")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("forward pass, ms")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(card, fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def lengths_measured(results: dict) -> bool:
    """Whether the op was measured at several lengths, so that there is something to plot."""
    return any(len({row["tokens"] for row in rows if "median_s" in row}) > 1 for _, rows in rows_of(results, "op"))


def figure_line(results: dict) -> str:
    return "![Forward time of the op against tokens](gpu_op.png)" if lengths_measured(results) else NOTHING


def step_table(results: dict) -> str:
    """Decoding steps, milliseconds, without and with the Triton kernel of the linear layer."""
    rows = []
    for card, steps in results.items():
        if not {"model", BEFORE} <= steps.keys():
            continue
        before, after = (
            {(r["shape"], r["batch"], r["contender"]): r["median_s"] for r in steps[name].get("rows", []) if "median_s" in r}
            for name in (BEFORE, "model")
        )
        for key in (key for key in after if key in before and key[2] in ("dijiang", "dijiang graph")):
            shape, batch, contender = key
            times = [number(1e3 * found[key]) for found in (before, after)]
            way = "CUDA graph" if contender.endswith("graph") else "eager"
            rows.append([card, shape, str(batch), way, *times, ratio(before[key], after[key])])
    return drawn(["card", "shape", "batch", "step", "by torch, ms", "by the Triton kernel, ms", "times faster"], rows)


def fill(page: str, results: dict) -> str:
    """docs/gpu.md with its tables."""
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
        "recovery": recovery_table(results) or NOTHING,
        "recall": recall_table(results) or NOTHING,
        "training-speed": speed_table(results) or NOTHING,
    }
    return between_marks(page, tables)


def fill_corpus(page: str) -> str:
    """docs/corpus.md with its table."""
    facts = json.loads((RESULTS / "corpus.json").read_text(encoding="utf-8"))
    return between_marks(page, {"corpus": corpus_table(facts)})


def main() -> None:
    CORPUS_PAGE.write_text(fill_corpus(CORPUS_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    results = load()
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    if lengths_measured(results):
        plot(results, PAGE.with_name("gpu_op.png"))


if __name__ == "__main__":
    main()
