"""Squared gradients, layer by layer, against those of the whole model that transformers loads."""

import pytest
import torch
from dijiang_testing.pruned_folders import sizes_of
from dijiang_testing.pruning_oracles import relative

from dijiang.common.result_cache import ResultCache
from dijiang.compress.oneshot.sensitivity import gradients
from dijiang.compress.oneshot.sensitivity.gradients import Gradients, backpropagate, fisher, measure_gradients


def square(tensor) -> float:
    return tensor.double().square().sum().item()


def gradients_of(model, row, names):
    """Gradients of the sequence's mean next-token loss, by matrix."""
    model.zero_grad()
    model(row[None], labels=row[None]).loss.backward()
    return {name: model.get_parameter(f"{name}.weight").grad for name in names}


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "dijiang"])
def test_fisher_is_the_squared_gradient_of_each_sequence(both, tokens, family):
    model, decoder = both(family)
    blocks = tokens(20, rows=3)
    of_weights, of_outputs = fisher(decoder, blocks)
    assert list(of_weights) == list(of_outputs) == list(sizes_of(decoder))
    backwards = {}
    for name in of_weights:
        model.get_submodule(name).register_full_backward_hook(
            lambda module, _, of_outputs, name=name: backwards.update({name: of_outputs[0]})
        )
    for index, row in enumerate(blocks):
        expected = gradients_of(model, row, of_weights)
        for name, values in of_weights.items():
            assert values[index] == pytest.approx(square(expected[name]), rel=1e-4)
            by_row = backwards[name].double().reshape(20, -1).square().sum(0)
            torch.testing.assert_close(of_outputs[name][index], by_row, rtol=1e-4, atol=1e-6 * by_row.max().item())
    assert len({round(value, 9) for values in of_weights.values() for value in values}) == 3 * len(of_weights)


def test_one_layer_is_in_memory_on_the_way_down(both, tokens):
    _, decoder = both("llama")

    def observe(name, inputs, gradient):
        assert [not any(p.is_meta for p in layer.parameters()) for layer in decoder.layers] == [".0." in name, ".1." in name]
        seen.append(name)

    seen = []
    backpropagate(decoder, tokens(20), observe)
    assert len(seen) == 14 and all(p.is_meta for p in decoder.layers.parameters())


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_row_weights(both, tokens, tmp_path, family):
    """Roots of the summed energy of outputs. Once cached, nothing passes through a layer, with rows or without."""
    _, decoder = both(family)
    blocks, cache = tokens(12, rows=3), ResultCache(tmp_path)
    expected = {name: rows.sum(0).sqrt() for name, rows in fisher(decoder, blocks)[1].items()}
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
    factors = {name: rows.tolist() for name, rows in silent.row_weights("fisher", 0).items()}
    assert factors == {"a": [1.0, 1.0, 1.0], "b": [pytest.approx(1e-4, rel=1e-3), pytest.approx(2.0, rel=1e-3)]}


def test_results_cached_without_rows_are_not_used_for_rows(both, tokens, tmp_path):
    _, decoder = both("llama")
    blocks, cache = tokens(12, rows=2), ResultCache(tmp_path)
    plain = measure_gradients(decoder, blocks, {}, by_row=False, cache=cache)
    rows = measure_gradients(decoder, blocks, {}, by_row=True, cache=cache)
    assert plain.outputs is None and rows.weights == plain.weights and len(rows.outputs) == 14


def test_an_interrupted_pass_continues(both, measured, tokens, monkeypatch):
    _, decoder = both("llama")
    blocks, seen, real = tokens(12, rows=4), [], gradients.fisher

    def stopping(decoder, rows):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(rows.tolist())
        return real(decoder, rows)

    monkeypatch.setattr(gradients, "fisher", stopping)
    with pytest.raises(KeyboardInterrupt):
        measured(decoder, blocks)
    monkeypatch.setattr(gradients, "fisher", lambda decoder, rows: seen.append(rows.tolist()) or real(decoder, rows))
    sensitivities = measured(decoder, blocks)
    assert seen == [[row.tolist()] for row in blocks]
    assert sensitivities.values == pytest.approx({name: sum(x) / 4 for name, x in real(decoder, blocks)[0].items()}, rel=1e-6)
