"""Sequences of tokens to train on and to measure on, each determined by its index alone."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from dijiang.common.perplexity import window_bounds

from ..recipe.schema import DataConfig, SourceConfig, StageConfig
from .mixture import Mixture, Shuffle, random_below
from .recall_sequences import RecallSequences
from .sources import public_source, refuse_leaks
from .token_cache import TokenFile, tokenize


def cut_sequence(
    file: TokenFile, first: int, length: int, *, respect_documents: bool, sample_index: int, start: int = 0
) -> dict[str, torch.Tensor]:
    """
    The `length` tokens of a source from token number `first` on.

    Returns:
        input_ids (1, length) int64; position_ids (1, length) int64, which count from `start` and, if documents are respected,
        from `start` again at the first token of each document; sample_index () int64.
    """
    ids = np.asarray(file.tokens[first : first + length], dtype=np.int64)
    origin = np.zeros(length, dtype=np.int64)  # nonzero at the tokens where positions start again
    if respect_documents:
        here, behind = np.searchsorted(file.starts, (first, first + length))
        starts = file.starts[here:behind] - first
        origin[starts] = starts
    positions = np.arange(start, start + length) - np.maximum.accumulate(origin)
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "sample_index": torch.tensor(sample_index),
    }


class Phase(NamedTuple):
    """Steps with sequences of one length: samples from index `first_sample` on, parts of blocks from `first_block` on."""

    first_sample: int
    samples: int
    length: int
    first_block: int
    blocks: int


def phases_of(stage: StageConfig) -> list[Phase]:
    """The phases of a stage; each begins with blocks of its own."""
    sample = block = 0
    phases = []
    for steps, length in stage.phases:
        samples = steps * stage.batch_size
        blocks = -(-samples // (stage.block_size // length))
        phases.append(Phase(sample, samples, length, block, blocks))
        sample += samples
        block += blocks
    return phases


def count_blocks(source: SourceConfig, file: TokenFile, block_size: int) -> int:
    """The number of whole blocks in the tokens of a source; ValueError if they do not fill one."""
    if len(file) < block_size:
        raise ValueError(
            f"{source.path}: {len(file):,} tokens do not fill one block of {block_size:,}; "
            "give more text or a smaller block_size"
        )
    return len(file) // block_size


class TrainingBlocks(Dataset):
    """
    The sequences of a stage in training order. Sample i holds the same tokens whatever was asked for before, on any number of
    processes: the weights decide which source it reads, and a seeded shuffle of that source, a new one for each epoch, decides
    on the block. The tokens of a source that do not fill a last block are left out.

    Sequences shorter than a block are its parts: a phase goes through the first parts of all its blocks, then through the
    second ones, so that neighbors in the text do not meet in one step.

    Item i is a dict as `cut_sequence` returns it; all items of one step have the same length. With `recall` all items have
    `answers` too, see `RecallSequences.sequence`.

    Args:
        files: the tokens of each source of `data.train`.
        data: the sources and their weights.
        stage: sizes, steps and seed.
        recall: which sequences are samples of recall instead of text; None: none.

    Raises:
        ValueError: if a source does not fill one block.
    """

    def __init__(
        self, files: Sequence[TokenFile], data: DataConfig, stage: StageConfig, recall: RecallSequences | None = None
    ):
        self.recall = recall
        self.files = files
        self.data = data
        self.stage = stage
        self.phases = phases_of(stage)
        self.total_blocks = sum(phase.blocks for phase in self.phases)
        self.source_blocks = [count_blocks(*pair, stage.block_size) for pair in zip(data.train, files, strict=True)]
        self.mixture = Mixture([source.weight for source in data.train], self.total_blocks)
        self.shuffles = [Shuffle(blocks, stage.seed, source) for source, blocks in enumerate(self.source_blocks)]

    def __len__(self) -> int:
        return self.stage.steps * self.stage.batch_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        phase = next(phase for phase in reversed(self.phases) if phase.first_sample <= index)
        part, number = divmod(index - phase.first_sample, phase.blocks)
        source, draw = self.mixture(phase.first_block + number)
        starts = max((self.stage.position_range or 0) - phase.length, 0) + 1  # positions that a sequence may start at
        item = cut_sequence(
            self.files[source],
            self.shuffles[source][draw] * self.stage.block_size + part * phase.length,
            phase.length,
            respect_documents=self.data.respect_documents,
            sample_index=index,
            start=random_below(starts, self.stage.seed, index),
        )
        if self.recall is None:
            return item
        if self.recall.takes(index):
            return self.recall.sequence(item, respect_documents=self.data.respect_documents)
        return item | {"answers": torch.zeros_like(item["input_ids"])}

    def fingerprint(self) -> str:
        """
        Hash of the number of tokens, a thousand stretches of them and the starts of documents, whatever file holds them, and
        of the first sequence of samples of recall.
        """
        digest = hashlib.sha256()
        if self.recall is not None:
            first = next((i for i in range(len(self)) if self.recall.takes(i)), 0)
            digest.update(self[first]["input_ids"].numpy().tobytes())
        for file in self.files:
            digest.update(f"{len(file)} {len(file.starts)} {int(np.sum(file.starts))}".encode())
            for first in range(0, len(file), max(len(file) // 1000, 64)):
                digest.update(np.asarray(file.tokens[first : first + 64]).tobytes())
        return digest.hexdigest()

    def facts(self) -> dict:
        """
        Description of the text for provenance: for each source its size, how much of it is used and how often, sequences
        included in whose place samples of recall were read.
        """
        counts = self.mixture.counts(self.total_blocks)
        sources = [
            {
                "source": public_source(source.path),
                "subset": source.subset,
                "split": source.split,
                "weight": source.weight,
                "documents": len(file.starts),
                "tokens": len(file),
                "fingerprint": file.fingerprint,
                "blocks": blocks,
                "blocks_used": min(count, blocks),
                "epochs": count / blocks,
                "skipped": file.skipped,
            }
            for source, file, blocks, count in zip(self.data.train, self.files, self.source_blocks, counts, strict=True)
        ]
        if self.recall is None:
            return {"sources": sources}
        return {"sources": sources, "recall": asdict(self.recall.config) | {"sequences": self.recall.count(len(self))}}


def training_blocks(data: DataConfig, stage: StageConfig, tokenizer, *, progress: bool) -> TrainingBlocks:
    """
    The sequences of a stage; tokenizes the text first unless the cache has its tokens.

    Raises:
        ValueError: on text that cannot be read, does not fill one block, or is held out as well.
    """
    refuse_leaks(data)
    blocks = sum(phase.blocks for phase in phases_of(stage))
    counts = Mixture([source.weight for source in data.train], blocks).counts(blocks)
    files = [
        tokenize(source, data, tokenizer, tokens_needed=max(count, 1) * stage.block_size, progress=progress)
        for source, count in zip(data.train, counts, strict=True)
    ]
    recall = data.recall and RecallSequences(data.recall, tokenizer, stage)
    return TrainingBlocks(files, data, stage, recall)


def held_out_blocks(data: DataConfig, block_size: int, tokenizer, *, progress: bool) -> list[dict[str, torch.Tensor]] | None:
    """
    Blocks of `data.held_out_tokens` held-out tokens, the same number from each source (at least one block, and all if it has
    fewer), spread evenly over its text; items are as those of TrainingBlocks. None if nothing is held out.

    Raises:
        ValueError: on text that cannot be read, does not fill one block, or is trained on as well.
    """
    if not data.held_out:
        return None
    refuse_leaks(data)
    wanted = max(data.held_out_tokens // len(data.held_out) // block_size, 1)
    items: list[dict[str, torch.Tensor]] = []
    for source in data.held_out:
        file = tokenize(source, data, tokenizer, tokens_needed=None, progress=progress)
        blocks = count_blocks(source, file, block_size)
        bounds = window_bounds(len(file), block_size, block_size)
        count = min(wanted, blocks)
        for number in range(count):
            first = bounds[number * blocks // count][0]
            settings = {"respect_documents": data.respect_documents, "sample_index": len(items)}
            items.append(cut_sequence(file, first, block_size, **settings))
    return items


def collate(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """
    Batch items of the same length.

    Returns:
        input_ids (items, L) int64; position_ids of the same shape, left out where every row simply counts from 0, as models do
        by default, some of them faster; answers of the same shape, if items have them; sample_indices (items,) int64.
    """
    batch = {name: torch.cat([item[name] for item in items]) for name in ("input_ids", "answers") if name in items[0]}
    positions = torch.cat([item["position_ids"] for item in items])
    if not torch.equal(positions, torch.arange(positions.shape[1]).expand_as(positions)):
        batch["position_ids"] = positions
    batch["sample_indices"] = torch.stack([item["sample_index"] for item in items])
    return batch
