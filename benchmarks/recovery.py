"""
What recovery runs came to: held-out perplexity over the teacher's, measured in this process, with the controls.

    python benchmarks/recovery.py RUN... --held-out TEXT... [--output benchmarks/results/recovery.json]

RUN is the output folder of a recipe. Of each the converted model and each complete stage are measured at two lengths, the last
one also with its linear branch silenced and with that branch alone, where there is a window. Held-out text: JSONL (text)
or plain; that of the recorded runs is anarchism_held.jsonl and handbook_held.jsonl of scripts/make_recovery_text.py and
dijiang/data/jargon_heldout.txt.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from measure import console, machine, versions, write_json

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
    """By length, blocks of held-out text, as many from each file."""
    sources = [SourceConfig(path=file) for file in files]
    found = {}
    for length, tokens in LENGTHS.items():
        data = DataConfig(train=[SourceConfig(path="unused")], held_out=sources, held_out_tokens=tokens)
        items = held_out_blocks(data, length, tokenizer, progress=False)
        found[length] = torch.cat([items[i]["input_ids"] for i in range(len(items))])
    return found


def ratios(model, blocks: dict[int, torch.Tensor], teacher: dict[str, float]) -> dict[str, float]:
    return {str(length): perplexity(model, rows) / teacher[str(length)] for length, rows in blocks.items()}


def tokens_of(provenance: dict) -> int:
    return sum(stage.get("tokens", 0) for stage in provenance["stages"])


@torch.no_grad()
def teacher_in_the_run(recipe: Recipe, teacher, tokenizer, dtype: torch.dtype) -> float:
    """The teacher's perplexity on what the run itself measures: its held-out blocks, as long as its sequences become."""
    stage = recipe.distill or recipe.align
    blocks = held_out_blocks(recipe.data, stage.block_size, tokenizer, progress=False)
    model, total, tokens = RecoveryModel(teacher, None, dtype), 0.0, 0
    for item in (blocks[i] for i in range(len(blocks))):
        count = (next_token_labels(item["input_ids"], item["position_ids"]) != -100).sum().item()
        total, tokens = total + count * model.text_loss(item["input_ids"], item["position_ids"]).item(), tokens + count
    return math.exp(total / tokens)


def curve(run: Path) -> list[tuple[int, float]]:
    """(tokens of the stage, held-out perplexity) along the distil stage."""
    path = run / "distill" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    tokens = {line["step"]: line["tokens"] for line in lines if "tokens" in line}
    return [(tokens[line["step"]], line["eval_perplexity"]) for line in lines if "eval_loss" in line]


def settings_of(recipe: Recipe) -> dict:
    """What the run did, without where it did it."""
    stages = {name: asdict(getattr(recipe, name)) for name in recipe.stages}
    return {"convert": asdict(recipe.convert), **stages}


def measure(run: Path, recipe: Recipe, blocks, teacher: dict[str, float], dtype: torch.dtype) -> dict:
    result = {"curve": curve(run), "recipe": settings_of(recipe), "stages": {}}
    for stage, folder in STAGES.items():
        if not (run / folder / "config.json").exists():
            continue
        student, _ = load_source(run / folder, dtype=dtype)
        provenance = read_provenance(run / folder)
        found = {"tokens": tokens_of(provenance), "seconds": [s["seconds"] for s in provenance["stages"] if "seconds" in s]}
        found["ratio"] = ratios(student, blocks, teacher)
        if student.config.attention_window and stage == "distill":
            with window_only(student):
                found["window_only"] = ratios(student, blocks, teacher)
            with linear_only(student):
                found["linear_only"] = ratios(student, blocks, teacher)
        result["stages"][stage] = found
        console.print(f"{run.name} {stage}: {found}", highlight=False, soft_wrap=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "recovery.json")
    given = parser.parse_args()
    recipes = {}
    for run in given.runs:
        files = [run / stage / "recipe.yaml" for stage in ("distill", "align")]  # the last stage's knows them all
        if not (found := [file for file in files if file.exists()]):
            sys.exit(f"{run} holds no run of a recipe")
        recipes[run] = load_recipe(found[0], stored=True)
    if len({recipe.source for recipe in recipes.values()}) > 1:
        sys.exit("the runs have different teachers; measure them apart, into different files")
    dtype = fastest_dtype("cpu")
    teacher, tokenizer = load_source(recipes[given.runs[0]].source, dtype=dtype)
    blocks = held_out(given.held_out, tokenizer)
    perplexities = {str(length): perplexity(teacher, rows) for length, rows in blocks.items()}
    about = {
        "command": f"python benchmarks/recovery.py RUN... --held-out {' '.join(Path(file).name for file in given.held_out)}",
        "held_out": [Path(file).name for file in given.held_out],
        "blocks": {str(length): list(rows.shape) for length, rows in blocks.items()},
        "teacher_perplexity": perplexities,
        "machine": machine(),
        "versions": versions(),
    }
    runs = {}
    if given.output.exists():
        before = json.loads(given.output.read_text())
        if any(before[key] != about[key] for key in ("held_out", "blocks", "teacher_perplexity")):
            sys.exit(f"{given.output} was measured on other text or against another teacher; name another file")
        runs = before["runs"]
    for run, recipe in recipes.items():
        found = measure(run, recipe, blocks, perplexities, dtype)
        runs[run.name] = found | {"teacher_in_the_run": teacher_in_the_run(recipe, teacher, tokenizer, dtype)}
        write_json(given.output, about | {"runs": runs})


if __name__ == "__main__":
    main()
