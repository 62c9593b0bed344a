"""Pruning from folder to folder: against a plain SparseGPT in memory, every setting, and models stored in other ways."""

import json

import pytest
import torch
from dijiang_testing.pruned_folders import MAGNITUDE, PARTS, TARGETS, UNIFORM, WEIGHTS, inputs_of, same_bytes, zeros
from dijiang_testing.pruning_oracles import plain_sparsegpt, relative
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from dijiang.checkpoint.provenance import read_provenance
from dijiang.compress.calibration import calibration_blocks
from dijiang.compress.oneshot.sensitivity import gradients
from dijiang.convert import convert_model

# --- a plain SparseGPT of the whole model in memory ---


@torch.no_grad()
def sparsegpt(folder, blocks, sparsity, *, block, refresh, row_weights=None):
    """
    Prune transformers' model layer by layer, with inputs from hooks on it, Hessians and updates in float64. `refresh` lists
    groups of a layer's matrices, each gathered together. With `row_weights`, by name, scores compete in the whole matrix.
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
                full_name = f"model.layers.{index}.{name}.weight"
                how = {"by_matrix": True, "row_weights": row_weights[full_name]} if row_weights else {}
                pruned, mask = plain_sparsegpt(weight.double(), hessian, sparsity, block=block, exact=True, **how)
                masks[full_name] = mask
                weight.copy_(pruned)
    return {name: model.get_parameter(name) for name in masks}, masks


@pytest.mark.parametrize("true_sequential", [False, True])
def test_uniform_obs_is_sparsegpt(run, make_source, tokenizer, text_file, true_sequential):
    source, _ = make_source(num_key_value_heads=2)
    out = run(source, score="obs", sparsity=0.55, block_size=20, true_sequential=true_sequential, seed=3, **UNIFORM)
    blocks = calibration_blocks(tokenizer, [text_file], samples=10, length=32, seed=3)
    refresh = [PARTS[:3], PARTS[3:4], PARTS[4:6], PARTS[6:]] if true_sequential else [PARTS]
    weights, masks = sparsegpt(source, blocks, 0.55, block=20, refresh=refresh)
    stored, ours = load_file(out / WEIGHTS), zeros(out)
    # ours sums in float32: near ties may fall otherwise, each of which moves what follows in its row a little
    flips = sum(int((ours[name] != masks[name]).sum()) for name in TARGETS)
    assert flips <= sum(mask.numel() for mask in masks.values()) // 2000
    assert sorted(masks) == sorted(TARGETS) and all(abs(mask.float().mean() - 0.55) < 1e-3 for mask in masks.values())
    for name in TARGETS:
        agree = (ours[name] == masks[name]).all(1)
        assert agree.float().mean() > 0.9 and relative(stored[name][agree], weights[name][agree]) < 2e-3
    other, _ = sparsegpt(source, blocks, 0.55, block=20, refresh=[PARTS] if true_sequential else [[part] for part in PARTS])
    assert max(relative(stored[name], other[name]) for name in TARGETS) > 0.05  # the order of gathering matters here


def gradient_roots(folder, blocks):
    """Root of the summed squared gradients of every output of the dense model, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    squares = {}
    for name in TARGETS:
        module = model.get_submodule(name.removesuffix(".weight"))
        squares[name] = torch.zeros(module.out_features).double()

        def add(module, _, gradients, to=squares[name]):
            to += gradients[0].double().square().sum((0, 1))

        module.register_full_backward_hook(add)
    for row in blocks:
        model(row[None], labels=row[None]).loss.backward()
    return {name: energy.sqrt() for name, energy in squares.items()}


def test_row_weights_and_comparison(run, make_source, tokenizer, text_file):
    source, _ = make_source(num_key_value_heads=2)
    settings = {"score": "obs", "sparsity": 0.55, "block_size": 20} | UNIFORM
    out = run(source, **settings, row_weights="fisher", comparison="matrix")
    blocks = calibration_blocks(tokenizer, [text_file], samples=10, length=32, seed=0)
    roots = gradient_roots(source, blocks[:3])
    _, masks = sparsegpt(source, blocks, 0.55, block=20, refresh=[PARTS], row_weights=roots)
    ours, plain = zeros(out), zeros(run(source, "plain", **settings))
    differing = [sum(int((other[name] != masks[name]).sum()) for name in TARGETS) for other in (ours, plain)]
    assert differing[0] <= sum(mask.numel() for mask in masks.values()) // 1000 and differing[1] > 100 * differing[0]
    assert all(abs(int(mask.sum()) - 0.55 * mask.numel()) <= 0.5 for mask in ours.values())


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
        dense, pruned = model.get_parameter(name), sparse.get_parameter(name)
        gone = torch.zeros(dense.numel(), dtype=torch.bool)
        gone[dense.abs().flatten().argsort()[: round(0.4 * dense.numel())]] = True
        assert torch.equal(pruned, dense.masked_fill(gone.view_as(dense), 0))


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
        columns = (dense.abs() * X.norm(dim=0)).argsort(1)[:, : dense.shape[1] // 2]
        assert torch.equal(stored[f"{name}.weight"], dense.scatter(1, columns, 0.0))
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
    plan = json.loads((out / "pruning_plan.json").read_text())
    assert {x["target"] for x in plan["matrices"]} == {gone / group} and plan["sensitivity"] is None


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


def test_baselines(planned, make_source):
    source, _ = make_source()
    fisher, mirror = planned(source), planned(source, sensitivity="reversed")
    assert mirror.targets() == pytest.approx({name: 1 - target for name, target in fisher.targets().items()})
    assert len(set(fisher.targets().values())) == 14
    by_seed = [planned(source, sensitivity="random", seed=seed).targets() for seed in (0, 0, 1)]
    assert by_seed[0] == by_seed[1] != by_seed[2]


def test_another_sparsity_takes_no_new_gradients(run, planned, make_source, monkeypatch):
    source, _ = make_source()
    first = planned(source)
    monkeypatch.setattr(gradients, "fisher", None)
    second = planned(source, sparsity=0.3, granularity="layer", normalization="total")
    assert [x.sensitivity for x in first.matrices] == [x.sensitivity for x in second.matrices]
    stored = load_file(source / WEIGHTS)
    stored[TARGETS[0]][0, 0] += 1e-3
    save_file(stored, source / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(TypeError):  # another model
        planned(source)


# --- DiJiang, and other ways to store ---


def test_a_dijiang_checkpoint(run, pair, tokens):
    out = run(pair.checkpoint, sparsity=0.5)
    before, after = load_file(pair.checkpoint / WEIGHTS), load_file(out / WEIGHTS)
    others = [name for name in before if name not in TARGETS]
    assert any("feature_map" in name for name in others) and any("branch_scale" in name for name in others)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in others)
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
    generated = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(generated, ids)


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
