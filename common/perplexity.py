"""Perplexity: how a text is cut into windows, and how many nats a model loses on each of their tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGIT_ROWS = 1024  # tokens whose logits over the whole vocabulary are in memory at a time
MOST_NATS = 700.0  # per token; exp of more exceeds a float


def windows(tokens: torch.Tensor, length: int, stride: int) -> list[tuple[torch.Tensor, int]]:
    """
    Cut a text (T,) into windows, as `window_bounds` places them.

    Returns:
        The tokens of each window, and the index in it of the first token to be scored.
    """
    return [(tokens[begin:end], start) for begin, end, start in window_bounds(len(tokens), length, stride)]


def window_bounds(count: int, length: int, stride: int) -> list[tuple[int, int, int]]:
    """
    Place windows of at most `length` tokens, one every `stride` tokens, over a text of `count` tokens.

    No token is scored twice. With stride < length (sliding windows) every window after the first has at least length - stride
    tokens before those that it scores. With stride = length (blocks) the first token of each window is never scored.

    Returns:
        (begin, end, start) of each window: it holds tokens begin .. end - 1 of the text and scores begin + start .. end - 1.

    Raises:
        ValueError: on a stride outside 1 .. length, or fewer than two tokens.
    """
    refuse_stride(length, stride)
    if count < 2:
        raise ValueError(f"the text has {count} token, and one is predicted from the one before; give more text")
    bounds = []
    scored = 0
    for begin in range(0, count, stride):
        end = min(begin + length, count)
        start = max(scored - begin, 1)
        if begin + start < end:
            bounds.append((begin, end, start))
        scored = end
        if end == count:
            break
    return bounds


def refuse_stride(length: int, stride: int) -> None:
    """Raise ValueError unless windows of this length can begin every `stride` tokens."""
    if not 1 <= stride <= length or length < 2:
        raise ValueError(f"stride={stride} must be from 1 to the length, {length}, which must be at least 2")


def target_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p in nats of each of targets (T,) under logits (T, V), in float32 whatever their dtype: (T,)."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


@torch.no_grad()
def token_losses(model: PreTrainedModel, tokens: torch.Tensor, start: int = 1) -> torch.Tensor:
    """
    -log p of each of tokens[start:], in nats, given all tokens before it.

    Args:
        model: a causal language model with `base_model` and `get_output_embeddings()`.
        tokens: (T,) int64.
        start: index of the first token to score, 1 <= start < T.

    Returns:
        (T - start,) float32, on the CPU.
    """
    tokens = tokens.to(next(model.parameters()).device)
    hidden = model.base_model(input_ids=tokens[None], use_cache=False).last_hidden_state[0, start - 1 : -1]
    head = model.get_output_embeddings()
    pieces = zip(hidden.split(LOGIT_ROWS), tokens[start:].split(LOGIT_ROWS), strict=True)
    return torch.cat([target_losses(head(rows), targets) for rows, targets in pieces]).cpu()


def perplexity(model: PreTrainedModel, blocks: torch.Tensor) -> float:
    """exp of the mean next-token cross-entropy of blocks (blocks, tokens) int64, each without its first token, on its own."""
    nats = sum(token_losses(model, block).double().sum().item() for block in blocks)
    return perplexity_of(nats / (blocks.shape[0] * (blocks.shape[1] - 1)))


def perplexity_of(mean_loss: float) -> float:
    """Perplexity of a mean loss in nats; huge but finite where exp would overflow."""
    return math.exp(min(mean_loss, MOST_NATS))
