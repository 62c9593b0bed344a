"""The parts of an evaluation's result: rows of tasks, what was compared, how the student was trained."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from dijiang.checkpoint.lineage import weight_hashes
from dijiang.checkpoint.provenance import public_name, read_provenance, versions
from dijiang.checkpoint.source import Source
from dijiang.common.device import dtype_name
from dijiang.common.machine import machine

from .bootstrap import interval, recovered_share, resampled_means
from .task_base import Task
from .variants import Comparison, Variant


def task_row(task: Task, scores: dict[str, dict], variants: Sequence[Variant], seed: int) -> dict:
    """A task's row: each variant's value with its interval, and the share that the student recovered."""
    means = resampled_means(scores, seed=seed)
    values = {key: task.value_of(mean) for key, mean in means.items()}
    floor = task.floor
    recovered = recovered_share(means, means[floor] if isinstance(floor, str) else floor, task.better)
    over_training_free = recovered_share(means, means["window_sinks"], task.better)
    return {
        "kind": task.kind,
        "name": task.name,
        "metric": task.metric,
        "better": task.better,
        "floor": floor,
        "chance": None if isinstance(floor, str) else floor,
        "settings": task.settings,
        "units": len(scores["student"]["totals"]),
        "values": {
            variant.key: {"left_out": variant.left_out} if variant.left_out else interval(values[variant.key])
            for variant in variants
        },
        "ratio": interval(values["student"] / values["teacher"]) if task.metric == "perplexity" else None,
        "recovered": None if recovered is None else interval(recovered),
        "over_training_free": None if over_training_free is None else interval(over_training_free),
        "detail": {key: score["detail"] for key, score in scores.items()},
    }


def comparison_facts(comparison: Comparison, scores: dict[str, dict]) -> dict:
    """Models, machine and versions of an evaluation; the `scores` of any task hold the sparsity of each model."""
    recorded = weight_hashes(comparison.provenance)

    def model_facts(key: str) -> dict:
        identity = comparison.identity[key]
        config = {name: value for name, value in identity["config"].items() if name != "auto_map"}
        return {"weights": identity["weights"], "config": config, "zeros": scores[key]["zeros"]}

    return {
        "student": {
            "name": public_name(comparison.student.name),
            **history(comparison.provenance),
            **model_facts("student"),
        },
        "teacher": {
            "name": public_name(comparison.teacher.name),
            "is_source": bool(recorded) and recorded <= set(comparison.identity["teacher"]["weights"].values()),
            "zeros": scores["teacher"]["zeros"],
        },
        "beside": {
            key: {"name": public_name(source.name), **recorded_history(source), **model_facts(key)}
            for key, source in comparison.baselines.items()
        },
        "subjects": {variant.key: variant.title for variant in comparison.variants()},
        "dtype": dtype_name(comparison.dtype),
        "device": comparison.device,
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def history(provenance: dict) -> dict:
    """Source and training stages of a checkpoint."""
    stages = provenance["stages"]
    return {
        "source": provenance.get("source"),
        "tokens": sum(stage.get("tokens", 0) for stage in stages),
        "stages": [{key: stage[key] for key in ("stage", "tokens", "seconds", "device") if key in stage} for stage in stages],
    }


def recorded_history(source: Source) -> dict:
    """`history` of a model that may lack a record; empty then."""
    try:
        return {} if source.gguf else history(read_provenance(source.folder))
    except ValueError:
        return {}


def training_curves(checkpoint: Path, provenance: dict) -> list[dict]:
    """Losses and held-out perplexities of the stages that led to a checkpoint, if their `metrics.jsonl` are still there."""
    curves = []
    run = checkpoint.resolve().parent.parent
    for stage in (record["stage"] for record in provenance["stages"]):
        path = run / stage / "metrics.jsonl"
        if not path.is_file():
            continue
        points = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        names = ("tokens", "loss", "eval_loss", "eval_perplexity", "eval_teacher_perplexity")
        curves.append({"stage": stage, "points": [{key: x[key] for key in names if key in x} for x in points]})
    return curves
