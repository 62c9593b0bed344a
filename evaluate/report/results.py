"""Results in JSON files, those of earlier versions included."""

import json
from collections.abc import Iterable
from pathlib import Path

KINDS = ("evaluation", "latency")


def read_results(paths: Iterable[Path]) -> dict[str, dict]:
    """
    The results in JSON files, or in folders that hold `evaluation.json` or `latency.json`, by kind.

    Raises:
        ValueError: if a path has none, holds something else, two are of one kind, or of different checkpoints.
    """
    results: dict[str, dict] = {}
    for path in paths:
        files = [path / f"{kind}.json" for kind in KINDS if (path / f"{kind}.json").is_file()] if path.is_dir() else [path]
        if not files:
            names = " nor ".join(f"{kind}.json" for kind in KINDS)
            raise ValueError(f"{path} holds neither {names}; give the folder that `dijiang evaluate` made, or the files")
        for file in files:
            result = read_result(file)
            kind = result["kind"]
            if kind in results:
                raise ValueError(f"{file} is the second result of kind {kind}; a report shows one of each")
            results[kind] = result
    files = results.get("latency", {}).get("models", {}).get("files")
    if "evaluation" in results and files and files != results["evaluation"]["student"]["weights"]:
        raise ValueError("the evaluation and the latency are of different checkpoints; give those of one")
    return results


def read_result(file: Path) -> dict:
    """The result in one JSON file; ValueError if there is none."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error}); give what `dijiang evaluate` wrote") from None
    if not isinstance(result, dict) or result.get("kind") not in KINDS:
        raise ValueError(f"{file} is no result of `dijiang evaluate` or `dijiang benchmark latency`")
    return use_new_names(result)


def use_new_names(result: dict) -> dict:
    """
    Replace names of earlier versions in `result`, in place: up to version 0.1.1 attention maps called the training-free window
    and sinks `window_only`, as results call the student without its linear branch.
    """
    maps = result.get("maps") if result.get("kind") == "evaluation" else None
    for layer in maps["layers"] if maps else ():
        if "window_only" in layer["distance"]:
            layer["distance"]["window_sinks"] = layer["distance"].pop("window_only")
    return result
