"""FlexAttention and the form for a window of one against the blocks, and the merge of two branches."""

import pytest
import torch
from dijiang_testing.model_checks import assert_close
from dijiang_testing.window_branches import SCALE, random_branch, random_window, tensors_of, without_masks

from dijiang.modeling.window_attention import LinearBranch, Sinks, Window, block_window_attention
from dijiang.modeling.window_attention_flex import flex_window_attention, merge_branches, own_key_attention


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("shape", [(2, 29, 6, 2, 8, 7, 3), (1, 29, 2, 2, 8, 1, 0), (2, 150, 6, 2, 8, 64, 4)], ids=str)
def test_flex_attention_equals_the_blocks(shape, hidden):
    """In its eager form; whether it compiles is a matter of GPUs."""
    B, T, H, _, d, _, _ = shape
    q, window = random_window(*shape, seed=sum(shape))
    branch = random_branch(B, T, H, d, seed=16)
    if hidden:
        window.valid[:, : T // 2] = False  # some queries see nothing
    else:
        window = without_masks(window)
    o = flex_window_attention(q, window, branch, scale=SCALE, compiled=False)
    assert_close(o, block_window_attention(q, window, branch, scale=SCALE), "o")


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("shape", [(2, 29, 6, 2, 8, 1, 3), (1, 17, 2, 2, 5, 1, 0)], ids=str)
def test_a_window_of_one_equals_the_blocks_with_every_gradient(shape, hidden):
    B, T, H, _, d, _, _ = shape
    q, window = random_window(*shape, seed=sum(shape))
    branch = random_branch(B, T, H, d, seed=16)
    window = window if hidden else without_masks(window)
    leaves = [x.requires_grad_() for x in tensors_of(q, window, branch).values()]
    results = []
    for form in (own_key_attention, block_window_attention):
        o = form(q, window, branch, scale=SCALE)
        results.append((o, *torch.autograd.grad((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum(), leaves)))
    for i, (result, expected) in enumerate(zip(*results, strict=True)):
        assert_close(result, expected, f"o and gradients, {i}", tolerance=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_on_a_gpu_equals_the_blocks_on_the_cpu(dtype):
    q, window = random_window(2, 700, 9, 3, 64, 64, 4, seed=17)
    branch = random_branch(2, 700, 9, 64, seed=18)
    sinks = Sinks(window.sinks.k.cuda().to(dtype), window.sinks.v.cuda().to(dtype), window.sinks.arrival.cuda())
    window_on_gpu = Window(window.k.cuda().to(dtype), window.v.cuda().to(dtype), window.valid.cuda(), sinks)
    branch_on_gpu = LinearBranch(*(x.cuda() for x in branch))
    o = flex_window_attention(q.cuda().to(dtype), window_on_gpu, branch_on_gpu, scale=0.125)
    expected = block_window_attention(q, window, branch, scale=0.125)
    assert_close(o.cpu(), expected, "o", tolerance=6e-3 if dtype == torch.float32 else 4e-2)


def test_merge_is_one_average_over_both_branches():
    """With weights exp(s) and the right log-scale, the merge of two halves is the softmax over all keys."""
    generator = torch.Generator().manual_seed(5)
    scores, values = torch.randn(20, generator=generator) * 3, torch.randn(20, 4, generator=generator)
    recent, old = slice(0, 8), slice(8, 20)
    log_scale = 11.0  # the linear branch counts in units of exp(log_scale)
    weights = (scores[old] - log_scale).exp()
    branch = LinearBranch(
        (weights @ values[old]).view(1, 1, 1, 4), weights.sum().view(1, 1, 1), torch.full((1, 1, 1), log_scale)
    )
    window_o = (scores[recent].softmax(0) @ values[recent]).view(1, 1, 1, 4)
    merged = merge_branches(window_o, scores[recent].logsumexp(0).view(1, 1, 1), branch)
    assert_close(merged.flatten(), scores.softmax(0) @ values, "merged")


@pytest.mark.parametrize("log_scale", [-1e4, 1e4])
def test_merge_survives_extreme_scales(log_scale):
    window_o, numerator = torch.full((1, 1, 1, 2), 2.0), torch.full((1, 1, 1, 2), 3.0)
    ones = torch.ones(1, 1, 1)
    merged = merge_branches(window_o, ones, LinearBranch(numerator, ones, ones * log_scale))
    assert_close(merged, window_o if log_scale < 0 else numerator, "merged")
    empty = LinearBranch(numerator * 0, ones * 0, ones * log_scale)
    nothing = merge_branches(window_o, ones * torch.finfo(torch.float32).min, empty)
    assert torch.equal(nothing, torch.zeros_like(nothing))
