"""Fits the networks of the memory's learned score, one for each key/value head, all at once."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_LOG = 12.0  # of a predicted label over the mean one


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreWeights:
    """
    Weights of the networks of N heads, as `LearnedScore` holds those of a layer.

    Attributes:
        W_1: (N, width, 2 d).
        b_1: (N, width).
        w_2: (N, width).
    """

    W_1: Tensor
    b_1: Tensor
    w_2: Tensor


def fit_scores(
    x: Tensor,
    y: Tensor,
    share: Tensor,
    *,
    width: int,
    steps: int = 300,
    batch: int = 512,
    learning_rate: float = 5e-3,
    seed: int = 0,
) -> ScoreWeights:
    """
    Fit s = w_2 . gelu(W_1 x + b_1) + b_2 to labels by the Poisson deviance exp(s) - y s. Its minimum is the mean of y given x,
    so that rare tokens with large labels keep their weight, which a squared error of log y loses.

    Args:
        x: (N, T, 2 d), unrotated keys and values.
        y: (N, T), labels, not negative.
        share: (T,), by which tokens are drawn.
        width: of the networks.
        steps: of AdamW under a one-cycle schedule.
        batch: tokens per step, the same for all heads.
        learning_rate: at its top.
        seed: of the start and of the draws.

    Returns:
        The weights, normalization of x included; b_2 does not change ranks and is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    N, _, size = x.shape
    mean, deviation = x.mean(1, keepdim=True).float(), x.float().std(1, keepdim=True) + 1e-6
    start = torch.randn(N, size, width, generator=generator) * size**-0.5
    last = torch.randn(N, width, 1, generator=generator) * width**-0.5
    parameters = [start, torch.zeros(N, 1, width), last, torch.zeros(N, 1, 1)]
    W_1, b_1, w_2, b_2 = (value.to(x.device).requires_grad_(True) for value in parameters)
    y = y / y.mean(1, keepdim=True).clamp_min(1e-30)
    optimizer = torch.optim.AdamW([W_1, b_1, w_2, b_2], lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    with torch.enable_grad():
        for _ in range(steps):
            drawn = torch.multinomial(share, batch, replacement=True, generator=generator).to(x.device)
            inputs = (x[:, drawn].float() - mean) / deviation
            scores = torch.baddbmm(b_2, F.gelu(torch.baddbmm(b_1, inputs, W_1)), w_2).squeeze(-1)
            loss = (scores.clamp(max=LARGEST_LOG).exp() - y[:, drawn] * scores).mean(1).sum()  # heads do not interact
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        scaled = W_1 / deviation.transpose(1, 2)
        bias = b_1 - mean @ scaled
        return ScoreWeights(W_1=scaled.transpose(1, 2).contiguous(), b_1=bias.squeeze(1), w_2=w_2.squeeze(-1).detach())
