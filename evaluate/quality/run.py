"""Evaluation of a DiJiang checkpoint next to its teacher, baselines and ablations; it can be interrupted and continued."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

from dijiang.checkpoint.provenance import public_name
from dijiang.common.device import placement
from dijiang.common.machine import own_command
from dijiang.common.outputs import new_folder, refuse_occupied
from dijiang.common.result_cache import ResultCache, cache_folder
from dijiang.common.text import read_tokens

from ..report.html import write_results
from ..report.style import refuse_missing_packages
from ..report.tables import SHORT
from .bootstrap import LEVEL, RESAMPLES
from .config import EvaluationConfig
from .measure import measure
from .memory_use import memory_facts
from .result import comparison_facts, task_row, training_curves
from .task_base import TaskInputs
from .tasks import build_tasks
from .variants import compare


def evaluate_model(
    checkpoint: str | Path,
    teacher: str | Path,
    output: str | Path,
    config: EvaluationConfig,
    *,
    beside: Sequence[str | Path] = (),
    cache: Path | None = None,
    progress: bool = True,
) -> dict:
    """
    Run `run_evaluation` and write its result and the report.

    Args:
        checkpoint: DiJiang checkpoint, folder or hub id.
        teacher: softmax model with the same tokenizer: hub id, folder or GGUF file.
        output: new folder for `evaluation.json`, `report.html` and the figures.
        config: what to measure, and on how much.
        beside: further baselines, see `run_evaluation`.
        cache: folder of partial results, see `run_evaluation`.
        progress: show a bar on stderr.

    Returns:
        The content of `evaluation.json`.

    Raises:
        ValueError: if output, models, texts or tasks do not allow it; nothing has been measured then.
    """
    output = Path(output).expanduser()
    refuse_occupied(output)
    refuse_missing_packages()
    result = run_evaluation(checkpoint, teacher, config, beside=beside, cache=cache, progress=progress)
    with new_folder(output) as folder:
        write_results({"evaluation": result}, folder)
    return result


def run_evaluation(
    checkpoint: str | Path,
    teacher: str | Path,
    config: EvaluationConfig,
    *,
    beside: Sequence[str | Path] = (),
    cache: Path | None = None,
    progress: bool = True,
) -> dict:
    """
    Measure a checkpoint, its teacher, the training-free baseline, the ablations and further baselines.

    Args:
        checkpoint: DiJiang checkpoint, folder or hub id.
        teacher: softmax model with the same tokenizer: hub id, folder or GGUF file.
        config: what to measure, and on how much.
        beside: further baselines with the same tokenizer, softmax or DiJiang: hub ids, folders or GGUF files. Their public
            names head their columns.
        cache: folder where results are kept as they come, so that the same call continues after an interruption; default
            `~/.cache/dijiang/evaluations`.
        progress: show a bar on stderr.

    Returns:
        The result, as JSON.

    Raises:
        ValueError: if models, texts or tasks do not allow it; nothing has been measured then.
    """
    started = time.perf_counter()
    refuse_same_headings(beside)
    device, dtype = placement(config.device, config.dtype)
    comparison = compare(checkpoint, teacher, baselines=beside, dtype=dtype, device=device.type)
    config = config.within(comparison.context)
    texts = read_texts(config, comparison.tokenizer)
    inputs = TaskInputs(config=config, tokenizer=comparison.tokenizer, texts=texts, context=comparison.context)
    tasks = build_tasks(inputs)
    map_rows = inputs.first_text[1][: config.map_tokens][None] if config.map_tokens and not comparison.no_maps else None
    if comparison.no_maps:
        inputs.left_out["attention maps"] = comparison.no_maps
    try:
        measured = measure(tasks, map_rows, comparison, ResultCache(cache or cache_folder("evaluations")), progress=progress)
    except torch.OutOfMemoryError:  # of a GPU
        raise ValueError(
            "the GPU's memory ran out; finished results are in the cache, so continue with shorter lengths, or measure on the "
            "CPU"
        ) from None
    variants = comparison.variants()
    result = {
        "kind": "evaluation",
        "command": own_command(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **comparison_facts(comparison, next(iter(measured.scores.values()))),
        "settings": asdict(config) | {key: [Path(x).name for x in getattr(config, key)] for key in ("texts", "tasks")},
        "memory": memory_facts(comparison, config.lengths),
        "tasks": [task_row(task, measured.scores[task.key], variants, config.seed) for task in tasks],
        "left_out": inputs.left_out,
        "maps": measured.maps,
        "training": training_curves(comparison.student.folder, comparison.provenance),
        "bootstrap": {"resamples": RESAMPLES, "level": LEVEL, "units": "windows, samples, prompts or documents"},
        "results_reused": measured.reused,
        "seconds": round(time.perf_counter() - started, 1),
    }
    return json.loads(json.dumps(result))  # exactly what a reader of the file gets


def refuse_same_headings(baselines: Sequence[str | Path]) -> None:
    """Raise ValueError if the name of a baseline does not tell it from the table's other columns."""
    taken = list(SHORT.values())
    for name in map(public_name, baselines):
        if name in taken:
            raise ValueError(f"two models of the table have the name {name}, which heads their columns; rename one")
        taken.append(name)


def read_texts(config: EvaluationConfig, tokenizer) -> dict[str, torch.Tensor]:
    """Token ids of each text, by file name; ValueError if one cannot be read or two have the same name."""
    texts = {Path(path).name: torch.tensor(read_tokens(tokenizer, path, config.text_tokens)) for path in config.texts}
    if len(texts) < len(config.texts):
        raise ValueError("two texts have the same file name, which is what results are told apart by; rename one")
    return texts
