"""The figures of a latency result draw what was measured."""

from contextlib import contextmanager

import pytest
from dijiang_testing.latency import CPU, LIMITS, checkpoint_pair, quick

from dijiang.evaluate.latency import measure
from dijiang.evaluate.report import latency_figures
from dijiang.evaluate.report.latency_figures import draw_latency


def test_figures_draw_what_was_measured(pair, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(measure, "machine_limits", lambda dtypes, device: LIMITS)
    result = quick(checkpoint_pair(pair.checkpoint, pair.teacher, longest=60, **CPU), batches=(1, 2))
    result["rows"][0] = {"phase": "prefill", "batch": 1, "context": 9, "left_out": "no room"}
    result["rows"][-1] = {"phase": "decode", "batch": 2, "context": 24, "left_out": "no room"}
    drawn = latency_figures.drawn
    seen = {}

    @contextmanager
    def recorded(path, *grid, size):
        with drawn(path, *grid, size=size) as (figure, axes):
            yield figure, axes
            for panel in figure.axes:
                lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in panel.get_lines()}
                seen[path.name, panel.get_title()] = lines

    monkeypatch.setattr(latency_figures, "drawn", recorded)
    paths = draw_latency(result, tmp_path)
    assert paths == [tmp_path / "latency.png", tmp_path / "memory.png"] == sorted(tmp_path.iterdir())
    decode = {row["context"]: row for row in result["rows"] if row["phase"] == "decode" and row["batch"] == 1}
    ours = [decode[c]["timings"]["dijiang"]["median_s"] for c in (9, 24)]
    panel = seen["latency.png", "decode, batch 1"]
    assert panel["DiJiang"] == ([9, 24], pytest.approx([1e3 * x for x in ours]))
    floors = [1e3 * decode[c]["floor_s"]["softmax static"] for c in (9, 24)]
    assert panel["softmax, static cache, at best"] == ([9, 24], pytest.approx(floors))
    assert seen["latency.png", "prefill, batch 1"]["DiJiang"][0] == [24]
    memory = seen["memory.png", "decode, batch 2"]["softmax, growing cache"]
    assert memory == ([9], [2 * 2 * 2 * 9 * 2 * 8 * 4 / 2**20])
    for row in result["rows"]:
        row["left_out"] = "no room"
    assert draw_latency(result, tmp_path) == []
