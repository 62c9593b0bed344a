"""Interrupted runs, and refusals that leave nothing behind."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from dijiang_testing.pruned_folders import MAGNITUDE, UNIFORM, WEIGHTS, same_bytes
from safetensors.torch import load_file, save_file

from dijiang.compress.oneshot import run as pruning
from dijiang.compress.oneshot.prune_layer import prune_layer
from dijiang.compress.oneshot.sensitivity import gradients

# --- interruptions ---


def stop_after(monkeypatch, layers):
    """Pruning is interrupted when that many layers are done; returns the list of layers that are begun."""
    begun = []

    def stopping(decoder, index, *arguments):
        if layers is not None and len(begun) == layers:
            raise KeyboardInterrupt
        begun.append(index)
        return prune_layer(decoder, index, *arguments)

    monkeypatch.setattr(pruning, "prune_layer", stopping)
    return begun


@pytest.mark.parametrize("settings", [{}, MAGNITUDE, {"true_sequential": True, "bits": 4, "row_weights": "fisher"}])
def test_an_interrupted_run_continues(run, refuses, make_source, text_file, tmp_path, monkeypatch, settings):
    source, _ = make_source(num_hidden_layers=3, dtype=torch.bfloat16)
    settings = {"held_out": text_file, "held_out_tokens": 100} | settings
    whole = run(source, "whole", **settings)
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run(source, **settings)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "whole", "cache", ".out.pruning"} - (
        {"cache"} if settings.get("score") else set()
    )
    refuses("unfinished run with another sparsity; run that one again to finish it, or", source, **settings, sparsity=0.4)
    refuses("unfinished run with another .*damping", source, **settings, damping=0.02)
    begun = stop_after(monkeypatch, None)
    out = run(source, **settings)
    assert begun == [2] and same_bytes(out, whole) and not (tmp_path / ".out.pruning").exists()
    assert (out / "pruning_plan.json").read_bytes() == (whole / "pruning_plan.json").read_bytes()
    first, second = (json.loads((folder / "pruning_metrics.json").read_text()) for folder in (whole, out))
    assert first["matrices"] == second["matrices"] and first["perplexity"] == second["perplexity"]


def test_a_run_begun_by_an_earlier_version_continues(run, make_source, tmp_path, monkeypatch):
    """Its record has the former name of a setting."""
    source, _ = make_source()
    stop_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        run(source, **MAGNITUDE)
    record = tmp_path / ".out.pruning" / "run.json"
    facts = json.loads(record.read_text())
    facts["settings"]["normalisation"] = facts["settings"].pop("normalization")
    record.write_text(json.dumps(facts))
    begun = stop_after(monkeypatch, None)
    run(source, **MAGNITUDE)
    assert begun == [1]


def test_nothing_is_left_before_a_layer_is_done(run, make_source, tmp_path, monkeypatch):
    source, _ = make_source()

    def interrupted(decoder, rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(gradients, "fisher", interrupted)
    for settings in ({}, UNIFORM | {"row_weights": "fisher"}):
        with pytest.raises(KeyboardInterrupt):
            run(source, **settings)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


KILLED = """
import os, signal, sys
from pathlib import Path
from dijiang.compress import PruneConfig, prune, resume
source, out, text, cache = map(Path, sys.argv[1:])
real = resume.save_file
def save_file(weights, path, **options):  # the second layer's file is half written
    real(weights, path, **options)
    if "0001" in path.name:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
resume.save_file = save_file
settings = {"calibration": (text,), "samples": 10, "length": 32, "sensitivity_samples": 3, "device": "cpu"}
prune(source, out, PruneConfig(**settings), cache=cache, progress=False)
"""


def test_a_killed_run_continues(run, make_source, text_file, tmp_path, monkeypatch):
    source, _ = make_source()
    words = [sys.executable, "-c", KILLED, *map(str, (source, tmp_path / "out", text_file, tmp_path / "cache"))]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.pruning" / "layer-0000.safetensors").is_file()
    monkeypatch.setattr(gradients, "fisher", None)  # these were cached
    begun = stop_after(monkeypatch, None)
    assert same_bytes(run(source), run(source, "whole")) and begun == [1, 0, 1]
    assert not list(tmp_path.glob(".out*"))


# --- refusals ---


def test_what_is_refused_before_any_work(refuses, make_source, text_file, tmp_path):
    source, _ = make_source()
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("the cat sat")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "theirs").write_text("1")
    missing, empty, short = ((tmp_path / f"{name}.txt",) for name in ("missing", "empty", "short"))
    message = "pattern 3:7 does not fit model.layers.0.self_attn.q_proj: its 32 columns are no multiple of 7"
    refuses(message, source, pattern="3:7", calibration=missing)  # nothing was read
    refuses("cannot read .*missing.txt: No such file", source, calibration=missing)
    refuses("empty.txt is empty; give a file with text", source, calibration=empty)
    refuses("at most 3 tokens in one file, less than one block of 32; give more text", source, calibration=short)
    refuses("held-out text short.txt has 3 tokens, not one window of 32", source, held_out=short[0])
    refuses("length=65 is more than the 64 tokens that the model was made for", source, length=65)
    refuses("output folder .*taken is not empty; choose a new one", source, name="taken")
    refuses("nobody is neither a folder", tmp_path / "nobody")
    content = (source / "config.json").read_text()
    (source / "config.json").write_text(json.dumps(json.loads(content) | {"quantization_config": {"quant_method": "gptq"}}))
    refuses(r"is quantized \(gptq\)", source)
    (source / "config.json").write_text(content)
    (source / "tokenizer.json").rename(source / "adapter_config.json")
    refuses("holds an adapter", source)
    (source / "adapter_config.json").unlink()
    refuses("has no tokenizer", source)


DOWN, GATE = "model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("name", "value", "settings", "message"),
    [
        (GATE, float("nan"), UNIFORM, "model.layers.0.mlp.(gate_proj|down_proj) .*NaN"),
        (DOWN, float("nan"), UNIFORM, "model.layers.1.mlp.down_proj holds NaN or infinite weights"),  # nothing comes after it
        (DOWN, float("inf"), MAGNITUDE, "model.layers.1.mlp.down_proj holds NaN or infinite weights"),
        (DOWN, float("nan"), {}, "the sensitivity of model.layers.0.self_attn.q_proj is NaN or infinite"),
        ("model.layers.1.input_layernorm.weight", float("nan"), UNIFORM, "inputs of model.layers.1.self_attn.q_proj hold NaN"),
    ],
)
def test_numbers_that_are_none(run, make_source, tmp_path, name, value, settings, message):
    source, _ = make_source()
    stored = load_file(source / WEIGHTS)
    stored[name].view(-1)[3] = value
    save_file(stored, source / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message) as caught:
        run(source, **settings)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
