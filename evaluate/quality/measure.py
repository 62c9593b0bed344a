"""Scores of every variant and attention maps, each kept in a cache as soon as it is measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from dijiang.checkpoint.provenance import versions
from dijiang.common.progress import progress_bar
from dijiang.common.result_cache import ResultCache, code_fingerprint
from dijiang.common.text import tokenizer_fingerprint

from .attention_maps import measure_maps
from .task_base import Task
from .variants import Comparison, Variant, zero_share

# scores and maps pass through these packages, so they are measured again when one of them changes
MEASURING_CODE = (
    "dijiang.evaluate.quality",
    "dijiang.evaluate.feature_map_study.inputs",
    "dijiang.modeling",
    "dijiang.convert",
    "dijiang.checkpoint",
    "dijiang.common",
)
MAP_COST = 20  # forward passes that take as long as the arithmetic of the maps


@dataclass(kw_only=True)
class Measurement:
    """
    What was measured now or came from the cache.

    Attributes:
        scores: by key of the task and of the variant; each has the model's sparsity in `zeros`.
        maps: what `measure_maps` returns; None if maps were left out.
        reused: number of results that came from the cache.
    """

    scores: dict[str, dict[str, dict]]
    maps: dict | None = None
    reused: int = 0


def measure(
    tasks: Sequence[Task], map_rows: torch.Tensor | None, comparison: Comparison, cache: ResultCache, *, progress: bool
) -> Measurement:
    """
    Measure every task on every variant, and attention maps.

    Args:
        tasks: rows of the evaluation.
        map_rows: token ids (1, T) for the maps; None to leave them out.
        comparison: the models.
        cache: results come from it if they were measured before, and are put into it one by one.
        progress: show a bar on stderr.
    """
    environment = environment_of(comparison.dtype, comparison.device, comparison.tokenizer)
    result = Measurement(scores={task.key: {} for task in tasks})
    todo: list[tuple[Variant, Task, dict]] = []
    for variant in comparison.variants():
        for task in tasks if variant.left_out is None else ():
            facts = score_facts(task, variant, comparison) | environment
            if (scores := cache.get(facts)) is None:
                todo.append((variant, task, facts))
            else:
                result.scores[task.key][variant.key] = scores
                result.reused += 1
    total = sum(task.cost for _, task, _ in todo)
    map_cost = 0
    if map_rows is not None:
        models = {key: comparison.identity[key] for key in ("teacher", "student")}
        map_facts = {"kind": "maps", "rows": map_rows.tolist(), "models": models, **environment}
        result.maps = cache.get(map_facts)
        result.reused += result.maps is not None
        map_cost = MAP_COST * map_rows.numel() if result.maps is None else 0

    with progress_bar("evaluating", total + map_cost, shown=progress) as advance:
        measure_scores(todo, comparison, cache, result.scores, advance)
        if map_cost:
            advance(0, "attention maps")
            layer_cost = map_cost / comparison.student.config.num_hidden_layers
            with comparison.loaded("teacher") as teacher, comparison.loaded("student") as student:
                rows = map_rows.to(comparison.device)
                result.maps = measure_maps(teacher, student, rows, advance=lambda layers: advance(layers * layer_cost))
            cache.put(map_facts, result.maps)
    return result


def measure_scores(
    todo: list[tuple[Variant, Task, dict]], comparison: Comparison, cache: ResultCache, scores: dict, advance: Callable
) -> None:
    """Put the scores of each task and variant in `todo` into `scores` and, under the facts given there, into the cache."""
    for model_name, work in groupby(todo, key=lambda item: item[0].model):
        advance(0, f"loading {model_name}")
        with comparison.loaded(model_name) as model:
            zeros = zero_share(model)
            for variant, task, facts in work:
                advance(0, f"{variant.key}: {task.name}")
                of_task = scores[task.key]
                reference = of_task.get("teacher") if task.asks_teacher else None
                with variant.ablation(model):
                    of_task[variant.key] = task.run(model, reference, advance) | {"zeros": zeros}
                cache.put(facts, of_task[variant.key])
            del model  # frees it before the next one is loaded


def score_facts(task: Task, variant: Variant, comparison: Comparison) -> dict:
    """All that the scores of a task on a variant depend on besides the environment: their key in the cache."""
    # a model that is measured as it is scores the same in any role, except the teacher in tasks that ask it for the answers
    as_it_is = variant.key in comparison.sources and not (task.asks_teacher and variant.key == "teacher")
    facts = {"kind": task.kind, "settings": task.settings, "variant": "as it is" if as_it_is else variant.key}
    facts["model"] = comparison.identity[variant.model]
    if task.asks_teacher:
        facts["teacher"] = comparison.identity["teacher"]
    return facts


def environment_of(dtype: torch.dtype, device: str, tokenizer) -> dict:
    """Code, versions, dtype, device and tokenizer, which all results depend on."""
    return {
        "code": code_fingerprint(*MEASURING_CODE),
        "versions": versions(),
        "dtype": str(dtype),
        "device": device,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "special_tokens": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
    }
