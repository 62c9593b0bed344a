"""
Key/value heads of a linear layer that keep every token, beside those that do not: splitting a layer's heads into two blocks,
and joining what both attend to.

B batch, T tokens, H query heads, G key/value heads, R = H // G.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .packing import PackedGroup


class LinearMasks(NamedTuple):
    """
    What a linear layer may attend to.

    Attributes:
        linear: of heads with a linear state: (B, T) bool, False for padding; packed groups; None: all tokens are real.
        softmax: of kept heads, a mask as transformers makes it; None: causal.
    """

    linear: Tensor | list[PackedGroup] | None
    softmax: Any = None


def runs(heads: Sequence[int]) -> list[tuple[int, int]]:
    """Rising numbers as (first, end) of unbroken runs: [0, 1, 3] gives [(0, 2), (3, 4)]."""
    cuts = [0, *(i for i, (a, b) in enumerate(pairwise(heads), 1) if b != a + 1), len(heads)]
    return [(heads[start], heads[end - 1] + 1) for start, end in pairwise(cuts) if end > start]


def take_heads(x: Tensor, heads: Sequence[int], repeats: int = 1) -> Tensor:
    """The `repeats` query heads of each of these key/value heads, out of x (B, T, repeats * G, d)."""
    parts = [x[:, :, start * repeats : end * repeats] for start, end in runs(heads)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def join_heads(kept: Tensor, others: Tensor, full_heads: Sequence[int], linear_heads: Sequence[int], repeats: int) -> Tensor:
    """The output (B, T, H, d) of all query heads from that of the kept ones and of the others, each in rising order."""
    source = {head: (kept, i) for i, head in enumerate(full_heads)}
    source |= {head: (others, i) for i, head in enumerate(linear_heads)}
    columns = [(source[head][0], source[head][1]) for head in sorted(source)]
    return torch.cat([x[:, :, i * repeats : (i + 1) * repeats].to(others.dtype) for x, i in columns], dim=2)
