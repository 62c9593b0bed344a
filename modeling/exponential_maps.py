"""
Feature maps made of exponentials of projections (DiJiang, arXiv 2403.19928, equations 5, 9, 10 and 12, and Hedgehog).

B batch, T tokens, H heads, d head size, m features, M features after pairing.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_dijiang import DiJiangConfig
from .feature_map_base import MAX_EXPONENT, FeatureMap, register_feature_map
from .frequency import frequency_matrix, low_discrepancy, radii

# up to this number of rows per head, a matrix of its own for each head costs more to set up than it saves
FEW_ROWS = 16


class Factors(NamedTuple):
    """
    The factors of the exponents T V x + log D of an `ExponentialMap`.

    Attributes:
        V: (H, m, d), or (m or more, d) if all heads share it, of which the first m rows count.
        T: (H, m) or None.
        log_D: (H, M) or None.
    """

    V: Tensor
    T: Tensor | None
    log_D: Tensor | None


class Exponents(NamedTuple):
    """
    The exponents W x + b of a feature map.

    Attributes:
        W: (H, M, d).
        b: (H, M).
    """

    W: Tensor
    b: Tensor


class ExponentialMap(FeatureMap):
    """phi(x) = D * exp(T V x), or its softmax over the features."""

    # whether the exponents are linear in x, as `factors` says, and nothing is added
    is_one_matrix = True

    def factors(self) -> Factors:
        """The factors of the current exponents."""
        raise NotImplementedError

    def directions(self) -> Tensor:
        """T V, (H, m, d), before pairing."""
        V, T, _ = self.factors()
        V = V[: self.feature_dim] if V.dim() == 2 else V
        return V.float() if T is None else T.float().unsqueeze(-1) * V.float()

    @torch.no_grad()
    def center(self, mean: Tensor) -> None:
        if self.factors().log_D is not None:
            z = self.project(mean[None, None], self.directions())[0, 0]
            self.get_parameter("log_D").copy_(torch.cat((-z, z), dim=-1) if self.pairs else -z)

    def matrix(self, scale: float = 1.0) -> Exponents:
        """The exponents of scale * x. Pairing appends -W, which makes the kernel even."""
        W = self.directions() * scale
        W = torch.cat((W, -W), dim=1) if self.pairs else W
        log_D = self.factors().log_D
        return Exponents(W, W.new_zeros(W.shape[:2]) if log_D is None else log_D.float())

    def exponents(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Exponents of all features, log-weights included, (B, T, H, M)."""
        return self.project(x, *self.matrix(scale))

    def forward(self, x: Tensor, positions: Tensor | None = None, scale: float = 1.0) -> Tensor:
        z = self.exponents(x, scale).permute(2, 0, 1, 3)  # the order in memory
        if self.activation == "softmax":
            phi = z.softmax(dim=-1)
        else:
            phi = z.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp() * z.shape[-1] ** -0.5
        return phi.permute(1, 2, 0, 3)


@register_feature_map("wdcf")
class WDCF(ExponentialMap):
    """
    Weighted discrete cosine features, phi(x) = D * exp(T C x) (equation 12): C the DCT matrix, T (H, m) radii, D = exp(log_D)
    (H, M) weights, kept positive by their logarithm. Input (B, T, H, d), output (B, T, H, M).
    """

    settings = (*FeatureMap.settings, "radial", "dct_direction")
    C: Tensor

    def __init__(self, config: DiJiangConfig, num_heads: int, seed: int):
        super().__init__(config, num_heads, seed)
        self.add_parameters(T=(self.feature_dim,), log_D=(self.size,))
        self.register_buffer("C", torch.empty(self.size, self.head_dim, dtype=torch.float32), persistent=False)

    def initial_values(self) -> dict[str, Tensor]:
        uniform = low_discrepancy(self.feature_dim, 1, self.seed)[:, 0]
        C = frequency_matrix(self.feature_dim, self.head_dim, self.direction, self.seed)
        values = {"T": radii(uniform, self.head_dim, self.radial), "log_D": torch.zeros(self.size)}
        return values | {"C": torch.cat((C, -C)) if self.pairs else C}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WDCF":
        table = self.C  # rounded to half precision it would be another map
        super()._apply(fn, recurse)
        if self.C.dtype != torch.float32 and table.device.type != "meta":
            self.C = table.to(self.C.device)
        return self

    def factors(self) -> Factors:
        return Factors(self.C, self.weight("T"), self.weight("log_D"))

    def exponents(self, x: Tensor, scale: float = 1.0) -> Tensor:
        if x.shape[0] * x.shape[1] > FEW_ROWS:
            return super().exponents(x, scale)
        # one C for all heads, whose exponents differ by T
        z = F.linear(x.float(), self.C)
        halves = (self.num_heads, self.size // self.feature_dim, self.feature_dim)
        log_D = self.weight("log_D").float().view(halves)
        T = self.weight("T").float().unsqueeze(1)
        return torch.addcmul(log_D, z.view(*z.shape[:2], *halves), T, value=scale).flatten(-2)


@register_feature_map("pff")
class PFF(ExponentialMap):
    """
    Positive fixed features, phi(x) = exp(T V x) (equation 9): V (H, m, d) low-discrepancy directions on the sphere, T (H, m)
    radii. Input (B, T, H, d), output (B, T, H, M).
    """

    settings = (*FeatureMap.settings, "radial")

    def __init__(self, config: DiJiangConfig, num_heads: int, seed: int):
        super().__init__(config, num_heads, seed)
        self.add_parameters(T=(self.feature_dim,), V=(self.feature_dim, self.head_dim))

    def initial_values(self) -> dict[str, Tensor]:
        points = low_discrepancy(self.feature_dim, self.head_dim + 1, self.seed)
        directions = F.normalize(torch.special.ndtri(points[:, 1:]), dim=-1)
        return {"T": radii(points[:, 0], self.head_dim, self.radial), "V": directions}

    def factors(self) -> Factors:
        log_D = self.weight("log_D") if "log_D" in self._parameters else None
        return Factors(self.weight("V"), self.weight("T"), log_D)


@register_feature_map("wpff")
class WPFF(PFF):
    """Weighted positive fixed features, phi(x) = D * exp(T V x) (equation 10), D = exp(log_D) (H, M). Shapes as `PFF`."""

    def __init__(self, config: DiJiangConfig, num_heads: int, seed: int):
        super().__init__(config, num_heads, seed)
        self.add_parameters(log_D=(self.size,))

    def initial_values(self) -> dict[str, Tensor]:
        return super().initial_values() | {"log_D": torch.zeros(self.size)}


@register_feature_map("ldcf")
class LDCF(WPFF):
    """
    Learned discrete cosine features, phi(x) = D * exp(T V x): WDCF whose directions V (H, m, d) train. They start as the rows
    of the DCT, so that an untrained `ldcf` is `wdcf`. Shapes as `PFF`.
    """

    settings = (*WPFF.settings, "dct_direction")

    def initial_values(self) -> dict[str, Tensor]:
        uniform = low_discrepancy(self.feature_dim, 1, self.seed)[:, 0]
        V = frequency_matrix(self.feature_dim, self.head_dim, self.direction, self.seed)
        return {"T": radii(uniform, self.head_dim, self.radial), "V": V, "log_D": torch.zeros(self.size)}


@register_feature_map("prf")
class PRF(ExponentialMap):
    """
    Positive random features, phi(x) = exp(W x - |x|^2 / 2) / sqrt(m) (Performer, arXiv 2009.14794; equation 5): W (H, m, d)
    standard normal. Input (B, T, H, d), output (B, T, H, M). Unbiased for exp(q.k) with activation `exp`.
    """

    def __init__(self, config: DiJiangConfig, num_heads: int, seed: int):
        super().__init__(config, num_heads, seed)
        self.add_parameters(W=(self.feature_dim, self.head_dim))
        self.is_one_matrix = self.activation == "softmax"

    def initial_values(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return {"W": torch.randn(self.feature_dim, self.head_dim, generator=generator)}

    def factors(self) -> Factors:
        return Factors(self.weight("W"), None, None)

    def exponents(self, x: Tensor, scale: float = 1.0) -> Tensor:
        z = super().exponents(x, scale)
        if self.is_one_matrix:  # the softmax would cancel the norm, which all features of a row share
            return z
        return z - (x.float() * scale).square().sum(-1, keepdim=True) / 2


@register_feature_map("hedgehog")
class Hedgehog(ExponentialMap):
    """
    Learnable softmax features, phi(x) = softmax([W x, -W x]) (Hedgehog, arXiv 2402.04347): W (H, m, d) starts as the identity.
    Input (B, T, H, d), output (B, T, H, M).
    """

    settings = ("feature_dim", "feature_activation", "feature_pairs", "learn_features")

    def __init__(self, config: DiJiangConfig, num_heads: int, seed: int):
        super().__init__(config, num_heads, seed)
        self.add_parameters(W=(self.feature_dim, self.head_dim))

    def initial_values(self) -> dict[str, Tensor]:
        return {"W": torch.eye(self.head_dim).repeat(math.ceil(self.feature_dim / self.head_dim), 1)[: self.feature_dim]}

    def factors(self) -> Factors:
        return Factors(self.weight("W"), None, None)
