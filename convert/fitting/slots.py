"""Spreads the slots of the exact memory over the heads by what each of them gains."""

from collections.abc import Sequence
from itertools import pairwise

Head = tuple[int, int]  # layer, key/value head


def spread_slots(
    curves: dict[Head, list[float]], sizes: Sequence[int], total: int, *, step: int = 16, least: int = 32
) -> dict[Head, int]:
    """
    Slots for each head, `total` together: one step after another to the head that gains most by it.

    Args:
        curves: the error of each head with as many slots as `sizes` says.
        sizes: rising numbers of slots; the last one is the most that a head gets.
        total: slots of all heads.
        step: slots that are given at a time.
        least: that every head has.

    Raises:
        ValueError: if `total` is not between the least and the most of all heads.
    """
    most = sizes[-1]
    if not least * len(curves) <= total <= most * len(curves):
        raise ValueError(
            f"{total} slots cannot be spread over {len(curves)} heads with {least} to {most} each; choose a mean between them"
        )
    slots = dict.fromkeys(curves, least)
    gains = {
        head: hull_gains([interpolate(least + i * step, sizes, errors) for i in range((most - least) // step + 1)])
        for head, errors in curves.items()
    }
    for _ in range((total - sum(slots.values())) // step):
        open_heads = (head for head in curves if slots[head] + step <= most)
        head = max(open_heads, key=lambda head: gains[head][(slots[head] - least) // step], default=None)
        if head is None:
            break
        slots[head] += step
    return slots


def interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """The falling curve through the lowest of `ys` so far, linear between `xs` and flat outside."""
    lowest = [min(ys[: i + 1]) for i in range(len(ys))]
    if x <= xs[0]:
        return lowest[0]
    for i in range(1, len(xs)):
        if x <= xs[i]:
            share = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
            return lowest[i - 1] + share * (lowest[i] - lowest[i - 1])
    return lowest[-1]


def hull_gains(errors: Sequence[float]) -> list[float]:
    """What each step gains on the lower convex hull of a falling curve; such gains never rise, so greed is best."""
    hull = [0]
    for i in range(1, len(errors)):
        while len(hull) > 1 and slope(errors, hull[-2], hull[-1]) >= slope(errors, hull[-1], i):
            hull.pop()
        hull.append(i)
    return [-slope(errors, a, b) for a, b in pairwise(hull) for _ in range(b - a)]


def slope(errors: Sequence[float], a: int, b: int) -> float:
    return (errors[b] - errors[a]) / (b - a)
