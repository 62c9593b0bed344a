"""Samples of recall, contexts whose answers can be known from the text before them, and the words that they are made of."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # making a sample must not take the seconds that importing transformers takes
    import torch
    from transformers import PreTrainedTokenizerBase

WORDS = 1000  # rarer tokens are often parts of words
SHORTEST_WORD = 4  # letters; shorter tokens are often parts of words
SPACES = ("Ġ", "▁")  # how byte-level and sentencepiece vocabularies write the space before a word


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallSample:
    """
    A context whose answers can be known from the text before them.

    Attributes:
        input_ids: (T,) int64, the answers included.
        answers: (start, end) of each answer in input_ids, start >= 1.
        depths: where each answer was first given, from 0 at the beginning of the context to 1 at its end.
        chance: probability of guessing an answer, its form known.
        kind: name of the generator that made it.
    """

    input_ids: torch.Tensor
    answers: list[tuple[int, int]]
    depths: list[float]
    chance: float
    kind: str = ""


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text` without special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def single_token_words(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    The first `WORDS` tokens that are a space and a word in small Latin letters, if such a text turns into them, in the order
    of the vocabulary, which in byte-pair vocabularies begins with the most frequent.
    """
    words = {}
    for token, index in tokenizer.get_vocab().items():
        word = token[1:]
        if token[:1] in SPACES and len(word) >= SHORTEST_WORD and word.isascii() and word.isalpha() and word.islower():
            words[index] = word
    before = encode(tokenizer, "=")
    usable = (index for index in sorted(words) if encode(tokenizer, f"= {words[index]}") == [*before, index])
    return list(islice(usable, WORDS))
