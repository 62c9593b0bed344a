"""Which weights go, by number and position (oracles 10 and 12)."""

import random

import pytest
import torch
from dijiang_testing.pruning_oracles import normal

from dijiang.compress.oneshot.masks import ExactCount, smallest, smallest_in_groups, smallest_in_rows


def draw_scores(rows, columns, levels):
    """Random scores; with `levels`, of that many values, many of them equal."""
    values = normal(rows, columns).abs()
    return (values * levels).floor().clamp(max=levels - 1) if levels else values


@pytest.mark.parametrize("seed", range(40))
def test_counts_are_never_off_by_more_than_a_half_in_total(seed):
    choose = random.Random(seed)
    share = choose.choice([0.0, 0.5, 1 / 3, 0.7, 0.999, choose.random()])
    counter = ExactCount(share)
    seen = total = 0
    for _ in range(60):
        size = choose.choice([0, 1, 2, 3, choose.randrange(5000)])
        count = counter.of(size)
        seen += size
        total += count
        assert type(count) is int and 0 <= count <= size
        assert abs(total - share * seen) <= 0.5 + 1e-9 and abs(count - share * size) <= 1 + 1e-9


def test_counts_grow_with_the_share():
    totals = []
    for step in range(100):
        counter = ExactCount(step / 100)
        totals.append(sum(counter.of(size) for size in (7, 1, 5, 1, 11)))
    assert totals == sorted(totals) and totals[0] == 0 and totals[99] == 25


@pytest.mark.parametrize("count", [0, 1, 17, 59, 60])
def test_smallest_takes_the_first_of_equals(count):
    scores = draw_scores(5, 12, levels=4)
    first = sorted(range(60), key=lambda position: (scores.flatten()[position].item(), position))[:count]
    for layout in (scores, scores.T.contiguous().T):  # strides must not matter
        assert smallest(layout, count).flatten().nonzero().flatten().tolist() == sorted(first)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.77])
@pytest.mark.parametrize("levels", [0, 3])
def test_smallest_in_rows(share, levels):
    scores, counter = draw_scores(9, 13, levels), ExactCount(share)
    mask = smallest_in_rows(scores, share)
    assert torch.equal(mask, torch.stack([smallest(row, counter.of(13)) for row in scores]))
    assert abs(mask.sum().item() - share * 117) <= 0.5 and ((mask.sum(1) - share * 13).abs() <= 1).all()


@pytest.mark.parametrize(("zeros", "group"), [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (7, 8), (1, 24)])
@pytest.mark.parametrize("levels", [0, 1, 3])
def test_smallest_in_groups(zeros, group, levels):
    scores = draw_scores(7, 24, levels)
    expected = torch.stack([smallest(part, zeros) for part in scores.reshape(-1, group)])
    assert torch.equal(smallest_in_groups(scores, zeros, group), expected.view(7, 24)) and (expected.sum(1) == zeros).all()
    with pytest.raises((ValueError, RuntimeError)):
        smallest_in_groups(scores[:, 1:], zeros, group)
