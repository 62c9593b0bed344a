"""The start of the linear branch: which keys it meets, the weight that is fitted, and that no head gets worse by it."""

import pytest
import torch
from dijiang_testing.model_checks import assert_close, features, rows, tiny_model

from dijiang.convert.memories import with_memories
from dijiang.train.memories import branch
from dijiang.train.memories.branch import LinearKeys, log_sum_gap, recorded_linear_keys, start_branch, start_branches

MEMORIES = ({}, {"attention_memory": [[3, 1], [0, 4]], "memory_score": "learned"})


def recorded(layer, q, k, v, raw_k) -> LinearKeys:
    with recorded_linear_keys(layer) as pieces:
        layer.attend(q, k, v, raw_k=raw_k)
    assert "linear_branch" not in vars(layer)
    return LinearKeys(**{name: torch.cat([getattr(x, name) for x in pieces], dim=1) for name in ("k", "there", "rank")})


@pytest.mark.parametrize("memory", MEMORIES, ids=["no memory", "memory"])
@torch.no_grad()
def test_keys_are_recorded_as_they_enter_and_the_gap_is_that_of_their_sums(memory, monkeypatch):
    monkeypatch.setattr("dijiang.modeling.layer_linear_heads.PIECE", 7)
    monkeypatch.setattr(branch, "QUERIES_AT_ONCE", 6)
    layer = tiny_model(**memory).model.layers[0].self_attn
    q, k, v, raw_k = (rows(1, 31, heads, 8, seed=i) for i, heads in enumerate((6, 2, 2, 2)))
    keys = recorded(layer, q, k, v, raw_k)
    entry = keys.entry()
    for t in range(31):
        for g in range(2):
            if keys.there[0, t, g]:
                token = int(keys.rank[0, t, g])
                assert torch.equal(keys.k[0, t, g], k[0, token, g]) and entry[0, g, token] == t >= token + layer.window
    held = layer.attend(q, k, v, raw_k=raw_k)[1].memory_rank[0].split(layer.slots or (0, 0))
    for g in range(2):
        never = [j for j in range(31) if entry[0, g, j] == 31]
        assert never == sorted({*range(layer.sinks), *range(31 - layer.window, 31), *(x for x in held[g].tolist() if x >= 0)})
    gap, count = log_sum_gap(layer, q, k, keys)
    phi_q, phi_k = features(layer.feature_map_q, q * layer.feature_scale), layer.key_features(k)
    for t in range(31):
        for h in range(6):
            met = (entry[0, h // 3] <= t).nonzero().flatten()
            assert count[0, t, h] == len(met)
            if len(met):
                exact = (k[0, met, h // 3] @ q[0, t, h] * 8**-0.5).logsumexp(0)
                linear = (phi_k[0, met, h // 3] @ phi_q[0, t, h]).sum().log()
                assert_close(gap[0, t, h], exact - linear, "gap", tolerance=1e-3)


@pytest.mark.parametrize("memory", MEMORIES, ids=["no memory", "memory"])
@torch.no_grad()
def test_no_head_gets_worse_on_its_text(memory):
    layer = tiny_model(**memory, branch_scale_init=-1e4).model.layers[0].self_attn
    layer.branch_scale.weight.zero_()
    layer.branch_scale.bias.fill_(-1e4)
    own = [rows(1, 600, heads, 8, seed=i) for i, heads in enumerate((6, 2, 2, 2))]
    q, k, v = (x.transpose(1, 2) for x in own[:3])
    target = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    def errors():
        return (layer.attend(*own[:3], raw_k=own[3])[0] - target).square().mean((0, 1, 3))

    silent = errors()
    choices = start_branch(layer, own, target)
    assert (errors() <= silent * 1.0001).all() and (errors() < 0.9 * silent).any()
    assert [choice is None for choice in choices] == (layer.branch_scale.bias <= -9e3).tolist()


def test_every_layer_is_started_and_other_models_keep_their_weights():
    teacher = tiny_model(layer_types=["full_attention"] * 2, attention_window=5, attention_sinks=2, branch_scale_init=-1e4)
    student = with_memories(teacher, layer_types="linear_attention", full_heads=[[], [0]], **MEMORIES[1])
    model = with_memories(student)
    before = {name: x.clone() for name, x in student.named_parameters()}
    choices = start_branches(model, teacher, torch.randint(0, 97, (600,), generator=torch.Generator().manual_seed(0)))
    assert {i: len(found) for i, found in choices.items()} == {0: 6, 1: 3}
    assert all(torch.equal(x, before[name]) for name, x in student.named_parameters())
    assert any(not torch.equal(x, before[name]) for name, x in model.named_parameters())
