"""
Differences between the versions of transformers: the name of the cache, and the extra keywords that reach `forward`. The code
is copied into checkpoints, so it meets versions that are newer or older than those it was tested with.
"""

import inspect
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import TypeVar

import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

# a child of transformers' logger, whose verbosity it follows; the copies of this code in several checkpoints share it
logger = logging.get_logger("transformers.dijiang")

# oldest and newest minor version whose tests pass: `make test-versions` runs them, docs/versions.md shows the result
TESTED_TRANSFORMERS = ("5.9", "5.24")

AnyCache = TypeVar("AnyCache")
# 5.24 renamed the argument and the output that hold the cache; the old name works there with a warning, for a while
CACHE_NAME = "cache" if any(field.name == "cache" for field in fields(BaseModelOutputWithPast)) else "past_key_values"

CONTINUOUS_BATCHING = "generate_batch, for models whose layers are all softmax attention"
PACKED_ROWS = "collators without padding: where the sequences of a packed row begin, or how long they are"
DEBUGGING = "merge_with_config_defaults, which writes the layers' inputs and outputs to files"
# keyword arguments that forward takes besides those in its signature: name -> who passes it, and what is done with it
EXTRA_ARGUMENTS = {
    "return_dict": "generate and PEFT; transformers' decorators act on it",
    "output_attentions": "generate and PEFT; transformers' decorators act on it",
    "output_hidden_states": "generate and PEFT; transformers' decorators act on it",
    "output_router_logits": "callers that serve all models; no layer has a router, so it is ignored",
    "num_items_in_batch": "Trainer, with gradient accumulation; the loss is divided by it",
    "shift_labels": "Trainer, with sequences split over devices; the loss uses them in place of labels",
    "ignore_index": "callers of the loss; the label without a loss",
    "cu_seq_lens_q": PACKED_ROWS,
    "cu_seq_lens_k": PACKED_ROWS,
    "max_length_q": PACKED_ROWS,
    "max_length_k": PACKED_ROWS,
    "seq_idx": PACKED_ROWS,
    "token_type_ids": "tokenizers that tell segments apart; a decoder has one segment, so they are ignored",
    "is_causal": "transformers' decorators; linear layers accept nothing but True",
    "kernel_options": "callers of FlexAttention, which is an attention of softmax layers",
    "debug_io": DEBUGGING,
    "debug_io_dir": DEBUGGING,
    "prune_layers": DEBUGGING,
    "logits_indices": CONTINUOUS_BATCHING,
    "logits_processor_args": CONTINUOUS_BATCHING,
    "read_index": CONTINUOUS_BATCHING,
    "write_index": CONTINUOUS_BATCHING,
    "block_table": CONTINUOUS_BATCHING,
}


def refuse_unknown_arguments(model: torch.nn.Module, extras: Iterable[str]) -> None:
    """
    Raise TypeError if `extras`, keywords besides those in the signature of the model's forward, are not in EXTRA_ARGUMENTS: a
    renamed argument that nobody reads would silently give wrong results.
    """
    unknown = [name for name in extras if name not in EXTRA_ARGUMENTS]
    if unknown:
        parameters = inspect.signature(type(model).forward).parameters.values()
        named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
        raise TypeError(
            f"{type(model).__name__}.forward() got an unknown keyword argument: {', '.join(unknown)}; it accepts "
            f"{', '.join((*named, *EXTRA_ARGUMENTS))}"
        )


def one_cache(past_key_values: AnyCache | None, cache: AnyCache | None) -> AnyCache | None:
    """
    The cache that came under its old name, `past_key_values`, or its new one, `cache`.

    Raises:
        ValueError: if these are two different caches.
    """
    if cache is None or cache is past_key_values:
        return past_key_values
    if past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument, and they hold different caches; give one")
    return cache


def is_paged(cache: object) -> bool:
    """Whether this is the cache of `generate_batch`, which is no `Cache` and is read by the attention function itself."""
    return type(cache).__name__ == "PagedAttentionCache"


def warn_of_untested_version(version: str = transformers.__version__) -> None:
    """Log once if this version of transformers is outside TESTED_TRANSFORMERS."""
    oldest, newest = map(minor_version, TESTED_TRANSFORMERS)
    if not oldest <= minor_version(version) <= newest:
        logger.warning_once(
            f"this DiJiang code was tested with transformers {' to '.join(TESTED_TRANSFORMERS)}, and {version} is installed: "
            "compare a generated text with the one under use_cache=False, or install a tested version; "
            "`dijiang refresh-code CHECKPOINT` gives a checkpoint the code of the dijiang installed"
        )


def minor_version(version: str) -> tuple[int, ...]:
    """(5, 24) of `5.24.1.dev0` or `5.24rc1`; () if it does not begin with a number."""
    match = re.match(r"(\d+)(?:\.(\d+))?", version)
    return (int(match[1]), int(match[2] or 0)) if match else ()
