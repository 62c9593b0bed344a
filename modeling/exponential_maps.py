"""
Feature maps made of exponentials of projections (DiJiang, arXiv 2403.19928, equations 5, 9, 10 and 12, and Hedgehog).

B batch, T tokens, H heads, d head size, m features, M features after pairing.
"""

import math

import torch
import torch.nn.functional as F

from .feature_map_base import MAX_EXPONENT, FeatureMap
from .frequency import FFT_FROM, dct, dct_matrix, frequency_matrix, low_discrepancy, radii, sign_flips


class WDCF(FeatureMap):
    """
    Weighted discrete cosine features, phi(x) = D * exp(T C x) (equation 12): C the DCT matrix, T (H, m) radii, D = exp(log_D)
    (H, M) weights, kept positive by their logarithm. Input (B, T, H, d), output (B, T, H, M).
    """

    settings = (*FeatureMap.settings, "radial", "dct_direction")

    def __init__(self, config, num_heads: int, seed: int):
        super().__init__(config, num_heads, seed)
        self.add_parameters(T=(self.feature_dim,), log_D=(self.size,))
        # where the FFT may pay, the plain matrix and the signs of its copies stand for all m rows
        fast = self.head_dim >= FFT_FROM
        rows, copies = self.head_dim if fast else self.feature_dim, math.ceil(self.feature_dim / self.head_dim)
        self.register_buffer("C", torch.empty(rows, self.head_dim, dtype=torch.float32), persistent=False)
        signs = torch.empty(copies, self.head_dim, dtype=torch.float32) if fast else None
        self.register_buffer("signs", signs, persistent=False)

    def initial_values(self) -> dict[str, torch.Tensor]:
        uniform = low_discrepancy(self.feature_dim, 1, self.seed)[:, 0]
        values = {"T": radii(uniform, self.head_dim, self.radial), "log_D": torch.zeros(self.size)}
        if self.signs is None:
            return values | {"C": frequency_matrix(self.feature_dim, self.head_dim, self.direction, self.seed)}
        return values | {"C": dct_matrix(self.head_dim), "signs": sign_flips(len(self.signs), self.head_dim, self.seed)}

    def _apply(self, fn, recurse=True):
        kept = self.C  # a cosine table rounded to half precision would be another map
        super()._apply(fn, recurse)
        if self.C.dtype != torch.float32 and kept.device.type != "meta":
            self.C = kept.to(self.C.device)
        return self

    def exponents(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(x.float()) * self.T.float()

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """C x, (B, T, H, m)."""
        if self.signs is None:
            return F.linear(x, self.C)
        return dct(x.unsqueeze(-2) * self.signs, self.direction, self.C).flatten(-2)[..., : self.feature_dim]

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        return self.exponential(self.exponents(x), self.log_D)


class PFF(FeatureMap):
    """
    Positive fixed features, phi(x) = exp(T V x) (equation 9): V (H, m, d) low-discrepancy directions on the sphere, T (H, m)
    radii. Input (B, T, H, d), output (B, T, H, M).
    """

    settings = (*FeatureMap.settings, "radial")

    def __init__(self, config, num_heads: int, seed: int):
        super().__init__(config, num_heads, seed)
        self.add_parameters(T=(self.feature_dim,), V=(self.feature_dim, self.head_dim))

    def initial_values(self) -> dict[str, torch.Tensor]:
        points = low_discrepancy(self.feature_dim, self.head_dim + 1, self.seed)
        directions = F.normalize(torch.special.ndtri(points[:, 1:]), dim=-1)
        return {"T": radii(points[:, 0], self.head_dim, self.radial), "V": directions}

    def exponents(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bthd,hmd->bthm", x.float(), self.V.float()) * self.T.float()

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        return self.exponential(self.exponents(x))


class WPFF(PFF):
    """Weighted positive fixed features, phi(x) = D * exp(T V x) (equation 10), D = exp(log_D) (H, M). Shapes as `PFF`."""

    def __init__(self, config, num_heads: int, seed: int):
        super().__init__(config, num_heads, seed)
        self.add_parameters(log_D=(self.size,))

    def initial_values(self) -> dict[str, torch.Tensor]:
        return super().initial_values() | {"log_D": torch.zeros(self.size)}

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        return self.exponential(self.exponents(x), self.log_D)


class PRF(FeatureMap):
    """
    Positive random features, phi(x) = exp(W x - |x|^2 / 2) / sqrt(m) (Performer, arXiv 2009.14794; equation 5): W (H, m, d)
    standard normal. Input (B, T, H, d), output (B, T, H, M). Unbiased for exp(q.k) with activation `exp`.
    """

    def __init__(self, config, num_heads: int, seed: int):
        super().__init__(config, num_heads, seed)
        self.add_parameters(W=(self.feature_dim, self.head_dim))

    def initial_values(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return {"W": torch.randn(self.feature_dim, self.head_dim, generator=generator)}

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        x = x.float()
        z = torch.einsum("bthd,hmd->bthm", x, self.W.float())
        if self.activation == "exp":
            # the norm belongs to both halves of a pair, so it goes in after pairing
            z = torch.cat((z, -z), dim=-1) if self.pairs else z
            z = z - x.square().sum(-1, keepdim=True) / 2
            return z.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp() * z.shape[-1] ** -0.5
        return self.exponential(z)


class Hedgehog(FeatureMap):
    """
    Learnable softmax features, phi(x) = softmax([W x, -W x]) (Hedgehog, arXiv 2402.04347): W (H, m, d) starts as the identity.
    Input (B, T, H, d), output (B, T, H, M).
    """

    settings = ("feature_dim", "feature_activation", "feature_pairs")

    def __init__(self, config, num_heads: int, seed: int):
        super().__init__(config, num_heads, seed)
        self.add_parameters(W=(self.feature_dim, self.head_dim))

    def initial_values(self) -> dict[str, torch.Tensor]:
        return {"W": torch.eye(self.head_dim).repeat(math.ceil(self.feature_dim / self.head_dim), 1)[: self.feature_dim]}

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        return self.exponential(torch.einsum("bthd,hmd->bthm", x.float(), self.W.float()))
