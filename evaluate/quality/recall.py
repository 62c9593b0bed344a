"""Recall by length: finding again what was read, in contexts whose answers can be known from the text before them."""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

import torch

from dijiang.common.recall import RecallSample

from .recall_kinds import RECALL_KINDS, DoesNotFit, generator_of
from .task_base import Task, TaskInputs, hash_tokens

DEPTHS = 5  # buckets of depth in which answers are counted
# of a batch of samples. On a CPU four samples of 128 tokens take a fifth less time together where layers are linear; softmax
# layers and longer samples gain nothing
BATCH_TOKENS = 512


def recall_tasks(inputs: TaskInputs) -> list[Task]:
    """
    Each kind of recall at each length, those left out that do not fit a length or for which the tokenizer has too few words.

    Raises:
        ValueError: if the text is too short, or nothing fits.
    """
    config = inputs.config
    _, haystack = inputs.first_text
    tasks = []
    reasons: dict[str, str] = {}
    for kind in (config.recall_kinds or RECALL_KINDS) if config.recall_lengths else ():
        before = len(tasks)
        not_fitting = {}
        for length in config.recall_lengths:
            size = {"length": length, "samples": config.recall_samples, "seed": config.seed}
            try:
                tasks.append(recall_task(kind, generator_of(kind)(inputs.tokenizer, haystack, **size), size))
            except DoesNotFit as error:
                not_fitting[f"{kind}, {length:,} tokens"] = str(error)
        if len(tasks) == before:
            not_fitting = {kind: next(iter(not_fitting.values()))}
        reasons |= not_fitting
    if reasons and not tasks:
        raise ValueError(next(iter(reasons.values())))
    inputs.left_out.update(reasons)
    return tasks


def recall_task(kind: str, samples: list[RecallSample], size: dict[str, int]) -> Task:
    """The task of one kind and length; `size` are the arguments that the samples were made with."""
    return Task(
        kind="recall",
        name=f"{kind}, {size['length']:,} tokens",
        metric="accuracy",
        floor=chance(samples),
        settings={"kind": kind, **size, "hash": hash_tokens(*(sample.input_ids for sample in samples))},
        cost=sum(len(sample.input_ids) for sample in samples),
        run=lambda model, reference, advance: recall_scores(model, samples, advance=advance),
    )


@torch.no_grad()
def recall_scores(model, samples: list[RecallSample], *, advance: Callable[[int], None] = lambda done: None) -> dict:
    """
    Count the answers that `model` gives: an answer counts if each of its tokens is the likeliest one after the text before it,
    which greedy decoding would write.

    Args:
        model: a causal language model that takes `logits_to_keep`; only logits of answers are computed.
        samples: the contexts.
        advance: called with the number of tokens read since the last call.

    Returns:
        `totals`: right answers, by sample; `weights`: answers; `detail`: `by_depth`, right answers (`totals`) and answers
        (`weights`) in buckets of depth up to `edges`.
    """
    by_depth = {"edges": [(i + 1) / DEPTHS for i in range(DEPTHS)], "totals": [0.0] * DEPTHS, "weights": [0.0] * DEPTHS}
    totals, weights = [], []
    for batch in batches(samples):
        for sample, answered in zip(batch, right_answers(model, batch), strict=True):
            for depth, correct in zip(sample.depths, answered, strict=True):
                bucket = min(int(depth * DEPTHS), DEPTHS - 1)
                by_depth["totals"][bucket] += correct
                by_depth["weights"][bucket] += 1.0
            totals.append(float(sum(answered)))
            weights.append(float(len(answered)))
        advance(sum(len(sample.input_ids) for sample in batch))
    return {"totals": totals, "weights": weights, "detail": {"by_depth": by_depth}}


def batches(samples: Iterable[RecallSample]) -> Iterator[list[RecallSample]]:
    """The samples in their order, in batches of one length and at most `BATCH_TOKENS` tokens, or of one sample."""
    for length, group in groupby(samples, key=lambda sample: len(sample.input_ids)):
        of_length = list(group)
        rows = max(BATCH_TOKENS // length, 1)
        yield from (of_length[i : i + rows] for i in range(0, len(of_length), rows))


def right_answers(model, batch: list[RecallSample]) -> list[list[bool]]:
    """Whether `model` gives each answer of each sample of one length, from one forward pass over all of them."""
    device = next(model.parameters()).device
    # the positions of one sample's answers are mostly those of the others', so the union has few that are not needed
    positions = torch.unique(torch.cat([torch.arange(*answer) for sample in batch for answer in sample.answers]))
    ids = torch.stack([sample.input_ids for sample in batch])
    logits = model(input_ids=ids.to(device), use_cache=False, logits_to_keep=(positions - 1).to(device)).logits
    right = torch.zeros(ids.shape, dtype=torch.bool)
    right[:, positions] = logits.argmax(-1).cpu() == ids[:, positions]
    return [[bool(row[start:end].all()) for start, end in sample.answers] for row, sample in zip(right, batch, strict=True)]


def chance(samples: list[RecallSample]) -> float:
    """Share of the answers that guesses would get right: the chance level."""
    weights = [len(sample.answers) for sample in samples]
    return sum(n * sample.chance for n, sample in zip(weights, samples, strict=True)) / sum(weights)
