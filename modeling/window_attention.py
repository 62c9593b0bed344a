"""
The exact branch of a linear layer, softmax attention to a sliding window, a few sink tokens and the tokens that the exact
memory holds, and its merge with the linear branch under one denominator. In blocks, so that it is linear in length.

B batch, T new tokens, W window, S sinks, M slots of the memory, H query heads, G key/value heads, d head size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .exact_memory import HeldKeys
from .linear_attention import TINY

# a block of queries meets its own keys and a window more; it has as many queries as the window is wide, within these bounds
SMALLEST_BLOCK = 16
BLOCK_SIZE = 64
# the score of a key that is not seen: below every real score, and so far above float32's lowest number that sums stay finite
HIDDEN = -1e30


class Sinks(NamedTuple):
    """
    The first tokens of each sequence, which queries see exactly at any distance.

    Attributes:
        k: (B, S, G, d).
        v: (B, S, G, d).
        arrival: (B, S), the first query that sees the sink: -1 if all do, T if none does. None: all queries see all sinks.
    """

    k: Tensor
    v: Tensor
    arrival: Tensor | None


class Window(NamedTuple):
    """
    The keys and values that queries see exactly. Query t sees rows t + 1 .. t + W, and the sinks that left the window by then.

    Attributes:
        k: (B, W + T, G, d), the W tokens before the first query and the T tokens of the queries.
        v: (B, W + T, G, d).
        valid: (B, W + T) bool, False for padding and for rows before the first token. None: all are real.
        sinks: the sinks.
    """

    k: Tensor
    v: Tensor
    valid: Tensor | None
    sinks: Sinks


class LinearBranch(NamedTuple):
    """
    Attention to all older tokens through their features, not yet normalized.

    Attributes:
        numerator: (B, T, H, d), the weighted sum of the values.
        total: (B, T, H), the sum of the weights.
        log_scale: (B, T, H), c: a weight of 1 counts as much as exp(c) in the softmax of the window.
    """

    numerator: Tensor
    total: Tensor
    log_scale: Tensor

    def as_key(self) -> tuple[Tensor, Tensor]:
        """The sum of the weights and the score that the branch has as one more key, both finite where the branch is empty."""
        total = self.total.clamp_min(TINY)
        return total, torch.where(total > TINY, total.log() + self.log_scale, HIDDEN)


def queries_per_block(window: int) -> int:
    """Queries in one block of `block_window_attention`."""
    return min(max(window, SMALLEST_BLOCK), BLOCK_SIZE)


def block_window_attention(
    q: Tensor,
    window: Window,
    branch: LinearBranch,
    *,
    scale: float,
    block_size: int | None = None,
    memory: HeldKeys | None = None,
) -> Tensor:
    """
    Attention to the window, the sinks, the exact memory and, through the linear branch, to everything else, under one
    denominator:

        (sum_exact exp(scale q.k) v + exp(c) numerator) / (sum_exact exp(scale q.k) + exp(c) total)

    It is one softmax over rows of scores in which the linear branch is one more key, of score c + log total.

    Args:
        q: (B, T, H, d).
        window: of these queries.
        branch: of these queries.
        scale: factor on q.k.
        block_size: queries per block. With T it is one dense block, quadratic in T. Default: `queries_per_block`.
        memory: what the queries of each block see in the exact memory, of blocks of this size. None: there is no memory.

    Returns:
        (B, T, H, d) float32.
    """
    k, v, valid, sinks = window
    B, T, H, d = q.shape
    G = k.shape[2]
    R = H // G
    W = k.shape[1] - T
    C = min(queries_per_block(W) if block_size is None else block_size, T)
    N = -(-T // C)
    S = sinks.k.shape[1]
    total, branch_score = branch.as_key()
    if memory is not None and memory.k.shape[2] != N:
        raise ValueError(f"the memory has {memory.k.shape[2]} blocks, the queries {N}")

    def padded(x: Tensor) -> Tensor:
        """With zeros at its end so that the queries make whole blocks: (B, n, ...) -> (B, n + N * C - T, ...)."""
        # by cat: torch 2.13 compiles the gradient of F.pad wrongly where lengths are dynamic
        return torch.cat((x, x.new_zeros(B, N * C - T, *x.shape[2:])), dim=1) if N * C > T else x

    q, k, v, branch_score = padded(q), padded(k), padded(v), padded(branch_score)
    valid = valid if valid is None else padded(valid)

    def by_block(x: Tensor) -> Tensor:
        """(B, N * C, H, ...) -> (B, G, N, R * C, ...)."""
        return x.unflatten(2, (G, R)).unflatten(1, (N, C)).permute(0, 3, 1, 4, 2, *range(5, x.dim() + 2)).flatten(3, 4)

    def by_token(x: Tensor) -> Tensor:
        """(B, G, N * R * C, ...) -> (B, T, H, ...)."""
        x = x.unflatten(2, (N, R, C)).permute(0, 2, 4, 1, 3, *range(5, x.dim() + 2))
        return x.flatten(3, 4).flatten(1, 2)[:, :T]

    def windows(x: Tensor) -> Tensor:
        """The W + C rows that the C queries of each block can see: (B, N * C + W, G, d) -> (B * G * N, W + C, d)."""
        return x.transpose(1, 2).unfold(2, W + C, C).transpose(-1, -2).float().reshape(B * G * N, W + C, d)

    q = by_block(q.float() * scale)
    age = torch.arange(C, device=q.device)[:, None] + W - torch.arange(W + C, device=q.device)
    hidden = torch.where((age >= 0) & (age < W), 0.0, HIDDEN)
    scores = torch.bmm(q.reshape(B * G * N, R * C, d), windows(k).transpose(1, 2)).view(B, G, N, R, C, W + C)
    scores = scores.add_(hidden)
    if valid is not None:
        scores = scores.masked_fill(~valid.unfold(1, W + C, C)[:, None, :, None, None, :], HIDDEN)
    columns = [scores.flatten(3, 4), by_block(branch_score).unsqueeze(-1)]
    if S:
        sink_scores = (q.flatten(2, 3) @ sinks.k.float().permute(0, 2, 3, 1)).view(B, G, N, R, C, S)
        if sinks.arrival is not None:
            queries = torch.arange(N * C, device=q.device).view(N, 1, C, 1)
            sink_scores = sink_scores.masked_fill(sinks.arrival[:, None, None, None, None, :] > queries, HIDDEN)
        columns.append(sink_scores.flatten(3, 4))
    if memory is not None:
        columns.append(held_scores(q, memory, None if memory.gate is None else by_block(padded(branch.log_scale))))
    weights = torch.cat(columns, dim=-1).softmax(dim=-1)
    o = torch.bmm(weights[..., : W + C].reshape(B * G * N, R * C, W + C), windows(v)).view(B, G, N * R * C, d)
    if S:
        sink_weights = weights[..., W + C + 1 : W + C + 1 + S].reshape(B, G, N * R * C, S)
        o = o + sink_weights @ sinks.v.float().transpose(1, 2)
    if memory is not None:
        held_weights = weights[..., W + C + 1 + S :].flatten(0, 2)
        o = o + torch.bmm(held_weights, memory.v.flatten(0, 2).float()).view_as(o)
    branch_weight = by_token(weights[..., W + C].flatten(2)) / total
    return torch.addcmul(by_token(o), branch.numerator, branch_weight.unsqueeze(-1))


def held_scores(q: Tensor, memory: HeldKeys, log_scale: Tensor | None) -> Tensor:
    """
    The scores of the memory's keys.

    Args:
        q: (B, G, N, R * C, d), scaled.
        memory: what they see.
        log_scale: (B, G, N, R * C), c; needed with a soft gate, under which a key is also a part of the linear branch.

    Returns:
        (B, G, N, R * C, M + C).
    """
    B, G, N, rows, d = q.shape
    C, keys = memory.hidden.shape[3:]
    scores = torch.bmm(q.reshape(B * G * N, rows, d), memory.k.flatten(0, 2).float().transpose(1, 2))
    scores = scores.view(B, G, N, rows // C, C, keys)
    if memory.gate is not None:
        assert log_scale is not None
        linear = memory.gate.log_linear + log_scale.view(B, G, N, rows // C, C, 1)
        scores = torch.logaddexp(scores + memory.gate.log_exact.unsqueeze(3), linear)
    return scores.masked_fill(memory.hidden.unsqueeze(3), HIDDEN).flatten(3, 4)


def window_attention_step(
    q: Tensor, window_k: Tensor, window_v: Tensor, branch: LinearBranch, *, scale: float, hidden: Tensor | None = None
) -> Tensor:
    """
    `block_window_attention` of one query that sees all of N keys, or all that are not hidden: the step of decoding.

    Args:
        q: (B, 1, H, d).
        window_k: (B, G, N, d), sinks, window and exact memory.
        window_v: (B, G, N, d).
        branch: of this query.
        scale: factor on q.k.
        hidden: (B, G, N) bool, keys that the query does not see.

    Returns:
        (B, 1, H, d) float32.
    """
    (B, _, H, d), G = q.shape, window_k.shape[1]
    R = H // G
    total = branch.total.clamp_min(TINY)
    scores = torch.bmm((q.float() * scale).view(B * G, R, d), window_k.flatten(0, 1).float().transpose(1, 2))
    if hidden is not None:
        scores = scores.masked_fill(hidden.view(B * G, 1, -1), HIDDEN)
    branch_score = (total.log() + branch.log_scale).view(B * G, R, 1)
    weights = torch.cat((scores, branch_score), dim=-1).softmax(dim=-1)
    o = torch.bmm(weights[..., :-1], window_v.flatten(0, 1).float()).view(B, 1, H, d)
    return torch.addcmul(o, branch.numerator, weights[..., -1].reshape(B, 1, H, 1) / total.unsqueeze(-1))
