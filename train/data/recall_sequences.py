"""Training sequences made up of samples of recall, in place of some of the text's; each is determined by its index alone."""

import random
from collections.abc import Sequence
from math import ceil, floor
from typing import Any

import torch

from dijiang.common.recall import RecallSample

from ..recipe.schema import RecallConfig, StageConfig
from .mixture import random_below
from .synthetic_recall import KINDS, recall_samples

SEEDS = 1 << 32  # the seeds of first draws are below it, those of others and of held-out samples above
DRAWS = 8  # of a sample, until one fits


class RecallSequences:
    """
    Decides which sequences of a stage are samples of recall, and makes them.

    Args:
        config: `data.recall` of the recipe.
        tokenizer: of the models.
        stage: with the lengths of its sequences, and its seed.

    Raises:
        ValueError: if a kind is unknown, or does not fit into the shortest sample.
    """

    def __init__(self, config: RecallConfig, tokenizer: Any, stage: StageConfig):
        self.config, self.tokenizer, self.seed = config, tokenizer, stage.seed
        self.kinds = config.kinds or tuple(KINDS)
        shortest = min(self.choices(stage.sequence_lengths[0]))
        for kind in self.kinds:
            self.sample(kind, torch.zeros(shortest), shortest, seed=0)

    def place(self, number: int) -> tuple[int, int]:
        """
        The stretch of sequences that has one of samples, this one, begins at, and its index: anywhere in the stretch, since
        with a regular pattern a source that has one of its own would lose all of its text, or none.
        """
        first, end = (ceil(n / self.config.share - 1e-9) for n in (number, number + 1))
        return first, first + random_below(end - first, self.seed + self.config.seed + 1, number)

    def count(self, sequences: int) -> int:
        """How many of the first `sequences` are of samples."""
        if not self.config.share:
            return 0
        number = floor(sequences * self.config.share + 1e-9)
        number -= self.place(number)[0] > sequences
        return number + (self.place(number)[1] < sequences)

    def takes(self, index: int) -> bool:
        """Whether sequence `index` is one of samples."""
        return self.count(index + 1) > self.count(index)

    def sequence(self, item: dict[str, torch.Tensor], *, respect_documents: bool) -> dict[str, torch.Tensor]:
        """
        A sequence of samples in place of `item`, as long and from the same position on, whose filler is text of `item`.

        Returns:
            The entries of `item`, and `answers` (1, length) int64: the number, from 1 on, of the answer that the next token
            belongs to, 0 elsewhere. With several samples, positions start again at each if documents are respected.
        """
        length, index = item["input_ids"].shape[1], int(item["sample_index"])
        seed = random_below(1 << 31, self.seed + self.config.seed, index)
        rng = random.Random(seed)
        sizes = self.sizes(length, rng)
        first = self.count(index)
        samples = [
            self.sample(self.kinds[(first + i) % len(self.kinds)], item["input_ids"][0], size, seed + i)
            for i, size in enumerate(sizes)
        ]
        start = int(item["position_ids"][0, 0])
        positions = torch.cat([torch.arange(size) for size in sizes]) if respect_documents else torch.arange(length)
        return item | {
            "input_ids": torch.cat([sample.input_ids for sample in samples])[None],
            "position_ids": positions[None] + start,
            "answers": numbered_answers(samples)[None],
        }

    def sample(self, kind: str, filler: torch.Tensor, length: int, seed: int) -> RecallSample:
        """One sample; of the draws that do not fit into `length`, which some kinds have if it is short, others are tried."""
        for attempt in range(DRAWS):
            settings = {"kinds": [kind], "length": length, "samples": 1, "seed": seed + attempt * SEEDS}
            try:
                return recall_samples(self.tokenizer, filler, **settings)[0]
            except ValueError as error:
                refusal = error
        raise ValueError(f"data.recall: {refusal}")

    def choices(self, length: int) -> list[int]:
        """Tokens that a sample in a sequence of `length` may have."""
        return [size for size in self.config.lengths if size <= length] or [length]

    def sizes(self, length: int, rng: random.Random) -> list[int]:
        """Tokens of the samples that fill `length` tokens, drawn from `lengths`; the last one takes what is left."""
        choices = self.choices(length)
        sizes, rest = [], length
        while rest >= 2 * min(choices):
            sizes.append(rng.choice([size for size in choices if size == rest or size <= rest - min(choices)]))
            rest -= sizes[-1]
        return [*sizes, rest] if rest else sizes


def numbered_answers(samples: Sequence[RecallSample]) -> torch.Tensor:
    """`answers` of samples one after another, see `RecallSequences.sequence`."""
    numbers = torch.zeros(sum(len(sample.input_ids) for sample in samples), dtype=torch.long)
    number = first = 0
    for sample in samples:
        for start, end in sample.answers:
            number += 1
            numbers[first + start - 1 : first + end - 1] = number
        first += len(sample.input_ids)
    return numbers


def held_out_recall(config: RecallConfig, text: torch.Tensor, length: int, tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """
    Samples to measure recall on during training, items as those of `RecallSequences.sequence`.

    Args:
        config: `data.recall` of the recipe.
        text: (tokens,) held out, at least `length`.
        length: tokens of a sequence of the stage; samples are no longer, nor than the longest of `lengths`.
        tokenizer: of the models.
    """
    length = max((size for size in config.lengths if size <= length), default=length)
    kinds = config.kinds or tuple(KINDS)
    samples = recall_samples(
        tokenizer, text, kinds=kinds, length=length, samples=config.held_out_samples, seed=config.seed + (DRAWS + 1) * SEEDS
    )
    return [
        {
            "input_ids": sample.input_ids[None],
            "position_ids": torch.arange(length)[None],
            "answers": numbered_answers([sample])[None],
            "sample_index": torch.tensor(i),
        }
        for i, sample in enumerate(samples)
    ]
