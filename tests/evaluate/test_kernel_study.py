"""The kernel study: its maps, weights, errors and slopes against oracles, and the page of its results against their JSON."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from scipy.stats import qmc

from dijiang import cli
from dijiang.convert import load_source
from dijiang.evaluate.feature_map_study import report as kernel_report
from dijiang.evaluate.feature_map_study.inputs import Case, gaussian_inputs, normal_radius_limit, real_inputs
from dijiang.evaluate.feature_map_study.maps import (
    FITS,
    MAPS,
    POINTS,
    estimate,
    features,
    lattice_vector,
    normal_equations,
    squared_error,
)
from dijiang.evaluate.feature_map_study.study import (
    QUICK,
    KernelStudyConfig,
    band,
    case_errors,
    fit_slopes,
    limits,
    run_kernel_study,
    summary,
)
from dijiang.train.stages.teacher_pass import run_teacher

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "benchmarks" / "results" / "kernels.json").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


def gaussian_rows(rows: int, d: int, seed: int, norm: float = 1.0) -> np.ndarray:
    return norm * np.random.default_rng(seed).standard_normal((rows, d)) / math.sqrt(d)


def random_case(n: int, T: int, d: int, seed: int, norm: float = 1.0) -> Case:
    q, k, v = gaussian_rows(n, d, seed, norm), gaussian_rows(T, d, seed + 1, norm), gaussian_rows(T, d, seed + 2)
    return Case(q, k, v, np.sort(np.random.default_rng(seed).integers(0, T, n)), gaussian_rows(1, T, seed + 3)[0])


# --- maps ---


def mean_estimate(name: str, q: np.ndarray, k: np.ndarray, m: int, *, rotate: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean over many seeds of what the map gives for exp(q.k), and its standard error; `rotate` turns q and k by the seed."""
    d, found = q.shape[1], []
    for seed in range(300):
        turn, triangle = np.linalg.qr(np.random.default_rng((9, seed)).standard_normal((d, d)))
        turn = turn * np.sign(np.diag(triangle)) if rotate else np.eye(d)
        found.append(estimate(q @ turn, k @ turn, MAPS[name](m, d, seed)))
    return np.mean(found, axis=0), np.std(found, axis=0) / math.sqrt(len(found))


@pytest.mark.parametrize("d", [3, 6])
@pytest.mark.parametrize("name", [name for name in MAPS if not name.endswith("normal")])
def test_maps_with_the_radius_of_a_normal_vector_are_unbiased(name, d):
    q, k = gaussian_rows(3, d, 0), gaussian_rows(2, d, 1)
    # the directions of WDCF are too few to be uniform, so it is unbiased only on average over directions of q and k
    mean, error = mean_estimate(name, q, k, 11, rotate=name.startswith("wdcf"))
    assert (np.abs(mean - np.exp(q @ k.T)) < 4 * error).all()


@pytest.mark.parametrize("name", [name for name in MAPS if name.endswith("normal")])
def test_maps_with_the_normal_radius_tend_to_the_closed_form(name):
    q, k = gaussian_rows(3, 5, 0, norm=1.5), gaussian_rows(2, 5, 1, norm=1.5)
    mean, error = mean_estimate(name, q, k, 11, rotate=name.startswith("wdcf"))
    case = Case(q, k)
    limit = normal_radius_limit(case) * np.exp(case.log_sum)[:, None]
    assert (np.abs(mean - limit) < 4 * error).all()
    assert (np.abs(mean - np.exp(q @ k.T)) > 10 * error).any()


def test_in_one_dimension_the_normal_radius_is_unbiased():
    case = Case(gaussian_rows(7, 1, 0), gaussian_rows(5, 1, 1))
    np.testing.assert_allclose(normal_radius_limit(case), case.kernel, rtol=1e-12)


@pytest.mark.parametrize("name", MAPS)
def test_frequencies_follow_the_seed(name):
    first = MAPS[name](13, 5, 3)
    assert first.shape == (13, 5) and first.dtype == np.float64 and np.isfinite(first).all()
    assert (first == MAPS[name](13, 5, 3)).all() and (first != MAPS[name](13, 5, 4)).any()


@pytest.mark.parametrize("name", ["orf", "wdcf-chi"])
@pytest.mark.parametrize(("m", "d"), [(3, 7), (14, 7), (17, 7)])
def test_blocks_of_d_frequencies_are_orthogonal(name, m, d):
    omega = MAPS[name](m, d, 1)
    directions = omega / np.linalg.norm(omega, axis=1, keepdims=True)
    for block in (directions[start : start + d] for start in range(0, m, d)):
        np.testing.assert_allclose(block @ block.T, np.eye(len(block)), atol=1e-6)


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize(("count", "dim"), [(64, 2), (97, 3), (200, 5)])
def test_points_are_of_low_discrepancy(name, count, dim):
    plain = [qmc.discrepancy(np.random.default_rng(seed).random((count, dim))) for seed in range(10)]
    for seed in range(3):
        points = POINTS[name](count, dim, seed)
        assert points.shape == (count, dim) and (points > 0).all() and (points < 1).all()
        assert qmc.discrepancy(points) < 0.5 * min(plain)


@pytest.mark.parametrize("count", [1, 2, 3, 12, 97])
def test_lattice_fills_every_axis_evenly(count):
    assert all(math.gcd(int(z), count) == 1 for z in lattice_vector(count, 4))
    points = POINTS["lattice"](count, 4, 5)
    assert (np.sort((points * count).astype(int) % count, axis=0) == np.arange(count)[:, None]).all()


# --- errors and weights ---


@pytest.mark.parametrize("seed", [0, 1])
def test_estimate_is_the_plain_sum(seed):
    case, omega = random_case(5, 7, 3, seed), gaussian_rows(11, 3, seed)
    weights = np.random.default_rng(seed).random(11)

    def phi(x, r):
        return math.exp(omega[r] @ x - x @ x / 2)

    for given, used in ((weights, weights), (None, [1 / 11] * 11)):
        slow = [[sum(used[r] * phi(q, r) * phi(k, r) for r in range(11)) for k in case.k] for q in case.q]
        np.testing.assert_allclose(estimate(case.q, case.k, omega, given), slow, rtol=1e-12)
        scaled = estimate(case.q, case.k, omega, given, -case.log_sum)
        np.testing.assert_allclose(scaled, slow / np.exp(case.q @ case.k.T).sum(1, keepdims=True), rtol=1e-12)


@pytest.mark.parametrize("drop_norm", [False, True])
def test_mix_is_the_plain_sum(drop_norm):
    case = random_case(5, 9, 4, 2)
    found = case.mix(case.kernel, drop_norm=drop_norm)
    for i, q in enumerate(case.q):
        visible = range(case.positions[i] + 1)
        norms = [case.k[j] @ case.k[j] / 2 if drop_norm else 0.0 for j in visible]
        weights = np.exp([q @ case.k[j] + case.log_weight[j] + norm for j, norm in zip(visible, norms, strict=True)])
        np.testing.assert_allclose(found[i], weights / weights.sum() @ case.v[: len(weights)], rtol=1e-12)


def test_errors_of_estimates_that_are_known():
    case = random_case(6, 8, 4, 3)
    assert {value for name, value in case.errors(case.kernel).items() if name != "attention_dropped"} == {0.0}
    found = case.errors(1.5 * case.kernel)  # the normaliser hides a common factor
    assert found["rmse"] == pytest.approx(0.5) and found["median"] == pytest.approx(0.5)
    assert found["attention"] == pytest.approx(0.0, abs=1e-12)
    same_norm = Case(case.q, case.k / np.linalg.norm(case.k, axis=1, keepdims=True), case.v, case.positions)
    assert same_norm.errors(same_norm.kernel)["attention_dropped"] == pytest.approx(0.0, abs=1e-12)
    ones = Case(case.q, case.k, case.v, case.positions).mix(np.ones_like(case.kernel))
    assert case.plain_mean() == pytest.approx(
        np.linalg.norm(ones - case.mix(case.kernel)) / np.linalg.norm(case.mix(case.kernel))
    )


@pytest.mark.parametrize("name", ["prf", "pff-sobol-chi", "pff-sobol-normal", "wdcf-chi", "wdcf-normal"])
@pytest.mark.parametrize(("seed", "norm", "m"), [(0, 0.5, 9), (1, 2.0, 33), (2, 5.0, 20)])
def test_fitted_weights_are_never_worse_than_equal_ones_on_their_own_pairs(name, seed, norm, m):
    case = Case(gaussian_rows(21, 7, seed, norm), gaussian_rows(19, 7, seed + 1, norm))
    omega = MAPS[name](m, 7, seed)
    phi_q, phi_k = features(case.q, omega, -case.log_sum), features(case.k, omega)
    equations = normal_equations(phi_q, phi_k, case.kernel)

    def error(weights: np.ndarray) -> float:
        return float(np.square((phi_q * weights) @ phi_k.T - case.kernel).sum() / np.square(case.kernel).sum())

    equal = np.full(m, 1 / m)
    found = {name: fit(*equations) for name, fit in FITS.items()}
    for weights in (equal, *found.values()):
        assert squared_error(*equations, weights) == pytest.approx(error(weights), rel=1e-6, abs=1e-9)
    assert (found["nnls"] >= 0).all() and (found["learnt"] > 0).all()
    assert error(found["nnls"]) <= error(found["learnt"]) + 1e-9 <= error(equal) + 2e-9
    design = (phi_q[:, None] * phi_k[None]).reshape(-1, m)
    _, residual = nnls(design, case.kernel.ravel())
    assert error(found["nnls"]) == pytest.approx(residual**2 / np.square(case.kernel).sum(), rel=1e-4, abs=1e-8)


def test_case_errors_fit_on_the_calibration_case_alone():
    case, calibration, omega = random_case(20, 30, 5, 0), random_case(20, 30, 5, 50), MAPS["prf"](8, 5, 0)
    found = case_errors(case, calibration, omega, FITS)
    assert found.keys() == {"equal", *FITS}
    assert found["nnls"]["calibration"] <= found["learnt"]["calibration"] <= found["equal"]["calibration"]
    swapped = case_errors(calibration, calibration, omega, FITS)
    assert swapped["nnls"]["rmse"] == pytest.approx(found["nnls"]["calibration"])
    assert case_errors(case, calibration, omega, {}).keys() == {"equal"}


# --- slopes ---


@pytest.mark.parametrize("slope", [-1.0, -0.5, 0.0, 0.3])
def test_slopes_that_were_planted(slope):
    sizes = (3, 10, 31, 100)
    clean = np.array([[factor * m**slope for m in sizes] for factor in (0.1, 1.0, 7.0)])
    np.testing.assert_allclose(fit_slopes(sizes, clean), slope, atol=1e-12)
    noise = np.exp(0.1 * np.random.default_rng(0).standard_normal((40, len(sizes))))
    mean, low, high = band(fit_slopes(sizes, np.resize(clean, (40, len(sizes))) * noise))
    assert low < slope < high and mean == pytest.approx(slope, abs=0.03) and high - low < 0.1


def test_bands_cover_the_mean():
    covered = 0
    for seed in range(200):
        _, low, high = band(np.random.default_rng(seed).standard_normal(30))
        covered += low <= 0.0 <= high
    assert 0.88 < covered / 200 < 0.99


def test_ratios_and_rows_of_planted_errors():
    config = KernelStudyConfig(features=(8, 16, 32), most_weighted=16, seeds=3)
    factor = np.array([[1.0], [2.0], [4.0]])
    errors = {
        ("x", "prf", "equal", "rmse"): factor * np.array([[1.0, 0.5, 0.25]]),
        ("x", "wdcf-chi", "equal", "rmse"): factor * np.array([[3.0, 1.5, 0.75]]),
        ("x", "pff-sobol-chi", "equal", "rmse"): factor * np.array([[2.0, 1.0, 0.5]]),
        ("x", "wdcf-chi", "nnls", "rmse"): factor * np.array([[6.0, 0.3]]),
        ("x", "pff-sobol-chi", "nnls", "rmse"): factor * np.array([[1.0, 0.5]]),
    }
    found = summary(config, errors)
    ratios = {(*r["over"], *r["under"]): (r["m"], r["ratio"][0], r["largest"]) for r in found["ratios"]}
    assert ratios == {
        ("wdcf-chi", "equal", "pff-sobol-chi", "equal"): (32, 1.5, 1.5),
        ("pff-sobol-chi", "equal", "prf", "equal"): (32, 2.0, 2.0),
        ("wdcf-chi", "nnls", "wdcf-chi", "equal"): (16, 0.2, 2.0),
        ("wdcf-chi", "nnls", "pff-sobol-chi", "nnls"): (16, 0.6, 6.0),
        ("pff-sobol-chi", "nnls", "pff-sobol-chi", "equal"): (16, 0.5, 0.5),
    }
    row = kernel_report.pick(found["rows"], map="prf", m=16)
    assert row["rmse"][0] == 1.0 and 0.5 <= row["rmse"][1] < 1.0 < row["rmse"][2] <= 2.0
    assert kernel_report.pick(found["slopes"], map="prf", weights="equal")["slope"] == [-1.0, -1.0, -1.0]


# --- inputs ---


def test_real_inputs_are_those_of_the_model(pair, text_file):
    raw, centred = real_inputs(pair.teacher, text_file, tokens=24, query_every=5, heads=9)
    assert len(raw.cases) == 2  # one of each layer, whatever is asked for
    model, tokenizer = load_source(pair.teacher)
    ids = torch.tensor(tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"][:48]).view(2, 24)
    outputs = run_teacher(model, ids).outputs
    head_dim = raw.head_dim
    for inputs, block in ((raw.calibration, 0), (raw.cases, 1), (centred.calibration, 0), (centred.cases, 1)):
        for layer, (head, case) in enumerate(zip((0, 3), inputs, strict=True)):
            assert case.positions.tolist() == [4, 9, 14, 19]
            expected = outputs[layer][block, case.positions, head * head_dim : (head + 1) * head_dim]
            np.testing.assert_allclose(case.mix(case.kernel), expected.numpy(), atol=1e-5)
    for case in centred.calibration:
        np.testing.assert_allclose(case.k.mean(0), 0.0, atol=1e-12)


@pytest.mark.parametrize("d", [4, 64])
def test_gaussian_inputs_have_their_norm_and_calibration_its_own_pairs(d):
    inputs = gaussian_inputs(2.0, d, 33)
    (case,), (calibration,) = inputs.cases, inputs.calibration
    for x in (case.q, case.k, calibration.q, calibration.k):
        assert x.shape == (33, d)
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 2.0)
    assert (case.q != calibration.q).all() and (case.q != case.k).all()
    assert limits(inputs)["query_norm"] == 2.0


# --- the whole study ---


@pytest.fixture
def tiny(pair, text_file):
    """Arguments of a study in a second."""
    return {"source": pair.teacher, "text": text_file, "config": replace(QUICK, features=(3, 8), most_weighted=3)}


def test_study_is_repeatable_and_writes_what_it_returns(tiny, tmp_path, capsys):
    first = run_kernel_study(**tiny, output=tmp_path / "a.json", plot=tmp_path / "a.png", progress=False)
    assert capsys.readouterr() == ("", "")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == json.loads(json.dumps(first))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "a.png"}
    again = run_kernel_study(**tiny)
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert "PFF Sobol, chi" in capsys.readouterr().out
    assert first["source"] == "teacher" and first["settings"]["features"] == (3, 8)
    expected = 7 * (len(MAPS) * 2 + 4 * 2 * 1)  # input sets; equal weights at two sizes, two fits of four maps at one
    assert len(first["rows"]) == expected
    assert all(np.isfinite(value[0]) for row in first["rows"] for value in row.values() if isinstance(value, list))
    fitted = [r for r in first["ratios"] if r["metric"] == "calibration"]
    assert fitted and all(r["largest"] <= 1.0 for r in fitted)
    assert len(kernel_report.tables(first)) == 6


def test_study_refusals(tiny, tmp_path, refused):
    taken, short = tmp_path / "taken.json", tmp_path / "short.txt"
    taken.write_text("theirs")
    short.write_text("the cat sat")
    for name in ("output", "plot"):
        refused(tmp_path, lambda name=name: run_kernel_study(**tiny, **{name: taken}), "taken.json exists already")
        missing = tmp_path / "none" / "x"
        refused(
            tmp_path, lambda name=name, x=missing: run_kernel_study(**tiny, **{name: x}), "the folder of .* does not exist"
        )
    refused(tmp_path, lambda: run_kernel_study(**tiny | {"text": short}), r"short\.txt gives \d+ tokens .* needs 128")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": (0, 16)}, "features=0 must be at least 1"),
        ({"features": (16, -4)}, "features=-4 must be at least 1"),
        ({"features": (16,)}, "a slope needs at least two numbers of features"),
        ({"features": (32, 16)}, "in rising order"),
        ({"features": (16, 16)}, "each once"),
        ({"seeds": 1}, "seeds=1 must be at least 2"),
    ],
)
def test_settings_that_will_not_do(settings, message):
    with pytest.raises(ValueError, match=message):
        KernelStudyConfig(**settings)


def test_command(monkeypatch, capsys, pair, tmp_path):
    def call(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dijiang", "benchmark", "kernels", "--model", str(pair.teacher), *map(str, words)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    output = tmp_path / "kernels.json"
    words = ("--quick", "--features", 3, "--features", 8, "--seeds", 3)
    code, out, _ = call(*words, "--output", output)
    assert code == 0 and out.endswith(f"wrote {output}\n")
    settings = json.loads(output.read_text(encoding="utf-8"))["settings"]
    assert settings["features"] == [3, 8] and settings["seeds"] == 3 and settings["heads"] == QUICK.heads
    code, out, err = call(*words, "--output", output)
    assert (code, out) == (1, "") and re.fullmatch(r"dijiang: output .*kernels.json exists already; .*\n", err)
    code, out, err = call("--features", 0)
    assert (code, out, err) == (1, "", "dijiang: features=0 must be at least 1\n")


# --- the page ---


def recorded(kind: str, **wanted) -> dict:
    return kernel_report.pick(RECORDED[kind], **wanted)


def recorded_slope(inputs: str, name: str, metric: str = "rmse") -> list[float]:
    return recorded("slopes", inputs=inputs, map=name, weights="equal", metric=metric, **{"from": 16})["slope"]


def against(inputs: str, over: list[str], under: list[str]) -> float:
    return recorded("ratios", inputs=inputs, over=over, under=under, metric="rmse")["ratio"][0]


def test_tables_of_the_page_are_those_of_the_recorded_run():
    tables = kernel_report.tables(RECORDED)
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
    said = [
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
    for words in said:
        assert words in prose, words
    known = {number for words in said for number in re.findall(r"\d+\.\d+", words)}
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
        for inputs in kernel_report.INPUTS:
            found = recorded("rows", inputs=inputs, map=name, weights="equal", m=4096)["rmse"][0]
            assert found == pytest.approx(RECORDED["limits"][inputs]["normal_rmse"], rel=0.02)
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
