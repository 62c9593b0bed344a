"""The OBS update against a plain SparseGPT, brute force and its energy identity (oracles 2 to 6, 8, 10 and 12)."""

import pytest
import torch
from dijiang_testing import pruning_oracles as oracles
from dijiang_testing.pruning_oracles import (
    below_threshold,
    damp,
    least_squares,
    make_inputs,
    make_problem,
    normal,
    plain_sparsegpt,
    relative,
)

from dijiang.compress.oneshot import obs
from dijiang.compress.oneshot.allocate import allocate
from dijiang.compress.oneshot.config import BUDGETS, COMPARISONS
from dijiang.compress.oneshot.hessian import factorize
from dijiang.compress.oneshot.obs import prune_compensated
from dijiang.compress.oneshot.quantize import RowGrid
from dijiang.compress.oneshot.scores import SCORES

COMPENSATED = [name for name, score in SCORES.items() if score.column_weights]
SHAPES = [(5, 7, 3), (1, 24, 8), (17, 33, 8), (12, 130, 128), (6, 40, 40), (9, 1, 128), (3, 300, 128)]  # R, C, block


def assert_same(ours, expected):
    weight, mask = expected
    assert torch.equal(ours.mask, mask)
    assert torch.equal(ours.weight, weight)


@pytest.fixture
def prune_by_threshold(monkeypatch):
    """
    prune_by_threshold(weight, factor, sparsity, **settings): weights chosen as the reference code does it, by a threshold that
    takes one weight more per block and all that are equal to it, instead of by exact counts.
    """

    def prune(weight, factor, sparsity, **settings):
        with monkeypatch.context() as patched:
            patched.setattr(obs, "smallest", lambda scores, count: below_threshold(scores, sparsity))
            return prune_compensated(weight, factor, sparsity=sparsity, score="obs", **settings)

    return prune


@pytest.mark.parametrize(("rows", "columns", "block"), SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("seed", [0, 1])
def test_obs_is_plain_sparsegpt_bit_for_bit(prune_by_threshold, rows, columns, block, sparsity, seed):
    weight, hessian = make_problem(rows, columns, seed=seed, dead=(columns // 2,) if seed and columns > 1 else ())
    factor, settings = factorize(hessian, "q"), {} if block == 128 else {"block_size": block}  # 128 is the default
    ours = prune_by_threshold(weight, factor, sparsity, **settings)
    assert_same(ours, plain_sparsegpt(weight, hessian, sparsity, block=block))
    exact = prune_compensated(weight, factor, sparsity=sparsity, score="obs", **settings)
    assert_same(exact, plain_sparsegpt(weight, hessian, sparsity, block=block, exact=True))


@pytest.mark.parametrize(("rows", "columns", "block"), SHAPES)
def test_in_float32_too(prune_by_threshold, rows, columns, block):
    weight, hessian = make_problem(rows, columns, dtype=torch.float32)
    factor = factorize(hessian, "q")  # shared: a share of 0.01 is rounded differently
    ours = prune_by_threshold(weight, factor, 0.5, block_size=block)
    assert_same(ours, plain_sparsegpt(weight, hessian, 0.5, block=block, upper=factor.upper))
    assert ours.weight.dtype == torch.float32 and relative(factor.upper, oracles.inverse_factor(damp(hessian))) < 1e-4


@pytest.mark.parametrize(("rows", "columns", "block"), SHAPES[:-1])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.97])
@pytest.mark.parametrize("score", COMPENSATED)
def test_every_score_with_exact_counts(rows, columns, block, sparsity, score):
    weight, hessian = make_problem(rows, columns, seed=2)
    hessian /= 100  # H and its root are of one size
    ours = prune_compensated(weight, factorize(hessian, "q"), sparsity=sparsity, score=score, block_size=block)
    assert_same(ours, plain_sparsegpt(weight, hessian, sparsity, block=block, score=score, exact=True))
    for part in ours.mask.split(block, dim=1):
        assert abs(part.sum().item() - sparsity * part.numel()) <= 1
    assert abs(ours.mask.sum().item() - sparsity * weight.numel()) <= 0.5


@pytest.mark.parametrize(("rows", "columns", "block"), SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("score", COMPENSATED)
def test_shares_of_blocks_and_weights_of_rows(rows, columns, block, sparsity, score):
    weight, hessian = make_problem(rows, columns, seed=2, dead=(columns // 2,) if columns > 1 else ())
    hessian /= 100
    hessian *= (scales := 1 + torch.arange(columns)) * scales[:, None]  # columns that count more and more
    factor, per_row = factorize(hessian, "q"), normal(rows, seed=3).exp()
    settings = {"sparsity": sparsity, "score": score, "block_size": block}
    for row_weights in (None, per_row):
        ours = prune_compensated(weight, factor, **settings, comparison="matrix", row_weights=row_weights)
        expected = {"block": block, "score": score, "exact": True, "by_matrix": True, "row_weights": row_weights}
        assert_same(ours, plain_sparsegpt(weight, hessian, sparsity, **expected))
        assert ours.mask.sum() == round(sparsity * weight.numel())
    ours = prune_compensated(weight, factor, **settings, row_weights=per_row)
    assert_same(ours, plain_sparsegpt(weight, hessian, sparsity, block=block, score=score, exact=True, row_weights=per_row))


@pytest.mark.parametrize("comparison", COMPARISONS)
@pytest.mark.parametrize("score", COMPENSATED)
def test_a_weight_of_a_row_is_its_unit_squared(comparison, score):
    """Rows that are multiplied beforehand, and divided afterwards, are pruned as by the squares of the multiples."""
    weight, hessian = make_problem(9, 40, seed=5)
    factor, unit = factorize(hessian, "q"), 2.0 ** torch.arange(9, dtype=torch.float64).sub(4)[:, None]  # exact in binary
    settings = {"sparsity": 0.6, "score": score, "block_size": 8, "comparison": comparison}
    ours = prune_compensated(weight, factor, **settings, row_weights=unit.flatten().square())
    scaled = prune_compensated(weight * unit, factor, **settings)
    assert torch.equal(ours.mask, scaled.mask) and torch.equal(ours.weight, scaled.weight / unit)
    assert ours.mask.sum(1)[0] > 35 and ours.mask.sum(1)[-1] < 8
    plain = prune_compensated(weight, factor, **settings)
    same = prune_compensated(weight, factor, **settings, row_weights=torch.full((9,), 4.0).double())
    assert torch.equal(plain.weight, same.weight) and not torch.equal(plain.mask, ours.mask)


@pytest.mark.parametrize(("pattern", "block", "cut"), [((2, 4), 128, 128), ((4, 8), 20, 16), ((1, 4), 3, 4), ((3, 4), 30, 28)])
@pytest.mark.parametrize("score", COMPENSATED)
def test_patterns_against_a_plain_loop(pattern, block, cut, score):
    weight, hessian = make_problem(6, 136, seed=3, dead=(9,))
    ours = prune_compensated(weight, factorize(hessian, "q"), sparsity=0.9, pattern=pattern, score=score, block_size=block)
    assert_same(ours, plain_sparsegpt(weight, hessian, 0.9, block=cut, score=score, pattern=pattern))
    assert (ours.mask.view(6, -1, pattern[1]).sum(2) == pattern[0]).all()
    with pytest.raises((ValueError, RuntimeError)):  # 133 columns
        prune_compensated(weight[:, 3:], factorize(hessian[3:, 3:], "q"), sparsity=0.5, pattern=pattern)


@pytest.mark.parametrize("budget", BUDGETS)
def test_mixed_sparsity_of_no_width_is_uniform_bit_for_bit(prune_by_threshold, budget):
    shapes = [(6, 20), (4, 33), (9, 12)]
    shares = allocate([3.0, 1.0, 2.0], [R * C for R, C in shapes], 0.6, 0.0, budget=budget)
    for seed, ((rows, columns), share) in enumerate(zip(shapes, shares, strict=True)):
        weight, hessian = make_problem(rows, columns, seed=seed)
        ours = prune_by_threshold(weight, factorize(hessian, "q"), share, block_size=8)
        assert_same(ours, plain_sparsegpt(weight, hessian, 0.6, block=8))


@pytest.mark.parametrize("score", COMPENSATED)
@pytest.mark.parametrize("block", [3, 8, 24])
@pytest.mark.parametrize("bits", [None, 3])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_loss_is_the_energy_of_the_change(score, block, bits, pattern, dtype, tolerance):
    weight, hessian = make_problem(7, 24, seed=4, dtype=dtype, dead=(5,))
    factor = factorize(hessian, "q")
    arguments = [weight, factor.upper, factor.diagonal, factor.inverse_diagonal]
    before = [x.clone() for x in arguments]
    ours = prune_compensated(weight, factor, sparsity=0.6, score=score, block_size=block, bits=bits, pattern=pattern)
    assert all(map(torch.equal, arguments, before)) and (ours.weight[ours.mask] == 0).all() and (ours.weight[:, 5] == 0).all()
    H, alive = damp(hessian.double()), weight.double().index_fill(1, torch.tensor(5), 0)
    D = ours.weight.double() - alive
    assert ours.loss == pytest.approx(torch.trace(D @ H @ D.T).item() / 2, rel=tolerance)
    if not bits:
        assert relative(ours.weight.double(), oracles.obs_updates(alive, H, ours.mask)) < 10 * tolerance


@pytest.mark.parametrize("column", range(6))
def test_one_weight_is_removed_as_brute_force_does(column):
    X = make_inputs(6, seed=5).roll(column, 0)
    w = normal(1, 6, seed=column).sign()
    w[0, 0] = 1e-3  # the smallest by any score
    factor, inverse = factorize(2 * X @ X.T, "q", damping=0.0), torch.linalg.inv(2 * X @ X.T)
    ours = prune_compensated(w, factor, sparsity=1 / 6)
    best, cost = least_squares(w[0], X, torch.arange(6) == 0)
    assert ours.mask[0].tolist() == [True] + 5 * [False] and relative(ours.weight[0], best) < 1e-12
    assert relative(ours.weight - w, -w[0, 0] / inverse[0, 0] * inverse[:1]) < 1e-9  # eq. 3
    assert ours.loss == pytest.approx(cost, rel=1e-9)
    assert ours.loss == pytest.approx(1e-6 * SCORES["obs"].column_weights(factor)[0].item() / 2, rel=1e-9)
    assert (1e-3 * X[0]).square().sum().item() == pytest.approx(
        1e-6 * SCORES["obd"].column_weights(factor)[0].item() / 2, rel=1e-9
    )
    for other in range(6):  # the whole inverse's diagonal: what any one weight costs
        whole = SCORES["isc-b"].column_weights(factor)[other] - SCORES["obd"].column_weights(factor)[other]
        _, cost = least_squares(w[0], X, torch.arange(6) == other)
        assert (w[0, other] ** 2 * whole / 2).item() == pytest.approx(cost, rel=1e-8)


@pytest.mark.parametrize("zeros", [1, 3, 7])
def test_prefix_masks_give_restricted_least_squares(zeros):
    X, W, mask = make_inputs(8, seed=6), normal(4, 8), torch.arange(8) < zeros
    W[:, :zeros] *= 1e-3
    for block in (2, 8):
        ours = prune_compensated(
            W, factorize(2 * X @ X.T, "q", damping=0.0), sparsity=0.0, pattern=(zeros, 8), block_size=block
        )
        best, costs = zip(*(least_squares(w, X, mask) for w in W), strict=True)
        assert torch.equal(ours.mask, mask.expand(4, 8)) and relative(ours.weight - W, torch.stack(best) - W) < 1e-9
        assert ours.loss == pytest.approx(sum(costs), rel=1e-9)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_mask_of_four_in_eight_beats_the_best_of_all_seventy(seed):
    X, W, masks = make_inputs(8, seed=seed), normal(4, 8, seed=seed), oracles.masks_of(8, 4)
    assert len(masks) == 70
    bounds = [min(least_squares(w, X, mask)[1] for mask in masks) * (1 - 1e-9) for w in W]
    for score in COMPENSATED:
        for pattern in [(4, 8), (2, 4)]:
            ours = prune_compensated(W, factorize(2 * X @ X.T, "q", damping=0.0), sparsity=0.5, score=score, pattern=pattern)
            costs = (ours.weight - W).matmul(X).square().sum(1)
            assert (ours.mask.sum(1) == 4).all() and all(cost >= bound for cost, bound in zip(costs, bounds, strict=True))
            assert ours.loss == pytest.approx(costs.sum().item(), rel=1e-9)
    for w, bound in zip(W, bounds, strict=True):  # greedy, with a new inverse for the columns that remain
        mask, row = torch.zeros(8, dtype=torch.bool), w
        for _ in range(4):
            part = factorize(2 * X[~mask] @ X[~mask].T, "q", damping=0.0)
            column = torch.arange(8)[~mask][(row[~mask].square() / part.inverse_diagonal).argmin()]
            costs = [least_squares(w, X, mask | (torch.arange(8) == m))[1] for m in torch.arange(8)[~mask]]
            mask[column] = True
            row, cost = least_squares(w, X, mask)
            assert cost == pytest.approx(min(costs), rel=1e-8)  # the score finds the best next one
        assert cost >= bound


@pytest.mark.parametrize("score", COMPENSATED)
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_the_unit_of_the_inputs_changes_nothing_but_isc_c(score, pattern):
    weight, hessian = make_problem(16, 24, seed=8)
    once, scaled = (
        prune_compensated(weight, factorize(H, "q"), sparsity=0.5, score=score, block_size=8, pattern=pattern)
        for H in (hessian / 200, 7 * hessian / 200)
    )
    assert torch.equal(once.mask, scaled.mask) == (score != "isc-c")
    if score != "isc-c":
        assert relative(scaled.weight, once.weight) < 1e-11 and scaled.loss == pytest.approx(7 * once.loss, rel=1e-11)


@pytest.mark.parametrize("block", [3, 24])
def test_uncorrelated_inputs_make_obs_obd_and_isc_one(block):
    weight, hessian = make_problem(16, 24, seed=9)
    factor = factorize(torch.diag(hessian.diagonal() / 200), "q")
    *others, literal = (
        prune_compensated(weight, factor, sparsity=0.4, score=score, block_size=block)
        for score in ("obs", "obd", "isc", "isc-b", "isc-c")
    )
    for one in others:
        assert torch.equal(one.mask, others[0].mask) and torch.equal(one.weight, weight.masked_fill(one.mask, 0))
    assert not torch.equal(literal.mask, others[0].mask)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounding_is_on_the_dense_grid_and_keeps_the_mask(bits, pattern, dtype):
    weight, hessian = make_problem(6, 300, seed=10, dtype=dtype, dead=(4,))
    weight[2] = 0
    weight[3].abs_()
    ours = prune_compensated(weight, factorize(hessian, "q"), sparsity=0.4, bits=bits, pattern=pattern)
    assert (ours.weight[ours.mask] == 0).all() and (ours.weight[2] == 0).all() and (ours.weight[:, 4] == 0).all()
    grid = RowGrid(weight, bits)
    for r, row in enumerate(ours.weight):
        levels = grid.scale[r] * (torch.arange(2**bits, dtype=dtype) - grid.zero[r])
        assert torch.isin(row, levels).all() and len(row.unique()) <= 2**bits
    assert ours.mask.sum() == (900 if pattern else 720)
    assert bits == 8 or (ours.weight == 0).sum() > ours.mask.sum()  # zeros by rounding are not in the mask


@pytest.mark.parametrize("score", COMPENSATED)
def test_edges(score):
    weight, hessian = make_problem(5, 300, seed=11, dtype=torch.float32)
    ours = prune_compensated(weight, factorize(hessian, "q"), sparsity=0.0, score=score)
    assert torch.equal(ours.weight, weight) and not ours.mask.any() and ours.loss == 0.0
    assert ours.weight.data_ptr() != weight.data_ptr()
    column = torch.tensor([[3.0], [-1.0], [2.0], [-4.0], [0.5]])
    ours = prune_compensated(column, factorize(torch.tensor([[2.0]]), "q"), sparsity=0.4, score=score)
    assert ours.weight.flatten().tolist() == [3.0, 0.0, 2.0, -4.0, 0.0]
    assert ours.loss == pytest.approx((1 + 0.25) * 2 * 1.01 / 2, rel=1e-6)
    stored = prune_compensated(weight.bfloat16().float(), factorize(hessian, "q"), sparsity=0.7, score=score)
    assert torch.equal(stored.weight.bfloat16() == 0, stored.mask) and stored.mask.sum() == 1050


@pytest.mark.parametrize("score", COMPENSATED)
def test_dead_columns_and_rows_of_zeros_go_first(score):
    weight, hessian = make_problem(4, 20, seed=12, dead=(0, 7, 19))
    weight[1] = 0
    ours = prune_compensated(weight, factorize(hessian, "q"), sparsity=0.5, score=score, block_size=8)
    assert ours.mask[:, [0, 7, 19]].all() and ours.mask[1].all() and torch.isfinite(ours.weight).all()
    assert torch.equal(ours.weight == 0, ours.mask) and ours.mask.sum() == 40
    nothing = prune_compensated(weight, factorize(torch.zeros(20, 20).double(), "q"), sparsity=0.5, score=score)
    assert (nothing.weight == 0).all() and nothing.loss == 0.0
