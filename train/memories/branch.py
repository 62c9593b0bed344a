"""
A start of the linear branch beside an exact memory, without training: each head's log-scale c(q) = w.q + b is fitted so that
its output comes nearest to that of softmax attention on a long text. A head that does not come nearer stays silent.

With o_e what a query finds in window, sinks and memory, Z_e the sum of its weights there, and o_l, Z_l the same of the linear
branch, the head's output is o_e + p (o_l - o_e) with p = sigmoid(c(q) + log Z_l - log Z_e). So three products of differences
per query are all that the fit needs to know.

T tokens, H query heads, G key/value heads (those that do not keep every token), R = H / G, d head size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dijiang.common.hooks import hooks
from dijiang.convert.fitting.fit import projection_hooks
from dijiang.modeling import DiJiangForCausalLM
from dijiang.modeling.decoder_modules import Projections
from dijiang.modeling.linear_attention import TINY
from dijiang.modeling.linear_attention_layer import DiJiangLinearAttention, linear_layers

from ..stages.calibrate import center

SILENT = -1e4
RIDGE = 0.02  # on w, in units of the error without the branch, for queries of mean square 1
STARTS = (-10.0, 6.0, 33)  # of b: from, to, how many
STEPS = 40
OUTLIERS = 0.3  # an error this much of the mean halves the weight of its query
LEAST_GAIN = 0.005  # of the error, for which a head takes the branch
EVERY = 2  # of how many queries one is looked at


class MixingQueries(NamedTuple):
    """
    What the fit knows of n queries of a layer.

    Attributes:
        q: (n, H, d), scaled as for features.
        gap: (n, H), log Z_l - log Z_e, -inf where the linear state is empty.
        silent: (n, H), |o - o_e|^2, o the output of softmax attention; lengths are those after the output projection.
        toward: (n, H), (o - o_e).(o_l - o_e).
        apart: (n, H), |o_l - o_e|^2.
    """

    q: Tensor
    gap: Tensor
    silent: Tensor
    toward: Tensor
    apart: Tensor


@dataclass(kw_only=True)
class LinearPiece:
    """
    What enters a layer's linear state with each query of a piece, and what the queries find there.

    Attributes:
        there: (B, T, G) bool, whether a key enters.
        rank: (B, T, G), the place of its token.
        numerator: (B, T, H, d).
        total: (B, T, H).
    """

    there: Tensor
    rank: Tensor
    numerator: Tensor
    total: Tensor


@contextmanager
def recorded_linear_branch(attention: DiJiangLinearAttention) -> Iterator[list[LinearPiece]]:
    """Inside the block, `attend` of the layer leaves what its linear branch meets and finds, piece by piece."""
    pieces: list[LinearPiece] = []
    original = attention.linear_branch

    def record(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        B, T, G, _ = k.shape
        there = torch.ones(B, T, G, dtype=torch.bool, device=k.device) if visible is None else visible
        there = there.unsqueeze(-1).expand(B, T, G) if there.dim() == 2 else there
        rank = args[2].unsqueeze(-1).expand(B, T, G) if args[2].dim() == 2 else args[2]
        found = original(q, k, v, visible, *args, **kwargs)
        pieces.append(LinearPiece(there=there, rank=rank, numerator=found[0], total=found[1]))
        return found

    attention.__dict__["linear_branch"] = record
    try:
        yield pieces
    finally:
        del attention.__dict__["linear_branch"]


def entry_of(there: Tensor, rank: Tensor) -> Tensor:
    """(B, G, T), the query with which each token enters the linear state, T if none does."""
    B, T, G = there.shape
    entry = torch.full((B, G, T + 1), T, device=there.device)
    place = torch.where(there, rank.long(), T).transpose(1, 2)
    return entry.scatter(2, place, torch.arange(T, device=entry.device).expand(B, G, T))[:, :, :T]


@torch.no_grad()
def mixing_queries(attention: DiJiangLinearAttention, own: Sequence[Tensor], o_proj: Tensor, at: Tensor) -> MixingQueries:
    """
    Args:
        attention: a layer with a window, and perhaps an exact memory.
        own: `Projections` of its heads that do not keep every token, of one sequence.
        o_proj: (hidden, H, d), the part of the output projection that belongs to them.
        at: (n,), positions of the queries to look at.
    """
    q, k, v, raw_k = (x.float() for x in own)
    R = attention.num_key_value_groups
    with recorded_linear_branch(attention) as pieces:
        attention.attend(q, k, v, raw_k=raw_k)
    parts = {name: torch.cat([getattr(x, name) for x in pieces], dim=1) for name in vars(pieces[0])}
    entry = entry_of(parts["there"], parts["rank"])
    gram = torch.einsum("xhd,xhe->hde", o_proj.float(), o_proj.float())
    at = at.to(q.device)
    future = torch.arange(k.shape[1], device=q.device) > at[:, None]
    heads = []
    for h in range(q.shape[2]):
        in_state = entry[0, h // R] <= at[:, None]
        scores = (q[0, at, h] * attention.scaling @ k[0, :, h // R].T).masked_fill_(future, -torch.inf)
        exact = scores.softmax(-1) @ v[0, :, h // R]
        scores.masked_fill_(in_state, -torch.inf)
        log_sum = scores.logsumexp(-1)
        seen = scores.softmax(-1) @ v[0, :, h // R]
        total = parts["total"][0, at, h].float()
        some = in_state.any(-1) & (total > 0)
        linear = parts["numerator"][0, at, h].float() / torch.where(some, total, 1.0).unsqueeze(-1)
        off, away = exact - seen, torch.where(some.unsqueeze(-1), linear - seen, 0.0)
        gap = torch.where(some, total.log() - log_sum, -torch.inf)
        products = [((x @ gram[h]) * y).sum(-1) for x, y in ((off, off), (off, away), (away, away))]
        heads.append(torch.stack((gap, *products)))
    return MixingQueries(q[0, at] * attention.feature_scale, *torch.stack(heads, dim=-1))


def fit_scales(queries: MixingQueries) -> tuple[Tensor, Tensor, Tensor]:
    """
    The w (H, d) and b (H,) that bring each head's output nearest to that of softmax attention, and the error that is left, as
    a share of that without the branch (H,). A query counts less the larger its own error is without the branch, so that a few
    outliers do not decide. Heads that gain less than `LEAST_GAIN` are silent, and 1 is left.
    """
    q, gap, *errors = (x.double() for x in queries)
    weight = 1 / (errors[0] + OUTLIERS * errors[0].mean(0)).clamp_min(TINY)
    silent, toward, apart = (x * weight / (errors[0] * weight).sum(0).clamp_min(TINY) for x in errors)
    size = q.square().mean((0, 2)).sqrt().clamp_min(TINY)
    x = q / size[:, None]

    def left(c: Tensor) -> Tensor:
        p = torch.sigmoid(gap + c)
        return (silent - 2 * p * toward + p.square() * apart).sum(0)

    starts = torch.linspace(*STARTS, dtype=x.dtype, device=x.device)
    b = starts[torch.stack([left(start) for start in starts]).argmin(0)]
    w = x.new_zeros(x.shape[1:])
    with torch.enable_grad():
        w.requires_grad_(True)
        b.requires_grad_(True)
        optimizer = torch.optim.LBFGS([w, b], max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = left((x * w).sum(-1) + b).sum() + RIDGE * w.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    w, b = w.detach(), b.detach()
    error = left((x * w).sum(-1) + b)
    helps = (error < 1 - LEAST_GAIN) & (errors[0].sum(0) > 0)  # a head that loses nothing has nothing to gain
    scaled = torch.where(helps[:, None], w / size[:, None], 0.0)
    return scaled.float(), torch.where(helps, b, SILENT).float(), torch.where(helps, error, 1.0).float()


@torch.no_grad()
def start_branches(
    model: DiJiangForCausalLM,
    teacher: DiJiangForCausalLM,
    input_ids: Tensor,
    advance: Callable[[int], None] = lambda done: None,
) -> dict[int, list[float]]:
    """
    Set key scale, branch scale and the origin of the maps of every linear layer, on the hidden states of the teacher.

    Args:
        model: DiJiang model with the teacher's projections; it is changed in place.
        teacher: softmax model in our decoder.
        input_ids: (T,), a text as long as the sequences that the model will read, for a branch that is right at a thousand
            tokens may be wrong at four thousand.
        advance: called with the number of layers done since the last call.

    Returns:
        By layer, what is left of each query head's error without the branch; 1 if it stays silent.
    """
    layers = linear_layers(model)
    for layer in layers.values():
        make_silent(layer)
    at = torch.arange(model.config.attention_window, len(input_ids), EVERY)
    left: dict[int, list[float]] = {}

    def start(i: int, module: Any, projected: Projections) -> None:
        layer = layers[i]
        own = [layer.take_linear_heads(x) for x in projected]
        center(layer, *((x.float() * layer.feature_scale).mean((0, 1)) for x in own[:2]))
        parts = module.o_proj.weight.unflatten(1, (layer.num_key_value_heads, layer.num_key_value_groups, -1))
        weight, bias, error = fit_scales(mixing_queries(layer, own, parts[:, layer.linear_heads].flatten(1, 2), at))
        assert layer.branch_scale is not None
        layer.branch_scale.weight.copy_(weight)
        layer.branch_scale.bias.copy_(bias)
        left[i] = error.tolist()
        advance(1)

    with hooks(projection_hooks(teacher, layers, start)):
        teacher.model(input_ids=input_ids[None].to(next(teacher.parameters()).device), use_cache=False)
    return left


def make_silent(layer: DiJiangLinearAttention) -> None:
    """Silence the branch of a layer, whose map and scales other models may share until now."""
    for module in filter(None, (layer.feature_map_q, layer.feature_map_k, layer.key_scale, layer.branch_scale)):
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
    assert layer.branch_scale is not None
    layer.branch_scale.weight.zero_()
    layer.branch_scale.bias.fill_(SILENT)
