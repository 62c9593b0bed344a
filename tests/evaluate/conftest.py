"""Evaluations of the pair, models to compare it with, and a watch on what figures show."""

import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from dijiang.convert import convert_model
from dijiang.evaluate import EvaluationConfig, evaluate_model


@pytest.fixture
def config(text_file):
    return EvaluationConfig(
        texts=(text_file,), text_tokens=300, lengths=(24,), stride=10, recall_lengths=(), prompts=3, prompt_length=12,
        new_tokens=5, map_tokens=20, dtype="float32", device="cpu",
    )  # fmt: skip


@pytest.fixture
def evaluated(pair, config, tmp_path):
    """evaluated(name, **other settings) -> the result of an evaluation of the pair, with its cache in tmp_path/cache."""

    def run(name="out", checkpoint=pair.checkpoint, teacher=pair.teacher, beside=(), cache="cache", **settings):
        options = {"beside": beside, "cache": tmp_path / cache, "progress": False}
        return evaluate_model(checkpoint, teacher, tmp_path / name, replace(config, **settings), **options)

    return run


@pytest.fixture
def others(make_source, tmp_path):
    """Folders of a softmax model of another seed, and of its conversion."""
    other, _ = make_source(name="other", seed=1, num_key_value_heads=2)
    settings = {"attention_window": 3, "attention_sinks": 1, "branch_scale_init": 0.4}
    return other, convert_model(other, tmp_path / "other-dijiang", progress=False, **settings)


@pytest.fixture
def other_words(make_source):
    """The folder `other` of a model to whose tokenizer a is what b is to the pair's."""
    folder, _ = make_source(name="other")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture
def undrawn(request, monkeypatch):
    """No report, which takes a second or two, unless the test is about it."""
    if "drawn" not in request.keywords:
        monkeypatch.setattr("dijiang.evaluate.report.html.write_report", lambda results, folder: None)


@pytest.fixture
def drawings_of(monkeypatch):
    """drawings_of(module): a dict to be filled, by file name, with the axes of what the module draws."""

    def watch(module) -> dict[str, np.ndarray]:
        panels, draw = {}, module.drawn

        @contextmanager
        def watched(path, *args, **options):
            with draw(path, *args, **options) as drawing:
                panels[path.stem] = np.atleast_1d(drawing[1])
                yield drawing

        monkeypatch.setattr(module, "drawn", watched)
        return panels

    return watch
