"""Values with their confidence intervals, from scores of single units (windows of text, documents, samples)."""

import math

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
FEWEST_UNITS = 5  # resamples of fewer units say nothing


def resampled_means(scores: dict[str, dict], *, seed: int = 0) -> dict[str, np.ndarray]:
    """
    Mean per unit of weight for each variant: (1 + RESAMPLES,), first of all units, then of units drawn with replacement. A
    draw takes the same units for all variants (paired), since all were measured on the same units.

    Args:
        scores: by variant, `totals` and `weights` of the same number of units.
        seed: seed of the draws.
    """
    totals = np.array([x["totals"] for x in scores.values()], dtype=np.float64)
    weights = np.array([x["weights"] for x in scores.values()], dtype=np.float64)
    units = totals.shape[1]
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(units, np.full(units, 1 / units), size=RESAMPLES if units >= FEWEST_UNITS else 0)
    counts = np.concatenate((np.ones((1, units)), counts)).T
    return dict(zip(scores, totals @ counts / (weights @ counts), strict=True))


def interval(values: np.ndarray) -> dict[str, float | None] | None:
    """
    `value`, `low` and `high` of a statistic of all units and of resamples, in the order of `resampled_means`.

    The ends are percentiles of the bootstrap, None if there are too few units. The result is None if the value is not finite.
    """
    value = float(values[0])
    if not math.isfinite(value):
        return None
    resamples = values[1:]
    if not len(resamples) or not np.isfinite(resamples).all():
        return {"value": value, "low": None, "high": None}
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(resamples, [tail, 100 - tail])
    return {"value": value, "low": float(low), "high": float(high)}


def recovered_share(means: dict[str, np.ndarray], floor: float | np.ndarray, better: str) -> np.ndarray | None:
    """
    (student - floor) / (teacher - floor). None unless the teacher is better than the floor with confidence, since any share
    would be noise.

    Args:
        means: means of `teacher` and `student`, as `resampled_means` returns them.
        floor: the value that costs nothing: the chance level, or another variant's means.
        better: "higher" or "lower".
    """
    gap = means["teacher"] - floor
    lead = gap if better == "higher" else -gap
    certain = interval(lead)
    if certain is None or certain["low"] is None or certain["low"] <= 0:
        return None
    leads = lead > 0  # the rare resamples in which the teacher does not lead have no share
    return ((means["student"] - floor)[leads]) / gap[leads]
