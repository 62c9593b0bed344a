"""Synthetic recall: samples parsed back from their text, and words and phrases that the evaluation does not have."""

import ast
import random
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dijiang import evaluate
from dijiang.common.recall import RecallSample, encode, single_token_words
from dijiang.train.data import synthetic_recall
from dijiang.train.data.synthetic_recall import (
    CODES,
    CUES,
    KINDS,
    LISTS,
    PASSKEYS,
    RECORDS,
    VOCABULARY,
    own_words,
    recall_samples,
)

ROWS = {"passkey": PASSKEYS, "records": RECORDS, "positions": LISTS, "codes": CODES}


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def wordy(request):
    """A tokenizer of either kind that has some of the words as one token."""
    byte_level = request.param == "byte-level"
    bpe = Tokenizer(models.BPE())
    if byte_level:
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else list(map(chr, range(128)))
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([" ".join(VOCABULARY[:70]), "often ever very with them " * 20] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")


@pytest.fixture
def filler(wordy):
    return encode(wordy, "It was so, and then it was not; " * 200)


def text_of(tokenizer, sample: RecallSample, start: int = 0, end: int | None = None) -> str:
    return tokenizer.decode(sample.input_ids[start:end])


def pattern(template: str) -> re.Pattern:
    """Key and value of a template's line."""
    text = re.escape(template).replace(r"\{", "{").replace(r"\}", "}").replace("{number}", "{key}")
    return re.compile(text.replace("{key}", r"(\w+)").replace("{value}", r"([\w ]+?)") + r" ?\n")


@pytest.mark.parametrize("length", [400, 777])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_their_length_and_answers_that_were_given_before(wordy, filler, kind, length):
    for sample in recall_samples(wordy, torch.tensor(filler), kinds=[kind], length=length, samples=9, seed=length):
        ids = sample.input_ids
        assert ids.shape == (length,) and ids.dtype == torch.int64 and sample.kind == kind
        assert len(sample.answers) == len(sample.depths) > 0 and all(0 <= depth <= 1 for depth in sample.depths)
        assert 0 <= sample.chance <= 0.5
        ends = [0, *(end for _, end in sample.answers)]
        assert ends[-1] == length
        for (start, end), before in zip(sample.answers, ends, strict=False):
            assert before <= start < end <= length and start >= 1
            answer = text_of(wordy, sample, start, end).strip()
            assert answer and answer in text_of(wordy, sample, 0, sample.answers[0][0])


@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_stated_once_and_the_question_names_the_key(wordy, filler, kind):
    found = 0
    for sample in recall_samples(wordy, filler, kinds=[kind], length=600, samples=12, seed=2):
        text = text_of(wordy, sample)
        asked_from = text.rindex("\n", 0, len(text_of(wordy, sample, 0, sample.answers[0][0])))
        context, asked = text[: asked_from + 1], text[asked_from:] + "\n"
        for template in ROWS[kind]:
            rows = pattern(template).findall(context)
            cut = pattern(template.partition("{value}")[0] + "{value}") if kind != "records" else pattern(template)
            if len(sample.answers) > 1:
                cut = pattern(template)
            questions = cut.findall(asked)
            if not (rows and questions):
                continue
            found += 1
            values = dict(rows)
            assert len(values) == len(rows)
            answers = [text_of(wordy, sample, start, end).strip() for start, end in sample.answers]
            for (key, value), answer in zip(questions, answers, strict=False):
                assert values[key].strip() == value.strip() and answer in value
    assert found >= 6


def test_depths_are_where_the_statements_lie(wordy, filler):
    samples = recall_samples(wordy, filler, kinds=["passkey"], length=500, samples=40, seed=5)
    depths = []
    for sample in samples:
        (start, end), (depth,) = sample.answers[0], sample.depths
        answer, ids = sample.input_ids[start:end].tolist(), sample.input_ids.tolist()
        first = next(i for i in range(start) if ids[i : i + len(answer)] == answer)
        assert first / 500 == pytest.approx(depth, abs=0.15)
        depths.append(depth)
    assert min(depths) < 0.15 and max(depths) > 0.85


def test_copied_spans_are_those_after_the_cue(wordy, filler):
    for sample in recall_samples(wordy, filler, kinds=["span"], length=300, samples=12, seed=4):
        ((start, end),) = sample.answers
        assert 16 <= end - start <= 32
        ids = sample.input_ids.tolist()
        cue = next(n for n in range(start, 0, -1) if ids[n] == encode(wordy, "\n")[-1] or n == 1)
        again = ids[cue:end]
        assert any(ids[i : i + len(again)] == again for i in range(cue)), (cue, start)


def test_a_repeat_asks_for_all_but_its_first_words(wordy, filler):
    for sample in recall_samples(wordy, filler, kinds=["repeats"], length=400, samples=5, seed=4):
        ids, first = sample.input_ids.tolist(), sample.answers[0][0]
        words = [text_of(wordy, sample, start, end).strip() for start, end in sample.answers]
        assert set(words) <= set(VOCABULARY) and len(words) > 10
        assert [start for start, _ in sample.answers[1:]] == [end for _, end in sample.answers[:-1]]
        answer = ids[first:]
        assert any(ids[i : i + len(answer)] == answer for i in range(first - len(answer)))


def test_the_same_seed_gives_the_same_samples(wordy, filler):
    def ids(seed):
        return torch.stack([x.input_ids for x in recall_samples(wordy, filler, length=500, samples=6, seed=seed)])

    assert torch.equal(ids(1), ids(1)) and not torch.equal(ids(1), ids(2))


def test_kinds_take_turns(wordy, filler):
    samples = recall_samples(wordy, filler, kinds=["span", "codes"], length=400, samples=5, seed=0)
    assert [sample.kind for sample in samples] == ["span", "codes", "span", "codes", "span"]


def test_words_leave_out_the_evaluations(wordy):
    """Frequent words of one token are what the evaluation draws from."""
    words, taken = own_words(wordy), {wordy.decode([i]).strip() for i in single_token_words(wordy)}
    assert taken & set(VOCABULARY) and not taken & set(words) and len(words) >= 64
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def constants(path: Path) -> list[str]:
    """The strings of a module that are no docstrings; f-strings by their fixed parts."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bodies = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)]
    docs = {id(node.body[0].value) for node in bodies if node.body and isinstance(node.body[0], ast.Expr)}
    return [x.value for x in ast.walk(tree) if isinstance(x, ast.Constant) and isinstance(x.value, str) and id(x) not in docs]


def phrases(strings: list[str]) -> list[str]:
    """Stretches of two or more words between placeholders."""
    parts = [part.strip(" \n.,:;") for text in strings for part in re.split(r"\{\w*\}", text)]
    return [part for part in parts if len(re.findall(r"[A-Za-z]+", part)) >= 2]


def test_no_phrase_is_the_evaluations():
    theirs = [
        text
        for path in (Path(evaluate.__file__).parent / "quality").glob("*.py")
        if "recall" in path.name
        for text in constants(path)
    ]
    ours = [*RECORDS, *PASSKEYS, *CODES, *LISTS, *CUES]
    assert "The secret number of" in phrases(theirs) and "The keeper of" in phrases(ours)
    for phrase in phrases(ours):
        assert not any(phrase in text for text in theirs), phrase
    for phrase in phrases(theirs):
        assert not any(phrase in text for text in ours), phrase
    cities = set(" ".join(theirs).split())
    assert not {word for word in VOCABULARY if word in cities or word.capitalize() in cities}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": ["needle"]}, "no kind of recall is called needle; choose from passkey, records"),
        ({"length": 12}, "length=12 is too short for a sample of passkey; give at least"),
        ({"filler": [1, 2, 3]}, "the text has 3 tokens and passkey at 400 needs"),
    ],
)
def test_what_cannot_be_made_is_refused(wordy, filler, change, message):
    arguments = {"filler": filler, "kinds": ["passkey"], "length": 400, "samples": 1, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        recall_samples(wordy, arguments.pop("filler"), **arguments)


def test_a_tokenizer_that_cannot_write_the_words_is_refused(filler):
    bpe = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="?")
    with pytest.raises(ValueError, match="the tokenizer can write 0 of the words of recall samples, which need 64"):
        recall_samples(tokenizer, [0] * 500, length=100, samples=1, seed=0)


@pytest.mark.parametrize("merged", [["r", "s"], ["Ġ", "t"], [":", "Ġ"]])
def test_answers_begin_where_the_question_ends_however_text_is_split(merged):
    """Without a pre-tokenizer merges cross words: what the answer changes is asked for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "".join(merged)])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merged)]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    rng = random.Random(0)
    filler = encode(tokenizer, "".join(rng.choices("abcdef .", k=3000)))
    for sample in recall_samples(tokenizer, filler, kinds=["passkey"], length=600, samples=6, seed=1):
        ((start, end),) = sample.answers
        answer = text_of(tokenizer, sample, start, end).strip(" :")
        assert text_of(tokenizer, sample, 0, start).count(answer) >= 1 and end == 600


def test_kinds_are_functions_of_the_module():
    assert all(getattr(synthetic_recall, name) is kind for name, kind in KINDS.items())
