"""
Results of recovery runs: held-out perplexity over the teacher's, measured in this process, with ablations.

    python benchmarks/recovery.py RUN... --held-out TEXT... [--output benchmarks/results/recovery.json]

RUN is the output folder of a recipe. Its converted model and each complete stage are measured at two lengths; the last stage
also with the window branch alone and with the linear branch alone, if there is a window. Held-out text is JSONL (text) or
plain; that of the recorded runs is anarchism_held.jsonl and handbook_held.jsonl of scripts/make_recovery_text.py and
dijiang/data/jargon_heldout.txt.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from measure import console, earlier_runs, machine, versions, write_json

from dijiang.checkpoint.provenance import read_provenance
from dijiang.common.device import fastest_dtype
from dijiang.convert import load_source
from dijiang.evaluate import linear_only, perplexity, window_only
from dijiang.train import DataConfig, Recipe, SourceConfig, load_recipe
from dijiang.train.data.blocks import held_out_blocks
from dijiang.train.stages.base import RecoveryModel, next_token_labels

LENGTHS = {1024: 12_288, 4096: 24_576}  # tokens of held-out text at each length
STAGES = {"converted": "converted", "align": "align/model", "distill": "distill/model"}


def held_out(files: list[str], tokenizer) -> dict[int, torch.Tensor]:
    """Blocks of held-out text by length, equally many from each file."""
    sources = [SourceConfig(path=file) for file in files]
    by_length = {}
    for length, tokens in LENGTHS.items():
        data = DataConfig(train=[SourceConfig(path="unused")], held_out=sources, held_out_tokens=tokens)
        items = held_out_blocks(data, length, tokenizer, progress=False)
        by_length[length] = torch.cat([item["input_ids"] for item in items])
    return by_length


def ratios(model, blocks: dict[int, torch.Tensor], teacher: dict[str, float]) -> dict[str, float]:
    return {str(length): perplexity(model, rows) / teacher[str(length)] for length, rows in blocks.items()}


def tokens_of(provenance: dict) -> int:
    return sum(stage.get("tokens", 0) for stage in provenance["stages"])


@torch.no_grad()
def teacher_in_the_run(recipe: Recipe, teacher, tokenizer, dtype: torch.dtype) -> float:
    """The teacher's perplexity on the held-out blocks that the run itself measures, as long as its longest sequences."""
    stage = recipe.distill or recipe.align
    blocks = held_out_blocks(recipe.data, stage.block_size, tokenizer, progress=False)
    model = RecoveryModel(teacher, None, dtype)
    total = 0.0
    tokens = 0
    for item in blocks:
        count = (next_token_labels(item["input_ids"], item["position_ids"]) != -100).sum().item()
        total += count * model.measured(item["input_ids"], item["position_ids"])["loss"].item()
        tokens += count
    return math.exp(total / tokens)


def curve(run: Path) -> list[tuple[int, float]]:
    """Tokens so far and held-out perplexity along the distill stage."""
    path = run / "distill" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    tokens = {line["step"]: line["tokens"] for line in lines if "tokens" in line}
    return [(tokens[line["step"]], line["eval_perplexity"]) for line in lines if "eval_loss" in line]


def settings_of(recipe: Recipe) -> dict:
    """The recipe's settings without its paths."""
    stages = {name: asdict(getattr(recipe, name)) for name in recipe.stages}
    return {"convert": asdict(recipe.convert), **stages}


def measure(run: Path, recipe: Recipe, blocks, teacher: dict[str, float], dtype: torch.dtype) -> dict:
    """Measure the stages of a run."""
    result = {"curve": curve(run), "recipe": settings_of(recipe), "stages": {}}
    for stage, folder in STAGES.items():
        if not (run / folder / "config.json").exists():
            continue
        student, _ = load_source(run / folder, dtype=dtype)
        provenance = read_provenance(run / folder)
        seconds = [record["seconds"] for record in provenance["stages"] if "seconds" in record]
        measured = {"tokens": tokens_of(provenance), "seconds": seconds, "ratio": ratios(student, blocks, teacher)}
        if student.config.attention_window and stage == "distill":
            with window_only(student):
                measured["window_only"] = ratios(student, blocks, teacher)
            with linear_only(student):
                measured["linear_only"] = ratios(student, blocks, teacher)
        result["stages"][stage] = measured
        console.print(f"{run.name} {stage}: {measured}", highlight=False, soft_wrap=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "recovery.json")
    arguments = parser.parse_args()
    recipes = {}
    for run in arguments.runs:
        files = [run / stage / "recipe.yaml" for stage in ("distill", "align")]  # the last stage's describes all of them
        if not (existing := [file for file in files if file.exists()]):
            sys.exit(f"{run} holds no run of a recipe")
        recipes[run] = load_recipe(existing[0], stored=True)
    if len({recipe.source for recipe in recipes.values()}) > 1:
        sys.exit("the runs have different teachers; measure them apart, into different files")
    dtype = fastest_dtype("cpu")
    teacher, tokenizer = load_source(recipes[arguments.runs[0]].source, dtype=dtype)
    blocks = held_out(arguments.held_out, tokenizer)
    perplexities = {str(length): perplexity(teacher, rows) for length, rows in blocks.items()}
    names = [Path(file).name for file in arguments.held_out]
    about = {
        "command": f"python benchmarks/recovery.py RUN... --held-out {' '.join(names)}",
        "held_out": names,
        "blocks": {str(length): list(rows.shape) for length, rows in blocks.items()},
        "teacher_perplexity": perplexities,
        "machine": machine(),
        "versions": versions(),
    }
    runs = earlier_runs(arguments.output, about, ("held_out", "blocks", "teacher_perplexity"))
    for run, recipe in recipes.items():
        result = measure(run, recipe, blocks, perplexities, dtype)
        runs[run.name] = result | {"teacher_in_the_run": teacher_in_the_run(recipe, teacher, tokenizer, dtype)}
        write_json(arguments.output, about | {"runs": runs})


if __name__ == "__main__":
    main()
