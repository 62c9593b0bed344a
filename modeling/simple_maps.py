"""
Feature maps without exponentials: they act on the entries of x, or of a projection of it.

B batch, T tokens, H heads, d head size, m features, M features that a map returns.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_dijiang import DiJiangConfig
from .feature_map_base import FeatureMap, register_feature_map
from .frequency import orthogonal_rows

# added to features that a ReLU can make zero, so that no denominator vanishes and its gradient stays finite
FLOOR = 1e-3


@register_feature_map("elu")
class ELU(FeatureMap):
    """phi(x) = 1 + elu(x) (arXiv 2006.16236), without weights: M = d. Input and output (B, T, H, d)."""

    settings = ()

    @property
    def size(self) -> int:
        return self.head_dim

    def forward(self, x: Tensor, positions: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return 1.0 + F.elu(x.float() * scale)


@register_feature_map("relu")
class ReLU(FeatureMap):
    """
    Learnable rectified features, phi(x) = relu(W x + b) + 1e-3 (T2R, arXiv 2103.13076, which has no constant): W (H, m, d)
    starts as unit rows, orthogonal up to d of them, b (H, m) as zero. Input (B, T, H, d), output (B, T, H, m).
    """

    settings = ("feature_dim", "feature_seed", "learn_features")

    def __init__(self, config: DiJiangConfig, num_heads: int, seed: int):
        super().__init__(config, num_heads, seed)
        self.add_parameters(W=(self.feature_dim, self.head_dim), b=(self.feature_dim,))

    @property
    def size(self) -> int:
        return self.feature_dim

    def initial_values(self) -> dict[str, Tensor]:
        return {"W": orthogonal_rows(self.feature_dim, self.head_dim, self.seed), "b": torch.zeros(self.feature_dim)}

    def forward(self, x: Tensor, positions: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return self.project(x, self.weight("W"), self.weight("b"), scale).relu() + FLOOR


@register_feature_map("cosformer")
class CosFormer(FeatureMap):
    """
    phi(x_i) = [r_i cos(a_i), r_i sin(a_i)], r_i = relu(x_i) + 1e-3, a_i = pi/2 p_i / N (cosFormer, arXiv 2202.08791, which has
    no constant): the kernel is r_i.r_j cos(pi/2 (p_i - p_j) / N). p_i is the token's position, N the config's
    max_position_embeddings; positions past N count as N, so that features are at least 0 and finite at any length. No
    weights: M = 2d. Input x (B, T, H, d) and positions (B, T) or (B, T, H), integers, output (B, T, H, 2d).
    """

    settings = ()
    needs_positions = True

    def __init__(self, config: DiJiangConfig, num_heads: int, seed: int):
        super().__init__(config, num_heads, seed)
        self.last_position = config.max_position_embeddings

    @property
    def size(self) -> int:
        return 2 * self.head_dim

    def forward(self, x: Tensor, positions: Tensor | None = None, scale: float = 1.0) -> Tensor:
        if positions is None:
            raise ValueError("the feature map cosformer needs positions (B, T), the index of each token in its sequence")
        angle = positions.clamp(0, self.last_position).float() * (math.pi / 2 / self.last_position)
        cos, sin = angle.cos().clamp_min(0.0), angle.sin()  # in float32 the cosine of pi/2 is negative
        if positions.dim() == 2:  # one for all heads
            cos, sin = cos.unsqueeze(-1), sin.unsqueeze(-1)
        r = (x.float() * scale).relu() + FLOOR
        return torch.cat((r * cos.unsqueeze(-1), r * sin.unsqueeze(-1)), dim=-1)


@register_feature_map("identity")
class Identity(FeatureMap):
    """
    phi(x) = x, without weights: plain linear attention, whose kernel is q.k (RetNet, arXiv 2307.08621, and most since). Input
    and output (B, T, H, d). Features can be negative and a sum of weights can vanish: only for layers that do not normalize.
    """

    settings = ()
    positive = False

    @property
    def size(self) -> int:
        return self.head_dim

    def forward(self, x: Tensor, positions: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return x.float() * scale
