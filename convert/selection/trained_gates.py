"""
Trained gates: all start open, and a rising price closes those whose loss costs less than they do (DuoAttention, arXiv
2410.10819, whose constant price leaves gates of grouped heads open; so ours rises until the budget is met).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .gates import head_gates
from .job import SelectionJob, answer_positions, logits_before
from .pursuit import answer_losses, mean_loss
from .selection import Head, Ranking

OTHER_WEIGHT = 0.1  # of the tokens that are no answers
RISE = 1.05  # of the price, at each step that finds more open gates than the budget has


def trained_gates(
    job: SelectionJob, *, steps: int = 150, lr: float = 0.02, price: float = 0.05, swaps: bool = True
) -> Ranking:
    """
    Heads by their gates after `steps` of one sample each. The loss is KL(teacher, student) on answer tokens, 0.1 of it on
    the other tokens, and the price times the mean gate; the teacher is the model with all gates open.

    Args:
        job: with samples.
        steps: of AdamW without decay.
        lr: learning rate; gates are kept within [0, 1] after each step.
        price: of the mean gate, at the beginning.
        swaps: whether one pass tries to exchange every kept head for the best of the rest.
    """
    samples = job.needed_samples("gates")
    gates = job.gates(1.0).requires_grad_(True)
    optimizer = torch.optim.AdamW([gates], lr=lr, weight_decay=0.0)
    openness = torch.zeros_like(gates)  # gates end at 0 or 1, so their mean over the steps breaks ties
    log: list[dict[str, Any]] = []
    heads = job.candidates
    index = tuple(torch.tensor(axis, device=job.device) for axis in zip(*heads, strict=True))
    draws = torch.Generator().manual_seed(job.seed)
    with job.bar("gates", steps + swaps * (job.heads + 1) * len(samples)) as advance:
        for _ in range(steps):
            sample = samples[int(torch.randint(len(samples), (), generator=draws))]
            with torch.enable_grad():
                loss = distance_to_teacher(job, gates, sample.input_ids, answer_positions(sample))
                (loss + price * gates[index].mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                gates.clamp_(0.0, 1.0)
                openness += gates / steps
                mass = gates[index].sum().item()
            price *= RISE if mass > job.heads else 1.0
            log.append({"loss": loss.item(), "open": mass, "price": price})
            advance(1)
        score = gates.detach() + openness
        order = sorted(heads, key=lambda head: -score[head].item())
        if swaps:
            order = swap(job, order, advance)
    return Ranking(order=order, scores={head: score[head].item() for head in heads}, steps=log)


def distance_to_teacher(job: SelectionJob, gates: Tensor, input_ids: Tensor, positions: Tensor) -> Tensor:
    """KL(teacher, student) by `gates`: the mean of the answers at `positions` (n,) and a tenth of that of the other tokens."""
    everything = torch.arange(1, len(input_ids))
    with torch.no_grad(), head_gates(job.model, torch.ones_like(gates)):
        teacher = logits_before(job.model, input_ids, everything).log_softmax(-1)
    with head_gates(job.model, gates):
        student = logits_before(job.model, input_ids, everything).log_softmax(-1)
    distance = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    is_answer = torch.zeros_like(distance, dtype=torch.bool)
    is_answer[positions.to(distance.device) - 1] = True
    # a sample can be nothing but answers
    others = distance[~is_answer].mean() if not bool(is_answer.all()) else distance.new_zeros(())
    return distance[is_answer].mean() + OTHER_WEIGHT * others


@torch.no_grad()
def swap(job: SelectionJob, order: list[Head], advance: Any) -> list[Head]:
    """
    Exchange kept heads, the last first, each for the first head of the rest, where that lowers the answers' mean
    cross-entropy over the samples; a head that was tried goes to the end of the rest.
    """
    kept, rest = order[: job.heads], order[job.heads :]
    losses = answer_losses(job, job.samples)
    best = mean_loss(job, kept, losses, advance)
    for head in reversed(list(kept)):
        if not rest:
            break
        candidate = rest.pop(0)
        trial = [candidate if other == head else other for other in kept]
        loss = mean_loss(job, trial, losses, advance)
        if loss < best:
            best, kept = loss, trial
            rest.append(head)
        else:
            rest.append(candidate)
    return [*kept, *rest]
