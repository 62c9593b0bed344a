"""All feature maps: importing this file registers them. A map in a file of its own needs its line among these imports."""

from .configuration_dijiang import FEATURE_MAPS, DiJiangConfig, check_feature_map
from .exponential_maps import ExponentialMap  # noqa: F401
from .feature_map_base import FeatureMap
from .simple_maps import Identity  # noqa: F401


def build_feature_map(config: DiJiangConfig, num_heads: int, seed: int) -> FeatureMap:
    """The map that `config.feature_map` names, with its initial weights. Args as `FeatureMap`."""
    check_feature_map(config)
    feature_map = FEATURE_MAPS[config.feature_map](config, num_heads, seed)
    feature_map.reset_parameters()
    return feature_map
