"""docs/paper.md: its tables are those of the result files, and its verdicts follow from them."""

import importlib
import math
import re
from pathlib import Path

import numpy as np
import pytest

from dijiang.evaluate.feature_map_study.report import pick

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("paper_report")


@pytest.fixture
def results(report) -> dict:
    return report.load_results()


def test_tables_are_those_of_the_results(report, results):
    assert report.fill(PAGE, results) == PAGE
    assert PAGE.count("\n| --- |") == 8
    evaluation = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert report.fill_evaluation(evaluation, results) == evaluation
    assert report.speed_table() in PAGE
    for name in ("claim", "map", "baseline", "latency", "flat", "prefill", "distance"):
        assert getattr(report, f"{name}_table")(results) in PAGE


def test_a_changed_result_changes_the_page(report, results):
    results["recovery"]["runs"]["linear"]["stages"]["distill"]["ratio"]["1024"] = 7.25
    changed = report.fill(PAGE, results)
    assert changed != PAGE and changed.count("7.250") == 2


def test_every_claim_names_a_file_and_what_made_it(report):
    for claim, (_, file, how) in report.CLAIMS.items():
        assert (ROOT / "benchmarks" / "results" / f"{file}.json").is_file(), claim
        made_by = re.search(r"python (\S+)`|\]\(([^)]+)\)", how)
        path = ROOT / made_by[1] if made_by[1] else ROOT / "docs" / made_by[2]
        assert path.is_file(), claim


def test_numbers_outside_tables_are_of_the_results_too(results):
    text = re.sub(r"<!-- (\w+):start -->.*?<!-- \1:end -->", "", PAGE, flags=re.DOTALL)
    assert f"kernels alone on {results['ablation']['tokens']:,} tokens" in text
    assert len(results["ablation"]["layers"]) == 4 and "We make four layers" in text
    tokens = [run["stages"]["distill"]["tokens"] for run in results["recovery"]["runs"].values() if "distill" in run["stages"]]
    assert max(tokens) < 1_000_000 and "budgets below a million tokens" in text


@pytest.mark.parametrize(("dtype", "name"), [(np.float16, "fp16"), (np.float32, "fp32")])
def test_overflow_of_the_released_tables(report, dtype, name):
    """Their entries are g^-n with g = 1 - exp(log 1/32) for the first head."""
    g = 1 - math.exp(math.log(1 / 32))
    n = report.first_overflow(report.LARGEST[name])
    with np.errstate(over="ignore"):
        assert np.isinf(dtype(np.float64(g) ** -n)) and np.isfinite(dtype(np.float64(g) ** -(n - 1)))


def test_verdicts_follow_from_the_results(results):
    kernels, decode = results["kernels"], results["model"]["decode"]
    for growth in results["attention"]["growth"]:
        first, last = growth["rows"][0], growth["rows"][-1]
        factor = last["timing"]["median_s"] / first["timing"]["median_s"]
        assert factor < 1.1 * last["tokens"] / first["tokens"]  # linear time
    short, long = (pick(decode, batch=1, tokens=tokens) for tokens in (512, 16384))
    assert short["state_bytes"] == long["state_bytes"]
    assert long["tokens_per_s"]["dijiang"] > 0.95 * short["tokens_per_s"]["dijiang"]
    assert long["tokens_per_s"]["llama static"] < 0.5 * short["tokens_per_s"]["llama static"]

    slopes = [s for s in kernels["slopes"] if s["weights"] == "equal" and s["from"] == 16]
    sobol = [s for s in slopes if s["map"] == "pff-sobol-chi"]
    assert all(s["slope"][0] > -0.9 for s in slopes if s["metric"] == "rmse")  # nowhere -1
    for inputs in ("gaussian-0.5-d4", "gaussian-0.5-d64"):  # steeper than Monte Carlo
        quasi = pick(sobol, inputs=inputs, metric="rmse")
        assert quasi["slope"][2] < pick(slopes, inputs=inputs, metric="rmse", map="prf")["slope"][1]
    assert all(s["slope"][0] > -0.1 for s in slopes if s["inputs"] == "real" and s["metric"] == "attention")

    fitted = [r for r in kernels["ratios"] if r["metric"] == "calibration"]
    assert all(r["largest"] <= 1 for r in fitted)
    pair = {"over": ["pff-sobol-chi", "nnls"], "under": ["pff-sobol-chi", "equal"], "metric": "rmse"}
    assert pick(kernels["ratios"], inputs="real", **pair)["ratio"][1] > 1

    floor = [r["rmse"][0] for r in kernels["rows"] if (r["inputs"], r["map"]) == ("gaussian-1-d64", "pff-sobol-normal")]
    assert max(floor[-6:]) / min(floor[-6:]) < 1.7 and kernels["limits"]["gaussian-1-d64"]["normal_rmse"] > 0.6

    real = [r for r in kernels["rows"] if r["inputs"] == "real" and r["weights"] == "equal"]
    mean_alone = kernels["limits"]["real"]["plain_mean_attention"]
    assert min(min(r["attention"][0], r["attention_dropped"][0]) for r in real) > mean_alone - 0.02


def test_order_of_maps_is_as_the_page_says(results):
    runs = results["ablation"]["runs"]
    far, near = (
        {
            name: np.mean([run["perplexity_ratio"] for run in runs[f"{name}, {window}, none decay"].values()])
            for name in ("wdcf m=d", "pff", "prf", "cosformer", "relu", "hedgehog", "ldcf")
        }
        for window in ("no window", "window")
    )
    assert far["wdcf m=d"] < min(far["prf"], far["cosformer"])  # ahead, as in the paper
    assert all(far[name] < far["wdcf m=d"] for name in ("pff", "relu", "hedgehog", "ldcf"))  # whose directions train
    assert max(near.values()) - min(near.values()) < 0.01


def test_what_the_page_says_of_speed(report, results):
    """Each sentence about decoding at 2,048 tokens and beyond, against the rows of all three shapes."""
    rows = {
        (shape, row["batch"], row["context"]): row
        for shape in report.SHAPES
        for row in results[f"latency-{shape}"]["rows"]
        if "left_out" not in row
    }
    paper = {shape: report.PAPER_SPEEDS[shape][1] / report.PAPER_SPEEDS[shape][0] for shape in report.SHAPES}
    for shape in report.SHAPES:
        one, eight, many = (rows[shape, batch, 2048] for batch in (1, 8, 32))
        assert one["ratio"]["softmax"] < paper[shape]
        assert one["floor_ratio"]["softmax"] < 1.9 and one["floor_ratio"]["softmax static"] < 1.3
        assert min(x["ratio"]["softmax"] for x in (eight, many)) > paper[shape]
        assert (eight["ratio"]["softmax static"] > paper[shape]) == (shape == "pythia-70m")
        assert (many["ratio"]["softmax static"] > paper[shape]) == (shape == "pythia-70m")
        assert round(eight["floor_ratio"]["softmax static"] - 2.4, 1) in (0.0, 0.1)
        assert round(many["floor_ratio"]["softmax static"] - 4.1, 1) in (0.0, 0.1)
        for row in (eight, many):
            assert 2.75 < row["of_floor"]["dijiang"] < 5.1 and 1.6 < row["of_floor"]["softmax static"] < 2.45
    far = [row["ratio"] for (_, _, context), row in rows.items() if context in (8192, 16384)]
    assert [round(f(r["softmax static"] for r in far), 1) for f in (min, max)] == [1.4, 9.5]
    assert [round(f(r["softmax"] for r in far), 1) for f in (min, max)] == [1.9, 62.0]
    flat = [rows[shape, 1, 32768]["timings"]["dijiang"]["median_s"] / rows[shape, 1, 1024]["timings"]["dijiang"]["median_s"]
            for shape in report.SHAPES]  # fmt: skip
    assert max(flat) < 1.1 and "within 10 %" in PAGE
    reading = {row["context"]: row["ratio"]["softmax"] for row in results[report.PREFILL]["rows"]}
    assert reading[512] < reading[2048] < 1 < reading[8192]
    bare = {row["context"]: row["ratio"]["softmax"] for row in results[report.BARE]["rows"]}
    assert 1 < bare[2048] < bare[8192]


def test_what_the_evaluation_page_says_of_its_examples(results):
    window, linear = (
        {
            task["name"]: {key: x["value"] for key, x in task["values"].items()}
            for task in results[f"{name}/evaluation"]["tasks"]
        }
        for name in ("window", "linear")
    )
    for task in results["window/evaluation"]["tasks"]:
        values = window[task["name"]]
        if task["kind"] == "perplexity":
            assert 0.055 < values["window_only"] / values["student"] - 1 < 0.116
            assert (task["recovered"] is None) == ("4,096" in task["name"])
            assert "4,096" in task["name"] or task["over_training_free"]["value"] > 0.745
        elif task["kind"] == "recall" and "128 tokens" not in task["name"]:
            assert abs(values["student"] - values["window_sinks"]) < 0.02
        elif task["kind"] == "agreement":
            assert abs(values["student"] - values["window_sinks"]) < 0.01
    for task in results["linear/evaluation"]["tasks"]:
        values = linear[task["name"]]
        ratio = values["student"] / values["window_sinks"]
        assert ratio > 0.998 if task["better"] == "lower" else ratio < 1
        assert task["kind"] != "recall" or values["student"] == 0
