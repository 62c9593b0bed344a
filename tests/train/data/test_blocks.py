"""Packing against a walk through the documents, the order of training against its definition."""

import json
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from dijiang.train.data.blocks import collate, held_out_blocks, training_blocks
from dijiang.train.data.mixture import Shuffle
from dijiang.train.recipe.schema import DataConfig, SourceConfig, StageConfig


class Letters:
    """A letter's code is its token; 1 ends a text, unless there is no end."""

    def __init__(self, eos_token_id=1):
        self.eos_token_id = eos_token_id

    def __call__(self, texts, add_special_tokens, verbose):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    def get_vocab(self):
        return {chr(code): code for code in range(2**12)}


@pytest.fixture
def write(tmp_path):
    """write("a", seed, documents, longest=..., weight=...) -> (source, texts) of random letters, different in each source."""

    def make(name, seed=0, documents=40, longest=30, **source):
        rng = random.Random(f"{name} {seed}")
        first = 256 * (ord(name) - ord("a") + 1)
        texts = ["".join(chr(first + rng.randrange(200)) for _ in range(rng.randint(1, longest))) for _ in range(documents)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return SourceConfig(path=str(path), **source), texts

    return make


@pytest.fixture
def build(tmp_path):
    """build(sources, tokenizer=..., data={...}, **stage) -> TrainingBlocks."""

    def make(*sources, tokenizer=None, data=(), steps=20, **stage):
        config = DataConfig(train=list(sources), cache=str(tmp_path / "cache"), **dict(data))
        size = stage.setdefault("block_size", 16) * stage.setdefault("batch_size", 1)
        stage = StageConfig(tokens=steps * size + size // 2, **stage)
        return training_blocks(config, stage, tokenizer or Letters(), progress=False)

    return make


def walk(texts, *, length, eos, respect_documents):
    """(token, position) one after another, as a reader with a pencil would find them."""
    position = -1
    index = 0
    for text in texts:
        for number, token in enumerate([ord(letter) for letter in text] + ([] if eos is None else [eos])):
            starts_again = index % length == 0 or (respect_documents and number == 0)
            position = 0 if starts_again else position + 1
            yield token, position
            index += 1


def blocks_and_parts(stage):
    """(length, block index, part of the block) of each sample, one after another."""
    first = 0
    for steps, length in stage.phases:
        left, parts = steps * stage.batch_size, stage.block_size // length
        blocks = -(-left // parts)
        for part in range(parts):
            for number in range(blocks):
                if left:
                    yield length, first + number, part
                    left -= 1
        first += blocks


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("respect_documents", [True, False])
@pytest.mark.parametrize(("block_size", "start", "eos"), [(16, None, 1), (28, 7, None), (24, 3, 1), (1, None, 1)])
def test_sequences_are_those_of_a_walk_through_the_documents(write, build, seed, respect_documents, block_size, start, eos):
    source, texts = write("a", seed, longest=random.Random(seed).choice([2, 30, 100]))
    sizes = {"block_size": block_size, "start_block_size": start, "batch_size": 1 + seed}
    blocks = build(source, tokenizer=Letters(eos), data={"respect_documents": respect_documents}, steps=70, seed=seed, **sizes)
    lengths = blocks.stage.sequence_lengths
    walks = {n: list(walk(texts, length=n, eos=eos, respect_documents=respect_documents)) for n in lengths}
    order = list(blocks_and_parts(blocks.stage))
    assert len(order) == len(blocks) == blocks.stage.steps * (1 + seed)
    for index, (item, (length, block, part)) in enumerate(zip(blocks, order, strict=True)):
        assert item["input_ids"].shape == item["position_ids"].shape == (1, length) and item["sample_index"] == index
        assert item["input_ids"].dtype == item["position_ids"].dtype == torch.int64
        pairs = walks[length]
        first = blocks.shuffles[0][block] * block_size + part * length
        sequence = zip(item["input_ids"][0].tolist(), item["position_ids"][0].tolist(), strict=True)
        assert list(sequence) == pairs[first : first + length]


def test_no_part_of_a_block_is_trained_on_twice_in_an_epoch(write, build):
    blocks = build(write("a", documents=400)[0], steps=97, batch_size=3, block_size=16, start_block_size=4)
    assert blocks.total_blocks <= blocks.source_blocks[0]
    order = list(blocks_and_parts(blocks.stage))
    assert len(set(order)) == len(order) and [length for length, _, _ in order].count(4) >= 97 * 4
    tokens = sorted(
        token for length, block, part in order for token in range(block * 16 + part * length, block * 16 + (part + 1) * length)
    )
    assert len(set(tokens)) == len(tokens) == blocks.stage.total_tokens
    parts = [(blocks.shuffles[0][block] * 16 + part * length, length) for length, block, part in order]
    stream = blocks.files[0].tokens
    assert all(item["input_ids"][0].tolist() == stream[a : a + n].tolist() for item, (a, n) in zip(blocks, parts, strict=True))


@pytest.mark.parametrize("respect_documents", [True, False])
def test_sequences_start_at_random_positions(write, build, respect_documents):
    source, settings = write("a")[0], {"data": {"respect_documents": respect_documents}, "steps": 200, "start_block_size": 8}
    plain = build(source, **settings)
    moved = build(source, position_range=40, **settings)
    starts = {8: [], 16: []}
    for one, two in zip(plain, moved, strict=True):
        assert torch.equal(one["input_ids"], two["input_ids"])
        (start,) = (two["position_ids"] - one["position_ids"]).unique()
        starts[one["input_ids"].shape[1]].append(int(start))
    for length, positions in starts.items():
        assert min(positions) == 0 and max(positions) == 40 - length, "the last position is used, none beyond"
        assert abs(np.mean(positions) - (40 - length) / 2) < 4 * (40 - length) / 12**0.5 / len(positions) ** 0.5
    again = build(source, position_range=40, **settings)
    assert all(same(again[index], moved[index]) for index in reversed(range(len(moved))))
    tight = build(source, position_range=16, steps=9)
    assert all(same(one, two) for one, two in zip(tight, build(source, steps=9), strict=True)), "there is no room to move"


def test_every_epoch_takes_each_block_once_in_another_order(write, build):
    source, _ = write("a")
    blocks = build(source, steps=260, block_size=13)
    n = blocks.source_blocks[0]
    firsts = [tuple(item["input_ids"].flatten().tolist()) for item in blocks]
    epochs = [firsts[i : i + n] for i in range(0, len(firsts) - n, n)]
    assert len(epochs) > 3 and all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs) and len(set(epochs[0])) == n
    stream = torch.tensor([token for token, _ in walk(write("a")[1], length=1, eos=1, respect_documents=True)])
    assert {tuple(row.tolist()) for row in stream[: n * 13].view(n, 13)} == set(epochs[0]), "nothing but the tail is left out"


def test_the_seed_and_the_number_of_the_source_decide_on_the_order(write, build):
    source, _ = write("a")

    def order(*sources, **stage):
        return [item["input_ids"].flatten().tolist() for item in build(*sources, **stage)]

    assert order(source) == order(source) and order(source, seed=1) != order(source) != order(source, seed=-1)
    assert [Shuffle(50, 0, source)[draw] for source in (0, 1) for draw in range(9)] != [
        Shuffle(50, 0, 0)[draw] for draw in range(9)
    ] * 2


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("seed", range(3))
def test_an_item_is_the_same_whatever_was_asked_before(write, build, seed):
    sources = [write("a", seed, weight=0.6)[0], write("b", seed, 9, weight=0.3)[0], write("c", seed, weight=0.1)[0]]
    settings = {"steps": 37, "batch_size": 5, "start_block_size": 4, "seed": seed}
    blocks = build(*sources, **settings)
    items = list(blocks)
    indices = list(range(len(blocks)))
    random.Random(seed).shuffle(indices)
    again, late = build(*sources, **settings), build(*sources, **settings)
    assert all(same(again[index], items[index]) for index in indices)
    assert all(same(late[index], items[index]) for index in range(101, len(blocks)))
    ranks = [pickle.loads(pickle.dumps(blocks)) for _ in range(2)]
    assert all(same(ranks[index % 2][index], items[index]) for index in range(len(blocks)))
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_items_come_from_the_sources_by_weight(write, build):
    sources = [write("a", weight=2)[0], write("b", documents=10, weight=1)[0]]
    blocks = build(*sources, steps=60)
    of_b = [bool((item["input_ids"] >= 512).any()) for item in blocks]
    assert [sum(of_b[:n]) for n in (3, 30, 60)] == [1, 10, 20]
    facts = blocks.facts()
    assert json.loads(json.dumps(facts)) == facts
    one, two = facts["sources"]
    assert one["source"] == "a.jsonl" and one["weight"] == 2 and one["skipped"] == {} and one["documents"] == 40
    assert two["tokens"] == len(blocks.files[1]) and two["blocks"] == two["tokens"] // 16
    assert one["blocks_used"] == min(40, one["blocks"]) and one["epochs"] == 40 / one["blocks"]
    assert two["blocks_used"] == two["blocks"] < 20 and two["epochs"] == 20 / two["blocks"] > 1


@pytest.mark.parametrize(("steps", "batch"), [(3, 2), (4, 1), (7, 3), (12, 2), (30, 1)])
def test_sequences_grow_at_equal_shares_of_the_tokens(write, build, steps, batch):
    blocks = build(write("a")[0], steps=steps, batch_size=batch, block_size=32, start_block_size=8)
    lengths = [item["input_ids"].shape[1] for item in blocks]
    by_step = lengths[::batch]
    assert lengths == [length for length in by_step for _ in range(batch)], "one length within a step"
    assert by_step == sorted(by_step) and set(by_step) == {8, 16, 32} and len(by_step) == blocks.stage.steps
    shares = [length * lengths.count(length) for length in (8, 16, 32)]
    assert max(shares) - min(shares) < 32 * batch and sum(shares) == blocks.stage.total_tokens <= blocks.stage.tokens


def test_streaming_reads_what_the_budget_takes(write, build):
    sources = [write("a", documents=300, weight=3)[0], write("b", documents=300)[0]]
    blocks = build(*sources, data={"streaming": True}, steps=20)
    assert [15 * 16 <= len(blocks.files[0]) < 15 * 16 + 31, 5 * 16 <= len(blocks.files[1]) < 5 * 16 + 31] == [True, True]
    assert [source["epochs"] <= 1 for source in blocks.facts()["sources"]] == [True, True]
    assert len(list(blocks)) == 20


def test_text_shorter_than_a_block(write, build, tmp_path):
    source, (text,) = write("a", documents=1, longest=9)
    assert len(build(source, block_size=len(text) + 1)) == 20
    message = rf"a\.jsonl: {len(text) + 1} tokens do not fill one block of {len(text) + 2}; give more text"
    with pytest.raises(ValueError, match=message):
        build(write("b")[0], source, block_size=len(text) + 2)
    data = DataConfig(train=[write("b")[0]], held_out=[source], cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=message):
        held_out_blocks(data, len(text) + 2, Letters(), progress=False)


@pytest.mark.parametrize("tokens", [1, 64, 100, 640, 10**6])
def test_held_out_blocks_are_spread_over_each_source(write, tmp_path, tokens):
    (one, texts), (two, _) = write("a", documents=60), write("b", documents=5)
    cache = str(tmp_path / "cache")
    data = DataConfig(train=[write("c")[0]], held_out=[one, two], held_out_tokens=tokens, cache=cache)
    blocks = held_out_blocks(data, 16, Letters(), progress=False)
    pairs = list(walk(texts, length=16, eos=1, respect_documents=True))
    rows = [pairs[i : i + 16] for i in range(0, len(pairs) - 15, 16)]
    items = list(blocks)
    assert [item["sample_index"].item() for item in items] == list(range(len(blocks)))
    assert all(item["input_ids"].shape == (1, 16) for item in items)
    chosen = []
    for item in items:
        pair = list(zip(item["input_ids"][0].tolist(), item["position_ids"][0].tolist(), strict=True))
        if pair[0][0] < 456 and max(token for token, _ in pair) < 456:
            chosen.append(rows.index(pair))
    of_two = len(items) - len(chosen)
    wanted = max(tokens // 2 // 16, 1)
    assert len(chosen) == min(wanted, len(rows)) and of_two <= wanted
    gaps = np.diff(chosen)
    assert (gaps > 0).all() and (len(gaps) == 0 or gaps.max() - gaps.min() <= 1)
    assert chosen[0] == 0 and len(rows) - chosen[-1] <= -(-len(rows) // len(chosen)), "to the end of the text"
    assert held_out_blocks(replace(data, held_out=[]), 16, Letters(), progress=False) is None


def test_text_that_is_both_trained_on_and_held_out(write, tmp_path):
    source, _ = write("a")
    data = DataConfig(train=[source], held_out=[SourceConfig(path=f"{tmp_path}/*.jsonl")], cache=str(tmp_path / "cache"))
    message = r"a\.jsonl is held out and also trained on; take it out of one of the two$"
    with pytest.raises(ValueError, match=message):
        training_blocks(data, StageConfig(tokens=64, block_size=16), Letters(), progress=False)
    with pytest.raises(ValueError, match=message):
        held_out_blocks(data, 16, Letters(), progress=False)
    assert not (tmp_path / "cache").exists()


def test_collate(write, build):
    blocks = build(write("a")[0], data={"respect_documents": False}, steps=4, batch_size=3, start_block_size=8)
    batch = collate([blocks[index] for index in (0, 1, 2)])
    assert set(batch) == {"input_ids", "sample_indices"} and batch["input_ids"].shape == (3, 8)
    assert batch["sample_indices"].tolist() == [0, 1, 2] and batch["sample_indices"].dtype == torch.int64
    assert torch.equal(batch["input_ids"][1:2], blocks[1]["input_ids"])
    blocks = build(write("b")[0], steps=4, batch_size=3)
    items = [blocks[index] for index in (9, 11)]
    batch = collate(items)
    assert torch.equal(batch["position_ids"], torch.cat([item["position_ids"] for item in items]))
    assert batch["sample_indices"].tolist() == [9, 11] and batch["input_ids"].shape == (2, 16)
    loader = torch.utils.data.DataLoader(blocks, batch_size=4, collate_fn=collate)
    assert torch.equal(torch.cat([batch["sample_indices"] for batch in loader]), torch.arange(12))
