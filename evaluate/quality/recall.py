"""
Recall from made-up contexts, by their length: a needle in a haystack, and multi-query associative recall (Zoology,
arXiv 2312.04927).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, takewhile

import torch

from .task_base import Task, TaskInputs, hash_tokens

ASSOCIATIVE = "associative recall"
NEEDLE = "needle"
CITIES = (
    "Paris London Berlin Madrid Rome Vienna Dublin Oslo Prague Athens Moscow Tokyo Delhi Cairo Boston Chicago Denver Houston "
    "Seattle Toronto Sydney Lima Havana Geneva"
).split()
DIGITS = 5
DEPTHS = 5  # buckets of depth in which answers are counted
PAIRS = 32
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
    """

    input_ids: torch.Tensor
    answers: list[tuple[int, int]]
    depths: list[float]
    chance: float


def recall_tasks(inputs: TaskInputs) -> list[Task]:
    """Both kinds of recall at each length; associative recall only if the tokenizer has enough words for it."""
    config, tokenizer = inputs.config, inputs.tokenizer
    kinds = [NEEDLE]
    if len(single_token_words(tokenizer)) > 2 * PAIRS:
        kinds.append(ASSOCIATIVE)
    else:
        inputs.left_out[ASSOCIATIVE] = f"the tokenizer has no {2 * PAIRS} words of one token to make pairs of"
    _, haystack = inputs.first_text
    samples_of = {NEEDLE: partial(needle_samples, tokenizer, haystack), ASSOCIATIVE: partial(associative_samples, tokenizer)}
    sizes = [{"length": x, "samples": config.recall_samples, "seed": config.seed} for x in config.recall_lengths]
    return [recall_task(kind, samples_of[kind](**size), size) for kind in kinds for size in sizes]


def recall_task(kind: str, samples: list[RecallSample], size: dict[str, int]) -> Task:
    """The task of one kind and length; `size` are the arguments that the samples were made with."""
    return Task(
        kind="recall",
        name=f"{kind}, {size['length']:,} tokens",
        metric="accuracy",
        floor=chance(samples),
        settings={"kind": kind, **size, "hash": hash_tokens(*(sample.input_ids for sample in samples))},
        cost=sum(len(sample.input_ids) for sample in samples),
        run=lambda model, reference, advance: recall_scores(model, samples, advance=advance),
    )


def needle_samples(
    tokenizer, filler: torch.Tensor | Sequence[int], *, length: int, samples: int, seed: int
) -> list[RecallSample]:
    """
    Contexts of `length` tokens, each with one sentence that states a number and, at its end, the question for it. The depths
    of the sentences are spread evenly, from the beginning of the first context to the end of the last.

    Args:
        tokenizer: the tokenizer of the models.
        filler: (tokens,) of a text; the haystack of each sample is a part of it that begins at random.
        length: tokens of a context.
        samples: number of contexts.
        seed: seed of cities, numbers and haystacks.

    Raises:
        ValueError: if sentence and question do not fit into `length`, or the filler does not fill it.
    """
    rng = random.Random(seed)
    filler = torch.as_tensor(filler).tolist()
    contexts = []
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
        # where the answer begins depends on how the tokenizer splits: at the first token that the question alone lacks
        same = zip(asked, encode(tokenizer, question), strict=False)
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], same))
        answers = [(length - len(asked) + known, length)]
        guess = 1 / (9 * 10 ** (DIGITS - 1))
        contexts.append(RecallSample(input_ids=torch.tensor(ids), answers=answers, depths=[depth], chance=guess))
    return contexts


def associative_samples(tokenizer, *, length: int, samples: int, seed: int, queries: int = 8) -> list[RecallSample]:
    """
    Contexts of `length` tokens: lines " key = value", a blank line, and then `queries` random ones of these lines again.

    Keys and values are words of one token, none of them used twice. However long the context, it has at most `PAIRS` pairs,
    spread over it at random, so that a longer context means more distance at the same chance level. The other lines are "#"
    and other words.

    Raises:
        ValueError: if `queries` pairs and their queries do not fit into `length`, or the tokenizer has too few words.
    """
    words = single_token_words(tokenizer)
    equals = encode(tokenizer, " =")
    newline = encode(tokenizer, "\n")
    mark = encode(tokenizer, " #")
    size = 2 + len(equals) + len(newline)
    lines = length // size - queries
    if lines < queries:
        raise ValueError(f"length={length} is too short for {queries} pairs and queries; give at least {2 * queries * size}")
    pairs = min(lines, PAIRS)
    if len(words) <= 2 * pairs:
        raise ValueError(
            f"the tokenizer has {len(words)} words of one token and associative recall needs more than {2 * pairs}; "
            "leave it out for this model"
        )
    rng = random.Random(seed)
    contexts = []
    for _ in range(samples):
        drawn = rng.sample(words, len(words))
        others = drawn[2 * pairs :]
        rows = [[*mark, *rng.choices(others, k=size - len(mark) - len(newline)), *newline] for _ in range(lines)]
        pair_rows = rng.sample(range(lines), pairs)
        for row, key, value in zip(pair_rows, drawn[:pairs], drawn[pairs:], strict=False):
            rows[row] = [key, *equals, value, *newline]
        asked = rng.sample(pair_rows, queries)
        # the last line has no newline, so there is room for the blank line
        spare = rng.choices(others, k=length - (lines + queries) * size)
        ids = [*spare, *chain(*rows), *newline, *chain(*(rows[row] for row in asked))][:length]
        ends = [length - i * size for i in reversed(range(queries))]
        depths = [row / max(lines - 1, 1) for row in asked]
        answers = [(end - 1, end) for end in ends]
        contexts.append(RecallSample(input_ids=torch.tensor(ids), answers=answers, depths=depths, chance=1 / pairs))
    return contexts


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def single_token_words(tokenizer) -> list[int]:
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


@torch.no_grad()
def recall_scores(model, samples: list[RecallSample], *, advance: Callable[[int], None] = lambda done: None) -> dict:
    """
    Count the answers that `model` gives: an answer counts if each of its tokens is the likeliest one after the text before it,
    which greedy decoding would write.

    Args:
        model: a causal language model that takes `logits_to_keep`; only logits of answers are computed.
        samples: the contexts.
        advance: called with the number of tokens read since the last call.

    Returns:
        `totals`: right answers, by sample; `weights`: answers; `detail`: `by_depth`, right answers (`totals`) and answers
        (`weights`) in buckets of depth up to `edges`.
    """
    device = next(model.parameters()).device
    by_depth = {"edges": [(i + 1) / DEPTHS for i in range(DEPTHS)], "totals": [0.0] * DEPTHS, "weights": [0.0] * DEPTHS}
    totals, weights = [], []
    for sample in samples:
        positions = torch.cat([torch.arange(start, end) for start, end in sample.answers])
        ids = sample.input_ids
        logits = model(input_ids=ids[None].to(device), use_cache=False, logits_to_keep=(positions - 1).to(device)).logits
        right = logits[0].argmax(-1).cpu() == ids[positions]
        answered = [float(part.all()) for part in right.split([end - start for start, end in sample.answers])]
        for depth, correct in zip(sample.depths, answered, strict=True):
            bucket = min(int(depth * DEPTHS), DEPTHS - 1)
            by_depth["totals"][bucket] += correct
            by_depth["weights"][bucket] += 1.0
        totals.append(sum(answered))
        weights.append(float(len(answered)))
        advance(len(ids))
    return {"totals": totals, "weights": weights, "detail": {"by_depth": by_depth}}


def chance(samples: list[RecallSample]) -> float:
    """Share of the answers that guesses would get right: the chance level."""
    weights = [len(sample.answers) for sample in samples]
    return sum(n * sample.chance for n, sample in zip(weights, samples, strict=True)) / sum(weights)
