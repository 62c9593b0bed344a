"""The latency benchmark from the names of models to files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from dijiang.common.outputs import new_folder, refuse_occupied, refuse_taken_file, write_text_whole
from dijiang.common.progress import progress_bar

from ..report.latency_figures import draw_latency
from ..report.style import refuse_missing_packages
from .config import LatencyConfig
from .measure import measure_latency, show_latency
from .models import checkpoint_pair, shape_pair


def run_latency(
    checkpoint: str | Path | None = None,
    teacher: str | Path | None = None,
    config: LatencyConfig | None = None,
    *,
    output: Path | None = None,
    plot: Path | None = None,
    progress: bool = True,
    show: bool = True,
    **settings: Any,
) -> dict:
    """
    Measure a checkpoint and its teacher, or random weights in a shape, and write the results.

    Args:
        checkpoint: DiJiang checkpoint, unless the settings name a shape.
        teacher: the softmax model that it was converted from.
        config: default `LatencyConfig()`.
        output: new JSON file for the result.
        plot: new folder for the figures.
        progress: show a bar on stderr.
        show: print tables of the result.
        settings: fields of `LatencyConfig`, in place of those of `config`.

    Returns:
        The result, as `measure_latency` describes it.

    Raises:
        ValueError: as `LatencyConfig`, `checkpoint_pair` and `shape_pair`, or if the outputs are not free.
    """
    config = replace(config or LatencyConfig(), **settings)
    if output:
        refuse_taken_file(output)
    if plot:
        refuse_missing_packages("matplotlib")
        refuse_occupied(plot)
    pair = shape_pair(config) if config.shape else checkpoint_pair(checkpoint, teacher, config)
    rows = len(config.phases) * len(config.contexts) * len(config.batches)
    with progress_bar(f"{pair.name}: rows", rows, shown=progress, unit="items") as advance:
        result = measure_latency(pair, config, advance=advance)
    if show:
        show_latency(result, Console())
    if output:
        write_text_whole(output, json.dumps(result, indent=1) + "\n")
    if plot:
        with new_folder(plot) as folder:
            draw_latency(result, folder)
    return result
