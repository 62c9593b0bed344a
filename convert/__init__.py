"""Turns pretrained softmax checkpoints into DiJiang checkpoints."""

from .code_files import before_refreshing, refresh_code, with_newest_code
from .converter import convert_model
from .folders import new_folder
from .lineage import refuse_other_source
from .loader import load_source
from .overrides import parse_overrides
from .precision import fastest_dtype
from .presets import PRESETS
from .provenance import add_stage, public_name, read_provenance, write_provenance

__all__ = [
    "PRESETS",
    "add_stage",
    "before_refreshing",
    "convert_model",
    "fastest_dtype",
    "load_source",
    "new_folder",
    "parse_overrides",
    "public_name",
    "read_provenance",
    "refresh_code",
    "refuse_other_source",
    "with_newest_code",
    "write_provenance",
]
