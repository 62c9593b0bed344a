"""
The registry of tasks.

To add a task, write a file with a function that builds it from `TaskInputs`, and name that function in `TASKS`.
"""

from collections.abc import Callable

from .agreement import agreement_tasks
from .lm_eval_runner import lm_eval_tasks
from .perplexity import perplexity_tasks
from .recall import recall_tasks
from .task_base import Task, TaskInputs

# by kind, in the order of the report's rows
TASKS: dict[str, Callable[[TaskInputs], list[Task]]] = {
    "perplexity": perplexity_tasks,
    "recall": recall_tasks,
    "agreement": agreement_tasks,
    "lm_eval": lm_eval_tasks,
}


def build_tasks(inputs: TaskInputs) -> list[Task]:
    """
    Build every task, its data read and checked.

    Raises:
        ValueError: if the settings or the texts do not allow one of them.
    """
    tasks = [task for build in TASKS.values() for task in build(inputs)]
    # lengths that exceed a text make the same task of it
    return list({task.key: task for task in tasks}.values())
