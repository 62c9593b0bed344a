"""Turns pretrained softmax checkpoints into DiJiang checkpoints."""

from dijiang.checkpoint.code_files import before_refreshing, refresh_code, with_newest_code
from dijiang.checkpoint.lineage import refuse_other_source
from dijiang.checkpoint.provenance import add_stage, public_name, read_provenance, write_provenance
from dijiang.common.device import fastest_dtype
from dijiang.common.outputs import new_folder

from .converter import convert_model
from .layer_settings import parse_overrides
from .loader import load_source
from .presets import PRESETS

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
