"""
The same model with other memories: kept heads, slots of the exact memory, window and sinks. Weights stay; what linear layers
add is kept for heads that stay linear, dropped for heads that keep every token now, and fresh where there was none.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dijiang.checkpoint.files import copy_companions
from dijiang.checkpoint.shard_writer import ShardWriter
from dijiang.common.errors import one_line
from dijiang.modeling import DiJiangConfig, DiJiangForCausalLM
from dijiang.modeling.linear_attention_layer import ADDED_PARTS, OUTPUT_PARTS

from .loader import fill_rotary
from .mapping import build_on_meta, fill_new_modules, is_finite, new_modules


def with_memories(model: DiJiangForCausalLM, **settings: Any) -> DiJiangForCausalLM:
    """
    A model that shares the weights of `model`, in memory, under other settings of its linear layers.

    Args:
        model: softmax model in our decoder, or a DiJiang model.
        settings: `full_heads`, `attention_memory`, `memory_score`, `attention_window`, ... and `layer_types`, as in
            `DiJiangConfig`; those that are not named stay.

    Raises:
        ValueError: on settings that contradict one another.
    """
    old = model.config
    if isinstance(settings.get("layer_types"), str):
        settings["layer_types"] = [settings["layer_types"]] * old.num_hidden_layers
    try:
        config = DiJiangConfig.from_dict(old.to_dict() | settings)
    except Exception as error:  # huggingface_hub's strict dataclasses wrap our errors
        raise ValueError(one_line(error.__cause__ or error)) from None
    config._attn_implementation = old._attn_implementation
    config.dtype = old.dtype
    new = build_on_meta(config)
    fill_new_modules(new)
    added = new_modules(new)
    stored = dict(model.named_parameters())
    for name, target in list(new.named_parameters()):
        is_added = any(name.startswith(f"{module}.") for module in added)
        value: Tensor | None = stored.get(name)
        if is_added and value is not None:
            value = rows_of_linear_heads(name, value, target, old, config)
        if value is None:
            assert is_added, name
            continue
        module, _, leaf = name.rpartition(".")
        setattr(new.get_submodule(module), leaf, torch.nn.Parameter(value.detach(), requires_grad=False))
    fill_rotary(new)
    new.tie_weights()
    new.generation_config = model.generation_config
    return new.eval()


def rows_of_linear_heads(name: str, value: Tensor, fresh: Tensor, old: DiJiangConfig, new: DiJiangConfig) -> Tensor | None:
    """
    A parameter of `old` for the heads that are linear in `new`: its own rows, those of `fresh` for heads that were not linear
    before; None if it has other sizes, as with another feature map.
    """
    layer = int(name.split(".layers.")[1].split(".")[0])
    part = name.split(".self_attn.")[1].split(".")[0]
    if part not in ADDED_PARTS or old.linear_heads(layer) == new.linear_heads(layer):
        return value if value.shape == fresh.shape else None
    if value.shape[1:] != fresh.shape[1:]:
        return None
    before, after = old.linear_heads(layer), new.linear_heads(layer)
    rows = fresh.detach().clone()
    repeats = fresh.shape[0] // len(after)
    for i, head in enumerate(after):
        if head in before:
            j = before.index(head)
            rows[i * repeats : (i + 1) * repeats] = value[j * repeats : (j + 1) * repeats]
    return rows


def write_with_memories(checkpoint: Path, folder: Path, model: DiJiangForCausalLM) -> None:
    """
    Write `model`, made by `with_memories` from the DiJiang checkpoint `checkpoint`, into `folder`: the stored tensors keep
    their bits, those that changed come from `model`, added ones are float32; with the config and all companion files but the
    model card. One shard is in memory at a time.

    Raises:
        ValueError: if a new parameter is not finite.
    """
    copy_companions(checkpoint, folder, leave_out=("config.json", "README.md"))
    values = dict(model.named_parameters())
    of_memories = {name for name in values if any(name.startswith(f"{module}.") for module in new_modules(model))}
    writer = ShardWriter(folder)
    written = set()
    for path in sorted(checkpoint.glob("*.safetensors")):
        writer.cut()
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                stored = file.get_tensor(name)
                if name in of_memories:
                    stored = values[name].detach().to(stored.dtype)
                elif is_of_linear_layer(name):
                    continue  # of a head that keeps every token now
                writer.add(name, stored)
                written.add(name)
    for name in sorted(of_memories - written):
        writer.add(name, values[name].detach().float())
    for name in of_memories:
        if not is_finite(values[name]):
            raise ValueError(f"{name} is not finite; fit it again with other text")
    writer.finish()
    model.config.save_pretrained(folder)


def is_of_linear_layer(name: str) -> bool:
    """Whether a parameter belongs to a part that only linear layers have."""
    parts = name.split(".")
    return "self_attn" in parts and parts[parts.index("self_attn") + 1] in ADDED_PARTS + OUTPUT_PARTS
