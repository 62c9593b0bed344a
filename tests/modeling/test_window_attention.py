import pytest
import torch
from dijiang_testing.model_checks import assert_close

from dijiang.modeling.window_attention import merge_step, near_and_far_attention
from dijiang.modeling.window_attention_flex import flex_near_and_far, merge_branches, own_key_attention


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


def window_attention(q, k, v, valid, sink_k, sink_v, sink_arrival, *, scale):
    """`loop_oracle` as one masked softmax, quadratic and differentiable."""
    (_, T, H, _), W = q.shape, k.shape[1] - q.shape[1]
    age = torch.arange(T)[:, None] + W - torch.arange(W + T)
    near = valid[:, None] & (age >= 0) & (age < W)
    seen = torch.cat((near, sink_arrival[:, None] <= torch.arange(T)[:, None]), dim=-1)[:, None]
    keys, values = (torch.cat(pair, 1).repeat_interleave(H // k.shape[2], 2) for pair in ((k, sink_k), (v, sink_v)))
    scores = torch.einsum("bihd,bjhd->bhij", q, keys) * scale
    scores = scores.masked_fill(~seen, -1e30)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), values), scores.logsumexp(-1).transpose(1, 2)


def far_inputs(B, T, H, d, seed) -> dict[str, torch.Tensor]:
    """A linear branch whose share of the whole is neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    return {"far": 2 * draw(B, T, H, d), "far_sum": draw(B, T, H).exp(), "far_log_scale": draw(B, T, H)}


def share_oracle(near, near_log_sum, far, far_sum, far_log_scale):
    """The definition of the merge, in float64 and without any care for overflow."""
    near_sum, unit = near_log_sum.double().exp(), far_log_scale.double().exp()
    # a row that sees nothing near has near_sum 0 and an output there that counts for nothing
    numerator = torch.where(near_sum[..., None] > 0, near_sum[..., None] * near.double(), 0.0) + unit[..., None] * far.double()
    return numerator / (near_sum + unit * far_sum.double())[..., None]


def settled_inputs(H, G, W, S, seed, d=5):
    """One query to a settled state: as `inputs`, and the same keys and values as one list, (B, G, S + W, d)."""
    tensors = inputs(3, 1, H, G, d, W, S, seed)
    tensors["valid"][:], tensors["sink_arrival"][:] = True, -1
    lists = {f"near_{x}": torch.cat((tensors[f"sink_{x}"], tensors[x][:, 1:]), 1).transpose(1, 2) for x in "kv"}
    return tensors, lists


@pytest.mark.parametrize(("H", "G", "W", "S"), [(4, 2, 7, 3), (3, 1, 1, 0), (2, 2, 5, 2), (6, 2, 1, 4)])
def test_step_equals_the_definition_and_window_and_merge(H, G, W, S):
    tensors, lists = settled_inputs(H, G, W, S, seed=6)
    far = far_inputs(3, 1, H, 5, seed=7)
    found = merge_step(tensors["q"], **lists, **far, scale=0.7)
    assert found.dtype == torch.float32
    assert_close(found, share_oracle(*loop_oracle(**tensors, scale=0.7), **far), "definition")
    assert_close(found, merge_branches(*window_attention(**tensors, scale=0.7), **far), "window and merge")


def test_step_is_a_softmax_over_all_keys():
    """With far = sum of exp(score) v and far_sum = sum of exp(score) the split between near and far cannot be seen."""
    B, H, G, d, N, old = 2, 4, 2, 5, 6, 9
    generator = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(B, length, heads, d, generator=generator) for length, heads in ((1, H), (N + old, G), (N + old, G)))
    scores = torch.einsum("bihd,bjhd->bhj", q, k.repeat_interleave(H // G, 2)) * 0.7
    unit = torch.randn(B, 1, H, generator=generator)
    weights = (scores[..., N:] - unit.transpose(1, 2)).exp()
    far = torch.einsum("bhj,bjhd->bhd", weights, v.repeat_interleave(H // G, 2)[:, N:])[:, None]
    near_k, near_v = (x[:, :N].transpose(1, 2) for x in (k, v))
    found = merge_step(q, near_k, near_v, far, weights.sum(-1)[:, None], unit, scale=0.7)
    attention = torch.nn.functional.scaled_dot_product_attention
    expected = attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=0.7, enable_gqa=True).transpose(1, 2)
    assert_close(found, expected, "o")


@pytest.mark.parametrize("scale", [-1e4, 1e4])
def test_step_survives_extreme_scales_and_an_empty_linear_branch(scale):
    tensors, lists = settled_inputs(2, 1, 3, 1, seed=9)
    far = far_inputs(3, 1, 2, 5, seed=10)
    far["far_log_scale"][:] = scale
    near, _ = window_attention(**tensors, scale=0.7)
    expected = near if scale < 0 else far["far"] / far["far_sum"][..., None]
    assert_close(merge_step(tensors["q"], **lists, **far, scale=0.7), expected, "o")
    empty = {"far": torch.zeros(3, 1, 2, 5), "far_sum": torch.zeros(3, 1, 2), "far_log_scale": torch.zeros(3, 1, 2)}
    assert_close(merge_step(tensors["q"], **lists, **empty, scale=0.7), near, "empty")


def test_step_takes_low_precision_and_differentiates():
    tensors, lists = settled_inputs(4, 2, 5, 2, seed=11)
    far = far_inputs(3, 1, 4, 5, seed=12)
    leaves = [x.requires_grad_() for x in (tensors["q"], tensors["k"], tensors["v"], *far.values())]
    lists = {f"near_{x}": torch.cat((tensors[f"sink_{x}"], tensors[x][:, 1:]), 1).transpose(1, 2) for x in "kv"}
    pairs = []
    for o in (
        merge_step(tensors["q"], **lists, **far, scale=0.7),
        merge_branches(*window_attention(**tensors, scale=0.7), **far),
    ):
        pairs.append(torch.autograd.grad((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum(), leaves))
    for name, found, expected in zip(("q", "k", "v", *far), *pairs, strict=True):
        assert_close(found, expected, f"d{name}")
    with torch.no_grad():
        expected = merge_step(tensors["q"], **lists, **far, scale=0.7)
        low = [x.bfloat16() for x in (tensors["q"], *lists.values())]
        found = merge_step(*low, **far, scale=0.7)
    assert found.dtype == torch.float32
    assert_close(found, expected, "bfloat16", tolerance=2e-2)


@pytest.mark.parametrize("block_size", [1, 4, 64])
@pytest.mark.parametrize(
    "shape", [(2, 29, 6, 2, 5, 7, 3), (1, 29, 2, 2, 4, 1, 0), (2, 3, 4, 1, 5, 7, 2), (1, 1, 2, 1, 4, 5, 2)], ids=str
)
def test_near_and_far_equal_the_definition_and_window_and_merge(shape, block_size):
    """Padding, sinks that arrive one by one, lengths that do not fill the last block; and with nothing hidden."""
    B, T, H, _, d, _, _ = shape
    for hidden in (True, False):
        tensors, far = inputs(*shape, seed=sum(shape)), far_inputs(B, T, H, d, seed=13)
        arguments = dict(tensors)
        if not hidden:
            tensors["valid"][:], tensors["sink_arrival"][:] = True, -1
            arguments |= {"valid": None, "sink_arrival": None}
        leaves = [tensors[x].requires_grad_() for x in ("q", "k", "v", "sink_k", "sink_v") if tensors[x].numel()]
        leaves += [x.requires_grad_() for x in far.values()]
        found = near_and_far_attention(**arguments, **far, scale=0.7, block_size=block_size)
        assert_close(found, share_oracle(*loop_oracle(**tensors, scale=0.7), **far), "definition")
        expected = merge_branches(*window_attention(**tensors, scale=0.7), **far)
        assert_close(found, expected, "window and merge")
        weight = torch.linspace(-1, 1, found.numel()).view_as(found)
        pairs = zip(*(torch.autograd.grad((o * weight).sum(), leaves) for o in (found, expected)), strict=True)
        for i, (gradient, expected_gradient) in enumerate(pairs):
            assert_close(gradient, expected_gradient, f"gradient {i}", tolerance=1e-4)


def test_gradients_where_the_linear_branch_is_empty_or_nothing_is_near():
    """Rows at the start of a sequence have no old keys; rows of padding have no keys at all."""
    shape = (2, 9, 4, 2, 5, 3, 0)
    tensors, far = inputs(*shape, seed=14), far_inputs(2, 9, 4, 5, seed=15)
    tensors["valid"][0, :8] = False
    far["far"][:, :5], far["far_sum"][:, :5] = 0.0, 0.0
    for scale in (-1e4, 0.0, 30.0):
        far["far_log_scale"] = torch.full_like(far["far_log_scale"], scale)
        leaves = [x.requires_grad_() for x in (tensors["q"], tensors["k"], tensors["v"], *far.values())]
        o = near_and_far_attention(**tensors, **far, scale=0.7, block_size=4)
        found = torch.autograd.grad(o.sin().sum(), leaves)
        assert torch.isfinite(o).all() and all(torch.isfinite(x).all() for x in found)
        for x in far.values():
            x.requires_grad_(False)


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("shape", [(2, 29, 6, 2, 8, 7, 3), (1, 29, 2, 2, 8, 1, 0), (2, 150, 6, 2, 8, 64, 4)], ids=str)
def test_flex_attention_equals_the_blocks(shape, hidden):
    """Not compiled, which is a matter of GPUs."""
    from torch.nn.attention.flex_attention import flex_attention

    B, T, H, _, d, _, _ = shape
    tensors, far = inputs(*shape, seed=sum(shape)), far_inputs(B, T, H, d, seed=16)
    if hidden:
        tensors["valid"][:, : T // 2] = False  # some queries see nothing
    else:
        tensors |= {"valid": None, "sink_arrival": None}
    found = flex_near_and_far(**tensors, **far, scale=0.7, attention=flex_attention)
    assert_close(found, near_and_far_attention(**tensors, **far, scale=0.7), "o")


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("shape", [(2, 29, 6, 2, 8, 1, 3), (1, 17, 2, 2, 5, 1, 0)], ids=str)
def test_a_window_of_one_equals_the_blocks_with_every_gradient(shape, hidden):
    B, T, H, _, d, _, _ = shape
    tensors, far = inputs(*shape, seed=sum(shape)), far_inputs(B, T, H, d, seed=16)
    if not hidden:
        tensors |= {"valid": None, "sink_arrival": None}
    leaves = [x.requires_grad_() for name, x in (tensors | far).items() if name not in ("valid", "sink_arrival") and x.numel()]
    pairs = []
    for form in (own_key_attention, near_and_far_attention):
        o = form(**tensors, **far, scale=0.7)
        pairs.append((o, *torch.autograd.grad((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum(), leaves)))
    for i, (found, expected) in enumerate(zip(*pairs, strict=True)):
        assert_close(found, expected, f"o and gradients, {i}", tolerance=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_on_a_gpu_equals_the_blocks_on_the_cpu(dtype):
    tensors, far = inputs(2, 700, 9, 3, 64, 64, 4, seed=17), far_inputs(2, 700, 9, 64, seed=18)
    on_gpu = {name: x.cuda().to(dtype) if x.is_floating_point() else x.cuda() for name, x in tensors.items()}
    found = flex_near_and_far(**on_gpu, **{name: x.cuda() for name, x in far.items()}, scale=0.125)
    expected = near_and_far_attention(**tensors, **far, scale=0.125)
    assert_close(found.cpu(), expected, "o", tolerance=6e-3 if dtype == torch.float32 else 4e-2)


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
