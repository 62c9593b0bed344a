"""Figures of attention maps show the numbers of their result."""

import numpy as np
import pytest
from matplotlib import image as images

from dijiang.convert import load_source
from dijiang.evaluate.quality.attention_maps import measure_maps, unpack_map
from dijiang.evaluate.report import map_figures


def test_figures_show_the_result(pair, make_source, tokens, tmp_path, drawings_of):
    folder, _ = make_source(num_attention_heads=16, num_hidden_layers=3)
    settings = {"layer_types": ["linear_attention"] * 3, "attention_window": 4, "attention_sinks": 2, "branch_scale_init": 0.5}
    teacher, student = load_source(folder)[0], load_source(folder, **settings)[0]
    result = measure_maps(teacher, student, tokens(25), keep_layers=2, keep_tokens=19)
    assert list(result["maps"]) == ["0", "2"]
    (tmp_path / "figures").mkdir()
    drawings = drawings_of(map_figures)
    paths = map_figures.draw_maps(result, tmp_path / "figures")
    assert [path.stem for path in paths] == ["attention_maps", "attention_heads", "effective_context", "map_distance"]
    assert sorted(paths) == sorted((tmp_path / "figures").iterdir())
    assert all(np.ptp(images.imread(path)) > 0.5 for path in paths)

    panels = drawings["attention_maps"]
    assert panels.shape == (2, 3)
    for row, (layer, record) in zip(panels, result["maps"].items(), strict=True):
        scales = set()
        for axes, side in zip(row, ("teacher", "student", "performer"), strict=True):
            (image,) = axes.get_images()
            np.testing.assert_allclose(image.get_array().filled(0.0), unpack_map(record[side]).mean(0))
            scales.add((image.norm.gamma, image.norm.vmin, image.norm.vmax))
            distance = result["layers"][int(layer)]["distance"]
            assert axes.get_xlabel() == ("" if side == "teacher" else f"distance {np.mean(distance[side]):.2f}")
        assert len(scales) == 1 and scales.pop()[:2] == (0.5, 0)
    panels = drawings["attention_heads"]
    assert panels.shape == (3, 8)
    heads = [int(axes.get_title().removeprefix("head ")) for axes in panels[0]]
    assert (heads[0], heads[-1]) == (0, 15) and len(set(heads)) == 8
    for row, side in zip(panels, ("teacher", "student", "performer"), strict=True):
        for axes, head in zip(row, heads, strict=True):
            shown = axes.get_images()[0].get_array().filled(0.0)
            np.testing.assert_allclose(shown, unpack_map(result["maps"]["2"][side])[head])
    measures = ("effective_context", "effective_context_past_sinks", "beyond_window")
    for axes, measure in zip(drawings["effective_context"], measures, strict=True):
        for side, line in zip(("teacher", "student"), axes.get_lines(), strict=False):
            np.testing.assert_allclose(line.get_ydata(), [np.median(layer[measure][side]) for layer in result["layers"]])
    lines = {line.get_label(): line.get_ydata() for line in drawings["map_distance"][0].get_lines()}
    for label, side in (
        ("DiJiang", "student"),
        ("Performer", "performer"),
        ("training-free window + sinks", "window_sinks"),
    ):
        np.testing.assert_allclose(lines[label], [np.median(layer["distance"][side]) for layer in result["layers"]])


def test_figures_of_a_student_without_window(pair, tokens, tmp_path, drawings_of):
    settings = {"layer_types": ["linear_attention", "full_attention"], "attention_window": 0, "attention_sinks": 0}
    student = load_source(pair.teacher, feature_map="relu", **settings)[0]
    result = measure_maps(load_source(pair.teacher)[0], student, tokens(25))
    assert result["features"] == 8  # which relu does not pair
    assert [layer["layer_type"] for layer in result["layers"]] == ["linear_attention", "full_attention"]
    assert all("window_sinks" not in layer["distance"] for layer in result["layers"])
    assert all(layer["beyond_window"]["teacher"] == pytest.approx([1.0] * 4, abs=1e-4) for layer in result["layers"])
    drawings = drawings_of(map_figures)
    map_figures.draw_maps(result, tmp_path)
    assert {line.get_label() for line in drawings["map_distance"][0].get_lines()} == {"DiJiang", "Performer"}
    assert len(drawings["effective_context"]) == 1
    outlines = [bool(row[1].get_lines()) for row in drawings["attention_maps"]]
    assert outlines == [True, False]  # only a linear layer has a linear branch
