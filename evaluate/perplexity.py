"""Perplexity on blocks of held-out text."""

import math

import torch
import torch.nn.functional as F


@torch.no_grad()
def perplexity(model, blocks: torch.Tensor) -> float:
    """
    exp of the mean next-token cross-entropy, each block on its own, its first token not predicted.

    Args:
        model: a causal language model; logits are summed up in float32 whatever its dtype.
        blocks: (blocks, tokens) int64, at least 2 tokens each.
    """
    device = next(model.parameters()).device
    total = 0.0
    for block in blocks.to(device):
        logits = model(input_ids=block[None], use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits, block[1:], reduction="sum").item()
    return math.exp(total / (blocks.shape[0] * (blocks.shape[1] - 1)))
