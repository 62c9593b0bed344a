"""Pruning from folder to folder: against a plain SparseGPT in memory, what is written, and what an interruption leaves."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dijiang.compress import PruneConfig, bitmask, layer_pruning, plan, prune, pruning, sensitivity
from dijiang.compress.calibration import calibration_blocks
from dijiang.convert import convert_model, read_provenance

sys.path.insert(0, str(Path(__file__).parent))
from oracles import plain_sparsegpt, relative

WEIGHTS = "model.safetensors"
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
PARTS = [f"self_attn.{part}" for part in ATTENTION] + [f"mlp.{part}" for part in MLP]
TARGETS = [f"model.layers.{layer}.{part}.weight" for layer in range(2) for part in PARTS]
UNIFORM = {"granularity": "uniform"}
MAGNITUDE = UNIFORM | {"score": "magnitude", "calibration": ()}


@pytest.fixture
def run(text_file, tmp_path, monkeypatch):
    """run(source, "out", **settings) -> tmp_path / "out", pruned on 10 sequences of 32 tokens, no picture drawn."""
    monkeypatch.setattr(pruning, "find_spec", lambda package: None)

    def call(source, name="out", **settings):
        small = {"calibration": (text_file,), "samples": 10, "length": 32, "sensitivity_samples": 3, "device": "cpu"}
        return prune(source, tmp_path / name, PruneConfig(**(small | settings)), cache=tmp_path / "kept", progress=False)

    return call


@pytest.fixture
def planned(text_file, tmp_path):
    """planned(source, **settings) -> the plan."""

    def call(source, **settings):
        small = {"calibration": (text_file,), "samples": 4, "length": 32, "sensitivity_samples": 4, "device": "cpu"}
        return plan(source, PruneConfig(**(small | settings)), cache=tmp_path / "kept", progress=False)

    return call


@pytest.fixture
def refuses(refused, run, tmp_path):
    """refuses(message, source, **settings): one line, nothing new in tmp_path, not even hidden."""
    return lambda message, source, **settings: refused(tmp_path, lambda: run(source, **settings), message)


def zeros(folder, names=TARGETS):
    """Masks of what is exactly zero, by name."""
    stored = load_file(folder / WEIGHTS)
    return {name: stored[name] == 0 for name in names}


def inputs_of(layer, names):
    """By name, a list that from now on gets what the linear layer is given, (tokens, C)."""
    seen = {name: [] for name in names}
    for name, to in seen.items():
        layer.get_submodule(name).register_forward_pre_hook(lambda _, args, to=to: to.append(args[0].flatten(0, 1).double()))
    return seen


def same_bytes(a, b):
    return (a / WEIGHTS).read_bytes() == (b / WEIGHTS).read_bytes()


# --- a plain SparseGPT of the whole model in memory ---


@torch.no_grad()
def sparsegpt(folder, blocks, sparsity, *, block, refresh):
    """
    transformers' model pruned layer by layer, inputs by hooks on it; Hessians and sweeps in float64. `refresh`: groups of a
    layer's matrices whose inputs are gathered together.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    masks = {}
    for index, layer in enumerate(model.model.layers):
        for names in refresh:
            seen = inputs_of(layer, names)
            for row in blocks:
                model(row[None])
            for name, inputs in seen.items():
                X, weight = torch.cat(inputs[: len(blocks)]), layer.get_submodule(name).weight
                hessian = 2 * X.T @ X / len(blocks)
                pruned, mask = plain_sparsegpt(weight.double(), hessian, sparsity, block=block, exact=True)
                masks[f"model.layers.{index}.{name}.weight"] = mask
                weight.copy_(pruned)
    return {name: model.get_parameter(name) for name in masks}, masks


@pytest.mark.parametrize("true_sequential", [False, True])
def test_uniform_obs_is_sparsegpt(run, make_source, tokenizer, text_file, true_sequential):
    source, _ = make_source(num_key_value_heads=2)
    out = run(source, score="obs", sparsity=0.55, block_size=20, true_sequential=true_sequential, seed=3, **UNIFORM)
    blocks = calibration_blocks(tokenizer, [text_file], samples=10, length=32, seed=3)
    refresh = [PARTS[:3], PARTS[3:4], PARTS[4:6], PARTS[6:]] if true_sequential else [PARTS]
    weights, masks = sparsegpt(source, blocks, 0.55, block=20, refresh=refresh)
    stored, found = load_file(out / WEIGHTS), zeros(out)
    # ours sums in float32: near ties may fall otherwise, each of which moves what follows in its row a little
    flips = sum(int((found[name] != masks[name]).sum()) for name in TARGETS)
    assert flips <= sum(mask.numel() for mask in masks.values()) // 2000
    assert sorted(masks) == sorted(TARGETS) and all(abs(mask.float().mean() - 0.55) < 1e-3 for mask in masks.values())
    for name in TARGETS:
        agree = (found[name] == masks[name]).all(1)
        assert agree.float().mean() > 0.9 and relative(stored[name][agree], weights[name][agree]) < 2e-3
    other, _ = sparsegpt(source, blocks, 0.55, block=20, refresh=[PARTS] if true_sequential else [[part] for part in PARTS])
    assert max(relative(stored[name], other[name]) for name in TARGETS) > 0.05  # the order of gathering matters here


# --- what is written ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pair, text_file):
    """A source with a card and an evaluation beside it, pruned with all defaults but sizes: (source, output)."""
    folder = tmp_path_factory.mktemp("finished")
    source = folder / "source"
    shutil.copytree(pair.teacher, source)
    for name in ("README.md", "evaluation.json", "NOTICE.txt"):
        (source / name).write_text("# of the dense model")
    config = PruneConfig(
        calibration=(text_file,), samples=10, length=32, sensitivity_samples=3, device="cpu", sparsity=0.6,
        held_out=text_file, held_out_tokens=500, bitmask=True,
    )  # fmt: skip
    return source, prune(source, folder / "out", config, cache=folder / "kept", progress=False)


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

    kept = {path.name for path in source.iterdir()} - {"README.md", "evaluation.json"}
    made = {"pruning_plan.json", "pruning_metrics.json", "pruning_plan.png", "sparse-bitmask"}
    assert {path.name for path in out.iterdir()} == kept | made
    assert all((source / name).read_bytes() == (out / name).read_bytes() for name in kept - {WEIGHTS})
    dense, sparse = (AutoTokenizer.from_pretrained(folder) for folder in (source, out))
    assert sparse.chat_template == dense.chat_template and "NOTICE.txt" in kept
    assert model.generation_config.pad_token_id == 3
    assert sorted(path.name for path in out.parent.iterdir()) == ["kept", "out", "source"]


def test_a_pruned_model_is_pruned_further(finished, run):
    _, first = finished
    out = run(first, sparsity=0.7, **UNIFORM)
    assert {path.name for path in out.iterdir()} == {p.name for p in first.iterdir()} - {"pruning_plan.png", "sparse-bitmask"}
    assert json.loads((out / "pruning_plan.json").read_text())["settings"]["sparsity"] == 0.7
    assert all(mask.sum() >= round(0.7 * mask.numel()) for mask in zeros(out).values())
    assert json.loads((out / "pruning_metrics.json").read_text())["sparsity"] == pytest.approx(0.7, abs=1e-3)


def test_the_plan(finished):
    _, out = finished
    found = json.loads((out / "pruning_plan.json").read_text())
    matrices, masks = found["matrices"], zeros(out)
    assert [f"{x['name']}.weight" for x in matrices] == TARGETS and [x["layer"] for x in matrices] == [0] * 7 + [1] * 7
    assert [[x["rows"], x["columns"]] for x in matrices] == [list(masks[name].shape) for name in TARGETS]
    order = sorted(matrices, key=lambda x: x["sensitivity"])
    assert [x["rank"] for x in order] == list(range(14)) and order[0]["sensitivity"] > 0
    total, below = sum(mask.numel() for mask in masks.values()), 0
    for x in order:  # the budget by weights, section 7.2 of the specification
        size = x["rows"] * x["columns"]
        assert x["target"] == pytest.approx(0.6 + 0.1 * (1 - 2 * (below + size / 2) / total), abs=1e-12)
        below += size
    assert found["sparsity"] == pytest.approx(0.6, abs=1e-9)
    assert sum(x["target"] * x["rows"] * x["columns"] for x in matrices) / total == pytest.approx(0.6, abs=1e-9)
    realised = found["realised"]["matrices"]
    for x in matrices:
        mask = masks[f"{x['name']}.weight"]
        assert realised[x["name"]] == mask.sum().item() / mask.numel()
        assert abs(realised[x["name"]] - x["target"]) <= 0.5 / mask.numel() + 1e-9
    assert found["realised"]["sparsity"] == sum(int(mask.sum()) for mask in masks.values()) / total
    assert found["sensitivity"]["method"] == "fisher" and found["sensitivity"]["samples"] == 3
    assert -1 <= found["sensitivity"]["split_half_rank_correlation"] <= 1
    assert found["source"] == "source" and found["settings"]["sparsity"] == 0.6
    assert str(out.parent) not in json.dumps(found)  # checkpoints get shared


@torch.no_grad()
def test_the_metrics(finished, tokenizer, text_file):
    source, out = finished
    found = json.loads((out / "pruning_metrics.json").read_text())
    ids = tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"][: 500 // 32 * 32]
    windows = torch.tensor(ids).view(-1, 32)
    assert found["perplexity"]["tokens"] == 480 and found["perplexity"]["window"] == 32
    for name, folder in (("dense", source), ("pruned", out)):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        nats = [model(row[None], labels=row[None]).loss.item() for row in windows]
        assert found["perplexity"][name] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)
    assert found["perplexity"]["pruned"] != pytest.approx(found["perplexity"]["dense"], rel=1e-2)
    gone = sum(int(mask.sum()) for mask in zeros(out).values())
    weights = sum(mask.numel() for mask in zeros(out).values())
    parameters = sum(tensor.numel() for tensor in load_file(source / WEIGHTS).values())
    assert (found["sparsity"], found["zeros"]) == (gone / weights, gone / weights) and found["weights"] == weights
    assert found["of_all_parameters"] == gone / parameters
    assert found["compression"]["without_mask"] == pytest.approx(1 / (1 - gone / weights))
    assert found["compression"]["with_mask"] == pytest.approx(16 / (16 * (1 - gone / weights) + 1))
    assert all(0 < x["relative_error"] < 1 and x["damping"] == 0.01 for x in found["matrices"].values())


def test_the_container_gives_the_model_back(finished, tmp_path):
    _, out = finished
    back = bitmask.read_bitmask(out / "sparse-bitmask", tmp_path / "back", progress=False)
    dense, sparse = load_file(back / WEIGHTS), load_file(out / WEIGHTS)
    assert dense.keys() == sparse.keys()
    assert all(torch.equal(dense[name].view(torch.int32), sparse[name].view(torch.int32)) for name in sparse)
    facts = json.loads((out / "pruning_metrics.json").read_text())["container"]
    assert facts["zeros"] == sum(int(mask.sum()) for mask in zeros(out).values())
    assert facts["bytes_compressed"] < facts["bytes_dense"]


# --- settings ---


def test_seeds(run, make_source):
    source, _ = make_source()
    runs = [run(source, f"out{i}", seed=seed, **UNIFORM) for i, seed in enumerate((1, 1, 2))]
    assert same_bytes(runs[0], runs[1]) and not same_bytes(runs[0], runs[2])


def test_magnitude_needs_no_text(run, make_source):
    source, model = make_source(max_shard_size="40KB")
    out = run(source, sparsity=0.4, **MAGNITUDE)
    sparse = AutoModelForCausalLM.from_pretrained(out)
    assert len(list(source.glob("*.safetensors"))) == len(list(out.glob("*.safetensors"))) > 2
    for name in TARGETS:
        dense, found = model.get_parameter(name), sparse.get_parameter(name)
        gone = torch.zeros(dense.numel(), dtype=torch.bool)
        gone[dense.abs().flatten().argsort()[: round(0.4 * dense.numel())]] = True
        assert torch.equal(found, dense.masked_fill(gone.view_as(dense), 0))


@torch.no_grad()
def test_wanda(run, make_source, tokenizer, text_file):
    """The first layer, whose inputs are the dense model's: the smallest |w| ||x|| of each row go; the error is of W x."""
    source, model = make_source()
    out = run(source, score="wanda", **UNIFORM)
    stored, facts = load_file(out / WEIGHTS), json.loads((out / "pruning_metrics.json").read_text())["matrices"]
    seen = inputs_of(model.model.layers[0], PARTS)
    model(calibration_blocks(tokenizer, [text_file], samples=10, length=32, seed=0))
    for name, X in seen.items():
        name, X, dense = f"model.layers.0.{name}", X[0], model.get_parameter(f"model.layers.0.{name}.weight")
        places = (dense.abs() * X.norm(dim=0)).argsort(1)[:, : dense.shape[1] // 2]
        assert torch.equal(stored[f"{name}.weight"], dense.scatter(1, places, 0.0))
        lost, whole = ((W.double() @ X.T).square().sum() for W in (dense - stored[f"{name}.weight"], dense))
        assert facts[name]["relative_error"] == pytest.approx((lost / whole).item(), rel=1e-3)


@pytest.mark.parametrize(
    ("pattern", "settings"),
    [("2:4", {}), ("3:4", {"score": "wanda"}), ("2:4", MAGNITUDE), ("5:8", {"block_size": 12}), ("4:16", {"block_size": 3})],
)
def test_patterns(run, make_source, pattern, settings):
    source, _ = make_source()
    gone, group = map(int, pattern.split(":"))
    out = run(source, pattern=pattern, **settings)
    for mask in zeros(out).values():
        assert (mask.unflatten(1, (-1, group)).sum(2) == gone).all()
    found = json.loads((out / "pruning_plan.json").read_text())
    assert {x["target"] for x in found["matrices"]} == {gone / group} and found["sensitivity"] is None


def test_bits_and_bfloat16(run, make_source):
    source, _ = make_source(dtype=torch.bfloat16)
    plain, rounded = run(source, "plain", **UNIFORM), run(source, "rounded", bits=4, score="obs", **UNIFORM)
    for out in (plain, rounded):
        stored, facts = load_file(out / WEIGHTS), json.loads((out / "pruning_metrics.json").read_text())["matrices"]
        for name in TARGETS:
            weight, numbers = stored[name], facts[name.removesuffix(".weight")]
            assert weight.dtype == torch.bfloat16 and numbers["pruned"] == weight.numel() // 2
            assert numbers["zeros"] == (weight == 0).sum() >= numbers["pruned"]
            assert numbers["zeros"] == numbers["pruned"] or out == rounded  # rounding makes more
    assert max(len(row.unique()) for name in TARGETS for row in load_file(rounded / WEIGHTS)[name]) <= 16
    metrics = json.loads((rounded / "pruning_metrics.json").read_text())
    assert metrics["compression"] == {"without_mask": pytest.approx(8.0), "with_mask": pytest.approx(16 / 3)}
    assert metrics["zeros"] > metrics["sparsity"] == 0.5


def test_what_shares_a_sparsity(planned, make_source):
    source, _ = make_source()
    layers = planned(source, granularity="layer")
    shares = [{x.target for x in layers.matrices if x.layer == layer} for layer in (0, 1)]
    sums = [sum(x.sensitivity for x in layers.matrices if x.layer == layer) for layer in (0, 1)]
    assert all(len(share) == 1 for share in shares) and {x.rank for x in layers.matrices} == {0, 1}
    sparser, denser = (0, 1) if sums[0] < sums[1] else (1, 0)
    assert [*shares[sparser], *shares[denser]] == [pytest.approx(0.55), pytest.approx(0.45)]
    assert {x.target for x in planned(source, alpha=0.0).matrices} == {0.5}
    assert {(x.target, x.sensitivity, x.rank) for x in planned(source, **UNIFORM).matrices} == {(0.5, None, None)}
    wide = planned(source, alpha=0.4, sparsity=0.45, budget="paper").matrices
    assert [min(x.target for x in wide), max(x.target for x in wide)] == [pytest.approx(0.05), pytest.approx(0.85)]


def test_the_controls(planned, make_source):
    source, _ = make_source()
    fisher, mirror = planned(source), planned(source, sensitivity="reversed")
    assert mirror.targets() == pytest.approx({name: 1 - target for name, target in fisher.targets().items()})
    assert len(set(fisher.targets().values())) == 14
    by_seed = [planned(source, sensitivity="random", seed=seed).targets() for seed in (0, 0, 1)]
    assert by_seed[0] == by_seed[1] != by_seed[2]


def test_another_sparsity_takes_no_new_gradients(run, planned, make_source, monkeypatch):
    source, _ = make_source()
    first = planned(source)
    monkeypatch.setattr(sensitivity, "fisher", None)
    second = planned(source, sparsity=0.3, granularity="layer", normalisation="total")
    assert [x.sensitivity for x in first.matrices] == [x.sensitivity for x in second.matrices]
    stored = load_file(source / WEIGHTS)
    stored[TARGETS[0]][0, 0] += 1e-3
    save_file(stored, source / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(TypeError):  # another model
        planned(source)


def test_calibration_blocks(tokenizer, tmp_path):
    for name, words in (("a", 900), ("b", 300), ("short", 5)):
        (tmp_path / name).write_text(" ".join(f"{name}{i}" for i in range(words)))
    texts = [tmp_path / name for name in ("a", "b", "short")]
    streams = [tokenizer(path.read_text(), add_special_tokens=False)["input_ids"] for path in texts]

    def places(samples, seed):
        """(file, start) of each block; none is in two places."""
        found = []
        for block in calibration_blocks(tokenizer, texts, samples=samples, length=50, seed=seed).tolist():
            hits = [(f, i) for f, ids in enumerate(streams) for i in range(len(ids) - 49) if ids[i : i + 50] == block]
            assert len(hits) == 1
            found += hits
        return found

    enough = places(20, 0)
    assert all(abs(i - j) >= 50 for n, (f, i) in enumerate(enough) for g, j in enough[:n] if f == g)
    assert {file for file, _ in enough} == {0, 1} and places(20, 0) == enough != places(20, 1)
    assert len(set(places(300, 0))) > 200  # more than there is side by side


# --- interruptions ---


def stop_after(monkeypatch, layers):
    """Pruning is interrupted when that many layers are done; returns the list of layers that are begun."""
    real, begun = layer_pruning.prune_layer, []

    def stopping(decoder, index, *arguments):
        if layers is not None and len(begun) == layers:
            raise KeyboardInterrupt
        begun.append(index)
        return real(decoder, index, *arguments)

    monkeypatch.setattr(pruning, "prune_layer", stopping)
    return begun


@pytest.mark.parametrize("settings", [{}, MAGNITUDE, {"true_sequential": True, "bits": 4}])
def test_an_interrupted_run_goes_on(run, refuses, make_source, text_file, tmp_path, monkeypatch, settings):
    source, _ = make_source(num_hidden_layers=3, dtype=torch.bfloat16)
    settings = {"held_out": text_file, "held_out_tokens": 100} | settings
    whole = run(source, "whole", **settings)
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run(source, **settings)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "whole", "kept", ".out.pruning"} - (
        {"kept"} if settings.get("score") else set()
    )
    refuses("unfinished run with another sparsity; run that one again to finish it, or", source, **settings, sparsity=0.4)
    refuses("unfinished run with another .*damping", source, **settings, damping=0.02)
    begun = stop_after(monkeypatch, None)
    out = run(source, **settings)
    assert begun == [2] and same_bytes(out, whole) and not (tmp_path / ".out.pruning").exists()
    assert (out / "pruning_plan.json").read_bytes() == (whole / "pruning_plan.json").read_bytes()
    first, second = (json.loads((folder / "pruning_metrics.json").read_text()) for folder in (whole, out))
    assert first["matrices"] == second["matrices"] and first["perplexity"] == second["perplexity"]


KILLED = """
import os, signal, sys
from pathlib import Path
from dijiang.compress import PruneConfig, prune, work_folder
source, out, text, kept = map(Path, sys.argv[1:])
real = work_folder.save_file
def save_file(weights, path, **options):  # the second layer's file is half written
    real(weights, path, **options)
    if "0001" in path.name:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
work_folder.save_file = save_file
settings = {"calibration": (text,), "samples": 10, "length": 32, "sensitivity_samples": 3, "device": "cpu"}
prune(source, out, PruneConfig(**settings), cache=kept, progress=False)
"""


def test_a_killed_run_goes_on(run, make_source, text_file, tmp_path, monkeypatch):
    source, _ = make_source()
    words = [sys.executable, "-c", KILLED, *map(str, (source, tmp_path / "out", text_file, tmp_path / "kept"))]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.pruning" / "layer-0000.safetensors").is_file()
    monkeypatch.setattr(sensitivity, "fisher", None)  # these were kept
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
    refuses(r"is quantised \(gptq\)", source)
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


# --- DiJiang, and other ways to store ---


def test_a_dijiang_checkpoint(run, pair, tokens):
    out = run(pair.checkpoint, sparsity=0.5)
    before, after = load_file(pair.checkpoint / WEIGHTS), load_file(out / WEIGHTS)
    kept = [name for name in before if name not in TARGETS]
    assert any("feature_map" in name for name in kept) and any("branch_scale" in name for name in kept)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in kept)
    gone = sum(int((after[name] == 0).sum()) for name in TARGETS) / sum(after[name].numel() for name in TARGETS)
    assert gone == pytest.approx(0.5, abs=1e-3)
    first, second = read_provenance(pair.checkpoint), read_provenance(out)
    assert second["stages"][:-1] == first["stages"] and second["stages"][-1]["stage"] == "prune"
    assert second["stages"][-1]["config"]["sparsity"] == 0.5 and str(out.parent) not in json.dumps(second)
    # its cached generation is the argmax of whole passes through the dense model with these weights put in
    model, dense = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (out, pair.checkpoint))
    dense.load_state_dict({name: after[name] for name in TARGETS}, strict=False)
    ids = prompt = tokens(12, rows=1)
    for _ in range(8):
        with torch.no_grad():
            ids = torch.cat([ids, dense(ids).logits[:, -1:].argmax(-1)], dim=1)
    made = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(made, ids)


def test_softmax_layers_of_dijiang_are_pruned_as_their_source(run, pair, tmp_path):
    convert_model(pair.teacher, tmp_path / "softmax", layer_types="full_attention", progress=False)
    theirs, ours = run(pair.teacher, "theirs"), run(tmp_path / "softmax", "ours")
    a, b = load_file(theirs / WEIGHTS), load_file(ours / WEIGHTS)
    assert all(torch.equal(a[name] == 0, b[name] == 0) and relative(a[name], b[name]) < 1e-3 for name in TARGETS)
    plans = [json.loads((out / "pruning_plan.json").read_text())["matrices"] for out in (theirs, ours)]
    assert [x["target"] for x in plans[0]] == [x["target"] for x in plans[1]]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_bin_checkpoint_with_a_tied_head(run, make_source, family):
    source, model = make_source(family, tie_word_embeddings=True)
    torch.save(model.state_dict(), source / "pytorch_model.bin")  # both names share memory
    (source / WEIGHTS).unlink()
    out = run(source, **MAGNITUDE)
    assert not list(out.glob("*.bin"))
    sparse, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(sparse.get_input_embeddings().weight, model.get_input_embeddings().weight)
    linears = {n: m for n, m in sparse.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    assert linears and all((m.weight == 0).sum() == m.weight.numel() // 2 for m in linears.values())
