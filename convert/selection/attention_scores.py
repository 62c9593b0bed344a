"""Scores that read how heads attend, without a loss: content-free attention to far places, and attention to repeats."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dijiang.common.hooks import hooks
from dijiang.modeling.linear_attention_layer import linear_layers

from .gates import head_gates, wrapped_attention
from .job import SelectionJob
from .selection import Head, Ranking


@torch.no_grad()
def content_free(job: SelectionJob, *, length: int = 1024) -> Ranking:
    """
    Heads by the attention that a text's mean query, at the end of `length` positions, gives to its mean key beyond the window
    and the sinks, the mean over the queries of a key/value head (as `DuoAttentionPress` of NVIDIA's kvpress scores them).

    Args:
        job: with text.
        length: number of positions, the query's own included.
    """
    text = job.needed_text("content_free")
    means = mean_projections(job.model, text)
    scores: dict[Head, float] = {}
    positions = torch.arange(length, device=job.device)[None]
    backbone: Any = job.model.base_model
    cos, sin = backbone.rotary_emb(torch.zeros((), device=job.device), positions)
    for i, layer in linear_layers(job.model).items():
        q = rotated(means[i, "q_proj"].view(1, layer.num_heads, layer.head_dim), cos[0, -1:], sin[0, -1:])
        k = rotated(
            means[i, "k_proj"].view(1, layer.num_key_value_heads, layer.head_dim).expand(length, -1, -1), cos[0], sin[0]
        )
        k = k.repeat_interleave(layer.num_key_value_groups, dim=1)
        weights = (torch.einsum("qhd,thd->ht", q, k) * layer.scaling).softmax(-1)
        far = weights[:, layer.sinks : max(length - layer.window, layer.sinks)].sum(-1)
        mass = far.view(layer.num_key_value_heads, -1).mean(-1)
        scores |= {(i, head): x for head, x in enumerate(mass.tolist())}
    return ranked(scores)


def mean_projections(model: nn.Module, text: Tensor) -> dict[tuple[int, str], Tensor]:
    """By layer and name, the mean of queries and of keys over the tokens of text (blocks, T), before rotary positions."""
    sums: dict[tuple[int, str], Tensor] = {}

    def add_to(key: tuple[int, str]) -> Callable[..., None]:
        def add(module: nn.Module, args: Any, output: Tensor) -> None:
            sums[key] = sums.get(key, 0) + output.float().flatten(0, -2).mean(0) / len(text)

        return add

    device = next(model.parameters()).device
    layers = linear_layers(model)
    handles = (
        getattr(layer, x).register_forward_hook(add_to((i, x))) for i, layer in layers.items() for x in ("q_proj", "k_proj")
    )
    with hooks(handles):
        for block in text:
            model(input_ids=block[None].to(device), use_cache=False, logits_to_keep=1)
    return sums


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, heads, d), its leading features turned by cos and sin (T, rotary size)."""
    cos, sin = cos[:, None], sin[:, None]
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    return torch.cat((turning * cos + torch.cat((-second, first), dim=-1) * sin, rest), dim=-1)


@torch.no_grad()
def induction(job: SelectionJob, *, length: int = 256, rows: int = 4) -> Ranking:
    """
    Heads by the attention that random tokens, once repeated, give to their first occurrence (echo) or to the token after it
    (induction), whichever is more, in the query head that gives the most (RazorAttention, arXiv 2407.15891).

    Args:
        job: the model and the seed of the tokens.
        length: number of tokens before the repetition.
        rows: number of sequences.
    """
    config: Any = job.model.config
    draws = torch.Generator().manual_seed(job.seed)
    ids = torch.randint(config.vocab_size, (rows, length), generator=draws).repeat(1, 2).to(job.device)
    sums: dict[Head, float] = {}

    def watch(i: int, q: Tensor, k: Tensor) -> None:
        heads = k.shape[2]
        q, k = q[:, length:].float().transpose(1, 2), k.float().transpose(1, 2)
        k = k.repeat_interleave(q.shape[1] // heads, dim=1)
        places = torch.arange(2 * length, device=q.device)
        logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        weights = logits.masked_fill(places > places[length:, None], -torch.inf).softmax(-1)
        echo, after = (weights.diagonal(offset, 2, 3).mean((0, 2)) for offset in (0, 1))
        best = torch.maximum(echo, after).view(heads, -1).amax(-1)
        for head, x in enumerate(best.tolist()):
            sums[i, head] = sums.get((i, head), 0.0) + x / rows

    with job.bar("induction", rows) as advance, head_gates(job.model, job.gates(1.0)), watched(job.model, watch):
        for row in ids:
            job.model(input_ids=row[None], use_cache=False, logits_to_keep=1)
            advance(1)
    return ranked(sums)


@contextmanager
def watched(model: nn.Module, watch: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `watch(layer, q, k)` whenever a linear layer attends, for the length of a `with` block."""

    def watching(i: int, layer: Any, attend: Callable[..., Any]) -> Callable[..., Any]:
        def watched_attend(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
            watch(i, q, k)
            return attend(q, k, v, *args, **kwargs)

        return watched_attend

    with wrapped_attention(model, watching):
        yield


def ranked(scores: dict[Head, float]) -> Ranking:
    """Heads by falling score, equal ones in the order of the model."""
    return Ranking(order=sorted(scores, key=lambda head: (-scores[head], head)), scores=scores)
