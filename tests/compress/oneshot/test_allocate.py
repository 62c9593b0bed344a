"""From sensitivities, or from costs, to sparsities: oracle 7 of the specification, closed forms and grids."""

import itertools
import math
import random
import re

import numpy as np
import pytest

from dijiang.compress.oneshot.allocate import allocate, allocate_by_loss, curve
from dijiang.compress.oneshot.config import BUDGETS, POINTS

by_budget = pytest.mark.parametrize("budget", BUDGETS)

# --- by rank ---


def draw(seed, units=None):
    """Sensitivities, all different, and sizes."""
    choose = random.Random(seed)
    units = units or choose.randrange(2, 60)
    return [choose.lognormvariate(0, 2) for _ in range(units)], [choose.randrange(1, 10**7) for _ in range(units)]


def mean(values, sizes):
    return math.fsum(size * value for size, value in zip(sizes, values, strict=True)) / sum(sizes)


def literal_algorithm_1(sensitivities, p, alpha):
    """As the paper lists it; its values are densities."""
    ordered, left = sorted(sensitivities), 1 - p - alpha
    right = 2 * (1 - p) - left
    return [left + ordered.index(s) * (right - left) / (len(ordered) - 1) for s in sensitivities]


@by_budget
@pytest.mark.parametrize(("p", "alpha"), [(0.5, 0.1), (0.7, 0.1), (0.3, 0.3), (0.8, 0.19), (0.05, 0.04), (0.5, 0.4)])
@pytest.mark.parametrize("seed", range(8))
def test_range_order_and_budget(budget, p, alpha, seed):
    sensitivities, sizes = draw(seed)
    shares = allocate(sensitivities, sizes, p, alpha, budget=budget)
    assert len(shares) == len(sizes) and min(shares) >= p - alpha - 1e-15 and max(shares) <= p + alpha + 1e-15
    ordered = [share for _, share in sorted(zip(sensitivities, shares, strict=True))]
    assert ordered == sorted(ordered, reverse=True) and ordered[0] > p > ordered[-1]  # the most sensitive lose least
    paper = [1 - density for density in literal_algorithm_1(sensitivities, p, alpha)]
    if budget == "paper":
        assert shares == pytest.approx(paper, abs=1e-12) and shares != pytest.approx([1 - s for s in shares], abs=1e-3)
        return
    assert mean(shares, sizes) == pytest.approx(p, abs=1e-12)
    if budget == "weighted":
        assert len(set(shares)) == len(shares)
        return
    moved = [b - a for a, b in zip(paper, shares, strict=True) if p - alpha + 1e-9 < b < p + alpha - 1e-9]
    for shift in moved:  # one constant for all, clipped
        assert shares == pytest.approx([min(max(a + shift, p - alpha), p + alpha) for a in paper], abs=1e-12)
    assert moved or len(shares) == 2


@by_budget
@pytest.mark.parametrize("transform", [math.log, math.exp, lambda s: s**3, lambda s: -1 / s])
def test_only_the_order_of_sensitivities_counts(budget, transform):
    sensitivities, sizes = draw(3, units=20)
    sensitivities = [1 + s / max(sensitivities) for s in sensitivities]
    expected = allocate(sensitivities, sizes, 0.6, 0.2, budget=budget)
    assert allocate([transform(s) for s in sensitivities], sizes, 0.6, 0.2, budget=budget) == expected
    back = allocate(sensitivities[::-1], sizes[::-1], 0.6, 0.2, budget=budget)[::-1]
    assert back == pytest.approx(expected, abs=1e-14)  # nor the order of the units


@by_budget
def test_by_hand(budget):
    # 10 weights first, then 30, then 60, of 100: their middles at 0.05, 0.25, 0.7. The progression's mean is 0.45
    # 0.6 stays as it is at the end of the range, so the other 90 weights move by 5 / 90
    values = {"weighted": [0.55, 0.59, 0.46], "paper": [0.5, 0.6, 0.4], "shift": [0.5 + 5 / 90, 0.6, 0.4 + 5 / 90]}[budget]
    assert allocate([5.0, 1.0, 9.0], [30, 10, 60], 0.5, 0.1, budget=budget) == pytest.approx(values, abs=1e-12)
    sensitivities, _ = draw(6, units=12)  # of one size: Algorithm 1, `weighted` with its ends drawn in
    alpha = 0.1 * 11 / 12 if budget == "weighted" else 0.1
    expected = [1 - density for density in literal_algorithm_1(sensitivities, 0.5, alpha)]
    assert allocate(sensitivities, [7] * 12, 0.5, 0.1, budget=budget) == pytest.approx(expected, abs=1e-12)


@by_budget
def test_equal_sensitivities_share_their_middle_rank(budget):
    _, sizes = draw(1, units=9)
    assert allocate([2.5] * 9, sizes, 0.7, 0.2, budget=budget) == pytest.approx([0.7] * 9, abs=1e-15)
    sensitivities = [1.0, 2.0, 2.0, 2.0, 5.0, 5.0, 0.0, 9.0, 9.0]
    shares = allocate(sensitivities, sizes, 0.7, 0.2, budget=budget)
    assert shares[1] == shares[2] == shares[3] and shares[4] == shares[5] and shares[7] == shares[8]
    assert shares[6] >= shares[0] > shares[1] > shares[4] > shares[7]
    if budget == "paper":
        assert shares[1] == pytest.approx(0.7 + 0.2 * (1 - 2 * 3 / 8), abs=1e-15)  # ranks 2, 3 and 4
    else:
        assert mean(shares, sizes) == pytest.approx(0.7, abs=1e-12)
    if budget == "weighted":
        middle = sizes[6] + sizes[0] + (sizes[1] + sizes[2] + sizes[3]) / 2
        assert shares[1] == pytest.approx(0.7 + 0.2 * (1 - 2 * middle / sum(sizes)), abs=1e-14)


@by_budget
def test_one_unit_no_width_and_high_sparsity(budget):
    assert allocate([3.0], [17], 0.4, 0.1, budget=budget) == [0.4]
    sensitivities, sizes = draw(2)
    for p in (0.0, 0.4):
        assert allocate(sensitivities, sizes, p, 0.0, budget=budget) == [p] * len(sizes)
    values = (0.75, 0.65) if budget == "weighted" else (0.8, 0.6)  # not inverted
    assert allocate([1.0, 2.0], [50, 50], 0.7, 0.1, budget=budget) == pytest.approx(values, abs=1e-12)


BEYOND = [(0.5, 0.6), (0.05, 0.1), (0.9, 0.1), (0.5, 0.5), (1.0, 0.0), (1.2, 0.0), (0.0, 0.1), (-0.2, 0.1), (0.5, -0.1)]


@by_budget
@pytest.mark.parametrize(("p", "alpha"), [*BEYOND, (math.nan, 0.1), (0.5, math.nan)])
def test_ranges_beyond_zero_and_one_are_refused(budget, p, alpha):
    with pytest.raises(ValueError, match=f"sparsity={p:g} and alpha={alpha:g} ask for .* from 0 to below 1") as caught:
        allocate([1.0, 2.0], [1, 1], p, alpha, budget=budget)
    assert "\n" not in str(caught.value)


@by_budget
@pytest.mark.parametrize(("p", "alpha"), BEYOND)
def test_the_advice_of_the_refusal_can_be_followed(budget, p, alpha):
    with pytest.raises(ValueError, match="ask for sparsities") as caught:
        allocate([1.0, 2.0], [1, 1], p, alpha, budget=budget)
    below = re.search(r"set alpha below (\S+)", str(caught.value))
    assert below is None or 0 < float(below[1]) <= alpha


@by_budget
def test_other_budgets_are_refused(budget):
    with pytest.raises(ValueError, match=f"budget 'un{budget}' is unknown.*; choose from weighted, shift, paper"):
        allocate([1.0], [1], 0.5, 0.1, budget="un" + budget)


# --- by loss ---


def powers(scale, power):
    return [scale * s**power for s in POINTS]


def random_units(seed, count):
    rng = np.random.default_rng(seed)
    costs = [powers(np.exp(rng.normal(0, 2)), rng.uniform(1.5, 5)) for _ in range(count)]
    return costs, rng.integers(10, 5000, count).tolist()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("sparsity", "highest"), [(0.5, 0.7), (0.7, 0.9), (0.3, 0.3), (0.05, 0.95), (0.6, 0.61)])
def test_budget_by_loss_is_exact_and_the_range_respected(seed, sparsity, highest):
    costs, sizes = random_units(seed, 1 + 7 * seed)
    shares = allocate_by_loss(costs, sizes, sparsity, highest)
    assert mean(shares, sizes) == pytest.approx(sparsity, abs=1e-12)
    assert all(-1e-12 <= share <= highest + 1e-12 for share in shares)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_on_a_grid_is_cheaper(seed):
    costs, sizes = random_units(seed, 3)
    shares = allocate_by_loss(costs, sizes, 0.5, 0.8)

    def cost(shares):
        return sum(curve(np.array(unit), np.array([share]))[0] for unit, share in zip(costs, shares, strict=True))

    best = cost(shares)
    grid = np.linspace(0, 0.8, 161)
    for first, second in itertools.product(grid, grid):
        third = (0.5 * sum(sizes) - first * sizes[0] - second * sizes[1]) / sizes[2]
        if 0 <= third <= 0.8:
            assert cost((first, second, third)) >= best * (1 - 1e-4)


def test_the_closed_form_of_powers():
    """With costs c s^3 and equal sizes, c s^2 is the same for all: s goes with c^(-1/2)."""
    costs = [powers(c, 3.0) for c in (1.0, 4.0, 9.0)]
    shares = allocate_by_loss(costs, [7, 7, 7], 0.3, 0.95)
    expected = np.array([1, 1 / 2, 1 / 3])
    assert shares == pytest.approx((0.9 * expected / expected.sum()).tolist(), abs=0.03)  # between points a curve is no power


def test_curves_pass_through_their_points_and_rise():
    costs = np.array(powers(2.0, 2.5))
    assert curve(costs, np.array(POINTS)) == pytest.approx(costs)
    assert curve(costs, np.array([0.0, 0.1])) == pytest.approx([0.0, 2.0 * 0.1**2.5])
    bumpy = costs.copy()
    bumpy[3] = bumpy[2] / 2  # noise of a measurement
    assert (np.diff(curve(bumpy, np.linspace(0, 0.95, 200))) >= 0).all()


def test_what_costs_more_keeps_more():
    sizes = [100] * 4
    shares = allocate_by_loss([powers(c, 2.5) for c in (1, 3, 3, 20)], sizes, 0.5, 0.9)
    assert shares[0] > shares[1] > shares[3] and shares[1] == pytest.approx(shares[2], abs=1e-9)
    scaled = allocate_by_loss([powers(1e6 * c, 2.5) for c in (1, 3, 3, 20)], sizes, 0.5, 0.9)
    assert scaled == pytest.approx(shares, abs=2e-3)
    # of two units with one cost, the bigger gives more
    small, big = allocate_by_loss([powers(1, 2.5)] * 2, [100, 400], 0.5, 0.95)
    assert big > small


def test_equal_units_share_equally_and_free_ones_go_first():
    assert allocate_by_loss([powers(1, 2)] * 5, [30] * 5, 0.4, 0.8) == pytest.approx([0.4] * 5)
    free, costly = allocate_by_loss([[0.0] * len(POINTS), powers(1, 2)], [10, 10], 0.4, 0.8)
    assert free == pytest.approx(0.8, abs=1e-9) and costly == pytest.approx(0.0, abs=1e-9)
    assert mean(allocate_by_loss([[0.0] * len(POINTS)] * 3, [1, 2, 3], 0.4, 0.8), [1, 2, 3]) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("costs", "sparsity", "highest", "message"),
    [
        ([powers(1, 2)], 0.5, 0.96, "up to 0.95"),
        ([powers(1, 2)], 0.5, 0.4, "up to 0.95, but 0.5 of the weights with at most 0.4"),
        ([[float("nan")] * len(POINTS)], 0.5, 0.7, "not finite"),
        ([[-1.0] * len(POINTS)], 0.5, 0.7, "negative"),
    ],
)
def test_costs_that_make_no_sense_are_refused(costs, sparsity, highest, message):
    with pytest.raises(ValueError, match=message):
        allocate_by_loss(costs, [10], sparsity, highest)
