"""The report: one HTML page that loads nothing from elsewhere, and its figures as PNG files, drawn from JSON."""

import base64
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from dijiang.common.outputs import new_folder

from .latency_figures import draw_latency
from .map_figures import draw_maps
from .quality_figures import draw_quality
from .results import read_results
from .style import refuse_missing_packages
from .tables import heading, headings, memory_rows, mib, number, percent, share_headings, sparsity, with_interval

TEMPLATE = Path(__file__).parent / "templates" / "report.html.jinja"
FIGURES: dict[str, Callable[[dict, Path], list[Path]]] = {"evaluation": draw_quality, "latency": draw_latency}
CAPTIONS = {
    "perplexity": "Perplexity with 95 % bootstrap intervals over windows of text.",
    "perplexity_by_position": "Perplexity by position: what more context is worth to each model.",
    "recall": "Finding again what was read, by kind and length; bands are 95 % bootstrap intervals.",
    "recovered": "Share of the teacher's lead over the floor that the student has, with 95 % bootstrap intervals. The floor "
    "is chance or, for perplexity and agreement, the student without attention.",
    "training": "Training loss and held-out perplexity against the tokens trained on.",
    "attention_maps": "Attention averaged over heads, the student's on its own queries and keys, the Performer's on the "
    "teacher's. Distance: total variation of a row from the teacher's, 0 to 1.",
    "attention_heads": "The same, head by head, of one layer.",
    "effective_context": "Most recent tokens that hold 90 % of the weight, with and without the sinks, and the weight beyond "
    "window and sinks, by layer.",
    "map_distance": "Distance from the teacher's attention by layer; Performer and training-free window + sinks on the "
    "teacher's own queries and keys.",
    "latency": "Time of a decoding step of the whole batch, and to the first token, against context. Dotted: the least that "
    "the machine allows.",
    "memory": "Bytes of cache or state and peak memory against context.",
}


def make_report(paths: Iterable[Path], output: str | Path) -> Path:
    """
    Draw the report of results in files into a new folder; returns the page.

    Args:
        paths: as for `read_results`.
        output: the new folder.

    Raises:
        ValueError: as `read_results`, or if the folder is not empty.
    """
    refuse_missing_packages()
    results = read_results(paths)
    with new_folder(output) as folder:
        write_report(results, folder)
    return Path(output) / "report.html"


def write_results(results: dict[str, dict], folder: Path) -> Path:
    """Write each result as `<kind>.json`, the report and the figures into `folder`; returns the page."""
    for kind, result in results.items():
        text = json.dumps(result, indent=1, ensure_ascii=False)
        (folder / f"{kind}.json").write_text(text + "\n", encoding="utf-8")
    return write_report(results, folder)


def write_report(results: dict[str, dict], folder: Path) -> Path:
    """Draw figures into `folder`/figures and write `report.html`, which embeds them; returns the page."""
    from jinja2 import Environment, StrictUndefined

    pictures = folder / "figures"
    pictures.mkdir()
    evaluation = results.get("evaluation")
    figures = [path for kind, result in results.items() for path in FIGURES[kind](result, pictures)]
    if evaluation and evaluation.get("maps"):
        figures += draw_maps(evaluation["maps"], pictures)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"number": number, "with_interval": with_interval, "mib": mib}
    environment.filters |= {"heading": heading, "headings": headings, "share_headings": share_headings, "sparsity": sparsity}
    environment.filters |= {"memory_rows": memory_rows}
    page = folder / "report.html"
    shown = [{"name": path.stem, "caption": CAPTIONS[path.stem], "data": encoded(path)} for path in figures]
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        evaluation=evaluation, latency=results.get("latency"), figures=shown, percent=percent
    )
    page.write_text(text, encoding="utf-8")
    return page


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")
