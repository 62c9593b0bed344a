"""benchmark kernels: its options, and what it refuses."""

import json

from dijiang.evaluate.feature_map_study.config import QUICK

WORDS = ("benchmark", "kernels", "--quick", "--features", 3, "--features", 8, "--seeds", 3)


def test_options_reach_the_study(command, fails, pair, tmp_path):
    output = tmp_path / "kernels.json"
    words = (*WORDS, "--model", pair.teacher, "--output", output)
    code, out, _ = command(*words)
    assert code == 0 and out.endswith(f"wrote {output}\n")
    settings = json.loads(output.read_text(encoding="utf-8"))["settings"]
    assert settings["features"] == [3, 8] and settings["seeds"] == 3 and settings["heads"] == QUICK.heads
    fails(r"output .*kernels\.json exists already", *words)


def test_wrong_options_are_refused(fails, pair):
    fails("features=0 must be at least 1", "benchmark", "kernels", "--model", pair.teacher, "--features", 0)
