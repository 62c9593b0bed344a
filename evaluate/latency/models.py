"""The two models that the latency benchmark compares: transformers' own class of a softmax model, and a DiJiang model."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dijiang.checkpoint.lineage import SAME_IN_TEACHER
from dijiang.checkpoint.provenance import public_name
from dijiang.checkpoint.shapes import shape_config
from dijiang.checkpoint.source import Source
from dijiang.checkpoint.weights import no_library_bars
from dijiang.common.device import placement
from dijiang.common.errors import one_line, unknown
from dijiang.common.memory import available_bytes
from dijiang.convert import PRESETS
from dijiang.convert.families import dijiang_config, open_convertible
from dijiang.convert.layer_settings import check_effect, check_keys
from dijiang.convert.loader import load_dijiang
from dijiang.convert.mapping import build_on_meta
from dijiang.modeling import DiJiangConfig, DiJiangForCausalLM

from ..quality.variants import file_hashes
from .config import LatencyConfig

try:  # releases that have it keep the weights quantized where they find a kernel for them
    from transformers.utils.quantization_config import GgufConfig
except ImportError:
    GgufConfig = None

SPARE_BYTES = 2 << 30  # what libraries, the rest of a step and the copy that times the machine take at most


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyPair:
    """
    Two models of one size, in eval mode, on one device and in one dtype; added parameters stay float32.

    Attributes:
        name: of the shape or of the checkpoint.
        shape: short name of the shape where the weights are random, else None.
        softmax: the softmax model in transformers' own class.
        dijiang: the DiJiang model.
        facts: description of the pair in a result.
    """

    name: str
    shape: str | None
    softmax: PreTrainedModel
    dijiang: DiJiangForCausalLM
    facts: dict


def shape_pair(config: LatencyConfig) -> LatencyPair:
    """
    Random weights, on which no time depends, in the shape that `config` names.

    Raises:
        ValueError: on an unknown shape, preset, setting, dtype or device, and if the weights do not fit into memory.
    """
    return random_pair(config.shape, shape_config(config.shape), config)


def random_pair(name: str, softmax_config: PreTrainedConfig, config: LatencyConfig) -> LatencyPair:
    """
    Random weights for the softmax model of `softmax_config`, whose max_position_embeddings is raised to the longest context
    where necessary; the scale of the linear branches starts at 1.

    Raises:
        ValueError: as `shape_pair`.
    """
    if config.preset not in PRESETS:
        raise unknown("preset", config.preset, PRESETS)
    settings = config.settings or {}
    check_keys(settings)
    softmax_config.max_position_embeddings = max(softmax_config.max_position_embeddings, config.longest + 1)
    device, dtype = placement(config.device, config.dtype)
    layers = {"layer_types": "linear_attention"} | PRESETS[config.preset] | {"branch_scale_init": 0.0} | settings
    student_config = dijiang_config(softmax_config, layers)
    check_effect(settings, student_config)
    refuse_too_large(name, student_config, dtype, device)
    with device:
        softmax, dijiang = (
            AutoModelForCausalLM.from_config(model_config, dtype=dtype).eval()
            for model_config in (softmax_config, student_config)
        )
    facts = {
        "weights": "random",
        "preset": config.preset,
        "settings": settings,
        "max_position_embeddings": softmax_config.max_position_embeddings,
    }
    return LatencyPair(name=name, shape=name, softmax=softmax, dijiang=dijiang, facts=facts)


def checkpoint_pair(checkpoint: str | Path, teacher: str | Path, config: LatencyConfig) -> LatencyPair:
    """
    A DiJiang checkpoint and the softmax model that it was converted from: a hub id, a folder or a GGUF file.

    Raises:
        ValueError: if one cannot be loaded or is of the wrong kind, if they differ in size, if a context is longer than the
            positions they were made for, and if the weights do not fit into memory.
    """
    device, dtype = placement(config.device, config.dtype)
    ours, theirs = open_convertible(checkpoint), open_convertible(teacher)
    if not ours.is_dijiang or not ours.config.has_linear_layers:
        kind = "DiJiang model without linear layers" if ours.is_dijiang else f"{ours.config.model_type} model"
        raise ValueError(f"{checkpoint} is a {kind}; give a checkpoint with linear layers, made with `dijiang convert`")
    if theirs.is_dijiang:
        raise ValueError(f"the teacher {teacher} is a DiJiang model; give the softmax model that {checkpoint} came from")
    softmax_config = dijiang_config(theirs.config, {})
    for key in ("intermediate_size", *SAME_IN_TEACHER):
        own, other = getattr(ours.config, key), getattr(softmax_config, key)
        if own != other:
            raise ValueError(f"{checkpoint} has {key}={own}, {teacher} has {other}; give the model it came from")
    if softmax_config.sliding_window:
        raise ValueError(
            f"{teacher} attends to its last sliding_window={theirs.config.sliding_window} tokens only, so its cache stops "
            "growing there; give a model with full attention"
        )
    positions = min(ours.config.max_position_embeddings, theirs.config.max_position_embeddings)
    if config.longest > positions:
        raise ValueError(
            f"a context of {config.longest:,} tokens is more than the {positions:,} positions that {teacher} was made for; "
            "give shorter contexts, or a shape (--shape), whose weights are random"
        )
    refuse_too_large(str(checkpoint), ours.config, dtype, device, copies=4 if theirs.gguf else 2)
    return LatencyPair(
        name=public_name(checkpoint),
        shape=None,
        softmax=load_softmax(theirs, dtype).to(device),
        dijiang=load_dijiang(ours, dtype).to(device),
        facts={"weights": "the checkpoint's and its teacher's", "teacher": public_name(teacher), "files": file_hashes(ours)},
    )


def load_softmax(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """Load a source in transformers' own class on the CPU; a GGUF file is dequantized."""
    arguments = {"gguf_file": source.gguf.name} if source.gguf else {}
    if source.gguf and GgufConfig:
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    try:
        with no_library_bars(), contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader draws a bar of its own
            return AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype, **arguments).eval()
    except Exception as error:
        raise ValueError(f"{source.name} cannot be loaded: {one_line(error)}") from None


def refuse_too_large(
    name: str, config: PreTrainedConfig | DiJiangConfig, dtype: torch.dtype, device: torch.device, copies: int = 2
) -> None:
    """Raise ValueError unless `copies` of the weights of the DiJiang model of `config` fit into free memory."""
    needed = copies * dtype.itemsize * build_on_meta(config).num_parameters() + SPARE_BYTES
    if reason := shortage(needed, device):
        raise ValueError(f"the weights of {name} and of its peer do not fit: {reason}; choose a smaller model or dtype")


def shortage(needed: float, device: torch.device) -> str | None:
    """Why `needed` bytes cannot be had, or None if they can."""
    free = available_bytes(device)
    return f"about {needed / 2**30:.1f} GiB are needed and {free / 2**30:.1f} are free" if needed > free else None
