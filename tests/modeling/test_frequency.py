"""The cosine transforms against SciPy's and one another; directions and radii against their laws."""

import pytest
import scipy.fft
import scipy.stats
import torch
from dijiang_testing.model_checks import assert_close, rows

from dijiang.modeling import frequency
from dijiang.modeling.frequency import (
    dct,
    dct_by_fft,
    dct_by_matrix,
    dct_matrix,
    frequency_matrix,
    orthogonal_rows,
    radii,
)

DIRECTIONS = {"forward": scipy.fft.dct, "inverse": scipy.fft.idct}
FORMS = [dct_by_matrix, dct_by_fft]


@pytest.mark.parametrize("size", [1, 2, 5, 64, 100])
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


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 60, 63, 64, 101, 256, 1000, 1024, 2047])
def test_both_forms_are_scipys_transform(form, size, direction):
    x = rows(2, 5, 3, size, seed=size)
    expected = torch.from_numpy(DIRECTIONS[direction](x.double().numpy(), axis=-1, norm="ortho"))
    assert_close(form(x.double(), direction), expected, "float64", tolerance=1e-12)
    assert_close(form(x, direction), expected, "float32", tolerance=2e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("size", [1, 2, 3, 8, 31, 64])
def test_both_forms_have_the_same_gradient(size, direction):
    x, cotangent = rows(2, 5, size, seed=1).double(), rows(2, 5, size, seed=2).double()
    gradients = []
    for form in FORMS:
        leaf = x.clone().requires_grad_(True)
        form(leaf, direction).backward(cotangent)
        gradients.append(leaf.grad)
    assert_close(gradients[1], gradients[0], "gradient", tolerance=1e-12)
    assert torch.autograd.gradcheck(lambda x: dct_by_fft(x, direction), x[:1, :2].clone().requires_grad_(True))


@pytest.mark.parametrize("size", [9, 64])
def test_many_rows_go_through_in_pieces(size):
    x = rows(3 * frequency.FFT_PIECE + 5, size)
    for direction in DIRECTIONS:
        assert_close(dct_by_fft(x, direction), dct_by_matrix(x, direction), direction)


@pytest.mark.parametrize(
    ("shape", "device", "fast"),
    [
        ((64, 512), "cpu", True),
        ((8, 8, 513), "cpu", True),
        ((63, 512), "cpu", False),
        ((4096, 511), "cpu", False),
        ((64, 512), "meta", False),
    ],
)
def test_the_size_and_the_device_decide_the_form(monkeypatch, shape, device, fast):
    called = []
    monkeypatch.setattr(frequency, "dct_by_fft", lambda x, direction: called.append(direction))
    dct(torch.empty(shape, device=device), "forward")
    assert bool(called) == fast


def test_a_matrix_that_the_caller_keeps_gives_the_same():
    x = rows(3, 12)
    for direction in DIRECTIONS:
        assert torch.equal(dct(x, direction, dct_matrix(12).float()), dct(x, direction))


@pytest.mark.parametrize(("count", "dim"), [(5, 8), (8, 8), (19, 8), (3, 1)])
def test_orthogonal_rows_are_orthonormal_in_blocks(count, dim):
    found = orthogonal_rows(count, dim, 3)
    assert found.shape == (count, dim)
    for start in range(0, count, dim):
        block = found[start : start + dim]
        assert_close(block @ block.T, torch.eye(len(block)).double(), "block", tolerance=1e-12)
    assert torch.equal(found, orthogonal_rows(count, dim, 3)) and (
        dim == 1 or not torch.equal(found, orthogonal_rows(count, dim, 4))
    )


def test_orthogonal_rows_have_no_preferred_direction():
    """The mean over many seeds is zero: QR without its signs would keep the first column's sign."""
    mean = torch.stack([orthogonal_rows(3, 3, seed) for seed in range(600)]).mean(0)
    assert mean.abs().max() < 5 * 3**-0.5 * 600**-0.5
