"""Makes weights sparse: one-shot pruning of any Hugging Face decoder, DiJiang models included."""

from .bitmask import read_bitmask, write_bitmask
from .prune_config import PruneConfig
from .pruning import plan, prune

__all__ = ["PruneConfig", "plan", "prune", "read_bitmask", "write_bitmask"]
