"""Small modules of a linear layer: weights per key and per query, decay and output gate."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init


class LogScale(nn.Module):
    """The logarithm of a weight per head, scale * w.x + b. Input (B, T, heads, d), output float32 (B, T, heads)."""

    def __init__(self, num_heads: int, head_dim: int, start: float):
        super().__init__()
        self.start = float(start)
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.zeros_(self.weight)
        init.constant_(self.bias, self.start)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return torch.add(self.bias.float(), (x * self.weight.float()).sum(-1), alpha=scale)


class Decay(nn.Module):
    """
    Per-head log-decay -exp(log_rate), (G,) float32. At the start it is log(1 - 1 / span), where the spans of the heads run
    evenly on a logarithmic scale from the first of `spans` to the last (RetNet, arXiv 2307.08621, has [32, 512]).

    Args:
        num_heads: heads over which the spans run.
        learned: whether the decay trains.
        spans: of the first and of the last head, in tokens.
        heads: the G of these heads that decay. Default: all.
    """

    def __init__(self, num_heads: int, learned: bool, spans: list[float | int], heads: list[int] | None = None):
        super().__init__()
        self.learned = learned
        self.spans = spans
        self.num_heads = num_heads
        self.heads = list(range(num_heads)) if heads is None else heads
        self.log_rate = nn.Parameter(torch.empty(len(self.heads), dtype=torch.float32), requires_grad=learned)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.device("cpu"):
            ends = -torch.tensor(self.spans, dtype=torch.float64).log()
            share = torch.linspace(ends[0].item(), ends[1].item(), self.num_heads, dtype=torch.float64).exp()[self.heads]
        init.copy_(self.log_rate, (-torch.log1p(-share)).log().float())  # finite for any span

    def forward(self) -> Tensor:
        # loading a checkpoint sets requires_grad on every parameter, so it is not what keeps a fixed decay fixed
        log_rate = self.log_rate if self.learned else self.log_rate.detach()
        return -log_rate.float().exp()


class OutputGate(nn.Linear):
    """SiLU gate on the heads' output, as in RetNet; it starts as in the paper's released code."""

    def reset_parameters(self) -> None:
        init.xavier_uniform_(self.weight, gain=2**-2.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))
