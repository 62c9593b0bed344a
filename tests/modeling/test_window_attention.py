import pytest
import torch
from helpers import assert_close

from dijiang.modeling.window_attention import merge_branches, window_attention, window_attention_step


def inputs(B, T, H, G, d, W, S, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    return {
        "q": draw(B, T, H, d),
        "k": draw(B, W + T, G, d),
        "v": draw(B, W + T, G, d),
        "valid": torch.rand(B, W + T, generator=generator) < 0.8,
        "sink_k": draw(B, S, G, d),
        "sink_v": draw(B, S, G, d),
        "sink_arrival": torch.randint(-1, T + 1, (B, S), generator=generator),
    }


def loop_oracle(q, k, v, valid, sink_k, sink_v, sink_arrival, *, scale):
    B, T, H, d = q.shape
    G, W = k.shape[2], k.shape[1] - T
    o, log_sum = torch.zeros(B, T, H, d, dtype=torch.float64), torch.zeros(B, T, H, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                g = h * G // H
                rows = [j for j in range(t + 1, t + W + 1) if valid[b, j]]
                sinks = [s for s in range(sink_k.shape[1]) if sink_arrival[b, s] <= t]
                keys = torch.cat((k[b, rows, g], sink_k[b, sinks, g])).double()
                values = torch.cat((v[b, rows, g], sink_v[b, sinks, g])).double()
                scores = keys @ q[b, t, h].double() * scale
                log_sum[b, t, h] = scores.logsumexp(0) if len(scores) else -torch.inf
                o[b, t, h] = scores.softmax(0) @ values
    return o, log_sum


@pytest.mark.parametrize("block_size", [None, 1, 4, 29])
@pytest.mark.parametrize(
    "shape", [(2, 29, 6, 2, 5, 7, 3), (1, 29, 2, 2, 4, 1, 0), (2, 3, 4, 1, 5, 7, 2), (1, 1, 2, 1, 4, 5, 2)]
)
def test_blocks_equal_the_definition(shape, block_size):
    tensors = inputs(*shape, seed=sum(shape))
    o, log_sum = window_attention(**tensors, scale=0.7, block_size=block_size)
    expected, expected_sum = loop_oracle(**tensors, scale=0.7)
    seen = torch.isfinite(expected_sum)
    assert_close(o[seen], expected[seen], "o")
    assert_close(log_sum[seen], expected_sum[seen], "log sum")
    assert (log_sum[~seen] < -1e30).all()


@pytest.mark.parametrize(("H", "G", "W", "S"), [(4, 2, 7, 3), (3, 1, 1, 0), (2, 2, 5, 2)])
def test_step_equals_the_definition(H, G, W, S):
    tensors = inputs(3, 1, H, G, 5, W, S, seed=6)
    expected, expected_sum = loop_oracle(**tensors, scale=0.7)
    sinks_and_window = (torch.cat((tensors[f"sink_{x}"], tensors[x][:, 1:]), 1) for x in "kv")
    visible = torch.cat((tensors["sink_arrival"] <= 0, tensors["valid"][:, 1:]), 1)
    o, log_sum = window_attention_step(tensors["q"], *sinks_and_window, visible, scale=0.7)
    seen = torch.isfinite(expected_sum)
    assert seen.any()
    assert_close(o[seen], expected[seen], "o")
    assert_close(log_sum[seen], expected_sum[seen], "log sum")


def test_gradients_do_not_depend_on_the_blocks():
    gradients = []
    for block_size in (None, 41):
        tensors = inputs(1, 41, 4, 2, 5, 6, 2, seed=3)
        leaves = [tensors[name].requires_grad_() for name in ("q", "k", "v", "sink_k", "sink_v")]
        tensors["valid"][:, 6:] = True
        o, log_sum = window_attention(**tensors, scale=0.5, block_size=block_size)
        weight = torch.linspace(-1, 1, o.numel()).view_as(o)
        gradients.append(torch.autograd.grad((o * weight).sum() + log_sum.sin().sum(), leaves))
    for name, found, expected in zip(("q", "k", "v", "sink_k", "sink_v"), *gradients, strict=True):
        assert_close(found, expected, f"d{name}")


def test_window_longer_than_the_row_is_full_causal_attention():
    B, T, H, d = 2, 17, 3, 4
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(B, T, H, d, generator=generator) for _ in range(3))
    W = 40
    before = torch.randn(B, W, H, d, generator=generator)
    none = torch.zeros(B, 0, H, d)
    o, _ = window_attention(
        q,
        torch.cat((before, k), 1),
        torch.cat((before, v), 1),
        torch.cat((torch.zeros(B, W), torch.ones(B, T)), 1).bool(),
        none,
        none,
        torch.zeros(B, 0),
        scale=d**-0.5,
    )
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    assert_close(o, expected.transpose(1, 2), "o")


def test_merge_is_one_average_over_both_branches():
    """With far weights exp(s) and c the right unit, the merge of two halves is the softmax over all keys."""
    generator = torch.Generator().manual_seed(5)
    scores, values = torch.randn(20, generator=generator) * 3, torch.randn(20, 4, generator=generator)
    near, far = slice(0, 8), slice(8, 20)
    shift = 11.0  # the far branch counts in units of exp(shift)
    weights = (scores[far] - shift).exp()
    merged = merge_branches(
        (scores[near].softmax(0) @ values[near]).view(1, 1, 1, 4),
        scores[near].logsumexp(0).view(1, 1, 1),
        (weights @ values[far]).view(1, 1, 1, 4),
        weights.sum().view(1, 1, 1),
        torch.full((1, 1, 1), shift),
    )
    assert_close(merged.flatten(), scores.softmax(0) @ values, "merged")


@pytest.mark.parametrize("scale", [-1e4, 1e4])
def test_merge_survives_extreme_scales(scale):
    near, far = torch.full((1, 1, 1, 2), 2.0), torch.full((1, 1, 1, 2), 3.0)
    ones = torch.ones(1, 1, 1)
    merged = merge_branches(near, ones, far, ones, ones * scale)
    assert_close(merged, near if scale < 0 else far, "merged")
    nothing = merge_branches(near, ones * torch.finfo(torch.float32).min, far * 0, ones * 0, ones * scale)
    assert torch.equal(nothing, torch.zeros_like(nothing))
