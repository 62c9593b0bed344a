"""A user's baselines on the page, in the figures and on the card."""

import json
import re

import pytest

from dijiang.convert import convert_model
from dijiang.evaluate.report import quality_figures
from dijiang.evaluate.report.model_card import model_card
from dijiang.evaluate.report.style import ABLATION_COLOR, BASELINE_COLOR, STUDENT_COLOR, TEACHER_COLOR

OWN = ["teacher", "window_sinks", "student", "window_only", "linear_only", "no_attention"]


def test_they_are_on_the_page_and_in_the_figures(long_teacher, make_source, evaluated, drawings_of, tmp_path, monkeypatch):
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
    own = {TEACHER_COLOR, STUDENT_COLOR, ABLATION_COLOR, BASELINE_COLOR}
    assert not own & {styles[key][0] for key in keys} and len({styles[key] for key in keys}) == 7
    assert len({styles[key][0] for key in keys[:5]}) == 5


@pytest.mark.usefixtures("undrawn")
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
