"""Settings of the linear layers that a user may change on conversion, and their `KEY=VALUE` words."""

from collections.abc import Iterable
from typing import Any

from dijiang.common.errors import did_you_mean
from dijiang.common.settings import as_number, refuse_idle, split_word
from dijiang.modeling import FEATURE_MAPS, DiJiangConfig

from .families import SHARED

# settings that the source's weights decide
GIVEN_BY_SOURCE = frozenset(SHARED) | {
    "num_key_value_heads",
    "head_dim",
    "mlp_type",
    "mlp_bias",
    "norm_type",
    "norm_eps",
    "parallel_residual",
    "attention_bias",
    "rope_parameters",
}
OVERRIDABLE = tuple(name for name in DiJiangConfig.__annotations__ if name not in GIVEN_BY_SOURCE)


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """
    Read `KEY=VALUE` words, values as YAML: `["decay=retnet", "attention_window=32"]` gives `{"decay": "retnet",
    "attention_window": 32}`.

    Raises:
        ValueError: on a word without `=`, a value that is not YAML, a key given twice or one that cannot be set.
    """
    overrides: dict[str, Any] = {}
    for word in words:
        key, value = split_word(word, "attention_window=64")
        if key in overrides:
            raise ValueError(f"{key} is set twice; keep one of them")
        overrides[key] = as_number(value) if isinstance(value, str) else value
    check_keys(overrides)
    return overrides


def check_effect(overrides: dict[str, Any], config: DiJiangConfig) -> None:
    """Raise ValueError if a setting that the user gave changes nothing in a model of `config`."""
    of_maps = {key for feature_map in FEATURE_MAPS.values() for key in feature_map.settings}
    unused = dict.fromkeys(of_maps - set(FEATURE_MAPS[config.feature_map].settings), f"feature_map={config.feature_map}")
    if not config.attention_window:
        unused["branch_scale_init"] = "attention_window=0"
    if config.decay == "none":
        unused["decay_spans"] = "decay=none"
    if not any(any(config.memory_slots(layer)) for layer in range(config.num_hidden_layers)):
        unused |= dict.fromkeys(("memory_score", "memory_score_dim"), "attention_memory=0")
    elif config.memory_score != "learned":
        unused["memory_score_dim"] = f"memory_score={config.memory_score}"
    if not config.has_linear_layers:
        unused = dict.fromkeys(set(OVERRIDABLE) - {"layer_types", "sliding_window"}, "no linear layer")
    if "sliding_attention" not in (config.layer_types or ()):
        unused["sliding_window"] = "no sliding_attention layer"
    refuse_idle(overrides, unused)


def check_keys(overrides: Iterable[str]) -> None:
    """Raise ValueError on the first key that is unknown, or that the source's weights decide."""
    for key in overrides:
        if key in OVERRIDABLE:
            continue
        allowed = f"these can be set: {', '.join(OVERRIDABLE)}"
        if key in GIVEN_BY_SOURCE:
            raise ValueError(f"{key} is given by the source model and cannot be changed on conversion; {allowed}")
        raise ValueError(f"unknown setting {key!r}{did_you_mean(key, OVERRIDABLE)}; {allowed}")
