"""
Recall from a context made up for it, by its length: a needle in a haystack, and pairs of words that are asked for (multi-query
associative recall, Zoology, arXiv 2312.04927).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice, takewhile

import torch

CITIES = (
    "Paris London Berlin Madrid Rome Vienna Dublin Oslo Prague Athens Moscow Tokyo Delhi Cairo Boston Chicago Denver Houston "
    "Seattle Toronto Sydney Lima Havana Geneva"
).split()
DIGITS = 5
DEPTHS = 5  # buckets of depth in which answers are counted
PAIRS, WORDS, SHORTEST_WORD = 32, 1000, 4  # shorter tokens, in letters, and rarer ones are often parts of words
SPACES = ("Ġ", "▁")  # how byte-level and sentencepiece vocabularies write the space before a word


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallSample:
    """
    A context with answers in it that can be known from what stands before them.

    Attributes:
        input_ids: (T,) int64, the answers included.
        answers: (start, end) of each answer in input_ids, start >= 1.
        depths: where what an answer asks for stands, for each answer: 0 at the beginning of the context, 1 at its end.
        chance: of guessing an answer by one who knows what form it has.
    """

    input_ids: torch.Tensor
    answers: list[tuple[int, int]]
    depths: list[float]
    chance: float


def needle_samples(
    tokenizer, filler: torch.Tensor | Sequence[int], *, length: int, samples: int, seed: int
) -> list[RecallSample]:
    """
    Contexts of `length` tokens, in each of them one sentence that says a number, and at their end the question for it. The
    sentences' depths are spread evenly from the beginning of the first context to the end of the last.

    Args:
        filler: (tokens,) of a text; the haystack of each sample is a part of it that begins at random.

    Raises:
        ValueError: if sentence and question do not go into `length`, or the filler does not fill it.
    """
    rng, filler, found = random.Random(seed), torch.as_tensor(filler).tolist(), []
    for i in range(samples):
        depth = i / max(samples - 1, 1)
        question = f"\nThe secret number of {rng.choice(CITIES)} is"
        answer = f" {rng.randrange(10 ** (DIGITS - 1), 10**DIGITS)}"
        needle, asked = encode(tokenizer, f"{question}{answer}.\n"), encode(tokenizer, f"{question}{answer}")
        room = length - len(needle) - len(asked)
        if room < 0:
            raise ValueError(f"length={length} is too short to hide a sentence in; give at least {length - room}")
        if len(filler) < room:
            raise ValueError(f"the text has {len(filler)} tokens and recall at {length} needs {room} of it; give more text")
        start, before = rng.randint(0, len(filler) - room), round(depth * room)
        hay = filler[start : start + room]
        ids = hay[:before] + needle + hay[before:] + asked
        # the answer begins where the tokens do that the question alone lacks, wherever the tokenizer splits
        same = zip(asked, encode(tokenizer, question), strict=False)
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], same))
        answers = [(length - len(asked) + known, length)]
        chance = 1 / (9 * 10 ** (DIGITS - 1))
        found.append(RecallSample(input_ids=torch.tensor(ids), answers=answers, depths=[depth], chance=chance))
    return found


def associative_samples(tokenizer, *, length: int, samples: int, seed: int, queries: int = 8) -> list[RecallSample]:
    """
    Contexts of `length` tokens: lines " key = value", a blank line, and then `queries` random ones of these lines again. Keys
    and values are words of one token, none of them used twice. However long the context, it has at most `PAIRS` of them,
    spread over it at random, so that length means distance and chance stays the same; the other lines are "#" and other words.

    Raises:
        ValueError: if `queries` pairs and their queries do not go into `length`, or the tokenizer has too few words.
    """
    words = single_token_words(tokenizer)
    equals, newline, mark = (encode(tokenizer, text) for text in (" =", "\n", " #"))
    size = 2 + len(equals) + len(newline)
    lines = length // size - queries
    if lines < queries:
        raise ValueError(f"length={length} is too short for {queries} pairs and queries; give at least {2 * queries * size}")
    pairs = min(lines, PAIRS)
    if len(words) <= 2 * pairs:
        found, wanted = f"{len(words)} words of one token", f"more than {2 * pairs}"
        raise ValueError(f"the tokenizer has {found} and associative recall needs {wanted}; leave it out for this model")
    rng, found = random.Random(seed), []
    for _ in range(samples):
        drawn = rng.sample(words, len(words))
        others = drawn[2 * pairs :]
        rows = [[*mark, *rng.choices(others, k=size - len(mark) - len(newline)), *newline] for _ in range(lines)]
        places = rng.sample(range(lines), pairs)
        for place, key, value in zip(places, drawn[:pairs], drawn[pairs:], strict=False):
            rows[place] = [key, *equals, value, *newline]
        asked = rng.sample(places, queries)
        # the blank line takes what the end saves, where nothing follows the last value
        spare = rng.choices(others, k=length - (lines + queries) * size)
        ids = [*spare, *chain(*rows), *newline, *chain(*(rows[place] for place in asked))][:length]
        ends = [length - i * size for i in reversed(range(queries))]
        depths = [place / max(lines - 1, 1) for place in asked]
        answers = [(end - 1, end) for end in ends]
        found.append(RecallSample(input_ids=torch.tensor(ids), answers=answers, depths=depths, chance=1 / pairs))
    return found


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def single_token_words(tokenizer) -> list[int]:
    """
    The first `WORDS` tokens that are a space and a word in small Latin letters, and that such a text turns into. The order is
    that of the vocabulary, in which merges of byte pairs begin with the commonest.
    """
    words = {}
    for token, index in tokenizer.get_vocab().items():
        word = token[1:]
        if token[:1] in SPACES and len(word) >= SHORTEST_WORD and word.isascii() and word.isalpha() and word.islower():
            words[index] = word
    before = encode(tokenizer, "=")
    found = (index for index in sorted(words) if encode(tokenizer, f"= {words[index]}") == [*before, index])
    return list(islice(found, WORDS))


@torch.no_grad()
def recall_scores(model, samples: list[RecallSample], *, advance: Callable[[int], None] = lambda done: None) -> dict:
    """
    How many answers `model` gives: an answer counts if each of its tokens is the likeliest one after all before it, which is
    what greedy decoding would write.

    Args:
        model: a causal language model that takes `logits_to_keep`; only logits of answers are computed.
        advance: is told how many tokens were read.

    Returns:
        `totals`: right answers, by sample; `weights`: answers; `detail`: `by_depth`, right answers (`totals`) and answers
        (`weights`) in buckets of depth up to `edges`.
    """
    device = next(model.parameters()).device
    by_depth = {"edges": [(i + 1) / DEPTHS for i in range(DEPTHS)], "totals": [0.0] * DEPTHS, "weights": [0.0] * DEPTHS}
    totals, weights = [], []
    for sample in samples:
        places = torch.cat([torch.arange(start, end) for start, end in sample.answers])
        ids = sample.input_ids
        logits = model(input_ids=ids[None].to(device), use_cache=False, logits_to_keep=(places - 1).to(device)).logits
        right = logits[0].argmax(-1).cpu() == ids[places]
        given = [float(part.all()) for part in right.split([end - start for start, end in sample.answers])]
        for depth, correct in zip(sample.depths, given, strict=True):
            bucket = min(int(depth * DEPTHS), DEPTHS - 1)
            by_depth["totals"][bucket] += correct
            by_depth["weights"][bucket] += 1.0
        totals.append(sum(given))
        weights.append(float(len(given)))
        advance(len(ids))
    return {"totals": totals, "weights": weights, "detail": {"by_depth": by_depth}}


def chance(samples: list[RecallSample]) -> float:
    """Share of the answers that guesses would get right."""
    weights = [len(sample.answers) for sample in samples]
    return sum(n * sample.chance for n, sample in zip(weights, samples, strict=True)) / sum(weights)
