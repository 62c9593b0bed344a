"""Recovers a converted model's quality from its teacher."""

from .align import AlignConfig, align
from .data import token_blocks
from .recipe import load_recipe

__all__ = ["AlignConfig", "align", "load_recipe", "token_blocks"]
