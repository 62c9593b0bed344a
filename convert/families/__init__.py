"""
Source families. A new one is a file with `config_arguments` and `map_tensor`, and a line in `FAMILIES`.

Settings that all families' configs call by the same name (sizes, RoPE, special tokens) are read here; `config_arguments` adds
the rest.
"""

from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PretrainedConfig

from dijiang.checkpoint.source import Source, open_source
from dijiang.common.errors import one_line
from dijiang.modeling import DiJiangConfig

from . import gpt_neox, llama

# by the source's model_type
FAMILIES: dict[str, ModuleType] = {
    "gpt_neox": gpt_neox,
    "llama": llama,
    "mistral": llama,
}

SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "tie_word_embeddings",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "dtype",
)


def open_convertible(name: str | Path) -> Source:
    """`open_source` for a model of a family that can be converted, or for a DiJiang checkpoint; ValueError on others."""
    return open_source(name, model_types=[*FAMILIES, "dijiang"])  # commands that take a teacher take a student too


def dijiang_config(source: PretrainedConfig, settings: dict[str, Any]) -> DiJiangConfig:
    """
    The `DiJiangConfig` of the transformers config `source`, with `settings` on top. `layer_types` may be one name for all
    layers; without it all layers attend as the source's do.

    Raises:
        ValueError: on settings that contradict one another or the source.
    """
    arguments = {key: getattr(source, key) for key in SHARED}
    arguments["rope_parameters"] = deepcopy(dict(source.rope_parameters))
    arguments |= FAMILIES[source.model_type].config_arguments(source)

    own_type = "sliding_attention" if arguments.get("sliding_window") else "full_attention"
    settings = {"layer_types": own_type} | settings
    if isinstance(settings["layer_types"], str):
        settings["layer_types"] = [settings["layer_types"]] * arguments["num_hidden_layers"]
    if own_type == "sliding_attention" and "full_attention" in (settings["layer_types"] or ()):
        raise ValueError(
            f"layer_types holds full_attention, but the source attends to its last sliding_window="
            f"{arguments['sliding_window']} tokens only; use sliding_attention"
        )
    if own_type == "sliding_attention" and any(settings.get("full_heads") or ()):
        raise ValueError(
            f"full_heads would keep every token, but the source attends to its last sliding_window="
            f"{arguments['sliding_window']} tokens only; leave them out"
        )
    try:
        config = DiJiangConfig(**(arguments | settings))
    except Exception as error:  # huggingface_hub's strict dataclasses wrap our errors
        raise ValueError(one_line(error.__cause__ or error)) from None
    config.architectures = ["DiJiangForCausalLM"]
    return config
