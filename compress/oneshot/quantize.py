"""Rounding to few bits: a grid per output row, min to max, on which zero stays zero (as in arXiv 2210.17323)."""

import torch


class RowGrid:
    """
    The grid of a dense matrix (R, C): 2^bits levels per row from its smallest to its largest value, 0 among them.

    Raises:
        ValueError: on bits outside 2 .. 8.
    """

    def __init__(self, weight: torch.Tensor, bits: int):
        if not 2 <= bits <= 8:
            raise ValueError(f"bits={bits} must lie between 2 and 8")
        self.top = 2**bits - 1
        low = weight.amin(1).clamp(max=0)
        high = weight.amax(1).clamp(min=0)
        empty = (high - low) / self.top == 0  # a row of zeros, or of numbers too small to divide
        low = low.masked_fill(empty, -1.0)
        high = high.masked_fill(empty, 1.0)
        self.scale = (high - low) / self.top
        self.zero = (-low / self.scale).round()

    def round(self, column: torch.Tensor) -> torch.Tensor:
        """The nearest level of each row for one column (R,)."""
        return self.scale * ((column / self.scale).round().add(self.zero).clamp(0, self.top) - self.zero)
