"""Makes weights sparse: one-shot pruning of any Hugging Face decoder, DiJiang models included."""

from .bitmask import read_bitmask, write_bitmask
from .oneshot.config import PruneConfig
from .oneshot.run import plan, prune

__all__ = ["PruneConfig", "plan", "prune", "read_bitmask", "write_bitmask"]
