"""Perplexity on held-out text: of blocks, of sliding windows, by position."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

LOGIT_ROWS = 1024  # tokens whose logits over the whole vocabulary are held at a time


@torch.no_grad()
def token_losses(model, tokens: torch.Tensor, start: int = 1) -> torch.Tensor:
    """
    -log p of each of tokens[start:], in nats, given all tokens before it.

    Args:
        model: a causal language model with `base_model` and `get_output_embeddings()`; logits are summed up in float32
            whatever its dtype.
        tokens: (T,) int64, T > start >= 1.

    Returns:
        (T - start,) float32, on the CPU.
    """
    tokens = tokens.to(next(model.parameters()).device)
    hidden = model.base_model(input_ids=tokens[None], use_cache=False).last_hidden_state[0, start - 1 : -1]
    head = model.get_output_embeddings()
    losses = [
        F.cross_entropy(head(rows).float(), targets, reduction="none")
        for rows, targets in zip(hidden.split(LOGIT_ROWS), tokens[start:].split(LOGIT_ROWS), strict=True)
    ]
    return torch.cat(losses).cpu()


def perplexity(model, blocks: torch.Tensor) -> float:
    """exp of the mean next-token cross-entropy of blocks (blocks, tokens) int64, each without its first token, on its own."""
    total = sum(token_losses(model, block).double().sum().item() for block in blocks)
    return math.exp(total / (blocks.shape[0] * (blocks.shape[1] - 1)))


def windows(tokens: torch.Tensor, length: int, stride: int) -> list[tuple[torch.Tensor, int]]:
    """
    Cut a text into windows of at most `length` tokens that begin every `stride` tokens, each with the index of the first
    token to be scored: none is scored twice, so with stride < length (sliding) each after the first has at least
    length - stride tokens before what it scores, and with stride = length (blocks) the first token of each is never scored.

    Raises:
        ValueError: on a stride outside 1 .. length, or fewer than two tokens.
    """
    refuse_stride(length, stride)
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} token, and one is predicted from the one before; give more text")
    found, scored = [], 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + length, len(tokens))
        start = max(scored - begin, 1)
        if begin + start < end:
            found.append((tokens[begin:end], start))
        scored = end
        if end == len(tokens):
            break
    return found


def refuse_stride(length: int, stride: int) -> None:
    """Raise ValueError unless windows of this length can begin every `stride` tokens."""
    if not 1 <= stride <= length or length < 2:
        raise ValueError(f"stride={stride} must be from 1 to the length, {length}, which must be at least 2")


def position_edges(length: int) -> list[int]:
    """Ends of the buckets of positions: 64, 128, 256, ... up to length."""
    edges = [min(64, length)]
    while edges[-1] < length:
        edges.append(min(2 * edges[-1], length))
    return edges


def perplexity_scores(
    model, tokens: torch.Tensor, *, length: int, stride: int, advance: Callable[[int], None] = lambda done: None
) -> dict:
    """
    Losses of a text (T,), window by window (see `windows`).

    Args:
        advance: is told how many tokens were read.

    Returns:
        `totals`: nats lost in each window; `weights`: tokens scored in it; `detail`: `by_position`, for buckets of positions
        in the window up to `edges`, nats (`totals`) and tokens (`weights`).
    """
    edges = torch.tensor(position_edges(length))
    by_position = torch.zeros(2, len(edges), dtype=torch.float64)
    totals, weights = [], []
    for window, start in windows(tokens, length, stride):
        losses = token_losses(model, window, start).double()
        bucket = torch.bucketize(torch.arange(start, len(window)), edges, right=True)
        by_position[0].index_add_(0, bucket, losses)
        by_position[1].index_add_(0, bucket, torch.ones_like(losses))
        totals.append(losses.sum().item())
        weights.append(float(len(losses)))
        advance(len(window))
    totals_by, weights_by = by_position.tolist()
    detail = {"by_position": {"edges": edges.tolist(), "totals": totals_by, "weights": weights_by}}
    return {"totals": totals, "weights": weights, "detail": detail}
