"""Intervals against scipy's bootstrap and closed forms; recovered shares by hand."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from dijiang.evaluate.quality.bootstrap import RESAMPLES, interval, recovered_share, resampled_means


def scores(totals, weights=None) -> dict:
    return {"totals": list(totals), "weights": list(np.ones(len(totals)) if weights is None else weights)}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_interval_is_scipys(seed):
    """Of a mean of unequally weighted units: the percentile bootstrap of scipy, up to what 2,000 resamples can tell."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 9, 37).astype(float)
    totals = rng.gamma(2.0, 1.5, 37) * weights
    found = interval(resampled_means({"a": scores(totals, weights)}, seed=seed)["a"])
    options = {"paired": True, "method": "percentile", "n_resamples": 20000, "vectorized": True, "rng": seed}
    expected = bootstrap((totals, weights), lambda t, w, axis: t.sum(axis) / w.sum(axis), **options).confidence_interval
    assert found["value"] == pytest.approx(totals.sum() / weights.sum(), rel=1e-12)
    width = expected.high - expected.low
    assert found["low"] == pytest.approx(expected.low, abs=0.08 * width)
    assert found["high"] == pytest.approx(expected.high, abs=0.08 * width)


def test_variants_are_drawn_together():
    """A student that loses 0.5 on every unit has a difference without spread, whatever the units' own spread."""
    totals = np.random.default_rng(3).normal(3.0, 2.0, 50)
    means = resampled_means({"teacher": scores(totals), "student": scores(totals + 0.5)})
    assert np.ptp(means["teacher"]) > 0.5
    found = interval(means["student"] - means["teacher"])
    assert found == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})


def test_the_same_seed_gives_the_same_interval():
    data = {"a": scores(np.arange(11.0))}
    first, again, other = (resampled_means(data, seed=seed)["a"] for seed in (4, 4, 5))
    assert first.shape == (1 + RESAMPLES,)
    assert np.array_equal(first, again) and not np.array_equal(first, other) and first[0] == other[0] == 5.0


def test_few_units_have_no_interval():
    assert interval(resampled_means({"a": scores([1.0, 2.0, 3.0, 6.0])})["a"]) == {"value": 3.0, "low": None, "high": None}


def test_values_that_are_not_finite_are_none():
    assert interval(np.array([np.inf, 1.0, 2.0])) is None
    assert interval(np.array([1.0, np.inf, 2.0])) == {"value": 1.0, "low": None, "high": None}


def test_recovered_share_by_hand():
    """Chance 0.25: (0.55 - 0.25) / (0.65 - 0.25) = 0.75; losses 4 and 3.5 nats over a floor of 6: 2 / 2.5."""
    rng = np.random.default_rng(0)
    teacher, student = (rng.permutation(np.r_[np.ones(n), np.zeros(100 - n)]) for n in (65, 55))
    means = resampled_means({"teacher": scores(teacher), "student": scores(student)})
    found = interval(recovered_share(means, 0.25, "higher"))
    assert found["value"] == pytest.approx(0.75) and found["low"] < 0.75 < found["high"]
    losses = {"teacher": scores(np.full(9, 3.5)), "student": scores(np.full(9, 4.0)), "floor": scores(np.full(9, 6.0))}
    nats = resampled_means(losses)
    assert interval(recovered_share(nats, nats["floor"], "lower")) == pytest.approx({"value": 0.8, "low": 0.8, "high": 0.8})


@pytest.mark.parametrize("right", [27, 25, 20, 5, 0])
def test_no_share_of_a_teacher_at_chance_or_below(right):
    teacher = np.r_[np.ones(right), np.zeros(100 - right)]
    means = resampled_means({"teacher": scores(teacher), "student": scores(np.ones(100))})
    assert recovered_share(means, 0.25, "higher") is None
    losses = resampled_means({"teacher": scores(teacher + 3), "student": scores(teacher)})
    assert recovered_share(losses, 3 + right / 200, "lower") is None  # the teacher loses more than the floor


def test_no_share_of_few_units():
    few = resampled_means({"teacher": scores(np.ones(4)), "student": scores(np.ones(4))})
    assert recovered_share(few, 0.25, "higher") is None
    enough = resampled_means({"teacher": scores(np.ones(5)), "student": scores(np.ones(5))})
    assert interval(recovered_share(enough, 0.25, "higher"))["value"] == 1.0


def test_rare_resamples_without_a_lead_do_not_undo_the_interval():
    """The teacher is right on 5 of 12 samples: in one resample of 600 it is right on none, which is the floor."""
    right = np.r_[np.ones(5), np.zeros(7)]
    means = resampled_means({"teacher": scores(right), "student": scores(right)})
    assert (means["teacher"] <= 0).any()
    assert interval(recovered_share(means, 0.0, "higher")) == {"value": 1.0, "low": 1.0, "high": 1.0}
