"""DiJiang: linear attention for pretrained transformers.

    checkpoint = dijiang.convert_model("HuggingFaceTB/SmolLM2-135M", "smollm2-dijiang")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)

Each public name is imported from its room when it is first used, so that `import dijiang` is quick and needs no torch.
"""

from importlib.metadata import PackageNotFoundError, version

from dijiang import _register
from dijiang.common.lazy import lazy_names

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
    "add_memories": "train",
    "convert_with_memories": "train",
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

__getattr__, __dir__ = lazy_names(
    __name__,
    {name: f".{room}" for name, room in _ROOM_OF.items()},
    submodules=set(_ROOM_OF.values()),
)

_register.install()
