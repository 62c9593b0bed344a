"""Pruning one matrix by any score: with the OBS update or, for scores such as Wanda and magnitude, without compensation."""

import torch

from .config import PruneConfig
from .hessian import LocalHessian
from .masks import smallest, smallest_in_groups, smallest_in_rows
from .obs import Pruned, prune_compensated
from .quantize import RowGrid
from .scores import SCORES


def prune_matrix(
    name: str,
    weight: torch.Tensor,
    hessian: LocalHessian | None,
    sparsity: float,
    row_weights: torch.Tensor | None,
    config: PruneConfig,
) -> Pruned:
    """
    Prune a matrix (R, C) as `config` says.

    Args:
        name: of the matrix, for messages.
        weight: it is not changed.
        hessian: of its inputs; None if `config` is not calibrated.
        sparsity: share to remove.
        row_weights: (R,), factors of the scores in each row; None: 1.
        config: the score and its settings.
    """
    score = SCORES[config.score]
    settings = {"sparsity": sparsity, "pattern": config.zeros_of, "bits": config.bits}
    if score.scores:
        scores = score.scores(weight, hessian.norms if score.calibrated else None)
        return prune_uncompensated(weight, scores, within_rows=score.within_rows, **settings)
    return prune_compensated(
        weight,
        hessian.factor(name, damping=config.damping),
        score=config.score,
        block_size=config.block_size,
        comparison=config.comparison,
        row_weights=None if row_weights is None else row_weights.to(weight),
        **settings,
    )


def prune_uncompensated(
    weight: torch.Tensor,
    scores: torch.Tensor,
    *,
    within_rows: bool,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
    bits: int | None = None,
) -> Pruned:
    """
    Set the weights with the smallest scores to zero and leave the others as they are.

    Args:
        weight: (R, C); it is not changed.
        scores: (R, C).
        within_rows: every row loses the same share, up to rounding.
        sparsity: share to remove.
        pattern: (N, M), N zeros in every M columns of each row in place of `sparsity`.
        bits: rounds the remaining weights, on the grid of the dense weight.
    """
    if pattern:
        mask = smallest_in_groups(scores, *pattern)
    elif within_rows:
        mask = smallest_in_rows(scores, sparsity)
    else:
        mask = smallest(scores, round(sparsity * weight.numel()))
    pruned = weight.masked_fill(mask, 0)
    if bits is not None:
        grid = RowGrid(weight, bits)
        pruned = torch.stack([grid.round(column) for column in pruned.unbind(1)], dim=1)
    return Pruned(pruned, mask, None)
