"""Fits the exact memory of a model that keeps its weights: scores from a pass of its teacher, then slots for each head."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dijiang.common.hooks import hooks
from dijiang.common.progress import progress_bar
from dijiang.modeling import DiJiangForCausalLM
from dijiang.modeling.decoder_modules import Projections
from dijiang.modeling.linear_attention_layer import DiJiangLinearAttention, linear_layers

from ..exact_masks import seen_keys
from ..memories import with_memories
from .labels import FEWEST_QUERIES, removal_labels, sampled_queries
from .layer_weights import layer_weights
from .score_fit import fit_scores
from .slots import Head, spread_slots

# numbers of slots at which the error of every head is measured
SIZES = (32, 64, 128, 256, 512)
FISHER_TOKENS = 640
EVERY = 8  # of how many queries of a row one is looked at
# every fourth query of a short sequence gives labels, every eighth of a long one
LONG = 2048


class Row(Protocol):
    """A sequence to fit on, such as `dijiang.common.recall.RecallSample`, or plain text without answers."""

    @property
    def input_ids(self) -> Tensor:
        """(T,) int64."""

    @property
    def answers(self) -> list[tuple[int, int]]:
        """(start, end) of each answer in input_ids; none in plain text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FitSettings:
    """
    How the memory is fitted.

    Attributes:
        slots: of the exact memory, the mean over key/value heads that do not keep every token.
        spread: give slots to heads by what they gain, at the same total; else all get `slots`.
        least_slots: that a head gets at least.
        large_heads: (layer, head) of heads that get `large_slots` instead, such as heads that find what was read long ago.
        large_slots: of these heads.
        recall_share: of the tokens of a step that come from rows with answers.
        steps: of the scores' fit.
        width: of the scores' networks.
        seed: of the fit.
    """

    slots: int = 128
    spread: bool = True
    least_slots: int = 32
    large_heads: tuple[Head, ...] = ()
    large_slots: int = 4096
    recall_share: float = 0.5
    steps: int = 300
    width: int = 32
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedScores:
    """
    A model whose linear heads have learned scores, and what slots are spread by.

    Attributes:
        model: it shares the weights of the model that was fitted.
        curves: by head, its error with each number of slots in `SIZES`; empty if slots are not to be spread.
        facts: tokens, seconds, errors and layer weights, as JSON.
    """

    model: DiJiangForCausalLM
    curves: dict[Head, list[float]] = field(repr=False)
    facts: dict[str, Any] = field(repr=False)

    def with_slots(self, settings: FitSettings, full_heads: list[list[int]] | None = None) -> DiJiangForCausalLM:
        """
        The model with the slots that `settings` ask for.

        Args:
            settings: of which `slots`, `spread`, `least_slots`, `large_heads` and `large_slots` count.
            full_heads: heads that keep every token; default those of the model.

        Raises:
            ValueError: if the slots cannot be spread.
        """
        config = self.model.config
        full_heads = config.full_heads if full_heads is None else full_heads
        heads = [
            (layer, head)
            for layer in linear_layers(self.model)
            for head in range(config.num_key_value_heads)
            if head not in full_heads[layer]
        ]
        free = [head for head in heads if head not in settings.large_heads]
        slots = dict.fromkeys(heads, settings.large_slots) | dict.fromkeys(free, settings.slots)
        if settings.spread and free:
            curves = {head: self.curves[head] for head in free}
            slots |= spread_slots(curves, SIZES, settings.slots * len(free), least=settings.least_slots)
        by_layer = [
            [slots.get((layer, head), 0) for head in range(config.num_key_value_heads)]
            for layer in range(config.num_hidden_layers)
        ]
        return with_memories(self.model, full_heads=full_heads, attention_memory=by_layer)


def fit_memory(
    student: DiJiangForCausalLM,
    teacher: DiJiangForCausalLM,
    rows: Sequence[Row],
    settings: FitSettings | None = None,
    *,
    progress: bool = True,
) -> FittedScores:
    """
    Fit the scores of an exact memory in the linear heads of `student` to the attention of `teacher`.

    Args:
        student: DiJiang model with a window; scores that it has already are replaced.
        teacher: softmax model in our decoder, whose weights it shares or once had.
        rows: of text and of recall samples, of at least three windows each.
        settings: default `FitSettings()`.
        progress: show a bar on stderr.

    Raises:
        ValueError: if there is no window, or no row is long enough for it.
    """
    settings = settings or FitSettings()
    started = time.perf_counter()
    window, sinks = student.config.attention_window, student.config.attention_sinks
    if not window:
        raise ValueError("an exact memory needs a window; convert with attention_window of at least 1")
    if not linear_layers(student):
        raise ValueError("no head is left to hold a memory; keep fewer heads, or convert with linear layers")
    rows = [row for row in rows if len(row.input_ids) >= 3 * window]
    if not rows:
        raise ValueError(f"no text of {3 * window} tokens or more, three windows; give a longer text")
    memory = {"attention_memory": 1, "memory_score": "learned", "memory_score_dim": settings.width}
    model: Any = with_memories(student, **memory)
    model.to(next(student.parameters()).device)
    layers = linear_layers(model)
    by_length = sorted(rows, key=lambda row: (-len(row.input_ids), bool(row.answers)))
    measured = [by_length[0], *[row for row in by_length[1:] if row.answers][:1]] if settings.spread else []
    tokens = sum(len(row.input_ids) for row in rows)
    work = tokens + settings.steps + sum(len(row.input_ids) for row in measured)
    with progress_bar("Fitting the memory", work, shown=progress) as advance:
        inputs = LabeledTokens(model, sinks=sinks)
        for row in rows:
            inputs.read(teacher, row)
            advance(len(row.input_ids))
        set_scores(layers, inputs, settings)
        del inputs
        advance(settings.steps)
        facts: dict[str, Any] = {"tokens": tokens, "seconds": {"scores": time.perf_counter() - started}}
        curves: dict[Head, list[float]] = {}
        if settings.spread:
            facts["layer_weights"] = layer_weights(teacher, by_length[0].input_ids[:FISHER_TOKENS])
            curves = error_curves(model, teacher, measured, facts["layer_weights"], advance)
            facts["errors"] = [[layer, head, errors] for (layer, head), errors in curves.items()]
    facts["seconds"]["all"] = time.perf_counter() - started
    return FittedScores(model=model, curves=curves, facts=facts)


class LabeledTokens:
    """
    Keys, values and labels of tokens, by layer.

    Args:
        model: whose linear heads are labeled.
        sinks: S, first tokens of each row that are left out.
    """

    def __init__(self, model: DiJiangForCausalLM, *, sinks: int):
        self.layers = linear_layers(model)
        self.sinks = sinks
        self.inputs: dict[int, list[Tensor]] = {i: [] for i in self.layers}
        self.labels: dict[int, list[Tensor]] = {i: [] for i in self.layers}
        self.of_recall: list[Tensor] = []

    def read(self, teacher: DiJiangForCausalLM, row: Row) -> None:
        """Label the tokens of a row by a pass of the teacher."""
        T = len(row.input_ids)
        any_layer = next(iter(self.layers.values()))
        queries = sampled_queries(T, row.answers, window=any_layer.window, every=4 if T <= LONG else 8)
        counts: list[Tensor] = []

        def label(i: int, module: Any, projected: Projections) -> None:
            layer = self.layers[i]
            labels, count = removal_labels(
                projected, module.o_proj.weight, queries, window=layer.window, sinks=self.sinks, scaling=layer.scaling
            )
            usable = (count >= FEWEST_QUERIES).nonzero().squeeze(-1)
            keys = torch.cat((projected.raw_k[0], projected.v[0]), dim=-1)[:, layer.linear_heads].transpose(0, 1)
            self.inputs[i].append(keys[:, usable])
            self.labels[i].append(labels[layer.linear_heads][:, usable])
            counts.append(usable)

        with hooks(projection_hooks(teacher, self.layers, label)), torch.no_grad():
            teacher.model(input_ids=row.input_ids[None].to(next(teacher.parameters()).device), use_cache=False)
        self.of_recall.append(torch.full((len(counts[0]),), bool(row.answers)))

    def draw_share(self, recall_share: float) -> Tensor:
        """By which tokens (T,) are drawn so that this share of them comes from rows with answers."""
        recall = torch.cat(self.of_recall)
        if recall.all() or not recall.any():
            return torch.ones(len(recall))
        return torch.where(recall, recall_share / recall.sum(), (1 - recall_share) / (~recall).sum())


def projection_hooks(
    teacher: DiJiangForCausalLM, layers: dict[int, Any], use: Callable[[int, Any, Projections], None]
) -> Iterator[RemovableHandle]:
    """Hooks that call `use(i, attention, projections)` as a pass of the teacher reaches each of `layers`."""
    for i in layers:

        def project(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], i: int = i) -> None:
            attention: Any = module
            use(i, attention, attention.project(args[0], kwargs["position_embeddings"]))

        yield teacher.model.layers[i].self_attn.register_forward_pre_hook(project, with_kwargs=True)


def set_scores(layers: dict[int, DiJiangLinearAttention], inputs: LabeledTokens, settings: FitSettings) -> None:
    """Fit the scores of all layers and write them into their modules."""
    x = torch.cat([torch.cat(parts, dim=1) for parts in inputs.inputs.values()])
    y = torch.cat([torch.cat(parts, dim=1) for parts in inputs.labels.values()])
    share = inputs.draw_share(settings.recall_share)
    weights = fit_scores(x, y, share, width=settings.width, steps=settings.steps, seed=settings.seed)
    first = 0
    for layer in layers.values():
        rows = slice(first, first + len(layer.linear_heads))
        for name in ("W_1", "b_1", "w_2"):
            parameter = layer.memory_score.get_parameter(name)  # type: ignore[union-attr]
            parameter.data.copy_(getattr(weights, name)[rows])
        first = rows.stop


@torch.no_grad()
def error_curves(
    model: DiJiangForCausalLM,
    teacher: DiJiangForCausalLM,
    rows: Sequence[Row],
    weights: Sequence[float],
    advance: Callable[[int], None],
) -> dict[Head, list[float]]:
    """
    The error of each linear head with as many slots as `SIZES` says: the mean square of what the layer's output is off by, the
    other heads left alone, over that of the output, times the layer's weight; summed over rows. Linear branches are silent.
    """
    layers = linear_layers(model)
    curves = {(i, head): [0.0] * len(SIZES) for i, layer in layers.items() for head in layer.linear_heads}

    def measure(i: int, module: Any, projected: Projections) -> None:
        layer = layers[i]
        squares = lost_by_slots(layer, projected, module.o_proj.weight, queries, SIZES)
        for j, head in enumerate(layer.linear_heads):
            for n in range(len(SIZES)):
                curves[i, head][n] += weights[i] * squares[n, j].item()

    for row in rows:
        T = len(row.input_ids)
        queries = torch.arange(model.config.attention_window, T, EVERY)
        with hooks(projection_hooks(teacher, layers, measure)):
            teacher.model(input_ids=row.input_ids[None].to(next(teacher.parameters()).device), use_cache=False)
        advance(T)
    return curves


def lost_by_slots(
    layer: DiJiangLinearAttention, projected: Projections, o_proj: Tensor, queries: Tensor, sizes: Sequence[int]
) -> Tensor:
    """
    What each head of a layer is off by, with as many slots as `sizes` says, its linear branch silent.

    Args:
        layer: with a learned score.
        projected: of all of its heads, of one sequence.
        o_proj: (hidden, H * d), the weight of the output projection.
        queries: (n,), positions that are looked at.
        sizes: numbers of slots.

    Returns:
        (sizes, linear heads), the mean square of the difference to exact attention, after the output projection, over the mean
        square of the whole layer's exact output.
    """
    q, k, v = (x[0].float() for x in projected[:3])
    (T, G), R = k.shape[:2], layer.num_key_value_groups
    queries = queries.to(q.device)
    before = layer.slots
    seen = []
    try:
        _, own_k, own_v, own_raw_k = (layer.take_linear_heads(x) for x in projected)
        for size in sizes:
            layer.slots = (size,) * len(layer.linear_heads)
            seen.append(seen_keys(layer, own_k, own_v, own_raw_k, queries)[0])
    finally:
        layer.slots = before
    future = torch.arange(T, device=q.device) > queries[:, None]
    parts = o_proj.float().unflatten(1, (G, -1)).transpose(0, 1)  # (G, hidden, R * d)
    errors = q.new_zeros(len(sizes), len(layer.linear_heads))
    output = q.new_zeros(len(queries), parts.shape[1])
    for g in range(G):
        scores = torch.einsum("nrd,td->rnt", q[queries, g * R : (g + 1) * R] * layer.scaling, k[:, g])

        def attended(hidden: Tensor, scores: Tensor = scores, g: int = g) -> Tensor:
            mixed = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, g]
            return mixed.transpose(0, 1).flatten(1) @ parts[g].T

        exact = attended(future)
        output += exact
        if g not in layer.linear_heads:
            continue
        own = layer.linear_heads.index(g)
        for n in range(len(sizes)):
            errors[n, own] = (attended(~seen[n][min(own, len(seen[n]) - 1)]) - exact).square().sum(-1).mean()
    return errors / output.square().sum(-1).mean()
