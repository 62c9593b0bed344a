"""
The base of all feature maps, and their registration. A map's features phi: R^d -> R^M are such that phi(q).phi(k) approximates
exp(q.k) (DiJiang, arXiv 2403.19928, section 3), or q.k itself. A new map is a class under `@register_feature_map`.

B batch, T tokens, H heads, d head size, m features, M features after pairing (2m if `pairs`, else m).
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_dijiang import FEATURE_MAPS, DiJiangConfig

# bound of the exponents of phi(q), phi(k) and of a key's weight, so that the product of all three, summed over millions of
# tokens, is finite in float32
MAX_EXPONENT = 20.0


Map = TypeVar("Map", bound="type[FeatureMap]")


def register_feature_map(name: str) -> Callable[[Map], Map]:
    """Make the decorated class the one that `feature_map: name` in a config selects."""

    def register(feature_map: Map) -> Map:
        FEATURE_MAPS[name] = feature_map
        return feature_map

    return register


class FeatureMap(nn.Module):
    """
    Base of all maps: `forward(x, positions=None, scale=1.0)` takes x (B, T, H, d), any float dtype, and returns the float32
    features (B, T, H, M) of scale * x. All weights are parameters, one set per head, drawn from a seed and stored in the
    checkpoint.

    Args:
        config: a `DiJiangConfig`.
        num_heads: H, heads that get their own copy of the weights (query heads or key/value heads).
        seed: seed of the initial weights. Equal seeds give equal weights in every head, so that phi(q) and phi(k) start equal.
    """

    # the settings of `DiJiangConfig` that the map uses
    settings: tuple[str, ...] = ("feature_dim", "feature_activation", "feature_pairs", "feature_seed", "learn_features")
    # whether `forward` needs positions (B, T) or, by head, (B, T, H), integers: how many real tokens came before each token
    needs_positions = False
    # whether no feature is ever negative; other maps are for layers that do not divide by the sum of the weights
    positive = True

    def __init__(self, config: DiJiangConfig, num_heads: int, seed: int):
        super().__init__()
        self.num_heads = num_heads
        self.seed = seed
        self.head_dim = config.head_dim
        self.feature_dim = config.feature_dim
        self.activation = config.feature_activation
        self.pairs = config.feature_pairs
        self.radial = config.radial
        self.direction = config.dct_direction
        self.learned = config.learn_features

    @property
    def size(self) -> int:
        """M, the number of features per head that `forward` returns."""
        return self.feature_dim * (2 if self.pairs else 1)

    def initial_values(self) -> dict[str, Tensor]:
        """Initial values by name: of parameters in the shape of one head, and of buffers."""
        return {}

    def add_parameters(self, **shapes: tuple[int, ...]) -> None:
        """Register one float32 parameter per name, (num_heads, *shape)."""
        for name, shape in shapes.items():
            value = torch.empty(self.num_heads, *shape, dtype=torch.float32)
            self.register_parameter(name, nn.Parameter(value, requires_grad=self.learned))

    def weight(self, name: str) -> Tensor:
        """A parameter as `forward` uses it: detached if it does not train, since loading sets requires_grad on all of them."""
        return getattr(self, name) if self.learned else getattr(self, name).detach()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill parameters and buffers from the seed, but for parameters that a checkpoint has filled."""
        with torch.device("cpu"):
            values = self.initial_values()
        for name, value in values.items():
            target = getattr(self, name)
            if isinstance(target, nn.Parameter):
                init.copy_(target, value.to(target.dtype).expand_as(target))
            else:
                target.copy_(value)

    def center(self, mean: Tensor) -> None:
        """
        Set the weights log_D so that the map acts on x - mean, mean (H, d). Without effect on maps that have no such weights
        and must learn to do so.
        """

    def project(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """matrix_h (scale x_h) + bias_h for every head h: matrix (H, m, d), bias (H, m), result (B, T, H, m)."""
        matrix = matrix.float() if scale == 1.0 else matrix.float() * scale
        z = torch.bmm(x.float().flatten(0, 1).transpose(0, 1), matrix.transpose(1, 2))
        z = z if bias is None else z.add_(bias.float().unsqueeze(1))
        # the heads stay outermost in memory, where linear attention reads them fastest
        return z.unflatten(1, x.shape[:2]).permute(1, 2, 0, 3)
