"""The latency benchmark from names to files."""

import json
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from dijiang.common.outputs import new_folder, refuse_occupied, refuse_taken_file, write_whole

from ..report.latency_figures import draw_latency
from ..report.style import refuse_missing_packages
from .measure import check, measure_latency, show_latency
from .models import checkpoint_pair, shape_pair


def run_latency(
    checkpoint: str | Path | None = None,
    teacher: str | Path | None = None,
    *,
    shape: str | None = None,
    preset: str = "recommended",
    settings: dict | None = None,
    dtype: str = "auto",
    device: str = "auto",
    contexts: list[int],
    batches: list[int],
    phases: list[str],
    rounds: int = 7,
    output: Path | None = None,
    plot: Path | None = None,
    progress: bool = True,
    show: bool = True,
) -> dict:
    """
    Measure a checkpoint beside its teacher, or a shape (`shape_pair`), and write what is found.

    Args:
        contexts, batches, phases, rounds: as for `measure_latency`.
        output: new JSON file; plot: new folder for the figures.
        progress: show a bar on stderr; show: print the tables.

    Raises:
        ValueError: as `measure_latency`, `checkpoint_pair` and `shape_pair`, or if the outputs are not free.
    """
    if output:
        refuse_taken_file(output)
    if plot:
        refuse_missing_packages("matplotlib")
        refuse_occupied(plot)
    check(contexts, batches, phases, rounds)
    options = {"longest": max(contexts), "dtype": dtype, "device": device}
    if shape:
        pair = shape_pair(shape, preset=preset, settings=settings, **options)
    else:
        pair = checkpoint_pair(checkpoint, teacher, **options)
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        line = bar.add_task(f"{pair.name}: rows", total=len(phases) * len(contexts) * len(batches))
        result = measure_latency(
            pair, contexts=contexts, batches=batches, phases=phases, rounds=rounds, advance=lambda n: bar.advance(line, n)
        )
    if show:
        show_latency(result, Console())
    if output:
        write_whole(output, lambda draft: draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8"))
    if plot:
        with new_folder(plot) as folder:
            draw_latency(result, folder)
    return result
