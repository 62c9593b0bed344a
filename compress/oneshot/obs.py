"""
Pruning one matrix while the weights that stay make up for those that go: the column sweep of SparseGPT (arXiv 2301.00774),
with any score, N:M patterns and quantisation.
"""

from dataclasses import dataclass

import torch

from .hessian import InverseFactor
from .masks import ExactCount, below_threshold, smallest, smallest_in_groups
from .quantize import RowGrid
from .scores import column_weights

BLOCK = 128
COMPARISONS = ("block", "matrix")


@dataclass(frozen=True, slots=True)
class Pruned:
    """
    A matrix after pruning.

    Attributes:
        weight: (R, C), in the dtype it was pruned in; mask: (R, C) bool, True where a weight was removed.
        loss: of its output, tr(D H D^T) / 2 with D the change and H the damped Hessian; None where nothing reckoned it.
    """

    weight: torch.Tensor
    mask: torch.Tensor
    loss: float | None


def sweep(
    weight: torch.Tensor,
    factor: InverseFactor,
    *,
    sparsity: float,
    score: str = "isc",
    pattern: tuple[int, int] | None = None,
    bits: int | None = None,
    block_size: int = BLOCK,
    comparison: str = "block",
    row_weights: torch.Tensor | None = None,
    reference_threshold: bool = False,
) -> Pruned:
    """
    Set a share of a matrix to zero, column by column, each error spread over the columns that follow.

    Args:
        weight: (R, C), float32 or float64; it is not changed. Columns of dead inputs are zero afterwards.
        factor: of the Hessian of its inputs.
        sparsity: share to remove, 0 <= sparsity < 1.
        score: one of `SCORES` that compensates.
        pattern: (N, M), N zeros in every M columns of each row in place of `sparsity`, `comparison` and `row_weights`; M
            divides C.
        bits: what stays is rounded to so many, by the grid of the dense weight.
        block_size: columns that are chosen among together, and updated lazily; cut to a multiple of M.
        comparison: `block`: every block of columns loses the same share; `matrix`: as much as it holds of the smallest scores
            of the whole matrix before the sweep.
        row_weights: (R,), multiply the scores of each row; None: all rows alike.
        reference_threshold: choose as the reference code does, by a threshold that takes one weight more per block and all
            that are equal to it, instead of counting exactly.
    """
    grid = None if bits is None else RowGrid(weight, bits)
    weight = weight.masked_fill(factor.dead, 0)
    R, C = weight.shape
    upper, importance = factor.upper, column_weights(score, factor)
    mask = torch.zeros(R, C, dtype=torch.bool, device=weight.device)
    per_row = 1 if row_weights is None else row_weights[:, None]
    step = block_size if pattern is None else max(block_size - block_size % pattern[1], pattern[1])
    starts = range(0, C, step)
    if comparison == "matrix" and pattern is None:
        whole = smallest(weight.square() * importance * per_row, round(sparsity * R * C))
        counts = [int(whole[:, a : a + step].sum()) for a in starts]
    else:
        counter = ExactCount(sparsity)
        counts = [counter.of(R * (min(a + step, C) - a)) for a in starts]
    loss = 0.0
    for a, count in zip(starts, counts, strict=True):
        b = min(a + step, C)
        block, u = weight[:, a:b].T.contiguous(), upper[a:b, a:b]  # (columns, R): a column's weights lie side by side
        errors = torch.empty_like(block)
        if pattern is None:
            scores = block.T.square() * importance[a:b] * per_row
            mask[:, a:b] = below_threshold(scores, sparsity) if reference_threshold else smallest(scores, count)
        for j in range(b - a):
            if pattern and j % pattern[1] == 0:
                group = slice(j, j + pattern[1])
                scores = block[group].T.square() * importance[a:b][group]
                mask[:, a:b][:, group] = smallest_in_groups(scores, *pattern)
            kept = block[j].masked_fill(mask[:, a + j], 0)
            if grid:
                kept = grid.round(kept)
            errors[j] = (block[j] - kept) / u[j, j]
            block[j] = kept
            block[j + 1 :] -= u[j, j + 1 :, None] * errors[j]
        weight[:, a:b] = block.T
        weight[:, b:] -= errors.T.contiguous() @ upper[a:b, b:]
        loss += errors.double().square().sum().item() / 2
    return Pruned(weight, mask, loss)
