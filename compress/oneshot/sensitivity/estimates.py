"""From estimates, several for each matrix, to sensitivities that matrices are ranked by. Imports neither torch nor scipy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

STABLE = 0.7  # split-half rank correlation below which ranks are mostly noise


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivities:
    """
    How much each matrix matters to the loss.

    Attributes:
        method: how it was measured.
        values: sensitivity by name of the matrix; ranks are made of them.
        costs: estimated loss of pruning the matrix to each of `POINTS`, up to a common factor, by name; None if ranks decide.
        correlation: Spearman's between halves of the estimates; None if it cannot be computed.
        negative: matrices whose estimate was negative and counts as 0.
        samples: sequences or probes behind each value.
    """

    method: str
    values: dict[str, float]
    costs: dict[str, list[float]] | None = None
    correlation: float | None = None
    negative: tuple[str, ...] = ()
    samples: int = 0

    def warnings(self) -> list[str]:
        """One line for each thing that a user should know about these ranks."""
        lines = []
        if self.correlation is not None and self.correlation < STABLE:
            lines.append(
                f"ranks by {self.method} agree only to {self.correlation:.2f} between halves of the {self.samples} samples: "
                "mostly noise; use fisher or more samples"
            )
        if self.negative:
            lines.append(f"{len(self.negative)} of {len(self.values)} {self.method} estimates are negative and count as 0")
        return lines


def sensitivities_of(method: str, estimates: dict[str, list[float]], sizes: dict[str, int], by_size: bool) -> Sensitivities:
    """
    The mean estimate of each matrix, divided by its size if `by_size`, and 0 where it is negative.

    Raises:
        ValueError: on estimates that are NaN or infinite; names the matrix.
    """
    means = {}
    for name, values in estimates.items():
        refuse_not_finite(name, values)
        means[name] = fmean(values) / (sizes[name] if by_size else 1)
    return Sensitivities(
        method=method,
        values={name: max(mean, 0.0) for name, mean in means.items()},
        correlation=split_half_correlation(estimates),
        negative=tuple(name for name, mean in means.items() if mean < 0),
        samples=max(map(len, estimates.values())),
    )


def refuse_not_finite(name: str, values: Sequence[float]) -> None:
    """Raise ValueError if the sensitivity of this matrix is NaN or infinite."""
    if not all(map(math.isfinite, values)):
        raise ValueError(f"the sensitivity of {name} is NaN or infinite; check the model, or load it in float32")


def split_half_correlation(estimates: dict[str, list[float]]) -> float | None:
    """
    Spearman's rank correlation, over the matrices, of the means of the even and of the odd estimates: how similar the ranks of
    another run would be. None with fewer than 2 estimates or 3 matrices, and where a half is constant or not finite.
    """
    if len(estimates) < 3 or min(map(len, estimates.values())) < 2:
        return None
    halves = [[fmean(values[start::2]) for values in estimates.values()] for start in (0, 1)]
    if any(len(set(half)) < 2 or not all(map(math.isfinite, half)) for half in halves):
        return None
    from scipy.stats import spearmanr  # slow to import, and settings import this file

    return float(spearmanr(*halves).statistic)
