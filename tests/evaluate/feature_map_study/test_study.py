"""The feature map study: errors, slopes and ratios of planted values, and a whole run."""

import json
from dataclasses import replace

import numpy as np
import pytest
from dijiang_testing.feature_maps import random_case

from dijiang.evaluate.feature_map_study import report
from dijiang.evaluate.feature_map_study.config import QUICK, FeatureMapStudyConfig
from dijiang.evaluate.feature_map_study.maps import FITS, MAPS
from dijiang.evaluate.feature_map_study.study import band, case_errors, fit_slopes, run_feature_map_study, summary


def test_case_errors_fit_on_the_calibration_case_alone():
    case, calibration, omega = random_case(20, 30, 5, 0), random_case(20, 30, 5, 50), MAPS["prf"](8, 5, 0)
    errors = case_errors(case, calibration, omega, FITS)
    assert errors.keys() == {"equal", *FITS}
    assert errors["nnls"]["calibration"] <= errors["learnt"]["calibration"] <= errors["equal"]["calibration"]
    swapped = case_errors(calibration, calibration, omega, FITS)
    assert swapped["nnls"]["rmse"] == pytest.approx(errors["nnls"]["calibration"])
    assert case_errors(case, calibration, omega, {}).keys() == {"equal"}


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
    config = FeatureMapStudyConfig(features=(8, 16, 32), most_weighted=16, seeds=3)
    factor = np.array([[1.0], [2.0], [4.0]])
    errors = {
        ("x", "prf", "equal", "rmse"): factor * np.array([[1.0, 0.5, 0.25]]),
        ("x", "wdcf-chi", "equal", "rmse"): factor * np.array([[3.0, 1.5, 0.75]]),
        ("x", "pff-sobol-chi", "equal", "rmse"): factor * np.array([[2.0, 1.0, 0.5]]),
        ("x", "wdcf-chi", "nnls", "rmse"): factor * np.array([[6.0, 0.3]]),
        ("x", "pff-sobol-chi", "nnls", "rmse"): factor * np.array([[1.0, 0.5]]),
    }
    means = summary(config, errors)
    ratios = {(*r["over"], *r["under"]): (r["m"], r["ratio"][0], r["largest"]) for r in means["ratios"]}
    assert ratios == {
        ("wdcf-chi", "equal", "pff-sobol-chi", "equal"): (32, 1.5, 1.5),
        ("pff-sobol-chi", "equal", "prf", "equal"): (32, 2.0, 2.0),
        ("wdcf-chi", "nnls", "wdcf-chi", "equal"): (16, 0.2, 2.0),
        ("wdcf-chi", "nnls", "pff-sobol-chi", "nnls"): (16, 0.6, 6.0),
        ("pff-sobol-chi", "nnls", "pff-sobol-chi", "equal"): (16, 0.5, 0.5),
    }
    row = report.pick(means["rows"], map="prf", m=16)
    assert row["rmse"][0] == 1.0 and 0.5 <= row["rmse"][1] < 1.0 < row["rmse"][2] <= 2.0
    assert report.pick(means["slopes"], map="prf", weights="equal")["slope"] == [-1.0, -1.0, -1.0]


@pytest.fixture
def tiny(pair, text_file):
    """Arguments of a study in a second."""
    return {"source": pair.teacher, "text": text_file, "config": replace(QUICK, features=(3, 8), most_weighted=3)}


def test_study_is_repeatable_and_writes_what_it_returns(tiny, tmp_path, capsys):
    first = run_feature_map_study(**tiny, output=tmp_path / "a.json", plot=tmp_path / "a.png", progress=False)
    assert capsys.readouterr() == ("", "")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == json.loads(json.dumps(first))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "a.png"}
    again = run_feature_map_study(**tiny)
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert "PFF Sobol, chi" in capsys.readouterr().out
    assert first["source"] == "teacher" and first["settings"]["features"] == (3, 8)
    expected = 7 * (len(MAPS) * 2 + 4 * 2 * 1)  # input sets; equal weights at two sizes, two fits of four maps at one
    assert len(first["rows"]) == expected
    assert all(np.isfinite(value[0]) for row in first["rows"] for value in row.values() if isinstance(value, list))
    fitted = [r for r in first["ratios"] if r["metric"] == "calibration"]
    assert fitted and all(r["largest"] <= 1.0 for r in fitted)
    assert len(report.tables(first)) == 6


def test_study_refusals(tiny, tmp_path, refused):
    taken, short, missing = tmp_path / "taken.json", tmp_path / "short.txt", tmp_path / "none" / "x"
    taken.write_text("theirs")
    short.write_text("the cat sat")
    for name in ("output", "plot"):
        for path, message in ((taken, "taken.json exists already"), (missing, "the folder of .* does not exist")):
            refused(tmp_path, lambda options={name: path}: run_feature_map_study(**tiny, **options), message)
    refused(tmp_path, lambda: run_feature_map_study(**tiny | {"text": short}), r"short\.txt gives \d+ tokens .* needs 128")
