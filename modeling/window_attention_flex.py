"""
The exact part of a linear layer by torch's FlexAttention, one fused kernel for window and sinks, which is what a GPU wants:
the blocks of window_attention.py, made for CPUs, would go through memory there.

B batch, T new tokens, W window, S sinks, H query heads, G key/value heads, d head size.
"""

import functools

import torch
from torch.nn.attention.flex_attention import create_block_mask as plain_block_mask
from torch.nn.attention.flex_attention import flex_attention

from .linear_attention import TINY
from .optional_kernel import OptionalKernel
from .window_attention import BLOCK_SIZE, HIDDEN, near_and_far_attention

# narrowest window that FlexAttention is used for: it computes tiles of 128 keys, whatever a query sees of them (by reading,
# not measured)
FLEX_FROM = 16
kernel = OptionalKernel("FlexAttention", work="window attention runs", fallback="in blocks")


@functools.cache
def compiled_flex():
    """create_block_mask and flex_attention, compiled."""
    return torch.compile(plain_block_mask), torch.compile(flex_attention)


def flex_near_and_far(
    q, k, v, valid, sink_k, sink_v, sink_arrival, far, far_sum, far_log_scale, *, scale: float, attention=None
) -> torch.Tensor:
    """`near_and_far_attention`, whose arguments and result these are; `attention` is flex_attention, compiled by default."""
    (B, T, _, _), S = q.shape, sink_k.shape[1]
    W = k.shape[1] - T
    valid = torch.ones(k.shape[:2], dtype=torch.bool, device=q.device) if valid is None else valid
    if S and sink_arrival is None:
        sink_arrival = torch.full((B, S), -1, device=q.device)

    def seen(b, h, query, key):
        age = query + W - (key - S)
        near = (key >= S) & (age >= 0) & (age < W) & valid[b, (key - S).clamp(min=0)]
        return near | ((key < S) & (sink_arrival[b, key.clamp(max=S - 1)] <= query)) if S else near

    # the mask is compiled too where attention is, else every pair of query and key would pass through memory
    create_block_mask, attention = compiled_flex() if attention is None else (plain_block_mask, attention)
    mask = create_block_mask(seen, B, None, T, S + W + T, device=q.device)
    keys, values = (torch.cat(pair, dim=1).to(q.dtype).transpose(1, 2) for pair in ((sink_k, k), (sink_v, v)))
    near, log_sum = attention(
        q.transpose(1, 2), keys, values, block_mask=mask, scale=scale, enable_gqa=q.shape[2] != k.shape[2], return_lse=True
    )
    near, log_sum = near.transpose(1, 2).float(), log_sum.transpose(1, 2).float()
    unseeing = torch.isneginf(log_sum)  # padding, and rows whose keys are all padding
    near, log_sum = near.masked_fill(unseeing.unsqueeze(-1), 0.0), log_sum.masked_fill(unseeing, -1e30)
    return merge_branches(near, log_sum, far, far_sum, far_log_scale)


def merge_branches(
    near: torch.Tensor, near_log_sum: torch.Tensor, far: torch.Tensor, far_sum: torch.Tensor, far_log_scale: torch.Tensor
) -> torch.Tensor:
    """
    One softmax-like average over both branches: (exp(l) near + exp(c) far) / (exp(l) + exp(c) far_sum).

    Args:
        near: (B, T, H, d) normalised output of the window; near_log_sum l: (B, T, H).
        far: (B, T, H, d) linear branch, not normalised; far_sum: (B, T, H) its sum of weights.
        far_log_scale: c (B, T, H), what one unit of the linear branch weighs in the softmax's units, as a logarithm.
    """
    top = torch.maximum(near_log_sum, far_log_scale).detach()
    near_weight, far_weight = (near_log_sum - top).exp(), (far_log_scale - top).exp()
    total = (near_weight + far_weight * far_sum).clamp_min(TINY)
    return (near_weight / total).unsqueeze(-1) * near + (far_weight / total).unsqueeze(-1) * far


def own_key_attention(
    q, k, v, valid, sink_k, sink_v, sink_arrival, far, far_sum, far_log_scale, *, scale: float
) -> torch.Tensor:
    """
    `near_and_far_attention`, whose arguments and result these are, for a window of 1: a query's own key is one product of two
    rows, for which neither blocks of keys nor tiles are worth it.
    """
    (B, T, H, d), G = q.shape, k.shape[2]
    q = (q.float() * scale).view(B, T, G, H // G, d)
    own_k, own_v = (x[:, 1:].float().unsqueeze(3) for x in (k, v))
    own = (q * own_k).sum(-1)
    if valid is not None:
        own = own.masked_fill(~valid[:, 1:, None, None], HIDDEN)
    far_sum = far_sum.clamp_min(TINY)
    far_score = torch.where(far_sum > TINY, far_sum.log() + far_log_scale, HIDDEN).view(B, T, G, H // G)
    sinks = torch.einsum("btgrd,bsgd->btgrs", q, sink_k.float())
    if sink_arrival is not None:
        late = sink_arrival[:, None] > torch.arange(T, device=q.device)[:, None]
        sinks = sinks.masked_fill(late[:, :, None, None], HIDDEN)
    weights = torch.cat((own.unsqueeze(-1), far_score.unsqueeze(-1), sinks), dim=-1).softmax(-1)
    o = weights[..., :1] * own_v + torch.einsum("btgrs,bsgd->btgrd", weights[..., 2:], sink_v.float())
    return torch.addcmul(o.view(B, T, H, d), far, (weights[..., 1].reshape(B, T, H) / far_sum).unsqueeze(-1))


def near_and_far(q, *args, **options) -> torch.Tensor:
    """`near_and_far_attention` by the form that suits q's device; says once which and why."""
    if q.is_cuda and args[0].shape[1] - q.shape[1] == 1:
        return own_key_attention(q, *args, **options)
    # a few queries are not worth a compilation for their number
    few = q.shape[1] <= BLOCK_SIZE or args[0].shape[1] - q.shape[1] < FLEX_FROM
    if not q.is_cuda or few or torch.compiler.is_compiling() or not kernel.usable:
        return near_and_far_attention(q, *args, **options)
    result = kernel.run(lambda: flex_near_and_far(q, *args, **options))
    return near_and_far_attention(q, *args, **options) if result is None else result
