"""Recall samples parsed back from their text."""

import random
import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dijiang.common.recall import SHORTEST_WORD, RecallSample, single_token_words
from dijiang.evaluate.quality.recall import chance
from dijiang.evaluate.quality.recall_kinds import RECALL_KINDS, DoesNotFit, generator_of
from dijiang.evaluate.quality.recall_samples import (
    ASKED_ITEMS,
    CITIES,
    CODES,
    CUE,
    ITEMS,
    KEYS,
    PAIRS,
    PIECE,
    SPAN,
    associative_samples,
    copied_span_samples,
    list_samples,
    needle_samples,
)

NEEDLE = re.compile(r"\nThe secret number of (\w+) is (\d{5})\.\n")
QUESTION = re.compile(r"\nThe secret number of (\w+) is (\d{5})$")
LINE = re.compile(r"\s*(\w+) +=\s+(\w+)")


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


@pytest.mark.parametrize("kind", RECALL_KINDS)
def test_samples_follow_the_seed(wordy, kind):
    def made(seed: int) -> list[list[int]]:
        found = generator_of(kind)(wordy, single_token_words(wordy) * 5, length=260, samples=3, seed=seed)
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


# --- several keys and long codes ---

UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
KEYED = {"several keys": (r"secret number", r"\d{5}", KEYS), "long code": ("code", UUID, CODES)}


def keyed(tokenizer, kind: str, **size) -> list[RecallSample]:
    filler = random.Random(9).choices(single_token_words(tokenizer), k=2000)
    return generator_of(kind)(tokenizer, torch.tensor(filler), **size)


@pytest.mark.parametrize(("length", "samples", "seed"), [(190, 1, 0), (401, 5, 1), (900, 4, 2)])
@pytest.mark.parametrize("kind", KEYED)
def test_one_of_several_sentences_is_asked_for(wordy, kind, length, samples, seed):
    what, value, most = KEYED[kind]
    sentence = re.compile(rf"\nThe {what} of (\w+) is ({value})\.\n")
    found = keyed(wordy, kind, length=length, samples=samples, seed=seed)
    assert [sample.depths for sample in found] == [[i / max(samples - 1, 1)] for i in range(samples)]
    for sample in found:
        ids, ((start, end),) = sample.input_ids.tolist(), sample.answers
        assert len(ids) == length == end
        text = wordy.decode(ids)
        stated = sentence.findall(text)
        cities, values = zip(*stated, strict=True)
        assert 2 <= len(stated) <= most and len({*cities}) == len({*values}) == len(stated)
        assert sample.chance == 1 / len(stated) and {*cities} <= {*CITIES}
        asked = re.search(rf"\nThe {what} of (\w+) is ({value})$", text)
        assert asked.groups() in stated and wordy.decode(ids[start:]).strip() == asked[2]
        # the share of the text before the sentence that was asked for, the others left out
        before = text[: text.index(f"{asked[1]} is")]
        hay = len(words_of(sentence.sub(" ", text[: asked.start()])))
        assert len(words_of(sentence.sub(" ", before[: before.rindex("\nThe")]))) == pytest.approx(
            sample.depths[0] * hay, abs=2
        )


def words_of(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize("kind", KEYED)
def test_long_contexts_have_all_sentences_anywhere(wordy, kind):
    what, value, most = KEYED[kind]
    places = []
    for sample in keyed(wordy, kind, length=1500, samples=12, seed=3):
        text = wordy.decode(sample.input_ids)
        stated = [match.start() / len(text) for match in re.finditer(rf"The {what} of \w+ is {value}\.", text)]
        assert len(stated) == most and sample.chance == 1 / most
        places += stated
    assert min(places) < 0.15 and max(places) > 0.75 and len({round(place, 1) for place in places}) >= 8


# --- copied spans ---


@pytest.mark.parametrize(("length", "samples", "seed"), [(110, 1, 0), (150, 3, 1), (512, 5, 2)])
def test_a_span_stands_once_before_and_its_cue_again(wordy, length, samples, seed):
    words = single_token_words(wordy)
    found = copied_span_samples(wordy, list(range(5000, 6000)), length=length, samples=samples, seed=seed)
    for i, sample in enumerate(found):
        ids = sample.input_ids.tolist()
        assert len(ids) == length == sample.answers[-1][1] and sample.answers[0][0] == length - SPAN + CUE
        assert [x for start, end in sample.answers for x in range(start, end)] == list(range(length - SPAN + CUE, length))
        assert {end - start for start, end in sample.answers} == {PIECE}
        span = ids[-SPAN:]
        assert len({*span}) == SPAN and {*span} <= {*words}
        places = [j for j in range(length - SPAN) if ids[j : j + SPAN] == span]
        assert len(places) == 1
        hay = [token for token in ids if token >= 5000]
        assert hay == list(range(hay[0], hay[0] + len(hay)))
        assert sample.depths == [i / max(samples - 1, 1)] * 7 and sample.chance == len(words) ** -4.0
        assert sum(token >= 5000 for token in ids[: places[0]]) == round(sample.depths[0] * len(hay))
        text = wordy.decode([token for token in ids if token < 5000])
        assert len(re.findall(r"\nThe sequence:? ", text)) == 2


# --- lists ---


@pytest.mark.parametrize(("length", "samples", "seed"), [(110, 1, 0), (200, 3, 1), (700, 4, 2)])
def test_items_are_asked_for_by_their_number(wordy, length, samples, seed):
    words = {wordy.decode([index]).strip() for index in single_token_words(wordy)}
    found = list_samples(wordy, list(range(5000, 7000)), length=length, samples=samples, seed=seed)
    for i, sample in enumerate(found):
        hay = [token >= 5000 for token in sample.input_ids.tolist()]
        assert hay.index(False) == round(i / max(samples - 1, 1) * sum(hay))
        text = wordy.decode([token for token in sample.input_ids.tolist() if token < 5000])
        lines = re.findall(r"\n ?Item (\w+) =\s+(\w+)", text)
        items, queries = lines[: len(ITEMS)], lines[len(ITEMS) :]
        assert len(sample.input_ids) == length == sample.answers[-1][1] and len(queries) == ASKED_ITEMS
        assert [number for number, _ in items] == ITEMS
        assert len({word for _, word in items}) == len(ITEMS) and {word for _, word in items} <= words
        assert len({*queries}) == ASKED_ITEMS and {*queries} <= {*items} and sample.chance == 1 / len(ITEMS)
        answers = [wordy.decode(sample.input_ids[start:end]).strip() for start, end in sample.answers]
        assert answers == [word for _, word in queries]
        assert sample.depths == [i / max(samples - 1, 1)] * ASKED_ITEMS


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
    monkeypatch.setattr("dijiang.common.recall.WORDS", 2 * PAIRS)
    message = (
        "^the tokenizer has 64 words of one token and associative recall needs more than 64; leave it out for this model$"
    )
    refused(tmp_path, lambda: associative_samples(wordy, length=500, samples=1, seed=0), message)
    monkeypatch.setattr("dijiang.common.recall.WORDS", 2 * PAIRS + 1)
    (sample,) = associative_samples(wordy, length=500, samples=1, seed=0)
    pairs, _, others = parts(wordy, sample)
    assert len(pairs) == PAIRS and len({*pairs, *pairs.values(), *others.split()} - {"#"}) == 2 * PAIRS + 1


@pytest.mark.parametrize("kind", [kind for kind in RECALL_KINDS if kind != "associative recall"])
def test_what_is_too_short_names_a_length_that_is_enough(wordy, kind):
    def make(length: int) -> list[RecallSample]:
        return generator_of(kind)(wordy, [5] * 900, length=length, samples=1, seed=0)

    with pytest.raises(DoesNotFit, match=r"^length=9 is too short .*; give at least (\d+)$") as caught:
        make(9)
    enough = int(re.search(r"\d+$", str(caught.value))[0])
    assert len(make(enough)[0].input_ids) == enough
    with pytest.raises(DoesNotFit, match="too short"):
        make(enough - 1)


@pytest.mark.parametrize(("kind", "needed"), [("copied span", SPAN), ("list by position", len(ITEMS))])
def test_kinds_made_of_words_need_them(tokenizer, kind, needed):
    with pytest.raises(DoesNotFit, match=f"^the tokenizer has 0 words of one token, and {needed} are needed$"):
        generator_of(kind)(tokenizer, [5] * 900, length=300, samples=1, seed=0)
