"""The figures of an evaluation show the numbers of its JSON."""

import math

import numpy as np
import pytest
from matplotlib import image

from dijiang.evaluate.report import quality_figures
from dijiang.evaluate.report.quality_figures import NEAR_TEACHER, STYLE, draw_quality

SUBJECTS = {key: key.upper() for key in STYLE}


def task(kind: str, name: str, values: dict, **facts) -> dict:
    scores = {key: {"value": x, "low": 0.9 * x, "high": 1.2 * x} for key, x in values.items()}
    scores |= {key: {"left_out": "none"} for key in SUBJECTS if key not in values}
    return {
        "kind": kind,
        "name": name,
        "values": scores,
        "recovered": None,
        "chance": None,
        "settings": {},
        "detail": {},
    } | facts


@pytest.fixture
def result() -> dict:
    rng = np.random.default_rng(0)
    by = {
        key: {
            "by_position": {"edges": [64, 128, 150], "totals": rng.uniform(50, 90, 3).tolist(), "weights": [63.0, 64.0, 0.0]}
        }
        for key in SUBJECTS
    }
    perplexity = dict(zip(SUBJECTS, [20.0, 30.0, 21.0, 24.0, 800.0], strict=False))
    tasks = [task("perplexity", "book, 150 tokens", perplexity, detail=by, recovered={"value": 0.8, "low": 0.7, "high": 0.95})]
    for length in (128, 256):
        for kind in ("needle", "pairs"):
            values = dict(zip(SUBJECTS, rng.uniform(size=4).tolist(), strict=False))
            tasks.append(task("recall", f"{kind}, {length}", values, chance=0.25, settings={"kind": kind, "length": length}))
    tasks[-1]["recovered"] = {"value": -0.1, "low": None, "high": None}
    training = [
        {"stage": "align", "points": [{"tokens": 10, "loss": 0.5}, {"tokens": 20, "eval_perplexity": 40.0}]},
        {"stage": "distill", "points": [{"tokens": 5, "loss": 2.5, "eval_perplexity": 30.0, "eval_teacher_perplexity": 25.0}]},
    ]
    return {"tasks": tasks, "subjects": SUBJECTS, "training": training}


def lines(axes) -> dict:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_figures_show_the_numbers(result, drawings_of, tmp_path):
    drawings = drawings_of(quality_figures)
    paths = draw_quality(result, tmp_path)
    assert [path.stem for path in paths] == ["perplexity", "perplexity_by_position", "recall", "recovered", "training"]
    assert all(np.ptp(image.imread(path)) > 0.5 for path in paths)

    (axes,) = drawings["perplexity"]
    assert [bar.get_width() for bar in axes.patches] == [20.0, 30.0, 21.0, 24.0, 800.0]  # no bar for what was left out
    assert [label.get_text() for label in axes.get_yticklabels()] == [SUBJECTS[key] for key in list(SUBJECTS)[:5]]

    (axes,) = drawings["perplexity_by_position"]
    for key in NEAR_TEACHER:
        by = result["tasks"][0]["detail"][key]["by_position"]
        expected = [math.exp(by["totals"][0] / 63), math.exp(by["totals"][1] / 64)]  # none of the empty bucket
        assert lines(axes)[SUBJECTS[key]] == ([64, 128], pytest.approx(expected))

    for axes, kind in zip(drawings["recall"], ("needle", "pairs"), strict=True):
        mine = [x for x in result["tasks"][1:] if x["settings"]["kind"] == kind]
        shown = lines(axes)
        assert shown.keys() == {*list(SUBJECTS.values())[:4], "chance"} and shown["chance"] == ([128, 256], [0.25, 0.25])
        for key in list(SUBJECTS)[:4]:
            assert shown[SUBJECTS[key]] == ([128, 256], [x["values"][key]["value"] for x in mine])

    (axes,) = drawings["recovered"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["perplexity: book, 150 tokens", "recall: pairs, 256"]
    points = [line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() == "o"]
    assert points == [0.8, -0.1]

    loss, quality = drawings["training"]
    assert lines(loss) == {"align": ([10], [0.5]), "distill": ([25], [2.5])}  # the second stage goes on where the first ended
    found = lines(quality)
    assert found["align"] == ([20], [40.0]) and found["distill"] == ([25], [30.0]) and found["teacher"][1] == [25.0, 25.0]


def test_nothing_is_drawn_of_nothing(result, tmp_path):
    assert draw_quality(result | {"tasks": [], "training": []}, tmp_path) == []
