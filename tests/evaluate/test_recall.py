"""Recall samples parsed back from their text, and scores against a copier, against generate and against a window by hand."""

import random
import re
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from dijiang.convert import load_source
from dijiang.evaluate.controls import window_only
from dijiang.evaluate.recall import (
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
LINE = re.compile(r"\s*(\w+)\s+=\s+(\w+)\s*")


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


def random_filler(tokenizer, count: int, seed: int = 0) -> list[int]:
    return tokenizer(" " + " ".join(random.Random(seed).choices(made_words(40), k=count)))["input_ids"][:count]


def lines_of(tokenizer, sample: RecallSample) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(key, value) of the context and of the queries behind the blank line."""
    context, queries = tokenizer.decode(sample.input_ids).rsplit("\n\n" if "Ġ" in str(tokenizer.get_vocab()) else "\n \n", 1)
    return tuple([m.groups() for line in part.split("\n") if (m := LINE.fullmatch(line))] for part in (context, queries))


# --- the needle ---


@pytest.mark.parametrize(("length", "samples", "seed"), [(101, 1, 0), (150, 2, 1), (333, 7, 2)])
def test_a_needle_lies_at_its_depth_in_a_part_of_the_filler(tokenizer, length, samples, seed):
    filler = random.Random(9).choices(range(2, 100), k=500)  # characters without line breaks
    found = needle_samples(tokenizer, filler, length=length, samples=samples, seed=seed)
    assert [sample.depths for sample in found] == [[i / max(samples - 1, 1)] for i in range(samples)]
    for sample in found:
        ids = sample.input_ids.tolist()
        text, ((start, end),) = tokenizer.decode(ids), sample.answers
        assert len(ids) == length == end and sample.input_ids.dtype == torch.int64
        (needle,), asked = NEEDLE.finditer(text), QUESTION.search(text)
        assert needle.groups() == asked.groups() and needle[1] in CITIES
        assert tokenizer.decode(ids[start:]) == f" {asked[2]}"
        before = ids[: len(tokenizer(text[: needle.start()])["input_ids"])]
        hay = before + tokenizer(text[needle.end() : asked.start()])["input_ids"]
        hay = [token for token in ids[: -len(tokenizer(asked[0])["input_ids"])]]
        sentence = tokenizer(needle[0])["input_ids"]
        place = next(i for i in range(length) if hay[i : i + len(sentence)] == sentence)
        hay = hay[:place] + hay[place + len(sentence) :]
        assert place == round(sample.depths[0] * len(hay))
        assert any(filler[i : i + len(hay)] == hay for i in range(len(filler)))
        assert sample.chance == 1 / len(range(10000, 100000))
