"""The recovery step of the GPU programme, tried in its small form and in its parts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

STEPS = Path(__file__).resolve().parents[2] / "scripts" / "gpu" / "steps"
sys.path.insert(0, str(STEPS))

from recovery import watched  # noqa: E402
from recovery_data import as_llama, own_tokens, synthetic_inputs  # noqa: E402
from recovery_speed import disagreement  # noqa: E402

from dijiang.common.text import tokenizer_fingerprint  # noqa: E402
from dijiang.convert import load_source  # noqa: E402
from dijiang.train.data.token_cache import TokenFile  # noqa: E402


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return synthetic_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("recipe", ["smollm2-135m-linear", pytest.param("smollm2-135m", marks=pytest.mark.slow)])
def test_small(recipe, tmp_path):
    command = [sys.executable, str(STEPS / "recovery.py"), "--small", "--recipe", recipe, "--seconds", "150"]
    done = subprocess.run(
        [*command, "--data", str(tmp_path / "none"), "--results", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    name = {"smollm2-135m-linear": "recovery_linear", "smollm2-135m": "recovery_window"}[recipe]
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["step"] == name and result["complete"] and result["small"] and result["device"] == "cpu"
    assert "error" not in result and "fell_back" not in result and str(tmp_path) not in json.dumps(result)
    ways = {row["name"]: row for row in result["training_step"] if row["stage"] == "distill"}
    assert ways.keys() == {"eager, torch", "compiled, torch"}
    assert all(row["tokens_per_s"] > 0 and "error" not in row for row in ways.values())
    assert result["tokens"] == result["planned"]["tokens"] == result["training"]["distill"]["curve"][-1]["tokens"]
    assert result["training"]["distill"]["held_out"][-1]["tokens"] == result["tokens"]
    assert result["tokens_per_s"] > 0 and result["share_of_measured_peak"] > 0 and sum(result["flops_per_token"].values()) > 0
    for model in ("baseline", "student"):
        ratios = result["perplexity_ratio"][model]
        assert all(0.5 < ratio < 2 for values in ratios.values() for ratio in values.values())
        assert all(values.keys() == {"source 0", "source 1", "all"} for values in ratios.values())
    for task in ("needle", "associative"):
        assert all("share" in row for row in result["quality"]["student"]["recall"][task].values())


def test_tokens_of_another_version_of_the_tokenizer_are_checked(inputs, tmp_path):
    folder = Path(inputs.train[0].path)
    same, file = own_tokens(folder, inputs.tokenizer, tmp_path / "unused")
    assert same == folder and not (tmp_path / "unused").exists()

    other = tmp_path / "other"
    other.mkdir()
    meta = json.loads((folder / "meta.json").read_text()) | {"tokenizer": "written down in other words"}
    (other / "meta.json").write_text(json.dumps(meta))
    for name in ("tokens.bin", "starts.bin"):
        (other / name).write_bytes((folder / name).read_bytes())
    copy, tokens = own_tokens(other, inputs.tokenizer, tmp_path / "copy")
    assert copy == tmp_path / "copy" and tokens.tokenizer == tokenizer_fingerprint(inputs.tokenizer)
    assert np.array_equal(TokenFile(copy).tokens, file.tokens)

    ids = np.asarray(file.tokens).copy()
    ids[:] = (ids.astype(int) + 7) % 1000
    (other / "tokens.bin").write_bytes(ids.tobytes())
    with pytest.raises(SystemExit, match="holds tokens of another tokenizer than the teacher's; make the corpus again"):
        own_tokens(other, inputs.tokenizer, tmp_path / "again")
    (other / "tokens.bin").unlink()
    with pytest.raises(SystemExit, match="is not a whole folder of tokens"):
        own_tokens(other, inputs.tokenizer, tmp_path / "again")


def test_the_plain_teacher_is_the_source(inputs):
    model, _ = load_source(inputs.teacher)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(as_llama(model)(ids).logits, model(ids).logits, atol=1e-5)


def test_ways_that_disagree_are_told():
    expected = {"loss": 1.0, "gradient_norms": {"kernel": 2.0, "rest": 1.0}}
    assert disagreement(expected, {"loss": 1.01, "gradient_norms": {"kernel": 2.1, "rest": 0.95}}) == ""
    assert disagreement(expected, {"loss": 1.5, "gradient_norms": {"kernel": 2.0, "rest": 1.0}}) == "loss 1.5 for 1"
    wrong = disagreement(expected, {"loss": 1.0, "gradient_norms": {"kernel": float("nan"), "rest": 1.0}})
    assert wrong == "gradient of kernel nan for 2"


def test_a_half_written_log_is_read_as_far_as_it_goes(tmp_path):
    record = SimpleNamespace(data={}, save=lambda: None)
    log = tmp_path / "metrics.jsonl"
    with watched(record, log, "distill"):
        pass
    assert record.data["training"]["distill"]["curve"] == []
    lines = [
        {"step": 1, "tokens": 8, "loss": 2.0, "tokens_per_second": 9.0},
        {"step": 2, "tokens": 16, "eval_perplexity": 3.0},
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    with watched(record, log, "distill"):
        pass
    training = record.data["training"]["distill"]
    assert training["tokens"] == 8 and training["tokens_per_s"] == 9.0 and training["held_out"][0]["perplexity"] == 3.0
