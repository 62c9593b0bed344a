"""DiJiang: linear attention for pretrained transformers.

    checkpoint = dijiang.convert_model("HuggingFaceTB/SmolLM2-135M", "smollm2-dijiang")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)

Each public name is imported from its room when it is first used, so that `import dijiang` is quick and needs no torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dijiang import _register

try:
    __version__ = version("dijiang")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_ROOM_OF = {
    "DiJiangConfig": "modeling",
    "DiJiangModel": "modeling",
    "DiJiangForCausalLM": "modeling",
    "DiJiangForSequenceClassification": "modeling",
    "linear_attention": "modeling",
    "convert_model": "convert",
    "refresh_code": "convert",
    "load_recipe": "train",
    "recover": "train",
    "run_stage": "train",
    "EvaluationConfig": "evaluate",
    "evaluate_model": "evaluate",
    "perplexity": "evaluate",
    "PruneConfig": "compress",
    "prune": "compress",
}

__all__ = ["__version__", *_ROOM_OF]


def __getattr__(name: str) -> Any:
    if name in _ROOM_OF:
        value = getattr(import_module(f"dijiang.{_ROOM_OF[name]}"), name)
    elif name in _ROOM_OF.values():
        value = import_module(f"dijiang.{name}")
    else:
        raise AttributeError(f"module 'dijiang' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_register.install()
