"""Results of earlier versions are read under the names of today."""

import json
from pathlib import Path

from dijiang.evaluate.report.results import read_results

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
OLD, NEW = "window_only", "window_sinks"  # names of the training-free window in attention maps, up to 0.1.1 and since


def test_attention_maps_of_earlier_versions_are_read_under_the_new_name(tmp_path):
    file = RESULTS / "window" / "evaluation.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    read = read_results([file])["evaluation"]
    for old, new in zip(written["maps"]["layers"], read["maps"]["layers"], strict=True):
        assert old["distance"][OLD] == new["distance"][NEW] and OLD not in new["distance"]
        assert {*old["distance"]} - {OLD} == {*new["distance"]} - {NEW}
    assert read["tasks"] == written["tasks"] and OLD in read["subjects"]  # the ablation keeps its name
    (tmp_path / "again.json").write_text(json.dumps(read), encoding="utf-8")
    assert read_results([tmp_path / "again.json"])["evaluation"] == read
