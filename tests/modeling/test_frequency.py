"""The cosine transform against SciPy's; directions and radii against their laws."""

import pytest
import scipy.fft
import scipy.stats
import torch
from dijiang_testing.model_checks import assert_close, rows

from dijiang.modeling.frequency import dct_matrix, frequency_matrix, orthogonal_rows, radii


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 101, 1024])
def test_dct_matrix_is_scipys_and_orthonormal(size):
    x = rows(7, size).double()
    expected = torch.from_numpy(scipy.fft.dct(x.numpy(), axis=-1, norm="ortho"))
    assert_close(x @ dct_matrix(size).T, expected, "dct", tolerance=1e-12)
    assert_close(dct_matrix(size) @ dct_matrix(size).T, torch.eye(size).double(), "orthonormal", tolerance=1e-12)


def test_inverse_direction_is_scipys_inverse_dct():
    x = rows(4, 8).double()
    expected = torch.from_numpy(scipy.fft.idct(x.numpy(), axis=-1, norm="ortho"))
    assert_close(x @ frequency_matrix(8, 8, "inverse", 0).double().T, expected, "idct", tolerance=1e-6)


def test_more_frequencies_than_the_head_size_span_new_orthonormal_blocks():
    C = frequency_matrix(20, 8, "forward", 3)
    for start in (0, 8):
        assert_close(C[start : start + 8] @ C[start : start + 8].T, torch.eye(8), "block", tolerance=1e-6)
    assert C.shape == (20, 8)
    assert len({tuple(row.tolist()) for row in C}) == 20
    assert not torch.equal(C[8:16], frequency_matrix(20, 8, "forward", 4)[8:16])


@pytest.mark.parametrize(("law", "distribution"), [("normal", scipy.stats.norm()), ("chi", scipy.stats.chi(64))])
def test_radii_are_quantiles(law, distribution):
    uniform = torch.linspace(0.001, 0.999, 57, dtype=torch.float64)
    assert_close(radii(uniform, 64, law), torch.from_numpy(distribution.ppf(uniform.numpy())), law, tolerance=1e-9)


@pytest.mark.parametrize(("count", "dim"), [(5, 8), (8, 8), (19, 8), (3, 1)])
def test_orthogonal_rows_are_orthonormal_in_blocks(count, dim):
    matrix = orthogonal_rows(count, dim, 3)
    assert matrix.shape == (count, dim)
    for start in range(0, count, dim):
        block = matrix[start : start + dim]
        assert_close(block @ block.T, torch.eye(len(block)).double(), "block", tolerance=1e-12)
    assert torch.equal(matrix, orthogonal_rows(count, dim, 3)) and (
        dim == 1 or not torch.equal(matrix, orthogonal_rows(count, dim, 4))
    )


def test_orthogonal_rows_have_no_preferred_direction():
    """The mean over many seeds is zero: QR without its signs would keep the first column's sign."""
    mean = torch.stack([orthogonal_rows(3, 3, seed) for seed in range(600)]).mean(0)
    assert mean.abs().max() < 5 * 3**-0.5 * 600**-0.5
