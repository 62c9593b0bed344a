"""Results of a finished run: checkpoint, plan, metrics, container."""

import json
import math
import shutil

import pytest
import torch
from dijiang_testing.pruned_folders import TARGETS, UNIFORM, WEIGHTS, zeros
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dijiang.compress import PruneConfig, bitmask, prune


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pair, text_file):
    """A source with a card and an evaluation in its folder, pruned with all defaults but sizes: (source, output)."""
    folder = tmp_path_factory.mktemp("finished")
    source = folder / "source"
    shutil.copytree(pair.teacher, source)
    for name in ("README.md", "evaluation.json", "NOTICE.txt"):
        (source / name).write_text("# of the dense model")
    config = PruneConfig(
        calibration=(text_file,), samples=10, length=32, sensitivity_samples=3, device="cpu", sparsity=0.6,
        held_out=text_file, held_out_tokens=500, bitmask=True,
    )  # fmt: skip
    return source, prune(source, folder / "out", config, cache=folder / "cache", progress=False)


def test_the_checkpoint(finished):
    source, out = finished
    before, after = load_file(source / WEIGHTS), load_file(out / WEIGHTS)
    assert list(before) == list(after) and all(before[name].dtype == after[name].dtype for name in before)
    others = [name for name in before if name not in TARGETS]
    assert len(others) == 7 and all(torch.equal(before[name], after[name]) for name in others)
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    masks = {name: model.get_parameter(name) == 0 for name in TARGETS}
    weights = sum(mask.numel() for mask in masks.values())
    assert abs(sum(int(mask.sum()) for mask in masks.values()) - 0.6 * weights) <= 0.5 * len(TARGETS) + 1
    assert not any((before[name] == 0).any() for name in TARGETS)

    copied = {path.name for path in source.iterdir()} - {"README.md", "evaluation.json"}
    new = {"pruning_plan.json", "pruning_metrics.json", "pruning_plan.png", "sparse-bitmask"}
    assert {path.name for path in out.iterdir()} == copied | new
    assert all((source / name).read_bytes() == (out / name).read_bytes() for name in copied - {WEIGHTS})
    dense, sparse = (AutoTokenizer.from_pretrained(folder) for folder in (source, out))
    assert sparse.chat_template == dense.chat_template and "NOTICE.txt" in copied
    assert model.generation_config.pad_token_id == 3
    assert sorted(path.name for path in out.parent.iterdir()) == ["cache", "out", "source"]


def test_a_pruned_model_is_pruned_further(finished, run):
    _, first = finished
    out = run(first, sparsity=0.7, **UNIFORM)
    assert {path.name for path in out.iterdir()} == {p.name for p in first.iterdir()} - {"pruning_plan.png", "sparse-bitmask"}
    assert json.loads((out / "pruning_plan.json").read_text())["settings"]["sparsity"] == 0.7
    assert all(mask.sum() >= round(0.7 * mask.numel()) for mask in zeros(out).values())
    assert json.loads((out / "pruning_metrics.json").read_text())["sparsity"] == pytest.approx(0.7, abs=1e-3)


def test_the_plan(finished):
    _, out = finished
    plan = json.loads((out / "pruning_plan.json").read_text())
    matrices, masks = plan["matrices"], zeros(out)
    assert [f"{x['name']}.weight" for x in matrices] == TARGETS and [x["layer"] for x in matrices] == [0] * 7 + [1] * 7
    assert [[x["rows"], x["columns"]] for x in matrices] == [list(masks[name].shape) for name in TARGETS]
    order = sorted(matrices, key=lambda x: x["sensitivity"])
    assert [x["rank"] for x in order] == list(range(14)) and order[0]["sensitivity"] > 0
    total, below = sum(mask.numel() for mask in masks.values()), 0
    for x in order:  # the budget by weights, section 7.2 of the specification
        size = x["rows"] * x["columns"]
        assert x["target"] == pytest.approx(0.6 + 0.1 * (1 - 2 * (below + size / 2) / total), abs=1e-12)
        below += size
    assert plan["sparsity"] == pytest.approx(0.6, abs=1e-9)
    assert sum(x["target"] * x["rows"] * x["columns"] for x in matrices) / total == pytest.approx(0.6, abs=1e-9)
    realised = plan["realised"]["matrices"]
    for x in matrices:
        mask = masks[f"{x['name']}.weight"]
        assert realised[x["name"]] == mask.sum().item() / mask.numel()
        assert abs(realised[x["name"]] - x["target"]) <= 0.5 / mask.numel() + 1e-9
    assert plan["realised"]["sparsity"] == sum(int(mask.sum()) for mask in masks.values()) / total
    assert plan["sensitivity"]["method"] == "fisher" and plan["sensitivity"]["samples"] == 3
    assert -1 <= plan["sensitivity"]["split_half_rank_correlation"] <= 1
    assert plan["source"] == "source" and plan["settings"]["sparsity"] == 0.6
    assert str(out.parent) not in json.dumps(plan)  # checkpoints get shared


@torch.no_grad()
def test_the_metrics(finished, tokenizer, text_file):
    source, out = finished
    metrics = json.loads((out / "pruning_metrics.json").read_text())
    ids = tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"][:500]
    windows = torch.tensor(ids).split(32)
    assert metrics["perplexity"]["tokens"] == 500 and metrics["perplexity"]["window"] == 32
    for name, folder in (("dense", source), ("pruned", out)):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        nats = [model(row[None], labels=row[None]).loss.item() * (len(row) - 1) for row in windows]
        assert metrics["perplexity"][name] == pytest.approx(math.exp(sum(nats) / (500 - len(windows))), rel=1e-4)
    assert metrics["perplexity"]["pruned"] != pytest.approx(metrics["perplexity"]["dense"], rel=1e-2)
    gone = sum(int(mask.sum()) for mask in zeros(out).values())
    weights = sum(mask.numel() for mask in zeros(out).values())
    parameters = sum(tensor.numel() for tensor in load_file(source / WEIGHTS).values())
    assert (metrics["sparsity"], metrics["zeros"]) == (gone / weights, gone / weights) and metrics["weights"] == weights
    assert metrics["of_all_parameters"] == gone / parameters
    assert metrics["compression"]["without_mask"] == pytest.approx(1 / (1 - gone / weights))
    assert metrics["compression"]["with_mask"] == pytest.approx(16 / (16 * (1 - gone / weights) + 1))
    assert all(0 < x["relative_error"] < 1 and x["damping"] == 0.01 for x in metrics["matrices"].values())


def test_the_container_gives_the_model_back(finished, tmp_path):
    _, out = finished
    back = bitmask.read_bitmask(out / "sparse-bitmask", tmp_path / "back", progress=False)
    dense, sparse = load_file(back / WEIGHTS), load_file(out / WEIGHTS)
    assert dense.keys() == sparse.keys()
    assert all(torch.equal(dense[name].view(torch.int32), sparse[name].view(torch.int32)) for name in sparse)
    facts = json.loads((out / "pruning_metrics.json").read_text())["container"]
    assert facts["zeros"] == sum(int(mask.sum()) for mask in zeros(out).values())
    assert facts["bytes_compressed"] < facts["bytes_dense"]
