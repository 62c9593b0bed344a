"""
Makes weights sparse: one-shot pruning of any Hugging Face decoder, DiJiang models included.

Each public name is imported from its module when it is used, so that the settings can be read without torch.
"""

from dijiang.common.lazy import lazy_names

_MODULE_OF = {
    "PruneConfig": ".oneshot.config",
    "plan": ".oneshot.run",
    "prune": ".oneshot.run",
    "read_bitmask": ".bitmask",
    "write_bitmask": ".bitmask",
}

__all__ = [*_MODULE_OF]

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
