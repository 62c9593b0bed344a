"""Agreement against greedy generation, step by step."""

import pytest
import torch

from dijiang.convert import load_source
from dijiang.evaluate.quality.agreement import agreement_scores, greedy, prompts

NEW = 9


@pytest.fixture
def rows(tokens):
    return prompts(tokens(200, rows=1)[0], prompt_length=13, count=5)


def agree(model, rows, **options) -> dict:
    return agreement_scores(model, rows, new_tokens=NEW, decode=str, **options)


def test_prompts_are_spread_over_the_text():
    rows = prompts(torch.arange(100), prompt_length=10, count=4)
    assert rows[:, 0].tolist() == [0, 30, 60, 90] and all((row.diff() == 1).all() for row in rows)


def test_short_texts_are_refused(refused, tmp_path):
    refused(
        tmp_path, lambda: prompts(torch.arange(9), prompt_length=10, count=2), "^the text has 9 tokens and a prompt 10; give"
    )


def test_the_teacher_agrees_with_itself_and_writes_greedily(pair, rows):
    model, told = load_source(pair.teacher)[0], []
    found = agree(model, rows, advance=told.append)
    assert found["totals"] == found["weights"] == [NEW] * 5 and told == [13 + NEW] * 5
    for row, continuation in zip(rows, found["detail"]["continuations"], strict=True):
        ids = row
        for token in continuation:  # without a cache
            assert model(ids[None], use_cache=False).logits[0, -1].argmax() == token
            ids = torch.cat((ids, torch.tensor([token])))
    assert found["detail"]["sample"] == {
        "prompt": str(rows[0].tolist()), "continuation": str(found["detail"]["continuations"][0])
    }  # fmt: skip


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3])
def test_a_student_is_compared_token_by_token(pair, rows, noise):
    """By hand: its choice after the teacher's text, one position at a time; and its own greedy text up to the difference."""
    teacher, student = load_source(pair.teacher)[0], load_source(pair.teacher)[0]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    reference = agree(teacher, rows)
    found = agree(student, rows, reference=reference)
    assert "continuations" not in found["detail"]
    for i, (row, continuation) in enumerate(zip(rows, reference["detail"]["continuations"], strict=True)):
        text = torch.cat((row, torch.tensor(continuation)))
        chosen = [student(text[None, : 13 + t], use_cache=False).logits[0, -1].argmax().item() for t in range(NEW)]
        assert found["totals"][i] == sum(a == b for a, b in zip(chosen, continuation, strict=True))
        own, prefix = greedy(student, row, NEW).tolist(), found["detail"]["prefix"][i]
        assert own[:prefix] == continuation[:prefix] and (prefix == NEW or own[prefix] != continuation[prefix])
    assert found["detail"]["sample"]["continuation"] == str(greedy(student, rows[0], NEW).tolist())
    if noise == 0:
        assert found["totals"] == found["weights"]
    if noise == 0.3:
        assert sum(found["totals"]) < sum(found["weights"])
