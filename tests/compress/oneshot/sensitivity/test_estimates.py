"""From estimates to sensitivities, their noise and the warnings about it."""

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from dijiang.compress.oneshot.sensitivity.estimates import Sensitivities, sensitivities_of, split_half_correlation


@pytest.mark.parametrize("probes", [2, 3, 16])
def test_split_half_correlation_is_scipys(probes):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        table = rng.normal(size=(11, probes)) + rng.normal(size=(11, 1))
        correlation = split_half_correlation({str(i): row.tolist() for i, row in enumerate(table)})
        expected = spearmanr(table[:, 0::2].mean(1), table[:, 1::2].mean(1)).statistic
        assert correlation == pytest.approx(expected, rel=1e-12) and isinstance(correlation, float)


def test_split_halves_are_interleaved():
    """A drift from the first probes to the last, as of the text, affects both halves."""
    drifting = {str(i): [i, i, -2 * i, -2 * i] for i in range(5)}
    assert split_half_correlation(drifting) == pytest.approx(1.0)
    assert split_half_correlation({name: [a, c, b, d] for name, (a, b, c, d) in drifting.items()}) == pytest.approx(-1.0)


@pytest.mark.parametrize(
    "estimates",
    [
        {},
        {"a": [1.0], "b": [2.0], "c": [3.0]},
        {"a": [1.0, 2.0], "b": [2.0, 1.0]},
        {"a": [1.0, 2.0], "b": [1.0, 3.0], "c": [1.0, 4.0]},
        {"a": [1.0, 2.0], "b": [2.0, math.nan], "c": [3.0, 1.0]},
        {"a": [1.0, 2.0], "b": [2.0, math.inf], "c": [3.0, 1.0]},
    ],
)
def test_no_correlation_where_there_is_none(estimates):
    assert split_half_correlation(estimates) is None


def test_sensitivity_by_hand():
    estimates = {"a": [-1.0, 4.0], "b": [-3.0, 1.0], "c": [0.0, 0.0]}  # clamped first, b would be 0.5
    sizes = {"a": 3, "b": 4, "c": 5}
    total, mean = (sensitivities_of("hutchinson", estimates, sizes, by_size) for by_size in (False, True))
    assert total.values == {"a": 1.5, "b": 0.0, "c": 0.0} and mean.values == {"a": 0.5, "b": 0.0, "c": 0.0}
    assert total.negative == mean.negative == ("b",) and total.samples == 2


def test_sensitivity_refusals():
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=r"^the sensitivity of q_proj is NaN or infinite"):
            sensitivities_of("fisher", {"v_proj": [1.0, 2.0], "q_proj": [1.0, bad]}, {"v_proj": 1, "q_proj": 1}, False)


def test_warnings():
    facts = {"method": "hutchinson", "values": {"a": 1.0, "b": 0.0}, "samples": 12}
    lines = Sensitivities(**facts, correlation=0.39, negative=("b",)).warnings()
    assert "agree only to 0.39 between halves of the 12 samples" in lines[0] and lines[1].startswith("1 of 2 hutchinson")
    assert Sensitivities(**facts, correlation=0.96).warnings() == []
    assert Sensitivities(**facts, correlation=None).warnings() == []
