"""From scores of single units (windows of text, documents, samples) to a value with its confidence interval."""

import math

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
FEWEST_UNITS = 5  # below that a resample says nothing


def resampled_means(scores: dict[str, dict], *, seed: int = 0) -> dict[str, np.ndarray]:
    """
    Mean per unit of weight for each subject: (1 + RESAMPLES,), first of all units, then of units drawn with replacement.
    A draw takes the same units for all subjects (paired), for they were measured on the same ones.

    Args:
        scores: by subject, `totals` and `weights` of equally many units.
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
    `value`, `low` and `high` of a statistic of all units and of resamples, as `resampled_means` orders them: the ends are the
    bootstrap's percentiles, None where there are too few units. None in all where the value is not finite.
    """
    value = float(values[0])
    if not math.isfinite(value):
        return None
    rest = values[1:]
    if not len(rest) or not np.isfinite(rest).all():
        return {"value": value, "low": None, "high": None}
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(rest, [tail, 100 - tail])
    return {"value": value, "low": float(low), "high": float(high)}


def recovered_share(means: dict[str, np.ndarray], floor: float | np.ndarray, better: str) -> np.ndarray | None:
    """
    (student - floor) / (teacher - floor), where the floor is what is had for nothing: the chance level, or another subject's
    score. None unless the teacher is better than the floor with confidence: any share would be noise.

    Args:
        means: of `teacher` and `student`, as `resampled_means` gives them.
        better: "higher" or "lower".
    """
    gap = means["teacher"] - floor
    lead = gap if better == "higher" else -gap
    known = interval(lead)
    if known is None or known["low"] is None or known["low"] <= 0:
        return None
    kept = lead > 0  # the rare resamples in which the teacher does not lead have no share
    return ((means["student"] - floor)[kept]) / gap[kept]
