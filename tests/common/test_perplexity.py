"""Perplexity against closed forms and a hand computation, and the same number wherever it is measured."""

import json
import math

import pytest
import torch
import yaml
from dijiang_testing.table_model import TableModel

from dijiang.checkpoint.provenance import read_provenance
from dijiang.common.perplexity import perplexity, perplexity_of, token_losses, windows
from dijiang.compress import PruneConfig, prune
from dijiang.convert import load_source
from dijiang.evaluate import EvaluationConfig, run_evaluation
from dijiang.train import load_recipe, recover


def test_uniform_logits_give_the_vocabulary_size(tokens):
    assert perplexity(TableModel(torch.full((320, 320), 2.5)), tokens(9)) == pytest.approx(320, rel=1e-6)


def test_certainty_gives_one():
    table = torch.full((4, 4), -100.0)
    table[[0, 1, 2, 3], [1, 2, 3, 0]] = 0.0  # each token is followed by the next number
    assert perplexity(TableModel(table), torch.tensor([[0, 1, 2, 3, 0], [3, 0, 1, 2, 3]])) == pytest.approx(1)


def test_a_coin_by_hand():
    """From either token: 3/4 for a 1, 1/4 for a 0. The first token is not predicted."""
    table = torch.tensor([[0.0, math.log(3)]] * 2)
    blocks = torch.tensor([[0, 1, 1], [1, 0, 1]])  # predicted: 1 1 and 0 1
    assert perplexity(TableModel(table), blocks) == pytest.approx((0.75**3 * 0.25) ** (-1 / 4))


def test_a_model_by_hand(pair, tokens):
    model, blocks = load_source(pair.checkpoint)[0], tokens(15, rows=3)
    logits = [[model(block[None, : t + 1]).logits[0, t].double() for t in range(14)] for block in blocks]  # token by token
    log_p = [x[t].log_softmax(-1)[block[t + 1]] for x, block in zip(logits, blocks, strict=True) for t in range(14)]
    expected = math.exp(-sum(log_p).item() / len(log_p))
    assert perplexity(model, blocks) == pytest.approx(expected, rel=1e-4) and expected > 1
    assert perplexity(model, blocks) == perplexity(model, blocks.flip(0)) != perplexity(model, blocks[:1])


def test_half_precision_logits_are_summed_in_float32():
    table = torch.randn(320, 320, generator=torch.Generator().manual_seed(0)).bfloat16()
    blocks = torch.arange(2 * 100).view(2, 100)
    assert perplexity(TableModel(table), blocks) == pytest.approx(perplexity(TableModel(table.double()), blocks), rel=1e-5)


def test_a_hopeless_mean_is_finite():
    assert perplexity_of(2.0) == math.exp(2.0) and math.isfinite(perplexity_of(1e9))


@pytest.mark.parametrize(("length", "stride"), [(10, 10), (10, 3), (7, 1), (100, 40), (2, 1), (30, 29)])
def test_windows_score_every_token_once(length, stride):
    text = torch.arange(57)
    cut = windows(text, length, stride)
    scored = torch.cat([window[start:] for window, start in cut]).tolist()
    assert all(2 <= len(window) <= length for window, _ in cut)
    if stride < length:
        assert scored == list(range(1, 57))
        assert all(start >= length - stride for _, start in cut[1:-1])
    else:
        assert scored == [t for t in range(57) if t % length]


def test_text_of_one_token_and_wrong_strides_are_refused(refused, tmp_path):
    refused(tmp_path, lambda: windows(torch.arange(1), 8, 8), "^the text has 1 token, .*give more text$")
    for stride in (0, 9):
        refused(
            tmp_path, lambda s=stride: windows(torch.arange(99), 8, s), f"^stride={stride} must be from 1 to the length, 8,"
        )


def test_losses_do_not_depend_on_how_many_rows_meet_the_head(pair, tokens, monkeypatch):
    model, text = load_source(pair.checkpoint)[0], tokens(50, rows=1)[0]
    whole = token_losses(model, text, start=3)
    monkeypatch.setattr("dijiang.common.perplexity.LOGIT_ROWS", 7)
    assert whole.shape == (47,) and torch.allclose(token_losses(model, text, start=3), whole, atol=1e-5)


# --- one number in training, pruning and evaluation ---

BLOCK = 32


@pytest.fixture
def held_out(tokenizer, tmp_path):
    """held_out(remainder) -> a text of ten blocks and `remainder` tokens."""

    def write(remainder: int):
        words = ["a"]
        while len(tokenizer(" ".join(words))["input_ids"]) < 10 * BLOCK + remainder:
            words.append("rat" if len(words) % 3 else "mat" if len(words) % 2 else "cat")
        path = tmp_path / "held_out.txt"
        path.write_text(" ".join(words))
        assert len(tokenizer(path.read_text())["input_ids"]) == 10 * BLOCK + remainder
        return path

    return write


def evaluated(checkpoint, teacher, text, tmp_path) -> dict[str, dict]:
    """Values and intervals of every model of an evaluation of nothing but this text's perplexity."""
    config = EvaluationConfig(
        texts=(text,), lengths=(BLOCK,), recall_lengths=(), prompts=1, prompt_length=8, new_tokens=1, map_tokens=0,
        dtype="float32", device="cpu",
    )  # fmt: skip
    result = run_evaluation(checkpoint, teacher, config, cache=tmp_path / "evaluations", progress=False)
    return next(task["values"] for task in result["tasks"] if task["kind"] == "perplexity")


def test_training_and_evaluation_agree(pair, text_file, held_out, tmp_path):
    text = held_out(remainder=0)
    data = {"train": [str(text_file)], "held_out": [str(text)], "cache": str(tmp_path / "cache")}
    recipe = {
        "source": str(pair.teacher), "output": str(tmp_path / "run"), "data": data,
        "convert": {"settings": {"attention_window": 4, "attention_sinks": 2}},
        "distill": {"tokens": 4 * BLOCK, "block_size": BLOCK, "batch_size": 2, "learning_rate": 1e-3},
        "run": {"device": "cpu", "dtype": "float32", "report_to": []},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    model = recover(load_recipe(tmp_path / "recipe.yaml", []), progress=False)
    stage = read_provenance(model)["stages"][-1]
    values = evaluated(model, pair.teacher, text, tmp_path)
    assert stage["held_out_perplexity"] == pytest.approx(values["student"]["value"], rel=1e-6)
    assert stage["teacher_perplexity"] == pytest.approx(values["teacher"]["value"], rel=1e-6)


@pytest.mark.parametrize("remainder", [0, 1, 13])
def test_pruning_and_evaluation_agree(pair, held_out, tmp_path, remainder):
    text = held_out(remainder)
    config = PruneConfig(score="magnitude", granularity="uniform", sparsity=0.3, held_out=text, length=BLOCK, device="cpu")
    pruned = prune(pair.checkpoint, tmp_path / "pruned", config, progress=False)
    found = json.loads((pruned / "pruning_metrics.json").read_text())["perplexity"]
    dense = evaluated(pair.checkpoint, pair.teacher, text, tmp_path)["student"]["value"]
    sparse = evaluated(pruned, pair.teacher, text, tmp_path)["student"]["value"]
    assert (found["dense"], found["pruned"]) == pytest.approx((dense, sparse), rel=1e-6)
    assert found["tokens"] == 10 * BLOCK + (remainder if remainder > 1 else 0) and dense != pytest.approx(sparse, rel=1e-2)
