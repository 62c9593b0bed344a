"""What heads are selected by and what memories are fitted on: text, and made-up samples of recall in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dijiang.checkpoint.provenance import public_name
from dijiang.common.recall import RecallSample
from dijiang.common.text import read_tokens
from dijiang.modeling import DiJiangConfig

from ..data.sources import public_source, refuse_leaks
from ..data.synthetic_recall import recall_samples
from ..data.token_cache import tokenize
from ..recipe.schema import DataConfig
from .config import FitConfig, SelectConfig

READ = 1_000_000  # tokens of all texts, at most


class Text(NamedTuple):
    """
    Text to select and fit on.

    Attributes:
        tokens: (T,) int64.
        names: of where it comes from, for records.
    """

    tokens: torch.Tensor
    names: list[str]


def read_texts(tokenizer: Any, texts: Sequence[str | Path]) -> Text:
    """UTF-8 files one after another, `READ` tokens at most. ValueError if there are no files."""
    if not texts:
        raise ValueError("no text given; name at least one text file")
    tokens: list[int] = []
    for path in texts:
        tokens += read_tokens(tokenizer, path, READ - len(tokens))
    return Text(torch.tensor(tokens), [public_name(path) for path in texts])


def training_text(data: DataConfig, tokenizer: Any, *, progress: bool) -> Text:
    """The beginnings of a recipe's training sources, `READ` tokens together."""
    refuse_leaks(data)
    share = READ // len(data.train)
    files = [tokenize(source, data, tokenizer, tokens_needed=share, progress=progress) for source in data.train]
    tokens = np.concatenate([np.asarray(file.tokens[:share], dtype=np.int64) for file in files])
    return Text(torch.from_numpy(tokens), [public_source(source.path) for source in data.train])


def selection_samples(tokenizer: Any, text: torch.Tensor, config: SelectConfig) -> list[RecallSample]:
    """Samples of all kinds and lengths in turn."""
    samples: list[RecallSample] = []
    share = [len(range(i, config.samples, len(config.lengths))) for i in range(len(config.lengths))]
    for i, (length, count) in enumerate(zip(config.lengths, share, strict=True)):
        if count:
            samples += recall_samples(tokenizer, text, length=length, samples=count, seed=1000 * config.seed + i)
    return samples


def context_of(teacher: DiJiangConfig) -> int:
    """Tokens that a softmax model reads with all of them in sight, as it was trained to."""
    return min(teacher.max_position_embeddings, teacher.sliding_window or teacher.max_position_embeddings)


def fit_rows(tokenizer: Any, text: torch.Tensor, config: FitConfig, context: int) -> list[RecallSample]:
    """
    Sequences of text, from places spread evenly over it, the first twice as long as the others; and samples of recall. None is
    longer than `context`, since attention to what a source was not made for says little.

    Raises:
        ValueError: if the text is shorter than a sequence.
    """
    size = min(config.block_size, context)
    first = min(2 * size, context)
    lengths = [first] if config.text_tokens >= first else []
    lengths += [size] * ((config.text_tokens - sum(lengths)) // size) or ([] if lengths else [config.text_tokens])
    if len(text) < lengths[0]:
        raise ValueError(f"the text has {len(text):,} tokens and fitting reads {lengths[0]:,} at a time; give more text")
    room = len(text) - lengths[0]
    starts = [round(i * room / max(len(lengths) - 1, 1)) for i in range(len(lengths))]
    rows = [
        RecallSample(input_ids=text[start : start + length], answers=[], depths=[], chance=0.0)
        for start, length in zip(starts, lengths, strict=True)
    ]
    if not config.recall_samples:
        return rows
    recall = {"length": min(config.recall_length, context), "samples": config.recall_samples, "seed": 7 + config.seed}
    return rows + recall_samples(tokenizer, text, **recall)
