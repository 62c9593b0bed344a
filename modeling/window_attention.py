"""
The exact part of a linear layer: softmax attention to a sliding window and a few sink tokens, in blocks, linear in length;
and its merge with the linear part under one denominator.

B batch, T new tokens, W window, S sinks, H query heads, G key/value heads, d head size.
"""

import torch

from .linear_attention import TINY

# queries per block, each of which meets the block's own keys and a window more: as many as the window is wide, within these
SMALLEST_BLOCK, BLOCK_SIZE = 16, 64
# the score of a key that is not seen: below every real one, above float32's lowest number by so much that sums stay finite
HIDDEN = -1e30


def queries_per_block(window: int) -> int:
    return min(max(window, SMALLEST_BLOCK), BLOCK_SIZE)


def near_and_far_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor | None,
    sink_k: torch.Tensor,
    sink_v: torch.Tensor,
    sink_arrival: torch.Tensor | None,
    far: torch.Tensor,
    far_sum: torch.Tensor,
    far_log_scale: torch.Tensor,
    *,
    scale: float,
    block_size: int | None = None,
) -> torch.Tensor:
    """
    Attention of query t to key rows t + 1 .. t + W, to the sinks that left the window by then, and to everything older
    through the linear branch, under one denominator:

        (sum_near exp(scale q.k) v + exp(c) far) / (sum_near exp(scale q.k) + exp(c) far_sum)

    It is one softmax over rows of scores in which the linear branch is one more key, of score c + log far_sum.

    Args:
        q: (B, T, H, d).
        k, v: (B, W + T, G, d), the W tokens before the first query and the T own ones.
        valid: (B, W + T) bool, False for padding and for rows before the first token. None: all are real.
        sink_k, sink_v: (B, S, G, d).
        sink_arrival: (B, S), the first query that sees the sink; -1 for all, T for none. None: all are seen by all.
        far: (B, T, H, d) linear branch, not normalised; far_sum: (B, T, H) its sum of weights.
        far_log_scale: c (B, T, H), what one unit of the linear branch weighs in the softmax's units, as a logarithm.
        scale: factor on q.k.
        block_size: queries per block. With T it is one dense block, quadratic in T. Default: `queries_per_block`.

    Returns:
        (B, T, H, d) float32.
    """
    B, T, H, d = q.shape
    G, W = k.shape[2], k.shape[1] - T
    R, C = H // G, min(queries_per_block(W) if block_size is None else block_size, T)
    N = -(-T // C)
    far_sum = far_sum.clamp_min(TINY)
    far_score = torch.where(far_sum > TINY, far_sum.log() + far_log_scale, HIDDEN)
    if pad := N * C - T:  # by cat: torch 2.13 compiles the gradient of F.pad wrongly where lengths are dynamic
        q, k, v, far_score = (torch.cat((x, x.new_zeros(B, pad, *x.shape[2:])), dim=1) for x in (q, k, v, far_score))
        valid = valid if valid is None else torch.cat((valid, valid.new_zeros(B, pad)), dim=1)

    def by_block(x):
        """(B, N * C, H, ...) -> (B, G, N, R * C, ...)"""
        return x.unflatten(2, (G, R)).unflatten(1, (N, C)).permute(0, 3, 1, 4, 2, *range(5, x.dim() + 2)).flatten(3, 4)

    # every block of C queries meets the W + C keys that any of them can see
    def windows(x):
        return x.transpose(1, 2).unfold(2, W + C, C).transpose(-1, -2).float().reshape(B * G * N, W + C, d)

    q = by_block(q.float() * scale)
    age = torch.arange(C, device=q.device)[:, None] + W - torch.arange(W + C, device=q.device)
    hidden = torch.where((age >= 0) & (age < W), 0.0, HIDDEN)
    scores = torch.bmm(q.reshape(B * G * N, R * C, d), windows(k).transpose(1, 2)).view(B, G, N, R, C, W + C)
    scores = scores.add_(hidden)
    if valid is not None:
        scores = scores.masked_fill(~valid.unfold(1, W + C, C)[:, None, :, None, None, :], HIDDEN)
    columns = [scores.flatten(3, 4), by_block(far_score).unsqueeze(-1)]
    if S := sink_k.shape[1]:
        sink_scores = (q.flatten(2, 3) @ sink_k.float().permute(0, 2, 3, 1)).view(B, G, N, R, C, S)
        if sink_arrival is not None:
            queries = torch.arange(N * C, device=q.device).view(N, 1, C, 1)
            sink_scores = sink_scores.masked_fill(sink_arrival[:, None, None, None, None, :] > queries, HIDDEN)
        columns.append(sink_scores.flatten(3, 4))
    weights = torch.cat(columns, dim=-1).softmax(dim=-1)
    o = torch.bmm(weights[..., : W + C].reshape(B * G * N, R * C, W + C), windows(v)).view(B, G, N * R * C, d)
    if S:
        o = o + weights[..., W + C + 1 :].reshape(B, G, N * R * C, S) @ sink_v.float().transpose(1, 2)

    def by_token(x):
        """(B, G, N * R * C, ...) -> (B, T, H, ...)"""
        x = x.unflatten(2, (N, R, C)).permute(0, 2, 4, 1, 3, *range(5, x.dim() + 2))
        return x.flatten(3, 4).flatten(1, 2)[:, :T]

    far_weight = by_token(weights[..., W + C].flatten(2)) / far_sum
    return torch.addcmul(by_token(o), far, far_weight.unsqueeze(-1))


def merge_step(
    q: torch.Tensor,
    window_k: torch.Tensor,
    window_v: torch.Tensor,
    far: torch.Tensor,
    far_sum: torch.Tensor,
    far_log_scale: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """
    `near_and_far_attention` of one query to a list of keys, all of them visible: the step of decoding.

    Args:
        q: (B, 1, H, d); window_k, window_v: (B, G, N, d), sinks and window; the rest as `near_and_far_attention`.

    Returns:
        (B, 1, H, d) float32.
    """
    (B, _, H, d), G = q.shape, window_k.shape[1]
    R = H // G
    far_sum = far_sum.clamp_min(TINY)
    scores = torch.bmm((q.float() * scale).view(B * G, R, d), window_k.flatten(0, 1).float().transpose(1, 2))
    far_score = (far_sum.log() + far_log_scale).view(B * G, R, 1)
    weights = torch.cat((scores, far_score), dim=-1).softmax(dim=-1)
    near = torch.bmm(weights[..., :-1], window_v.flatten(0, 1).float()).view(B, 1, H, d)
    return torch.addcmul(near, far, weights[..., -1].reshape(B, 1, H, 1) / far_sum.unsqueeze(-1))
