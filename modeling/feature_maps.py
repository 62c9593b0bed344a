"""
Positive feature maps phi: R^d -> R^M with phi(q).phi(k) standing in for exp(q.k) (DiJiang, arXiv 2403.19928, section 3).

B batch, T tokens, H heads, d head size, m features, M features after pairing (2m if `pairs`, else m). Every map takes
(B, T, H, d) and returns float32 (B, T, H, M). All weights are parameters, one set per head, drawn from a seed and stored
in the checkpoint. A new map is one class, one line in `FEATURE_MAPS` and its name in
`CHOICES` of `configuration_dijiang.py`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

# exponents of phi(q), phi(k) and of a key's weight stay inside this range: the product of all three, summed over millions of
# tokens, is finite in float32
MAX_EXPONENT = 20.0


def dct_matrix(size: int) -> torch.Tensor:
    """Orthonormal DCT-II matrix C, (size, size) float64, row r the r-th frequency, as scipy.fft.dct(norm="ortho")."""
    n = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * n[:, None] * (n + 0.5)) * math.sqrt(2.0 / size)
    matrix[0] /= math.sqrt(2.0)
    return matrix


def frequency_matrix(feature_dim: int, head_dim: int, direction: str, seed: int) -> torch.Tensor:
    """
    Rows that `wdcf` projects on, (feature_dim, head_dim) float32: the DCT-II matrix (`forward`) or its transpose (`inverse`);
    beyond head_dim rows, further copies whose columns have random signs, so that they span new directions.
    """
    base = dct_matrix(head_dim)
    base = base if direction == "forward" else base.T
    generator = torch.Generator().manual_seed(seed)
    blocks = [base]
    for _ in range(1, math.ceil(feature_dim / head_dim)):
        signs = torch.randint(0, 2, (head_dim,), generator=generator, dtype=torch.float64) * 2 - 1
        blocks.append(base * signs)
    return torch.cat(blocks)[:feature_dim].float()


def low_discrepancy(count: int, dim: int, seed: int) -> torch.Tensor:
    """Scrambled Sobol points strictly inside the unit cube, (count, dim) float64."""
    points = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    return points.clamp(1e-6, 1 - 1e-6)


def radii(uniform: torch.Tensor, head_dim: int, law: str) -> torch.Tensor:
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


class FeatureMap(nn.Module):
    """
    Base of all maps: `forward` takes (B, T, H, d), any float dtype, and returns positive float32 features (B, T, H, M).

    Args:
        config: a `DiJiangConfig`.
        num_heads: H, heads that get their own copy of the weights (query heads or key/value heads).
        seed: of the initial weights; equal seeds give equal weights in every head, so phi(q) and phi(k) start as one map.
    """

    # the settings of `DiJiangConfig` that a map uses
    settings = ("feature_dim", "feature_activation", "feature_pairs", "feature_seed")

    def __init__(self, config, num_heads: int, seed: int):
        super().__init__()
        self.num_heads, self.seed = num_heads, seed
        self.head_dim, self.feature_dim = config.head_dim, config.feature_dim
        self.activation, self.pairs = config.feature_activation, config.feature_pairs
        self.radial, self.direction = config.radial, config.dct_direction

    @property
    def size(self) -> int:
        """M, the number of features per head that `forward` returns."""
        return self.feature_dim * (2 if self.pairs else 1)

    def initial_values(self) -> dict[str, torch.Tensor]:
        """Start of each parameter, shaped as one head's; buffers are named here too."""
        return {}

    def add_parameters(self, **shapes: tuple[int, ...]) -> None:
        """Register one float32 parameter per name, (num_heads, *shape)."""
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(self.num_heads, *shape, dtype=torch.float32)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill parameters and buffers from the seed; parameters already loaded from a checkpoint are left as they are."""
        with torch.device("cpu"):
            values = self.initial_values()
        for name, value in values.items():
            target = getattr(self, name)
            if isinstance(target, nn.Parameter):
                init.copy_(target, value.to(target.dtype).expand_as(target))
            else:
                target.copy_(value)

    @torch.no_grad()
    def center(self, mean: torch.Tensor) -> None:
        """
        Start the weights log_D so that the map acts on x - mean, mean (H, d). A no-op for maps without such weights, which
        must learn it.
        """
        if "log_D" in self._parameters:
            z = self.exponents(mean[None, None])[0, 0]
            self.log_D.copy_(torch.cat((-z, z), dim=-1) if self.pairs else -z)

    def exponential(self, z: torch.Tensor, log_weights: torch.Tensor | None = None) -> torch.Tensor:
        """
        Turn exponents z (B, T, H, m) and log-weights (H, M) into features (B, T, H, M): exp(z) as in the paper, or its
        softmax over one row's features. Pairing appends -z, which makes the kernel even and lowers its variance.
        """
        z = torch.cat((z, -z), dim=-1) if self.pairs else z
        if log_weights is not None:
            z = z + log_weights.float()
        if self.activation == "softmax":
            return z.softmax(dim=-1)
        return z.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp() * z.shape[-1] ** -0.5


class WDCF(FeatureMap):
    """
    Weighted discrete cosine features, phi(x) = D * exp(T C x) (equation 12): C the DCT matrix, T (H, m) radii, D = exp(log_D)
    (H, M) weights, kept positive by their logarithm. Input (B, T, H, d), output (B, T, H, M).
    """

    settings = (*FeatureMap.settings, "radial", "dct_direction")

    def __init__(self, config, num_heads: int, seed: int):
        super().__init__(config, num_heads, seed)
        self.add_parameters(T=(self.feature_dim,), log_D=(self.size,))
        self.register_buffer("C", torch.empty(self.feature_dim, self.head_dim, dtype=torch.float32), persistent=False)

    def initial_values(self) -> dict[str, torch.Tensor]:
        uniform = low_discrepancy(self.feature_dim, 1, self.seed)[:, 0]
        return {
            "T": radii(uniform, self.head_dim, self.radial),
            "log_D": torch.zeros(self.size),
            "C": frequency_matrix(self.feature_dim, self.head_dim, self.direction, self.seed),
        }

    def _apply(self, fn, recurse=True):
        kept = self.C  # a cosine table rounded to half precision would be another map
        super()._apply(fn, recurse)
        if self.C.dtype != torch.float32 and kept.device.type != "meta":
            self.C = kept.to(self.C.device)
        return self

    def exponents(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), self.C) * self.T.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.exponential(self.exponents(x))


class WPFF(PFF):
    """Weighted positive fixed features, phi(x) = D * exp(T V x) (equation 10), D = exp(log_D) (H, M). Shapes as `PFF`."""

    def __init__(self, config, num_heads: int, seed: int):
        super().__init__(config, num_heads, seed)
        self.add_parameters(log_D=(self.size,))

    def initial_values(self) -> dict[str, torch.Tensor]:
        return super().initial_values() | {"log_D": torch.zeros(self.size)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.exponential(torch.einsum("bthd,hmd->bthm", x.float(), self.W.float()))


class ELU(FeatureMap):
    """phi(x) = 1 + elu(x) (arXiv 2006.16236), without weights: M = d. Input and output (B, T, H, d)."""

    settings = ()

    @property
    def size(self) -> int:
        return self.head_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.0 + F.elu(x.float())


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "wdcf": WDCF,
    "wpff": WPFF,
    "pff": PFF,
    "prf": PRF,
    "hedgehog": Hedgehog,
    "elu": ELU,
}


def build_feature_map(config, num_heads: int, seed: int) -> FeatureMap:
    """The map that `config.feature_map` names, with its initial weights. Args as `FeatureMap`."""
    feature_map = FEATURE_MAPS[config.feature_map](config, num_heads, seed)
    feature_map.reset_parameters()
    return feature_map
