"""
The OBS update: prune one matrix column by column while the weights that remain make up for those that go. This is SparseGPT
(arXiv 2301.00774), with any score, N:M patterns and quantization.
"""

from dataclasses import dataclass

import torch

from .config import BLOCK
from .hessian import InverseFactor
from .masks import ExactCount, smallest, smallest_in_groups
from .quantize import RowGrid
from .scores import SCORES


@dataclass(frozen=True, slots=True)
class Pruned:
    """
    A matrix after pruning.

    Attributes:
        weight: (R, C), in the dtype it was pruned in.
        mask: (R, C) bool, True where a weight was removed.
        loss: of its output, tr(D H D^T) / 2 with D the change and H the damped Hessian; None if it was not computed.
    """

    weight: torch.Tensor
    mask: torch.Tensor
    loss: float | None


def prune_compensated(  # noqa: PLR0913
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
) -> Pruned:
    """
    Set a share of a matrix to zero, column by column, each column's error spread over the columns that follow.

    Args:
        weight: (R, C), float32 or float64; it is not changed. Columns of dead inputs are zero afterwards.
        factor: of the Hessian of its inputs.
        sparsity: share to remove, 0 <= sparsity < 1.
        score: one of `SCORES` with `column_weights`.
        pattern: (N, M), N zeros in every M columns of each row in place of `sparsity`, `comparison` and `row_weights`; M
            divides C.
        bits: rounds the remaining weights, on the grid of the dense weight.
        block_size: columns whose weights are chosen together; cut to a multiple of M.
        comparison: `block`: every block of columns loses the same share; `matrix`: as much as it holds of the smallest scores
            of the whole matrix before the update.
        row_weights: (R,), factors of the scores in each row; None: 1.
    """
    grid = None if bits is None else RowGrid(weight, bits)
    weight = weight.masked_fill(factor.dead, 0)
    R, C = weight.shape
    importance = SCORES[score].column_weights(factor)
    per_row = 1 if row_weights is None else row_weights[:, None]
    mask = torch.zeros(R, C, dtype=torch.bool, device=weight.device)
    step = block_size if pattern is None else max(block_size - block_size % pattern[1], pattern[1])
    blocks = [slice(start, min(start + step, C)) for start in range(0, C, step)]
    if comparison == "matrix" and pattern is None:
        smallest_of_all = smallest(weight.square() * importance * per_row, round(sparsity * R * C))
        counts = [int(smallest_of_all[:, block].sum()) for block in blocks]
    else:
        counter = ExactCount(sparsity)
        counts = [counter.of(R * (block.stop - block.start)) for block in blocks]
    loss = 0.0
    for block, count in zip(blocks, counts, strict=True):
        if pattern is None:
            mask[:, block] = smallest(weight[:, block].square() * importance[block] * per_row, count)
        upper = factor.upper[block, block]
        errors = update_block(weight[:, block], mask[:, block], upper, importance[block], pattern, grid)
        weight[:, block.stop :] -= errors.T.contiguous() @ factor.upper[block, block.stop :]
        loss += errors.double().square().sum().item() / 2
    return Pruned(weight, mask, loss)


def update_block(
    weight: torch.Tensor,
    mask: torch.Tensor,
    upper: torch.Tensor,
    importance: torch.Tensor,
    pattern: tuple[int, int] | None,
    grid: RowGrid | None,
) -> torch.Tensor:
    """
    Remove the masked weights of a block of columns (R, B), in place, each error spread over the columns of the block that
    follow. With a pattern, `mask` is filled as the columns are reached.

    Args:
        upper: the block's part of the inverse Hessian's factor, (B, B).
        importance: what the squared weights of each column count, (B,).

    Returns:
        Errors by column, (B, R), to be spread over the columns after the block.
    """
    columns = weight.T.contiguous()  # the weights of a column are next to one another
    errors = torch.empty_like(columns)
    for j in range(len(columns)):
        if pattern and j % pattern[1] == 0:
            group = slice(j, j + pattern[1])
            mask[:, group] = smallest_in_groups(columns[group].T.square() * importance[group], *pattern)
        remaining = columns[j].masked_fill(mask[:, j], 0)
        if grid:
            remaining = grid.round(remaining)
        errors[j] = (columns[j] - remaining) / upper[j, j]
        columns[j] = remaining
        columns[j + 1 :] -= upper[j, j + 1 :, None] * errors[j]
    weight.copy_(columns.T)
    return errors
