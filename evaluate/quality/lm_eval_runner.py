"""
Tasks of EleutherAI's lm-evaluation-harness (lm-eval), run by its `hf` backend on a model in memory.

Tasks are loaded and their prompts made before any model is loaded, so that their errors come first.
"""

import copy
import difflib
import json
import logging
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import set_seed

from dijiang.common.errors import one_line
from dijiang.common.library_calls import call_named

from .lm_eval_task import LmEvalTask, prepare, strings
from .task_base import Task, TaskInputs

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

ROOM = Path(__file__).parents[1]  # this folder is called `evaluate`, as a library that lm-eval imports
PAPER = ("piqa", "winogrande", "wsc", "arc_easy", "arc_challenge", "logiqa")
# tasks of arXiv 2403.19928: of its tables for Pythia, and of its table for LLaMA2-7B
TASK_SETS = {
    "paper": PAPER,
    "paper-7b": (*PAPER, "social_iqa", "boolq", "hellaswag", "mmlu", "nq_open", "copa", "race"),
}


def lm_eval_tasks(inputs: TaskInputs) -> list[Task]:
    """The tasks of lm-eval that the settings name, loaded with their data."""
    config = inputs.config
    if not config.tasks:
        return []
    names, manager = resolve_tasks(config.tasks)
    options = {"context": inputs.context, "limit": config.limit, "num_fewshot": config.num_fewshot}
    loaded = load_tasks(names, manager, inputs.tokenizer, **options)
    return [as_task(task, inputs.tokenizer, config.batch_size) for task in loaded]


def as_task(task: LmEvalTask, tokenizer, batch_size: int) -> Task:
    def run(model, reference, advance) -> dict:
        scores = lm_eval_scores(model, tokenizer, task, batch_size=batch_size, advance=advance)
        return {key: scores[key] for key in ("totals", "weights")} | {"detail": {"aggregated": scores["aggregated"]}}

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


@contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's remarks and all tqdm bars off the screen within the block; errors are still shown."""
    from tqdm import tqdm

    logger = logging.getLogger("lm_eval")
    level = logger.level
    init = tqdm.__init__

    def without_bar(self, *args, **kwargs):
        init(self, *args, **kwargs | {"disable": True})

    logger.setLevel(logging.ERROR)
    tqdm.__init__ = without_bar
    try:
        yield
    finally:
        tqdm.__init__ = init
        logger.setLevel(level)


def refuse_missing_lm_eval() -> None:
    """Raise ValueError unless lm-eval can be imported with what it needs."""
    missing = [package for package in ("lm_eval", "accelerate") if find_spec(package) is None]
    if missing:
        raise ValueError(f"these tasks run by {' and '.join(missing)}, missing here; run: pip install 'dijiang[eval]'")
    library = find_spec("evaluate")  # lm-eval takes metrics from it
    if library is not None and library.origin == str(ROOM / "__init__.py"):
        raise ValueError(
            f"lm-eval needs the library `evaluate`, and Python finds the folder {ROOM} in its place; "
            "start from another folder, or with the command `dijiang`"
        )


def resolve_tasks(names: Sequence[str]) -> tuple[list[str], "TaskManager"]:
    """
    Find tasks without loading their data.

    Args:
        names: lm-eval's tasks, groups and tags, keys of `TASK_SETS`, and paths of task files (YAML), which may refer to other
            files in their folder.

    Returns:
        Names as lm-eval knows them, each once, and the manager that loads them.

    Raises:
        ValueError: if there is no such task or file, or lm-eval is missing.
    """
    refuse_missing_lm_eval()
    from lm_eval.tasks import TaskManager

    names = [each for name in names for each in TASK_SETS.get(name, (name,))]
    paths = {name: Path(name).expanduser().resolve() for name in names if Path(name).suffix in (".yaml", ".yml")}
    for name, path in paths.items():
        if not path.is_file():
            raise ValueError(f"there is no file {name}; give the path of a task file, or the name of one of lm-eval's tasks")
    folders = sorted({str(path.parent) for path in paths.values()})
    with quiet():
        # indexing lm-eval's own tasks takes seconds, and a user's files need them only if they group them
        manager = TaskManager(include_path=folders, include_defaults=not set(names) <= set(paths))
        if not group_members(manager, paths.values()) <= set(manager.all_tasks):
            manager = TaskManager(include_path=folders)
    of_file = {entry.yaml_path: name for name, entry in manager.task_index.items()}
    known_names = []
    for name in names:
        if name in paths and paths[name] not in of_file:
            raise ValueError(
                f"{name} defines no task that lm-eval can read, or one by a name that another file there has already; "
                "it needs a line `task: NAME`"
            )
        if name not in paths and name not in manager.task_index:
            close = difflib.get_close_matches(name, [*TASK_SETS, *manager.all_tasks], n=4)
            similar = f" (similar: {', '.join(close)})" if close else ""
            raise ValueError(f"lm-eval has no task {name!r}{similar}; `lm-eval ls tasks` lists them, or give a YAML file")
        known_names.append(of_file[paths[name]] if name in paths else name)
    return list(dict.fromkeys(known_names)), manager


def group_members(manager: "TaskManager", paths: Iterable[Path]) -> set[str]:
    """Names of the members of the groups that these files define."""
    files = set(paths)
    groups = [entry.cfg for entry in manager.task_index.values() if entry.yaml_path in files and "group" in entry.cfg]
    return {str(part.get("task") if isinstance(part, dict) else part) for group in groups for part in group["task"]}


def load_tasks(
    names: Sequence[str],
    manager: "TaskManager",
    tokenizer,
    *,
    context: int,
    limit: int | None = None,
    num_fewshot: int | None = None,
    seed: int = 1234,
) -> list[LmEvalTask]:
    """
    Load the tasks that `resolve_tasks` returned, with all data, and make the prompts. A tag, or a group without a mean of its
    own, becomes the tasks in it.

    Args:
        names: as `resolve_tasks` returns them.
        manager: loads them.
        tokenizer: the tokenizer of the models.
        context: tokens that every model to be measured was made for.
        limit: documents of each task, the first ones; default all.
        num_fewshot: examples in each prompt; default the task's own number. As in lm-eval, a task that asks for 0 keeps 0.
        seed: seed of the choice of examples; the default is lm-eval's.

    Raises:
        ValueError: if data cannot be had, or a task cannot be run or has no metric that is a mean over documents.
    """
    from jinja2 import TemplateError

    prepared: dict[str, LmEvalTask] = {}
    for name in names:
        set_seed(seed)  # some tasks draw their documents
        with quiet():
            try:
                loaded = manager.load([name])
            except TemplateError as error:
                raise ValueError(unusable(name, error)) from None
            except Exception as error:
                raise ValueError(unreachable(name, error)) from None
            items = [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())
            for row in (row for item in items for row in with_mean(item)):
                try:
                    part = manager.load([row])
                    task = prepare(part, tokenizer, context=context, limit=limit, num_fewshot=num_fewshot, seed=seed)
                except ValueError:
                    raise
                except Exception as error:  # a task file may bring templates and functions that fail in any way
                    raise ValueError(unusable(name, error)) from None
                prepared.setdefault(task.name, task)
    return list(prepared.values())


def with_mean(item) -> list:
    """A task or group as it is; of a group without a mean, its members."""
    from lm_eval.api.group import Group

    if isinstance(item, Group) and not item.has_aggregation:
        return [row for part in item for row in with_mean(part)]
    return [item]


def unusable(name: str, error: Exception) -> str:
    """Message about a task whose templates or functions fail."""
    return f"the prompts of the task {name} cannot be made ({type(error).__name__}: {one_line(error)}); fix its file"


def unreachable(name: str, error: Exception) -> str:
    """Message about a task that could not be loaded; the error's traceback tells which task of a group it was."""
    from lm_eval.api.task import Task

    what = f"the task {name}"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        task = frame.f_locals.get("self")
        if isinstance(task, Task):
            what += f" (its part {task.task_name})" if task.task_name != name else ""
            what += f" (data set {task.DATASET_PATH})"
            break
    return (
        f"{what} cannot be loaded: {one_line(error)}; load it once with the network at hand, so that its data is kept in the "
        "cache (HF_DATASETS_CACHE), or leave it out"
    )


@dataclass
class ProgressHook:
    """Implements lm-eval's cache-hook interface to drive the progress bar."""

    lengths: dict[tuple[str, str], int]
    advance: Callable[[int], None]

    def add_partial(self, kind: str, request: tuple, answer) -> None:
        self.advance(self.lengths[strings(request)])


def lm_eval_scores(
    model, tokenizer, task: LmEvalTask, *, batch_size: int = 1, advance: Callable[[int], None] = lambda done: None
) -> dict:
    """
    Run a task on a causal language model where it is, in its dtype; log-probabilities are float32.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        task: as `load_tasks` returns it.
        batch_size: requests at a time; without effect on scores beyond rounding.
        advance: called with the number of `task.tokens` read since the last call.

    Returns:
        `totals` and `weights`: the metric of each document and how much it counts, 1 unless its group gives every task the
        same weight; `metric`, `chance`, `truncated`: those of `task`; `aggregated`: lm-eval's own results by task and group.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    set_seed(task.seed)  # so that the prompts are those that `prepare` counted
    for leaf in task.loaded["tasks"].values():
        leaf.set_fewshot_seed(seed=task.seed)
    with quiet():
        lm = call_named(
            HFLM,
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # lm-eval gives it a token for padding
            backend="causal",
            batch_size=batch_size,
            max_length=task.context,
            softmax_dtype=torch.float32,
        )
        lm.set_cache_hook(ProgressHook(task.lengths, advance))
        results = evaluate(lm, task.loaded, limit=task.limit, bootstrap_iters=0)
    totals, weights = [], []
    for leaf, weight in task.leaf_weights.items():
        samples = results["samples"][leaf]
        answers = samples[0]["filter"]  # tasks may read answers in several ways; the first counts
        values = [float(sample[task.metric]) for sample in samples if sample["filter"] == answers]
        totals += [weight * value for value in values]
        weights += [weight] * len(values)
    own = results["results"][task.name][f"{task.metric},{answers}"]
    assert math.isclose(sum(totals) / sum(weights), own, abs_tol=1e-9), (task.name, own)
    return {
        "totals": totals,
        "weights": weights,
        "metric": task.metric,
        "chance": task.chance,
        "truncated": task.truncated,
        "aggregated": json.loads(json.dumps(results["results"], default=float)),
    }
