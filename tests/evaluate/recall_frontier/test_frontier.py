"""The frontier benchmark: it continues where it was stopped, and tells constant memory from growing memory."""

import json
import math
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from matplotlib import image

from dijiang.common.result_cache import ResultCache
from dijiang.common.settings import describe
from dijiang.convert import load_source
from dijiang.evaluate import window_only
from dijiang.evaluate.quality.perplexity import perplexity_scores
from dijiang.evaluate.recall_frontier import report
from dijiang.evaluate.recall_frontier.config import FrontierConfig
from dijiang.evaluate.recall_frontier.configurations import Configuration, configurations
from dijiang.evaluate.recall_frontier.run import Teacher, run_frontier

NEW = ("seconds", "time", "results_reused")


def at(heads: int = 0, slots: int = 0, **facts) -> Configuration:
    facts = {"attention_window": 8, "attention_sinks": 2, "memory_score": "key_norm"} | facts
    name = f"{heads} heads, {slots} slots{'' if facts.get('linear_branch', True) else ', no linear branch'}"
    return Configuration(**{"name": name, "full_heads": heads, "attention_memory": slots} | facts)


CHOSEN = [at(), at(linear_branch=False), at(slots=6), at(heads=2), at(heads=2, slots=6), at(heads=1, control=True)]
CELLS = 7 * 4


@pytest.fixture
def config(text_file):
    return FrontierConfig(
        texts=(text_file,), text_tokens=600, lengths=(64, 100), recall_kinds=("needle",), recall_lengths=(150,),
        recall_samples=6, reference_length=200, dtype="float32",
    )  # fmt: skip


@pytest.fixture
def teacher(long_teacher):
    model, tokenizer = load_source(long_teacher)
    return Teacher(model=model, tokenizer=tokenizer, name="long", identity={"weights": "long"})


@pytest.fixture
def builder(long_teacher):
    """A builder of students with the first heads kept, and the list of what it built."""
    names = []

    def build(configuration: Configuration):
        names.append(configuration.name)
        heads = [(layer, head) for layer in range(2) for head in range(2)][: configuration.full_heads]
        kept = [[head for at_layer, head in heads if at_layer == layer] for layer in range(2)]
        settings = configuration.settings | {"branch_scale_init": 0.3, "layer_types": "linear_attention"}
        return load_source(long_teacher, full_heads=kept, **settings)[0]

    build.names = names
    return build


def comparable(result: dict) -> dict:
    return {key: value for key, value in result.items() if key not in NEW}


@pytest.mark.parametrize("linear", [True, False])
def test_a_student_without_memories_is_not_taken_for_the_teacher(teacher, builder, config, tmp_path, linear):
    """It stands next to the teacher in the list, and their facts are the same."""
    plain = Configuration(name="window 64", linear_branch=linear)
    result = run_frontier(teacher, builder, config, only=[plain], cache=tmp_path, progress=False)
    assert builder.names == ["window 64"]
    first, second = (row["memory"]["bytes_per_sequence"]["200"] for row in result["rows"])
    assert first != second and result["rows"][1]["perplexity_ratio"]["100"]["value"] != 1.0


def test_a_stopped_run_continues_to_the_same_result(teacher, builder, config, tmp_path, monkeypatch):
    def run(name: str, cache: str) -> dict:
        options = {"only": CHOSEN, "output": tmp_path / name, "cache": tmp_path / cache, "progress": False}
        return run_frontier(teacher, builder, config, **options)

    whole = run("whole.json", "other")
    assert whole["results_reused"] == 0 and whole == json.loads((tmp_path / "whole.json").read_text(encoding="utf-8"))
    # the second one differs from the first in its ablation only
    assert builder.names == [item.name for item in CHOSEN if item.linear_branch]
    stored, put = [], ResultCache.put

    def stop_late(self, facts, result):
        put(self, facts, result)
        stored.append(facts)
        if len(stored) == 10:  # teacher and first student whole, and half of the second
            raise KeyboardInterrupt

    monkeypatch.setattr(ResultCache, "put", stop_late)
    with pytest.raises(KeyboardInterrupt):
        run("rest.json", "cache")
    assert not (tmp_path / "rest.json").exists()
    monkeypatch.setattr(ResultCache, "put", put)
    builder.names.clear()
    rest = run("rest.json", "cache")
    assert rest["results_reused"] == 10 and comparable(rest) == comparable(whole)
    assert len(builder.names) == 5  # the first model again, for the ablation
    builder.names.clear()
    again = run("again.json", "cache")
    assert again["results_reused"] == CELLS and comparable(again) == comparable(whole) and builder.names == []
    assert run_frontier(teacher, builder, config, only=CHOSEN[2:4], cache=tmp_path / "cache", progress=False)
    assert builder.names == []
    other = replace(teacher, identity={"weights": "others"})
    options = {"only": CHOSEN[:1], "cache": tmp_path / "cache", "progress": False}
    assert run_frontier(other, builder, config, **options)["results_reused"] == 0


def test_rows_are_what_was_measured(teacher, builder, config, tmp_path):
    result = run_frontier(teacher, builder, config, only=CHOSEN, cache=tmp_path / "cache", progress=False)
    assert result["kind"] == "recall_frontier" and result["teacher"] == "long"
    assert [row["name"] for row in result["rows"]] == ["teacher", *(item.name for item in CHOSEN)]
    rows = {row["name"]: row for row in result["rows"]}
    constant = {name for name, row in rows.items() if row["memory"]["constant"]}
    assert constant == {"0 heads, 0 slots", "0 heads, 0 slots, no linear branch", "0 heads, 6 slots"}
    assert rows["2 heads, 0 slots"]["memory"]["bytes_per_token"] == 2 * 2 * 8 * 4
    sizes = [rows[item.name]["memory"]["bytes_per_sequence"]["200"] for item in CHOSEN]
    assert sizes[1] < sizes[0] < sizes[2] < sizes[4] and rows["teacher"]["memory"]["bytes_per_token"] == 4 * 2 * 8 * 4
    tokens = torch.tensor(teacher.tokenizer(config.texts[0].read_text(encoding="utf-8"))["input_ids"][:600])
    student = builder(CHOSEN[0])

    def perplexity(model) -> float:
        scores = perplexity_scores(model, tokens, length=64, stride=64)
        return math.exp(sum(scores["totals"]) / sum(scores["weights"]))

    key = "perplexity: text.txt, 64 tokens"
    assert rows["0 heads, 0 slots"]["values"][key]["value"] == pytest.approx(perplexity(student), rel=1e-6)
    with window_only(student):
        alone = perplexity(student)
    assert rows["0 heads, 0 slots, no linear branch"]["values"][key]["value"] == pytest.approx(alone, rel=1e-6)
    share = rows["2 heads, 6 slots"]["perplexity_ratio"]["64"]
    expected = rows["2 heads, 6 slots"]["values"][key]["value"] / rows["teacher"]["values"][key]["value"]
    assert share["value"] == pytest.approx(expected) and share["low"] < share["value"] < share["high"]
    assert rows["teacher"]["perplexity_ratio"]["64"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert rows["teacher"]["values"]["recall: needle, 150 tokens"]["value"] is not None


def test_what_cannot_be_measured_is_refused_first(teacher, builder, config, refused, tmp_path):
    def run(**settings):
        return run_frontier(teacher, builder, replace(config, **settings), only=CHOSEN, cache=tmp_path, progress=False)

    refused(tmp_path, lambda: run(lengths=(300,)), "^perplexity in windows of 300 tokens exceeds the 256")
    refused(tmp_path, lambda: run(recall_lengths=(300,)), "^recall in samples of 300 tokens exceeds the 256")
    taken = tmp_path / "taken.json"
    taken.touch()
    message = "taken.json exists already"
    refused(tmp_path, lambda: run_frontier(teacher, builder, config, only=CHOSEN, output=taken), message)
    assert builder.names == []


# --- configurations ---


def test_the_grid_and_what_it_is_compared_with(config):
    small = replace(
        config, heads=(0, 7), slots=(0, 128), scores=("learned", "key_norm"), score_heads=(0, 7), control_heads=(7,),
        random_draws=2,
    )  # fmt: skip
    found = configurations(small)
    names = [item.name for item in found]
    assert len({*names}) == len(names)
    assert [item.name for item in found if not item.control] == [
        "window 64", "window 64, no linear branch", "128 slots", "128 slots, no linear branch",
        "7 heads", "7 heads, no linear branch", "7 heads + 128 slots", "7 heads + 128 slots, no linear branch",
        "7 heads of 4096 slots + 128 slots",
    ]  # fmt: skip
    assert [item.name for item in found if item.control] == [
        "128 slots in every head by learned", "7 heads + 128 slots in every head by learned",
        "128 slots in every head by key_norm", "7 heads + 128 slots in every head by key_norm", "window 192",
        "7 heads by random, draw 1", "7 heads by random, draw 2", "7 heads by perplexity", "7 heads by uniform",
        "7 heads by layers",
    ]  # fmt: skip
    wide = found[names.index("window 192")]
    assert wide.settings == {"attention_window": 192, "attention_sinks": 4, "attention_memory": 0} and not wide.ablation
    both = found[names.index("7 heads + 128 slots, no linear branch")]
    assert both.ablation == "window_only" and both.full_heads == 7 and both.selection == "recall"
    assert both.settings["attention_memory"] == 128 and both.settings["memory_score"] == "learned"
    assert found[names.index("7 heads by random, draw 2")].draw == 1
    assert not any(item.ablation for item in configurations(replace(small, without_linear=False)))
    assert len({json.dumps(item.facts(), sort_keys=True) for item in found}) == len(found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": ()}, "^heads is empty; name at least one$"),
        ({"slots": (5, 5)}, "^slots holds a value twice; give each once$"),
        ({"slots": (-1,)}, "^slots holds -1, which must be at least 0$"),
        ({"recall_kinds": ("long coda",)}, r"^recall kind 'long coda' is unknown \(did you mean long code\?\)"),
        ({"controls": ("chance",)}, "^controls holds 'chance'; choose from random, perplexity, uniform, layers$"),
        ({"recall_samples": 0}, "^recall_samples=0 must be at least 1$"),
    ],
)
def test_settings_without_sense_are_refused(config, refused, tmp_path, settings, message):
    refused(tmp_path, lambda: replace(config, **settings), message)


def test_every_setting_is_described_and_needs_no_torch(tmp_path):
    described = describe(FrontierConfig)
    assert [name for name, _, _ in described] == [field.name for field in fields(FrontierConfig)]
    assert all(text for _, _, text in described)
    code = "import sys, dijiang.evaluate.recall_frontier.configurations; print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_quick_settings_are_a_few(config):
    quick = config.quick()
    assert len(configurations(quick)) < 20 and quick.recall_samples == 2 and quick.texts == config.texts


# --- report ---


def made_row(name: str, size: int, share: float | None, ratio: float, *, constant: bool, **facts) -> dict:
    def scored(value):
        return {"value": value, "low": value * 0.9, "high": value * 1.1}

    memory = {"constant": constant, "bytes_per_token": 0 if constant else 256, "bytes_per_sequence": {"4096": size << 20}}
    shares = {} if share is None else {"all": scored(share), "needle": scored(share)}
    made = {"name": name, "memory": memory, "recall_share": shares, "linear_branch": True, "control": False}
    return made | {"perplexity_ratio": {"1024": scored(ratio), "4096": scored(ratio + 0.1)}} | facts


@pytest.fixture
def result():
    rows = [
        made_row("teacher", 90, 1.0, 1.0, constant=False),
        made_row("small", 4, 0.1, 1.3, constant=True),
        made_row("worse", 5, 0.05, 1.2, constant=True, linear_branch=False),
        made_row("slots", 6, 0.6, 1.1, constant=True),
        made_row("heads", 12, 0.9, 1.2, constant=False),
        made_row("wide", 7, 0.7, 1.1, constant=True, control=True),
        made_row("random", 12, 0.2, 1.25, constant=False, control=True),
    ]
    settings = {"reference_length": 4096, "dtype": "bfloat16"}
    return {"rows": rows, "settings": settings, "left_out": {"copied span": "it has no words"}}


def test_constant_and_growing_memory_are_told_apart(result, drawings_of, tmp_path):
    drawings = drawings_of(report)
    path = report.draw_frontier(result, tmp_path / "frontier.png")
    assert np.ptp(image.imread(path)) > 0.5
    recall, perplexity = drawings["frontier"]
    for axes, position in ((recall, 0), (perplexity, 1)):
        points = {}
        for line in axes.get_lines():
            if len(line.get_xdata()) == 1:
                shape = (line.get_marker(), line.get_color())
                points.setdefault(shape, set()).add((round(line.get_xdata()[0]), round(line.get_ydata()[0], 3)))
        expected = {}
        for row in result["rows"][1:]:
            marker, color, _ = report.POINTS[row["memory"]["constant"], row["control"]]
            score = row["recall_share"]["all"] if position == 0 else row["perplexity_ratio"]["4096"]
            size = row["memory"]["bytes_per_sequence"]["4096"] >> 20
            expected.setdefault((marker, color), set()).add((size, round(score["value"], 3)))
        assert expected.items() <= points.items()
        assert ("*", report.TEACHER_COLOR) in points and axes.get_xscale() == "log"
    assert {text.get_text() for text in recall.texts} == {"small", "slots", "heads", "worse"}  # all, as they are few
    legend = {text.get_text() for text in recall.figure.legends[0].get_texts()}
    assert legend == {text for _, _, text in report.POINTS.values()} | {"teacher"}


def test_the_table_is_in_the_order_of_memory(result):
    header, rows = report.frontier_table(result)
    assert header == [
        "configuration", "4,096 tokens", "bytes per token", "recall, all", "recall, needle", "perplexity at 1,024",
        "perplexity at 4,096",
    ]  # fmt: skip
    assert [row[0] for row in rows] == ["small", "worse", "slots", "wide", "heads", "random", "teacher"]
    small = ["small", "4.0 MiB", "constant", "10% [9%, 11%]", "10%", "1.300x [1.170x, 1.430x]", "1.400x [1.260x, 1.540x]"]
    assert rows[0] == small and rows[4][2] == "+256"
    page = report.frontier_page(result)
    assert page.startswith("| configuration |") and "Left out: copied span, since it has no words." in page


def test_without_recall_or_perplexity_there_is_half_a_plot(result, tmp_path):
    for row in result["rows"]:
        row["recall_share"] = {}
    assert report.draw_frontier(result, tmp_path / "half.png").is_file()
    assert report.best_rows(result, constant=True) == []


@pytest.mark.parametrize("plot", [True, False])
def test_files_are_written(teacher, builder, config, tmp_path, plot):
    paths = {"output": tmp_path / "frontier.json", "plot": tmp_path / "frontier.png" if plot else None}
    run_frontier(teacher, builder, config, only=CHOSEN[:3], cache=tmp_path / "cache", progress=False, **paths)
    assert (tmp_path / "frontier.json").is_file() and (tmp_path / "frontier.png").is_file() == plot
    rows = json.loads((tmp_path / "frontier.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 4
