"""Loads a source into memory as a DiJiang model that computes what the source does: the teacher."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dijiang.checkpoint.source import Source, load_tokenizer
from dijiang.checkpoint.weights import DequantizedFile, no_library_bars, open_weights
from dijiang.common.device import dtype_named
from dijiang.common.errors import one_line
from dijiang.modeling import DiJiangForCausalLM

from .families import dijiang_config, open_convertible
from .layer_settings import check_keys
from .mapping import MappedWeights, build_on_meta, fill_new_modules


def load_source(
    source: str | Path, *, dtype: torch.dtype | str = torch.float32, **config_overrides: Any
) -> tuple[DiJiangForCausalLM, PreTrainedTokenizerBase]:
    """
    Load a hub id, a folder or a GGUF file as a DiJiang model that computes what the source does: all layers keep the source's
    softmax attention unless `layer_types` says otherwise. A DiJiang checkpoint is loaded as it is.

    Args:
        source: as for `convert_model`.
        dtype: of the weights; `auto` keeps the stored one. New parameters are float32.
        config_overrides: settings of the linear layers, as for `convert_model`.

    Returns:
        The model, on the CPU and in eval mode, and its tokenizer.

    Raises:
        ValueError: whatever `convert_model` refuses, and overrides for a checkpoint that is DiJiang already.
    """
    check_keys(config_overrides)
    target_dtype = dtype_named(dtype)
    opened = open_convertible(source)
    tokenizer = load_tokenizer(opened)
    if opened.is_dijiang:
        if config_overrides:
            raise ValueError(f"{source} is a DiJiang checkpoint, so {', '.join(config_overrides)} cannot be set any more")
        return load_dijiang(opened, target_dtype), tokenizer

    config = dijiang_config(opened.config, config_overrides)
    model = build_on_meta(config)
    files = open_weights(opened)
    weights = MappedWeights(opened, files, model)
    config.dtype = target_dtype or weights.stored_dtype
    fill_new_modules(model)
    for _, name, tensor in weights.stream(target_dtype, copy=True):
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))
    fill_rotary(model)
    model.tie_weights()
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    if isinstance(files[0], DequantizedFile):
        model.generation_config = files[0].generation_config
    elif (opened.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(opened.folder)
    else:
        model.generation_config = GenerationConfig.from_model_config(config)
    return model.eval(), tokenizer


def fill_rotary(model: DiJiangForCausalLM) -> None:
    """Compute the rotary tables of a model built on meta; no checkpoint holds them."""
    model.model.rotary_emb.to_empty(device="cpu")
    with torch.no_grad():
        model._init_weights(model.model.rotary_emb)


def load_dijiang(source: Source, dtype: torch.dtype | None) -> DiJiangForCausalLM:
    """A DiJiang checkpoint as it is, or ValueError if its weights do not fit its config."""
    try:
        with no_library_bars():
            loaded: Any = DiJiangForCausalLM.from_pretrained(source.folder, dtype=dtype or "auto", output_loading_info=True)
            model, report = loaded
    except Exception as error:
        raise ValueError(f"{source.folder} cannot be loaded: {one_line(error)}") from None
    for kind in ("missing keys", "unexpected keys"):
        if names := sorted(report[kind.replace(" ", "_")]):
            raise ValueError(f"{source.folder} has {len(names)} {kind}, such as {names[0]}; convert the source again")
    return model.eval()
