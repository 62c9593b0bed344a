"""The start of the linear branch: what it meets, what the fit knows of it, and that what is fitted is what is attended."""

import pytest
import torch
import torch.nn.functional as F
from dijiang_testing.model_checks import assert_close, features, rows, tiny_model

from dijiang.common.recall import RecallSample
from dijiang.convert.memories import with_memories
from dijiang.train.memories.branch import (
    LEAST_GAIN,
    SILENT,
    MixingQueries,
    entry_of,
    fit_scales,
    joined,
    make_silent,
    mixing_queries,
    recorded_linear_branch,
    start_branches,
)

MEMORIES = ({}, {"attention_memory": [[3, 1], [0, 4]], "memory_score": "learned"})


def sample(tokens: int, seed: int, answers=()) -> RecallSample:
    ids = torch.randint(0, 97, (tokens,), generator=torch.Generator().manual_seed(seed))
    return RecallSample(input_ids=ids, answers=list(answers), depths=[0.0] * len(answers), chance=0.0)


@pytest.mark.parametrize("memory", MEMORIES, ids=["no memory", "memory"])
@torch.no_grad()
def test_keys_enter_as_they_leave_the_window_and_the_memory(memory, monkeypatch):
    monkeypatch.setattr("dijiang.modeling.layer_linear_heads.PIECE", 7)
    layer = tiny_model(**memory).model.layers[0].self_attn
    q, k, v, raw_k = (rows(1, 31, heads, 8, seed=i) for i, heads in enumerate((6, 2, 2, 2)))
    with recorded_linear_branch(layer) as pieces:
        _, state = layer.attend(q, k, v, raw_k=raw_k)
    assert "linear_branch" not in vars(layer) and len(pieces) > 1
    there, rank = (torch.cat([getattr(x, name) for x in pieces], dim=1) for name in ("there", "rank"))
    entry = entry_of(there, rank)
    for t, g in there[0].nonzero().tolist():
        assert entry[0, g, rank[0, t, g]] == t >= rank[0, t, g] + layer.window
    held = state.memory_rank[0].split(layer.slots or (0, 0))
    for g in range(2):
        never = [j for j in range(31) if entry[0, g, j] == 31]
        assert never == sorted({*range(layer.sinks), *range(31 - layer.window, 31), *(x for x in held[g].tolist() if x >= 0)})


@pytest.mark.parametrize("memory", MEMORIES, ids=["no memory", "memory"])
@torch.no_grad()
def test_products_are_those_of_both_branches_key_by_key(memory):
    layer = tiny_model(**memory).model.layers[0].self_attn
    own = [rows(2, 31, heads, 8, seed=i) for i, heads in enumerate((6, 2, 2, 2))]
    q, k, v, raw_k = own
    o_proj, queries = rows(20, 6, 8, seed=9), torch.tensor([0, 4, 11, 30])
    found = mixing_queries(layer, own, o_proj, [queries, queries[1:]])
    assert found.q.shape == (7, 6, 8) and found.gap.shape == (7, 6)
    with recorded_linear_branch(layer) as pieces:
        layer.attend(q, k, v, raw_k=raw_k)
    entry = entry_of(pieces[0].there, pieces[0].rank)
    phi_q, phi_k = features(layer.feature_map_q, q * layer.feature_scale), layer.key_features(k)
    places = [(0, int(t)) for t in queries] + [(1, int(t)) for t in queries[1:]]
    for n, (b, t) in enumerate(places):
        for h in range(6):
            g = h // 3
            weights = (k[b, : t + 1, g] @ q[b, t, h] * 8**-0.5).exp()
            in_state = entry[b, g, : t + 1] <= t
            exact = (weights @ v[b, : t + 1, g]) / weights.sum()
            seen = (weights * ~in_state) @ v[b, : t + 1, g] / (weights * ~in_state).sum()
            off = o_proj[:, h] @ (exact - seen)
            torch.testing.assert_close(found.silent[n, h], off @ off, rtol=1e-3, atol=1e-5)
            if not in_state.any():
                assert found.gap[n, h] == -torch.inf and found.apart[n, h] == found.toward[n, h] == 0
                continue
            linear = (phi_k[b, : t + 1, g] @ phi_q[b, t, h]) * in_state
            away = o_proj[:, h] @ (linear @ v[b, : t + 1, g] / linear.sum() - seen)
            assert_close(found.gap[n, h], (linear.sum() / (weights * ~in_state).sum()).log(), "gap", tolerance=2e-3)
            torch.testing.assert_close(found.toward[n, h], off @ away, rtol=2e-3, atol=1e-3)
            torch.testing.assert_close(found.apart[n, h], away @ away, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("memory", MEMORIES, ids=["no memory", "memory"])
@torch.no_grad()
def test_what_is_left_is_what_the_layer_is_off_by_and_never_more_than_before(memory):
    layer = tiny_model(**memory).model.layers[0].self_attn
    make_silent(layer)
    own = [rows(1, 600, heads, 8, seed=i) for i, heads in enumerate((6, 2, 2, 2))]
    q, k, v = (x.transpose(1, 2) for x in own[:3])
    target = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    o_proj, queries = rows(20, 6, 8, seed=9), torch.arange(10, 600, 7)

    def errors():
        off = layer.attend(*own[:3], raw_k=own[3])[0] - target
        return torch.einsum("xhd,nhd->nhx", o_proj, off[0, queries]).square().sum((0, 2))

    silent = errors()
    weight, bias, left = fit_scales(mixing_queries(layer, own, o_proj, [queries]), None)
    layer.branch_scale.weight.copy_(weight)
    layer.branch_scale.bias.copy_(bias)
    torch.testing.assert_close(errors() / silent, left, rtol=1e-3, atol=1e-3)
    assert (left <= 1).all() and (left < 0.9).any()
    assert torch.equal(left == 1, bias == SILENT)


def test_text_and_answers_weigh_the_same_and_a_branch_that_does_not_help_stays_silent():
    """Of two heads one needs p = 1/2 everywhere; the other is right without the branch."""
    n, ones = 50, torch.ones(50, 1)
    q = torch.zeros(n, 2, 4)
    half = MixingQueries(
        q, torch.zeros(n, 2), torch.cat((ones, ones), 1), torch.cat((2 * ones, -ones), 1), 4 * torch.ones(n, 2)
    )
    weight, bias, left = fit_scales(half, None)
    assert abs(bias[0]) < 0.05 and left[0] < 0.01
    assert bias[1] == SILENT and not weight[1].any() and left[1] == 1
    # answers that want no branch, a hundredth in number and size, hold it back as much as all text pulls
    against = MixingQueries(*(x[:1] * (0.01 if i > 1 else 1) for i, x in enumerate(half)))
    against = against._replace(toward=0 * against.toward)
    _, both, kept = fit_scales(half, against)
    p = torch.sigmoid(both[0]).item()
    assert p == pytest.approx(0.25, abs=0.02) and kept[0].item() == pytest.approx(1 - 2 * p + 4 * p * p, abs=0.02)
    assert kept[0] < 1 - LEAST_GAIN
    assert joined([half, against]).q.shape == (51, 2, 4)


def test_every_layer_is_started_and_other_models_keep_their_weights():
    teacher = tiny_model(layer_types=["full_attention"] * 2, attention_window=5, attention_sinks=2, branch_scale_init=-1e4)
    student = with_memories(teacher, layer_types="linear_attention", full_heads=[[], [0]], **MEMORIES[1])
    model = with_memories(student)
    before = {name: x.clone() for name, x in student.named_parameters()}
    material = [sample(600, 0), sample(90, 1, [(60, 63)]), sample(90, 2, [(41, 43), (80, 81)])]
    left = start_branches(model, teacher, material)
    assert {i: len(found) for i, found in left.items()} == {0: 6, 1: 3}
    assert all(0 < x <= 1 for found in left.values() for x in found) and any(x < 1 for found in left.values() for x in found)
    assert all(torch.equal(x, before[name]) for name, x in student.named_parameters())
    assert any(not torch.equal(x, before[name]) for name, x in model.named_parameters())
    again = with_memories(student)
    start_branches(again, teacher, material[:1])
    assert not torch.equal(
        again.model.layers[0].self_attn.branch_scale.bias, model.model.layers[0].self_attn.branch_scale.bias
    )
