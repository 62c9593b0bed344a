"""Pruning one matrix without compensation: Wanda and magnitude (oracles 10 and 12)."""

import pytest
import torch
from dijiang_testing.pruning_oracles import make_inputs, normal

from dijiang.compress.oneshot.hessian import LocalHessian
from dijiang.compress.oneshot.prune_matrix import prune_uncompensated
from dijiang.compress.oneshot.quantize import RowGrid
from dijiang.compress.oneshot.scores import SCORES


def prune(name, weight, norms, **settings):
    """Prune by the score of this name."""
    score = SCORES[name]
    return prune_uncompensated(weight, score.scores(weight, norms), within_rows=score.within_rows, **settings)


def plain_wanda(W, X, share, pattern=None):
    """As its reference code does it."""
    metric = W.abs() * X.norm(dim=1)
    mask = torch.zeros_like(metric, dtype=torch.bool)
    if pattern is None:
        return mask.scatter_(1, torch.sort(metric, dim=-1, stable=True)[1][:, : int(W.shape[1] * share)], True)
    for start in range(0, W.shape[1], pattern[1]):
        columns = start + metric[:, start : start + pattern[1]].topk(pattern[0], dim=1, largest=False).indices
        mask.scatter_(1, columns, True)
    return mask


@pytest.mark.parametrize(("share", "columns"), [(0.5, 20), (0.25, 64), (0.75, 132), (0.0, 8)])
@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wanda(share, columns, pattern, dtype):
    W, X = normal(11, columns, seed=1).to(dtype), make_inputs(columns, seed=1).to(dtype)
    hessian, before = LocalHessian(columns, dtype=dtype), W.clone()
    hessian.add(X.T[None])
    ours = prune("wanda", W, hessian.norms, sparsity=share, pattern=pattern)
    expected = plain_wanda(W, X, share, pattern)
    assert torch.equal(ours.mask, expected) and torch.equal(ours.weight, W * ~expected)
    assert ours.loss is None and torch.equal(W, before)


@pytest.mark.parametrize("share", [0.0, 0.31, 0.5, 0.99])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_magnitude(share, dtype):
    W = normal(11, 20, seed=2).to(dtype)
    ours = prune("magnitude", W, None, sparsity=share)
    positions = W.abs().flatten().topk(round(220 * share), largest=False).indices
    assert ours.mask.flatten().nonzero().flatten().tolist() == sorted(positions.tolist())
    assert torch.equal(ours.weight, W * ~ours.mask)
    groups = prune("magnitude", W, None, sparsity=share, pattern=(3, 4))
    assert torch.equal(groups.mask, plain_wanda(W, torch.eye(20, dtype=dtype), 0, (3, 4)))


@pytest.mark.parametrize("score", ["magnitude", "wanda"])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_rounding_keeps_the_mask(score, pattern):
    W, norms = normal(11, 24, seed=4), torch.linspace(0.0, 3.0, 24, dtype=torch.float64)
    W[5] = 0
    W[2, 0] = 9.0  # as its input's norm is 0, Wanda removes it, yet it counts for the grid
    ours = prune(score, W, norms, sparsity=0.5, pattern=pattern, bits=3)
    plain = prune(score, W, norms, sparsity=0.5, pattern=pattern)
    assert torch.equal(ours.mask, plain.mask) and (ours.weight[ours.mask] == 0).all() and (ours.weight[5] == 0).all()
    grid = RowGrid(W, 3)
    assert torch.equal(ours.weight, torch.stack([grid.round(column) for column in plain.weight.unbind(1)], dim=1))


def test_one_row_and_one_column():
    W = torch.tensor([[3.0, -1.0, 2.0, -4.0]])
    assert prune("magnitude", W.T, None, sparsity=0.5).weight.T.tolist() == [[3.0, 0.0, 0.0, -4.0]]
    assert prune("wanda", W, torch.tensor([0.1, 9, 1, 1]), sparsity=0.5).weight.tolist() == [[0.0, -1.0, 0.0, -4.0]]
    assert prune("wanda", W.T, torch.tensor([2.0]), sparsity=0.5).mask.sum() == 2  # in rows of one weight
