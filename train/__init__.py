"""Recovery of a converted model's quality from its teacher."""

from dijiang.common.lazy import lazy_names

_MODULE_OF = {
    "AlignConfig": ".recipe.schema",
    "ConvertConfig": ".recipe.schema",
    "DataConfig": ".recipe.schema",
    "DistillConfig": ".recipe.schema",
    "FitConfig": ".memories.config",
    "SelectConfig": ".memories.config",
    "add_memories": ".memories.run",
    "convert_with_memories": ".memories.run",
    "Recipe": ".recipe.schema",
    "RunConfig": ".recipe.schema",
    "SourceConfig": ".recipe.schema",
    "load_recipe": ".recipe.load",
    "recover": ".stages.run",
    "run_stage": ".stages.run",
}

__all__ = [*_MODULE_OF]

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
