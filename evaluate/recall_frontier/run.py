"""
The frontier benchmark: recall and perplexity of many students of one teacher against the memory of one sequence. Every score
is kept in a cache as it is measured, so an interrupted run continues.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

import torch

from dijiang.checkpoint.provenance import versions
from dijiang.common.device import dtype_name, dtype_named
from dijiang.common.machine import machine, own_command
from dijiang.common.outputs import refuse_taken_file, write_text_whole, write_whole
from dijiang.common.result_cache import ResultCache, cache_folder

from ..quality.ablations import window_only
from ..quality.bootstrap import LEVEL, RESAMPLES
from ..quality.config import EvaluationConfig
from ..quality.measure import environment_of
from ..quality.memory_use import config_of, memory_use
from ..quality.perplexity import perplexity_tasks
from ..quality.recall import recall_tasks
from ..quality.run import read_texts
from ..quality.task_base import Task, TaskInputs
from ..report.style import refuse_missing_packages
from .config import FrontierConfig
from .configurations import Configuration, configurations
from .progress import FrontierProgress
from .report import draw_frontier
from .summary import summary_row

Build = Callable[[Configuration], torch.nn.Module]
ABLATIONS = {None: nullcontext, "window_only": window_only}
TEACHER = Configuration(name="teacher")


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """
    The softmax model that all students come from, in memory.

    Attributes:
        model: in our decoder, as `load_source` returns it.
        tokenizer: its tokenizer.
        name: for readers.
        identity: all that the scores depend on besides configurations, settings and code, as JSON: hashes of the teacher's
            weights, and of the rankings and fitted scores that the students are built with.
    """

    model: torch.nn.Module
    tokenizer: object
    name: str
    identity: dict


def run_frontier(
    teacher: Teacher,
    build: Build,
    config: FrontierConfig,
    *,
    only: Sequence[Configuration] | None = None,
    output: Path | None = None,
    plot: Path | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> dict:
    """
    Measure teacher and students.

    Args:
        teacher: the reference. It is measured first, before any student is built.
        build: makes a configuration's student, in eval mode and on the teacher's device, its config telling what it remembers.
            It is called once for configurations that differ in their ablation only, and not at all where the cache has
            everything.
        config: what to measure.
        only: the configurations to measure; default `configurations(config)`.
        output: new JSON file for the result.
        plot: new PNG file for its plot.
        cache: folder where scores are kept as they come; default `~/.cache/dijiang/recall-frontier`.
        progress: show a bar with the time left on stderr.

    Returns:
        The content of `output`.

    Raises:
        ValueError: if a file exists already, or texts and lengths do not allow it; nothing has been measured then.
    """
    started = time.perf_counter()
    for path in filter(None, (output, plot)):
        refuse_taken_file(path)
    if plot:
        refuse_missing_packages("matplotlib")
    chosen = list(configurations(config) if only is None else only)
    inputs = task_inputs(teacher, config)
    tasks = list({task.key: task for task in (*perplexity_tasks(inputs), *recall_tasks(inputs))}.values())
    store = ResultCache(cache or cache_folder("recall-frontier"))
    cells, reused = measure_cells(teacher, build, [TEACHER, *chosen], tasks, config, store, progress=progress)
    rows = [
        {**asdict(item), "memory": cells[item.name].pop("memory"), **summary_row(tasks, cells, item.name, config.seed)}
        for item in (TEACHER, *chosen)
    ]
    result = {
        "kind": "recall_frontier",
        "command": own_command(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "teacher": teacher.name,
        "settings": asdict(config) | {"texts": [path.name for path in map(Path, config.texts)]},
        "tasks": [{"key": task.key, "kind": task.kind, "settings": task.settings} for task in tasks],
        "left_out": inputs.left_out,
        "rows": rows,
        "bootstrap": {"resamples": RESAMPLES, "level": LEVEL},
        "dtype": dtype_name(teacher.model.dtype),
        "device": teacher.model.device.type,
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "results_reused": reused,
        "seconds": round(time.perf_counter() - started, 1),
    }
    result = json.loads(json.dumps(result))  # exactly what a reader of the file gets
    if plot:
        write_whole(plot, lambda draft: draw_frontier(result, draft))
    if output:
        write_text_whole(output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def task_inputs(teacher: Teacher, config: FrontierConfig) -> TaskInputs:
    """What tasks are built from; ValueError if a length exceeds the teacher's context or a text cannot be read."""
    context = teacher.model.config.max_position_embeddings
    config.refuse_beyond(context)
    names = ("texts", "text_tokens", "lengths", "recall_kinds", "recall_lengths", "recall_samples", "seed")
    settings = EvaluationConfig(**{name: getattr(config, name) for name in names})
    texts = read_texts(settings, teacher.tokenizer)
    return TaskInputs(config=settings, tokenizer=teacher.tokenizer, texts=texts, context=context)


def measure_cells(
    teacher: Teacher,
    build: Build,
    chosen: Sequence[Configuration],
    tasks: Sequence[Task],
    config: FrontierConfig,
    cache: ResultCache,
    *,
    progress: bool,
) -> tuple[dict[str, dict[str, dict]], int]:
    """
    Scores by name of the configuration and key of the task, and under the key `memory` its memory; and how many of them came
    from the cache.
    """
    environment = environment_of(teacher.model.dtype, teacher.model.device.type, teacher.tokenizer)
    environment |= {"benchmark": "recall frontier", "identity": teacher.identity}

    def facts(item: Configuration, cell: dict) -> dict:
        return environment | {"configuration": "teacher" if item is TEACHER else item.facts(), "cell": cell}

    memory_cell = {"memory": [config.reference_length, *config.lengths], "dtype": config.dtype}
    task_cells = {task.key: {"kind": task.kind, "settings": task.settings} for task in tasks}
    cells: dict[str, dict[str, dict]] = {}
    for item in chosen:
        assert item.name not in cells, f"two configurations are called {item.name}"
        stored = {key: cache.get(facts(item, cell)) for key, cell in {"memory": memory_cell, **task_cells}.items()}
        cells[item.name] = {key: value for key, value in stored.items() if value is not None}
    reused = sum(map(len, cells.values()))
    total = sum(task.cost for item in chosen for task in tasks if task.key not in cells[item.name])

    with FrontierProgress(total, shown=progress) as bar:
        # a student without memories has the teacher's facts
        for _, group in groupby(chosen, key=lambda item: (item is TEACHER, item.facts() | {"linear_branch": True})):
            todo = [item for item in group if len(cells[item.name]) < len(tasks) + 1]
            if not todo:
                continue
            bar.advance(0, f"building {todo[0].name}")
            model = teacher.model if todo[0] is TEACHER else build(todo[0])
            for item in todo:
                done = cells[item.name]
                if "memory" not in done:
                    lengths, dtype = sorted({*memory_cell["memory"]}), dtype_named(config.dtype)
                    done["memory"] = memory_use(config_of(model.config), lengths, dtype, item.ablation)
                    cache.put(facts(item, memory_cell), done["memory"])
                with ABLATIONS[item.ablation](model):
                    for task in tasks:
                        if task.key in done:
                            continue
                        bar.advance(0, f"{item.name}: {task.name}")
                        scores = task.run(model, None, bar.advance)
                        done[task.key] = {key: scores[key] for key in ("totals", "weights")}
                        cache.put(facts(item, task_cells[task.key]), done[task.key])
            del model
    return cells, reused
