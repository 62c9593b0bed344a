"""
The tables of docs/paper.md and docs/evaluation.md: claims of arXiv 2403.19928 and our measurements of them from
benchmarks/results, and an example of an evaluation.

    python benchmarks/paper_report.py    # writes them into the pages
"""

import argparse
import math
import shutil
import statistics
import tempfile
from pathlib import Path

from pages import DOCS, between_marks, read_result, redraw
from recovery_report import mean

from dijiang.evaluate.feature_map_study.report import pick
from dijiang.evaluate.latency.measure import PAPER_CONTEXT, PAPER_SPEEDS, PEERS
from dijiang.evaluate.report import tables
from dijiang.evaluate.report.latency_figures import draw_latency
from dijiang.evaluate.report.tables import markdown_table

EXAMPLE, LINEAR_EXAMPLE = "window/evaluation", "linear/evaluation"  # the runs `window` and `linear` of recovery.json
SHAPES = ("pythia-70m", "pythia-160m", "pythia-410m")
PREFILL = "latency-prefill-pythia-160m"  # with the recommended layers
BARE = "latency-prefill-no-window-pythia-160m"  # without their window
DRAWN = "latency-pythia-410m"  # the decoding in the figures
SOURCES = (
    "ablation",
    "attention",
    "kernels",
    "model",
    "recovery",
    EXAMPLE,
    LINEAR_EXAMPLE,
    PREFILL,
    BARE,
    *(f"latency-{shape}" for shape in SHAPES),
)
LATENCY_CONTEXTS = (2048, 8192, 16384)

# the paper's table of maps at 410M: mean over six tasks, and our name of the map, None where we have no such layer
PAPER_MAPS = {
    "DiJiang (WDCF)": (0.457, "wdcf m=d"),
    "PFF": (0.426, "pff"),
    "Performer (PRF)": (0.418, "prf"),
    "cosFormer": (0.405, "cosformer"),
    "Linformer": (0.398, None),
    "RetNet": (0.384, None),
}
OTHER_MAPS = {"LDCF, WDCF whose directions train": "ldcf", "T2R (ReLU)": "relu", "Hedgehog": "hedgehog", "1 + ELU": "elu"}
PAPER_TEACHER = 0.454
LARGEST = {"fp16": 65504.0, "fp32": 3.4028235e38}


def source(name: str) -> str:
    return f"[{name}.json](../benchmarks/results/{name}.json)"


def first_overflow(largest: float) -> int:
    """The first n at which g^-n exceeds `largest`, for g = 1 - 1/32, the fastest head of the released code's decay tables."""
    return math.floor(math.log(largest) / -math.log1p(-1 / 32)) + 1


def linear_time(results: dict) -> tuple[str, str]:
    growth = pick(results["attention"]["growth"], dtype="float32", features=64)["rows"]
    short, long = growth[0], growth[-1]
    factor = long["timing"]["median_s"] / short["timing"]["median_s"]
    fp16, fp32 = (first_overflow(largest) for largest in LARGEST.values())
    measured = (
        f"{long['tokens'] // short['tokens']} times the tokens ({short['tokens']:,} to {long['tokens']:,}) take {factor:.1f} "
        f"times as long (the op, float32, 64 features). The released code computes all T² weights; its tables of g^-n exceed "
        f"fp16 after {fp16} tokens and fp32 after {fp32:,}"
    )
    return measured, "holds here, not for the released code"


def flat_memory(results: dict) -> tuple[str, str]:
    short, long = (pick(results["model"]["decode"], batch=1, tokens=tokens) for tokens in (512, 16384))
    assert short["state_bytes"] == long["state_bytes"]
    measured = (
        f"state {long['state_bytes'] / 2**20:.1f} MiB at {short['tokens']:,} and at {long['tokens']:,} tokens; KV cache "
        f"{short['cache_bytes'] / 2**20:.1f} and {long['cache_bytes'] / 2**20:.1f} MiB"
    )
    return measured, "holds"


def flat_speed(results: dict) -> tuple[str, str]:
    rows = [pick(results["model"]["decode"], batch=1, tokens=tokens)["tokens_per_s"] for tokens in (512, 16384)]
    shown = {name: " and ".join(f"{row[name]:.1f}" for row in rows) for name in ("dijiang", "llama", "llama static")}
    measured = (
        f"tokens/s at 512 and 16,384 tokens of context, two CPU cores, SmolLM2-135M's shape: {shown['dijiang']}; softmax "
        f"{shown['llama']}, with a static cache {shown['llama static']}"
    )
    return measured, "holds"


def slope(results: dict, inputs: str, name: str) -> str:
    metric = "attention" if inputs == "real" else "rmse"
    wanted = {"weights": "equal", "metric": metric, "from": 16}
    return f"{pick(results['kernels']['slopes'], inputs=inputs, map=name, **wanted)['slope'][0]:.2f}"


def rates(results: dict) -> tuple[str, str]:
    sobol = [slope(results, inputs, "pff-sobol-chi") for inputs in ("gaussian-0.5-d4", "gaussian-0.5-d64", "real")]
    prf = [slope(results, inputs, "prf") for inputs in ("gaussian-0.5-d4", "gaussian-0.5-d64", "real")]
    measured = (
        f"slope of log error against log m: Monte Carlo {prf[0]} (d = 4) and {prf[1]} (d = 64), Sobol points {sobol[0]} and "
        f"{sobol[1]}, all at norm 0.5; on a real model's queries and keys {prf[2]} and {sobol[2]}"
    )
    return measured, "half true: steeper, nowhere -1, and not on real inputs"


def weights(results: dict) -> tuple[str, str]:
    pair = {"over": ["pff-sobol-chi", "nnls"], "under": ["pff-sobol-chi", "equal"]}
    fitted = max(r["largest"] for r in results["kernels"]["ratios"] if r["metric"] == "calibration")
    small, real = (
        f"{pick(results['kernels']['ratios'], inputs=inputs, metric='rmse', **pair)['ratio'][0]:.2f}"
        for inputs in ("gaussian-1-d64", "real")
    )
    measured = (
        f"error over that of equal weights: at most {fitted:.2f} on the pairs fitted to; on other pairs {small} at norm 1 "
        f"(WPFF, d = 64), {real} on a real model's"
    )
    return measured, "true where they are fitted, not beyond"


def radius(results: dict) -> tuple[str, str]:
    wanted = {"inputs": "gaussian-1-d64", "weights": "equal", "m": 4096}
    normal, chi = (pick(results["kernels"]["rows"], map=f"pff-sobol-{law}", **wanted)["rmse"][0] for law in ("normal", "chi"))
    measured = f"relative error at d = 64, norm 1, m = 4096: {normal:.3g}; with the radius of a normal vector {chi:.3g}"
    return measured, "false for d > 1: a floor that more features do not lower"


def cosine(results: dict) -> tuple[str, str]:
    ratios = []
    for law in ("normal", "chi"):
        pair = {"over": [f"wdcf-{law}", "equal"], "under": [f"pff-sobol-{law}", "equal"], "metric": "rmse"}
        ratios.append(pick(results["kernels"]["ratios"], inputs="gaussian-0.5-d64", **pair)["ratio"][0])
    measured = f"its error over PFF's at d = 64, norm 0.5: {ratios[0]:.2f} with the paper's radius, {ratios[1]:.2f} with chi"
    return measured, "true with the paper's radius, where both sit on that floor"


def untrained(results: dict) -> tuple[str, str]:
    rows = [r for r in results["kernels"]["rows"] if r["inputs"] == "real" and r["weights"] == "equal" and r["m"] == 4096]
    best = min(min(r["attention"][0], r["attention_dropped"][0]) for r in rows)
    mean_alone = results["kernels"]["limits"]["real"]["plain_mean_attention"]
    measured = (
        f"relative error of the attention output, SmolLM2-135M, best untrained map with 4,096 features: {best:.2f}; plain "
        f"mean over the visible keys: {mean_alone:.2f}"
    )
    return measured, "not as they are drawn: they must be trained on the attention's output"


def best_map(results: dict) -> tuple[str, str]:
    runs = results["ablation"]["runs"]
    window, no_window = (
        {name: mean(runs[f"{name}, {setting}, none decay"], "perplexity_ratio")[:5] for name in ("wdcf m=d", "prf", "relu")}
        for setting in ("window", "no window")
    )
    measured = (
        f"perplexity over the teacher's, four layers of SmolLM2-135M, no window: {no_window['wdcf m=d']}, "
        f"Performer {no_window['prf']}, T2R {no_window['relu']}; with a window {window['wdcf m=d']}, {window['prf']}, "
        f"{window['relu']}"
    )
    return measured, "not seen: ahead of Performer and cosFormer, behind maps whose directions train (next table)"


def few_tokens(results: dict) -> tuple[str, str]:
    runs = results["recovery"]["runs"]
    stages = {name: runs[name]["stages"]["distill"] for name in ("window", "linear")}
    shown = {name: (f"{stage['tokens']:,}", f"{stage['ratio']['1024']:.3f}") for name, stage in stages.items()}
    measured = (
        f"SmolLM2-135M: {shown['window'][1]} times the teacher's perplexity after {shown['window'][0]} tokens with window, "
        f"sinks and linear branch; {shown['linear'][1]} after {shown['linear'][0]} with linear attention and four sinks"
    )
    return measured, "not tested at that scale"


ATTENTION, MODEL, ABLATION = (f"`python benchmarks/{name}.py`" for name in ("attention", "model", "ablation"))
STUDY, RECOVERY = "[kernels.md](kernels.md)", "[recovery.md](recovery.md)"
# by claim: the function that draws it, the result file, and the command or page that explains how it was measured
CLAIMS = {
    "Attention in time linear in length": (linear_time, "attention", ATTENTION),
    "Memory of decoding does not grow (figure 4)": (flat_memory, "model", MODEL),
    "Throughput does not fall with length (figure 4)": (flat_speed, "model", MODEL),
    "Error of quasi-Monte Carlo features falls as 1/m, of Monte Carlo as 1/√m": (rates, "kernels", STUDY),
    "The best weights are never worse than equal ones": (weights, "kernels", STUDY),
    "Radii t are normal quantiles of uniform points": (radius, "kernels", STUDY),
    "The cosine transform does as well as other directions (WDCF as WPFF)": (cosine, "kernels", STUDY),
    "The features stand in for a pretrained model's attention": (untrained, "kernels", STUDY),
    "WDCF is the best of the maps (ablation, 410M)": (best_map, "ablation", ABLATION),
    "1/16 of Pythia's tokens, 1/50 of LLaMA-2's win the quality back": (few_tokens, "recovery", RECOVERY),
}


def claim_table(results: dict) -> str:
    rows = [[claim, *measure(results), f"{source(file)}, {how}"] for claim, (measure, file, how) in CLAIMS.items()]
    return markdown_table(["claim", "measured", "verdict", "where"], rows).replace("---:", "---")


def map_table(results: dict) -> str:
    """The paper's comparison of maps next to ours: its score, higher is better, and our ratios, lower is better."""
    runs = results["ablation"]["runs"]
    rows = []
    for title, (score, name) in (PAPER_MAPS | {title: (None, name) for title, name in OTHER_MAPS.items()}).items():
        ours = [mean(runs.get(f"{name}, {window}, none decay", {}), "perplexity_ratio") for window in ("window", "no window")]
        rows.append([title, "-" if score is None else f"{score:.3f}", *ours])
    rows.append(["teacher", f"{PAPER_TEACHER:.3f}", "1", "1"])
    return markdown_table(["map", "paper: mean of six tasks, 410M", "ours: window", "ours: no window"], rows)


def speed_table() -> str:
    rows = [[name, f"{t:,}", f"{d:,}", f"{d / t:.2f}x"] for name, (t, d) in PAPER_SPEEDS.items()]
    return markdown_table(["model", "paper: softmax", "paper: DiJiang", "paper: ratio"], rows)


def latency_table(results: dict) -> str:
    """Decoding in the paper's shapes: how many times faster DiJiang is, and would be if all models reached their floors."""
    rows = []
    for shape in SHAPES:
        for context in LATENCY_CONTEXTS:
            for row in results[f"latency-{shape}"]["rows"]:
                if row["context"] != context:
                    continue
                start = [shape, f"{context:,}", str(row["batch"])]
                if "left_out" in row:
                    rows.append([*start, "-", "-", "-", "-"])
                    continue
                ratios = [" / ".join(f"{row[key][peer]:.2f}" for peer in PEERS) for key in ("ratio", "floor_ratio")]
                softmax, dijiang = PAPER_SPEEDS[shape]
                paper = f"{dijiang / softmax:.2f}" if context == PAPER_CONTEXT else ""
                rows.append([*start, f"{row['tokens_per_s']['dijiang']:.1f}", *ratios, paper])
    return markdown_table(["model", "context", "batch", "DiJiang tokens/s", "times faster", "at the floors", "paper"], rows)


def flat_table(results: dict) -> str:
    """Milliseconds of a step of one sequence at 1,024 and 32,768 tokens of context."""
    rows = []
    for shape in SHAPES:
        timings = {row["context"]: row["timings"] for row in results[f"latency-{shape}"]["rows"] if row["batch"] == 1}
        for name in ("dijiang", *PEERS):
            times = [1e3 * timings[context][name]["median_s"] for context in (1024, 32768)]
            rows.append([shape, name, *(f"{time:.1f}" for time in times), f"{times[1] / times[0]:.2f}"])
    return markdown_table(["model", "", "1,024", "32,768", "ratio"], rows)


def prefill_table(results: dict) -> str:
    """Seconds to the first token of one prompt, and how many times faster DiJiang is."""
    rows = []
    for title, name in (("with window and sinks", PREFILL), ("without", BARE)):
        for row in results[name]["rows"]:
            times = [f"{row['timings'][contender]['median_s']:.2f}" for contender in ("dijiang", *PEERS)]
            rows.append([title, f"{row['context']:,}", *times, " / ".join(f"{row['ratio'][peer]:.2f}" for peer in PEERS)])
    return markdown_table(["", "tokens", "DiJiang", *PEERS, "times faster"], rows)


def distance_table(results: dict) -> str:
    """Mean distance of attention from the teacher's over heads, for all layers, the first third and the others."""
    layers = results[EXAMPLE]["maps"]["layers"]
    third = len(layers) // 3
    parts = (layers, layers[:third], layers[third:])
    titles = {"student": "DiJiang", "window_sinks": "window + sinks, training-free", "performer": "Performer, untrained"}
    rows = []
    for model, title in titles.items():
        heads = [[distance for layer in part for distance in layer["distance"][model]] for part in parts]
        rows.append([title, *(f"{statistics.mean(distances):.3f}" for distances in heads)])
    return markdown_table(["", "all layers", f"the first {third}", "the others"], rows)


def baseline_table(results: dict) -> str:
    """Recovered models next to those without a linear branch, trained or not."""
    runs = results["recovery"]["runs"]
    shown = {
        "window and sinks, no training": runs["window"]["stages"]["converted"],
        "window and sinks, distilled": runs["window_only"]["stages"]["distill"],
        "window, sinks and linear branch": runs["window"]["stages"]["distill"],
        "linear branch and four sinks, no window": runs["linear"]["stages"]["distill"],
    }
    rows = [[title, f"{x['tokens']:,}", *(f"{x['ratio'][n]:.3f}" for n in ("1024", "4096"))] for title, x in shown.items()]
    return markdown_table(["", "tokens trained on", "1,024", "4,096"], rows)


def load_results() -> dict:
    return {name: read_result(name) for name in SOURCES}


def fill(page: str, results: dict) -> str:
    """The text of docs/paper.md with its tables."""
    tables = {
        "claims": claim_table(results),
        "maps": map_table(results),
        "speeds": speed_table(),
        "latency": latency_table(results),
        "flatness": flat_table(results),
        "prefill": prefill_table(results),
        "attention-maps": distance_table(results),
        "controls": baseline_table(results),
    }
    return between_marks(page, tables)


def fill_evaluation(page: str, results: dict) -> str:
    """The text of docs/evaluation.md with its examples."""
    header, rows = tables.score_table(results[LINEAR_EXAMPLE])
    excerpt = [row for row in rows if "128 tokens" in row[0] or "anarchism" in row[0]]
    example = markdown_table(*tables.score_table(results[EXAMPLE]))
    return between_marks(page, {"evaluation": example, "evaluation-linear": markdown_table(header, excerpt)})


def main() -> None:
    results = load_results()
    redraw("paper", lambda page: fill(page, results))
    redraw("evaluation", lambda page: fill_evaluation(page, results))
    with tempfile.TemporaryDirectory() as folder:
        for picture in draw_latency(results[DRAWN], Path(folder)):
            shutil.copyfile(picture, DOCS / picture.name)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
