"""LLaMA-type sources (LLaMA, TinyLlama, SmolLM2, Mistral): our decoder uses their names, so tensors stay as they are."""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PretrainedConfig

from dijiang.modeling import DiJiangConfig

# tables that old releases stored; every release computes them itself
IGNORED = (".rotary_emb.inv_freq",)


def config_arguments(source: PretrainedConfig) -> dict[str, Any]:
    """Arguments of `DiJiangConfig` for the transformers config `source`."""
    return {
        "num_key_value_heads": source.num_key_value_heads,
        "head_dim": source.head_dim,
        "mlp_type": "gated",
        "mlp_bias": getattr(source, "mlp_bias", False),
        "norm_type": "rms_norm",
        "norm_eps": source.rms_norm_eps,
        "parallel_residual": False,
        "attention_bias": getattr(source, "attention_bias", False),
        # only Mistral has one
        "sliding_window": getattr(source, "sliding_window", None) if source.model_type == "mistral" else None,
    }


def map_tensor(name: str, tensor: torch.Tensor, config: DiJiangConfig) -> Iterable[tuple[str, torch.Tensor]]:
    """Our names and tensors for one of the source's; none for a tensor that is not needed."""
    if not name.endswith(IGNORED):
        yield name, tensor
