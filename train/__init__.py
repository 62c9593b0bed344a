"""Recovery of a converted model's quality from its teacher."""

from .recipe.load import load_recipe
from .recipe.schema import AlignConfig, ConvertConfig, DataConfig, DistillConfig, Recipe, RunConfig, SourceConfig

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
]


def __getattr__(name: str):
    if name in ("recover", "run_stage"):  # they import transformers' Trainer, which needs more packages than the rest
        from .stages.run import recover, run_stage

        globals().update(recover=recover, run_stage=run_stage)
        return globals()[name]
    raise AttributeError(f"module 'dijiang.train' has no attribute {name!r}")
