"""Groups of a student's parameters, and the choice of those that train in the distill stage."""

from functools import partial

import torch

from dijiang.modeling import DiJiangForCausalLM
from dijiang.modeling.linear_attention_layer import ADDED_PARTS, OUTPUT_PARTS, linear_layers

from ..recipe.schema import SHRINKS_KEPT_HEADS, DistillConfig
from .adapters import add_adapters

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MATRICES = ("gate_proj", "up_proj", "down_proj")
EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")


def added_parameters(model: DiJiangForCausalLM, *, scores: bool = False) -> dict[str, torch.nn.Parameter]:
    """
    The parameters to train that conversion added to the linear layers' attention, by name; without OUTPUT_PARTS. The scores of
    the exact memory, which only a soft gate lets train, are left out unless `scores`.
    """
    parameters = {}
    for i, attention in linear_layers(model).items():
        for part in ADDED_PARTS:
            # requires_grad cannot tell: loading sets it on fixed parts, too
            if part == "decay" and attention.config.decay != "learned":
                continue
            if part.startswith("feature_map") and not attention.config.learn_features:
                continue
            if part == "memory_score" and not scores:
                continue
            if (module := getattr(attention, part)) is not None:
                prefix = f"model.layers.{i}.self_attn.{part}"
                parameters |= {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}
    return parameters


def select_trained(student: DiJiangForCausalLM, config: DistillConfig, dtype: torch.dtype = torch.float32) -> None:
    """
    Choose by config.trains which parameters of `student` train, and make them float32. The frozen ones become `dtype`, except
    those that conversion added, which are float32 always; of the latter all train that are not fixed. With config.lora_rank
    adapters are added.

    Raises:
        ValueError: if nothing is left to train.
    """
    weights = source_weights(student, config)
    if config.lora_rank:
        matrices = tuple(f".{part}.weight" for part in PROJECTIONS + MLP_MATRICES)
        modules = [name.removesuffix(".weight") for name in weights if name.endswith(matrices)]
        weights = [name for name in weights if name.endswith(EMBEDDINGS)]
        if modules:
            alpha = 2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
            add_adapters(student, modules, config.lora_rank, alpha, config.seed)
    output_parts = [name for name, _ in student.named_parameters() if belongs_to(name, OUTPUT_PARTS)]
    trained = {*weights, *added_parameters(student, scores=config.memory_temperature is not None), *output_parts}
    for name, parameter in student.named_parameters():
        adapter = config.lora_rank and ".lora_" in name
        parameter.requires_grad_(adapter or name in trained)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        elif not (belongs_to(name, ADDED_PARTS) or ".base_layer." in name):  # adapters are merged with base layers as stored
            parameter.data = parameter.data.to(dtype)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(
            f"trains={config.trains} leaves nothing to train: the model has no linear-attention layer with parameters of that "
            "kind; choose trains=all"
        )
    if not config.train_kept_heads:
        freeze_kept_heads(student, config)


def freeze_kept_heads(student: DiJiangForCausalLM, config: DistillConfig) -> None:
    """
    Keep queries and keys of heads that keep every token as they are: their rows get no gradients.

    Raises:
        ValueError: if weight decay would change them all the same.
    """
    for layer, full_heads in zip(student.model.layers, student.config.full_heads, strict=True):
        if not full_heads:
            continue
        attention = layer.self_attn
        for module, repeats in ((attention.q_proj, attention.num_key_value_groups), (attention.k_proj, 1)):
            heads = torch.ones(attention.num_key_value_heads, repeats * attention.head_dim)
            heads[full_heads] = 0.0
            rows = heads.flatten()
            for name, parameter in module.named_parameters():
                if not parameter.requires_grad or ".lora_A." in f".{name}":  # the other half of an adapter has the rows
                    continue
                if config.weight_decay and not config.lora_rank:
                    raise ValueError(f"weight_decay={config.weight_decay} {SHRINKS_KEPT_HEADS}")
                parameter.register_hook(partial(times_rows, rows))


def times_rows(rows: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient * rows.to(gradient).view(-1, *(1,) * (gradient.dim() - 1))


def source_weights(student: DiJiangForCausalLM, config: DistillConfig) -> list[str]:
    """Names of the source model's own parameters that config.trains covers."""
    if config.trains == "kernel":
        return []
    names = [name for name, _ in student.named_parameters() if not belongs_to(name, ADDED_PARTS)]
    if config.trains == "attention":
        prefixes = tuple(f"model.layers.{i}.self_attn.{part}." for i in linear_layers(student) for part in PROJECTIONS)
        return [name for name in names if name.startswith(prefixes)]
    return [name for name in names if config.train_embeddings or not name.endswith(EMBEDDINGS)]


def belongs_to(name: str, parts: tuple[str, ...]) -> bool:
    """Return whether a parameter belongs to one of these parts of an attention layer, by its name."""
    return any(f".self_attn.{part}." in name for part in parts)
