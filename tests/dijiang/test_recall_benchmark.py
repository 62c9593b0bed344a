"""The recall benchmark's students: what a configuration asks for, made once and kept."""

import pytest
import torch

from dijiang.convert import load_source
from dijiang.evaluate.recall_frontier.configurations import Configuration
from dijiang.recall_benchmark import Students, refuse_impossible
from dijiang.train.memories.config import FitConfig, SelectConfig

SELECT = SelectConfig(heads=1, samples=1, lengths=(900,))
FIT = FitConfig(least_slots=16, text_tokens=400, block_size=200, recall_samples=1, recall_length=900, steps=20)


@pytest.fixture
def make(long_pair, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat, and a rat that sat near saw it. " * 60, encoding="utf-8")
    teacher, tokenizer = load_source(long_pair.teacher)
    teacher.requires_grad_(False)
    return lambda: Students(teacher, tokenizer, [text], SELECT, FIT, tmp_path / "kept", progress=False)


def test_students_are_what_their_configurations_say(make):
    students = make()
    plain = students.build(Configuration(name="window"))
    assert not any(plain.config.full_heads) and plain.config.attention_memory == 0
    both = students.build(Configuration(name="both", full_heads=1, attention_memory=40))
    (layer, head) = students.ranking("recall").order[0]
    assert both.config.full_heads[layer] == [head] and sum(map(sum, both.config.attention_memory)) in range(105, 121)
    constant = students.build(Configuration(name="constant", full_heads=1, attention_memory=40, large_slots=99))
    assert constant.config.bytes_per_token(2) == 0 and constant.config.attention_memory[layer][head] == 99
    even = students.build(Configuration(name="even", attention_memory=24, spread=False, memory_score="key_norm"))
    assert even.config.attention_memory == 24 and even.config.memory_score == "key_norm"
    wide = students.build(Configuration(name="wide", attention_window=80))
    assert wide.config.attention_window == 80
    random = students.build(Configuration(name="random", full_heads=2, selection="random", draw=1))
    assert sum(map(len, random.config.full_heads)) == 2


def test_uniform_heads_are_spread_for_their_number(make):
    students = make()  # of two layers with two heads each
    for heads, expected in ((1, [[], [0]]), (4, [[0, 1], [0, 1]])):
        built = students.build(Configuration(name="uniform", full_heads=heads, selection="uniform"))
        assert built.config.full_heads == expected
    assert [path.name for path in sorted(students.folder.glob("*uniform*"))] == [f"selection-uniform-{n}.json" for n in (1, 4)]


def test_rankings_and_scores_are_made_once(make, monkeypatch):
    item = Configuration(name="both", full_heads=1, attention_memory=40)
    ids = torch.randint(0, 300, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = make().build(item)(ids).logits
        for name in ("keep_heads", "fit_memory"):
            monkeypatch.setattr(f"dijiang.recall_benchmark.{name}", lambda *args, **kwargs: pytest.fail("made again"))
        assert torch.equal(make().build(item)(ids).logits, expected)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"full_heads": 5}, "'it' keeps more than the 4 key/value heads of the model; give fewer heads"),
        ({"memory_score": "learning"}, "scores holds 'learning'; choose from learned"),
        ({"attention_memory": 600}, "'it' spreads more than 512 slots a head; give fewer slots"),
    ],
)
def test_what_the_model_cannot_have_is_refused_before_anything_is_measured(item, message):
    with pytest.raises(ValueError, match=message):
        refuse_impossible([Configuration(name="window"), Configuration(name="it", **item)], 4)
