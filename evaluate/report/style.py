"""What all figures share: no display, one set of colours, plain axes."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

TEACHER_COLOUR, STUDENT_COLOUR, CONTROL_COLOUR, THIRD_COLOUR = "#4c566a", "#2a7fba", "#b8c4cf", "#c8743c"


def refuse_missing_packages(*packages: str) -> None:
    """Raise ValueError unless figures can be drawn (matplotlib) and pages filled in (jinja2), or what else is named."""
    missing = [package for package in packages or ("matplotlib", "jinja2") if find_spec(package) is None]
    if missing:
        raise ValueError(f"reports are made with {' and '.join(missing)}, missing here; run: pip install {' '.join(missing)}")


@contextmanager
def drawn(path: Path, rows: int = 1, columns: int = 1, *, size: tuple[float, float]) -> Iterator:
    """Yield (figure, axes) as `pyplot.subplots` gives them; at the end they are saved as the PNG file `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained")
    try:
        yield figure, axes
        figure.savefig(path, dpi=150)
    finally:
        pyplot.close(figure)


def plain(axes, *, x: str, y: str, legend: bool = True) -> None:
    """Name the axes and take the frame away that says nothing."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False)


def lengths_axis(axes, lengths: list[int]) -> None:
    """A logarithmic axis of token counts, each of them written out."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
