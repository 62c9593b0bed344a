"""Turns pretrained softmax checkpoints into DiJiang checkpoints."""

from dijiang.checkpoint.code_files import refresh_code

from .converter import convert_model
from .layer_settings import parse_overrides
from .loader import load_source
from .presets import PRESETS

__all__ = ["PRESETS", "convert_model", "load_source", "parse_overrides", "refresh_code"]
