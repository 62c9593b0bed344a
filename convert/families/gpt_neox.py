"""GPT-NeoX sources (Pythia): LayerNorm, parallel residual, partial rotary, and query, key and value in one matrix."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PretrainedConfig

from dijiang.modeling import DiJiangConfig

# causal masks and tables that old releases stored; every release computes them itself
IGNORED = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
OUTSIDE_LAYERS = {
    "gpt_neox.embed_in.weight": "model.embed_tokens.weight",
    "gpt_neox.final_layer_norm.weight": "model.norm.weight",
    "gpt_neox.final_layer_norm.bias": "model.norm.bias",
    "embed_out.weight": "lm_head.weight",  # its name up to transformers 5.16, and in all older files
}
INSIDE_LAYERS = {
    "attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
}


def config_arguments(source: PretrainedConfig) -> dict[str, Any]:
    """Arguments of `DiJiangConfig` for the transformers config `source`."""
    return {
        "mlp_type": "plain",
        "mlp_bias": True,
        "norm_type": "layer_norm",
        "norm_eps": source.layer_norm_eps,
        "parallel_residual": source.use_parallel_residual,
        "attention_bias": source.attention_bias,
    }


def map_tensor(name: str, tensor: torch.Tensor, config: DiJiangConfig) -> Iterable[tuple[str, torch.Tensor]]:
    """Our names and tensors for one of the source's; none for a tensor that is not needed."""
    if name.endswith(IGNORED):
        return
    match = re.fullmatch(r"gpt_neox\.(layers\.\d+)\.(.+)\.(weight|bias)", name)
    if not match:
        yield OUTSIDE_LAYERS.get(name, name), tensor
        return
    layer, part, kind = match.groups()
    if part == "attention.query_key_value":
        # rows are ordered (head, q | k | v, head size)
        assert config.head_dim is not None
        split = tensor.view(config.num_attention_heads, 3, config.head_dim, *tensor.shape[1:])
        for index, letter in enumerate("qkv"):
            own = split[:, index].clone(memory_format=torch.contiguous_format)
            yield f"model.{layer}.self_attn.{letter}_proj.{kind}", own.flatten(0, 1)
    elif part in INSIDE_LAYERS:
        yield f"model.{layer}.{INSIDE_LAYERS[part]}.{kind}", tensor
    else:
        yield name, tensor
