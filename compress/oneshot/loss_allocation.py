"""
Sparsities from what they would cost: those at which one weight more costs the same loss in every unit. It stands beside the
paper's rule, which goes by ranks alone; the loss is that of a Kronecker-factored Fisher information (arXiv 1503.05671).
"""

from collections.abc import Sequence

import numpy as np

POINTS = (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # sparsities at which costs are measured
STEPS = 1000  # of the sparsities that are weighed up
BISECTIONS = 200


def allocate_by_loss(costs: Sequence[Sequence[float]], sizes: Sequence[int], sparsity: float, highest: float) -> list[float]:
    """
    Sparsities from 0 to `highest` that minimise the sum of costs, with the mean over all weights `sparsity`.

    Args:
        costs: of each unit at every sparsity in `POINTS`, rising; in between their logarithm is taken to be linear, below
            the first they are a power of the sparsity.
        sizes: weights of each unit.

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
        """Of each unit the sparsity that is best where a removed weight earns `price`."""
        return grid[np.argmin(curves - price * weights[:, None] * grid, axis=1)]

    def share(sparsities: np.ndarray) -> float:
        return float(sparsities @ weights / weights.sum())

    scale = curves[:, -1].max() / weights.min() or 1.0
    low, high = -60.0, 30.0  # of the logarithm of the price, in that scale
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if share(cheapest(scale * np.exp(middle))) < sparsity else (low, middle)
    below, above = cheapest(scale * np.exp(low)), cheapest(scale * np.exp(high))
    if share(below) >= sparsity:  # so many costs are zero that any price is too high
        return (below * (sparsity / share(below))).tolist()
    if share(above) <= share(below):  # there is no choice but the highest for all
        return [highest] * len(sizes)
    part = (sparsity - share(below)) / (share(above) - share(below))
    return (below + part * (above - below)).tolist()


def curve(costs: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Costs at every sparsity of `grid`, from those at `POINTS`."""
    tiny = max(costs.max(), 1e-30) * 1e-12
    logs = np.log(np.maximum(np.maximum.accumulate(costs), tiny))
    found = np.exp(np.interp(grid, POINTS, logs))
    power = max((logs[1] - logs[0]) / np.log(POINTS[1] / POINTS[0]), 1.0)
    first = grid < POINTS[0]
    found[first] = np.exp(logs[0]) * (grid[first] / POINTS[0]) ** power
    return found
