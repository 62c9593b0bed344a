"""The plan of a pruning run: the sparsity of every matrix, the sensitivities behind it, and a figure of both."""

from dataclasses import asdict, dataclass
from pathlib import Path

from .allocate import allocate, allocate_by_loss, middle_positions
from .config import PruneConfig
from .sensitivity.estimates import Sensitivities

TOLERANCE = 1e-6
BINS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedMatrix:
    """
    A matrix and its sparsity.

    Attributes:
        name: of the linear layer in the model.
        layer: index of its decoder layer.
        rows: of its weight.
        columns: of its weight.
        sensitivity: of the matrix; None if nothing was measured.
        rank: of its unit (the matrix or its decoder layer), 0 the least sensitive; equal ones share one.
        target: share of its weights to remove.
    """

    name: str
    layer: int
    rows: int
    columns: int
    sensitivity: float | None
    rank: float | None
    target: float

    @property
    def weights(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, kw_only=True, slots=True)
class PruningPlan:
    """
    Sparsities of all matrices.

    Attributes:
        matrices: in the model's order.
        sensitivity: what they were ranked by; None if nothing was measured.
    """

    matrices: tuple[PlannedMatrix, ...]
    sensitivity: Sensitivities | None

    @property
    def sparsity(self) -> float:
        """Share of all weights to remove."""
        return sum(x.target * x.weights for x in self.matrices) / sum(x.weights for x in self.matrices)

    def targets(self) -> dict[str, float]:
        """Share to remove of each matrix, by name."""
        return {matrix.name: matrix.target for matrix in self.matrices}

    def as_json(self) -> dict:
        ranking = None
        if measured := self.sensitivity:
            ranking = {
                "method": measured.method,
                "samples": measured.samples,
                "split_half_rank_correlation": measured.correlation,
                "negative": list(measured.negative),
            }
        return {"sensitivity": ranking, "sparsity": self.sparsity, "matrices": [asdict(matrix) for matrix in self.matrices]}


def make_plan(
    shapes: dict[str, tuple[int, int]], layers: dict[str, int], sensitivities: Sensitivities | None, config: PruneConfig
) -> PruningPlan:
    """
    Allocate `config.sparsity` to the matrices.

    Args:
        shapes: (R, C) of each matrix by name.
        layers: index of each matrix's decoder layer, by name.
        sensitivities: of the matrices; None if granularity is `uniform`.
        config: settings of the run.
    """
    targets = dict.fromkeys(shapes, config.sparsity)
    ranks: dict[str, float | None] = dict.fromkeys(shapes)
    if sensitivities:
        by_unit: dict[object, list[str]] = {}
        for name in shapes:
            by_unit.setdefault(layers[name] if config.granularity == "layer" else name, []).append(name)
        units = list(by_unit.values())
        values = [sum(sensitivities.values[name] for name in names) for names in units]
        sizes = [sum(shapes[name][0] * shapes[name][1] for name in names) for names in units]
        if sensitivities.costs is None:
            shares = allocate(values, sizes, config.sparsity, config.alpha, budget=config.budget)
        else:
            curves = [[sensitivities.costs[name] for name in names] for names in units]
            costs = [[sum(costs) for costs in zip(*unit, strict=True)] for unit in curves]
            shares = allocate_by_loss(costs, sizes, config.sparsity, config.sparsity + config.alpha)
        positions = middle_positions(values, [1] * len(values))
        for names, share, position in zip(units, shares, positions, strict=True):
            targets |= dict.fromkeys(names, share)
            ranks |= dict.fromkeys(names, position - 0.5)
    plan = PruningPlan(
        matrices=tuple(
            PlannedMatrix(
                name=name,
                layer=layers[name],
                rows=rows,
                columns=columns,
                sensitivity=sensitivities.values[name] if sensitivities else None,
                rank=ranks[name],
                target=targets[name],
            )
            for name, (rows, columns) in shapes.items()
        ),
        sensitivity=sensitivities,
    )
    exact = config.budget != "paper" or (sensitivities and sensitivities.costs)
    assert not exact or abs(plan.sparsity - config.sparsity) < TOLERANCE, plan.sparsity
    return plan


def draw_plan(plan: PruningPlan, path: Path) -> None:
    """Draw a histogram of the matrices' sparsities, and every matrix by layer and kind, into the PNG file `path`."""
    from matplotlib.figure import Figure  # not pyplot, which asks for a display

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
