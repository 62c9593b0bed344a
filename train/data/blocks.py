"""Sequences of tokens to train on and to measure on, each known from its number alone."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ..recipe.schema import DataConfig, SourceConfig, StageConfig
from .mixture import Mixture, Shuffle, random_below
from .sources import public_source, refuse_leaks
from .token_cache import TokenFile, tokenise


def cut_sequence(
    file: TokenFile, first: int, length: int, *, respect_documents: bool, place: int, start: int = 0
) -> dict[str, torch.Tensor]:
    """
    The `length` tokens of a source from token number `first` on.

    Returns:
        input_ids (1, length) int64; position_ids (1, length) int64, which count from `start` and, if documents are respected,
        from `start` again at each document's first token; place () int64.
    """
    ids = np.asarray(file.tokens[first : first + length], dtype=np.int64)
    origin = np.zeros(length, dtype=np.int64)  # where counting starts anew; then, for each token, where it last did
    if respect_documents:
        here, behind = np.searchsorted(file.starts, (first, first + length))
        starts = file.starts[here:behind] - first
        origin[starts] = starts
    positions = np.arange(start, start + length) - np.maximum.accumulate(origin)
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "place": torch.tensor(place),
    }


class Phase(NamedTuple):
    """A run of steps with sequences of one length, each of them a part of a block."""

    first_place: int
    places: int
    length: int
    first_turn: int  # in the order of the blocks
    blocks: int


def plan(stage: StageConfig) -> list[Phase]:
    """The phases of a stage; each begins with blocks of its own."""
    place = turn = 0
    phases = []
    for steps, length in stage.phases:
        places = steps * stage.batch_size
        blocks = -(-places // (stage.block_size // length))
        phases.append(Phase(place, places, length, turn, blocks))
        place, turn = place + places, turn + blocks
    return phases


def count_blocks(source: SourceConfig, file: TokenFile, block_size: int) -> int:
    """
    Raises:
        ValueError: if the tokens do not fill one block.
    """
    if len(file) < block_size:
        raise ValueError(
            f"{source.path}: {len(file):,} tokens do not fill one block of {block_size:,}; "
            "give more text or a smaller block_size"
        )
    return len(file) // block_size


class TrainingBlocks(Dataset):
    """
    The sequences of a stage in training order. Place i holds the same tokens whatever was asked for before, on however many
    processes: which source it reads follows from the weights, and the block from that source's seeded shuffle, a new one for
    each pass over its text. The tokens of a source that do not fill a last block are left out.

    Sequences shorter than a block are its parts: a phase goes through the first parts of all its blocks, then through the
    second ones, so that neighbours in the text do not meet in one step.

    Item i is a dict as `cut_sequence` gives; all items of one step have the same length.

    Args:
        files: the tokens of each source of `data.train`.
        data: the sources and their weights.
        stage: sizes, steps and seed.

    Raises:
        ValueError: if a source does not fill one block.
    """

    def __init__(self, files: Sequence[TokenFile], data: DataConfig, stage: StageConfig):
        self.files, self.data, self.stage, self.phases = files, data, stage, plan(stage)
        self.blocks = [count_blocks(*pair, stage.block_size) for pair in zip(data.train, files, strict=True)]
        self.turns = sum(phase.blocks for phase in self.phases)
        self.mixture = Mixture([source.weight for source in data.train], self.turns)
        self.shuffles = [Shuffle(blocks, stage.seed, number) for number, blocks in enumerate(self.blocks)]

    def __len__(self) -> int:
        return self.stage.steps * self.stage.batch_size

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        if not 0 <= place < len(self):
            raise IndexError(f"place {place} of {len(self)}")
        phase = next(phase for phase in reversed(self.phases) if phase.first_place <= place)
        part, number = divmod(place - phase.first_place, phase.blocks)
        source, turn = self.mixture(phase.first_turn + number)
        starts = max((self.stage.position_range or 0) - phase.length, 0) + 1  # positions that a sequence may start at
        return cut_sequence(
            self.files[source],
            self.shuffles[source][turn] * self.stage.block_size + part * phase.length,
            phase.length,
            respect_documents=self.data.respect_documents,
            place=place,
            start=random_below(starts, self.stage.seed, place),
        )

    def fingerprint(self) -> str:
        """Hash of the tokens' number, a thousand stretches of them and where documents begin, whatever file they are in."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{len(file)} {len(file.starts)} {int(np.sum(file.starts))}".encode())
            for first in range(0, len(file), max(len(file) // 1000, 64)):
                digest.update(np.asarray(file.tokens[first : first + 64]).tobytes())
        return digest.hexdigest()

    def facts(self) -> dict:
        """What a record says of the text: for each source its size, how much of it is used and how often."""
        sources = []
        counts = self.mixture.counts(self.turns)
        for source, file, blocks, count in zip(self.data.train, self.files, self.blocks, counts, strict=True):
            sources.append(
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
            )
        return {"sources": sources}


class HeldOutBlocks(Dataset):
    """
    Items as those of TrainingBlocks, each a block.

    Args:
        chosen: (file, block) of each item.
        block_size: tokens per block.
        respect_documents: as in DataConfig.
    """

    def __init__(self, chosen: Sequence[tuple[TokenFile, int]], block_size: int, respect_documents: bool):
        self.chosen, self.block_size, self.respect_documents = chosen, block_size, respect_documents

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        file, block = self.chosen[place]
        size = self.block_size
        return cut_sequence(file, block * size, size, respect_documents=self.respect_documents, place=place)


def training_blocks(data: DataConfig, stage: StageConfig, tokenizer, *, progress: bool = True) -> TrainingBlocks:
    """
    The sequences of a stage; the text is tokenised first where that has not been done.

    Raises:
        ValueError: on text that cannot be read, does not fill one block, or is held out as well.
    """
    refuse_leaks(data)
    turns = sum(phase.blocks for phase in plan(stage))
    counts = Mixture([source.weight for source in data.train], turns).counts(turns)
    files = [
        tokenise(source, data, tokenizer, tokens_needed=max(count, 1) * stage.block_size, progress=progress)
        for source, count in zip(data.train, counts, strict=True)
    ]
    return TrainingBlocks(files, data, stage)


def held_out_blocks(data: DataConfig, block_size: int, tokenizer, *, progress: bool = True) -> HeldOutBlocks | None:
    """
    Blocks of `data.held_out_tokens` held-out tokens, as many from each source (at least one block, and all if it has fewer),
    spread evenly over its text. None if nothing is held out.

    Raises:
        ValueError: on text that cannot be read, does not fill one block, or is trained on as well.
    """
    if not data.held_out:
        return None
    refuse_leaks(data)
    wanted = max(data.held_out_tokens // len(data.held_out) // block_size, 1)
    chosen = []
    for source in data.held_out:
        file = tokenise(source, data, tokenizer, tokens_needed=None, progress=progress)
        blocks = count_blocks(source, file, block_size)
        taken = min(wanted, blocks)
        chosen += [(file, number * blocks // taken) for number in range(taken)]
    return HeldOutBlocks(chosen, block_size, data.respect_documents)


def collate(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """
    One batch of items of the same length.

    Returns:
        input_ids (items, L) int64; position_ids of the same shape, left out where every row simply counts from 0,
        as models do by themselves, some of them faster; places (items,) int64.
    """
    batch = {"input_ids": torch.cat([item["input_ids"] for item in items])}
    positions = torch.cat([item["position_ids"] for item in items])
    if not torch.equal(positions, torch.arange(positions.shape[1]).expand_as(positions)):
        batch["position_ids"] = positions
    batch["places"] = torch.stack([item["place"] for item in items])
    return batch
