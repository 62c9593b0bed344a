"""The local Hessian of a linear layer, H = 2 X X^T / N over its inputs X, and the factor of its inverse (arXiv 2301.00774)."""

from dataclasses import dataclass

import torch

DAMPING = 0.01
RETRIES = 3


@dataclass(frozen=True, slots=True)
class InverseFactor:
    """
    What scores and updates need of a Hessian H, damped.

    Attributes:
        upper: U, (C, C) upper triangular, H^-1 = U^T U.
        diagonal: H_mm, (C,), damped.
        inverse_diagonal: [H^-1]_mm, (C,).
        dead: (C,) bool, inputs that were always zero.
        damping: the share of the mean diagonal that was added.
    """

    upper: torch.Tensor
    diagonal: torch.Tensor
    inverse_diagonal: torch.Tensor
    dead: torch.Tensor
    damping: float


def factorise(hessian: torch.Tensor, name: str, *, damping: float = DAMPING) -> InverseFactor:
    """
    Factorise a Hessian (C, C). Inputs that were always zero get H_mm = 1. Should it be singular all the same, damping is made
    ten times as strong, up to three times, in float64.

    Raises:
        ValueError: if it holds NaN or infinite values, or stays singular; says which matrix it is of.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError(f"the inputs of {name} hold NaN or infinite values, so it cannot be pruned; check model and dtype")
    diagonal = torch.diag(hessian)  # a copy; its mean is summed as the reference code does
    dead = diagonal == 0
    diagonal = diagonal.masked_fill(dead, 1.0)
    mean = diagonal.mean().item()
    for attempt in range(RETRIES + 1):
        share = damping * 10**attempt
        work = hessian.to(hessian.dtype if attempt == 0 else torch.float64, copy=True)
        work.diagonal().copy_(diagonal.to(work.dtype) + share * mean)
        lower, failed = torch.linalg.cholesky_ex(work)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and torch.isfinite(upper).all():
            kept = [x.to(hessian.dtype) for x in (upper, torch.diag(work), upper.square().sum(0))]
            return InverseFactor(*kept, dead=dead, damping=share)
    raise ValueError(
        f"the Hessian of {name} is singular, also with {share:g} of its mean diagonal added; give more calibration text or "
        "a larger damping"
    )


class LocalHessian:
    """
    The Hessian of ||W X - W' X||^2, shared by all rows of W, gathered batch by batch.

    Args:
        columns: inputs C of the layer.
        dtype: of the sums, float32 or float64.

    Attributes:
        matrix: (C, C), 2/N times the sum of x x^T over all tokens; samples: N, the sequences so far.
    """

    def __init__(self, columns: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        self.matrix = torch.zeros(columns, columns, dtype=dtype, device=device)
        self.samples = 0
        self.kept: InverseFactor | None = None

    def add(self, inputs: torch.Tensor) -> None:
        """Take in (B, T, C), B sequences."""
        total = self.samples + len(inputs)
        x = inputs.flatten(0, -2).to(self.matrix.dtype)
        self.matrix.mul_(self.samples / total).addmm_(x.T, x, alpha=2 / total)
        self.samples, self.kept = total, None

    @property
    def norms(self) -> torch.Tensor:
        """||x_m||_2 of each input up to one common factor, (C,)."""
        return self.matrix.diagonal().sqrt()

    def factor(self, name: str, *, damping: float = DAMPING) -> InverseFactor:
        """`factorise`, once for all matrices that share these inputs; `name` is that of the first."""
        if self.kept is None:
            self.kept = factorise(self.matrix, name, damping=damping)
        return self.kept
