"""
Scores by which the exact memory ranks tokens, one class per name of `memory_score`. A new score is a class under
`@register_memory_score`.

A score is static: it is known when its token leaves the window and never changes, so that the memory needs no look back.

B batch, T tokens, H query heads, G key/value heads, W window, d head size.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_dijiang import MEMORY_SCORES, DiJiangConfig
from .linear_attention import TINY, weighted_sums
from .window_attention import HIDDEN, Window

# keys after rotary positions (B, T, G, d) and ranks (B, T) -> their features, bare and with the key's weight, (B, T, G, M)
KeyFeatures = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Score = TypeVar("Score", bound="type[MemoryScore]")


def register_memory_score(name: str) -> Callable[[Score], Score]:
    """Make the decorated class the one that `memory_score: name` in a config selects."""

    def register(score: Score) -> Score:
        MEMORY_SCORES[name] = score
        return score

    return register


class MemoryScore(nn.Module):
    """
    Base of all scores. A token's score is what `arriving` gives it, plus what `received` adds for every query that has it in
    its window, then changed by `leaving`. Higher scores are held.

    Args:
        config: a `DiJiangConfig`.
        heads: the layer's key/value heads that have a memory, by their number in the source.
        layer_idx: number of the layer.
    """

    # whether `received` adds to the scores
    reads_queries = False

    def __init__(self, config: DiJiangConfig, heads: list[int], layer_idx: int):
        super().__init__()
        self.heads = heads
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim

    def carry_size(self, features: int) -> int:
        """Numbers per head that have to be remembered from one piece of the input to the next, with this many features."""
        return 0

    def arriving(self, k: Tensor, v: Tensor, rank: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            k: (B, T, G, d), keys before rotary positions.
            v: (B, T, G, d).
            rank: (B, T), how many real tokens came before each, -1 for padding.
            carry: (B, G, x).

        Returns:
            (B, G, T) float32, and the new carry.
        """
        return k.new_zeros(k.shape[0], k.shape[2], k.shape[1], dtype=torch.float32), carry

    def received(self, q: Tensor, window: Window, real: Tensor | None, scale: float) -> Tensor:
        """
        What queries give the rows of their window; called if `reads_queries`.

        Args:
            q: (B, T, H, d).
            window: of these queries.
            real: (B, T) bool, False for padding. None: all are real.
            scale: factor on q.k.

        Returns:
            (B, G, W + T), added to the rows' scores.
        """
        raise NotImplementedError

    def leaving(
        self, features: KeyFeatures, scores: Tensor, k: Tensor, v: Tensor, rank: Tensor, carry: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        Scores (B, G, T) of tokens that leave the window, changed, and the new carry. k and v (B, T, G, d) are after rotary
        positions; rank (B, T) is negative for tokens that do not compete.
        """
        return scores, carry


def rounded(scores: Tensor) -> Tensor:
    """
    Scores to ten bits, the gradient as if they were not rounded: equal tokens then score alike, and the older one wins,
    however a matrix product of another shape rounds.
    """
    exact = scores.detach()
    spread = exact * (2.0**14 + 1.0)
    return scores + ((spread - (spread - exact)) - exact)


def build_memory_score(config: DiJiangConfig, heads: list[int], layer_idx: int) -> MemoryScore:
    """The score that `config.memory_score` names, for these key/value heads."""
    if config.memory_score not in MEMORY_SCORES:
        raise ValueError(f"memory_score={config.memory_score!r} is unknown; choose one of {', '.join(MEMORY_SCORES)}")
    return MEMORY_SCORES[config.memory_score](config, heads, layer_idx)


@register_memory_score("learned")
class LearnedScore(MemoryScore):
    """
    A small network per head on a token's key, before rotary positions, and value: w_2 . gelu(W_1 [k, v] + b_1). It is fitted
    to what later queries would lose without the token (arXiv 2410.01805 fits one to their largest attention); until then all
    tokens score alike, so that the memory holds the oldest.
    """

    def __init__(self, config: DiJiangConfig, heads: list[int], layer_idx: int):
        super().__init__(config, heads, layer_idx)
        G, width = len(heads), config.memory_score_dim
        self.seed = config.feature_seed + layer_idx
        self.W_1 = nn.Parameter(torch.empty(G, width, 2 * config.head_dim, dtype=torch.float32))
        self.b_1 = nn.Parameter(torch.empty(G, width, dtype=torch.float32))
        self.w_2 = nn.Parameter(torch.empty(G, width, dtype=torch.float32))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        with torch.device("cpu"):
            generator = torch.Generator().manual_seed(self.seed)
            start = torch.randn(self.W_1.shape[1:], generator=generator) * self.W_1.shape[2] ** -0.5
        init.copy_(self.W_1, start.expand_as(self.W_1))
        init.zeros_(self.b_1)
        init.zeros_(self.w_2)

    def arriving(self, k: Tensor, v: Tensor, rank: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (x.float().transpose(1, 2) for x in (k, v))
        of_keys, of_values = self.W_1.float().transpose(1, 2).split(self.head_dim, dim=1)
        hidden = F.gelu(k @ of_keys + v @ of_values + self.b_1.float().unsqueeze(1))
        return (hidden @ self.w_2.float().unsqueeze(-1)).squeeze(-1), carry


@register_memory_score("window_attention")
class WindowAttentionScore(MemoryScore):
    """The attention that a token received while it was in the window: its softmax weights on window and sinks, summed."""

    reads_queries = True

    def received(self, q: Tensor, window: Window, real: Tensor | None, scale: float) -> Tensor:
        k, _, valid, sinks = window
        (B, T, H, d), G = q.shape, k.shape[2]
        W = k.shape[1] - T
        q = (q.float() * scale).view(B, T, G, H // G, d)
        rows = k.float().unfold(1, W, 1)[:, 1:]  # (B, T, G, d, W), what each query sees
        own = torch.einsum("btgrd,btgdw->btgrw", q, rows)
        if valid is not None:
            own = own.masked_fill(~valid.unfold(1, W, 1)[:, 1:, None, None], HIDDEN)
        far = torch.einsum("btgrd,bsgd->btgrs", q, sinks.k.float())
        if sinks.arrival is not None:
            late = sinks.arrival[:, None] > torch.arange(T, device=q.device)[:, None]
            far = far.masked_fill(late[:, :, None, None], HIDDEN)
        weights = torch.cat((own, far), dim=-1).softmax(-1)[..., :W].sum(3)
        if real is not None:
            weights = weights * real[..., None, None]
        index = torch.arange(1, T + 1, device=q.device)[:, None] + torch.arange(W, device=q.device)
        weights = weights.transpose(1, 2).reshape(B, G, T * W)
        return weights.new_zeros(B, G, W + T).scatter_add(2, index.view(1, 1, -1).expand_as(weights), weights)


@register_memory_score("self_recall")
class SelfRecallScore(MemoryScore):
    """
    How badly the sums S, z over all tokens that left the window before predict a token's value from its key:
    ||phi(k)^T S / phi(k)^T z - v||^2 (LoLA, arXiv 2505.23666, which scores its store anew at every block). The carry is S, z,
    whatever the layer's own state is; features must be positive.
    """

    def carry_size(self, features: int) -> int:
        return features * (self.head_dim + 1)

    def leaving(
        self, features: KeyFeatures, scores: Tensor, k: Tensor, v: Tensor, rank: Tensor, carry: Tensor
    ) -> tuple[Tensor, Tensor]:
        B, T, G, d = k.shape
        k, v = k.float(), v.float()
        state = carry.view(B, G, -1, d + 1)
        asked, stored = features(k, rank)
        stored = stored * (rank >= 0)[..., None, None]
        earlier = torch.cat((torch.zeros_like(stored[:, :1]), stored[:, :-1]), dim=1)
        earlier_v = torch.cat((torch.zeros_like(v[:, :1]), v[:, :-1]), dim=1)
        mode = "recurrent" if T == 1 else "chunk"
        numerator, total, state = weighted_sums(asked, earlier, earlier_v, state=state, mode=mode)
        assert total is not None
        error = (numerator / total.clamp_min(TINY).unsqueeze(-1) - v).square().sum(-1)
        last = F.pad(v[:, -1], (0, 1), value=1.0)
        state = state + stored[:, -1].unsqueeze(-1) * last.unsqueeze(-2)
        return error.transpose(1, 2), state.flatten(2)


@register_memory_score("random")
class RandomScore(MemoryScore):
    """A control: a number that depends on the token's place, the head and the layer alone."""

    def arriving(self, k: Tensor, v: Tensor, rank: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        head = torch.tensor(self.heads, device=k.device).view(1, -1, 1) + 1
        x = (rank.unsqueeze(1) + 1) * 40503 + head * 69621 + (self.layer_idx + 1) * 30269
        for factor in (48271, 16807):  # two rounds of a multiplicative hash below 2^31
            x = ((x ^ (x >> 13)) * factor) % 2147483647
        return x.float(), carry


@register_memory_score("key_norm")
class KeyNormScore(MemoryScore):
    """A control: keys of small norm are held (arXiv 2406.11430)."""

    def arriving(self, k: Tensor, v: Tensor, rank: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        return -k.float().norm(dim=-1).transpose(1, 2), carry


@register_memory_score("key_diff")
class KeyDifferenceScore(MemoryScore):
    """
    A control: keys that point away from the mean direction of all keys so far are held (KeyDiff, arXiv 2504.15364). The carry
    is the sum of the directions.
    """

    def carry_size(self, features: int) -> int:
        return self.head_dim

    def arriving(self, k: Tensor, v: Tensor, rank: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        direction = F.normalize(k.float(), dim=-1) * (rank >= 0)[..., None, None]
        sums = carry.unsqueeze(1) + direction.cumsum(1)
        score = -F.cosine_similarity(direction, sums, dim=-1)
        return score.transpose(1, 2), sums[:, -1]
