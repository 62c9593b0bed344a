"""The evaluation of a DiJiang checkpoint beside its teacher, the controls and further models, resumable after any result."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dijiang.checkpoint.provenance import public_name, versions
from dijiang.common.device import placement
from dijiang.common.outputs import new_folder, refuse_occupied
from dijiang.common.result_cache import ResultCache, cache_folder, hash_of
from dijiang.common.text import read_tokens

from ..latency.timing import own_command
from ..report.html import write_results
from ..report.style import refuse_missing_packages
from ..report.tables import SHORT
from .attention_maps import measure_maps
from .bootstrap import LEVEL, RESAMPLES
from .config import EvaluationConfig
from .measuring_code import code_hash
from .recall import PAIRS, single_token_words
from .result import describe, summary, training_curves
from .tasks import ASSOCIATIVE, NEEDLE, Task, agreement_task, harness_tasks, perplexity_task, recall_task
from .variants import Comparison, Subject, compare, zero_share

MAP_COST = 20  # passes that the maps' arithmetic is reckoned as


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
    Evaluate a checkpoint beside its teacher, the controls and further models (`run_evaluation`), and write the report.

    Args:
        output: new folder for `evaluation.json`, `report.html` and the figures; the rest as for `run_evaluation`.

    Returns:
        What `evaluation.json` holds.

    Raises:
        ValueError: if output, models, texts or tasks do not allow it; nothing was measured then.
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
    Measure a checkpoint beside its teacher, the controls and further models.

    Args:
        checkpoint: DiJiang checkpoint, folder or hub id.
        teacher: softmax model with the same tokenizer: hub id, folder or GGUF file.
        beside: further models with the same tokenizer, softmax or DiJiang: hub ids, folders or GGUF files. Their public names
            head their columns.
        cache: folder where results are kept as they come, so that the same call goes on after an interruption; default
            `~/.cache/dijiang/evaluations`.
        progress: show a bar on stderr.

    Returns:
        The result, as JSON.
    """
    started = time.perf_counter()
    refuse_same_headings(beside)
    device, dtype = placement(config.device, config.dtype)
    comparison = compare(checkpoint, teacher, beside=beside, dtype=dtype, device=device.type)
    config = config.within(comparison.context)
    tasks, map_rows, left_out = build_tasks(config, comparison)
    kept = ResultCache(cache or cache_folder("evaluations"))
    try:
        scores, maps, reused = measure(tasks, map_rows, comparison, kept, progress=progress)
    except torch.OutOfMemoryError:  # of a GPU
        raise ValueError(
            "the GPU's memory ran out; what was measured is kept, so go on with shorter lengths, or measure anew on the CPU"
        ) from None
    result = {
        "kind": "evaluation",
        "command": own_command(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **describe(comparison, next(iter(scores.values()))),
        "settings": asdict(config) | {key: [Path(x).name for x in getattr(config, key)] for key in ("texts", "tasks")},
        "tasks": [summary(task, scores[task.key], comparison.subjects(), config.seed) for task in tasks],
        "left_out": left_out,
        "maps": maps,
        "training": training_curves(comparison.student.folder, comparison.provenance),
        "bootstrap": {"resamples": RESAMPLES, "level": LEVEL, "units": "windows, samples, prompts or documents"},
        "results_reused": reused,
        "seconds": round(time.perf_counter() - started, 1),
    }
    return json.loads(json.dumps(result))  # as whoever reads the file has it


def refuse_same_headings(beside: Sequence[str | Path]) -> None:
    """Raise ValueError if a table could not tell a further model from the others by its name."""
    taken = list(SHORT.values())
    for name in map(public_name, beside):
        if name in taken:
            raise ValueError(f"two models of the table have the name {name}, which heads their columns; rename one")
        taken.append(name)


def build_tasks(config: EvaluationConfig, comparison: Comparison) -> tuple[list[Task], torch.Tensor | None, dict[str, str]]:
    """
    Every task, its data read and checked, the rows (1, T) for attention maps, and why what these models do not allow is left
    out. No model is in memory yet.
    """
    tokenizer, tasks = comparison.tokenizer, []
    texts = {Path(path).name: torch.tensor(read_tokens(tokenizer, path, config.text_tokens)) for path in config.texts}
    if len(texts) < len(config.texts):
        raise ValueError("two texts have the same file name, which is what results are told apart by; rename one")
    for name, tokens in texts.items():
        for length in config.lengths:
            tasks.append(perplexity_task(name, tokens, length=length, stride=config.stride))
    name, first = next(iter(texts.items()))
    left_out = {}
    if len(single_token_words(tokenizer)) <= 2 * PAIRS:
        left_out[ASSOCIATIVE] = f"the tokenizer has no {2 * PAIRS} words of one token to make pairs of"
    for kind in filter(lambda kind: kind not in left_out, (NEEDLE, ASSOCIATIVE)):
        for length in config.recall_lengths:
            tasks.append(recall_task(kind, tokenizer, first, length=length, samples=config.recall_samples, seed=config.seed))
    sizes = {"prompt_length": config.prompt_length, "count": config.prompts, "new_tokens": config.new_tokens}
    tasks.append(agreement_task(name, tokenizer, first, **sizes))
    if config.tasks:
        options = {"limit": config.limit, "num_fewshot": config.num_fewshot, "batch_size": config.batch_size}
        tasks += harness_tasks(config.tasks, tokenizer, context=comparison.context, **options)
    rows = first[: config.map_tokens][None] if config.map_tokens and comparison.same_heads else None
    if not comparison.same_heads:
        left_out["attention maps"] = "teacher and student differ in layers or heads"
    # lengths beyond a text's own are one and the same task
    return list({task.key: task for task in tasks}.values()), rows, left_out


def measure(
    tasks: Sequence[Task],
    map_rows: torch.Tensor | None,
    comparison: Comparison,
    kept: ResultCache,
    *,
    progress: bool,
) -> tuple[dict[str, dict[str, dict]], dict | None, int]:
    """
    Scores by task and subject, each with the model's `zeros` (`zero_share`), the attention maps, and how many of them had been
    kept from before.
    """
    environment = {"code": code_hash(), "versions": versions(), "dtype": str(comparison.dtype), "device": comparison.device}
    environment["tokenizer"] = hash_of(tokenizer_facts(comparison.tokenizer).encode())
    subjects = [subject for subject in comparison.subjects() if subject.left_out is None]
    scores: dict[str, dict[str, dict]] = {task.key: {} for task in tasks}
    reused = 0

    def facts(task: Task, subject: Subject) -> dict:
        # what a model scores as it is does not depend on whom it stands beside, but the teacher's agreement is its own text
        as_it_is = subject.key in comparison.sources and (task.kind != "agreement" or subject.key != "teacher")
        found = {"kind": task.kind, "settings": task.settings, "subject": "as it is" if as_it_is else subject.key}
        found["model"] = comparison.identity[subject.model]
        if task.kind == "agreement":
            found["teacher"] = comparison.identity["teacher"]
        return found | environment

    todo = []
    for subject in subjects:
        for task in tasks:
            if (found := kept.get(facts(task, subject))) is not None:
                scores[task.key][subject.key] = found
                reused += 1
            else:
                todo.append((subject, task))
    map_facts = maps = None
    if map_rows is not None:
        models = {key: comparison.identity[key] for key in ("teacher", "student")}
        map_facts = {"kind": "maps", "rows": map_rows.tolist(), "models": models, **environment}
        maps = kept.get(map_facts)
        reused += maps is not None
    total = sum(task.cost for _, task in todo)
    map_cost = MAP_COST * map_rows.numel() if map_rows is not None and maps is None else 0

    with progress_bar(progress) as bar:
        line = bar.add_task("", total=total + map_cost)
        for model_name, work in by_model(todo):
            bar.update(line, description=escape(f"loading {model_name}"))
            with comparison.loaded(model_name) as model:
                zeros = zero_share(model)
                for subject, task in work:
                    bar.update(line, description=escape(f"{subject.key}: {task.name}"))
                    before = bar.tasks[0].completed
                    with subject.control(model):
                        found = task.run(model, scores[task.key].get("teacher"), lambda n: bar.advance(line, n))
                    found["zeros"] = zeros
                    bar.update(line, completed=before + task.cost)
                    kept.put(facts(task, subject), found)
                    scores[task.key][subject.key] = found
                del model  # before the next one is loaded
        if map_rows is not None and maps is None:
            bar.update(line, description="attention maps")
            with comparison.loaded("teacher") as teacher, comparison.loaded("student") as student:
                per_layer = map_cost / teacher.config.num_hidden_layers
                rows = map_rows.to(comparison.device)
                maps = measure_maps(teacher, student, rows, advance=lambda n: bar.advance(line, n * per_layer))
            kept.put(map_facts, maps)
    return scores, maps, reused


def tokenizer_facts(tokenizer) -> str:
    """All that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    how = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return json.dumps([how, {key: str(value) for key, value in tokenizer.special_tokens_map.items()}])


def by_model(work: Iterable[tuple[Subject, Task]]) -> list[tuple[str, list[tuple[Subject, Task]]]]:
    """The work in its order, in parts that share a model in memory."""
    parts: list[tuple[str, list]] = []
    for subject, task in work:
        if not parts or parts[-1][0] != subject.model:
            parts.append((subject.model, []))
        parts[-1][1].append((subject, task))
    return parts


def progress_bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)
