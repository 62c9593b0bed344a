"""
Window, sinks and exact memory as masks on softmax attention, which is what a linear layer computes as long as its linear
branch is silent, gradients included.
"""

import heapq
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dijiang.modeling.linear_attention_layer import DiJiangLinearAttention
from dijiang.modeling.memory_scores import MemoryScore, rounded

SILENT_BELOW = -200.0  # log-scales whose exponential is 0 in float32, whatever the features


def is_masked_softmax(layer: DiJiangLinearAttention) -> bool:
    """Whether `masked_attention` computes what the layer does for a whole sequence."""
    scale = layer.branch_scale
    if scale is None or layer.gate_temperature is not None:
        return False
    silent = not scale.weight.any() and bool((scale.bias < SILENT_BELOW).all())
    score: Any = layer.memory_score
    known_early = score is None or not (score.reads_queries or type(score).leaving is not MemoryScore.leaving)
    return silent and known_early


def masked_attention(layer: DiJiangLinearAttention, q: Tensor, k: Tensor, v: Tensor, raw_k: Tensor | None) -> Tensor:
    """
    Softmax attention to the window, the sinks and the held tokens of each head.

    Args:
        layer: one of which `is_masked_softmax` holds.
        q: (B, T, H, d), after rotary positions, of whole sequences without padding.
        k: (B, T, G, d), after rotary positions.
        v: (B, T, G, d).
        raw_k: (B, T, G, d), k before rotary positions; needed if there is a memory.

    Returns:
        (B, T, H, d), float32.
    """
    seen = seen_keys(layer, k, v, raw_k).expand(-1, k.shape[2], -1, -1).repeat_interleave(q.shape[2] // k.shape[2], dim=1)
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=layer.scaling, enable_gqa=True).transpose(1, 2)


@torch.no_grad()
def seen_keys(
    layer: DiJiangLinearAttention, k: Tensor, v: Tensor, raw_k: Tensor | None, queries: Tensor | None = None
) -> Tensor:
    """
    The keys (B or 1, G or 1, n, T) that each query sees, bool; arguments as for `masked_attention`, and the positions (n,) of
    the queries that are asked about, by default all.
    """
    T, W, S = k.shape[1], layer.window, layer.sinks
    key = torch.arange(T, device=k.device)
    query = (key if queries is None else queries)[:, None]
    seen = ((key <= query) & ((query - key < W) | (key < S)))[None, None]
    if not layer.has_memory or T <= W:
        return seen
    assert raw_k is not None and layer.memory_score is not None
    rank = key.expand(len(k), T)
    carry = k.new_zeros(len(k), k.shape[2], layer.state_sizes.carry, dtype=torch.float32)
    scores, _ = layer.memory_score.arriving(raw_k, v, rank, carry)
    # token j leaves the window, and competes, with query j + W
    left = torch.full(scores.shape, -1)
    for row in range(len(k)):
        for head, slots in enumerate(layer.slots):
            left[row, head, S : T - W] = W + S + driven_out(rounded(scores[row, head, S : T - W]).tolist(), slots)
    held = (key >= S) & (key <= query - W) & (query < left.to(k.device).unsqueeze(2))
    return seen | held


def driven_out(scores: list[float], slots: int) -> Tensor:
    """The arriving token that drives each of n tokens out of `slots` slots, n if none does; of equal ones the older stays."""
    left = [len(scores)] * len(scores)
    held: list[tuple[float, int]] = []
    for i, score in enumerate(scores):
        if len(held) < slots:
            heapq.heappush(held, (score, -i))
        else:
            left[-heapq.heappushpop(held, (score, -i))[1]] = i
    return torch.tensor(left, dtype=torch.long)
