"""
Made-up samples of recall to select heads by, to fit scores on and to train on.

Their words and their phrases are not those of the evaluation, so that whoever learns from them is not measured on what it
learnt by heart: the words leave out the evaluation's (frequent words of one token), and a test compares the phrases.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING

import torch

from dijiang.common.recall import RecallSample, encode, single_token_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARY = (
    "badger beaver bison camel cheetah cobra cricket donkey falcon ferret gazelle gibbon hamster heron hornet jackal "
    "jaguar lemur leopard lizard llama lobster magpie moose otter panther parrot pelican penguin pigeon puffin rabbit "
    "raccoon raven salmon sparrow squid squirrel stork swallow tiger toad trout turtle walrus weasel whale zebra acorn "
    "almond apricot artichoke basil beet blackberry cabbage carrot cashew celery cherry chestnut cinnamon clove coconut "
    "cranberry cucumber eggplant fennel fig garlic ginger grape hazelnut lemon lentil lettuce mango melon mint mushroom "
    "mustard nutmeg olive onion oregano papaya parsley peach peanut pear pepper pineapple plum pumpkin radish raisin "
    "rhubarb saffron sesame spinach thyme tomato turnip vanilla walnut amber bronze cedar copper coral cotton crystal "
    "diamond emerald flint granite ivory jade leather linen marble maple onyx opal pearl pewter quartz ruby sapphire "
    "satin silk slate timber topaz velvet willow anchor anvil balcony banjo barrel basket blanket bottle bucket candle "
    "canoe carpet chisel clarinet compass cradle curtain dagger drum easel ferry fiddle flute guitar hammer harp helmet "
    "hinge kettle ladder lantern mandolin mirror oar paddle pillow piano plow pulley raft razor saddle scarf sickle "
    "sieve spoon statue tambourine thimble trumpet tunnel umbrella vase violin wagon wheel whistle zipper"
).split()
FEWEST_WORDS = 64  # that a tokenizer must be able to write
HEX, LETTERS = "0123456789abcdef", "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
RECORDS = ("- {key}: {value}", "{key} -> {value}", "The keeper of {key} is {value}.", "| {key} | {value} |", "{key}\t{value}")
PASSKEYS = ("Open sesame for the {key}: {value}.", "To enter the {key}, say {value}.", "({key} passphrase {value})")
CODES = ("Crate {key} bears the label {value};", "serial[{key}] {value}", "{key}'s parcel went out as {value}.")
LISTS = ("({number}) {value}", "No. {number} - {value}", "{number}/ {value}")
CUES = ("<{key}> ", "Quote from {key}:\n", "~~{key}~~ ")
MOST_ROWS = 32
MOST_ROWS_OF_A_TABLE = 64
MOST_CODES = 6
EARLY = 2  # words of a repeat that nobody could know yet


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """
    What a kind makes of a context, before filler is put around it.

    Attributes:
        statements: token ids of each part that gives something to remember, in the order of the text.
        asked: token ids of the text at the end, which asks and answers.
        answers: (start, end) of each answer in `asked`.
        sources: index of the statement that gives each answer.
        chance: probability of guessing an answer.
        scattered: whether filler goes between the statements, or before and after all of them.
        words: whether random words take the place of the filler.
    """

    statements: list[list[int]]
    asked: list[int]
    answers: list[tuple[int, int]]
    sources: list[int]
    chance: float
    scattered: bool = True
    words: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """
    What samples are made of.

    Attributes:
        tokenizer: of the models.
        words: that the tokenizer can write and the evaluation does not use.
        filler: token ids of a text.
        length: tokens of a context.
        rng: the source of chance.
    """

    tokenizer: PreTrainedTokenizerBase
    words: list[str]
    filler: list[int]
    length: int
    rng: random.Random

    def lines(self, template: str, rows: Sequence[tuple[str, str]], queries: Sequence[int], chance: float, **kind) -> Draft:
        """The draft that states `rows` of keys and values by `template`, a line each, and asks for the rows `queries`."""
        scattered = kind.setdefault("scattered", True)
        statements = []
        for i, (key, value) in enumerate(rows):
            before = "\n" if scattered or i == 0 else ""
            statements.append(encode(self.tokenizer, f"{before}{fill(template, key, value)}\n"))
        asked = encode(self.tokenizer, "\n")
        answers = []
        for row in queries:
            ids, start = self.ask(template, *rows[row])
            # the rest of the template separates the questions
            rest = [] if row == queries[-1] else encode(self.tokenizer, template.partition("{value}")[2] + "\n")
            answers.append((len(asked) + start, len(asked) + len(ids)))
            asked += ids + rest
        return Draft(statements=statements, asked=asked, answers=answers, sources=list(queries), chance=chance, **kind)

    def ask(self, template: str, key: str, value: str) -> tuple[list[int], int]:
        """
        Token ids of the template up to the value's end, and where in them the value begins: at the first token that the
        question alone lacks, because a tokenizer may merge a space with what follows.
        """
        question = fill(template.partition("{value}")[0], key, "")
        asked, alone = encode(self.tokenizer, question + value), encode(self.tokenizer, question.rstrip(" "))
        same = takewhile(lambda pair: pair[0] == pair[1], zip(asked, alone, strict=False))
        return asked, sum(1 for _ in same)

    def random_words(self, room: int) -> list[int]:
        """At least `room` tokens of random words, seven to a line."""
        ids: list[int] = []
        while len(ids) < room:
            ids += encode(self.tokenizer, " " + " ".join(self.rng.choices(self.words, k=7)) + "\n")
        return ids

    def most_rows(self, template: str) -> int:
        """Rows of this template that three fifths of a context have room for."""
        longest = max(self.words, key=lambda word: len(encode(self.tokenizer, word)))
        return self.length * 3 // 5 // len(encode(self.tokenizer, f"\n{fill(template, longest, longest)}\n"))


def fill(template: str, key: str, value: str) -> str:
    return template.replace("{key}", key).replace("{number}", key).replace("{value}", value)


def passkey(material: Material) -> Draft:
    """One phrase of two to four words, hidden in filler."""
    rng, words = material.rng, material.words
    count = rng.randint(2, 4)
    value = " ".join(rng.sample(words, count))
    return material.lines(rng.choice(PASSKEYS), [(rng.choice(words), value)], [0], len(words) ** -count)


def records(material: Material) -> Draft:
    """Rows of two columns, a word or a number by a word, in text or random words; a quarter is asked for by first column."""
    rng, words = material.rng, material.words
    template = rng.choice(RECORDS)
    most = min(material.most_rows(template), MOST_ROWS)
    count = rng.randint(max(most // 3, 1), max(most, 1))
    drawn = rng.sample(words, 2 * count)
    numbers = rng.random() < 0.25
    values = [str(rng.randrange(100, 10_000)) for _ in range(count)] if numbers else drawn[count:]
    queries = rng.sample(range(count), max(count // 4, 1))
    rows = list(zip(drawn[:count], values, strict=True))
    layout = {"scattered": rng.random() < 0.5, "words": rng.random() < 0.5}
    return material.lines(template, rows, queries, 1 / count, **layout)


def table(material: Material) -> Draft:
    """Rows of two columns without filler between them, as many as fit, of which a half is asked for again."""
    rng = material.rng
    template = rng.choice(RECORDS)
    drawn = rng.sample(material.words, min(2 * MOST_ROWS_OF_A_TABLE, len(material.words)))
    rows: list[tuple[str, str]] = []
    room = material.length - len(encode(material.tokenizer, "\n\n"))
    for row in zip(drawn[::2], drawn[1::2], strict=False):
        # a row costs once for itself and half for its question
        room -= len(encode(material.tokenizer, fill(template, *row) + "\n")) * 3 // 2 + 1
        if room < 0:
            break
        rows.append(row)
    queries = rng.sample(range(len(rows)), max(len(rows) // 2, 1))
    return material.lines(template, rows, queries, 1 / len(rows), scattered=False)


def positions(material: Material) -> Draft:
    """A numbered list, of which a quarter is asked for by number."""
    rng = material.rng
    template = rng.choice(LISTS)
    count = max(min(material.most_rows(template), MOST_ROWS), 1)
    first = rng.randint(1, 60)
    rows = [(str(first + i), word) for i, word in enumerate(rng.sample(material.words, count))]
    queries = rng.sample(range(count), max(count // 4, 1))
    return material.lines(template, rows, queries, 1 / count, scattered=False)


def span(material: Material) -> Draft:
    """A stretch of 16 to 32 tokens of the filler, which appears again after the cue that came before it."""
    rng, filler = material.rng, material.filler
    size = min(rng.randint(16, 32), material.length // 4, len(filler))
    start = rng.randint(0, len(filler) - size)
    copied = filler[start : start + size]
    cue = encode(material.tokenizer, "\n" + fill(rng.choice(CUES), rng.choice(material.words), ""))
    end = encode(material.tokenizer, "\n")
    answers = [(len(cue), len(cue) + size)]
    return Draft(statements=[[*cue, *copied, *end]], asked=[*cue, *copied], answers=answers, sources=[0], chance=0.0)


def repeats(material: Material) -> Draft:
    """A sequence of random words, and after filler the same sequence again."""
    rng, words = material.rng, material.words
    sequence = [encode(material.tokenizer, " " + word) for word in rng.choices(words, k=MOST_ROWS)]
    while sum(map(len, sequence)) > material.length // 3:
        sequence.pop()
    ids = [token for word in sequence for token in word]
    answers, at = [], 0
    for i, word in enumerate(sequence):
        answers += [(at, at + len(word))] if i >= EARLY else []
        at += len(word)
    return Draft(statements=[ids], asked=ids, answers=answers, sources=[0] * len(answers), chance=1 / len(words))


def codes(material: Material) -> Draft:
    """One long code of letters and digits, asked for among others of its kind."""
    rng = material.rng
    template, alphabet, size = rng.choice(CODES), rng.choice((HEX, LETTERS)), rng.choice((8, 12, 16))
    cost = len(encode(material.tokenizer, f"\n{template}{alphabet[:size]}\n"))
    count = max(min(material.length // 2 // cost, MOST_CODES), 1)
    rows = [(word, "".join(rng.choices(alphabet, k=size))) for word in rng.sample(material.words, count)]
    return material.lines(template, rows, [rng.randrange(count)], len(alphabet) ** -size)


KINDS: dict[str, Callable[[Material], Draft]] = {
    "passkey": passkey,
    "records": records,
    "table": table,
    "positions": positions,
    "span": span,
    "repeats": repeats,
    "codes": codes,
}


def recall_samples(
    tokenizer: PreTrainedTokenizerBase,
    filler: torch.Tensor | Sequence[int],
    *,
    kinds: Sequence[str] = tuple(KINDS),
    length: int,
    samples: int,
    seed: int,
) -> list[RecallSample]:
    """
    Contexts of exactly `length` tokens, the kinds in turn. What is asked for lies anywhere before the questions, at random.

    Args:
        tokenizer: the tokenizer of the models.
        filler: (tokens,) of a text; each sample takes a part of it that begins at random.
        kinds: names in `KINDS`.
        length: tokens of a context, the answers included.
        samples: number of contexts.
        seed: of everything drawn; the same seed gives the same samples.

    Raises:
        ValueError: on an unknown kind, a tokenizer that cannot write the words, a length that the statements and questions
            do not fit into, or a filler shorter than what they leave.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"no kind of recall is called {unknown[0]}; choose from {', '.join(KINDS)}")
    words = own_words(tokenizer)
    if len(words) < FEWEST_WORDS:
        raise ValueError(f"the tokenizer can write {len(words)} of the words of recall samples, which need {FEWEST_WORDS}")
    rng = random.Random(seed)
    ids = torch.as_tensor(filler).tolist()
    material = Material(tokenizer=tokenizer, words=words, filler=ids, length=length, rng=rng)
    return [assemble(material, kinds[i % len(kinds)]) for i in range(samples)]


@lru_cache(maxsize=4)
def own_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The words of `VOCABULARY` that `tokenizer` writes and reads back, without those that the evaluation draws from."""
    taken = {tokenizer.decode([index]).strip() for index in single_token_words(tokenizer)}
    return [word for word in VOCABULARY if word not in taken and tokenizer.decode(encode(tokenizer, word)).strip() == word]


def assemble(material: Material, kind: str) -> RecallSample:
    """One context of `kind`: filler with the statements in it, and the questions at the end."""
    draft = KINDS[kind](material)
    rng, length = material.rng, material.length
    room = length - len(draft.asked) - sum(map(len, draft.statements))
    if room < 0:
        raise ValueError(f"length={length} is too short for a sample of {kind}; give at least {length - room}")
    filler = material.random_words(room) if draft.words else material.filler
    if len(filler) < room:
        raise ValueError(f"the text has {len(filler)} tokens and {kind} at {length} needs {room}; give more text")
    start = rng.randint(0, len(filler) - room)
    hay = filler[start : start + room]
    count = len(draft.statements)
    cuts = sorted(rng.randint(0, room) for _ in range(count)) if draft.scattered else [rng.randint(0, room)] * count
    ids: list[int] = []
    depths, before = [], 0
    for statement, cut in zip(draft.statements, cuts, strict=True):
        ids += hay[before:cut]
        depths.append(len(ids) / max(length - len(draft.asked) - len(statement), 1))
        ids += statement
        before = cut
    ids += hay[before:]
    answers = [(len(ids) + first, len(ids) + last) for first, last in draft.answers]
    ids += draft.asked
    return RecallSample(
        input_ids=torch.tensor(ids),
        answers=answers,
        depths=[depths[source] for source in draft.sources],
        chance=draft.chance,
        kind=kind,
    )
