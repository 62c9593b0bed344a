"""Perplexity of held-out text, with its losses by window and by position."""

from collections.abc import Callable

import numpy as np
import torch

from dijiang.common.perplexity import refuse_stride, token_losses, windows

from .task_base import Task, TaskInputs, hash_tokens


def perplexity_tasks(inputs: TaskInputs) -> list[Task]:
    """Perplexity of each text in windows of each length."""
    config = inputs.config
    return [
        perplexity_task(name, tokens, length=length, stride=config.stride)
        for name, tokens in inputs.texts.items()
        for length in config.lengths
    ]


def perplexity_task(name: str, tokens: torch.Tensor, *, length: int, stride: int | None) -> Task:
    """Perplexity of a text (T,) in windows of `length` that begin every `stride` tokens (None: every `length` tokens)."""
    stride = stride or length
    refuse_stride(length, stride)
    length = min(length, len(tokens))
    stride = min(stride, length)
    how = f"{length:,} tokens" if stride == length else f"{length:,} tokens, stride {stride:,}"
    return Task(
        kind="perplexity",
        name=f"{name}, {how}",
        metric="perplexity",
        better="lower",
        floor="no_attention",
        settings={"text": name, "tokens": len(tokens), "hash": hash_tokens(tokens), "length": length, "stride": stride},
        cost=sum(len(window) for window, _ in windows(tokens, length, stride)),
        run=lambda model, reference, advance: perplexity_scores(model, tokens, length=length, stride=stride, advance=advance),
        value_of=np.exp,
    )


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
        model: a causal language model.
        tokens: the text.
        length: tokens of a window.
        stride: tokens between the starts of windows.
        advance: called with the number of tokens read since the last call.

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
