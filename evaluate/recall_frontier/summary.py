"""What a row of the frontier says of its configuration: values, shares of the teacher's recall, ratios of perplexity."""

from collections.abc import Iterable, Sequence

import numpy as np

from ..quality.bootstrap import interval, resampled_means
from ..quality.task_base import Task

TEACHER_NAME = "teacher"


def summary_row(tasks: Sequence[Task], cells: dict[str, dict[str, dict]], name: str, seed: int) -> dict:
    """
    The values of one configuration.

    Args:
        tasks: all tasks.
        cells: scores by name of the configuration and key of the task, the teacher's among them.
        name: of the configuration.
        seed: of the bootstrap.

    Returns:
        `values`, by key of the task; `recall_share`, the mean share of the teacher's recall, by kind (the mean over lengths)
        and of `all` kinds; `perplexity_ratio` to the teacher, by length (the geometric mean over texts). Each is an interval,
        or None. Recall counts only where the teacher itself is better than chance with confidence.
    """
    values, shares, losses = {}, {}, {}
    for i, task in enumerate(tasks):
        # samples of two tasks have nothing in common, so they are resampled independently
        means = resampled_means({key: cells[key][task.key] for key in {TEACHER_NAME: None, name: None}}, seed=seed + i)
        mine, teacher = means[name], means[TEACHER_NAME]
        values[task.key] = interval(task.value_of(mine))
        if task.kind == "perplexity":
            losses.setdefault(str(task.settings["length"]), []).append(mine - teacher)
        elif better_than(teacher, task.floor):
            with np.errstate(divide="ignore", invalid="ignore"):
                shares.setdefault(task.settings["kind"], []).append(mine / teacher)
    by_kind = {kind: mean_of(parts) for kind, parts in shares.items()}
    of_all = {"all": mean_of(by_kind.values()), **by_kind} if by_kind else {}
    return {
        "values": values,
        "recall_share": {kind: interval(share) for kind, share in of_all.items()},
        "perplexity_ratio": {length: interval(np.exp(mean_of(parts))) for length, parts in losses.items()},
    }


def better_than(means: np.ndarray, chance: float) -> bool:
    """Whether a mean exceeds the chance level, with confidence if there are enough units for an interval."""
    lead = interval(means - chance)
    return lead is not None and (lead["value"] if lead["low"] is None else lead["low"]) > 0


def mean_of(parts: Iterable[np.ndarray]) -> np.ndarray:
    """The mean of statistics and their resamples; without resamples if one of them has none."""
    parts = list(parts)
    fewest = min(map(len, parts))
    return np.mean([part[:fewest] for part in parts], axis=0)
