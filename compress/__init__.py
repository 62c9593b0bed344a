"""
Makes weights sparse: one-shot pruning of any Hugging Face decoder, DiJiang models included.

Each public name is imported from its module when it is used, so that the settings can be read without torch.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "PruneConfig": "oneshot.config",
    "plan": "oneshot.run",
    "prune": "oneshot.run",
    "read_bitmask": "bitmask",
    "write_bitmask": "bitmask",
}

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
