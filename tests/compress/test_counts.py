"""Which weights go: counts, thresholds, patterns; the rounding grid; Wanda and magnitude (oracles 10 and 12)."""

import random

import pytest
import torch
from dijiang_testing.pruning_oracles import make_inputs, normal

from dijiang.compress.oneshot import masks as counts
from dijiang.compress.oneshot.hessian import LocalHessian
from dijiang.compress.oneshot.masks import ExactCount, below_threshold, smallest, smallest_in_groups
from dijiang.compress.oneshot.quantize import RowGrid
from dijiang.compress.oneshot.wanda import prune_uncompensated


def draw_scores(rows, columns, levels):
    """Random, or of so many values, many of them equal."""
    values = normal(rows, columns).abs()
    return (values * levels).floor().clamp(max=levels - 1) if levels else values


@pytest.mark.parametrize("seed", range(40))
def test_counts_are_never_off_by_more_than_a_half_in_total(seed):
    choose = random.Random(seed)
    share = choose.choice([0.0, 0.5, 1 / 3, 0.7, 0.999, choose.random()])
    counter, seen, cut = ExactCount(share), 0, 0
    for _ in range(60):
        size = choose.choice([0, 1, 2, 3, choose.randrange(5000)])
        count = counter.of(size)
        seen, cut = seen + size, cut + count
        assert type(count) is int and 0 <= count <= size
        assert abs(cut - share * seen) <= 0.5 + 1e-9 and abs(count - share * size) <= 1 + 1e-9


def test_counts_grow_with_the_share():
    totals = []
    for step in range(100):
        counter = ExactCount(step / 100)
        totals.append(sum(counter.of(size) for size in (7, 1, 5, 1, 11)))
    assert totals == sorted(totals) and totals[0] == 0 and totals[99] == 25


@pytest.mark.parametrize("count", [0, 1, 17, 59, 60])
def test_smallest_takes_the_first_of_equals(count):
    scores = draw_scores(5, 12, levels=4)
    first = sorted(range(60), key=lambda place: (scores.flatten()[place].item(), place))[:count]
    for given in (scores, scores.T.contiguous().T):  # whatever the strides
        assert smallest(given, count).flatten().nonzero().flatten().tolist() == sorted(first)


def test_threshold_takes_one_more_and_all_its_equals():
    assert below_threshold(torch.tensor([[3.0, 1.0], [2.0, 2.0]]), 0.25).tolist() == [[False, True], [True, True]]
    assert [below_threshold(draw_scores(7, 9, 0), share).sum().item() for share in (0.0, 0.1, 0.5, 0.99)] == [1, 7, 32, 63]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.77])
@pytest.mark.parametrize("levels", [0, 3])
def test_smallest_in_rows(share, levels):
    scores, counter = draw_scores(9, 13, levels), ExactCount(share)
    mask = counts.smallest_in_rows(scores, share)
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


def test_patterns_are_read():
    assert [counts.parse_pattern(text) for text in ("2:4", "1:4", "04:8", "15:16")] == [(2, 4), (1, 4), (4, 8), (15, 16)]


@pytest.mark.parametrize("text", ["", "2", "2:", ":4", "0:4", "4:4", "5:4", "-2:4", "2:4:8", "2 : 4", "2:4\n", "a:b", "2.0:4"])
def test_other_patterns_are_refused(text):
    with pytest.raises(ValueError, match="N zeros in every M weights; write for example 2:4") as caught:
        counts.parse_pattern(text)
    assert repr(text) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_grid_rounds_to_the_nearest_of_its_levels(bits, dtype):
    weight = normal(5, 200, seed=bits).to(dtype)
    weight[1].abs_()
    weight[2] = -5 - weight[2].abs()  # far from 0, which is a level all the same
    weight[3] = 0
    grid = RowGrid(weight, bits)
    rounded = torch.stack([grid.round(column) for column in weight.unbind(1)], dim=1)
    beyond, small = grid.round(torch.full((5,), 1e4, dtype=dtype)), torch.finfo(dtype).eps * 2**bits
    for r, (row, scale) in enumerate(zip(weight, grid.scale, strict=True)):
        levels = scale * (torch.arange(2**bits, dtype=dtype) - grid.zero[r])
        nearest = (row[:, None] - levels).abs().amin(1)
        assert torch.isin(rounded[r], levels).all() and len(rounded[r].unique()) <= 2**bits and (levels == 0).any()
        assert ((rounded[r] - row).abs() <= nearest + small * scale).all() and (nearest <= scale / 2 * (1 + small)).all()
        length = max(row.max().item(), 0) - min(row.min().item(), 0)
        assert r == 3 or scale.item() == pytest.approx(length / (2**bits - 1), rel=1e-6)
        assert beyond[r] == levels[-1]
    assert (rounded[3] == 0).all() and (grid.round(torch.zeros(5, dtype=dtype)) == 0).all()


@pytest.mark.parametrize("bits", [-1, 1, 9, 16])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits={bits} must be from 2 to 8"):
        RowGrid(torch.ones(2, 2), bits)


def plain_wanda(W, X, share, pattern=None):
    """As its reference code does it."""
    metric = W.abs() * X.norm(dim=1)
    mask = torch.zeros_like(metric, dtype=torch.bool)
    if pattern is None:
        return mask.scatter_(1, torch.sort(metric, dim=-1, stable=True)[1][:, : int(W.shape[1] * share)], True)
    for start in range(0, W.shape[1], pattern[1]):
        places = start + metric[:, start : start + pattern[1]].topk(pattern[0], dim=1, largest=False).indices
        mask.scatter_(1, places, True)
    return mask


@pytest.mark.parametrize(("share", "columns"), [(0.5, 20), (0.25, 64), (0.75, 132), (0.0, 8)])
@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wanda(share, columns, pattern, dtype):
    W, X = normal(11, columns, seed=1).to(dtype), make_inputs(columns, seed=1).to(dtype)
    hessian, before = LocalHessian(columns, dtype=dtype), W.clone()
    hessian.add(X.T[None])
    ours, expected = prune_uncompensated(W, hessian.norms, sparsity=share, pattern=pattern), plain_wanda(W, X, share, pattern)
    assert torch.equal(ours.mask, expected) and torch.equal(ours.weight, W * ~expected)
    assert ours.loss is None and torch.equal(W, before)


@pytest.mark.parametrize("share", [0.0, 0.31, 0.5, 0.99])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_magnitude(share, dtype):
    W = normal(11, 20, seed=2).to(dtype)
    ours = prune_uncompensated(W, None, sparsity=share)
    places = W.abs().flatten().topk(round(220 * share), largest=False).indices
    assert ours.mask.flatten().nonzero().flatten().tolist() == sorted(places.tolist())
    assert torch.equal(ours.weight, W * ~ours.mask)
    groups = prune_uncompensated(W, None, sparsity=share, pattern=(3, 4))
    assert torch.equal(groups.mask, plain_wanda(W, torch.eye(20, dtype=dtype), 0, (3, 4)))


@pytest.mark.parametrize("norms", [None, torch.linspace(0.0, 3.0, 24, dtype=torch.float64)])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_rounding_keeps_the_mask(norms, pattern):
    W = normal(11, 24, seed=4)
    W[5], W[2, 0] = 0, 9.0  # its input's norm is 0: it goes, yet counts for the grid
    ours = prune_uncompensated(W, norms, sparsity=0.5, pattern=pattern, bits=3)
    plain = prune_uncompensated(W, norms, sparsity=0.5, pattern=pattern)
    assert torch.equal(ours.mask, plain.mask) and (ours.weight[ours.mask] == 0).all() and (ours.weight[5] == 0).all()
    grid = RowGrid(W, 3)
    assert torch.equal(ours.weight, torch.stack([grid.round(column) for column in plain.weight.unbind(1)], dim=1))


def test_one_row_and_one_column():
    W = torch.tensor([[3.0, -1.0, 2.0, -4.0]])
    assert prune_uncompensated(W.T, None, sparsity=0.5).weight.T.tolist() == [[3.0, 0.0, 0.0, -4.0]]
    assert prune_uncompensated(W, torch.tensor([0.1, 9, 1, 1]), sparsity=0.5).weight.tolist() == [[0.0, -1.0, 0.0, -4.0]]
    assert prune_uncompensated(W.T, torch.tensor([2.0]), sparsity=0.5).mask.sum() == 2  # in rows of one weight
