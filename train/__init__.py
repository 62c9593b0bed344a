"""Recovers a converted model's quality from its teacher."""

from .config import AlignConfig, ConvertConfig, DataConfig, DistillConfig, Recipe, RunConfig, SourceConfig
from .data import token_blocks
from .recipe import load_recipe
from .stages import recover, run_stage

__all__ = [
    "AlignConfig",
    "ConvertConfig",
    "DataConfig",
    "DistillConfig",
    "Recipe",
    "RunConfig",
    "SourceConfig",
    "load_recipe",
    "recover",
    "run_stage",
    "token_blocks",
]
