"""The quick demo from end to end, on a tiny model."""

import json
import math

import pytest
import torch

import dijiang.quick_demo
from dijiang.checkpoint.provenance import read_provenance
from dijiang.convert import load_source
from dijiang.evaluate.quality.perplexity import perplexity_scores
from dijiang.quick_demo import QuickSettings, headline, run_quick_demo
from dijiang.train.memories.config import FitConfig, SelectConfig

FIT = FitConfig(slots=20, least_slots=16, text_tokens=400, block_size=200, recall_samples=1, recall_length=900, steps=20)
SETTINGS = QuickSettings(
    select=SelectConfig(heads=1, samples=1, lengths=(900,)), fit=FIT, length=200, samples=2, text_tokens=500
)


@pytest.fixture(scope="module")
def done(long_pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    text = folder / "text.txt"
    text.write_text("The cat sat on the mat, and a rat that sat near saw it. " * 150, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TRAIN_TEXT", "HELD_OUT_TEXT"):
            patch.setattr(dijiang.quick_demo, name, text)
        patch.setattr(dijiang.quick_demo, "reload_difference", lambda model: 0.0)
        result = run_quick_demo(folder / "out", source=long_pair.teacher, settings=SETTINGS)
    return folder / "out", result


def test_the_output_holds_all_that_was_measured(done):
    output, result = done
    assert sorted(path.name for path in output.iterdir()) == ["demo.json", "model", "recall.json", "recall.png", "report.md"]
    for name, found in result.items():
        assert json.loads((output / f"{name}.json").read_text(encoding="utf-8")) == found
    page = (output / "report.md").read_text(encoding="utf-8")
    assert page.splitlines()[2] == result["demo"]["headline"] and result["demo"]["answers"]["question"] in page
    assert [stage["stage"] for stage in read_provenance(output / "model")["stages"]] == ["convert", "select", "fit"]


def test_rows_are_the_models_that_they_name(done, long_pair):
    output, result = done
    model, tokenizer = load_source(output / "model")
    teacher, _ = load_source(long_pair.teacher)
    assert sum(map(len, model.config.full_heads)) == 1
    text = torch.tensor(tokenizer((output.parent / "text.txt").read_text(encoding="utf-8"))["input_ids"][:500])
    scores = [perplexity_scores(x, text, length=200, stride=200) for x in (teacher, model)]
    losses = [sum(score["totals"]) / sum(score["weights"]) for score in scores]
    _, window, memories = result["recall"]["rows"]
    assert memories["perplexity_ratio"]["200"]["value"] == pytest.approx(math.exp(losses[1] - losses[0]), rel=1e-5)
    assert memories["perplexity_ratio"] != window["perplexity_ratio"]
    assert window["memory"]["constant"] and not memories["memory"]["constant"]


def test_the_headline_says_what_came_back(done):
    recall = json.loads(json.dumps(done[1]["recall"]))
    for row, share in zip(recall["rows"], (1.0, 0.125, 0.9), strict=True):
        row["recall_share"] = {"all": {"value": share}}
        row["memory"]["bytes_per_sequence"]["4096"] = int(share * 2**23)
    recall["rows"][2]["perplexity_ratio"] = {"200": {"value": 1.25}}
    assert headline(recall) == (
        "Without training, after 200 tokens it recalls 90% of what the softmax model recalls (the window alone 12%), and its "
        "perplexity is 1.250x the softmax model's; 4,096 tokens take 7.2 MiB instead of 8.0 MiB."
    )


def test_an_output_that_is_taken_is_refused_before_any_work(tmp_path, refused, monkeypatch):
    for name in ("packaged_model", "convert_with_memories"):
        monkeypatch.setattr(dijiang.quick_demo, name, lambda *args, **kwargs: pytest.fail("began to work"))
    (tmp_path / "theirs").write_text("1")
    refused(tmp_path, lambda: run_quick_demo(tmp_path), r"^output folder .* is not empty; choose a new one or empty it$")


def test_a_model_made_for_less_is_refused_before_any_work(pair, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(dijiang.quick_demo, "convert_with_memories", lambda *args, **kwargs: pytest.fail("began to work"))
    message = r"^the demo's recall in samples of 1,024 tokens exceeds the 64 that these models were made for"
    refused(tmp_path, lambda: run_quick_demo(tmp_path / "out", source=pair.teacher), message)
