"""A picture of a plan: how many matrices get which sparsity, and which kinds of matrix in which layers."""

from pathlib import Path

from .plan import PruningPlan

BINS = 24


def draw_plan(plan: PruningPlan, path: Path) -> None:
    """Draw the histogram of per-matrix sparsities, and beside it every matrix by layer and kind, into the PNG file `path`."""
    from matplotlib.figure import Figure  # no pyplot, so no display is asked for

    shares = [100 * matrix.target for matrix in plan.matrices]
    figure = Figure(figsize=(11, 4), layout="constrained")
    histogram, grid = figure.subplots(1, 2)
    # equal sparsities would make a range without width
    histogram.hist(shares, bins=BINS, range=(min(shares) - 0.5, max(shares) + 0.5), color="#2a7fba")
    histogram.axvline(100 * plan.sparsity, color="#4c566a", linestyle="--", label=f"all weights: {plan.sparsity:.1%}")
    histogram.set(xlabel="sparsity of a matrix, %", ylabel="matrices")
    histogram.legend(frameon=False)
    histogram.spines[["top", "right"]].set_visible(False)
    kinds = list(dict.fromkeys(matrix.name.rpartition(".")[2] for matrix in plan.matrices))
    layers = 1 + max(matrix.layer for matrix in plan.matrices)
    cells = [[float("nan")] * layers for _ in kinds]
    for matrix, share in zip(plan.matrices, shares, strict=True):
        cells[kinds.index(matrix.name.rpartition(".")[2])][matrix.layer] = share
    image = grid.imshow(cells, aspect="auto", cmap="viridis")
    grid.set(xlabel="decoder layer", yticks=range(len(kinds)), yticklabels=kinds)
    figure.colorbar(image, ax=grid, label="sparsity, %")
    figure.savefig(path, dpi=150)
