"""Selections to compare with: by chance, by even spacing, and by the gradient at the teacher."""

import random
from functools import partial

from .attention_scores import ranked
from .job import SelectionJob, answer_loss, gate_gradient
from .selection import Ranking


def random_heads(job: SelectionJob) -> Ranking:
    """Heads in a random order, by the job's seed."""
    order = job.candidates
    random.Random(job.seed).shuffle(order)
    return Ranking(order=order, scores={head: -float(i) for i, head in enumerate(order)})


def uniform(job: SelectionJob) -> Ranking:
    """All heads of as many evenly spaced layers as the job's heads fill, then those of the other layers."""
    heads = job.candidates
    layers = sorted({layer for layer, _ in heads})
    count = min(max(-(-job.heads * len(layers) // len(heads)), 1), len(layers))
    chosen = {layers[(2 * i + 1) * len(layers) // (2 * count)] for i in range(count)}
    return ranked({(layer, head): float(layer in chosen) for layer, head in heads})


def teacher_gradient(job: SelectionJob) -> Ranking:
    """
    Heads by |dL/da| at a = 1, L the mean cross-entropy of the samples' answers: what each gate matters to the teacher
    (Michel et al., arXiv 1905.10650).
    """
    samples = job.needed_samples("teacher_gradient")
    losses = [partial(answer_loss, job.model, sample) for sample in samples]
    with job.bar("teacher_gradient", len(losses)) as advance:
        gradient, loss, share = gate_gradient(job.model, job.gates(1.0), losses, advance)
    found = ranked({head: abs(gradient[head].item()) for head in job.candidates})
    return Ranking(order=found.order, scores=found.scores, steps=[{"loss_before": loss, "recall_before": share}])
