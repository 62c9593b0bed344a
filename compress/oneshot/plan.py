"""The plan of a pruning run: which sparsity every matrix gets, and why."""

from dataclasses import asdict, dataclass

from .allocate import allocate, middle_places
from .config import PruneConfig
from .loss_allocation import allocate_by_loss
from .sensitivity.measure import Sensitivities

TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedMatrix:
    """
    Attributes:
        name: of the linear layer in the model; layer: the decoder layer's index; rows, columns: of its weight.
        sensitivity: of the matrix (None: nothing was measured); rank: of its unit, 0 the least sensitive, ties share one.
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
    Attributes:
        matrices: in the model's order.
        sensitivity: how they were ranked, with the split-half correlation of the ranks; None if nothing was.
    """

    matrices: tuple[PlannedMatrix, ...]
    sensitivity: Sensitivities | None

    @property
    def sparsity(self) -> float:
        """Share of all weights that goes."""
        return sum(x.target * x.weights for x in self.matrices) / sum(x.weights for x in self.matrices)

    def targets(self) -> dict[str, float]:
        return {matrix.name: matrix.target for matrix in self.matrices}

    def as_json(self) -> dict:
        found = self.sensitivity
        how = None
        if found:
            how = {"method": found.method, "samples": found.samples, "split_half_rank_correlation": found.correlation}
            how["negative"] = list(found.negative)
        return {"sensitivity": how, "sparsity": self.sparsity, "matrices": [asdict(matrix) for matrix in self.matrices]}


def make_plan(
    shapes: dict[str, tuple[int, int]], layers: dict[str, int], found: Sensitivities | None, config: PruneConfig
) -> PruningPlan:
    """
    Allocate `config.sparsity`.

    Args:
        shapes: (R, C) of each matrix by name; layers: the decoder layer it is in.
        found: sensitivities of the matrices, None if granularity is `uniform`.
    """
    units: dict[object, list[str]] = {}
    for name in shapes:
        units.setdefault(layers[name] if config.granularity == "layer" else name, []).append(name)
    targets, ranks = dict.fromkeys(shapes, config.sparsity), dict.fromkeys(shapes)
    if found:
        members = list(units.values())
        values = [sum(found.values[name] for name in names) for names in members]
        sizes = [sum(shapes[name][0] * shapes[name][1] for name in names) for names in members]
        if found.costs is None:
            shares = allocate(values, sizes, config.sparsity, config.alpha, budget=config.budget)
        else:
            costs = [[sum(parts) for parts in zip(*(found.costs[name] for name in names), strict=True)] for names in members]
            shares = allocate_by_loss(costs, sizes, config.sparsity, config.sparsity + config.alpha)
        places = middle_places(values, [1] * len(values))
        for names, share, place in zip(members, shares, places, strict=True):
            targets |= dict.fromkeys(names, share)
            ranks |= dict.fromkeys(names, place - 0.5)
    plan = PruningPlan(
        matrices=tuple(
            PlannedMatrix(
                name=name,
                layer=layers[name],
                rows=rows,
                columns=columns,
                sensitivity=found.values[name] if found else None,
                rank=ranks[name],
                target=targets[name],
            )
            for name, (rows, columns) in shapes.items()
        ),
        sensitivity=found,
    )
    exact = config.budget != "paper" or (found and found.costs)
    assert not exact or abs(plan.sparsity - config.sparsity) < TOLERANCE, plan.sparsity
    return plan
