"""
Pruning scores: the weights of a matrix with the smallest scores go. OBS and OBD (arXiv 2301.00774), their sum ISC (arXiv
2310.09499, eq. 4), Wanda (arXiv 2306.11695) and magnitude. To add one, write its function and enter it in `SCORES`.

Nothing here imports torch, so that settings and their help know the names quickly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from .hessian import InverseFactor


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """
    A way to choose the weights that go, by exactly one of two functions.

    Attributes:
        column_weights: for pruning with the OBS update. From the factor of the inverse Hessian it computes what the squared
            weights of each input column count, (C,): a weight's score is its square times this.
        scores: for pruning without compensation. From the weight (R, C) and the norms of its inputs (C,), up to one common
            factor, it computes a score for each weight, (R, C).
        within_rows: let `scores` compete within each row, not in the whole matrix.
        calibrated: whether the inputs matter; without them `scores` gets None for the norms.
    """

    column_weights: Callable[[InverseFactor], Tensor] | None = None
    scores: Callable[[Tensor, Tensor | None], Tensor] | None = None
    within_rows: bool = False
    calibrated: bool = True


def obs(factor: InverseFactor) -> Tensor:
    """1 / U_mm^2 (eq. 2), U the upper Cholesky factor of H^-1: its diagonal for the columns that are not processed yet."""
    return factor.upper.diagonal().square().reciprocal()


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """|w| ||x||_2."""
    return weight.abs() * norms


def magnitude(weight: Tensor, norms: None) -> Tensor:
    """|w|."""
    return weight.abs()


SCORES = {
    # H_mm + 1 / U_mm^2: eq. 4 in the order of the OBS update
    "isc": Score(column_weights=lambda factor: factor.diagonal + obs(factor)),
    "obs": Score(column_weights=obs),
    # H_mm, the damped diagonal
    "obd": Score(column_weights=lambda factor: factor.diagonal),
    # H_mm + 1 / [H^-1]_mm, with the whole inverse
    "isc-b": Score(column_weights=lambda factor: factor.diagonal + factor.inverse_diagonal.reciprocal()),
    # H_mm + 1 / U_mm, as the authors' code has it; it depends on the unit of the activations
    "isc-c": Score(column_weights=lambda factor: factor.diagonal + factor.upper.diagonal().reciprocal()),
    "wanda": Score(scores=wanda, within_rows=True),
    "magnitude": Score(scores=magnitude, calibrated=False),
}
