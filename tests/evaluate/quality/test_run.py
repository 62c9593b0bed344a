"""The evaluation as a whole: its numbers are those of its parts, an interrupted one continues, bad input is refused first."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dijiang.checkpoint.provenance import read_provenance, write_provenance
from dijiang.common.result_cache import ResultCache
from dijiang.convert import convert_model, load_source
from dijiang.evaluate import linear_only, no_attention, window_only
from dijiang.evaluate.quality import measure
from dijiang.evaluate.quality.perplexity import perplexity_scores
from dijiang.evaluate.quality.variants import Comparison
from dijiang.evaluate.report.html import make_report

pytestmark = pytest.mark.usefixtures("undrawn")
ABLATIONS = {"window_only": window_only, "linear_only": linear_only, "no_attention": no_attention}
VARIANTS = ["teacher", "window_sinks", "student", *ABLATIONS]


def row(result: dict, kind: str) -> dict:
    (task,) = (task for task in result["tasks"] if task["kind"] == kind)
    return task


def comparable(result: dict) -> dict:
    return {key: value for key, value in result.items() if key not in ("seconds", "time", "results_reused")}


def test_every_variant_has_its_own_numbers(pair, config, evaluated, tmp_path):
    """Each value against the model in question, built here; the training-free baseline against a fresh conversion."""
    result = evaluated()
    assert result == json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    teacher, tokenizer = load_source(pair.teacher)
    student = load_source(pair.checkpoint)[0]
    folder = convert_model(pair.teacher, tmp_path / "fresh", progress=False, attention_window=64, attention_sinks=4)
    tokens = torch.tensor(tokenizer(config.texts[0].read_text(encoding="utf-8"))["input_ids"][:300])

    def expected(model) -> float:
        scores = perplexity_scores(model, tokens, length=24, stride=10)
        return math.exp(sum(scores["totals"]) / sum(scores["weights"]))

    values = {key: x["value"] for key, x in row(result, "perplexity")["values"].items()}
    assert list(values) == list(result["subjects"]) == VARIANTS
    by_hand = {"teacher": expected(teacher), "window_sinks": expected(load_source(folder)[0]), "student": expected(student)}
    for key, ablation in ABLATIONS.items():
        with ablation(student):
            by_hand[key] = expected(student)
    assert values == pytest.approx(by_hand, rel=1e-5)
    # a window of 64 sees all of 24 tokens, as the teacher does
    assert len({round(value, 2) for value in values.values()}) == 5
    nats = {key: math.log(value) for key, value in values.items()}
    share = row(result, "perplexity")["recovered"]
    lead = nats["no_attention"] - nats["teacher"]
    if share is None:  # an untrained teacher is hardly better than no attention
        assert lead < 0.1
    else:
        assert share["value"] == pytest.approx((nats["no_attention"] - nats["student"]) / lead, rel=1e-6)
    agreement = row(result, "agreement")
    assert agreement["values"]["teacher"] == {"value": 1.0, "low": None, "high": None} and agreement["units"] == 3
    assert 0 <= agreement["values"]["student"]["value"] <= 1
    assert len(result["maps"]["layers"]) == 2


@pytest.mark.parametrize("layer_types", ["linear_attention", ["linear_attention", "full_attention"]])
def test_the_training_free_baseline_is_the_teacher_with_a_mask(long_teacher, evaluated, config, tmp_path, layer_types):
    """transformers' own class of the teacher, the softmax of each linear layer masked to 64 tokens and 4 sinks by hand."""
    settings = {"attention_window": 3, "attention_sinks": 1, "layer_types": layer_types, "branch_scale_init": 0.3}
    checkpoint = convert_model(long_teacher, tmp_path / "student", progress=False, **settings)
    result = evaluated(checkpoint=checkpoint, teacher=long_teacher, lengths=(200,), stride=200, map_tokens=0)
    assert result["subjects"]["window_sinks"] == "teacher with window 64 + 4 sinks, training-free" and result["maps"] is None
    teacher = AutoModelForCausalLM.from_pretrained(long_teacher, attn_implementation="eager")
    query, key = torch.arange(200)[:, None], torch.arange(200)
    near = (key <= query) & ((query - key < 64) | (key < 4))
    mask = torch.zeros(1, 1, 200, 200).masked_fill(~near, torch.finfo(torch.float32).min)

    def masked(module, args, kwargs):
        length = kwargs["hidden_states"].shape[1]
        return args, kwargs | {"attention_mask": mask[..., :length, :length]}

    for layer, layer_type in zip(teacher.model.layers, load_source(checkpoint)[0].config.layer_types, strict=True):
        if layer_type == "linear_attention":
            layer.self_attn.register_forward_pre_hook(masked, with_kwargs=True)
    tokens = torch.tensor(load_source(checkpoint)[1](config.texts[0].read_text(encoding="utf-8"))["input_ids"][:300])
    total = sum(teacher(part[None], labels=part[None]).loss.item() * (len(part) - 1) for part in tokens.split(200))
    values = {name: x["value"] for name, x in row(result, "perplexity")["values"].items()}
    assert values["window_sinks"] == pytest.approx(math.exp(total / (len(tokens) - 2)), rel=1e-4)
    assert abs(values["window_sinks"] / values["teacher"] - 1) > 1e-3


def test_tokens_and_stages_come_from_the_provenance(pair, evaluated, tmp_path):
    checkpoint = tmp_path / "trained"
    checkpoint.mkdir()
    for path in pair.checkpoint.iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    provenance = read_provenance(checkpoint)
    provenance["stages"] += [{"stage": "align", "tokens": 500, "seconds": 2.0}, {"stage": "distill", "tokens": 70}]
    write_provenance(checkpoint, provenance)
    student = evaluated(checkpoint=checkpoint)["student"]
    assert student["tokens"] == 570 and student["name"] == "trained"
    assert student["stages"] == [
        {"stage": "convert"},
        {"stage": "align", "tokens": 500, "seconds": 2.0},
        {"stage": "distill", "tokens": 70},
    ]


def test_an_interrupted_evaluation_continues_to_the_same_numbers(evaluated, tmp_path, monkeypatch):
    whole = evaluated("whole", cache="other")
    assert whole["results_reused"] == 0
    stored, put = [], ResultCache.put

    def stop_after_five(self, facts, result):
        put(self, facts, result)
        stored.append(facts)
        if len(stored) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResultCache, "put", stop_after_five)
    with pytest.raises(KeyboardInterrupt):
        evaluated()
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    monkeypatch.setattr(ResultCache, "put", put)
    rest = evaluated()
    assert rest["results_reused"] == 5 and comparable(rest) == comparable(whole)

    def nothing_is_loaded(self, model):
        raise AssertionError(model)

    monkeypatch.setattr(Comparison, "loaded", nothing_is_loaded)
    again = evaluated("again")
    assert again["results_reused"] == 13 and comparable(again) == comparable(whole)


def test_a_killed_command_continues_to_the_same_numbers(pair, text_file, tmp_path):
    def command(output: str, cache: str) -> list[str]:
        options = {"against": pair.teacher, "output": tmp_path / output, "cache": tmp_path / cache, "text": text_file}
        options |= {"text-tokens": 1500, "length": 60, "stride": 6, "recall-length": 0, "dtype": "float32"}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [str(Path(sys.executable).with_name("dijiang")), "evaluate", str(pair.checkpoint), *words]

    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command("out", "cache"), env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("cache/*.json"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "evaluation.json").exists()
    before = len(list(tmp_path.glob("cache/*.json")))
    assert before >= 2
    for output, cache in (("out", "cache"), ("whole", "other")):
        done = subprocess.run(command(output, cache), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    rest, whole = (json.loads((tmp_path / name / "evaluation.json").read_text(encoding="utf-8")) for name in ("out", "whole"))
    assert rest["results_reused"] == before and whole["results_reused"] == 0
    assert {**comparable(rest), "command": ""} == {**comparable(whole), "command": ""}


def test_other_weights_and_settings_are_measured_again(pair, evaluated, tmp_path, monkeypatch):
    evaluated()
    # 6 variants and maps: other windows leave agreement and maps as they are, other prompts leave perplexity and maps
    assert evaluated("stride", stride=11)["results_reused"] == 7
    assert evaluated("prompts", new_tokens=6)["results_reused"] == 7
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in pair.checkpoint.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    weights = load_file(changed / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    # teacher and training-free baseline, two tasks each
    assert evaluated("weights", checkpoint=changed)["results_reused"] == 4
    slower = tmp_path / "slower"  # the same weights, other frequencies of the rotary positions
    slower.mkdir()
    for path in pair.teacher.iterdir():
        (slower / path.name).write_bytes(path.read_bytes())
    content = json.loads((slower / "config.json").read_text(encoding="utf-8"))
    content["rope_parameters"]["rope_theta"] *= 2
    (slower / "config.json").write_text(json.dumps(content), encoding="utf-8")
    # only perplexity of the student and its ablations is reused; agreement is with another teacher
    assert evaluated("rotary", teacher=slower)["results_reused"] == 4
    monkeypatch.setattr(measure, "code_fingerprint", lambda *packages: "of other code")
    assert evaluated("code")["results_reused"] == 0


@pytest.mark.drawn
def test_a_student_without_a_window_leaves_ablations_out(pair, evaluated, tmp_path):
    settings = {"attention_window": 0, "attention_sinks": 0}
    checkpoint = convert_model(pair.teacher, tmp_path / "linear", progress=False, **settings)
    result = evaluated(checkpoint=checkpoint)
    values = row(result, "perplexity")["values"]
    assert values["window_only"] == values["linear_only"] == {"left_out": "the student has no window"}
    assert {"window_only", "linear_only"}.isdisjoint(row(result, "perplexity")["detail"])
    # the window of 64 tokens sees all of them
    assert values["window_sinks"]["value"] == pytest.approx(values["teacher"]["value"], rel=1e-5)
    make_report([tmp_path / "out"], tmp_path / "page")
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert page.count("left out, since the student has no window") == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": (24, 65)}, r"^perplexity in windows of 65 tokens exceeds the 64 that these models were made for"),
        ({"recall_lengths": (128,)}, r"^recall in samples of 128 tokens exceeds the 64"),
        ({"stride": 25}, r"^stride=25 must be from 1 to the length, 24"),
        ({"prompt_length": 40, "text_tokens": 30}, r"^the text has 30 tokens and a prompt 40; give more text"),
        ({"texts": (Path("nowhere.txt"),)}, r"^cannot read nowhere\.txt: No such file or directory$"),
        ({"new_tokens": 64}, r"^new_tokens=64 must be less than the models' context, 64$"),
        ({"device": "abacus"}, r"^device 'abacus' is unknown; choose from auto, cpu, cuda$"),
        ({"dtype": "float12"}, r"^dtype 'float12' is unknown.*; choose from auto, float32, "),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(evaluated, refused, tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr(Comparison, "loaded", None)
    refused(tmp_path, lambda: evaluated(**settings), message)


def test_two_texts_of_one_name_are_refused(evaluated, refused, text_file, tmp_path):
    (tmp_path / "text.txt").write_bytes(text_file.read_bytes())
    message = "^two texts have the same file name"
    refused(tmp_path, lambda: evaluated(texts=(text_file, tmp_path / "text.txt")), message)


def test_models_that_do_not_fit_are_refused(pair, evaluated, refused, other_words, tmp_path):
    refused(
        tmp_path, lambda: evaluated(checkpoint=pair.teacher), r"teacher is a llama model; give a checkpoint with linear layers"
    )
    refused(tmp_path, lambda: evaluated(teacher=pair.checkpoint), r"the teacher .* is a DiJiang model; give the softmax model")
    full = convert_model(pair.teacher, tmp_path / "full", progress=False, layer_types="full_attention")
    refused(tmp_path, lambda: evaluated(checkpoint=full), r"full is a DiJiang model without linear layers; give a checkpoint")
    message = r"^the tokenizers of checkpoint and other differ \(\d+ and \d+ entries; for example at 'a'\), so their scores"
    refused(tmp_path, lambda: evaluated(teacher=other_words), message)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    refused(tmp_path, lambda: evaluated("taken"), r"taken is not empty; choose a new one or empty it$")


@pytest.mark.gpu
def test_a_whole_evaluation_on_a_gpu(evaluated):
    on_gpu, here = evaluated("gpu", device="cuda"), evaluated("cpu", device="cpu")
    for mine, theirs in zip(on_gpu["tasks"], here["tasks"], strict=True):
        for key, value in theirs["values"].items():
            assert mine["values"][key]["value"] == pytest.approx(value["value"], rel=1e-2, abs=0.2)


@pytest.mark.drawn
def test_training_curves_are_read_from_beside_the_checkpoint(pair, evaluated, tmp_path):
    run = tmp_path / "run"
    (run / "distill" / "model").mkdir(parents=True)
    for path in pair.checkpoint.iterdir():
        (run / "distill" / "model" / path.name).write_bytes(path.read_bytes())
    provenance = read_provenance(pair.checkpoint)
    provenance["stages"] += [{"stage": "align", "tokens": 5}, {"stage": "distill", "tokens": 7}]
    write_provenance(run / "distill" / "model", provenance)
    lines = [
        {"step": 1, "loss": 2.5, "tokens": 4},
        {"step": 2, "tokens": 7, "eval_perplexity": 12.0, "eval_teacher_perplexity": 9},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo'  # cut off by a kill
    (run / "distill" / "metrics.jsonl").write_text(text, encoding="utf-8")
    result = evaluated(checkpoint=run / "distill" / "model")
    points = [{"loss": 2.5, "tokens": 4}, {"tokens": 7, "eval_perplexity": 12.0, "eval_teacher_perplexity": 9}]
    assert result["training"] == [{"stage": "distill", "points": points}]
    assert (tmp_path / "out" / "figures" / "training.png").is_file()


def test_windows_longer_than_the_text_are_one_task(evaluated):
    result = evaluated(text_tokens=30, lengths=(24, 40, 50), stride=None, map_tokens=0)
    names = [task["name"] for task in result["tasks"] if task["kind"] == "perplexity"]
    assert names == ["text.txt, 24 tokens", "text.txt, 30 tokens"]
