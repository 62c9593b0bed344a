"""
The registry of feature maps. A new map is one class in a file of its own or beside its kin, its line in `FEATURE_MAPS` and
its name in `CHOICES` of `configuration_dijiang.py`.
"""

from .exponential_maps import LDCF, PFF, PRF, WDCF, WPFF, Hedgehog
from .feature_map_base import FeatureMap
from .simple_maps import ELU, CosFormer, Identity, ReLU

FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "wdcf": WDCF,
    "ldcf": LDCF,
    "wpff": WPFF,
    "pff": PFF,
    "prf": PRF,
    "hedgehog": Hedgehog,
    "elu": ELU,
    "relu": ReLU,
    "cosformer": CosFormer,
    "identity": Identity,
}


def build_feature_map(config, num_heads: int, seed: int) -> FeatureMap:
    """The map that `config.feature_map` names, with its initial weights. Args as `FeatureMap`."""
    feature_map = FEATURE_MAPS[config.feature_map](config, num_heads, seed)
    feature_map.reset_parameters()
    return feature_map
