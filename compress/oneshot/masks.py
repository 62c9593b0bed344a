"""Masks of exactly the number of weights that go: rounding with carry, ties broken by position, N zeros in every M weights."""

import torch


class ExactCount:
    """
    Whole numbers that make up a share of many groups. Each group's count is rounded together with what rounding left over in
    the groups before it, so that the sum is never off by more than a half.
    """

    def __init__(self, share: float):
        self.share = share
        self.size = 0
        self.count = 0

    def of(self, size: int) -> int:
        """Count for the next group, of `size` weights."""
        self.size += size
        count = min(max(round(self.share * self.size) - self.count, 0), size)
        self.count += count
        return count


def smallest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of the `count` smallest of all scores, bool in their shape; of equal ones the first."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().argsort(stable=True)[:count]] = True
    return mask.view(scores.shape)


def smallest_in_rows(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Mask of the smallest share of each row (R, C), with the remainders of rounding carried from row to row."""
    counter = ExactCount(share)
    counts = torch.tensor([counter.of(scores.shape[1]) for _ in range(len(scores))], device=scores.device)
    ranks = scores.argsort(dim=1, stable=True).argsort(dim=1)
    return ranks < counts[:, None]


def smallest_in_groups(scores: torch.Tensor, zeros: int, group: int) -> torch.Tensor:
    """Mask of the `zeros` smallest in every `group` consecutive weights of a row (R, C), C a multiple of group."""
    parts = scores.unflatten(1, (-1, group))
    return (parts.argsort(dim=2, stable=True).argsort(dim=2) < zeros).flatten(1)
