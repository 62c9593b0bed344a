"""
Tasks of EleutherAI's lm-evaluation-harness (lm-eval), run by its `hf` backend on a model in memory.

Tasks are loaded, their prompts made and counted before any model is: whatever is wrong with them shows first.
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

from .lm_eval_task import HarnessTask, prepare, strings

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

PAPER = ("piqa", "winogrande", "wsc", "arc_easy", "arc_challenge", "logiqa")
# arXiv 2403.19928: the tasks of its tables for Pythia, and those that its table for LLaMA2-7B adds
TASK_SETS = {
    "paper": PAPER,
    "paper-7b": (*PAPER, "social_iqa", "boolq", "hellaswag", "mmlu", "nq_open", "copa", "race"),
}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's remarks and everyone's tqdm bars off the screen within the block; errors are still told."""
    from tqdm import tqdm

    logger, init = logging.getLogger("lm_eval"), tqdm.__init__
    level = logger.level

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
    if library is not None and library.origin == str(Path(__file__).with_name("__init__.py")):
        raise ValueError(
            f"lm-eval needs the library `evaluate`, and Python finds the folder {Path(__file__).parent} in its place; "
            "start from another folder, or with the command `dijiang`"
        )


def resolve_tasks(names: Sequence[str]) -> tuple[list[str], "TaskManager"]:
    """
    Find tasks without loading their data.

    Args:
        names: lm-eval's tasks, groups and tags, keys of `TASK_SETS`, and paths of task files (YAML), beside which other files
            may lie that they refer to.

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
        # indexing lm-eval's own tasks takes seconds; files of one's own need them only where they group them
        manager = TaskManager(include_path=folders, include_defaults=not set(names) <= set(paths))
        if not group_members(manager, paths.values()) <= set(manager.all_tasks):
            manager = TaskManager(include_path=folders)
    of_file = {entry.yaml_path: name for name, entry in manager.task_index.items()}
    found = []
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
        found.append(of_file[paths[name]] if name in paths else name)
    return list(dict.fromkeys(found)), manager


def group_members(manager: "TaskManager", paths: Iterable[Path]) -> set[str]:
    """Names of what the groups in these files are made of."""
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
) -> list[HarnessTask]:
    """
    Load what `resolve_tasks` found, with all data, and make the prompts. A tag, or a group without a mean of its own, becomes
    the tasks in it.

    Args:
        context: tokens that every model to be measured was made for.
        limit: documents of each task, the first ones; default all.
        num_fewshot: examples in each prompt; default as many as the task says. As lm-eval has it, a task that says 0 keeps 0.
        seed: of the choice of examples; the default is lm-eval's.

    Raises:
        ValueError: if data cannot be had, or a task cannot be run or has no metric that is a mean over documents.
    """
    from jinja2 import TemplateError

    found: dict[str, HarnessTask] = {}
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
                except Exception as error:  # of templates and functions that a task file brings
                    raise ValueError(unusable(name, error)) from None
                found.setdefault(task.name, task)
    return list(found.values())


def with_mean(item) -> list:
    """A task or group, or what is in a group that has no mean."""
    from lm_eval.api.group import Group

    if isinstance(item, Group) and not item.has_aggregation:
        return [row for part in item for row in with_mean(part)]
    return [item]


def unusable(name: str, error: Exception) -> str:
    """What to say of a task whose templates or functions fail."""
    return f"the prompts of the task {name} cannot be made ({type(error).__name__}: {one_line(error)}); mend its file"


def unreachable(name: str, error: Exception) -> str:
    """What to say of a task that could not be loaded; which one of a group it was, the error's traceback knows."""
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
class Told:
    """Stands in for lm-eval's cache of answers, which hears of each as it comes; tells `advance` the tokens it took."""

    lengths: dict[tuple[str, str], int]
    advance: Callable[[int], None]

    def add_partial(self, kind: str, request: tuple, answer) -> None:
        self.advance(self.lengths[strings(request)])


def harness_scores(
    model, tokenizer, task: HarnessTask, *, batch_size: int = 1, advance: Callable[[int], None] = lambda done: None
) -> dict:
    """
    Run a task on a causal language model where it is, in its dtype; log-probabilities are float32.

    Args:
        batch_size: requests at a time; without effect on scores beyond rounding.
        advance: is told how many of `task.tokens` were read.

    Returns:
        `totals` and `weights`: the metric of each document and how much it counts, 1 but for groups that weigh every task
        alike; `metric`, `chance`, `truncated`: those of `task`; `aggregated`: lm-eval's own results by task and group.
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
            tokenizer=copy.deepcopy(tokenizer),  # it is given a token for padding
            backend="causal",
            batch_size=batch_size,
            max_length=task.context,
            softmax_dtype=torch.float32,
        )
        lm.set_cache_hook(Told(task.lengths, advance))
        found = evaluate(lm, task.loaded, limit=task.limit, bootstrap_iters=0)
    totals, weights = [], []
    for leaf, weight in task.leaf_weights.items():
        samples = found["samples"][leaf]
        answers = samples[0]["filter"]  # tasks may read answers in several ways; the first counts
        values = [float(sample[task.metric]) for sample in samples if sample["filter"] == answers]
        totals += [weight * value for value in values]
        weights += [weight] * len(values)
    own = found["results"][task.name][f"{task.metric},{answers}"]
    assert math.isclose(sum(totals) / sum(weights), own, abs_tol=1e-9), (task.name, own)
    return {
        "totals": totals,
        "weights": weights,
        "metric": task.metric,
        "chance": task.chance,
        "truncated": task.truncated,
        "aggregated": json.loads(json.dumps(found["results"], default=float)),
    }
