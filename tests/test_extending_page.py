"""The code of docs/extending.md works as written once it is registered, and the registries look as the page shows them."""

import importlib
import re
from types import ModuleType

import pytest
import torch
from dijiang_testing.doc_commands import ROOT, titled_blocks
from dijiang_testing.model_checks import random_ids, rows, tiny_model

from dijiang.compress import PruneConfig, prune
from dijiang.compress.oneshot.scores import SCORES, Score
from dijiang.compress.oneshot.sensitivity.methods import SENSITIVITIES, Method
from dijiang.convert.selection.job import SelectionJob
from dijiang.convert.selection.methods import METHODS, select_heads
from dijiang.convert.selection.selection import full_heads_of
from dijiang.evaluate import EvaluationConfig
from dijiang.evaluate.quality import recall_kinds
from dijiang.evaluate.quality.task_base import TaskInputs
from dijiang.evaluate.quality.tasks import TASKS, build_tasks
from dijiang.modeling import FEATURE_MAPS
from dijiang.modeling.configuration_dijiang import MEMORY_SCORES

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = titled_blocks(PAGE)
DIFFS = re.findall(r'^```diff title="([^":]+)[^"]*"\n(.*?)^```', PAGE, flags=re.DOTALL | re.MULTILINE)


def executed(path: str) -> ModuleType:
    """The code of the block titled `path`, executed as part of that file where it exists."""
    package = "dijiang." + path.rpartition("/")[0].replace("/", ".")
    module = ModuleType(path.rpartition("/")[2].removesuffix(".py"))
    module.__package__ = package
    if (ROOT / path).exists():
        module.__dict__.update(vars(importlib.import_module(f"{package}.{module.__name__}")), __package__=package)
    exec(compile(f"from __future__ import annotations\n{BLOCKS[path]}", path, "exec"), module.__dict__)
    return module


@pytest.mark.parametrize(("path", "diff"), DIFFS)
def test_registries_look_as_the_page_shows_them(path, diff):
    before = "".join(line[1:] + "\n" for line in diff.splitlines() if line[0] == " ")
    assert before in (ROOT / path).read_text(encoding="utf-8")
    (added,) = (line for line in diff.splitlines() if line[0] == "+")
    assert re.fullmatch(r'\+    "[\w -]+"(: .+)?,', added)


def test_every_registry_of_the_table_exists():
    registered = re.findall(r"`([A-Z_]+)` in `([\w/]+\.py)`", PAGE)
    assert len(registered) == 6
    assert all(f"\n{name}" in (ROOT / path).read_text(encoding="utf-8") for name, path in registered)
    tests = re.findall(r"`(tests/[\w/.]+)`", PAGE)
    assert len(tests) == 8 and all((ROOT / path).is_file() for path in tests)


def test_the_feature_map():
    try:
        executed("modeling/simple_maps.py")
        model, ids = tiny_model(feature_map="squares"), random_ids(2, 20)
        model(ids, labels=ids, use_cache=False).loss.backward()
        assert model.get_parameter("model.layers.0.self_attn.feature_map_q.W").grad.any()
        assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 24)
    finally:
        FEATURE_MAPS.pop("squares", None)


def test_the_memory_score():
    try:
        executed("modeling/memory_scores.py")
        model = tiny_model(attention_memory=3, memory_score="value_norm")
        v = rows(1, 40, 2, 8, seed=1)
        _, state = model.model.layers[0].self_attn.attend(rows(1, 40, 6, 8), v, v, raw_k=v)
        layer = model.model.layers[0].self_attn
        norms = v[0, layer.sinks : 40 - layer.window].norm(dim=-1)
        for g, held in enumerate(state.memory_rank[0].split(layer.slots)):
            assert norms[held - layer.sinks, g].min() > norms[:, g].topk(3).values[-1] * 0.998  # scores have ten bits
    finally:
        MEMORY_SCORES.pop("value_norm", None)


def test_the_selection_method(monkeypatch):
    monkeypatch.setitem(METHODS, "shallow", executed("convert/selection/shallow.py").shallow)
    job = SelectionJob(model=tiny_model(), heads=3, progress=False)
    assert full_heads_of(select_heads(job, "shallow"), 3) == [[0, 1], [0]]


def test_the_kind_of_recall(monkeypatch, tokenizer):
    module = executed("evaluate/quality/recall_samples.py")
    samples = module.first_token_samples(tokenizer, torch.arange(2, 90), length=30, samples=3, seed=0)
    for sample in samples:
        assert len(sample.input_ids) == 30 and torch.equal(sample.input_ids[:2], sample.input_ids[-2:])
    monkeypatch.setitem(recall_kinds.RECALL_KINDS, "first token", "first_token_samples")
    monkeypatch.setattr(
        "dijiang.evaluate.quality.recall_samples.first_token_samples", module.first_token_samples, raising=False
    )
    assert recall_kinds.generator_of("first token") is module.first_token_samples


def test_the_task(monkeypatch, tokenizer):
    monkeypatch.setitem(TASKS, "certainty", executed("evaluate/quality/certainty.py").certainty_tasks)
    config = EvaluationConfig(texts=("text.txt",), recall_lengths=()).within(64)
    texts = {"text.txt": torch.arange(2, 90)}
    task = build_tasks(TaskInputs(config=config, tokenizer=tokenizer, texts=texts, context=64))[-1]
    assert task.key == "certainty: text.txt" and task.cost == 88
    progress = []
    scores = task.run(tiny_model(), None, progress.append)
    assert len(scores["totals"]) == 2 and all(0 < total < 1 for total in scores["totals"]) and sum(progress) == task.cost


def test_the_score_and_the_sensitivity(monkeypatch, make_source, text_file, tmp_path):
    score = Score(scores=executed("compress/oneshot/scores.py").damped_wanda, within_rows=True)
    depth = Method(measure=executed("compress/oneshot/sensitivity/methods.py").depth, text=False)
    monkeypatch.setitem(SCORES, "damped-wanda", score)
    monkeypatch.setitem(SENSITIVITIES, "depth", depth)
    settings = PruneConfig(calibration=(text_file,), score="damped-wanda", sensitivity="depth", samples=4, length=32)
    output = prune(make_source()[0], tmp_path / "output", settings, cache=tmp_path / "cache", progress=False)
    assert (output / "model.safetensors").is_file()
