"""The start of the linear branch: what it meets, what the fit knows of it, and that what is fitted is what is attended."""

import pytest
import torch
import torch.nn.functional as F
from dijiang_testing.model_checks import assert_close, features, rows, tiny_model

from dijiang.convert.memories import with_memories
from dijiang.train.memories.branch import (
    OUTLIERS,
    SILENT,
    MixingQueries,
    entry_of,
    fit_scales,
    make_silent,
    mixing_queries,
    recorded_linear_branch,
    start_branches,
)

MEMORIES = ({}, {"attention_memory": [[3, 1], [0, 4]], "memory_score": "learned"})


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
    own = [rows(1, 31, heads, 8, seed=i) for i, heads in enumerate((6, 2, 2, 2))]
    q, k, v, raw_k = own
    o_proj, queries = rows(20, 6, 8, seed=9), torch.tensor([0, 4, 11, 30])
    found = mixing_queries(layer, own, o_proj, queries)
    assert found.q.shape == (4, 6, 8) and found.gap.shape == (4, 6)
    with recorded_linear_branch(layer) as pieces:
        layer.attend(q, k, v, raw_k=raw_k)
    entry = entry_of(pieces[0].there, pieces[0].rank)
    phi_q, phi_k = features(layer.feature_map_q, q * layer.feature_scale), layer.key_features(k)
    for n, t in enumerate(queries.tolist()):
        for h in range(6):
            g = h // 3
            weights = (k[0, : t + 1, g] @ q[0, t, h] * 8**-0.5).exp()
            in_state = entry[0, g, : t + 1] <= t
            exact = (weights @ v[0, : t + 1, g]) / weights.sum()
            seen = (weights * ~in_state) @ v[0, : t + 1, g] / (weights * ~in_state).sum()
            off = o_proj[:, h] @ (exact - seen)
            torch.testing.assert_close(found.silent[n, h], off @ off, rtol=1e-3, atol=1e-5)
            if not in_state.any():
                assert found.gap[n, h] == -torch.inf and found.apart[n, h] == found.toward[n, h] == 0
                continue
            linear = (phi_k[0, : t + 1, g] @ phi_q[0, t, h]) * in_state
            away = o_proj[:, h] @ (linear @ v[0, : t + 1, g] / linear.sum() - seen)
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
        return torch.einsum("xhd,nhd->nhx", o_proj, off[0, queries]).square().sum(2)

    silent = errors()
    weight, bias, left = fit_scales(mixing_queries(layer, own, o_proj, queries))
    layer.branch_scale.weight.copy_(weight)
    layer.branch_scale.bias.copy_(bias)
    counts = 1 / (silent + OUTLIERS * silent.mean(0))
    torch.testing.assert_close((errors() * counts).sum(0) / (silent * counts).sum(0), left, rtol=1e-3, atol=1e-3)
    assert (left <= 1).all() and (left < 0.9).any()
    assert torch.equal(left == 1, bias == SILENT)


def test_a_branch_that_does_not_help_stays_silent_and_an_outlier_does_not_decide():
    """Of two heads one needs p = 1/2 everywhere but at one query; the other is right without the branch."""
    n, ones = 50, torch.ones(50, 1)
    q = torch.zeros(n, 2, 4)
    silent, toward = torch.cat((ones, ones), 1), torch.cat((2 * ones, -ones), 1)
    half = MixingQueries(q, torch.zeros(n, 2), silent, toward, 4 * torch.ones(n, 2))
    _, bias, left = fit_scales(half)
    assert abs(bias[0]) < 0.01 and left[0] < 0.01 and bias[1] == SILENT and left[1] == 1
    outlier = MixingQueries(*(x[:1] * (1000 if i > 1 else 1) for i, x in enumerate(half)))
    outlier = outlier._replace(toward=0 * outlier.toward)
    _, bias, left = fit_scales(MixingQueries(*(torch.cat(x) for x in zip(half, outlier, strict=True))))
    # without weights p would be 1 / 40; with them the outlier counts like a few of the others
    assert 0.3 < torch.sigmoid(bias[0]).item() < 0.5 and left[0] < 0.8


def test_every_layer_is_started_and_other_models_keep_their_weights():
    teacher = tiny_model(layer_types=["full_attention"] * 2, attention_window=5, attention_sinks=2, branch_scale_init=-1e4)
    student = with_memories(teacher, layer_types="linear_attention", full_heads=[[], [0]], **MEMORIES[1])
    model = with_memories(student)
    before = {name: x.clone() for name, x in student.named_parameters()}
    left = start_branches(model, teacher, torch.randint(0, 97, (600,), generator=torch.Generator().manual_seed(0)))
    assert {i: len(found) for i, found in left.items()} == {0: 6, 1: 3}
    assert all(0 < x <= 1 for found in left.values() for x in found) and any(x < 1 for found in left.values() for x in found)
    assert all(torch.equal(x, before[name]) for name, x in student.named_parameters())
    assert any(not torch.equal(x, before[name]) for name, x in model.named_parameters())
