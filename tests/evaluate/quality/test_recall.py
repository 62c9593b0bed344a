"""Recall samples parsed back from their text, and scores against a copier of limited reach and against generate."""

import random
import re
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dijiang.convert import load_source
from dijiang.evaluate.quality.recall import (
    CITIES,
    DEPTHS,
    PAIRS,
    SHORTEST_WORD,
    RecallSample,
    associative_samples,
    chance,
    needle_samples,
    recall_scores,
    single_token_words,
)

NEEDLE = re.compile(r"\nThe secret number of (\w+) is (\d{5})\.\n")
QUESTION = re.compile(r"\nThe secret number of (\w+) is (\d{5})$")
LINE = re.compile(r"\s*(\w+) +=\s+(\w+)")


def made_words(count: int) -> list[str]:
    rng = random.Random(3)
    return ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(3, 7))) for _ in range(count)]


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def wordy(request):
    """A tokenizer of either kind with some 150 words of one token."""
    byte_level = request.param == "byte-level"
    bpe = Tokenizer(models.BPE())
    if byte_level:
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else list("\n=.0123456789")
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
    sentence = "The secret number of {} is".format(" ".join(CITIES))
    bpe.train_from_iterator([" " + " ".join(made_words(150)), sentence, " Once Upon x1y thé"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")


class Copier(nn.Module):
    """Writes what followed the longest earlier match of the text so far, of what lies up to `reach` tokens back."""

    def __init__(self, reach: int, vocabulary: int = 2000):
        super().__init__()
        self.reach, self.vocabulary, self.anchor = reach, vocabulary, nn.Parameter(torch.zeros(1))

    def follows(self, ids: list[int], end: int) -> int:
        def match(j: int) -> int:
            n = 0
            while n < j and ids[j - 1 - n] == ids[end - 1 - n]:
                n += 1
            return n

        return ids[max(range(max(end - self.reach, 0), end), key=match)]

    def forward(self, input_ids, use_cache, logits_to_keep):
        assert input_ids.shape[0] == 1 and use_cache is False
        ids = input_ids[0].tolist()
        found = torch.tensor([self.follows(ids, place + 1) for place in logits_to_keep.tolist()])
        return type("Output", (), {"logits": nn.functional.one_hot(found, self.vocabulary)[None].float()})


def parts(tokenizer, sample: RecallSample) -> tuple[dict[str, str], list[tuple[str, str]], str]:
    """Of an associative sample's text: values by key, (key, value) of the queries behind the blank line, the other lines."""
    context, queries = re.split(r"\n ?\n", tokenizer.decode(sample.input_ids))
    lines = [(line, LINE.search(line)) for line in context.split("\n")]
    pairs = [found.groups() for _, found in lines if found]
    assert len(dict(pairs)) == len(pairs)
    others = " ".join(LINE.sub("", line) for line, _ in lines)
    return dict(pairs), [LINE.fullmatch(line.rstrip()).groups() for line in queries.split("\n")], others


# --- the needle ---


@pytest.mark.parametrize(("length", "samples", "seed"), [(131, 1, 0), (250, 2, 1), (333, 7, 2)])
def test_a_needle_lies_at_its_depth_in_a_part_of_the_filler(wordy, length, samples, seed):
    filler = random.Random(9).choices(single_token_words(wordy), k=500)
    found = needle_samples(wordy, torch.tensor(filler), length=length, samples=samples, seed=seed)
    assert [sample.depths for sample in found] == [[i / max(samples - 1, 1)] for i in range(samples)]
    for sample in found:
        ids, ((start, end),) = sample.input_ids.tolist(), sample.answers
        assert len(ids) == length == end and sample.input_ids.dtype == torch.int64
        text = wordy.decode(ids)
        (needle,), asked = NEEDLE.finditer(text), QUESTION.search(text)
        assert needle.groups() == asked.groups() and needle[1] in CITIES
        assert wordy.decode(ids[start:]).strip() == asked[2]
        assert wordy.decode(ids[:start]).rstrip() == text[: asked.start(2) - 1].rstrip()
        sentence, question = (wordy(x[0])["input_ids"] for x in (needle, asked))
        rest = ids[: -len(question)]
        place = next(i for i in range(length) if rest[i : i + len(sentence)] == sentence)
        del rest[place : place + len(sentence)]
        assert place == round(sample.depths[0] * len(rest))
        assert any(filler[i : i + len(rest)] == rest for i in range(len(filler)))
        assert sample.chance == 1 / len(range(10000, 100000))


def test_haystacks_begin_anywhere_in_the_filler(wordy):
    filler = list(range(5000, 5400))  # every token once
    samples = needle_samples(wordy, filler, length=300, samples=30, seed=0)
    starts = {min(token for token in sample.input_ids.tolist() if token >= 5000) - 5000 for sample in samples}
    assert len(starts) > 15 and min(starts) < 40 and max(starts) > 80


@pytest.mark.parametrize("merged", [["1", "2"], ["s", "Ġ"], ["2", "."], ["Ġis", "Ġ"]])
def test_an_answer_begins_where_the_question_ends_however_text_is_split(merged):
    """Without a pre-tokenizer merges cross words: what the answer changes is asked for, and a prefix of the text is given."""
    vocabulary = {token: i for i, token in enumerate([*pre_tokenizers.ByteLevel.alphabet(), "Ġi", "Ġis"])}
    vocabulary.setdefault("".join(merged), len(vocabulary))
    bpe = Tokenizer(models.BPE(vocabulary, [("Ġ", "i"), ("Ġi", "s"), tuple(merged)]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    split = PreTrainedTokenizerFast(tokenizer_object=bpe)
    for sample in needle_samples(split, [5] * 300, length=200, samples=4, seed=0):
        ((start, end),) = sample.answers
        asked, answered = split.decode(sample.input_ids[:start]), split.decode(sample.input_ids[start:end])
        found = QUESTION.search(asked + answered)
        assert answered in (f" {found[2]}", f"s {found[2]}", f" is {found[2]}")
        assert split(found[0])["input_ids"] == sample.input_ids[-len(split(found[0])["input_ids"]) :].tolist()


@pytest.mark.parametrize("kind", ["needle", "associative"])
def test_samples_follow_the_seed(wordy, kind):
    def made(seed: int) -> list[list[int]]:
        options = {"length": 200, "samples": 3, "seed": seed}
        filler = single_token_words(wordy) * 5
        found = needle_samples(wordy, filler, **options) if kind == "needle" else associative_samples(wordy, **options)
        return [sample.input_ids.tolist() for sample in found]

    assert made(0) == made(0)
    drawn = made(0) + made(1)
    assert all(drawn[i] != drawn[j] for i in range(6) for j in range(i))


# --- associative recall ---


@pytest.mark.parametrize(
    ("length", "queries", "seed"), [(71, 5, 0), (96, 8, 1), (97, 3, 2), (98, 8, 3), (201, 8, 4), (510, 11, 5)]
)
def test_queries_repeat_pairs_of_words(wordy, length, queries, seed):
    words = {wordy.decode([index]).strip() for index in single_token_words(wordy)}
    for sample in associative_samples(wordy, length=length, samples=3, seed=seed, queries=queries):
        ids = sample.input_ids.tolist()
        pairs, asked, others = parts(wordy, sample)
        assert len(ids) == length and len(sample.answers) == len(sample.depths) == queries == len(set(asked))
        assert len({*pairs, *pairs.values()}) == 2 * len(pairs) and {*pairs, *pairs.values()} <= words
        assert not {*pairs, *pairs.values()} & set(others.split()) and set(others.split()) <= words | {"#"}
        assert [(wordy.decode(ids[start:end]).strip()) for start, end in sample.answers] == [pairs[key] for key, _ in asked]
        assert [value for _, value in asked] == [pairs[key] for key, _ in asked]
        assert sample.chance == 1 / len(pairs) and len(pairs) <= PAIRS
        count = wordy.decode(ids[: sample.answers[0][0]]).count("\n") - 1
        places = [wordy.decode(ids[: ids.index(ids[start])]).count("\n") for start, _ in sample.answers]
        assert sample.depths == [place / (count - 1) for place in places] and max(places) < count


def test_long_contexts_have_no_more_pairs_and_ask_for_them_from_everywhere(wordy):
    samples = associative_samples(wordy, length=1003, samples=40, seed=0)
    assert {len(parts(wordy, sample)[0]) for sample in samples[:5]} == {PAIRS} and chance(samples) == 1 / PAIRS
    depths = torch.tensor([depth for sample in samples for depth in sample.depths])
    counts = torch.histc(depths, bins=4, min=0, max=1)
    assert (counts - 80).abs().max() < 4 * (320 * 0.25 * 0.75) ** 0.5
    # and not in the order in which they stood
    assert sum(sample.depths == sorted(sample.depths) for sample in samples) <= 1


def test_words_are_all_that_the_tokenizer_keeps_whole(wordy):
    def kept(index: int) -> bool:
        ids = [*wordy("=")["input_ids"], index]
        text = wordy.decode(ids)
        return re.fullmatch(rf"= [a-z]{{{SHORTEST_WORD},}}", text) is not None and wordy(text)["input_ids"] == ids

    found = single_token_words(wordy)
    assert found == [index for index in range(len(wordy)) if kept(index)] and len(found) > 2 * PAIRS


def test_tokens_that_no_text_becomes_are_no_words():
    letters = {token: i for i, token in enumerate([*"Ġ=abcd", "Ġa", "Ġab", "Ġabc", "Ġabcd", "Ġdcba"])}
    bpe = Tokenizer(models.BPE(letters, [("Ġ", "a"), ("Ġa", "b"), ("Ġab", "c"), ("Ġabc", "d")]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    assert single_token_words(PreTrainedTokenizerFast(tokenizer_object=bpe)) == [letters["Ġabcd"]]


# --- scores ---


@pytest.mark.parametrize("reach", [10_000, 150, 60, 20])
@pytest.mark.parametrize("kind", ["needle", "associative"])
def test_a_copier_finds_what_is_in_its_reach(wordy, kind, reach):
    options = {"length": 260, "samples": 9, "seed": reach}
    filler = random.Random(1).choices(single_token_words(wordy), k=900)
    samples = needle_samples(wordy, filler, **options) if kind == "needle" else associative_samples(wordy, **options)
    expected, right, asked = [], [0.0] * DEPTHS, [0.0] * DEPTHS
    for sample in samples:
        ids, found = sample.input_ids.tolist(), []
        for (start, end), depth in zip(sample.answers, sample.depths, strict=True):
            first = next(i for i in range(start) if ids[i : i + end - start] == ids[start:end])
            found.append(start - first <= reach)
            bucket = sum(depth >= edge for edge in (0.2, 0.4, 0.6, 0.8))
            right[bucket] += found[-1]
            asked[bucket] += 1
        expected.append(float(sum(found)))
    read = []
    scores = recall_scores(Copier(reach), samples, advance=read.append)
    assert scores["totals"] == expected and scores["weights"] == [float(len(sample.answers)) for sample in samples]
    assert scores["detail"]["by_depth"] == {"edges": [0.2, 0.4, 0.6, 0.8, 1.0], "totals": right, "weights": asked}
    assert read == [260] * 9
    assert (sum(expected) == sum(asked)) == (reach == 10_000) and sum(expected) > 0


@pytest.fixture(params=["teacher", "student", "transformers"])
def model(pair, request):
    if request.param == "transformers":
        return AutoModelForCausalLM.from_pretrained(pair.teacher).eval()
    return load_source(pair.teacher if request.param == "teacher" else pair.checkpoint)[0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_right_is_what_greedy_decoding_writes(model, seed):
    """Answers written by `generate`, then each with one token changed."""
    rng = torch.Generator().manual_seed(seed)
    ids, answers = torch.empty(1, 0, dtype=torch.long), []
    for gap, size in ((1, 2), (13, 1), (9, 4)):
        ids = torch.cat((ids, torch.randint(2, 320, (1, gap), generator=rng)), dim=1)
        start, options = ids.shape[1], {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        ids = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=size, **options)
        answers.append((start, start + size))
    sample = RecallSample(input_ids=ids[0], answers=answers, depths=[0.0, 0.5, 1.0], chance=0.1)
    rows = []
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:-1].numel()))
    assert recall_scores(model, [sample])["totals"] == [3.0]
    handle.remove()
    assert rows == [7]  # logits of the answers alone
    for index, (start, end) in enumerate(answers):
        for place in range(start, end):
            changed = ids[0].clone()
            changed[place] = (changed[place] + 1) % 320
            only = replace(sample, input_ids=changed, answers=[(start, end)], depths=[sample.depths[index]])
            assert recall_scores(model, [only])["totals"] == [0.0]


def test_chance_counts_every_answer_alike():
    samples = [
        RecallSample(input_ids=torch.zeros(9), answers=[(1, 2)] * n, depths=[0.0] * n, chance=p)
        for n, p in ((1, 0.5), (3, 0.1))
    ]
    assert chance(samples) == pytest.approx((0.5 + 0.1 + 0.1 + 0.1) / 4)


# --- refusals ---


@pytest.mark.parametrize("samples", [1, 4])
def test_what_does_not_fit_is_refused(wordy, refused, tmp_path, samples):
    def needle(length, filler=900):
        return needle_samples(wordy, [5] * filler, length=length, samples=samples, seed=0)

    def pairs(length):
        return associative_samples(wordy, length=length, samples=samples, seed=0, queries=8)

    for make in (needle, pairs):
        message = r"length=9 is too short .*; give at least (\d+)$"
        refused(tmp_path, lambda make=make: make(9), message)
        with pytest.raises(ValueError, match=message) as caught:
            make(9)
        enough = int(re.search(message, str(caught.value))[1])
        assert all(len(sample.input_ids) == enough + 60 for sample in make(enough + 60))
        if samples == 1 or make is pairs:  # other sentences may be longer
            assert len(make(enough)[0].input_ids) == enough
            with pytest.raises(ValueError, match="too short"):
                make(enough - 1)
    refused(
        tmp_path, lambda: needle(500, filler=20), r"^the text has 20 tokens and recall at 500 needs \d+ of it; give more text$"
    )


def test_a_tokenizer_without_words_is_refused(tokenizer, refused, tmp_path):
    message = "^the tokenizer has 0 words of one token and associative recall needs more than 64; leave it out for this model$"
    refused(tmp_path, lambda: associative_samples(tokenizer, length=400, samples=2, seed=0), message)


def test_words_for_the_pairs_and_one_more_are_enough(wordy, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("dijiang.evaluate.quality.recall.WORDS", 2 * PAIRS)
    message = (
        "^the tokenizer has 64 words of one token and associative recall needs more than 64; leave it out for this model$"
    )
    refused(tmp_path, lambda: associative_samples(wordy, length=500, samples=1, seed=0), message)
    monkeypatch.setattr("dijiang.evaluate.quality.recall.WORDS", 2 * PAIRS + 1)
    (sample,) = associative_samples(wordy, length=500, samples=1, seed=0)
    pairs, _, others = parts(wordy, sample)
    assert len(pairs) == PAIRS and len({*pairs, *pairs.values(), *others.split()} - {"#"}) == 2 * PAIRS + 1
