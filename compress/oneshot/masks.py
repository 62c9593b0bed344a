"""How many weights go, exactly, and which ones: cumulative rounding, stable order, and N zeros in every M."""

import re

import torch


class ExactCount:
    """
    Cuts a share of many groups in whole numbers: each group's count is rounded with what the groups before it left over, so
    that the sum is never off by more than a half.
    """

    def __init__(self, share: float):
        self.share, self.size, self.cut = share, 0, 0

    def of(self, size: int) -> int:
        """How many of the next `size` weights."""
        self.size += size
        count = min(max(round(self.share * self.size) - self.cut, 0), size)
        self.cut += count
        return count


def smallest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of the `count` smallest of all scores, bool in their shape; of equal ones the first."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().argsort(stable=True)[:count]] = True
    return mask.view(scores.shape)


def below_threshold(scores: torch.Tensor, share: float) -> torch.Tensor:
    """As the authors' and SparseGPT's code does it: all scores up to the one at place share * size, that one included."""
    ordered = scores.flatten().sort().values
    return scores <= ordered[int(scores.numel() * share)]


def smallest_in_rows(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Mask of the smallest share of each row (R, C), the remainders of rounding carried from row to row."""
    counter = ExactCount(share)
    counts = torch.tensor([counter.of(scores.shape[1]) for _ in range(len(scores))], device=scores.device)
    ranks = scores.argsort(dim=1, stable=True).argsort(dim=1)
    return ranks < counts[:, None]


def smallest_in_groups(scores: torch.Tensor, zeros: int, group: int) -> torch.Tensor:
    """Mask of the `zeros` smallest in each `group` neighbours of a row (R, C), C a multiple of group."""
    parts = scores.unflatten(1, (-1, group))
    return (parts.argsort(dim=2, stable=True).argsort(dim=2) < zeros).flatten(1)


def parse_pattern(text: str) -> tuple[int, int]:
    """
    (N, M) of "N:M", N zeros in every M weights of a row.

    Raises:
        ValueError: unless 0 < N < M.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(f"pattern {text!r} is not N:M with 0 < N < M, N zeros in every M weights; write for example 2:4")
    return int(match[1]), int(match[2])
