"""
From sensitivities to one sparsity per matrix or layer. The rank rule is that of arXiv 2310.09499 (Algorithm 1), with budgets
that hold. Allocation by loss is our own: one more removed weight costs the same loss everywhere, with the costs of a
Kronecker-factored Fisher information (arXiv 1503.05671).
"""

import math
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np

from dijiang.common.errors import unknown

from .config import BUDGETS, POINTS, refuse_range

BISECTIONS = 200
STEPS = 1000  # sparsities between 0 and the highest that allocation by loss compares


def allocate(
    sensitivities: Sequence[float], sizes: Sequence[int], sparsity: float, alpha: float, *, budget: str = "weighted"
) -> list[float]:
    """
    Choose a sparsity for each unit (a matrix or a decoder layer), from `sparsity` + `alpha` for the least sensitive down to
    `sparsity` - `alpha`, by rank alone. Equal sensitivities share their middle rank: if all are equal, all get `sparsity`.

    Args:
        sensitivities: of each unit.
        sizes: weights of each unit.
        sparsity: share of all weights to remove.
        alpha: half the range of sparsities.
        budget: `weighted`: ranks count weights, so that the sparsity of all weights is `sparsity` exactly; `paper`: an
            arithmetic progression over units, whose mean over weights may differ; `shift`: that progression plus a constant,
            clipped to the same range, so that the mean over weights is `sparsity`.

    Raises:
        ValueError: if the range leaves [0, 1), the budget's name is unknown, or a sensitivity is not finite.
    """
    refuse_range(sparsity, alpha)
    if budget not in BUDGETS:
        raise unknown("budget", budget, BUDGETS)
    if not all(map(math.isfinite, sensitivities)):
        raise ValueError("a sensitivity is NaN or infinite, so nothing can be ranked; check model and calibration text")
    measures = sizes if budget == "weighted" else [1] * len(sizes)
    positions = middle_positions(sensitivities, measures)
    if budget == "weighted":
        return [sparsity + alpha * (1 - 2 * position / sum(sizes)) for position in positions]
    last = len(sizes) - 1
    ranks = [position - 0.5 for position in positions]  # 0 .. n - 1
    values = [sparsity + alpha * (1 - 2 * rank / last) if last else sparsity for rank in ranks]
    return values if budget == "paper" else shifted(values, sizes, sparsity, alpha)


def middle_positions(sensitivities: Sequence[float], measures: Sequence[int]) -> list[float]:
    """Position of the middle of each unit, or of all units equal to it, on a line on which they lie by rising sensitivity."""
    order = sorted(range(len(measures)), key=lambda unit: sensitivities[unit])
    positions = [0.0] * len(measures)
    start = 0
    for _, equals in groupby(order, key=lambda unit: sensitivities[unit]):
        units = list(equals)
        length = sum(measures[unit] for unit in units)
        for unit in units:
            positions[unit] = start + length / 2
        start += length
    return positions


def shifted(values: Sequence[float], sizes: Sequence[int], sparsity: float, alpha: float) -> list[float]:
    """Add one constant to `values`, clipped to `sparsity` +- `alpha`, such that their weighted mean is `sparsity`."""
    total = sum(sizes)

    def clipped(shift: float) -> list[float]:
        return [min(max(value + shift, sparsity - alpha), sparsity + alpha) for value in values]

    def mean(shift: float) -> float:
        return sum(size * value for size, value in zip(sizes, clipped(shift), strict=True)) / total

    low, high = bisect(-2 * alpha, 2 * alpha, lambda shift: mean(shift) < sparsity)
    return clipped((low + high) / 2)


def bisect(low: float, high: float, is_low: Callable[[float], bool]) -> tuple[float, float]:
    """Narrow the interval from `low` to `high` around the value at which `is_low` turns False."""
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if is_low(middle):
            low = middle
        else:
            high = middle
    return low, high


def allocate_by_loss(costs: Sequence[Sequence[float]], sizes: Sequence[int], sparsity: float, highest: float) -> list[float]:
    """
    Choose sparsities from 0 to `highest` that minimize the sum of costs, with the mean over all weights `sparsity`.

    Args:
        costs: of each unit at every sparsity in `POINTS`, rising. Their logarithm is interpolated linearly; below the first
            point they are a power of the sparsity.
        sizes: weights of each unit.
        sparsity: share of all weights to remove.
        highest: the highest sparsity of a unit.

    Raises:
        ValueError: unless 0 < sparsity <= highest <= the last of `POINTS`, or if a cost is negative or not finite.
    """
    if not 0 < sparsity <= highest <= POINTS[-1]:
        raise ValueError(
            f"allocation by loss measures sparsities up to {POINTS[-1]:g}, but {sparsity:g} of the weights with at most "
            f"{highest:g} of a matrix were asked for"
        )
    costs, weights = np.asarray(costs, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    if not np.isfinite(costs).all() or (costs < 0).any():
        raise ValueError("the cost of pruning a matrix is negative or not finite; check model and calibration text")
    grid = np.linspace(0, highest, STEPS + 1)
    curves = np.stack([curve(unit, grid) for unit in costs])

    def cheapest(price: float) -> np.ndarray:
        """The best sparsity of each unit if a removed weight earns `price`."""
        return grid[np.argmin(curves - price * weights[:, None] * grid, axis=1)]

    def share(sparsities: np.ndarray) -> float:
        return float(sparsities @ weights / weights.sum())

    scale = curves[:, -1].max() / weights.min() or 1.0
    # the logarithm of the price, in that scale
    low, high = bisect(-60.0, 30.0, lambda price: share(cheapest(scale * np.exp(price))) < sparsity)
    below, above = cheapest(scale * np.exp(low)), cheapest(scale * np.exp(high))
    if share(below) >= sparsity:  # any price is too high, since many costs are zero
        return (below * (sparsity / share(below))).tolist()
    if share(above) <= share(below):  # all units need the highest sparsity
        return [highest] * len(sizes)
    part = (sparsity - share(below)) / (share(above) - share(below))
    return (below + part * (above - below)).tolist()


def curve(costs: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Costs at every sparsity of `grid`, interpolated between those at `POINTS`."""
    tiny = max(costs.max(), 1e-30) * 1e-12
    logs = np.log(np.maximum(np.maximum.accumulate(costs), tiny))
    values = np.exp(np.interp(grid, POINTS, logs))
    power = max((logs[1] - logs[0]) / np.log(POINTS[1] / POINTS[0]), 1.0)
    first = grid < POINTS[0]
    values[first] = np.exp(logs[0]) * (grid[first] / POINTS[0]) ** power
    return values
