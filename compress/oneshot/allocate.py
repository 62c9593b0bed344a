"""From sensitivities to one sparsity per unit: the rank rule of arXiv 2310.09499 (Algorithm 1), with budgets that hold."""

import math
from collections.abc import Sequence
from itertools import groupby

BUDGETS = ("weighted", "shift", "paper")
BISECTIONS = 200


def allocate(
    sensitivities: Sequence[float], sizes: Sequence[int], sparsity: float, alpha: float, *, budget: str = "weighted"
) -> list[float]:
    """
    A sparsity for each unit between `sparsity` + `alpha` (the least sensitive) and `sparsity` - `alpha`, by rank alone: equal
    sensitivities share their middle rank, so that all equal means `sparsity` for all.

    Args:
        sensitivities: of each unit, a matrix or a decoder layer; sizes: its weights.
        budget: `weighted`: ranks count weights, so that the sparsity of all weights is `sparsity` exactly; `paper`: an
            arithmetic progression over units, whose mean over weights is what it happens to be; `shift`: that progression plus
            a constant, clipped to the same range, so that the mean over weights is `sparsity`.

    Raises:
        ValueError: if the range leaves [0, 1), the budget's name is unknown, or a sensitivity is not finite.
    """
    refuse_range(sparsity, alpha)
    if budget not in BUDGETS:
        raise ValueError(f"budget {budget!r} is unknown; choose from {', '.join(BUDGETS)}")
    if not all(map(math.isfinite, sensitivities)):
        raise ValueError("a sensitivity is NaN or infinite, so nothing can be ranked; check model and calibration text")
    measures = sizes if budget == "weighted" else [1] * len(sizes)
    places = middle_places(sensitivities, measures)
    if budget == "weighted":
        return [sparsity + alpha * (1 - 2 * place / sum(sizes)) for place in places]
    last = len(sizes) - 1
    ranks = [place - 0.5 for place in places]  # 0 .. n - 1
    values = [sparsity + alpha * (1 - 2 * rank / last) if last else sparsity for rank in ranks]
    return values if budget == "paper" else shifted(values, sizes, sparsity, alpha)


def refuse_range(sparsity: float, alpha: float) -> None:
    """Raise ValueError unless every sparsity from `sparsity` - `alpha` to `sparsity` + `alpha` is from 0 to below 1."""
    if not (alpha >= 0 and sparsity - alpha >= 0 and sparsity + alpha < 1):
        widest = min(sparsity, 1 - sparsity)
        advice = f"set alpha below {widest:g}" if 0 < widest <= alpha else "set both from 0 to below 1"
        raise ValueError(
            f"sparsity={sparsity:g} and alpha={alpha:g} ask for sparsities from {sparsity - alpha:g} to {sparsity + alpha:g}, "
            f"which must lie from 0 to below 1; {advice}"
        )


def middle_places(sensitivities: Sequence[float], measures: Sequence[int]) -> list[float]:
    """What lies before the middle of each unit, or of the units equal to it, when all are laid out by rising sensitivity."""
    order = sorted(range(len(measures)), key=lambda unit: sensitivities[unit])
    places, before = [0.0] * len(measures), 0
    for _, group in groupby(order, key=lambda unit: sensitivities[unit]):
        group = list(group)
        length = sum(measures[unit] for unit in group)
        for unit in group:
            places[unit] = before + length / 2
        before += length
    return places


def shifted(values: Sequence[float], sizes: Sequence[int], sparsity: float, alpha: float) -> list[float]:
    """`values` plus one constant, clipped to `sparsity` +- `alpha`, with the weighted mean `sparsity`."""
    total = sum(sizes)

    def clipped(shift: float) -> list[float]:
        return [min(max(value + shift, sparsity - alpha), sparsity + alpha) for value in values]

    low, high = -2 * alpha, 2 * alpha
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        mean = sum(size * value for size, value in zip(sizes, clipped(middle), strict=True)) / total
        low, high = (middle, high) if mean < sparsity else (low, middle)
    return clipped((low + high) / 2)
