"""
Generators of recall samples: sentences, codes, spans and lists hidden in a text (RULER, arXiv 2404.06654, has most of them),
and multi-query associative recall (Zoology, arXiv 2312.04927).

The sentences and words differ from those of `dijiang.train.data.synthetic_recall`, which would otherwise train on the test.
"""

import random
import uuid
from collections.abc import Callable, Sequence
from itertools import accumulate, chain, islice, takewhile
from typing import NamedTuple

import torch

from dijiang.common.recall import RecallSample, encode, single_token_words

from .recall_kinds import DoesNotFit

Filler = torch.Tensor | Sequence[int]

CITIES = (
    "Paris London Berlin Madrid Rome Vienna Dublin Oslo Prague Athens Moscow Tokyo Delhi Cairo Boston Chicago Denver Houston "
    "Seattle Toronto Sydney Lima Havana Geneva"
).split()
DIGITS = 5
KEYS = 8  # sentences of `several keys`, at most
CODES = 4  # sentences of `long code`, at most
PAIRS = 32
SPAN = 32  # words of a copied span
CUE = 4  # of its words, which the question repeats
PIECE = 4  # words of an answer
ITEMS = "one two three four five six".split()
ASKED_ITEMS = 4


def needle_samples(tokenizer, filler: Filler, *, length: int, samples: int, seed: int) -> list[RecallSample]:
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
        ValueError: if the filler does not fill `length`; `DoesNotFit` if sentence and question do not fit into it.
    """
    rng = random.Random(seed)
    contexts = []
    for depth in even_depths(samples):
        question = f"\nThe secret number of {rng.choice(CITIES)} is"
        answer = f" {rng.randrange(10 ** (DIGITS - 1), 10**DIGITS)}"
        needle, (asked, known) = encode(tokenizer, f"{question}{answer}.\n"), asked_for(tokenizer, question, answer)
        hay = haystack(filler, length - len(needle) - len(asked), length, rng)
        contexts.append(
            RecallSample(
                input_ids=torch.tensor([*hidden(hay, [(depth, needle)]), *asked]),
                answers=[(length - len(asked) + known, length)],
                depths=[depth],
                chance=1 / (9 * 10 ** (DIGITS - 1)),
                kind="needle",
            )
        )
    return contexts


class KeyedForm(NamedTuple):
    """
    Sentences that state values of cities.

    Attributes:
        kind: of recall.
        what: is stated of a city.
        draw: (rng, count) -> values.
        most: sentences of a context.
    """

    kind: str
    what: str
    draw: Callable[[random.Random, int], list[str]]
    most: int


def several_keys_samples(tokenizer, filler: Filler, *, length: int, samples: int, seed: int) -> list[RecallSample]:
    """
    `needle_samples` with sentences of other cities and numbers around the one asked for: `KEYS` in all, fewer in short
    contexts, of which at least half is haystack. Whoever confuses them is right by chance only.
    """
    form = KeyedForm("several keys", "secret number", numbers, KEYS)
    return keyed_samples(tokenizer, filler, form, length=length, samples=samples, seed=seed)


def long_code_samples(tokenizer, filler: Filler, *, length: int, samples: int, seed: int) -> list[RecallSample]:
    """As `several_keys_samples`, with up to `CODES` random UUIDs in place of the numbers."""
    form = KeyedForm("long code", "code", codes, CODES)
    return keyed_samples(tokenizer, filler, form, length=length, samples=samples, seed=seed)


def keyed_samples(tokenizer, filler: Filler, form: KeyedForm, *, length: int, samples: int, seed: int) -> list[RecallSample]:
    """
    Contexts with sentences "The WHAT of CITY is VALUE.", at least two, and the question for one of them. The depths of those
    asked for are spread evenly, the others lie anywhere.
    """
    rng = random.Random(seed)
    contexts = []
    for depth in even_depths(samples):
        values = form.draw(rng, form.most)
        questions = [f"\nThe {form.what} of {city} is" for city in rng.sample(CITIES, form.most)]
        sentences = [encode(tokenizer, f"{question} {value}.\n") for question, value in zip(questions, values, strict=True)]
        asked, known = asked_for(tokenizer, questions[0], f" {values[0]}")
        room = length - len(asked)
        sentences = sentences[: max(2, room // (2 * max(map(len, sentences))))]
        hay = haystack(filler, room - sum(map(len, sentences)), length, rng)
        pieces = [(depth, sentences[0]), *((rng.random(), sentence) for sentence in sentences[1:])]
        contexts.append(
            RecallSample(
                input_ids=torch.tensor([*hidden(hay, pieces), *asked]),
                answers=[(length - len(asked) + known, length)],
                depths=[depth],
                chance=1 / len(sentences),
                kind=form.kind,
            )
        )
    return contexts


def copied_span_samples(tokenizer, filler: Filler, *, length: int, samples: int, seed: int) -> list[RecallSample]:
    """
    Contexts of `length` tokens, each with a line "The sequence:" and `SPAN` random words in its text and, at its end, that
    line again. The words after the first `CUE` are the answers, `PIECE` at a time, since few models copy all of them without
    a slip. Every word is one token. Depths are spread evenly.

    Raises:
        ValueError: as `needle_samples`; `DoesNotFit` also if the tokenizer has too few words.
    """
    words, newline, mark = enough_words(tokenizer, SPAN), encode(tokenizer, "\n"), encode(tokenizer, "\nThe sequence:")
    rng = random.Random(seed)
    contexts = []
    for depth in even_depths(samples):
        line = [*mark, *rng.sample(words, SPAN)]
        hay = haystack(filler, length - 2 * len(line) - len(newline), length, rng)
        starts = range(length - SPAN + CUE, length, PIECE)
        contexts.append(
            RecallSample(
                input_ids=torch.tensor([*hidden(hay, [(depth, [*line, *newline])]), *line]),
                answers=[(start, start + PIECE) for start in starts],
                depths=[depth] * len(starts),
                chance=float(len(words)) ** -PIECE,
                kind="copied span",
            )
        )
    return contexts


def list_samples(tokenizer, filler: Filler, *, length: int, samples: int, seed: int) -> list[RecallSample]:
    """
    Contexts of `length` tokens, each with a list "Item one = WORD", "Item two = WORD" and so on in its text and, at its end,
    `ASKED_ITEMS` of these lines again, in random order. Every word is one token. Depths of the lists are spread evenly.

    Raises:
        ValueError: as `needle_samples`; `DoesNotFit` also if the tokenizer has too few words.
    """
    words, newline = enough_words(tokenizer, len(ITEMS)), encode(tokenizer, "\n")
    questions = [encode(tokenizer, f"Item {number} =") for number in ITEMS]
    rng = random.Random(seed)
    contexts = []
    for depth in even_depths(samples):
        drawn = rng.sample(words, len(ITEMS))
        lines = [[*question, word, *newline] for question, word in zip(questions, drawn, strict=True)]
        asked = rng.sample(lines, ASKED_ITEMS)
        listed, queries = [*newline, *chain(*lines)], list(chain(newline, *asked))[: -len(newline)]
        hay = haystack(filler, length - len(listed) - len(queries), length, rng)
        ends = accumulate(map(len, asked), initial=length - len(queries) + len(newline))
        words_at = [end - len(newline) - 1 for end in islice(ends, 1, None)]
        contexts.append(
            RecallSample(
                input_ids=torch.tensor([*hidden(hay, [(depth, listed)]), *queries]),
                answers=[(at, at + 1) for at in words_at],
                depths=[depth] * ASKED_ITEMS,
                chance=1 / len(ITEMS),
                kind="list by position",
            )
        )
    return contexts


def associative_samples(
    tokenizer, filler: Filler | None = None, *, length: int, samples: int, seed: int, queries: int = 8
) -> list[RecallSample]:
    """
    Contexts of `length` tokens: lines " key = value", a blank line, and then `queries` random ones of these lines again.

    Keys and values are words of one token, none of them used twice. However long the context, it has at most `PAIRS` pairs,
    spread over it at random, so that a longer context means more distance at the same chance level. The other lines are "#"
    and other words. The filler is not used.

    Raises:
        DoesNotFit: if `queries` pairs and their queries do not fit into `length`, or the tokenizer has too few words.
    """
    words = single_token_words(tokenizer)
    equals = encode(tokenizer, " =")
    newline = encode(tokenizer, "\n")
    mark = encode(tokenizer, " #")
    size = 2 + len(equals) + len(newline)
    lines = length // size - queries
    if lines < queries:
        raise DoesNotFit(f"length={length} is too short for {queries} pairs and queries; give at least {2 * queries * size}")
    pairs = min(lines, PAIRS)
    if len(words) <= 2 * pairs:
        raise DoesNotFit(
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
        contexts.append(
            RecallSample(
                input_ids=torch.tensor(ids),
                answers=[(end - 1, end) for end in ends],
                depths=depths,
                chance=1 / pairs,
                kind="associative recall",
            )
        )
    return contexts


# --- parts of contexts ---


def even_depths(samples: int) -> list[float]:
    """Depths from 0 to 1, one for each sample."""
    return [i / max(samples - 1, 1) for i in range(samples)]


def asked_for(tokenizer, question: str, answer: str) -> tuple[list[int], int]:
    """
    Token ids of question and answer, and how many of them come before the answer, which begins where the tokens of the
    question alone end: with the first that they lack, however the tokenizer splits.
    """
    asked = encode(tokenizer, f"{question}{answer}")
    same = zip(asked, encode(tokenizer, question), strict=False)
    return asked, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], same))


def haystack(filler: Filler, room: int, length: int, rng: random.Random) -> list[int]:
    """`room` tokens of the filler from a random place; the errors of `needle_samples`."""
    if room < 0:
        raise DoesNotFit(f"length={length} is too short to hide a sentence in; give at least {length - room}")
    if len(filler) < room:
        raise ValueError(f"the text has {len(filler)} tokens and recall at {length} needs {room} of it; give more text")
    start = rng.randint(0, len(filler) - room)
    part = filler[start : start + room]
    return part.tolist() if isinstance(part, torch.Tensor) else list(part)


def hidden(hay: list[int], pieces: list[tuple[float, list[int]]]) -> list[int]:
    """The haystack with each (depth, token ids) put in at the share `depth` of its tokens; of a tie the first goes first."""
    ids: list[int] = []
    before = 0
    for depth, piece in sorted(pieces, key=lambda pair: round(pair[0] * len(hay))):
        end = round(depth * len(hay))
        ids += hay[before:end] + piece
        before = end
    return ids + hay[before:]


def enough_words(tokenizer, needed: int) -> list[int]:
    """`single_token_words` of the tokenizer, or `DoesNotFit` if they are fewer than `needed`."""
    words = single_token_words(tokenizer)
    if len(words) < needed:
        raise DoesNotFit(f"the tokenizer has {len(words)} words of one token, and {needed} are needed")
    return words


def numbers(rng: random.Random, count: int) -> list[str]:
    """Different numbers of `DIGITS` digits."""
    return [str(number) for number in rng.sample(range(10 ** (DIGITS - 1), 10**DIGITS), count)]


def codes(rng: random.Random, count: int) -> list[str]:
    """Random UUIDs."""
    return [str(uuid.UUID(int=rng.getrandbits(128))) for _ in range(count)]
