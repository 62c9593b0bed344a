"""The registry: a task is added by one function in `TASKS`, and is measured, cached and shown like the others."""

import json

import pytest
import torch

from dijiang.evaluate.quality.task_base import Task, TaskInputs
from dijiang.evaluate.quality.tasks import TASKS, build_tasks
from dijiang.evaluate.report.tables import score_table

VARIANTS = ["teacher", "window_sinks", "student", "window_only", "linear_only", "no_attention"]


def certainty_tasks(inputs: TaskInputs) -> list[Task]:
    """How sure a model is of its next token, the mean over pieces of the first text."""
    name, tokens = inputs.first_text
    pieces = tokens[:60].split(10)

    @torch.no_grad()
    def run(model, reference, advance) -> dict:
        totals = []
        for piece in pieces:
            logits = model(input_ids=piece[None], use_cache=False).logits
            totals.append(logits[0, -1].softmax(-1).max().item())
            advance(len(piece))
        sizes = {} if reference is None else {"teachers": reference["totals"]}
        return {"totals": totals, "weights": [1.0] * len(totals), "detail": sizes}

    facts = {"kind": "certainty", "name": name, "metric": "probability", "settings": {"pieces": len(pieces)}}
    return [Task(**facts, floor=1 / 320, cost=60, run=run, asks_teacher=True)]


@pytest.mark.drawn
def test_a_task_is_added_by_one_line(evaluated, monkeypatch, tmp_path):
    usual = evaluated("usual")
    monkeypatch.setitem(TASKS, "certainty", certainty_tasks)
    result = evaluated()
    assert result["results_reused"] == usual["results_reused"] + 13
    *others, row = result["tasks"]
    assert [task["kind"] for task in others] == ["perplexity", "agreement"] and row["kind"] == "certainty"
    assert row["name"] == "text.txt" and row["units"] == 6 and row["chance"] == 1 / 320
    assert [*row["values"]] == VARIANTS and all(0 < value["value"] <= 1 for value in row["values"].values())
    assert row["values"]["teacher"]["low"] < row["values"]["teacher"]["value"] < row["values"]["teacher"]["high"]
    assert row["detail"]["teacher"] == {} and len(row["detail"]["student"]["teachers"]) == 6
    assert [line[0] for line in score_table(result)[1]][2] == "certainty: text.txt"
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8")) == result
    assert "<small>certainty, 6 units" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    again = evaluated("again")
    assert again["results_reused"] == 19 and again["tasks"] == result["tasks"]


def test_the_order_is_that_of_the_registry(config, tokenizer):
    texts = {"a.txt": torch.arange(2, 102), "b.txt": torch.arange(3, 43)}
    fitted = config.within(64)
    inputs = TaskInputs(config=fitted, tokenizer=tokenizer, texts=texts, context=64)
    tasks = build_tasks(inputs)
    assert [task.key for task in tasks] == [
        "perplexity: a.txt, 24 tokens, stride 10",
        "perplexity: b.txt, 24 tokens, stride 10",
        "agreement: a.txt, 5 tokens after 12",
    ]
    assert inputs.left_out == {}
    assert [task.asks_teacher for task in tasks] == [False, False, True]
