"""The two models that the latency benchmark compares: transformers' own class of a softmax model, and a DiJiang model."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dijiang.checkpoint.provenance import public_name
from dijiang.checkpoint.shapes import shape_config
from dijiang.checkpoint.source import Source
from dijiang.checkpoint.weights import no_library_bars
from dijiang.common.device import placement
from dijiang.common.errors import one_line
from dijiang.convert import PRESETS
from dijiang.convert.families import dijiang_config, open_convertible
from dijiang.convert.layer_settings import check_effect, check_keys
from dijiang.convert.loader import load_dijiang
from dijiang.convert.mapping import build_on_meta
from dijiang.modeling import DiJiangConfig, DiJiangForCausalLM

from ..quality.variants import file_hashes
from .timing import available_bytes

try:  # releases that have it keep the weights quantised where they find a kernel for them
    from transformers.utils.quantization_config import GgufConfig
except ImportError:
    GgufConfig = None

SPARE_BYTES = 2 << 30  # what libraries, the rest of a step and the copy that times the machine take at most
SAME = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyPair:
    """
    Two models of one size, in eval mode, on one device and in one dtype (kernels stay float32).

    Attributes:
        name: of the shape or of the checkpoint.
        shape: its short name where the weights are random, else None.
        facts: what a result says of the pair.
    """

    name: str
    shape: str | None
    softmax: PreTrainedModel
    dijiang: DiJiangForCausalLM
    facts: dict


def shape_pair(
    shape: str,
    *,
    longest: int,
    preset: str = "recommended",
    settings: dict | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> LatencyPair:
    """
    Random weights in a known shape, for speed does not depend on them; the linear branch speaks from the start.

    Args:
        shape: a key of `SHORT_NAMES`.
        longest: context to be measured; the config's max_position_embeddings is raised to it where need be.
        preset, settings: of the linear layers, as for `convert_model`.
        dtype: `auto` is the faster of float32 and bfloat16; device: `auto` is the GPU where there is one.

    Raises:
        ValueError: on an unknown shape, preset, setting, dtype or device, and if the weights do not fit into memory.
    """
    config = shape_config(shape)
    return config_pair(shape, config, longest=longest, preset=preset, settings=settings, dtype=dtype, device=device)


def config_pair(
    name: str,
    config: PreTrainedConfig,
    *,
    longest: int,
    preset: str = "recommended",
    settings: dict | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> LatencyPair:
    """`shape_pair` of the softmax model of `config`, which is changed; arguments as there."""
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown; choose from {', '.join(PRESETS)}")
    settings = settings or {}
    check_keys(settings)
    config.max_position_embeddings = max(config.max_position_embeddings, longest + 1)
    device, dtype = placement(device, dtype)
    ours = dijiang_config(
        config, {"layer_types": "linear_attention"} | PRESETS[preset] | {"branch_scale_init": 0.0} | settings
    )
    check_effect(settings, ours)
    refuse_too_large(name, ours, dtype, device)
    with device:
        softmax, dijiang = (AutoModelForCausalLM.from_config(c, dtype=dtype).eval() for c in (config, ours))
    facts = {
        "weights": "random",
        "preset": preset,
        "settings": settings,
        "max_position_embeddings": config.max_position_embeddings,
    }
    return LatencyPair(name=name, shape=name, softmax=softmax, dijiang=dijiang, facts=facts)


def checkpoint_pair(
    checkpoint: str | Path, teacher: str | Path, *, longest: int, dtype: str = "auto", device: str = "auto"
) -> LatencyPair:
    """
    A DiJiang checkpoint and the softmax model that it came from, a hub id, a folder or a GGUF file.

    Args:
        longest: context to be measured.
        dtype, device: as for `shape_pair`.

    Raises:
        ValueError: if one cannot be loaded, is of the wrong kind, they differ in size, the context is longer than the
            positions they were made for, and if the weights do not fit into memory.
    """
    device, dtype = placement(device, dtype)
    ours, theirs = open_convertible(checkpoint), open_convertible(teacher)
    if not ours.is_dijiang or not ours.config.has_linear_layers:
        found = "DiJiang model without linear layers" if ours.is_dijiang else f"{ours.config.model_type} model"
        raise ValueError(f"{checkpoint} is a {found}; give a checkpoint with linear layers, made with `dijiang convert`")
    if theirs.is_dijiang:
        raise ValueError(f"the teacher {teacher} is a DiJiang model; give the softmax model that {checkpoint} came from")
    for key in SAME:
        own, other = getattr(ours.config, key), getattr(theirs.config, key)
        if own != other:
            raise ValueError(f"{checkpoint} has {key}={own}, {teacher} has {other}; give the model it came from")
    if dijiang_config(theirs.config, {}).sliding_window:
        raise ValueError(
            f"{teacher} attends to its last sliding_window={theirs.config.sliding_window} tokens only, so its cache stops "
            "growing there; give a model with full attention"
        )
    positions = min(ours.config.max_position_embeddings, theirs.config.max_position_embeddings)
    if longest > positions:
        raise ValueError(
            f"a context of {longest:,} tokens is more than the {positions:,} positions that {teacher} was made for; give "
            "shorter contexts, or a shape (--shape), whose weights are random"
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
    """The source in transformers' own class, with its default attention, on the CPU; of a GGUF file, dense weights."""
    arguments = {"gguf_file": source.gguf.name} if source.gguf else {}
    if source.gguf and GgufConfig:
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    try:
        with no_library_bars(), contextlib.redirect_stderr(io.StringIO()):  # where the GGUF reader draws its own
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
