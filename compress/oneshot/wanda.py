"""Pruning one matrix with the other weights left as they are: Wanda (arXiv 2306.11695) and magnitude."""

import torch

from .masks import smallest, smallest_in_groups, smallest_in_rows
from .obs import Pruned
from .quantize import RowGrid


def prune_uncompensated(
    weight: torch.Tensor,
    norms: torch.Tensor | None,
    *,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
    bits: int | None = None,
) -> Pruned:
    """
    Set a share of a matrix to zero.

    Args:
        weight: (R, C); it is not changed.
        norms: ||x_m||_2 of each input, (C,), or a multiple: the smallest |w| * norm of every row go (Wanda). None: the
            smallest |w| of the whole matrix.
        sparsity, pattern, bits: as for `sweep`.
    """
    scores = weight.abs() if norms is None else weight.abs() * norms
    if pattern:
        mask = smallest_in_groups(scores, *pattern)
    elif norms is not None:
        mask = smallest_in_rows(scores, sparsity)
    else:
        mask = smallest(scores, round(sparsity * weight.numel()))
    kept = weight.masked_fill(mask, 0)
    if bits is not None:
        grid = RowGrid(weight, bits)
        kept = torch.stack([grid.round(column) for column in kept.unbind(1)], dim=1)
    return Pruned(kept, mask, None)
