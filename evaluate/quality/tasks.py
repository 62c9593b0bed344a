"""What an evaluation measures on each model: perplexity, recall by length, agreement with the teacher, lm-eval's tasks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from dijiang.common.perplexity import refuse_stride, windows
from dijiang.common.result_cache import hash_of

from .agreement import agreement_scores, prompts
from .lm_eval_runner import HarnessTask, harness_scores, load_tasks, resolve_tasks
from .perplexity import perplexity_scores
from .recall import associative_samples, needle_samples, recall_scores
from .recall import chance as recall_chance

ASSOCIATIVE, NEEDLE = "associative recall", "needle"


@dataclass(frozen=True, kw_only=True)
class Task:
    """
    One row of an evaluation.

    Attributes:
        kind: "perplexity", "recall", "agreement" or "lm_eval"; name: what tells it from others of its kind.
        metric, better: of its value, and whether "lower" or "higher" values are better.
        floor: what is had for nothing: a number, or the key of the subject whose score it is.
        settings: all that scores depend on besides the model, as JSON.
        cost: units of work per subject, tokens read as near as is known.
        run: (model, the teacher's scores or None, advance) -> scores: `totals` and `weights` by unit, `detail`.
    """

    kind: str
    name: str
    metric: str
    better: Literal["lower", "higher"] = "higher"
    floor: float | str
    settings: dict
    cost: int
    run: Callable[..., dict] = field(repr=False)

    @property
    def key(self) -> str:
        return f"{self.kind}: {self.name}"


def hash_tokens(tokens: torch.Tensor) -> str:
    return hash_of(tokens.numpy().tobytes())


def perplexity_task(name: str, tokens: torch.Tensor, *, length: int, stride: int | None) -> Task:
    """Perplexity of a text (T,) in windows of `length` that begin every `stride` tokens, by default side by side."""
    stride = stride or length
    refuse_stride(length, stride)
    length = min(length, len(tokens))
    stride = min(stride, length)
    how = f"{length:,} tokens" if stride == length else f"{length:,} tokens, stride {stride:,}"
    return Task(
        kind="perplexity",
        name=f"{name}, {how}",
        metric="perplexity",
        better="lower",
        floor="no_attention",
        settings={"text": name, "tokens": len(tokens), "hash": hash_tokens(tokens), "length": length, "stride": stride},
        cost=sum(len(window) for window, _ in windows(tokens, length, stride)),
        run=lambda model, reference, advance: perplexity_scores(model, tokens, length=length, stride=stride, advance=advance),
    )


def recall_task(kind: str, tokenizer, filler: torch.Tensor, *, length: int, samples: int, seed: int) -> Task:
    """Recall of what stands somewhere in `length` tokens; `kind` is `ASSOCIATIVE` or `NEEDLE`, whose haystack is `filler`."""
    if kind == NEEDLE:
        made = needle_samples(tokenizer, filler, length=length, samples=samples, seed=seed)
    else:
        made = associative_samples(tokenizer, length=length, samples=samples, seed=seed)
    hashed = hash_of(*(sample.input_ids.numpy().tobytes() for sample in made))
    return Task(
        kind="recall",
        name=f"{kind}, {length:,} tokens",
        metric="accuracy",
        floor=recall_chance(made),
        settings={"kind": kind, "length": length, "samples": samples, "seed": seed, "hash": hashed},
        cost=sum(len(sample.input_ids) for sample in made),
        run=lambda model, reference, advance: recall_scores(model, made, advance=advance),
    )


def agreement_task(name: str, tokenizer, tokens: torch.Tensor, *, prompt_length: int, count: int, new_tokens: int) -> Task:
    """Share of the teacher's greedy continuations of pieces of a text (T,) that a model would write too."""
    rows = prompts(tokens, prompt_length=prompt_length, count=count)
    return Task(
        kind="agreement",
        name=f"{name}, {new_tokens} tokens after {prompt_length}",
        metric="agreement",
        floor="no_attention",
        settings={"hash": hash_tokens(rows), "prompts": count, "prompt_length": prompt_length, "new_tokens": new_tokens},
        cost=rows.numel() + count * new_tokens,
        run=lambda model, reference, advance: agreement_scores(
            model, rows, new_tokens=new_tokens, reference=reference, decode=tokenizer.decode, advance=advance
        ),
    )


def harness_tasks(names: Sequence[str], tokenizer, *, batch_size: int, **options) -> list[Task]:
    """Tasks of lm-eval, loaded with their data; `options` are those of `load_tasks`."""
    found, manager = resolve_tasks(names)
    return [harness_task(task, tokenizer, batch_size) for task in load_tasks(found, manager, tokenizer, **options)]


def harness_task(task: HarnessTask, tokenizer, batch_size: int) -> Task:
    def run(model, reference, advance) -> dict:
        found = harness_scores(model, tokenizer, task, batch_size=batch_size, advance=advance)
        return {key: found[key] for key in ("totals", "weights")} | {"detail": {"aggregated": found["aggregated"]}}

    return Task(
        kind="lm_eval",
        name=task.name,
        metric=task.metric,
        better=task.better,
        floor=task.chance if task.better == "higher" else "no_attention",
        settings=task.settings | {"batch_size": batch_size, "truncated": task.truncated},
        cost=task.tokens,
        run=run,
    )
