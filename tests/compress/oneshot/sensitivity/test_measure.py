"""Every sensitivity and the costs of pruning, against gradients and hooks on the whole model that transformers loads."""

import pytest
import torch
from dijiang_testing.pruned_folders import sizes_of
from transformers import AutoModelForCausalLM

from dijiang.compress import PruneConfig, plan
from dijiang.compress.calibration import calibration_blocks
from dijiang.compress.oneshot.config import POINTS
from dijiang.compress.oneshot.hessian import LocalHessian
from dijiang.compress.oneshot.obs import prune_compensated
from dijiang.compress.oneshot.sensitivity.gradients import fisher
from dijiang.compress.oneshot.sensitivity.hessian_trace import central_difference, double_backward, trace_estimates
from dijiang.compress.oneshot.sensitivity.layer_statistics import outlier_counts
from dijiang.compress.streamed_decoder import StreamedDecoder

MEASURED = ("fisher", "reversed", "hutchinson", "finite-difference", "owl", "local")


@pytest.mark.parametrize("by_layer", [False, True])
def test_hutchinson_through_measure(both, measured, tokens, by_layer):
    model, decoder = both("llama", attn_implementation="eager")
    blocks = tokens(20, rows=5)
    settings = {"sensitivity_samples": 3, "seed": 4}
    sensitivities = measured(decoder, blocks, sensitivity="hutchinson", probes_by_layer=by_layer, **settings)
    weights = {name: model.get_parameter(f"{name}.weight") for name in sensitivities.values}
    losses = [lambda row=row: model(row[None], labels=row[None]).loss for row in blocks[:3]]
    groups = decoder.targets if by_layer else None
    expected = trace_estimates(double_backward, losses, weights, probes=3, seed=4, groups=groups)
    means = {name: sum(values) / 3 for name, values in expected.items()}
    scale = max(map(abs, means.values()))
    assert sensitivities.values == pytest.approx(
        {name: max(mean, 0) for name, mean in means.items()}, rel=1e-3, abs=1e-5 * scale
    )
    assert set(sensitivities.negative) == {name for name, mean in means.items() if mean < 0} and sensitivities.samples == 3
    assert all(p.is_meta for p in decoder.layers.parameters())
    if not by_layer:
        near = measured(decoder, blocks, sensitivity="finite-difference", **settings)
        exact = trace_estimates(central_difference, losses, weights, probes=3, seed=4)
        means = {name: max(sum(values) / 3, 0) for name, values in exact.items()}
        assert near.values == pytest.approx(means, rel=0.05, abs=0.02 * scale)


def test_baselines_and_normalization(both, measured, tokens):
    _, decoder = both("llama")
    blocks, sizes = tokens(20, rows=5), sizes_of(decoder)
    per_sequence, _ = fisher(decoder, blocks[:4])
    total = {name: sum(values) / 4 for name, values in per_sequence.items()}
    settings = {"sensitivity_samples": 4}
    assert measured(decoder, blocks, **settings).values == pytest.approx(total, rel=1e-6)
    mean = measured(decoder, blocks, normalization="mean", **settings).values
    assert mean == pytest.approx({name: value / sizes[name] for name, value in total.items()}, rel=1e-6)
    backwards = measured(decoder, blocks, sensitivity="reversed", **settings)
    assert backwards.values == pytest.approx({name: -value for name, value in total.items()}, rel=1e-6)
    assert backwards.correlation == measured(decoder, blocks, **settings).correlation
    by_seed = [measured(decoder, None, sensitivity="random", seed=seed).values for seed in (1, 1, 2)]
    assert by_seed[0] == by_seed[1] != by_seed[2] and len(set(by_seed[0].values())) == 14
    # matrices are ranked by the share of outliers, not their number
    counts = outlier_counts(decoder, blocks[:4], 3.0, lambda share: None)
    owl = measured(decoder, blocks, sensitivity="owl", owl_m=3.0, **settings).values
    assert owl == {name: count / sizes[name] for name, [count] in counts.items()}


@pytest.mark.parametrize("method", MEASURED)
def test_values_are_cached(both, measured, tokens, monkeypatch, method):
    """The second time nothing passes through a layer; with other sequences all is measured again."""
    _, decoder = both("llama")
    blocks, settings = tokens(12, rows=3), {"sensitivity": method, "sensitivity_samples": 2}
    first = measured(decoder, blocks, **settings)
    monkeypatch.setattr(StreamedDecoder, "embed", None)
    monkeypatch.setattr(StreamedDecoder, "whole", None)
    assert measured(decoder, blocks, sparsity=0.3, **settings) == first
    with pytest.raises(TypeError):
        measured(decoder, blocks.flip(1), **settings)
    if method not in ("owl", "local"):
        with pytest.raises(TypeError):
            measured(decoder, blocks, **settings | {"sensitivity_samples": 3})


@pytest.mark.parametrize("method", ["fisher", "owl", "local"])
def test_a_matrix_that_is_never_called_is_refused(both, measured, tokens, method):
    _, decoder = both("llama")
    decoder.targets[1].append("lm_head")  # no layer calls it
    with pytest.raises(ValueError, match=r"^lm_head is never called as a layer, so its inputs are unknown"):
        measured(decoder, tokens(12, rows=2), sensitivity=method)


@pytest.mark.parametrize("settings", [{}, {"row_weights": "fisher", "comparison": "matrix"}])
def test_costs_of_a_model(make_source, tokenizer, text_file, tmp_path, settings):
    """A cost = the errors of pruning transformers' own matrix on its inputs, times its outputs' squared gradients."""
    source, model = make_source(num_key_value_heads=2)
    config = PruneConfig(
        calibration=(text_file,),
        samples=6,
        length=32,
        sensitivity_samples=4,
        allocation="loss",
        score="obs",
        seed=3,
        **settings,
    )
    pruning_plan = plan(source, config, cache=tmp_path / "cache", progress=False)
    costs = pruning_plan.sensitivity.costs
    blocks = calibration_blocks(tokenizer, [text_file], samples=6, length=32, seed=3)
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    hessians, energy = {}, {}
    for name in costs:
        module = model.get_submodule(name)
        hessians[name], energy[name] = LocalHessian(module.in_features), torch.zeros(module.out_features)

        def hook(module, inputs, output, name=name):
            hessians[name].add(inputs[0].detach())

            def add(gradient):
                energy[name] += gradient.square().sum((0, 1))

            output.register_hook(add)

        module.register_forward_hook(hook)
    for row in blocks[:4, None]:
        model(input_ids=row, labels=row).loss.backward()
    for name in costs:
        weight, factor = model.get_submodule(name).weight.detach(), hessians[name].factor(name)
        how = {"comparison": "matrix", "row_weights": energy[name].sqrt()} if settings else {}
        for index in (0, 4, 7):
            change = prune_compensated(weight, factor, sparsity=POINTS[index], score="obs", **how).weight - weight
            cost = torch.einsum("r,rc,cd,rd->", energy[name], change, hessians[name].matrix, change).item()
            assert costs[name][index] == pytest.approx(cost, rel=2e-2), (name, index)
    targets = pruning_plan.targets()
    assert max(targets.values()) <= 0.7 + 1e-9 and len(set(targets.values())) > 3
