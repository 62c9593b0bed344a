"""The groups of a student's parameters: those that conversion added, projections, other matrices, embeddings."""

import torch

from dijiang.modeling import DiJiangForCausalLM
from dijiang.modeling.linear_attention_layer import linear_layers

from ..recipe.schema import DistillConfig

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MATRICES = ("gate_proj", "up_proj", "down_proj")
EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")
ADDED_PARTS = ("feature_map_q", "feature_map_k", "branch_scale", "key_scale", "decay")  # of a layer's attention, by conversion
OUTPUT_PARTS = ("output_norm", "output_gate")  # added after its attention


def added_parameters(model: DiJiangForCausalLM) -> dict[str, torch.nn.Parameter]:
    """The parameters to train that conversion added to the linear layers' attention, by name; without OUTPUT_PARTS."""
    parameters = {}
    for i, attention in linear_layers(model).items():
        for part in ADDED_PARTS:
            # requires_grad cannot tell: loading sets it on fixed parts, too
            if part == "decay" and attention.config.decay != "learned":
                continue
            if part.startswith("feature_map") and not attention.config.learn_features:
                continue
            if (module := getattr(attention, part)) is not None:
                prefix = f"model.layers.{i}.self_attn.{part}"
                parameters |= {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}
    return parameters


def output_parameter_names(student: DiJiangForCausalLM) -> list[str]:
    """Names of the parameters of OUTPUT_PARTS."""
    return [name for name, _ in student.named_parameters() if belongs_to(name, OUTPUT_PARTS)]


def source_weight_names(student: DiJiangForCausalLM, config: DistillConfig) -> list[str]:
    """Names of the source model's own parameters that config.trains covers."""
    if config.trains == "kernel":
        return []
    names = [name for name, _ in student.named_parameters() if not belongs_to(name, ADDED_PARTS)]
    if config.trains == "attention":
        prefixes = tuple(f"model.layers.{i}.self_attn.{part}." for i in linear_layers(student) for part in PROJECTIONS)
        return [name for name in names if name.startswith(prefixes)]
    return [name for name in names if config.train_embeddings or not name.endswith(EMBEDDINGS)]


def belongs_to(name: str, parts: tuple[str, ...]) -> bool:
    """Whether a parameter's name is that of one of these parts of an attention layer."""
    return any(f".self_attn.{part}." in name for part in parts)
