"""
What version 0.1.1 wrote still loads. `tests/data/made_by_0.1.1.tar.xz` holds a tiny teacher, its conversion, a recovery that
was stopped inside its second stage, an evaluation, a pruned model, and the logits that 0.1.1 computed.
"""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dijiang
from dijiang.checkpoint.code_files import refresh_code
from dijiang.checkpoint.provenance import read_provenance
from dijiang.compress import PruneConfig, prune
from dijiang.evaluate.report.html import make_report
from dijiang.evaluate.report.model_card import write_model_card

ARCHIVE = Path(__file__).parent / "data" / "made_by_0.1.1.tar.xz"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The unpacked archive, which is the current folder."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@torch.no_grad()
def assert_same_logits(folder: Path, name: str) -> None:
    input_ids = torch.arange(2, 62)[None] % 320
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = load_file("expected.safetensors")[f"logits.{name}"]
    torch.testing.assert_close(model(input_ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["checkpoint", "pruned"])
def test_checkpoints_load(old, name):
    assert_same_logits(old / name, name)


def test_a_checkpoint_loads_with_the_code_it_carries(old):
    code = """
import sys
sys.modules["dijiang"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("checkpoint", trust_remote_code=True).eval()
with torch.no_grad():
    logits = model(torch.arange(2, 62)[None] % 320).logits
torch.testing.assert_close(logits, load_file("expected.safetensors")["logits.checkpoint"], atol=1e-5, rtol=1e-5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_code_in_a_checkpoint_can_be_refreshed(old):
    changed = refresh_code("checkpoint")
    assert {"linear_layer.py", "linear_attention_layer.py"} <= set(changed)  # a former name and the present one
    assert not (old / "checkpoint" / "linear_layer.py").exists()
    assert_same_logits(old / "checkpoint", "checkpoint")


def test_an_unfinished_recovery_continues_to_the_same_model(old):
    recipe = dijiang.load_recipe("recipe.yaml", ["data.cache=tokens"])
    model = dijiang.recover(recipe, progress=False)
    assert_same_logits(model, "recovered")
    metrics = [json.loads(line) for line in (old / "job" / "distill" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "loss" in line] == list(range(1, 13))
    assert metrics[-1]["eval_loss"] == pytest.approx(7.723693704605102, abs=1e-5)
    assert [stage["stage"] for stage in read_provenance(model)["stages"]] == ["convert", "align", "distill"]


def test_an_evaluation_is_drawn(old):
    report = make_report([old / "evaluation"], old / "report")
    assert "<img" in (Path(report) / "report.html").read_text() if Path(report).is_dir() else Path(report).is_file()
    evaluation = json.loads((old / "evaluation" / "evaluation.json").read_text())
    card = write_model_card(old / "job" / "align" / "model", evaluation)
    assert "perplexity" in Path(card).read_text().lower()


def test_pruning_gives_the_same_weights_and_plan(old):
    settings = {"samples": 10, "length": 32, "sensitivity_samples": 3, "device": "cpu"}
    texts = {"calibration": (Path("text.txt"),), "held_out": Path("held_out.txt")}
    prune("checkpoint", "again", PruneConfig(**texts, **settings), cache=old / "cache", progress=False)
    for name, tensor in load_file("pruned/model.safetensors").items():
        torch.testing.assert_close(load_file("again/model.safetensors")[name], tensor, atol=1e-6, rtol=1e-5)
    plans = [json.loads((old / folder / "pruning_plan.json").read_text()) for folder in ("pruned", "again")]
    for before, after in zip(*(plan["matrices"] for plan in plans), strict=True):
        assert after["name"] == before["name"] and after.keys() == before.keys()
        assert after["target"] == pytest.approx(before["target"], abs=1e-9)
