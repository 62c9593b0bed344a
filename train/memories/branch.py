"""
A closed-form start of the linear branch beside an exact memory: each head gets the weight at which it helps most on long text,
or stays silent where it does not help.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dijiang.common.hooks import hooks
from dijiang.convert.fitting.fit import projection_hooks
from dijiang.modeling import DiJiangForCausalLM
from dijiang.modeling.decoder_modules import Projections
from dijiang.modeling.linear_attention import TINY
from dijiang.modeling.linear_attention_layer import DiJiangLinearAttention, linear_layers

from ..stages.calibrate import QUERIES_AT_ONCE, RIDGE, center

OFFSETS = (0.0, 0.5, 1.0, 2.0, 3.0)  # subtracted from the fitted log-scale
SILENT = -1e4
FEWEST_QUERIES = 256  # that meet keys in the linear branch; fewer cannot fit d + 1 numbers


@dataclass(kw_only=True)
class LinearKeys:
    """
    The keys that enter a layer's linear state, one with each query.

    Attributes:
        k: (B, T, G, d).
        there: (B, T, G) bool, whether there is one.
        rank: (B, T, G), the place of its token.
    """

    k: Tensor
    there: Tensor
    rank: Tensor

    def entry(self) -> Tensor:
        """(B, G, T), the query with which each token enters the state, T if none does."""
        B, T, G = self.there.shape
        entry = torch.full((B, G, T + 1), T, device=self.k.device)
        place = torch.where(self.there, self.rank.long(), T).transpose(1, 2)
        return entry.scatter(2, place, torch.arange(T, device=entry.device).expand(B, G, T))[:, :, :T]


@contextmanager
def recorded_linear_keys(attention: DiJiangLinearAttention) -> Iterator[list[LinearKeys]]:
    """Inside the block, `attend` of the layer leaves what enters its state, piece by piece."""
    pieces: list[LinearKeys] = []
    original = attention.linear_branch

    def record(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        B, T, G, _ = k.shape
        there = torch.ones(B, T, G, dtype=torch.bool, device=k.device) if visible is None else visible
        there = there.unsqueeze(-1).expand(B, T, G) if there.dim() == 2 else there
        rank = args[2].unsqueeze(-1).expand(B, T, G) if args[2].dim() == 2 else args[2]
        pieces.append(LinearKeys(k=k, there=there, rank=rank))
        return original(q, k, v, visible, *args, **kwargs)

    attention.__dict__["linear_branch"] = record
    try:
        yield pieces
    finally:
        del attention.__dict__["linear_branch"]


@torch.no_grad()
def start_branch(attention: DiJiangLinearAttention, own: Sequence[Tensor], target: Tensor) -> list[float | None]:
    """
    Set key scale and branch scale of a layer, and the origin of its maps.

    Args:
        attention: a layer with a window, and perhaps an exact memory.
        own: `Projections` of its heads that do not keep every token, of a long text.
        target: (B, T, H, d), the output of softmax attention for them.

    Returns:
        By query head, the offset at which its branch helps most; None if it stays silent.
    """
    q, k, v, raw_k = (x.float() for x in own)
    assert attention.branch_scale is not None
    attention.branch_scale.weight.zero_()
    attention.branch_scale.bias.fill_(SILENT)
    center(attention, (q * attention.feature_scale).mean((0, 1)), (k * attention.feature_scale).mean((0, 1)))
    with recorded_linear_keys(attention) as pieces:
        silent, _ = attention.attend(q, k, v, raw_k=raw_k)
    keys = LinearKeys(**{name: torch.cat([getattr(x, name) for x in pieces], dim=1) for name in ("k", "there", "rank")})
    gap, count = log_sum_gap(attention, q, k, keys)
    weight, bias = fit_scales(q * attention.feature_scale, gap, count)
    best = (silent - target).square().mean((0, 1, 3))
    choice: list[float | None] = [None] * len(best)
    found_weight, found_bias = torch.zeros_like(weight), torch.full_like(bias, SILENT)
    usable = bias > SILENT
    attention.branch_scale.weight.copy_(weight)
    for offset in OFFSETS:
        attention.branch_scale.bias.copy_(torch.where(usable, bias - offset, SILENT))
        error = (attention.attend(q, k, v, raw_k=raw_k)[0] - target).square().mean((0, 1, 3))
        for head in (usable & (error < best)).nonzero().flatten().tolist():
            best[head], choice[head] = error[head], offset
            found_weight[head], found_bias[head] = weight[head], bias[head] - offset
    attention.branch_scale.weight.copy_(found_weight)
    attention.branch_scale.bias.copy_(found_bias)
    return choice


def log_sum_gap(attention: DiJiangLinearAttention, q: Tensor, k: Tensor, keys: LinearKeys) -> tuple[Tensor, Tensor]:
    """
    log(sum of exp(q.k)) - log(phi(q).sum of phi(k)) over the keys in the linear state, (B, T, H), and the number of these
    keys, (B, T, H).
    """
    B, T = q.shape[:2]
    R = attention.num_key_value_groups
    entry = keys.entry().repeat_interleave(R, dim=1)  # (B, H, T)
    repeated = k.repeat_interleave(R, dim=2)
    sums, counts = [], []
    for first in range(0, T, QUERIES_AT_ONCE):
        part = q[:, first : first + QUERIES_AT_ONCE]
        query = torch.arange(first, first + part.shape[1], device=q.device)[:, None]
        met = entry.unsqueeze(2) <= query
        scores = torch.einsum("bihd,bjhd->bhij", part, repeated) * attention.scaling
        sums.append(scores.masked_fill(~met, -torch.inf).logsumexp(-1))
        counts.append(met.sum(-1))
    own = torch.arange(T, device=q.device).expand(B, T)
    no_values = keys.k.new_zeros(*keys.k.shape[:3], 0)
    _, total, _ = attention.linear_branch(q, keys.k, no_values, keys.there, None, own, keys.rank)
    assert total is not None
    return torch.cat(sums, dim=2).transpose(1, 2) - total.clamp_min(TINY).log(), torch.cat(counts, dim=2).transpose(1, 2)


def fit_scales(q: Tensor, gap: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """
    Least squares of c(q) = w.q + b to the gap (B, T, H), head by head, on queries that meet a key; b is `SILENT` for heads
    with few of them.
    """
    design, gap = F.pad(q, (0, 1), value=1.0).flatten(0, 1).double(), gap.flatten(0, 1).double()
    met = count.flatten(0, 1) > 0
    H, size = design.shape[1:]
    weight, bias = q.new_zeros(H, size - 1), q.new_full((H,), SILENT)
    for head in range(H):
        x, y = design[met[:, head], head], gap[met[:, head], head]
        if len(x) < FEWEST_QUERIES:
            continue
        ridge = RIDGE * len(x) * torch.eye(size, dtype=x.dtype, device=x.device)
        solution = torch.linalg.solve(x.T @ x + ridge, x.T @ y)
        weight[head], bias[head] = solution[:-1].float(), solution[-1].float()
    return weight, bias


@torch.no_grad()
def start_branches(
    model: DiJiangForCausalLM,
    teacher: DiJiangForCausalLM,
    input_ids: Tensor,
    advance: Callable[[int], None] = lambda done: None,
) -> dict[int, list[float | None]]:
    """
    `start_branch` of every linear layer, on the hidden states of the teacher for one long text.

    Args:
        model: DiJiang model with the teacher's projections; it is changed in place.
        teacher: softmax model in our decoder.
        input_ids: (T,), as long as the sequences that the model will read, for a branch that is right at a thousand tokens may
            be wrong at four thousand.
        advance: called with the number of layers done since the last call.

    Returns:
        By layer, what `start_branch` returns.
    """
    layers = linear_layers(model)
    for layer in layers.values():
        for module in filter(None, (layer.feature_map_q, layer.feature_map_k, layer.key_scale, layer.branch_scale)):
            for parameter in module.parameters():
                parameter.data = parameter.data.clone()  # which other models may share
    choices: dict[int, list[float | None]] = {}

    def start(i: int, module: Any, projected: Projections) -> None:
        layer = layers[i]
        q, k, v = (x.transpose(1, 2) for x in projected[:3])
        full = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=layer.scaling, enable_gqa=True).transpose(1, 2)
        own = [layer.take_linear_heads(x) for x in projected]
        choices[i] = start_branch(layer, own, layer.take_linear_heads(full).float())
        advance(1)

    with hooks(projection_hooks(teacher, layers, start)):
        teacher.model(input_ids=input_ids[None].to(next(teacher.parameters()).device), use_cache=False)
    return choices
