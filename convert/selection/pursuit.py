"""
Greedy pursuit: keep what lowers the loss fastest as its gate opens, look again, repeat. The score of a head is
-dL/da at a = 0 (Michel et al., arXiv 1905.10650, take its size at a = 1); looking again sees the heads' joint effects.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .gates import head_gates
from .job import (
    Sample,
    SelectionJob,
    answer_loss,
    gate_gradient,
    recall,
    text_loss,
)
from .selection import Head, Ranking

PER_STEP = 8
CARRY = 0.5
Loss = Callable[[], tuple[Tensor, list[bool]]]


def greedy(job: SelectionJob, *, per_step: int = PER_STEP, carry: float = CARRY) -> Ranking:
    """
    Heads by greedy pursuit of the cross-entropy of answers, the mean of the samples' means.

    Args:
        job: with samples.
        per_step: samples that each step looks at: the next ones, around the list.
        carry: weight of the score of the step before, which saw other samples.

    Raises:
        ValueError: if the job has no samples.
    """
    losses = answer_losses(job, job.needed_samples("greedy"))
    return pursue(job, "greedy", [[head] for head in job.candidates], losses, per_step=per_step, carry=carry)


def answer_losses(job: SelectionJob, samples: Sequence[Sample]) -> list[Loss]:
    """The cross-entropy of each sample's answers."""
    return [partial(answer_loss, job.model, sample) for sample in samples]


def layers(job: SelectionJob, *, per_step: int = PER_STEP, carry: float = CARRY) -> Ranking:
    """Whole layers by greedy pursuit, each scored by the sum of its heads; arguments as for `greedy`."""
    losses = answer_losses(job, job.needed_samples("layers"))
    by_layer: dict[int, list[Head]] = {}
    for layer, head in job.candidates:
        by_layer.setdefault(layer, []).append((layer, head))
    return pursue(job, "layers", list(by_layer.values()), losses, per_step=per_step, carry=carry)


def perplexity(job: SelectionJob, *, per_step: int | None = None, carry: float = 0.0) -> Ranking:
    """
    Heads by greedy pursuit of the cross-entropy of plain text.

    Args:
        job: with text.
        per_step: blocks that each step looks at. Default: all.
        carry: weight of the score of the step before.
    """
    text = job.needed_text("perplexity")
    losses = [partial(text_loss, job.model, block) for block in text]
    return pursue(job, "perplexity", [[x] for x in job.candidates], losses, per_step=per_step or len(text), carry=carry)


def pursue(
    job: SelectionJob,
    method: str,
    groups: Sequence[list[Head]],
    losses: Sequence[Loss],
    *,
    per_step: int,
    carry: float,
) -> Ranking:
    """
    Keep one group of heads after another until `job.heads` are kept; the rest follow by their last score.

    Args:
        job: the model, and the samples held aside for the steps' recall.
        method: name that the bar shows.
        groups: heads that are kept together.
        losses: functions that give a loss, and which answers were right.
        per_step: losses that a step looks at: the next ones, around the list.
        carry: weight of the score of the step before.
    """
    left = list(groups)
    kept: list[list[Head]] = []
    scores: dict[Head, float] = {}
    steps: list[dict[str, Any]] = []
    before = job.gates()
    rounds = min(-(-job.heads // max(map(len, groups))), len(left))
    per_step = min(per_step, len(losses))
    with job.bar(method, rounds * (per_step + len(job.held_aside))) as advance:
        for step in range(rounds):
            batch = [losses[(step * per_step + i) % len(losses)] for i in range(per_step)]
            gradient, loss, share = gate_gradient(job.model, job.gates(kept=flat(kept)), batch, advance)
            score = before * carry - gradient
            before = -gradient
            left.sort(key=lambda group: -sum(score[head].item() for head in group))
            scores |= {head: score[head].item() for head in flat(left)}
            kept.append(sorted(left.pop(0), key=lambda head: -scores[head]))
            steps.append({"heads": [list(head) for head in flat(kept)], "loss_before": loss, "recall_before": share})
            if job.held_aside:
                steps[-1]["recall"] = recall(job.model, job.gates(kept=flat(kept)), job.held_aside)
                advance(len(job.held_aside))
    return Ranking(order=[*flat(kept), *flat(left)], scores=scores, steps=steps)


def flat(groups: Sequence[list[Head]]) -> list[Head]:
    """The heads of all groups."""
    return [head for group in groups for head in group]


@torch.no_grad()
def mean_loss(job: SelectionJob, kept: list[Head], losses: Sequence[Loss], advance: Callable[[int], None]) -> float:
    """The mean of the losses with these heads kept."""
    total = 0.0
    with head_gates(job.model, job.gates(kept=kept)):
        for loss_of in losses:
            total += loss_of()[0].item() / len(losses)
            advance(1)
    return total
