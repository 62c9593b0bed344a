"""Sensitivities, layer by layer, against gradients and hooks on the whole model that transformers loads."""

import re
from pathlib import Path

import pytest
import torch
from dijiang_testing.pruning_oracles import relative
from transformers import AutoConfig, AutoModelForCausalLM

from dijiang.checkpoint.source import open_source
from dijiang.checkpoint.weights import open_weights
from dijiang.common.result_cache import ResultCache
from dijiang.compress import PruneConfig
from dijiang.compress.oneshot.prune_layer import gathered, input_groups
from dijiang.compress.oneshot.sensitivity import fisher, layer_statistics
from dijiang.compress.oneshot.sensitivity import gradients as gradients_module
from dijiang.compress.oneshot.sensitivity import measure as sensitivity
from dijiang.compress.oneshot.sensitivity.gradients import Gradients, measure_gradients
from dijiang.compress.oneshot.sensitivity.hessian_trace import finite_difference, hutchinson
from dijiang.compress.streamed_decoder import StreamedDecoder

SIZED = ("fisher", "reversed", "hutchinson", "finite-difference", "owl", "local")


OPT = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}


@pytest.fixture
def both(make_source, pair, tmp_path):
    """both("llama" | "gpt_neox" | "opt" | "dijiang") -> (transformers' model, streamed decoder) of one checkpoint."""

    def load(family, **options):
        if family == "dijiang":
            folder = pair.checkpoint
        elif family == "opt":  # the only one here whose layers flatten their tokens
            folder = tmp_path / "opt"
            torch.manual_seed(0)
            sizes = {"max_position_embeddings": 64, "word_embed_proj_dim": 32, "init_std": 0.3}
            AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **OPT, **sizes)).save_pretrained(folder)
        else:
            folder, _ = make_source(family, num_key_value_heads=2) if family == "llama" else make_source(family)
        source = open_source(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        return model, StreamedDecoder(source.config, open_weights(source), "it")

    return load


def sizes_of(decoder):
    return {name: decoder.model.get_parameter(f"{name}.weight").numel() for layer in decoder.targets for name in layer}


def measured(decoder, blocks, cache, **settings):
    config = PruneConfig(calibration=(cache / "unread.txt",), **settings)
    kept, passed = ResultCache(cache / "kept"), None
    if config.ranked_by_gradients:
        passed = measure_gradients(decoder, blocks[: config.sensitivity_samples], {}, by_row=config.by_row, cache=kept)
    settings = {"gradients": passed, "identity": "this model", "cache": kept}
    found = sensitivity.measure(decoder, blocks, sizes_of(decoder), config, **settings)
    assert list(found.values) == list(sizes_of(decoder))
    return found


def square(tensor) -> float:
    return tensor.double().square().sum().item()


def gradients(model, row, names):
    """Of the sequence's mean next-token loss, by matrix."""
    model.zero_grad()
    model(row[None], labels=row[None]).loss.backward()
    return {name: model.get_parameter(f"{name}.weight").grad for name in names}


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "dijiang"])
def test_fisher_is_the_squared_gradient_of_each_sequence(both, tokens, family):
    model, decoder = both(family)
    blocks = tokens(20, rows=3)
    found, of_outputs = fisher.fisher(decoder, blocks)
    assert list(found) == list(of_outputs) == list(sizes_of(decoder))
    backwards = {}
    for name in found:
        model.get_submodule(name).register_full_backward_hook(
            lambda module, given, taken, name=name: backwards.update({name: taken[0]})
        )
    for index, row in enumerate(blocks):
        expected = gradients(model, row, found)
        for name, values in found.items():
            assert values[index] == pytest.approx(square(expected[name]), rel=1e-4)
            by_row = backwards[name].double().reshape(20, -1).square().sum(0)
            torch.testing.assert_close(of_outputs[name][index], by_row, rtol=1e-4, atol=1e-6 * by_row.max().item())
    assert len({round(value, 9) for values in found.values() for value in values}) == 3 * len(found)


def test_one_layer_is_in_memory_on_the_way_down(both, tokens):
    _, decoder = both("llama")

    def observe(name, inputs, gradient):
        assert [not any(p.is_meta for p in layer.parameters()) for layer in decoder.layers] == [".0." in name, ".1." in name]
        seen.append(name)

    seen = []
    fisher.backpropagate(decoder, tokens(20), observe)
    assert len(seen) == 14 and all(p.is_meta for p in decoder.layers.parameters())


@pytest.mark.parametrize("family", ["llama", "opt", "dijiang"])
def test_statistics_of_the_inputs(both, tokens, family):
    model, decoder = both(family)
    blocks, seen = tokens(20, rows=3), {name: [] for name in sizes_of(decoder)}
    for name, inputs in seen.items():
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, to=inputs: to.append(args[0].double()))
    with torch.no_grad():
        model(blocks)
    squares = {name: torch.cat(inputs).flatten(0, -2).square() for name, inputs in seen.items()}
    weights = {name: model.get_parameter(f"{name}.weight").detach().double() for name in seen}

    traces = layer_statistics.local_traces(decoder, blocks, lambda share: None)
    for name, x2 in squares.items():
        assert traces[name] == [pytest.approx(len(weights[name]) * x2.sum(1).mean().item(), rel=1e-5)]

    hidden = [decoder.embed(row) for row in blocks[:, None]]
    for index, names in enumerate(decoder.targets):
        modules = {name: decoder.model.get_submodule(name) for name in names}
        with torch.no_grad(), decoder.layer(index) as layer:
            groups = input_groups(modules, lambda: decoder.run(layer, index, hidden[0]))  # noqa: B023
            with gathered(modules, groups) as hessians:
                hidden = [decoder.run(layer, index, batch) for batch in hidden]
        assert sorted(name for group in groups for name in group) == sorted(names)
        assert len(groups[0]) == 3  # queries, keys and values
        for group, hessian in zip(groups, hessians, strict=True):
            for name in group:  # 2 / N times the sum of squares, N sequences
                expected = 2 / 3 * squares[name].sum(0)
                torch.testing.assert_close(hessian.matrix.diagonal().double(), expected, rtol=1e-5, atol=0)

    scores = {name: weights[name].abs() * squares[name].sum(0).sqrt() for name in seen}
    shares = []
    counts = layer_statistics.outlier_counts(decoder, blocks, 3.0, shares.append)
    for names in decoder.targets:
        mean = torch.cat([scores[name].flatten() for name in names]).mean()
        assert [counts[name] for name in names] == [[(scores[name] > 3 * mean).sum().item()] for name in names]
    assert sum(shares) == pytest.approx(1) and sum(values[0] for values in counts.values()) > 20


@pytest.mark.parametrize("by_layer", [False, True])
def test_hutchinson_through_measure(both, tokens, tmp_path, by_layer):
    model, decoder = both("llama", attn_implementation="eager")
    blocks = tokens(20, rows=5)
    settings = {"sensitivity_samples": 3, "seed": 4}
    found = measured(decoder, blocks, tmp_path, sensitivity="hutchinson", probes_by_layer=by_layer, **settings)
    weights = {name: model.get_parameter(f"{name}.weight") for name in found.values}
    losses = [lambda row=row: model(row[None], labels=row[None]).loss for row in blocks[:3]]
    groups = decoder.targets if by_layer else None
    expected = hutchinson(losses, weights, probes=3, seed=4, groups=groups)
    means = {name: sum(values) / 3 for name, values in expected.items()}
    scale = max(map(abs, means.values()))
    assert found.values == pytest.approx({name: max(mean, 0) for name, mean in means.items()}, rel=1e-3, abs=1e-5 * scale)
    assert set(found.negative) == {name for name, mean in means.items() if mean < 0} and found.samples == 3
    assert all(p.is_meta for p in decoder.layers.parameters())
    if not by_layer:
        near = measured(decoder, blocks, tmp_path, sensitivity="finite-difference", **settings)
        exact = finite_difference(losses, weights, probes=3, seed=4)
        means = {name: max(sum(values) / 3, 0) for name, values in exact.items()}
        assert near.values == pytest.approx(means, rel=0.05, abs=0.02 * scale)


def test_the_controls_and_how_values_are_made(both, tokens, tmp_path):
    _, decoder = both("llama")
    blocks, sizes = tokens(20, rows=5), sizes_of(decoder)
    per_sequence, _ = fisher.fisher(decoder, blocks[:4])
    total = {name: sum(values) / 4 for name, values in per_sequence.items()}
    settings = {"sensitivity_samples": 4}
    assert measured(decoder, blocks, tmp_path, **settings).values == pytest.approx(total, rel=1e-6)
    mean = measured(decoder, blocks, tmp_path, normalisation="mean", **settings).values
    assert mean == pytest.approx({name: value / sizes[name] for name, value in total.items()}, rel=1e-6)
    backwards = measured(decoder, blocks, tmp_path, sensitivity="reversed", **settings)
    assert backwards.values == pytest.approx({name: -value for name, value in total.items()}, rel=1e-6)
    assert backwards.correlation == measured(decoder, blocks, tmp_path, **settings).correlation
    by_seed = [measured(decoder, None, tmp_path, sensitivity="random", seed=seed).values for seed in (1, 1, 2)]
    assert by_seed[0] == by_seed[1] != by_seed[2] and len(set(by_seed[0].values())) == 14
    # of an owl count, the share in the matrix ranks matrices
    counts = layer_statistics.outlier_counts(decoder, blocks[:4], 3.0, lambda share: None)
    owl = measured(decoder, blocks, tmp_path, sensitivity="owl", owl_m=3.0, **settings).values
    assert owl == {name: count / sizes[name] for name, [count] in counts.items()}


@pytest.mark.parametrize("method", SIZED)
def test_values_are_kept(both, tokens, tmp_path, monkeypatch, method):
    """The second time nothing passes through a layer; another set-up is measured anew."""
    _, decoder = both("llama")
    blocks, settings = tokens(12, rows=3), {"sensitivity": method, "sensitivity_samples": 2}
    first = measured(decoder, blocks, tmp_path, **settings)
    monkeypatch.setattr(StreamedDecoder, "embed", None)
    monkeypatch.setattr(StreamedDecoder, "whole", None)
    assert measured(decoder, blocks, tmp_path, sparsity=0.3, **settings) == first
    with pytest.raises(TypeError):
        measured(decoder, blocks.flip(1), tmp_path, **settings)
    if method not in ("owl", "local"):
        with pytest.raises(TypeError):
            measured(decoder, blocks, tmp_path, **settings | {"sensitivity_samples": 3})


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_row_weights(both, tokens, tmp_path, family):
    """Of outputs, the root of what they add up to; afterwards nothing passes through a layer, with rows or without."""
    _, decoder = both(family)
    blocks, cache = tokens(12, rows=3), ResultCache(tmp_path)
    expected = {name: rows.sum(0).sqrt() for name, rows in fisher.fisher(decoder, blocks)[1].items()}
    first = measure_gradients(decoder, blocks, {}, by_row=True, cache=cache)
    decoder.embed = None
    second = measure_gradients(decoder, blocks, {}, by_row=True, cache=cache)
    assert first.weights == second.weights
    shuffled, again, other = (second.row_weights("shuffled", seed) for seed in (1, 1, 2))
    for name, weights in first.row_weights("fisher", 0).items():
        assert weights.dtype == torch.float32 and weights.mean() == pytest.approx(1, rel=1e-5) and weights.std() > 0.05
        assert relative(weights, (expected[name] / expected[name].mean()).float()) < 1e-5
        assert torch.equal(weights, second.row_weights("fisher", 7)[name])
        assert torch.equal(weights.sort().values, shuffled[name].sort().values) and torch.equal(shuffled[name], again[name])
        assert not torch.equal(weights, shuffled[name]) and not torch.equal(other[name], shuffled[name])
    assert first.row_weights("alike", 0) == {}
    assert measure_gradients(decoder, blocks, {}, by_row=False, cache=cache) == Gradients(first.weights, None)
    silent = Gradients({}, {"a": torch.zeros(3).double(), "b": torch.tensor([0.0, 4.0]).double()})
    found = {name: rows.tolist() for name, rows in silent.row_weights("fisher", 0).items()}
    assert found == {"a": [1.0, 1.0, 1.0], "b": [pytest.approx(1e-4, rel=1e-3), pytest.approx(2.0, rel=1e-3)]}


def test_what_was_kept_without_rows_does_not_serve_for_them(both, tokens, tmp_path):
    _, decoder = both("llama")
    blocks, cache = tokens(12, rows=2), ResultCache(tmp_path)
    plain = measure_gradients(decoder, blocks, {}, by_row=False, cache=cache)
    rows = measure_gradients(decoder, blocks, {}, by_row=True, cache=cache)
    assert plain.outputs is None and rows.weights == plain.weights and len(rows.outputs) == 14


@pytest.mark.parametrize("method", ["fisher", "owl", "local"])
def test_a_matrix_that_is_never_called_is_refused(both, tokens, tmp_path, method):
    _, decoder = both("llama")
    decoder.targets[1].append("lm_head")  # no layer calls it
    with pytest.raises(ValueError, match=r"^lm_head is never called as a layer, so its inputs are unknown"):
        measured(decoder, tokens(12, rows=2), tmp_path, sensitivity=method)


def test_all_code_that_measures_is_named():
    """What the modules that measure import from this room, and so on, but for settings and what the facts hold."""
    folder = Path(sensitivity.__file__).parent
    seen, left = set(), {"sensitivity", "gradients"}
    while left:
        name = left.pop()
        seen.add(name)
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        left |= set(re.findall(r"^from \.(\w+) import", text, flags=re.MULTILINE)) - seen
    assert seen - {"prune_config", "allocation", "loss_allocation"} == set(sensitivity.MEASURING)


def test_an_interrupted_pass_goes_on(both, tokens, tmp_path, monkeypatch):
    _, decoder = both("llama")
    blocks, seen, real = tokens(12, rows=4), [], gradients_module.fisher

    def stopping(decoder, rows):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(rows.tolist())
        return real(decoder, rows)

    monkeypatch.setattr(gradients_module, "fisher", stopping)
    with pytest.raises(KeyboardInterrupt):
        measured(decoder, blocks, tmp_path)
    monkeypatch.setattr(gradients_module, "fisher", lambda decoder, rows: seen.append(rows.tolist()) or real(decoder, rows))
    found = measured(decoder, blocks, tmp_path)
    assert seen == [[row.tolist()] for row in blocks]
    assert found.values == pytest.approx({name: sum(x) / 4 for name, x in real(decoder, blocks)[0].items()}, rel=1e-6)


def test_noisy_ranks_are_told():
    made = {"method": "hutchinson", "values": {"a": 1.0, "b": 0.0}, "samples": 12}
    told = sensitivity.Sensitivities(**made, correlation=0.39, negative=("b",)).warnings()
    assert "agree only to 0.39 between halves of the 12 samples" in told[0] and told[1].startswith("1 of 2 hutchinson")
    assert sensitivity.Sensitivities(**made, correlation=0.96).warnings() == []
    assert sensitivity.Sensitivities(**made, correlation=None).warnings() == []
