"""Memory of one sequence for each variant of an evaluation: bytes that every token adds, and bytes at given lengths."""

from collections.abc import Sequence

import torch

from dijiang.convert.families import dijiang_config
from dijiang.convert.mapping import build_on_meta
from dijiang.modeling import DiJiangConfig
from dijiang.modeling.linear_attention_layer import linear_layers
from dijiang.modeling.linear_state import LinearState

from .variants import Comparison

REFERENCE_LENGTH = 4096  # tokens of the sequence that every result names the bytes of
WITHOUT = {  # settings of a model without the part that an ablation takes away
    "no_memory": {"attention_memory": 0},
    "linear_only": {"attention_window": 0, "attention_sinks": 0, "attention_memory": 0},
}


def memory_facts(comparison: Comparison, lengths: Sequence[int]) -> dict:
    """
    Memory of all variants, as a result holds it.

    Args:
        comparison: the models.
        lengths: tokens of sequences, `REFERENCE_LENGTH` besides.

    Returns:
        `dtype` of keys and values, the student's stored one, since it decides what users need; and `variants`: by key what
        `memory_use` returns. An ablation counts what a model built without that part would hold.
    """
    dtype = comparison.student.config.dtype or comparison.dtype
    lengths = sorted({*lengths, REFERENCE_LENGTH})
    configs = {key: config_of(source.config) for key, source in comparison.sources.items()}
    configs["window_sinks"] = config_of(comparison.teacher.config, comparison.window_sinks_settings())
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "variants": {
            variant.key: memory_use(configs[variant.model], lengths, dtype, None if variant.key in configs else variant.key)
            for variant in comparison.variants()
            if variant.left_out is None
        },
    }


def config_of(config, settings: dict | None = None) -> DiJiangConfig:
    """The config of a model in our decoder, that of a softmax model with `settings` on top."""
    return config if config.model_type == "dijiang" else dijiang_config(config, settings or {})


def memory_use(config: DiJiangConfig, lengths: Sequence[int], dtype: torch.dtype, ablation: str | None = None) -> dict:
    """
    Memory of one sequence.

    Args:
        config: of the model.
        lengths: tokens of sequences.
        dtype: of keys and values; sums of the linear branch are float32.
        ablation: key of the ablation that the model is under.

    Returns:
        `bytes_per_token`, what every token adds however long the sequence is, `bytes_per_sequence` by length, and `constant`,
        whether no token adds anything.
    """
    size = dtype.itemsize
    if ablation in WITHOUT:
        config = changed(config, **WITHOUT[ablation])

    def of_sequence(tokens: int) -> int:
        if ablation == "no_attention":
            return softmax_bytes(config, tokens, size)
        total = declared_bytes(config, tokens, dtype)
        if ablation == "window_only":
            without_window = changed(config, **WITHOUT["linear_only"])
            total -= declared_bytes(without_window, tokens, dtype) - softmax_bytes(config, tokens, size, kept_heads=True)
        return total

    far = max(*lengths, 0, config.sliding_window or 0) + 1  # where sliding layers hold all that they ever do
    per_token = of_sequence(far + 1) - of_sequence(far)
    return {
        "bytes_per_token": per_token,
        "bytes_per_sequence": {str(length): of_sequence(length) for length in lengths},
        "constant": per_token == 0,
    }


def changed(config: DiJiangConfig, **settings) -> DiJiangConfig:
    """A copy of `config` with other settings."""
    return DiJiangConfig(**config.to_diff_dict() | settings)


def softmax_bytes(config: DiJiangConfig, tokens: int, element_size: int, *, kept_heads: bool = False) -> int:
    """Keys and values of the softmax layers and, with `kept_heads`, of the heads of linear layers that keep every token."""
    row = 2 * config.head_dim * element_size
    held = {
        "full_attention": config.num_key_value_heads * tokens,
        "sliding_attention": config.num_key_value_heads * min(tokens, config.sliding_window or tokens),
        "linear_attention": 0,
    }
    kept = sum(map(len, config.full_heads)) * tokens if kept_heads else 0
    return row * (sum(held[kind] for kind in config.layer_types) + kept)


def declared_bytes(config: DiJiangConfig, tokens: int, dtype: torch.dtype) -> int:
    """The sum over the layers of a model on meta."""
    total = softmax_bytes(config, tokens, dtype.itemsize, kept_heads=True)
    for layer in linear_layers(build_on_meta(config)).values():
        k = torch.empty(1, 1, len(layer.linear_heads), layer.head_dim, dtype=dtype, device="meta")
        total += sum(tensor.nbytes for tensor in LinearState.empty(k, k, layer.state_sizes).tensors())
    return total
