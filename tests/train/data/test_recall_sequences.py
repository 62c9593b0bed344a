"""Samples of recall in place of training text: which sequences they are, what they hold, and that the index decides alone."""

import random
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from dijiang.common.recall import RecallSample
from dijiang.train.data.blocks import TrainingBlocks, collate
from dijiang.train.data.mixture import Mixture
from dijiang.train.data.recall_sequences import RecallSequences, held_out_recall, numbered_answers
from dijiang.train.data.synthetic_recall import KINDS as KINDS_MADE
from dijiang.train.recipe.schema import DataConfig, RecallConfig, RecallKind, SourceConfig, StageConfig

STAGE = StageConfig(tokens=2048 * 20, block_size=2048, seed=3)
KINDS = ("passkey", "codes", "positions")  # short ones, for a tokenizer of a byte or two per token


class RandomText:
    """A `TokenFile` of random tokens, one document."""

    fingerprint, skipped = "x", 0
    starts = np.array([0])

    def __init__(self, tokens: int):
        self.tokens = np.random.default_rng(0).integers(0, 300, tokens, dtype=np.uint16)

    def __len__(self) -> int:
        return len(self.tokens)


def training(tokenizer, stage=STAGE, respect_documents=True, **settings) -> TrainingBlocks:
    recall = RecallConfig(**{"kinds": KINDS, "share": 0.3} | settings)
    data = DataConfig(train=[SourceConfig(path="x")], recall=recall, respect_documents=respect_documents)
    return TrainingBlocks([RandomText(30_000)], data, stage, RecallSequences(recall, tokenizer, stage))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.15, 0.3, 1 / 3, 1.0])
def test_samples_have_their_share_of_every_beginning(tokenizer, share):
    sequences = RecallSequences(RecallConfig(share=share, kinds=KINDS), tokenizer, STAGE)
    taken = [sequences.takes(i) for i in range(300)]
    for n in range(1, 301):
        assert abs(sum(taken[:n]) - n * share) < 2 and sum(taken[:n]) == sequences.count(n)


@pytest.mark.parametrize(("weights", "share"), [((1, 1), 0.5), ((1, 1, 1, 1), 0.25), ((0.85, 0.15), 0.15), ((3, 1), 0.25)])
def test_every_source_gives_up_its_share(tokenizer, weights, share):
    """With one of samples at regular places they would take all of one source and nothing of another."""
    sequences, mixture = RecallSequences(RecallConfig(share=share, kinds=KINDS), tokenizer, STAGE), Mixture(weights, 4000)
    sources = np.array([mixture(i)[0] for i in range(4000)])
    taken = np.array([sequences.takes(i) for i in range(4000)])
    for source in range(len(weights)):
        assert abs(taken[sources == source].mean() - share) < 0.08


def test_a_sequence_is_determined_by_its_index_and_holds_what_it_asks_for(tokenizer):
    blocks, again = training(tokenizer), training(tokenizer)
    items = [blocks[i] for i in range(len(blocks))]
    for i in reversed(range(len(blocks))):
        for name, value in again[i].items():
            assert torch.equal(value, items[i][name]), (i, name)
    plain = TrainingBlocks(blocks.files, replace(blocks.data, recall=None), STAGE)
    found = set()
    for i, item in enumerate(items):
        assert item["input_ids"].shape == item["answers"].shape == (1, 2048) and item["sample_index"] == i
        if not blocks.recall.takes(i):
            assert torch.equal(item["input_ids"], plain[i]["input_ids"]) and not item["answers"].any()
            continue
        assert not torch.equal(item["input_ids"], plain[i]["input_ids"]) and torch.equal(
            item["position_ids"], torch.arange(2048)[None]
        )
        ids, numbers = item["input_ids"][0].tolist(), item["answers"][0]
        for number in range(1, int(numbers.max()) + 1):
            at = (numbers == number).nonzero().flatten()
            answer = ids[int(at[0]) + 1 : int(at[-1]) + 2]
            assert len(at) == len(answer) and answer[0] == ids[at[0] + 1]
            assert contains(ids[: int(at[0]) + 1], answer)
            found.add(tokenizer.decode(answer))
    assert len(found) > 6


def contains(ids: list[int], part: list[int]) -> bool:
    return any(ids[i : i + len(part)] == part for i in range(len(ids) - len(part) + 1))


@pytest.mark.parametrize("documents", [True, False])
def test_short_samples_fill_a_sequence_one_after_another(tokenizer, documents):
    stage = replace(STAGE, tokens=8192 * 10, block_size=8192, position_range=10_000)
    blocks = training(tokenizer, stage, documents, share=1.0, lengths=(600, 1000), answer_weight=3.0)
    sizes = set()
    for i in range(4):
        positions = blocks[i]["position_ids"][0]
        begins = [0, *(positions.diff() != 1).nonzero().flatten().add(1).tolist(), 8192]
        assert (len(begins) > 7) if documents else (len(begins) == 2)
        lengths = torch.tensor(begins).diff().tolist()
        sizes |= set(lengths[:-1])
        if documents:
            assert all(600 <= size < 1200 for size in lengths) and (positions[begins[:-1]] == positions[0]).all()
        assert blocks[i]["answers"].max() >= 7
    assert sizes == ({600, 1000} if documents else set())
    sequences = blocks.recall
    for length in (512, 600, 1199, 1200, 3000):
        parts = sequences.sizes(length, random.Random(0))
        assert sum(parts) == length and (len(parts) == 1 or min(parts) >= 600)
    whole = RecallSequences(RecallConfig(kinds=KINDS, lengths=(512, 1024)), tokenizer, STAGE)
    drawn = {tuple(whole.sizes(1024, random.Random(seed))) for seed in range(20)}
    assert drawn == {(1024,), (512, 512)}  # the longest one, too


def test_answers_are_numbered_at_the_tokens_that_predict_them():
    first = RecallSample(input_ids=torch.arange(5), answers=[(1, 2), (3, 5)], depths=[0.0, 0.0], chance=0.0)
    second = RecallSample(input_ids=torch.arange(4), answers=[(2, 4)], depths=[0.0], chance=0.0)
    assert numbered_answers([first, second]).tolist() == [1, 0, 2, 2, 0, 0, 3, 3, 0]


def test_batches_have_answers_and_another_seed_or_config_another_fingerprint(tokenizer):
    blocks = training(tokenizer)
    text, samples = (next(i for i in range(20) if blocks.recall.takes(i) == wanted) for wanted in (False, True))
    batch = collate([blocks[text], blocks[samples]])
    assert batch["answers"].shape == (2, 2048) and batch["answers"][0].sum() == 0 < batch["answers"][1].sum()
    others = [training(tokenizer, seed=1), training(tokenizer, kinds=KINDS[1:]), training(tokenizer)]
    assert [other.fingerprint() == blocks.fingerprint() for other in others] == [False, False, True]
    plain = TrainingBlocks(blocks.files, replace(blocks.data, recall=None), STAGE)
    assert plain.fingerprint() != blocks.fingerprint() and "answers" not in collate([plain[0]])
    taken = sum(bool(blocks[i]["answers"].any()) for i in range(len(blocks)))
    assert blocks.facts()["recall"]["sequences"] == taken and abs(taken - 6) < 2 and "recall" not in plain.facts()


def test_held_out_samples_are_others(tokenizer):
    config = RecallConfig(kinds=KINDS, held_out_samples=5, lengths=(700, 900, 5000))
    text = torch.from_numpy(RandomText(3000).tokens.astype(np.int64))
    items = held_out_recall(config, text, 2048, tokenizer)
    assert [item["input_ids"].shape for item in items] == [(1, 900)] * 5 and all(item["answers"].any() for item in items)
    assert len(held_out_recall(replace(config, lengths=()), text, 1500, tokenizer)[0]["input_ids"][0]) == 1500
    sequences = RecallSequences(replace(config, lengths=()), tokenizer, STAGE)
    trained = [sequences.sample(KINDS[0], text, 900, seed).input_ids for seed in range(20)]
    assert not any(torch.equal(items[0]["input_ids"][0], ids) for ids in trained)


def test_what_cannot_be_made_is_refused_before_training(tokenizer):
    assert get_args(RecallKind) == tuple(KINDS_MADE)  # so that a recipe with another one is refused as it is read
    with pytest.raises(ValueError, match=r"data\.recall: length=40 is too short for a sample of passkey"):
        RecallSequences(RecallConfig(kinds=KINDS), tokenizer, replace(STAGE, tokens=400, block_size=40))
    for settings, message in (({"share": 1.5}, "share=1.5"), ({"lengths": (64,)}, "128 tokens or more")):
        with pytest.raises(ValueError, match=message):
            RecallConfig(**settings)
