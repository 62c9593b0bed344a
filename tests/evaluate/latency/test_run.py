"""The latency benchmark from names to files."""

import json

import pytest
from dijiang_testing.latency import CPU

from dijiang.evaluate import LatencyConfig, run_latency

QUICK = {"batches": [1], "rounds": 1, "seconds": 0.0, "progress": False}


def test_a_checkpoint_by_keywords(pair, tmp_path, capsys):
    files = {"output": tmp_path / "latency.json", "plot": tmp_path / "figures"}
    result = run_latency(pair.checkpoint, pair.teacher, contexts=[9], phases=["decode"], **QUICK, **CPU, **files)
    assert json.loads(files["output"].read_text(encoding="utf-8")) == json.loads(json.dumps(result))
    assert sorted(path.name for path in files["plot"].iterdir()) == ["latency.png", "memory.png"]
    assert "decoding step, ms" in capsys.readouterr().out
    assert [(row["phase"], row["context"]) for row in result["rows"]] == [("decode", 9)]


def test_a_shape_by_settings_of_which_one_is_replaced(capsys):
    config = LatencyConfig(shape="llama", contexts=(9,), phases=("prefill",), **CPU)
    result = run_latency(None, None, config, settings={"attention_window": 8}, show=False, **QUICK)
    assert result["models"]["settings"] == {"attention_window": 8} and result["name"] == "llama"
    assert capsys.readouterr() == ("", "")


def test_wrong_words_are_refused_before_anything_is_loaded(pair, tmp_path, refused):
    taken = tmp_path / "taken.json"
    taken.touch()
    refused(tmp_path, lambda: run_latency(shape="llama", output=taken), "taken.json exists already")
    refused(tmp_path, lambda: run_latency(shape="llama", plot=tmp_path), "output folder .* is not empty")
    refused(tmp_path, lambda: run_latency(shape="llama", contexts=[0]), "^contexts 0 must be numbers")
    with pytest.raises(TypeError, match="'context'"):
        run_latency(shape="llama", context=[9])
