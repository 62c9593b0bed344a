"""Directions and radii that feature maps start from: the discrete cosine transform, random rotations, Sobol points."""

import math

import torch
from torch import Tensor


def dct_matrix(size: int) -> Tensor:
    """Orthonormal DCT-II matrix C, (size, size) float64, row r the r-th frequency, as scipy.fft.dct(norm="ortho")."""
    n = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * n[:, None] * (n + 0.5)) * math.sqrt(2.0 / size)
    matrix[0] /= math.sqrt(2.0)
    return matrix


def frequency_matrix(feature_dim: int, head_dim: int, direction: str, seed: int) -> Tensor:
    """
    Rows that `wdcf` projects on, (feature_dim, head_dim) float32: the DCT-II matrix (`forward`) or its transpose (`inverse`).
    Beyond head_dim rows follow copies whose columns have random signs, so that they span new directions.
    """
    matrix = dct_matrix(head_dim)
    matrix = matrix if direction == "forward" else matrix.T
    generator = torch.Generator().manual_seed(seed)
    copies = [matrix]
    for _ in range(1, math.ceil(feature_dim / head_dim)):
        signs = torch.randint(0, 2, (head_dim,), generator=generator, dtype=torch.float64) * 2 - 1
        copies.append(matrix * signs)
    return torch.cat(copies)[:feature_dim].float()


def orthogonal_rows(count: int, dim: int, seed: int) -> Tensor:
    """Unit rows, (count, dim) float64, orthogonal within each block of dim of them: random rotations, one per block."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(math.ceil(count / dim)):
        q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
        blocks.append(q * r.diagonal().sign())  # without the signs rotations would not be equally likely
    return torch.cat(blocks)[:count]


def low_discrepancy(count: int, dim: int, seed: int) -> Tensor:
    """Scrambled Sobol points strictly inside the unit cube, (count, dim) float64."""
    points = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    return points.clamp(1e-6, 1 - 1e-6)


def radii(uniform: Tensor, head_dim: int, law: str) -> Tensor:
    """
    Quantiles at `uniform` of the law of the radius: `normal` (the paper's, signed) or `chi` with head_dim degrees of freedom,
    the radius of a normal vector, for which the features are unbiased.
    """
    if law == "normal":
        return torch.special.ndtri(uniform)
    low, high = torch.zeros_like(uniform), torch.full_like(uniform, math.sqrt(head_dim) + 10.0)
    half_dim = torch.full_like(uniform, head_dim / 2)
    for _ in range(60):  # bisection: torch has the chi distribution function but not its inverse
        middle = (low + high) / 2
        below = torch.special.gammainc(half_dim, middle**2 / 2) < uniform
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
