"""What an evaluation says: each task's row from the scores, what was compared, and how the student was trained."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from dijiang.checkpoint.lineage import weight_hashes
from dijiang.checkpoint.provenance import public_name, read_provenance, versions
from dijiang.checkpoint.source import Source

from ..latency.timing import machine
from .bootstrap import interval, recovered_share, resampled_means
from .tasks import Task
from .variants import Comparison, Subject

SHOWN: dict[str, Callable] = {"perplexity": np.exp}  # what of a mean is a metric's value; others show the mean itself


def summary(task: Task, scores: dict[str, dict], subjects: Sequence[Subject], seed: int) -> dict:
    """A task's row: each subject's value with its interval, and what the student recovered."""
    means = resampled_means(scores, seed=seed)
    shown = SHOWN.get(task.metric, lambda x: x)
    floor = task.floor
    share = recovered_share(means, means[floor] if isinstance(floor, str) else floor, task.better)
    gained = recovered_share(means, means["window_sinks"], task.better)
    values = {
        subject.key: {"left_out": subject.left_out} if subject.left_out else interval(shown(means[subject.key]))
        for subject in subjects
    }
    return {
        "kind": task.kind,
        "name": task.name,
        "metric": task.metric,
        "better": task.better,
        "floor": floor,
        "chance": None if isinstance(floor, str) else floor,
        "settings": task.settings,
        "units": len(scores["student"]["totals"]),
        "values": values,
        "ratio": interval(shown(means["student"]) / shown(means["teacher"])) if task.metric == "perplexity" else None,
        "recovered": None if share is None else interval(share),
        "over_training_free": None if gained is None else interval(gained),
        "detail": {key: found["detail"] for key, found in scores.items()},
    }


def describe(comparison: Comparison, scores: dict[str, dict]) -> dict:
    """What was compared, on what; the `scores` of any task say how sparse each model is."""
    recorded = weight_hashes(comparison.provenance)

    def of_model(key: str) -> dict:
        identity = comparison.identity[key]
        config = {name: value for name, value in identity["config"].items() if name != "auto_map"}
        return {"weights": identity["weights"], "config": config, "zeros": scores[key]["zeros"]}

    return {
        "student": {
            "name": public_name(comparison.student.name),
            **history(comparison.provenance),
            **of_model("student"),
        },
        "teacher": {
            "name": public_name(comparison.teacher.name),
            "is_source": bool(recorded) and recorded <= set(comparison.identity["teacher"]["weights"].values()),
            "zeros": scores["teacher"]["zeros"],
        },
        "beside": {
            key: {"name": public_name(source.name), **recorded_history(source), **of_model(key)}
            for key, source in comparison.beside.items()
        },
        "subjects": {subject.key: subject.title for subject in comparison.subjects()},
        "dtype": str(comparison.dtype).removeprefix("torch."),
        "device": comparison.device,
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def history(provenance: dict) -> dict:
    """What a checkpoint came from and went through."""
    stages = provenance["stages"]
    return {
        "source": provenance.get("source"),
        "tokens": sum(stage.get("tokens", 0) for stage in stages),
        "stages": [{key: stage[key] for key in ("stage", "tokens", "seconds", "device") if key in stage} for stage in stages],
    }


def recorded_history(source: Source) -> dict:
    """The same of a model that need not have a record."""
    try:
        return {} if source.gguf else history(read_provenance(source.folder))
    except ValueError:
        return {}


def training_curves(checkpoint: Path, provenance: dict) -> list[dict]:
    """Losses and held-out perplexities of the stages that led to a checkpoint, where their `metrics.jsonl` lie beside it."""
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
