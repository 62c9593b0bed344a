"""What all figures share: one set of colors, plain axes, files in place of a display."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

TEACHER_COLOR = "#4c566a"
STUDENT_COLOR = "#2a7fba"
ABLATION_COLOR = "#b8c4cf"
BASELINE_COLOR = "#c8743c"


def missing_packages(*packages: str) -> list[str]:
    """Those of `packages` that are not installed."""
    return [package for package in packages if find_spec(package) is None]


def refuse_missing_packages(*packages: str) -> None:
    """Raise ValueError if one of `packages` is not installed; by default those that draw figures and fill in pages."""
    if missing := missing_packages(*packages or ("matplotlib", "jinja2")):
        raise ValueError(f"reports are made with {' and '.join(missing)}, missing here; run: pip install {' '.join(missing)}")


@contextmanager
def drawn(path: Path, rows: int = 1, columns: int = 1, *, size: tuple[float, float]) -> Iterator:
    """Yield (figure, axes) as `pyplot.subplots` returns them, and save them as the PNG file `path` when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained")
    try:
        yield figure, axes
        figure.savefig(path, dpi=150, format="png")
    finally:
        pyplot.close(figure)


def plain(axes, *, x: str, y: str, legend: bool = True) -> None:
    """Label the axes and remove the top and right frame."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False)


def lengths_axis(axes, lengths: list[int]) -> None:
    """Make x a logarithmic axis with each of these token counts written out."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
