"""Masks on softmax attention are what a layer with a silent branch computes, and only such layers are taken for it."""

import pytest
import torch
from dijiang_testing.model_checks import assert_close, rows, tiny_model

from dijiang.convert.exact_masks import is_masked_softmax, masked_attention, seen_keys

MEMORIES = {
    "no memory": {},
    "learned": {"attention_memory": 7, "memory_score": "learned"},
    "by head": {"attention_memory": [[0, 11], [4, 0]], "memory_score": "key_norm"},
    "random": {"attention_memory": 40, "memory_score": "random"},
    "key_diff": {"attention_memory": 9, "memory_score": "key_diff"},
}


def silent_layer(**settings):
    layer = tiny_model(**settings).model.layers[0].self_attn
    if layer.branch_scale is not None:
        torch.nn.init.zeros_(layer.branch_scale.weight)
        torch.nn.init.constant_(layer.branch_scale.bias, -1e4)
    return layer


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tokens", [3, 17, 64, 151])
@pytest.mark.parametrize("name", MEMORIES)
def test_masked_attention_is_the_layers(name, tokens, seed):
    torch.manual_seed(seed)
    layer = silent_layer(**MEMORIES[name], attention_window=5 + seed, attention_sinks=seed)
    for parameter in layer.memory_score.parameters() if layer.memory_score is not None else ():
        torch.nn.init.normal_(parameter)
    q, k, v, raw_k = (rows(2, tokens, heads, 8, seed=seed + i) for i, heads in enumerate((6, 2, 2, 2)))
    assert is_masked_softmax(layer)
    with torch.no_grad():
        own, _ = layer.attend(q, k, v, raw_k=raw_k)
    assert_close(masked_attention(layer, q, k, v, raw_k), own, name, tolerance=1e-5)
    queries = torch.arange(tokens)[::3]
    seen = seen_keys(layer, k, v, raw_k)
    assert torch.equal(seen_keys(layer, k, v, raw_k, queries), seen[:, :, queries])
    most = layer.window + layer.sinks + max(layer.slots, default=0)
    assert seen.sum(-1).max() <= most and not seen.triu(1).any()


@pytest.mark.parametrize("score", ["window_attention", "self_recall"])
def test_scores_that_are_known_late_are_left_to_the_layer(score):
    layer = silent_layer(attention_memory=4, memory_score=score)
    assert not is_masked_softmax(layer)


def test_layers_with_a_branch_or_a_soft_gate_or_no_window_are_left_alone():
    assert not is_masked_softmax(silent_layer(attention_window=0, attention_sinks=0))
    layer = silent_layer(**MEMORIES["learned"])
    assert is_masked_softmax(layer)
    layer.gate_temperature = 1.0
    assert not is_masked_softmax(layer)
    layer.gate_temperature = None
    layer.branch_scale.weight.data[0, 0] = 1.0
    assert not is_masked_softmax(layer)
