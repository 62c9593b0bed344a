"""A user's baselines: they score what they score elsewhere, in columns of their own, on the same units."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dijiang.common.result_cache import ResultCache
from dijiang.convert import convert_model, load_source
from dijiang.evaluate.quality.agreement import agreement_scores, prompts
from dijiang.evaluate.quality.variants import Comparison
from dijiang.evaluate.report.tables import score_table

pytestmark = pytest.mark.usefixtures("undrawn")
OWN = ["teacher", "window_sinks", "student", "window_only", "linear_only", "no_attention"]


@pytest.fixture
def sparse(pair, tmp_path):
    """sparse(n): the teacher with every n-th weight of each of its layers' matrices zero, in the folder `sparse`."""

    def make(every: int, name: str = "sparse") -> Path:
        folder = Path(shutil.copytree(pair.teacher, tmp_path / name))
        weights = load_file(folder / "model.safetensors")
        for key, weight in weights.items():
            if "layers" in key and weight.dim() == 2:
                weight.flatten()[::every] = 0
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def rows(result: dict, kind: str) -> list[dict]:
    return [task for task in result["tasks"] if task["kind"] == kind]


def near(score: dict | None):
    """A score and its interval, up to the order of sums in the means."""
    return score and {end: None if x is None else pytest.approx(x, rel=1e-9, abs=1e-12) for end, x in score.items()}


def same_score(task: dict, key: str, other: dict, other_key: str) -> None:
    assert task["detail"][key] == other["detail"][other_key]  # which is to the digit
    assert task["values"][key] == near(other["values"][other_key])


def comparable(result: dict) -> dict:
    return {key: value for key, value in result.items() if key not in ("seconds", "time", "results_reused")}


def test_a_baseline_scores_what_it_does_as_teacher_or_student(pair, evaluated, others, config):
    other, other_dijiang = others
    together = evaluated("together", beside=others, cache="one")
    of_others = evaluated("others", checkpoint=other_dijiang, teacher=other, cache="two")
    as_student = evaluated("student", checkpoint=other_dijiang, cache="three")
    (perplexity,), (theirs,) = rows(together, "perplexity"), rows(of_others, "perplexity")
    same_score(perplexity, "beside:other", theirs, "teacher")
    same_score(perplexity, "beside:other-dijiang", theirs, "student")
    assert perplexity["values"]["beside:other"]["low"] is not None
    (agreement,), (theirs,) = rows(together, "agreement"), rows(as_student, "agreement")
    same_score(agreement, "beside:other-dijiang", theirs, "student")
    model, tokenizer = load_source(other)
    tokens = torch.tensor(tokenizer(config.texts[0].read_text(encoding="utf-8"))["input_ids"][:300])
    reference = {"detail": agreement["detail"]["teacher"]}
    row = prompts(tokens, prompt_length=12, count=3)
    by_hand = agreement_scores(model, row, new_tokens=5, reference=reference, decode=tokenizer.decode)
    assert agreement["detail"]["beside:other"] == by_hand["detail"]
    assert agreement["values"]["beside:other"]["value"] == pytest.approx(sum(by_hand["totals"]) / sum(by_hand["weights"]))
    # the rest is what it is without them
    alone = evaluated("alone", cache="four")
    assert together["maps"] == alone["maps"]
    for task, without in zip(together["tasks"], alone["tasks"], strict=True):
        for key in OWN:
            same_score(task, key, without, key)
        for share in ("recovered", "over_training_free"):
            assert task[share] == near(without[share])


def test_a_copy_of_the_teacher_scores_what_the_teacher_does(pair, evaluated, tmp_path):
    copy = Path(shutil.copytree(pair.teacher, tmp_path / "copy"))
    for cache in ("cache", "cache"):  # measured, then from the cache
        result = evaluated(f"out{cache}{len(list(tmp_path.iterdir()))}", beside=[copy], cache=cache)
        for task in result["tasks"]:
            assert task["values"]["beside:copy"] == task["values"]["teacher"]
        (task,) = rows(result, "agreement")
        assert "continuations" in task["detail"]["teacher"] and "continuations" not in task["detail"]["beside:copy"]
        assert task["detail"]["beside:copy"]["sample"] == task["detail"]["teacher"]["sample"]
    assert result["results_reused"] == 15


def test_columns_are_in_the_order_given_and_shares_say_whose_they_are(evaluated, others):
    result = evaluated(beside=others[::-1])
    assert list(result["subjects"]) == [*OWN, "beside:other-dijiang", "beside:other"]
    assert result["subjects"]["beside:other-dijiang"] == "beside: other-dijiang (DiJiang)"
    assert result["subjects"]["beside:other"] == "beside: other (softmax attention)"
    header, lines = score_table(result)
    assert header[-4:] == ["other-dijiang", "other", "DiJiang recovered", "DiJiang over training-free"]
    assert header[1:4] == ["teacher", "training-free", "DiJiang"]
    assert {len(line) for line in lines} == {len(header)}
    for line, task in zip(lines, result["tasks"], strict=False):
        assert float(line[7].replace(",", "")) == pytest.approx(task["values"]["beside:other-dijiang"]["value"], rel=0.01)
    softmax, linear = (result["beside"][f"beside:{name}"] for name in ("other", "other-dijiang"))
    assert linear["name"] == "other-dijiang" and linear["source"] == "other" and linear["tokens"] == 0
    assert softmax["config"]["model_type"] == "llama" and "tokens" not in softmax
    assert {*softmax["weights"]} == {"model.safetensors"} and softmax["weights"] != linear["weights"]


def test_sparsity_is_measured(pair, evaluated, sparse, tmp_path):
    folder = sparse(2)
    student = convert_model(folder, tmp_path / "sparse-dijiang", progress=False, attention_window=4, output_gate=True)
    result = evaluated(checkpoint=student, beside=[folder, pair.checkpoint])
    assert result["beside"]["beside:sparse"]["zeros"] == 0.5
    assert result["beside"]["beside:checkpoint"]["zeros"] == result["teacher"]["zeros"] == 0
    assert 0.4 < result["student"]["zeros"] < 0.5  # its gates are dense


def test_it_continues_where_it_was_stopped(pair, evaluated, others, tmp_path, monkeypatch):
    whole = evaluated("whole", beside=others, cache="other")
    assert whole["results_reused"] == 0
    stored, put = [], ResultCache.put

    def stop_late(self, facts, result):
        put(self, facts, result)
        stored.append(facts)
        if len(stored) == 13:  # 6 variants with two tasks each, and one task of the first baseline
            raise KeyboardInterrupt

    monkeypatch.setattr(ResultCache, "put", stop_late)
    with pytest.raises(KeyboardInterrupt):
        evaluated(beside=others)
    monkeypatch.setattr(ResultCache, "put", put)
    rest = evaluated(beside=others)
    assert rest["results_reused"] == 13 and comparable(rest) == comparable(whole)
    monkeypatch.setattr(Comparison, "loaded", None)
    again = evaluated("again", beside=others)
    assert again["results_reused"] == 17 and comparable(again) == comparable(whole)
    renamed = others[0].rename(tmp_path / "renamed")
    assert evaluated("renamed-out", beside=[others[1], renamed])["results_reused"] == 17


def test_results_are_reused_only_where_they_are_the_same(pair, evaluated, others, sparse, monkeypatch):
    other, other_dijiang = others
    measured = []
    put = ResultCache.put

    def note(self, facts, result):
        measured.append(facts["kind"])
        put(self, facts, result)

    monkeypatch.setattr(ResultCache, "put", note)
    evaluated("first", checkpoint=other_dijiang, teacher=other)
    measured.clear()
    # as teacher and student they had another teacher to agree with, and maps are of the pair
    result = evaluated("second", beside=others)
    assert result["results_reused"] == 2 and measured.count("agreement") == 8 and measured.count("perplexity") == 6
    measured.clear()
    # the new student has been measured as a baseline; only its ablations and maps are new
    result = evaluated("third", checkpoint=other_dijiang, beside=[other, pair.checkpoint])
    assert sorted(measured) == ["agreement"] * 3 + ["maps"]
    measured.clear()
    evaluated("fourth", checkpoint=other_dijiang, beside=[sparse(3, "other-name")])
    assert sorted(measured) == ["agreement", "perplexity"]
    measured.clear()
    evaluated("fifth", beside=())
    assert measured == []


def test_names_that_do_not_tell_models_apart_are_refused(pair, evaluated, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(Comparison, "loaded", None)
    for folder in ("a", "b"):
        shutil.copytree(pair.teacher, tmp_path / folder / "same")
    message = "^two models of the table have the name same, which heads their columns; rename one$"
    refused(tmp_path, lambda: evaluated(beside=[tmp_path / "a" / "same", tmp_path / "b" / "same"]), message)
    message = "^two models of the table have the name teacher, which heads"
    refused(tmp_path, lambda: evaluated(beside=[pair.teacher]), message)


def test_baselines_that_do_not_fit_are_refused(pair, evaluated, refused, make_source, other_words, tmp_path, monkeypatch):
    monkeypatch.setattr(Comparison, "loaded", None)
    message = r"^the tokenizers of checkpoint and other differ \(\d+ and \d+ entries; .*compared; leave the second one out$"
    refused(tmp_path, lambda: evaluated(beside=[other_words]), message)
    refused(tmp_path, lambda: evaluated(beside=[tmp_path / "none"]), "none is neither a folder, nor a GGUF file, nor a hub id")
    short, _ = make_source(name="short", max_position_embeddings=20)
    message = r"^perplexity in windows of 24 tokens exceeds the 20 that these models were made for"
    refused(tmp_path, lambda: evaluated(beside=[short]), message)


def test_a_student_with_exact_memory_and_kept_heads(pair, evaluated, tmp_path):
    """Its ablations have a column more, their titles say what is left, and its maps are left out with the reason."""
    settings = {"attention_window": 4, "attention_sinks": 2, "branch_scale_init": 0.5}
    memory = {"attention_memory": 3, "memory_score": "key_norm"}
    student = convert_model(pair.teacher, tmp_path / "memory", progress=False, **settings, **memory)
    result = evaluated(checkpoint=student)
    assert list(result["subjects"]) == ["teacher", "window_sinks", "student", "window_only", "no_memory", *OWN[4:]]
    assert result["subjects"]["window_only"] == "DiJiang without the linear branch"
    assert result["subjects"]["no_memory"] == "DiJiang without exact memory"
    assert result["subjects"]["linear_only"] == "DiJiang, linear branch alone"
    assert result["maps"] is None and "exact memory" in result["left_out"]["attention maps"]
    header, _ = score_table(result)
    assert header[4:7] == ["no linear branch", "no exact memory", "linear alone"]
    # the student without memory is the same conversion without it
    without = evaluated("without", cache="other")
    (task,), (other,) = rows(result, "perplexity"), rows(without, "perplexity")
    same_score(task, "no_memory", other, "student")
    same_score(task, "linear_only", other, "linear_only")
    assert task["values"]["student"] != task["values"]["no_memory"]

    kept = convert_model(pair.teacher, tmp_path / "kept", progress=False, **settings, full_heads=[[1], []])
    result = evaluated("kept-out", checkpoint=kept)
    assert list(result["subjects"]) == OWN and result["maps"] is None
    assert result["subjects"]["window_only"] == "DiJiang without the linear branch"
    assert result["subjects"]["linear_only"] == "DiJiang, linear branch and kept heads alone"
