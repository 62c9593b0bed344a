"""Each score against its definition, written as loops."""

import pytest
import torch
import torch.nn.functional as F
from dijiang_testing.model_checks import assert_close, rows, tiny_config, tiny_model

from dijiang.modeling import DiJiangConfig
from dijiang.modeling.memory_scores import MEMORY_SCORES, build_memory_score, rounded


def layer_inputs(score: str, T: int = 31):
    layer = tiny_model(attention_memory=3, memory_score=score).model.layers[0].self_attn
    return layer, [rows(2, T, heads, 8, seed=i) for i, heads in enumerate((6, 2, 2, 2))]


def scores_of(layer, q, k, v, raw_k):
    """Scores (B, G, T) of the tokens that leave the window within the input."""
    found, original = [], layer.scores_of_leaving
    layer.scores_of_leaving = lambda *args: found.append(original(*args)) or found[-1]
    layer.attend(q, k, v, raw_k=raw_k)
    return found[0]


@torch.no_grad()
def test_window_attention_sums_the_weights_that_a_token_got_before_it_left():
    layer, (q, k, v, raw_k) = layer_inputs("window_attention")
    W, S, T = layer.window, layer.sinks, q.shape[1]
    expected = torch.zeros(2, 2, T)
    for t in range(T):
        seen = [j for j in range(t + 1) if t - j < W or j < S]
        for h in range(6):
            weights = (torch.einsum("bd,bjd->bj", q[:, t, h], k[:, seen, h // 3]) * 8**-0.5).softmax(-1)
            for i, j in enumerate(seen):
                if t - j < W:
                    expected[:, h // 3, j] += weights[:, i]
    found = scores_of(layer, q, k, v, raw_k)
    first = W + S
    assert_close(found[:, :, first:], expected[:, :, S : T - W], "scores", tolerance=2e-3)
    assert (found[:, :, :first] == -torch.inf).all()


@torch.no_grad()
def test_self_recall_is_the_error_of_the_state_of_all_that_left_before():
    layer, (q, k, v, raw_k) = layer_inputs("self_recall")
    W, S, T = layer.window, layer.sinks, q.shape[1]
    phi, weighted = layer.both_features(k, torch.arange(T).expand(2, T))
    expected = torch.zeros(2, 2, T)
    for j in range(S, T - W):
        weights = torch.einsum("bgm,bngm->bgn", phi[:, j], weighted[:, S:j])
        recalled = torch.einsum("bgn,bngd->bgd", weights, v[:, S:j]) / weights.sum(-1, keepdim=True).clamp_min(1e-30)
        expected[:, :, j] = (recalled - v[:, j]).square().sum(-1)
    found = scores_of(layer, q, k, v, raw_k)
    assert_close(found[:, :, W + S :], expected[:, :, S : T - W], "scores", tolerance=2e-3)


@torch.no_grad()
def test_scores_known_on_arrival():
    layer, (q, k, v, raw_k) = layer_inputs("key_norm")
    W, S, T = layer.window, layer.sinks, q.shape[1]
    old = slice(S, T - W)
    norm = -raw_k.norm(dim=-1).transpose(1, 2)
    assert_close(scores_of(layer, q, k, v, raw_k)[:, :, W + S :], norm[:, :, old], "key_norm", tolerance=1e-3)

    layer, _ = layer_inputs("key_diff")
    direction = F.normalize(raw_k, dim=-1)
    mean = torch.stack([direction[:, : j + 1].mean(1) for j in range(T)], dim=1)
    away = -F.cosine_similarity(direction, mean, dim=-1).transpose(1, 2)
    assert_close(scores_of(layer, q, k, v, raw_k)[:, :, W + S :], away[:, :, old], "key_diff", tolerance=1e-3)

    layer, _ = layer_inputs("learned")
    score = layer.memory_score
    x = torch.cat((raw_k, v), dim=-1)
    learned = torch.stack([F.gelu(x[:, :, g] @ score.W_1[g].T + score.b_1[g]) @ score.w_2[g] for g in range(2)], dim=1)
    assert_close(scores_of(layer, q, k, v, raw_k)[:, :, W + S :], learned[:, :, old], "learned", tolerance=1e-3)


@torch.no_grad()
def test_random_scores_depend_on_place_head_and_layer_alone_and_spread_evenly():
    config = tiny_config(attention_memory=3, memory_score="random")
    first, second = (build_memory_score(config, [0, 1], layer) for layer in (0, 1))
    k, rank = rows(1, 4000, 2, 8), torch.arange(4000)[None]
    found, _ = first.arriving(k, k, rank, k)
    again, _ = first.arriving(2 * k[:, 100:], k[:, 100:], rank[:, 100:], k)
    assert torch.equal(found[:, :, 100:], again)
    other, _ = second.arriving(k, k, rank, k)
    assert abs(torch.corrcoef(torch.stack((found[0, 0], found[0, 1], other[0, 0])))[0, 1:]).max() < 0.06
    shares = torch.histc(found[0, 0] / 2**31, 10, 0, 1) / 4000
    assert (shares - 0.1).abs().max() < 0.03


def test_rounding_keeps_ten_bits_order_and_gradient():
    x = rows(1000, seed=3).requires_grad_()
    y = rounded(x)
    assert ((y - x).abs() <= x.abs() * 2.0**-10).all()
    order = x.argsort()
    assert (y[order].diff() >= 0).all()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))
    assert torch.equal(rounded(torch.tensor([0.0, 1.0, -3.0])), torch.tensor([0.0, 1.0, -3.0]))


def test_unknown_scores_and_memories_that_do_not_fit_are_refused_in_one_line():
    for settings, message in (
        ({"memory_score": "age"}, f"memory_score='age' is unknown; choose one of {', '.join(MEMORY_SCORES)}"),
        ({"attention_memory": -1}, "attention_memory=-1 must be a number that is not negative"),
        ({"attention_memory": [1]}, "attention_memory has 1 entries for 2 layers"),
        ({"attention_memory": [[1], [2]]}, "of 2 such numbers, for the key/value heads"),
        ({"attention_memory": 3, "attention_window": 0, "attention_sinks": 0}, "needs attention_window of at least 1"),
        ({"full_heads": [[2], []]}, r"full_heads\[0\]=\[2\] must be rising numbers of key/value heads, 0 to 1"),
        ({"full_heads": [[1, 0], []]}, "must be rising numbers"),
        ({"full_heads": [[0]]}, "full_heads has 1 entries for 2 layers"),
        ({"full_heads": [[0], []], "layer_types": ["full_attention"] * 2}, "but the layer is full_attention"),
        ({"full_heads": [[0], []], "output_gate": True}, "full_heads needs output_norm=none and output_gate=false"),
    ):
        with pytest.raises(Exception, match=message):
            tiny_config(**settings)
    assert DiJiangConfig.from_dict(tiny_config(full_heads=[[0], []]).to_dict()).full_heads == [[0], []]
