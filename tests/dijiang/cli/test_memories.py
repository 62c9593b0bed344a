"""The commands select, fit, convert --fit and benchmark recall, on a tiny model."""

import json

import pytest

from dijiang.checkpoint.provenance import read_provenance
from dijiang.train.memories.config import FitConfig, SelectConfig

SELECT = ("--heads", 1, "--set", "samples=1", "--set", "lengths=[900]")
FIT = (
    *("--slots", 20, "--text-tokens", 400, "--set", "least_slots=16", "--set", "block_size=200"),
    *("--set", "recall_samples=1", "--set", "recall_length=900", "--set", "steps=20"),
)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The cat sat on the mat, and a rat that sat near saw it. " * 150, encoding="utf-8")
    return path


def test_select_and_fit(command, long_pair, tmp_path, text):
    options = ("--teacher", long_pair.teacher, "--data", text)
    code, out, err = command("select", long_pair.checkpoint, tmp_path / "heads", *options, *SELECT)
    assert (code, out) == (0, f"wrote {tmp_path / 'heads'}\n"), err
    assert len(json.loads((tmp_path / "heads" / "selection.json").read_text())["order"]) == 4
    assert (tmp_path / "heads" / "selection.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = command("fit", tmp_path / "heads", tmp_path / "ready", *options, *FIT)
    assert (code, out) == (0, f"wrote {tmp_path / 'ready'}\n"), err
    config = json.loads((tmp_path / "ready" / "config.json").read_text())
    assert sum(map(len, config["full_heads"])) == 1 and config["memory_score"] == "learned"
    assert [stage["stage"] for stage in read_provenance(tmp_path / "ready")["stages"]] == ["convert", "select", "fit"]


def test_constant_memory_is_one_word(command, long_pair, tmp_path, text, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        "dijiang.train.memories.run.convert_with_memories", lambda *_, **given: asked.update(given) or tmp_path
    )
    for words, expected in (
        ((), FitConfig()),
        (("--constant",), FitConfig(slots=192, large_slots=2000)),
        (("--constant", "--slots", 20), FitConfig(slots=20, least_slots=20, large_slots=2000)),
    ):
        code, _, err = command("convert", long_pair.teacher, tmp_path / "new", "--fit", text, *words)
        assert code == 0, err
        assert asked["fit"] == expected and asked["select"] == SelectConfig()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("convert", "{teacher}", "{new}", "--heads", 3), "--heads, --slots and --constant have no effect without --fit"),
        (
            ("convert", "{teacher}", "{new}", "--set", "memory_score=random"),
            "memory_score",
        ),
        (("select", "{checkpoint}", "{new}", "--teacher", "{teacher}", "--heads", 0), "heads=0 must be at least 1"),
        (("select", "{checkpoint}", "{new}", "--teacher", "{teacher}", "--method", "best"), "method"),
        (("select", "{teacher}", "{new}", "--teacher", "{teacher}"), "is no DiJiang checkpoint"),
        (("fit", "{checkpoint}", "{new}", "--teacher", "{teacher}", "--data", "missing.txt"), "cannot read missing.txt"),
        (("fit", "{checkpoint}", "{new}", "--teacher", "{teacher}", "--slots", 8), "least_slots=32 is more than slots=8"),
    ],
)
def test_what_cannot_be_done_is_one_line(command, long_pair, tmp_path, words, message):
    names = {"teacher": long_pair.teacher, "checkpoint": long_pair.checkpoint, "new": tmp_path / "new"}
    code, out, err = command(*(str(word).format(**names) for word in words))
    assert code == 1 and not out and message in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_benchmark_recall(command, long_teacher, tmp_path, text):
    files = ("--output", tmp_path / "recall.json", "--plot", tmp_path / "recall.png", "--cache", tmp_path / "cache")
    less = "lengths=[48] text_tokens=200 recall_kinds=[needle] recall_lengths=[128] recall_samples=1 windows=false controls=[]"
    less += " scores=[random] score_heads=[0] score_slots=[8] large_heads=[] reference_length=64"
    words = [part for word in less.split() for part in ("--set", word)]
    sizes = ("--heads", 0, "--slots", 0, "--text", text, "--fit", text)
    code, _, err = command("benchmark", "recall", long_teacher, *files, *sizes, *words)
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads((tmp_path / "recall.json").read_text())["rows"]}
    assert rows["teacher"]["perplexity_ratio"]["48"]["value"] == 1.0
    held = rows["8 slots in every head by random"]["memory"]["bytes_per_sequence"]["64"]
    assert held > rows["window 64"]["memory"]["bytes_per_sequence"]["64"] and (tmp_path / "recall.png").is_file()
