"""Further models of an evaluation: they score what they score elsewhere, in columns of their own, on the same units."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dijiang.convert import convert_model, load_source
from dijiang.evaluate.quality import run as evaluation
from dijiang.evaluate.quality.agreement import agreement_scores, prompts
from dijiang.evaluate.quality.variants import Comparison
from dijiang.evaluate.report import quality_figures
from dijiang.evaluate.report.html import make_report
from dijiang.evaluate.report.model_card import model_card
from dijiang.evaluate.report.style import CONTROL_COLOUR, STUDENT_COLOUR, TEACHER_COLOUR, THIRD_COLOUR
from dijiang.evaluate.report.tables import score_table

pytestmark = pytest.mark.usefixtures("undrawn")
OWN = ["teacher", "window_sinks", "student", "window_only", "linear_only", "no_attention"]
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture
def others(make_source, tmp_path):
    """Folders of a softmax model of another seed, and of its conversion."""
    other, _ = make_source(name="other", seed=1, num_key_value_heads=2)
    settings = {"attention_window": 3, "attention_sinks": 1, "branch_scale_init": 0.4}
    return other, convert_model(other, tmp_path / "other-dijiang", progress=False, **settings)


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


def test_a_further_model_scores_what_it_does_as_teacher_or_student(pair, evaluated, others, config):
    other, other_dijiang = others
    together = evaluated("together", beside=others, cache="one")
    of_others = evaluated("others", checkpoint=other_dijiang, teacher=other, cache="two")
    as_student = evaluated("student", checkpoint=other_dijiang, cache="three")
    (found,), (theirs,) = rows(together, "perplexity"), rows(of_others, "perplexity")
    same_score(found, "beside:other", theirs, "teacher")
    same_score(found, "beside:other-dijiang", theirs, "student")
    assert found["values"]["beside:other"]["low"] is not None
    (found,), (theirs,) = rows(together, "agreement"), rows(as_student, "agreement")
    same_score(found, "beside:other-dijiang", theirs, "student")
    model, tokenizer = load_source(other)
    tokens = torch.tensor(tokenizer(config.texts[0].read_text(encoding="utf-8"))["input_ids"][:300])
    reference = {"detail": found["detail"]["teacher"]}
    row = prompts(tokens, prompt_length=12, count=3)
    by_hand = agreement_scores(model, row, new_tokens=5, reference=reference, decode=tokenizer.decode)
    assert found["detail"]["beside:other"] == by_hand["detail"]
    assert found["values"]["beside:other"]["value"] == pytest.approx(sum(by_hand["totals"]) / sum(by_hand["weights"]))
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
    for cache in ("cache", "cache"):  # measured, then as kept
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
    for line, task in zip(lines, result["tasks"], strict=True):
        assert len(line) == len(header)
        assert float(line[7].replace(",", "")) == pytest.approx(task["values"]["beside:other-dijiang"]["value"], rel=0.01)
    softmax, linear = (result["beside"][f"beside:{name}"] for name in ("other", "other-dijiang"))
    assert linear["name"] == "other-dijiang" and linear["source"] == "other" and linear["tokens"] == 0
    assert softmax["config"]["model_type"] == "llama" and "tokens" not in softmax
    assert {*softmax["weights"]} == {"model.safetensors"} and softmax["weights"] != linear["weights"]


def test_sparsity_is_told(pair, evaluated, sparse, tmp_path):
    folder = sparse(2)
    student = convert_model(folder, tmp_path / "sparse-dijiang", progress=False, attention_window=4, output_gate=True)
    result = evaluated(checkpoint=student, beside=[folder, pair.checkpoint])
    assert result["beside"]["beside:sparse"]["zeros"] == 0.5
    assert result["beside"]["beside:checkpoint"]["zeros"] == result["teacher"]["zeros"] == 0
    assert 0.4 < result["student"]["zeros"] < 0.5  # its gates are dense


def test_it_goes_on_where_it_was_stopped(pair, evaluated, others, tmp_path, monkeypatch):
    whole = evaluated("whole", beside=others, cache="other")
    assert whole["results_reused"] == 0
    kept, put = [], evaluation.ResultCache.put

    def stop_late(self, facts, result):
        put(self, facts, result)
        kept.append(facts)
        if len(kept) == 13:  # 6 subjects with two tasks each, and one of the first further model
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluation.ResultCache, "put", stop_late)
    with pytest.raises(KeyboardInterrupt):
        evaluated(beside=others)
    monkeypatch.setattr(evaluation.ResultCache, "put", put)
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
    put = evaluation.ResultCache.put

    def note(self, facts, result):
        measured.append(facts["kind"])
        put(self, facts, result)

    monkeypatch.setattr(evaluation.ResultCache, "put", note)
    evaluated("first", checkpoint=other_dijiang, teacher=other)
    measured.clear()
    # as teacher and student they had another teacher to agree with, and maps are of the pair
    result = evaluated("second", beside=others)
    assert result["results_reused"] == 2 and measured.count("agreement") == 8 and measured.count("perplexity") == 6
    measured.clear()
    # another student of the same teacher: what it is as a student it was beside; its controls and maps alone are new
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


def test_further_models_that_do_not_fit_are_refused(pair, evaluated, refused, make_source, other_words, tmp_path, monkeypatch):
    monkeypatch.setattr(Comparison, "loaded", None)
    message = r"^the tokenizers of checkpoint and other differ \(\d+ and \d+ entries; .*compared; leave the second one out$"
    refused(tmp_path, lambda: evaluated(beside=[other_words]), message)
    refused(tmp_path, lambda: evaluated(beside=[tmp_path / "none"]), "none is neither a folder, nor a GGUF file, nor a hub id")
    short, _ = make_source(name="short", max_position_embeddings=20)
    message = r"^perplexity in windows of 24 tokens exceeds the 20 that these models were made for"
    refused(tmp_path, lambda: evaluated(beside=[short]), message)


@pytest.mark.drawn
def test_they_are_shown_wherever_results_are(long_teacher, make_source, evaluated, drawings_of, tmp_path, monkeypatch):
    """All kinds of tasks, and a name that HTML and matplotlib might take for something else."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    documents = [{"question": f"the {word}", "answer": i % 2} for i, word in enumerate(("cat", "rat", "mat") * 2)]
    (tmp_path / "d.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in documents), encoding="utf-8")
    task = f"""
        task: own
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: {tmp_path}/d.jsonl}}}}
        output_type: multiple_choice
        test_split: test
        doc_to_text: "{{{{question}}}}"
        doc_to_choice: ["sat", "on"]
        doc_to_target: answer
        metric_list: [{{metric: acc}}]
    """
    (tmp_path / "own.yaml").write_text(task, encoding="utf-8")
    settings = {"attention_window": 4, "attention_sinks": 2, "branch_scale_init": 0.5}
    student = convert_model(long_teacher, tmp_path / "student", progress=False, **settings)
    nasty = r"a <b>&amp; $\x$ [red]{{ 1 }}"
    names = (nasty, *(f"other-{i}" for i in range(6)))
    models = [make_source(name=name, seed=i, max_position_embeddings=256)[0] for i, name in enumerate(names)]
    drawings = drawings_of(quality_figures)
    result = evaluated(
        checkpoint=student, teacher=long_teacher, beside=models, recall_lengths=(96, 128), recall_samples=6, map_tokens=0,
        lengths=(100,), stride=None, tasks=(str(tmp_path / "own.yaml"),),
    )  # fmt: skip
    keys = [f"beside:{name}" for name in names]
    assert {task["kind"] for task in result["tasks"]} == {"perplexity", "recall", "agreement", "lm_eval"}
    for task in result["tasks"]:
        assert all(task["values"][key]["value"] is not None and key in task["detail"] for key in keys)

    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    shown = nasty.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert nasty not in page and f"<th>{shown}</th><th>other-0</th>" in page
    assert f"<b>beside: {shown} (softmax attention)</b>" in page
    assert "<th>DiJiang recovered</th><th>DiJiang over training-free</th>" in page
    widths = {len(re.findall("<t[hd]", row)) for row in re.findall(r"<tr>.*?</tr>", page, flags=re.DOTALL)}
    assert widths == {3 + 6 + 7 + 2}
    assert page.count("<pre>") == 1 + 1 + 6 + 7 - (result["command"] is None)

    titles = [quality_figures.label(title) for title in result["subjects"].values()]
    (axes,) = drawings["perplexity"]
    assert [label.get_text() for label in axes.get_yticklabels()] == titles
    styles = quality_figures.styles(result["subjects"])
    for name, few in (("perplexity_by_position", 4), ("recall", 6)):
        axes = drawings[name][0]
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert {*titles[-7:]} <= lines.keys() and len(lines) == few + 7 + (name == "recall")
        legend = [text.get_text() for text in axes.figure.legends[0].get_texts()]
        assert sorted(legend) == sorted(lines)
        drawn = {(line.get_color(), line.get_linestyle()) for line in lines.values()}
        assert len(drawn) == len(lines)
    own = {TEACHER_COLOUR, STUDENT_COLOUR, CONTROL_COLOUR, THIRD_COLOUR}
    assert not own & {styles[key][0] for key in keys} and len({styles[key] for key in keys}) == 7
    assert len({styles[key][0] for key in keys[:5]}) == 5


def test_the_card_is_the_students_alone(pair, evaluated, others):
    result = evaluated(beside=others)
    command = "dijiang evaluate runs/checkpoint --against teacher --beside org/other --beside here/other-dijiang"
    result["beside"]["beside:other"]["name"] = "org/other"
    with_them = model_card(pair.checkpoint, result | {"command": command})
    assert "beside: other" not in with_them.text
    expected = "dijiang evaluate checkpoint --against teacher --beside org/other --beside other-dijiang"
    assert f"\n{expected}\n" in with_them.text
    without = {key: title for key, title in result["subjects"].items() if key in OWN}
    alone = model_card(pair.checkpoint, result | {"command": expected, "subjects": without, "beside": {}})
    assert alone.text.replace("org/", "") == with_them.text.replace("org/", "")


@pytest.mark.drawn
def test_results_from_before_there_were_any_are_drawn(tmp_path):
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*/evaluation.json"))]
    alone = [result for result in results if "beside" not in result]
    assert alone
    for result in alone:
        header, _ = score_table(result)
        assert header[-3:] == ["no attention", "recovered", "over training-free"]
    make_report([RESULTS / "demo" / "evaluation.json"], tmp_path / "page")
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "<th>recovered</th>" in page and "<b>DiJiang</b>: DiJiang" in page and "are zero" not in page
