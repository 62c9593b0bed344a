"""The local Hessian of a linear layer, H = 2 X X^T / N over its inputs X, and the factor of its inverse (arXiv 2301.00774)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from dijiang.common.hooks import hooks

from ..prunable_layers import refuse_uncalled
from .config import DAMPING

RETRIES = 3


@dataclass(frozen=True, slots=True)
class InverseFactor:
    """
    A damped Hessian H as scores and updates need it.

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


def factorize(hessian: torch.Tensor, name: str, *, damping: float = DAMPING) -> InverseFactor:
    """
    Factorize a Hessian (C, C). Inputs that were always zero get H_mm = 1. If it is singular even so, damping grows tenfold, up
    to three times, in float64.

    Raises:
        ValueError: if it holds NaN or infinite values, or stays singular; names the matrix.
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
            tensors = [x.to(hessian.dtype) for x in (upper, torch.diag(work), upper.square().sum(0))]
            return InverseFactor(*tensors, dead=dead, damping=share)
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
        device: of the sums.

    Attributes:
        matrix: (C, C), 2/N times the sum of x x^T over all tokens.
        samples: N, the number of sequences so far.
        inverse_factor: the factor of the inverse, once it was computed.
    """

    def __init__(self, columns: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        self.matrix = torch.zeros(columns, columns, dtype=dtype, device=device)
        self.samples = 0
        self.inverse_factor: InverseFactor | None = None

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs (B, T, C) of B sequences."""
        total = self.samples + len(inputs)
        x = inputs.flatten(0, -2).to(self.matrix.dtype)
        self.matrix.mul_(self.samples / total).addmm_(x.T, x, alpha=2 / total)
        self.samples = total
        self.inverse_factor = None

    @property
    def norms(self) -> torch.Tensor:
        """||x_m||_2 of each input up to one common factor, (C,)."""
        return self.matrix.diagonal().sqrt()

    def factor(self, name: str, *, damping: float = DAMPING) -> InverseFactor:
        """`factorize`, once for all matrices that share these inputs; `name` is that of the first."""
        if self.inverse_factor is None:
            self.inverse_factor = factorize(self.matrix, name, damping=damping)
        return self.inverse_factor


def input_groups(modules: dict[str, nn.Linear], forward: Callable[[], object]) -> list[list[str]]:
    """
    Group the names of matrices that get the very same input, such as those of queries, keys and values.

    Args:
        modules: the matrices' modules, by name.
        forward: runs them; groups are in the order of these calls.

    Raises:
        ValueError: if it does not call all of them.
    """
    groups: list[tuple[torch.Tensor, list[str]]] = []

    def before(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple) -> None:
            group = next((names for tensor, names in groups if tensor is inputs[0]), None)
            if group is None:
                groups.append((inputs[0], [name]))
            else:
                group.append(name)

        return hook

    with hooks(module.register_forward_pre_hook(before(name)) for name, module in modules.items()):
        forward()
    refuse_uncalled(modules, {name for _, names in groups for name in names})
    return [names for _, names in groups]


@contextmanager
def gather_hessians(modules: dict[str, nn.Linear], groups: Sequence[Sequence[str]]) -> Iterator[list[LocalHessian]]:
    """Yield one Hessian for each group, to which every input of the group's first matrix within the block is added."""

    def adding(hessian: LocalHessian) -> Callable:
        def hook(module: nn.Module, inputs: tuple) -> None:
            x = inputs[0]
            hessian.add(x if x.dim() > 2 else x[None])  # OPT's layers flatten their one sequence

        return hook

    firsts = [modules[group[0]] for group in groups]
    hessians = [LocalHessian(module.in_features, device=module.weight.device) for module in firsts]
    with hooks(m.register_forward_pre_hook(adding(hessian)) for m, hessian in zip(firsts, hessians, strict=True)):
        yield hessians
