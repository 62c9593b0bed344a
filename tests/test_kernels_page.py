"""Tables, numbers and verdicts of docs/kernels.md are those of the recorded run."""

import json
import re
from pathlib import Path

import pytest

from dijiang.evaluate.feature_map_study import report

ROOT = Path(__file__).resolve().parents[1]
RECORDED = json.loads((ROOT / "benchmarks" / "results" / "kernels.json").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


def recorded(kind: str, **wanted) -> dict:
    return report.pick(RECORDED[kind], **wanted)


def recorded_slope(inputs: str, name: str, metric: str = "rmse") -> list[float]:
    return recorded("slopes", inputs=inputs, map=name, weights="equal", metric=metric, **{"from": 16})["slope"]


def against(inputs: str, over: list[str], under: list[str]) -> float:
    return recorded("ratios", inputs=inputs, over=over, under=under, metric="rmse")["ratio"][0]


def test_tables_of_the_page_are_those_of_the_recorded_run():
    tables = report.tables(RECORDED)
    assert all(table in PAGE for table in tables)
    assert PAGE.count("\n| --- |") == len(tables)
    assert (ROOT / "docs" / "kernels.png").exists() and RECORDED["command"] in PAGE


def test_numbers_in_the_page_are_those_of_the_recorded_run():
    real, centred = RECORDED["limits"]["real"], RECORDED["limits"]["centred"]
    settings, small = RECORDED["settings"], "gaussian-0.5-d64"
    chi, normal, prf = ["pff-sobol-chi", "equal"], ["pff-sobol-normal", "equal"], ["prf", "equal"]
    calibrated = [ratio["largest"] for ratio in RECORDED["ratios"] if ratio["metric"] == "calibration"]
    attention = [min(r["attention"][0], r["attention_dropped"][0]) for r in RECORDED["rows"] if r["inputs"] == "centred"]
    wpff = [recorded("rows", inputs="gaussian-2-d64", map=name, weights="nnls", m=512)["rmse"][0] for name, _ in (normal, chi)]
    dropped = [
        recorded("rows", inputs=inputs, map="wdcf-normal", weights="equal", m=4096)["attention_dropped"][0]
        for inputs in ("real", "centred")
    ]
    few = {"inputs": "gaussian-0.5-d4", "map": "pff-sobol-chi", "weights": "nnls", "from": 16}
    steep = recorded("slopes", **few)["slope"][0]
    statements = [
        f"made in {RECORDED['seconds']:.0f} s on one CPU thread",
        f"{settings['pairs']} Gaussian queries and {settings['pairs']} keys",
        f"{settings['heads']} heads of {settings['heads']} layers of SmolLM2-135M on {settings['tokens']} tokens",
        f"mean norms {real['query_norm']:.1f} and {real['key_norm']:.1f}, q.k up to {real['largest_score']:.1f}",
        f"less their means ({centred['query_norm']:.1f} and {centred['key_norm']:.1f})",
        f"over heads and {settings['seeds']} seeds",
        f"Monte Carlo's slope is {recorded_slope(small, 'prf')[0]:.2f} at norm 0.5",
        f"with Sobol points {recorded_slope('gaussian-0.5-d4', chi[0])[0]:.2f} at d = 4 and "
        f"{recorded_slope(small, chi[0])[0]:.2f} at d = 64",
        f"at d = 64 and m = 4096 its error is {against(small, chi, prf):.2f} times PRF's at norm 0.5, "
        f"{against('gaussian-1-d64', chi, prf):.2f} times at norm 1, "
        f"{against('gaussian-2-d64', chi, prf):.2f} times at norm 2",
        f"WPFF's slope at d = 4 is {steep:.2f} up to m = {settings['most_weighted']}",
        f"at most {max(calibrated):.2f} times the error of equal ones",
        f"at norm 2 and m = 512 WPFF has error {wpff[0]:.3g} with the normal radius and {wpff[1]:.3g} with chi",
        f"WDCF has {against(small, ['wdcf-chi', 'equal'], chi):.2f} times PFF's error at norm 0.5 and "
        f"{against('gaussian-1-d64', ['wdcf-chi', 'equal'], chi):.2f} times at norm 1",
        f"more than 0.02 better than the plain mean over the visible keys ({real['plain_mean_attention']:.2f}) or, centred, "
        f"than the keys' weights alone ({centred['key_weights_attention']:.2f})",
        f"hardly differs from that mean ({dropped[0]:.2f}) and, centred, from those weights ({dropped[1]:.2f})",
        f"it costs an error of {real['exact_attention_dropped']:.2f}",
        f"({min(attention):.2f} at best)",
    ]
    prose = " ".join(line for line in PAGE.splitlines() if not line.startswith("|"))
    prose = " ".join(prose.split())
    for statement in statements:
        assert statement in prose, statement
    known = {number for statement in statements for number in re.findall(r"\d+\.\d+", statement)}
    for number in re.findall(r"(?<![\d.])\d+\.\d+(?![\d.]*/)", prose.replace("2403.19928", "")):
        assert number in known, f"{number} is from nowhere"


def test_verdicts_of_the_page_are_those_of_the_recorded_run():
    low_norms = ("gaussian-0.5-d4", "gaussian-0.5-d64", "gaussian-1-d64", "gaussian-2-d64")
    # 1: steeper than Monte Carlo at small norms, never -1
    assert all(s["slope"][1] > -1.0 for s in RECORDED["slopes"] if s["weights"] == "equal")
    fitted = {s["inputs"] for s in RECORDED["slopes"] if s["weights"] == "nnls" and s["from"] == 16 and s["slope"][2] < -1.0}
    assert fitted == {"gaussian-0.5-d4"}
    for name in ("pff-sobol-chi", "pff-halton-chi", "pff-lattice-chi"):
        for inputs in low_norms[:3]:
            assert recorded_slope(inputs, name)[2] < recorded_slope(inputs, "prf")[1]
    flat = [s for s in RECORDED["slopes"] if s["from"] == 16 and s["weights"] == "equal" and (
        s["inputs"] == "gaussian-4-d64" or s["metric"] == "attention")]  # fmt: skip
    assert all(s["slope"][0] > -0.1 for s in flat)
    # 2: never worse on their own pairs; worse on others
    fitted = [r for r in RECORDED["ratios"] if r["over"][0] == r["under"][0] and r["metric"] != "attention"]
    assert all(r["largest"] <= 1.0 for r in fitted if r["metric"] == "calibration")
    for r in fitted:
        if r["metric"] == "rmse" and r["inputs"] in low_norms:
            assert r["ratio"][2] < 1.0
        elif r["metric"] == "rmse" and (
            r["inputs"] == "real" or (r["inputs"], r["over"][0][-3:]) == ("gaussian-4-d64", "chi")
        ):
            assert r["ratio"][1] > 1.0
    # 3: at the limit by 4096 features
    for name in ("pff-sobol-normal", "pff-halton-normal", "pff-lattice-normal", "wdcf-normal"):
        for inputs in report.INPUTS:
            error = recorded("rows", inputs=inputs, map=name, weights="equal", m=4096)["rmse"][0]
            assert error == pytest.approx(RECORDED["limits"][inputs]["normal_rmse"], rel=0.02)
    # 4: one floor with the normal radius; with chi worse at equal weights, close with fitted ones, but not at d = 4
    for inputs in low_norms[1:]:
        for weights in ("equal", "nnls"):
            normal = against(inputs, ["wdcf-normal", weights], ["pff-sobol-normal", weights])
            assert normal == pytest.approx(1.0, abs=0.02)
        assert against(inputs, ["wdcf-chi", "equal"], ["pff-sobol-chi", "equal"]) > 1.2
        assert 0.85 < against(inputs, ["wdcf-chi", "nnls"], ["pff-sobol-chi", "nnls"]) < 1.2
    assert recorded_slope("gaussian-0.5-d4", "wdcf-chi")[1] > recorded_slope("gaussian-0.5-d4", "prf")[2]
    # 5: no untrained map beats the plain mean or the keys' weights alone
    for row in RECORDED["rows"]:
        if row["weights"] == "equal" and "attention" in row:
            limit = RECORDED["limits"][row["inputs"]]["key_weights_attention"]
            assert min(row["attention"][0], row["attention_dropped"][0]) > limit - 0.02
