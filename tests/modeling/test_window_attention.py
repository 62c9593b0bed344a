"""The window branch in blocks and of one step, against its definition and one masked softmax."""

import pytest
import torch
from dijiang_testing.model_checks import assert_close
from dijiang_testing.window_branches import (
    SCALE,
    all_seen,
    loop_oracle,
    masked_softmax,
    random_branch,
    random_window,
    share_oracle,
    tensors_of,
    without_masks,
)

from dijiang.modeling.window_attention import LinearBranch, Window, block_window_attention, window_attention_step
from dijiang.modeling.window_attention_flex import merge_branches


def one_query(H, G, W, S, seed, d=5) -> tuple[torch.Tensor, Window]:
    """One query that sees every key of its window and all sinks."""
    q, window = random_window(3, 1, H, G, d, W, S, seed)
    return q, all_seen(window)


def as_lists(window: Window) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one query as lists (B, G, S + W, d)."""
    pairs = ((window.sinks.k, window.k[:, 1:]), (window.sinks.v, window.v[:, 1:]))
    k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in pairs)
    return k, v


@pytest.mark.parametrize(("H", "G", "W", "S"), [(4, 2, 7, 3), (3, 1, 1, 0), (2, 2, 5, 2), (6, 2, 1, 4)])
def test_step_equals_the_definition_and_window_and_merge(H, G, W, S):
    q, window = one_query(H, G, W, S, seed=6)
    branch = random_branch(3, 1, H, 5, seed=7)
    o = window_attention_step(q, *as_lists(window), branch, scale=SCALE)
    assert o.dtype == torch.float32
    assert_close(o, share_oracle(*loop_oracle(q, window), branch), "definition")
    assert_close(o, merge_branches(*masked_softmax(q, window), branch), "window and merge")


def test_step_is_a_softmax_over_all_keys():
    """A linear branch with the sums of exp(score) v and of exp(score) over the old keys equals a longer window."""
    B, H, G, d, N, old = 2, 4, 2, 5, 6, 9
    generator = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(B, length, heads, d, generator=generator) for length, heads in ((1, H), (N + old, G), (N + old, G)))
    scores = torch.einsum("bihd,bjhd->bhj", q, k.repeat_interleave(H // G, 2)) * SCALE
    log_scale = torch.randn(B, 1, H, generator=generator)
    weights = (scores[..., N:] - log_scale.transpose(1, 2)).exp()
    numerator = torch.einsum("bhj,bjhd->bhd", weights, v.repeat_interleave(H // G, 2)[:, N:])[:, None]
    branch = LinearBranch(numerator, weights.sum(-1)[:, None], log_scale)
    window_k, window_v = (x[:, :N].transpose(1, 2) for x in (k, v))
    o = window_attention_step(q, window_k, window_v, branch, scale=SCALE)
    attention = torch.nn.functional.scaled_dot_product_attention
    expected = attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=SCALE, enable_gqa=True).transpose(1, 2)
    assert_close(o, expected, "o")


@pytest.mark.parametrize("log_scale", [-1e4, 1e4])
def test_step_survives_extreme_scales_and_an_empty_linear_branch(log_scale):
    q, window = one_query(2, 1, 3, 1, seed=9)
    branch = random_branch(3, 1, 2, 5, seed=10)
    branch.log_scale[:] = log_scale
    window_alone, _ = masked_softmax(q, window)
    expected = window_alone if log_scale < 0 else branch.numerator / branch.total[..., None]
    assert_close(window_attention_step(q, *as_lists(window), branch, scale=SCALE), expected, "o")
    empty = LinearBranch(torch.zeros(3, 1, 2, 5), torch.zeros(3, 1, 2), torch.zeros(3, 1, 2))
    assert_close(window_attention_step(q, *as_lists(window), empty, scale=SCALE), window_alone, "empty")


def test_step_takes_low_precision_and_differentiates():
    q, window = one_query(4, 2, 5, 2, seed=11)
    branch = random_branch(3, 1, 4, 5, seed=12)
    leaves = {name: x.requires_grad_() for name, x in tensors_of(q, window, branch).items()}
    gradients = []
    for o in (
        window_attention_step(q, *as_lists(window), branch, scale=SCALE),
        merge_branches(*masked_softmax(q, window), branch),
    ):
        cotangent = torch.linspace(-1, 1, o.numel()).view_as(o)
        gradients.append(torch.autograd.grad((o * cotangent).sum(), list(leaves.values())))
    for name, gradient, expected in zip(leaves, *gradients, strict=True):
        assert_close(gradient, expected, f"d{name}")
    with torch.no_grad():
        expected = window_attention_step(q, *as_lists(window), branch, scale=SCALE)
        o = window_attention_step(q.bfloat16(), *(x.bfloat16() for x in as_lists(window)), branch, scale=SCALE)
    assert o.dtype == torch.float32
    assert_close(o, expected, "bfloat16", tolerance=2e-2)


@pytest.mark.parametrize("block_size", [1, 4, 64])
@pytest.mark.parametrize(
    "shape", [(2, 29, 6, 2, 5, 7, 3), (1, 29, 2, 2, 4, 1, 0), (2, 3, 4, 1, 5, 7, 2), (1, 1, 2, 1, 4, 5, 2)], ids=str
)
def test_blocks_equal_the_definition_and_window_and_merge(shape, block_size):
    """Padding, sinks that arrive one by one, lengths that do not fill the last block; and with nothing hidden."""
    B, T, H, _, d, _, _ = shape
    for hidden in (True, False):
        q, window = random_window(*shape, seed=sum(shape))
        branch = random_branch(B, T, H, d, seed=13)
        window = window if hidden else all_seen(window)
        leaves = [x.requires_grad_() for x in tensors_of(q, window, branch).values()]
        argument = window if hidden else without_masks(window)
        o = block_window_attention(q, argument, branch, scale=SCALE, block_size=block_size)
        assert_close(o, share_oracle(*loop_oracle(q, window), branch), "definition")
        expected = merge_branches(*masked_softmax(q, window), branch)
        assert_close(o, expected, "window and merge")
        cotangent = torch.linspace(-1, 1, o.numel()).view_as(o)
        pairs = zip(*(torch.autograd.grad((x * cotangent).sum(), leaves) for x in (o, expected)), strict=True)
        for i, (gradient, expected_gradient) in enumerate(pairs):
            assert_close(gradient, expected_gradient, f"gradient {i}", tolerance=1e-4)


def test_gradients_where_the_linear_branch_is_empty_or_the_window_is():
    """Rows at the start of a sequence have no old keys; rows of padding have no keys at all."""
    q, window = random_window(2, 9, 4, 2, 5, 3, 0, seed=14)
    numerator, total, log_scale = random_branch(2, 9, 4, 5, seed=15)
    window.valid[0, :8] = False
    numerator[:, :5], total[:, :5] = 0.0, 0.0
    for value in (-1e4, 0.0, 30.0):
        branch = LinearBranch(numerator.detach(), total.detach(), torch.full_like(log_scale, value))
        leaves = [x.requires_grad_() for x in tensors_of(q, window, branch).values()]
        o = block_window_attention(q, window, branch, scale=SCALE, block_size=4)
        gradients = torch.autograd.grad(o.sin().sum(), leaves)
        assert torch.isfinite(o).all() and all(torch.isfinite(x).all() for x in gradients)
