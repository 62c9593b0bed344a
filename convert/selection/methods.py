"""The selection methods by name, and the function that runs one."""

import time
from collections.abc import Callable
from typing import Any

import torch

from .attention_scores import content_free, induction
from .controls import random_heads, teacher_gradient, uniform
from .gates import count_heads
from .job import SelectionJob, frozen
from .pursuit import greedy, layers, perplexity
from .selection import Ranking, Selection
from .trained_gates import trained_gates

METHODS: dict[str, Callable[..., Ranking]] = {
    "greedy": greedy,
    "gates": trained_gates,
    "teacher_gradient": teacher_gradient,
    "content_free": content_free,
    "induction": induction,
    "random": random_heads,
    "perplexity": perplexity,
    "uniform": uniform,
    "layers": layers,
}


def select_heads(job: SelectionJob, method: str = "greedy", **options: Any) -> Selection:
    """
    Choose which key/value heads keep every token.

    Args:
        job: the model and what heads are chosen by.
        method: name in `METHODS`.
        options: keyword arguments of the method.

    Raises:
        ValueError: on an unknown method, no heads to choose, or samples or text that are missing.
    """
    if method not in METHODS:
        raise ValueError(f"no selection method is called {method}; choose from {', '.join(METHODS)}")
    total = len(job.candidates)
    if not 1 <= job.heads <= total:
        raise ValueError(f"heads={job.heads}, and the model's linear layers have {total} key/value heads; choose 1 to {total}")
    started = time.perf_counter()
    with frozen(job.model), torch.enable_grad():
        ranking = METHODS[method](job, **options)
    assert sorted(ranking.order) == job.candidates
    count, heads = count_heads(job.model)
    return Selection(
        method=method,
        order=ranking.order,
        scores=[[ranking.scores.get((layer, head)) for head in range(heads)] for layer in range(count)],
        steps=ranking.steps,
        seconds=time.perf_counter() - started,
        settings={"heads": job.heads, "seed": job.seed, "samples": len(job.samples), **options},
    )
