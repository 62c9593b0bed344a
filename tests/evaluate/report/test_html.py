"""The page: all it needs is in it, and it is drawn from JSON files, those of earlier versions included."""

import json
import re
from pathlib import Path

import numpy as np

from dijiang.evaluate.report import map_figures
from dijiang.evaluate.report.html import make_report
from dijiang.evaluate.report.tables import score_table

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def test_the_page_asks_for_nothing_outside_itself(evaluated, tmp_path):
    evaluated()
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    pictures = sorted(path.stem for path in (tmp_path / "out" / "figures").iterdir())
    assert sorted(re.findall(r'<figure id="(\w+)"', page)) == pictures
    assert {"perplexity", "perplexity_by_position", "attention_maps", "effective_context"} <= set(pictures)
    assert page.count("data:image/png;base64,") == len(pictures)
    assert not re.search(r'(?:src|href|action)\s*=\s*"(?!data:|#)|url\(|@import|<script|<link|<iframe', page)


def test_the_report_can_be_drawn_again_from_its_json(evaluated, tmp_path):
    evaluated()
    page = make_report([tmp_path / "out"], tmp_path / "again")
    assert page == tmp_path / "again" / "report.html"
    for path in sorted((tmp_path / "out").rglob("*")):
        if path.suffix in (".png", ".html"):
            assert (tmp_path / "again" / path.relative_to(tmp_path / "out")).read_bytes() == path.read_bytes(), path.name


def test_results_from_before_there_were_baselines_of_a_user_are_drawn(tmp_path):
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*/evaluation.json"))]
    alone = [result for result in results if "beside" not in result]
    assert alone
    for result in alone:
        header, _ = score_table(result)
        assert header[-3:] == ["no attention", "recovered", "over training-free"]
    make_report([RESULTS / "demo" / "evaluation.json"], tmp_path / "page")
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "<th>recovered</th>" in page and "<b>DiJiang</b>: DiJiang" in page and "are zero" not in page


def test_attention_maps_of_earlier_versions_are_drawn(tmp_path, drawings_of):
    (tmp_path / "page").mkdir()
    drawings = drawings_of(map_figures)
    make_report([RESULTS / "window" / "evaluation.json"], tmp_path / "page")
    lines = {line.get_label(): list(line.get_ydata()) for line in drawings["map_distance"][0].get_lines()}
    layers = json.loads((RESULTS / "window" / "evaluation.json").read_text(encoding="utf-8"))["maps"]["layers"]
    assert lines["training-free window + sinks"] == [np.median(layer["distance"]["window_only"]) for layer in layers]
