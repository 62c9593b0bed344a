"""Whole stages on a tiny model: what they leave behind, what they record, and what they refuse to go on with."""

import fcntl
import json
import shutil
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dijiang.checkpoint.provenance import read_provenance
from dijiang.convert import convert_model, load_source
from dijiang.train.recipe.load import load_recipe
from dijiang.train.stages import compiled
from dijiang.train.stages.parameters import added_parameters
from dijiang.train.stages.run import recover, run_stage
from dijiang.train.trainer.trainer import RecoveryTrainer

pytestmark = pytest.mark.usefixtures("no_waiting")
WEIGHTS = "model.safetensors"
CONVERT = {"attention_window": 4, "attention_sinks": 2, "branch_scale_init": 0.5}


@pytest.fixture
def recipe(pair, text_file, tmp_path):
    """recipe(*sets, stages=("align", "distill")) -> a Recipe that writes to tmp_path / "out", converted already."""
    (tmp_path / "other.txt").write_text("a rat on the mat and the cat on the rat sat " * 20)
    content = {
        "source": str(pair.teacher),
        "output": str(tmp_path / "out"),
        "convert": {"settings": CONVERT},
        "data": {"train": [str(text_file)], "held_out": [str(tmp_path / "other.txt")], "cache": str(tmp_path / "cache")},
        "align": {"tokens": 512, "block_size": 32, "batch_size": 2, "kernel_learning_rate": 0.1},
        "distill": {"tokens": 512, "block_size": 32, "batch_size": 2, "learning_rate": 1e-3},
        "run": {"device": "cpu", "dtype": "float32", "save_every": 3, "log_every": 2, "report_to": []},
    }
    if not (tmp_path / "out").exists():
        shutil.copytree(pair.checkpoint, tmp_path / "out" / "converted")

    def make(*sets, stages=("align", "distill")):
        chosen = {key: value for key, value in content.items() if key not in ("align", "distill") or key in stages}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(chosen))
        return load_recipe(tmp_path / "recipe.yaml", sets)

    return make


def changed(one, other) -> set[str]:
    """Names of the tensors in which two checkpoints differ."""
    one, other = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert one.keys() == other.keys() and all(one[name].dtype == other[name].dtype for name in one)
    return {name for name in one if not torch.equal(one[name], other[name])}


def refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# --- what they leave behind ---


def test_both_stages(recipe, pair, tmp_path, capsys):
    job = recipe()
    model = recover(job, progress=False)
    assert capsys.readouterr().err == ""
    out = tmp_path / "out"
    assert model == out / "distill" / "model"
    for stage in ("align", "distill"):
        assert {path.name for path in (out / stage).iterdir()} == {"checkpoints", "metrics.jsonl", "recipe.yaml", "model"}
        assert load_recipe(out / stage / "recipe.yaml") == job
    kernels = set(added_parameters(load_source(model)[0]))
    assert changed(out / "converted", out / "align" / "model") == kernels
    later = changed(out / "align" / "model", model)
    assert kernels <= later and "model.layers.1.mlp.up_proj.weight" in later and "model.embed_tokens.weight" not in later
    assert {path.name for path in model.iterdir()} == {path.name for path in pair.checkpoint.iterdir()}
    AutoModelForCausalLM.from_pretrained(model)

    align, distill = read_provenance(model)["stages"][1:]
    assert [stage["stage"] for stage in (align, distill)] == ["align", "distill"]
    assert align["tokens"] == distill["tokens"] == 512 and align["config"]["kernel_learning_rate"] == 0.1
    assert align["loss_last"] < align["loss_first"] and 0 <= align["calibration_r2"] <= 1
    assert distill["teacher"] == "teacher" and distill["dtype"] == "float32" and distill["device"] == "cpu"
    assert distill["world_size"] == 1 and distill["written_by"] == "PyTorch" and distill["seconds"] > 0
    assert distill["data"]["sources"][0]["source"] == "text.txt"
    held_out = [json.loads(line) for line in (out / "distill" / "metrics.jsonl").read_text().splitlines()][-1]
    assert held_out["step"] == 8 and held_out["eval_perplexity"] == distill["held_out_perplexity"]
    assert held_out["eval_teacher_perplexity"] == distill["teacher_perplexity"] == align["teacher_perplexity"]

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    assert recover(job, progress=False) == model
    assert capsys.readouterr().err.count("is already complete\n") == 2
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_samples_of_recall_train_both_stages_and_are_gone_on_with_to_the_bit(recipe, tmp_path):
    sets = ["data.recall={share: 0.5, kinds: [codes, positions], answer_weight: 2, held_out_samples: 3}"]
    for stage in ("align", "distill"):
        sets += [f"{stage}.tokens=2048", f"{stage}.block_size=256", f"{stage}.batch_size=1"]
    whole = recover(recipe(*sets, "run.log_every=1"), progress=False)
    lines = [json.loads(line) for line in (whole.parent / "metrics.jsonl").read_text().splitlines()]
    assert sum("answer_kl" in line for line in lines if "loss" in line) == 4  # one of two sequences
    assert 0 <= lines[-1]["eval_recall"] <= 1 and "eval_teacher_recall" in lines[-1]
    for stage in read_provenance(whole)["stages"][1:]:
        recall = stage["data"]["recall"]
        assert (recall["sequences"], recall["share"], recall["kinds"]) == (4, 0.5, ["codes", "positions"])
        assert stage["held_out_recall"] >= 0 and stage["teacher_recall"] >= 0
    expected = load_file(whole / WEIGHTS)
    shutil.rmtree(whole.parent)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 1 of 8"):
        recover(recipe(*sets, "run.max_minutes=1e-9"), progress=False)
    again = recover(recipe(*sets), progress=False)
    assert all(torch.equal(value, expected[name]) for name, value in load_file(again / WEIGHTS).items())
    refused(lambda: recover(recipe(*sets, "data.recall.seed=1"), progress=False), "data.recall.seed")


def test_another_text_is_not_gone_on_with(recipe, text_file):
    job = recipe(stages=("align",))
    model = run_stage(job, "align", progress=False)
    expected = load_file(model / WEIGHTS)
    shutil.rmtree(model)
    words = text_file.read_text()
    text_file.touch()  # the same text, however old its file
    run_stage(job, "align", progress=False)
    assert all(torch.equal(value, expected[name]) for name, value in load_file(model / WEIGHTS).items())
    shutil.rmtree(model)
    text_file.write_text(words.replace("cat", "dog"))
    try:
        refused(lambda: run_stage(job, "align", progress=False), "text is not the one that .*checkpoint-8 was trained on")
    finally:
        text_file.write_text(words)


def test_the_source_is_converted_where_it_is_not(recipe, tmp_path):
    job = recipe(stages=("distill",))
    run_stage(job, "distill", progress=False)
    expected = tmp_path / "out" / "distill" / "model"
    shutil.rmtree(tmp_path / "out" / "converted")
    shutil.move(expected, tmp_path / "expected")
    shutil.rmtree(tmp_path / "out" / "distill")
    run_stage(job, "distill", progress=False)
    assert not changed(expected, tmp_path / "expected")


def test_stored_dtypes_stay(recipe, pair, tmp_path):
    shutil.rmtree(tmp_path / "out")
    job = recipe("convert.dtype=bfloat16", "run.dtype=bfloat16", stages=("distill",))
    model = run_stage(job, "distill", progress=False)
    dtypes = {name: tensor.dtype for name, tensor in load_file(model / WEIGHTS).items()}
    assert dtypes["model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    assert {dtype for name, dtype in dtypes.items() if ".feature_map_" in name} == {torch.float32}
    assert changed(tmp_path / "out" / "converted", model)
    assert read_provenance(model)["stages"][-1]["dtype"] == "bfloat16"


def test_adapters_are_merged(recipe, tmp_path):
    model = run_stage(recipe("distill.lora_rank=2", stages=("distill",)), "distill", progress=False)
    found = changed(tmp_path / "out" / "converted", model)
    assert "model.layers.0.self_attn.q_proj.weight" in found and "model.layers.1.mlp.down_proj.weight" in found
    assert "model.norm.weight" not in found and not any("lora" in name for name in load_file(model / WEIGHTS))


def test_a_teacher_on_disk_with_all_tokens_is_the_teacher_beside(recipe, tmp_path):
    steady = ("distill.tokens=192", "run.log_every=1")
    run_stage(recipe(*steady, stages=("distill",)), "distill", progress=False)
    shutil.move(tmp_path / "out" / "distill", tmp_path / "beside")
    model = run_stage(recipe(*steady, "distill.teacher_top_k=320", stages=("distill",)), "distill", progress=False)
    losses = [
        [json.loads(line).get("loss") for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "beside", model.parent)
    ]
    assert losses[0][:3] == pytest.approx(losses[1][:3], rel=1e-3)  # float16 on disk
    beside, on_disk = (read_provenance(folder)["stages"][-1] for folder in (tmp_path / "beside" / "model", model))
    assert beside["teacher_perplexity"] > 1 and "teacher_perplexity" not in on_disk  # which has no logits of held-out text


# --- interruptions ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_call_goes_on(recipe, tmp_path, monkeypatch, number):
    job = recipe("distill.seed=7", stages=("distill",))
    whole = run_stage(job, "distill", progress=False)
    shutil.move(whole.parent, tmp_path / "whole")
    steps = []

    def interrupt(self):
        steps.append(1)
        if len(steps) == 5:
            signal.raise_signal(number)
        return finish(self)

    finish = RecoveryTrainer.finish_loss
    with monkeypatch.context() as patch:
        patch.setattr(RecoveryTrainer, "finish_loss", interrupt)
        with pytest.raises(
            KeyboardInterrupt, match=r"^distill was stopped after step 5 of 8, with a checkpoint; run the same"
        ):
            run_stage(job, "distill", progress=False)
    assert not whole.exists()
    assert sorted(path.name for path in (whole.parent / "checkpoints").iterdir()) == ["checkpoint-3", "checkpoint-5"]
    run_stage(job, "distill", progress=False)
    assert not changed(whole, tmp_path / "whole" / "model")


def test_an_error_while_the_result_is_written_leaves_none(recipe, tmp_path, monkeypatch):
    job = recipe(stages=("align",))
    with monkeypatch.context() as patch:
        patch.setattr("dijiang.train.stages.run.write_provenance", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            run_stage(job, "align", progress=False)
    assert not (tmp_path / "out" / "align" / "model").exists()
    (tmp_path / "out" / "align" / ".model.0123.partial").mkdir()  # as after a kill
    (tmp_path / "out" / "align" / "checkpoints" / ".partial-9").mkdir()
    run_stage(job, "align", progress=False)
    assert {path.name for path in (tmp_path / "out" / "align").iterdir()} == {
        *("checkpoints", "metrics.jsonl", "recipe.yaml", "model"),
    }
    assert not list((tmp_path / "out" / "align" / "checkpoints").glob(".*"))


# --- what they refuse ---


@pytest.fixture
def begun(recipe, monkeypatch):
    """A distil stage that has stopped after its first checkpoint."""
    save, saved = RecoveryTrainer._save_checkpoint, []

    def save_once(self, *args):
        save(self, *args)
        saved.append(1)
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(RecoveryTrainer, "_save_checkpoint", save_once)
        with pytest.raises(InterruptedError):
            run_stage(recipe(stages=("distill",)), "distill", progress=False)
    assert saved
    return recipe


def test_a_run_whose_minutes_are_over_is_gone_on_with(recipe, tmp_path):
    job = recipe(stages=("distill",))
    expected = run_stage(job, "distill", progress=False).rename(tmp_path / "expected")
    shutil.rmtree(tmp_path / "out" / "distill")
    with pytest.raises(KeyboardInterrupt, match="distill was stopped after step 1 of 8, with a checkpoint; run"):
        run_stage(recipe("run.max_minutes=1e-9", stages=("distill",)), "distill", progress=False)
    run_stage(recipe("run.max_minutes=60", stages=("distill",)), "distill", progress=False)
    assert not changed(expected, tmp_path / "out" / "distill" / "model")


def test_compilation_changes_no_weight_by_more_than_rounding(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    weights = []
    for wanted in ("false", "true"):
        job = recipe("data.respect_documents=false", f"run.compile={wanted}", stages=("distill",))
        model = run_stage(job, "distill", progress=False)
        assert read_provenance(model)["stages"][-1].get("compiled") == (True if wanted == "true" else None)
        weights.append(load_file(model / WEIGHTS))
        shutil.rmtree(tmp_path / "out" / "distill")
    for name, weight in weights[0].items():
        assert (weight - weights[1][name]).abs().max() <= 1e-4 * weight.abs().max(), name


def test_another_recipe(begun):
    sets = ("distill.seed=3", "distill.learning_rate=0.01", "data.respect_documents=false")
    keys = r"data\.respect_documents, distill\.seed, distill\.learning_rate"
    message = (
        rf"distill was begun with another recipe: {keys} differ; name another output, or delete that folder to start again$"
    )
    refused(lambda: run_stage(begun(*sets, stages=("distill",)), "distill"), message)


def test_how_it_runs_may_change(begun, tmp_path, capsys):
    job = begun("run.micro_batch_size=2", "run.log_every=1", f"data.cache={tmp_path / 'elsewhere'}", stages=("distill",))
    assert run_stage(job, "distill").is_dir()
    assert "Distilling: continuing at step 3 of 8" in capsys.readouterr().err


def test_a_folder_begun_by_an_older_version(begun, tmp_path, capsys):
    """Its recipe may hold keys that have no effect by today's rules."""
    file = tmp_path / "out" / "distill" / "recipe.yaml"
    content = yaml.safe_load(file.read_text())
    content["data"]["train"][0]["weight"] = 2.0
    file.write_text(yaml.safe_dump(content))
    assert run_stage(begun(stages=("distill",)), "distill").is_dir()
    assert "Distilling: continuing at step 3 of 8" in capsys.readouterr().err


def test_an_align_section_that_changed_since(recipe):
    run_stage(recipe(), "align", progress=False)
    refused(lambda: run_stage(recipe("align.seed=1"), "distill"), r"align was begun with another recipe: align.seed differ;")


def test_distill_before_align(recipe):
    refused(lambda: run_stage(recipe(), "distill"), r"align.model is not there yet; run the align stage first$")


def test_a_stage_that_is_not_in_the_recipe(recipe):
    refused(lambda: run_stage(recipe(stages=("distill",)), "align"), "^the recipe has no section align; it has distill$")


def test_another_conversion(recipe):
    job = recipe("convert.settings.attention_window=5", stages=("distill",))
    refused(lambda: run_stage(job, "distill"), r"converted was converted with overrides \{.*\}, the recipe's is \{.*\}; ")


def test_another_source(recipe, make_source, tmp_path):
    other, _ = make_source(name="other", seed=9, num_key_value_heads=2)
    refused(lambda: run_stage(recipe(f"source={other}"), "align"), "is not the model that this checkpoint was converted from")


def test_a_checkpoint_trained_from_something_else(begun, pair, tmp_path):
    shutil.rmtree(tmp_path / "out" / "converted")
    convert_model(pair.teacher, tmp_path / "out" / "converted", progress=False, **CONVERT)
    provenance = read_provenance(tmp_path / "out" / "converted")
    provenance["stages"][0]["time"] = "2001-01-01"
    (tmp_path / "out" / "converted" / "provenance.json").write_text(json.dumps(provenance))
    message = r"checkpoint-3 was trained from another .*converted; delete .*checkpoints to start again$"
    refused(lambda: run_stage(begun(stages=("distill",)), "distill"), message)


def test_a_folder_that_another_run_writes_to(recipe, tmp_path):
    with open(tmp_path / "out" / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused(lambda: run_stage(recipe(), "align"), r"^another run is writing to .*out; wait for it, or end it$")
    assert run_stage(recipe(), "align", progress=False).is_dir()


def test_an_output_that_cannot_be_made(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    job = recipe(f"output={tmp_path / 'file' / 'out'}")
    refused(lambda: run_stage(job, "align"), r"^cannot write to .*out \(Not a directory\); choose another output$")


def test_a_damaged_checkpoint_is_passed_over(recipe, tmp_path, capsys):
    job = recipe(stages=("distill",))
    whole = run_stage(job, "distill", progress=False)
    shutil.move(whole, tmp_path / "whole")
    (whole.parent / "checkpoints" / "checkpoint-8" / "optimizer.pt").write_bytes(b"")
    run_stage(job, "distill", progress=False)
    assert "checkpoint-8 is damaged (optimizer.pt has 0 bytes, " in capsys.readouterr().err
    assert not changed(whole, tmp_path / "whole")
