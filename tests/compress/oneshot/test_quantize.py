"""The rounding grid: the nearest level of each row, with zero among the levels."""

import pytest
import torch
from dijiang_testing.pruning_oracles import normal

from dijiang.compress.oneshot.quantize import RowGrid


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
    with pytest.raises(ValueError, match=f"bits={bits} must lie between 2 and 8"):
        RowGrid(torch.ones(2, 2), bits)
