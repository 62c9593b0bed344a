"""From sensitivities to sparsities: oracle 7 of the specification."""

import math
import random
import re

import pytest

from dijiang.compress.oneshot.allocate import BUDGETS, allocate

pytestmark = pytest.mark.parametrize("budget", BUDGETS)


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


@pytest.mark.parametrize("transform", [math.log, math.exp, lambda s: s**3, lambda s: -1 / s])
def test_only_the_order_of_sensitivities_counts(budget, transform):
    sensitivities, sizes = draw(3, units=20)
    sensitivities = [1 + s / max(sensitivities) for s in sensitivities]
    expected = allocate(sensitivities, sizes, 0.6, 0.2, budget=budget)
    assert allocate([transform(s) for s in sensitivities], sizes, 0.6, 0.2, budget=budget) == expected
    back = allocate(sensitivities[::-1], sizes[::-1], 0.6, 0.2, budget=budget)[::-1]
    assert back == pytest.approx(expected, abs=1e-14)  # nor the order of the units


def test_by_hand(budget):
    # 10 weights first, then 30, then 60, of 100: their middles at 0.05, 0.25, 0.7. The progression's mean is 0.45
    # 0.6 stays as it is at the end of the range, so the other 90 weights move by 5 / 90
    values = {"weighted": [0.55, 0.59, 0.46], "paper": [0.5, 0.6, 0.4], "shift": [0.5 + 5 / 90, 0.6, 0.4 + 5 / 90]}[budget]
    assert allocate([5.0, 1.0, 9.0], [30, 10, 60], 0.5, 0.1, budget=budget) == pytest.approx(values, abs=1e-12)
    sensitivities, _ = draw(6, units=12)  # of one size: Algorithm 1, `weighted` with its ends drawn in
    alpha = 0.1 * 11 / 12 if budget == "weighted" else 0.1
    expected = [1 - density for density in literal_algorithm_1(sensitivities, 0.5, alpha)]
    assert allocate(sensitivities, [7] * 12, 0.5, 0.1, budget=budget) == pytest.approx(expected, abs=1e-12)


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
        place = sizes[6] + sizes[0] + (sizes[1] + sizes[2] + sizes[3]) / 2
        assert shares[1] == pytest.approx(0.7 + 0.2 * (1 - 2 * place / sum(sizes)), abs=1e-14)


def test_one_unit_no_width_and_high_sparsity(budget):
    assert allocate([3.0], [17], 0.4, 0.1, budget=budget) == [0.4]
    sensitivities, sizes = draw(2)
    for p in (0.0, 0.4):
        assert allocate(sensitivities, sizes, p, 0.0, budget=budget) == [p] * len(sizes)
    values = (0.75, 0.65) if budget == "weighted" else (0.8, 0.6)  # not inverted
    assert allocate([1.0, 2.0], [50, 50], 0.7, 0.1, budget=budget) == pytest.approx(values, abs=1e-12)


BEYOND = [(0.5, 0.6), (0.05, 0.1), (0.9, 0.1), (0.5, 0.5), (1.0, 0.0), (1.2, 0.0), (0.0, 0.1), (-0.2, 0.1), (0.5, -0.1)]


@pytest.mark.parametrize(("p", "alpha"), [*BEYOND, (math.nan, 0.1), (0.5, math.nan)])
def test_ranges_beyond_zero_and_one_are_refused(budget, p, alpha):
    with pytest.raises(ValueError, match=f"sparsity={p:g} and alpha={alpha:g} ask for .* from 0 to below 1") as caught:
        allocate([1.0, 2.0], [1, 1], p, alpha, budget=budget)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("p", "alpha"), BEYOND)
def test_the_advice_of_the_refusal_can_be_followed(budget, p, alpha):
    with pytest.raises(ValueError) as caught:
        allocate([1.0, 2.0], [1, 1], p, alpha, budget=budget)
    below = re.search(r"set alpha below (\S+)", str(caught.value))
    assert below is None or 0 < float(below[1]) <= alpha


def test_other_budgets_are_refused(budget):
    with pytest.raises(ValueError, match=f"budget 'un{budget}' is unknown; choose from weighted, shift, paper"):
        allocate([1.0], [1], 0.5, 0.1, budget="un" + budget)
