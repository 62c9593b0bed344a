"""
A start of the linear branch beside an exact memory, without training: each head's log-scale c(q) = w.q + b is fitted so that
its output comes nearest to that of softmax attention, on long text and where answers of recall samples are predicted. A head
that does not come nearer stays silent.

With o_e what a query finds in window, sinks and memory, Z_e the sum of its weights there, and o_l, Z_l the same of the linear
branch, the head's output is o_e + p (o_l - o_e) with p = sigmoid(c(q) + log Z_l - log Z_e). So three products of differences
per query are all that the fit needs to know.

B sequences, T tokens, H query heads, G key/value heads (those that do not keep every token), R = H / G, d head size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dijiang.common.hooks import hooks
from dijiang.convert.fitting.fit import Row, answer_positions, projection_hooks
from dijiang.modeling import DiJiangForCausalLM
from dijiang.modeling.decoder_modules import Projections
from dijiang.modeling.linear_attention_layer import DiJiangLinearAttention, linear_layers

from ..stages.calibrate import center

SILENT = -1e4
RIDGE = 0.02  # on w, in units of the error without the branch, for queries of mean square 1
STARTS = (-10.0, 6.0, 33)  # of b: from, to, how many
STEPS = 40
LEAST_GAIN = 0.005  # of the error, for which a head takes the branch
EVERY = 2  # of how many queries of a text one is looked at


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
def mixing_queries(
    attention: DiJiangLinearAttention, own: Sequence[Tensor], o_proj: Tensor, queries: Sequence[Tensor]
) -> MixingQueries:
    """
    Args:
        attention: a layer with a window, and perhaps an exact memory.
        own: `Projections` of its heads that do not keep every token.
        o_proj: (hidden, H, d), the part of the output projection that belongs to them.
        queries: for each sequence, the positions (n,) to look at.
    """
    q, k, v, raw_k = (x.float() for x in own)
    R = attention.num_key_value_groups
    with recorded_linear_branch(attention) as pieces:
        attention.attend(q, k, v, raw_k=raw_k)
    parts = {name: torch.cat([getattr(x, name) for x in pieces], dim=1) for name in vars(pieces[0])}
    entry = entry_of(parts["there"], parts["rank"])
    gram = torch.einsum("xhd,xhe->hde", o_proj.float(), o_proj.float())
    found: list[MixingQueries] = []
    for b, own_queries in enumerate(queries):
        at = own_queries.to(q.device)
        future = torch.arange(k.shape[1], device=q.device) > at[:, None]
        heads = []
        for h in range(q.shape[2]):
            in_state = entry[b, h // R] <= at[:, None]
            scores = (q[b, at, h] * attention.scaling @ k[b, :, h // R].T).masked_fill_(future, -torch.inf)
            exact = scores.softmax(-1) @ v[b, :, h // R]
            scores.masked_fill_(in_state, -torch.inf)
            log_sum = scores.logsumexp(-1)
            seen = scores.softmax(-1) @ v[b, :, h // R]
            total = parts["total"][b, at, h].float()
            some = in_state.any(-1) & (total > 0)
            linear = parts["numerator"][b, at, h].float() / torch.where(some, total, 1.0).unsqueeze(-1)
            off, away = exact - seen, torch.where(some.unsqueeze(-1), linear - seen, 0.0)
            gap = torch.where(some, total.log() - log_sum, -torch.inf)
            products = [((x @ gram[h]) * y).sum(-1) for x, y in ((off, off), (off, away), (away, away))]
            heads.append(torch.stack((gap, *products)))
        found.append(MixingQueries(q[b, at] * attention.feature_scale, *torch.stack(heads, dim=-1)))
    return joined(found)


def joined(parts: Sequence[MixingQueries]) -> MixingQueries:
    """The queries of all parts."""
    return MixingQueries(*(torch.cat(x) for x in zip(*parts, strict=True)))


def fit_scales(text: MixingQueries, answers: MixingQueries | None) -> tuple[Tensor, Tensor, Tensor]:
    """
    The w (H, d) and b (H,) that bring each head's output nearest to that of softmax attention, and the error that is left, as
    a share of that without the branch (H,). Text and answers count the same. Heads that gain less than `LEAST_GAIN` are
    silent, and 1 is left.
    """
    both = [text] if answers is None else [text, answers]
    x, gap = (torch.cat([getattr(part, name) for part in both]).double() for name in ("q", "gap"))
    silent, toward, apart = (
        torch.cat([part[i] / part.silent.sum(0).clamp_min(1e-30) / len(both) for part in both]).double() for i in (2, 3, 4)
    )
    size = x.square().mean((0, 2)).sqrt().clamp_min(1e-30)
    x = x / size[:, None]

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
    helps = error < (1 - LEAST_GAIN) * left(b.new_full((), SILENT))
    weight = torch.where(helps[:, None], w / size[:, None], 0.0)
    return weight.float(), torch.where(helps, b, SILENT).float(), torch.where(helps, error, 1.0).float()


@torch.no_grad()
def start_branches(
    model: DiJiangForCausalLM,
    teacher: DiJiangForCausalLM,
    rows: Sequence[Row],
    advance: Callable[[int], None] = lambda done: None,
) -> dict[int, list[float]]:
    """
    Set key scale, branch scale and the origin of the maps of every linear layer, on the hidden states of the teacher.

    Args:
        model: DiJiang model with the teacher's projections; it is changed in place.
        teacher: softmax model in our decoder.
        rows: text, and samples of recall. The first is a text as long as the sequences that the model will read, for a branch
            that is right at a thousand tokens may be wrong at four thousand.
        advance: called with the number of tokens read since the last call.

    Returns:
        By layer, what is left of each query head's error without the branch; 1 if it stays silent.
    """
    layers = linear_layers(model)
    for layer in layers.values():
        make_silent(layer)
    found: dict[int, tuple[list[MixingQueries], list[MixingQueries]]] = {i: ([], []) for i in layers}

    def measure(i: int, module: Any, projected: Projections) -> None:
        layer = layers[i]
        own = [layer.take_linear_heads(x) for x in projected]
        if not any(found[i]):
            center(layer, *((x.float() * layer.feature_scale).mean((0, 1)) for x in own[:2]))
        weight = module.o_proj.weight.unflatten(1, (layer.num_key_value_heads, layer.num_key_value_groups, -1))
        found[i][of_recall].append(mixing_queries(layer, own, weight[:, layer.linear_heads].flatten(1, 2), queries))

    device = next(teacher.parameters()).device
    for (length, of_recall), group in groupby(rows, key=lambda row: (len(row.input_ids), bool(row.answers))):
        batch = list(group)
        every = torch.arange(model.config.attention_window, length, EVERY)
        queries = [answer_positions(row) - 1 if of_recall else every for row in batch]
        with hooks(projection_hooks(teacher, layers, measure)):
            teacher.model(input_ids=torch.stack([row.input_ids for row in batch]).to(device), use_cache=False)
        advance(length * len(batch))
    left: dict[int, list[float]] = {}
    for i, layer in layers.items():
        text, answers = (joined(parts) if parts else None for parts in found.pop(i))
        assert text is not None and layer.branch_scale is not None
        weight, bias, error = fit_scales(text, answers)
        layer.branch_scale.weight.copy_(weight)
        layer.branch_scale.bias.copy_(bias)
        left[i] = error.tolist()
    return left


def make_silent(layer: DiJiangLinearAttention) -> None:
    """Silence the branch of a layer, whose map and scales other models may share until now."""
    for module in filter(None, (layer.feature_map_q, layer.feature_map_k, layer.key_scale, layer.branch_scale)):
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
    assert layer.branch_scale is not None
    layer.branch_scale.weight.zero_()
    layer.branch_scale.bias.fill_(SILENT)
