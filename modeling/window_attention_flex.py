"""
The window branch on a GPU: window_attention.py by torch's FlexAttention, one fused kernel for window and sinks, whereas the
blocks, meant for CPUs, would pass through a GPU's memory; and the choice between the two.

B batch, T new tokens, W window, S sinks, H query heads, G key/value heads, d head size.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .exact_memory import HeldKeys
from .linear_attention import TINY
from .optional_kernel import OptionalKernel
from .window_attention import BLOCK_SIZE, HIDDEN, LinearBranch, Window, block_window_attention

# narrowest window that FlexAttention is used for: it computes tiles of 128 keys, whatever a query sees of them (by reading,
# not measured)
FLEX_FROM = 16
kernel = OptionalKernel("window attention runs on FlexAttention", "window attention runs in blocks: FlexAttention fails here")


@functools.cache
def flex_forms(compiled: bool) -> tuple[Any, Any]:
    """create_block_mask and flex_attention."""
    forms = (create_block_mask, flex_attention)
    return (torch.compile(forms[0]), torch.compile(forms[1])) if compiled else forms


def window_attention(
    q: Tensor, window: Window, branch: LinearBranch, *, scale: float, memory: HeldKeys | None = None
) -> Tensor:
    """
    `block_window_attention` by the form that suits q's device. The log says once if it is FlexAttention, or why not; with a
    memory it is the blocks on any device.
    """
    if memory is not None:
        return block_window_attention(q, window, branch, scale=scale, memory=memory)
    T = q.shape[1]
    W = window.k.shape[1] - T
    if q.is_cuda and W == 1:
        return own_key_attention(q, window, branch, scale=scale)
    # a few queries are not worth a compilation for their number
    if q.is_cuda and T > BLOCK_SIZE and W >= FLEX_FROM and kernel.usable and not torch.compiler.is_compiling():
        o = kernel.run(lambda: flex_window_attention(q, window, branch, scale=scale))
        if o is not None:
            return o
    return block_window_attention(q, window, branch, scale=scale)


def flex_window_attention(q: Tensor, window: Window, branch: LinearBranch, *, scale: float, compiled: bool = True) -> Tensor:
    """`block_window_attention`, whose arguments and result these are; `compiled=False` runs FlexAttention's eager form."""
    k, v, valid, sinks = window
    B, T, H, _ = q.shape
    S = sinks.k.shape[1]
    W = k.shape[1] - T
    seen_row = torch.ones(k.shape[:2], dtype=torch.bool, device=q.device) if valid is None else valid
    arrival = torch.full((B, S), -1, device=q.device) if sinks.arrival is None else sinks.arrival

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        age = query + W - (key - S)
        in_window = (key >= S) & (age >= 0) & (age < W) & seen_row[b, (key - S).clamp(min=0)]
        if not S:
            return in_window
        return in_window | ((key < S) & (arrival[b, key.clamp(max=S - 1)] <= query))

    # the mask is compiled too, else every pair of query and key would pass through memory
    make_mask, attention = flex_forms(compiled)
    mask = make_mask(seen, B, None, T, S + W + T, device=q.device)
    keys, values = (torch.cat(pair, dim=1).to(q.dtype).transpose(1, 2) for pair in ((sinks.k, k), (sinks.v, v)))
    o, log_sum = attention(
        q.transpose(1, 2), keys, values, block_mask=mask, scale=scale, enable_gqa=k.shape[2] != H, return_lse=True
    )
    o = o.transpose(1, 2).float()
    log_sum = log_sum.transpose(1, 2).float()
    unseeing = torch.isneginf(log_sum)  # padding, and rows whose keys are all padding
    return merge_branches(o.masked_fill(unseeing.unsqueeze(-1), 0.0), log_sum.masked_fill(unseeing, HIDDEN), branch)


def merge_branches(o: Tensor, log_sum: Tensor, branch: LinearBranch) -> Tensor:
    """
    One softmax-like average over both branches: (exp(l) o + exp(c) numerator) / (exp(l) + exp(c) total).

    Args:
        o: (B, T, H, d), normalized output of the window.
        log_sum: l (B, T, H), the logarithm of the window's sum of weights.
        branch: the linear branch, whose log-scale is c.
    """
    top = torch.maximum(log_sum, branch.log_scale).detach()
    window_weight = (log_sum - top).exp()
    branch_weight = (branch.log_scale - top).exp()
    total = (window_weight + branch_weight * branch.total).clamp_min(TINY)
    return (window_weight / total).unsqueeze(-1) * o + (branch_weight / total).unsqueeze(-1) * branch.numerator


def own_key_attention(q: Tensor, window: Window, branch: LinearBranch, *, scale: float) -> Tensor:
    """
    `block_window_attention` for W = 1, whose arguments and result these are: the window holds a query's own key alone, one
    product of rows, for which neither blocks of keys nor tiles are worth it.
    """
    k, v, valid, sinks = window
    B, T, H, d = q.shape
    G = k.shape[2]
    q = (q.float() * scale).view(B, T, G, H // G, d)
    own_k, own_v = (x[:, 1:].float().unsqueeze(3) for x in (k, v))
    own = (q * own_k).sum(-1)
    if valid is not None:
        own = own.masked_fill(~valid[:, 1:, None, None], HIDDEN)
    total, branch_score = branch.as_key()
    sink_scores = torch.einsum("btgrd,bsgd->btgrs", q, sinks.k.float())
    if sinks.arrival is not None:
        late = sinks.arrival[:, None] > torch.arange(T, device=q.device)[:, None]
        sink_scores = sink_scores.masked_fill(late[:, :, None, None], HIDDEN)
    branch_column = branch_score.view(B, T, G, H // G).unsqueeze(-1)
    weights = torch.cat((own.unsqueeze(-1), branch_column, sink_scores), dim=-1).softmax(-1)
    o = weights[..., :1] * own_v + torch.einsum("btgrs,bsgd->btgrd", weights[..., 2:], sinks.v.float())
    return torch.addcmul(o.view(B, T, H, d), branch.numerator, (weights[..., 1].reshape(B, T, H) / total).unsqueeze(-1))
