"""The local Hessian and the factor of its inverse, also where it has none (oracle 1 of the specification)."""

import pytest
import torch
from dijiang_testing.pruning_oracles import damp, first_of_trailing_inverses, make_problem, normal, relative

from dijiang.compress.oneshot.hessian import LocalHessian, factorize

DTYPES = [(torch.float64, 1e-11), (torch.float32, 2e-3)]


@pytest.mark.parametrize("split", [[7], [1] * 7, [2, 4, 1], [6, 1]])
@pytest.mark.parametrize(("given", "dtype", "tolerance"), [("double", "double", 1e-14), ("bfloat16", "float", 1e-6)])
def test_any_split_gives_the_closed_form(split, given, dtype, tolerance):
    x, hessian = normal(7, 5, 6).to(getattr(torch, given)), LocalHessian(6, dtype=getattr(torch, dtype))
    before = x.clone()
    for part in x.split(split):
        hessian.add(part)
    X = x.double().reshape(35, 6).T
    assert hessian.samples == 7 and hessian.matrix.dtype == getattr(torch, dtype) and torch.equal(x, before)
    assert relative(hessian.matrix.double(), 2 / 7 * X @ X.T) < tolerance  # 7 sequences, not 35 tokens
    assert relative(hessian.norms.double() / hessian.norms[0], X.norm(dim=1) / X[0].norm()) < tolerance


@pytest.mark.parametrize("dead", [(), (0, 5)])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("share", [0.01, 0.3])
def test_factor_of_the_inverse(dtype, tolerance, share, dead):
    _, hessian = make_problem(1, 14, dtype=dtype, dead=dead)
    before = hessian.clone()
    factor = factorize(hessian, "q", damping=share)
    H, U = damp(hessian.double(), share), factor.upper.double()
    assert torch.equal(hessian, before) and factor.damping == share
    assert {factor.upper.dtype, factor.diagonal.dtype, factor.inverse_diagonal.dtype} == {dtype}
    assert factor.dead.nonzero().flatten().tolist() == list(dead)
    assert torch.equal(U, U.triu()) and relative(U.T @ U, torch.linalg.inv(H)) < tolerance
    assert relative(U.diagonal().square(), first_of_trailing_inverses(H)) < tolerance
    assert relative(factor.inverse_diagonal.double(), torch.linalg.inv(H).diagonal()) < tolerance
    assert relative(factor.diagonal.double(), H.diagonal()) < tolerance
    assert (factor.diagonal >= factor.inverse_diagonal.reciprocal() * (1 - tolerance)).all()


def test_one_column_and_only_dead_columns():
    factor = factorize(torch.tensor([[4.0]]), "q")
    assert factor.upper.item() == pytest.approx((4 * 1.01) ** -0.5) and factor.diagonal.item() == pytest.approx(4 * 1.01)
    assert factorize(torch.zeros(3, 3), "q").dead.all()


def test_factor_does_not_keep_the_whole_hessian_alive():
    assert factorize(make_problem(1, 50)[1], "q").diagonal.untyped_storage().nbytes() == 50 * 8


def with_negative_eigenvalue(size: float, dtype=torch.float64) -> torch.Tensor:
    """Identity with one eigenvalue -size, its mean diagonal 1."""
    H = torch.eye(5, dtype=dtype)
    H[1, 3] = H[3, 1] = 1 + size
    return H


@pytest.mark.parametrize(("size", "share"), [(0.0, 0.01), (0.05, 0.1), (0.5, 1.0), (5.0, 10.0)])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_damping_grows_tenfold_until_it_suffices_and_is_reported_as_it_is(size, share, dtype, tolerance):
    hessian = with_negative_eigenvalue(size, dtype)
    factor = factorize(hessian, "q")
    H = hessian.double() + share * torch.eye(5).double()
    assert factor.damping == pytest.approx(share, rel=1e-12) and factor.upper.dtype == dtype
    assert relative(factor.upper.double().T @ factor.upper.double(), torch.linalg.inv(H)) < tolerance
    assert relative(factor.diagonal.double(), H.diagonal()) < tolerance
    assert relative(factor.inverse_diagonal.double(), torch.linalg.inv(H).diagonal()) < tolerance


def test_damping_that_float32_cannot_resolve_is_not_rounded_in_the_retries():
    hessian = with_negative_eigenvalue(2.0**-20, torch.float32)  # 1e-7 is too little; 1e-6, in float64, suffices by 5e-8
    factor = factorize(hessian, "q", damping=1e-7)
    H = hessian.double() + 1e-6 * torch.eye(5).double()
    assert factor.damping == pytest.approx(1e-6)
    assert relative(factor.upper.double().T @ factor.upper.double(), torch.linalg.inv(H)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("hessian", "damping", "message"),
    [
        (with_negative_eigenvalue(50.0), 0.01, "Hessian of layers.3.up is singular, also with 10 of its mean"),
        (with_negative_eigenvalue(1e-3), 0.0, "Hessian of layers.3.up is singular, also with 0 of its mean"),
        (torch.full((4, 4), torch.nan), 0.01, "inputs of layers.3.up hold NaN or infinite"),
        (torch.diag(torch.tensor([1.0, torch.inf])), 0.01, "inputs of layers.3.up hold NaN or infinite"),
    ],
)
def test_hopeless_matrices_are_named(hessian, damping, message, dtype):
    with pytest.raises(ValueError, match=message) as caught:
        factorize(hessian.to(dtype), "layers.3.up", damping=damping)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("x", [normal(1, 4, 10), normal(1, 40, 5).repeat(1, 1, 2)], ids=["few tokens", "duplicate columns"])
def test_rank_deficient_inputs_need_no_more_than_the_damping(x, dtype, tolerance):
    hessian = LocalHessian(10, dtype=dtype)
    hessian.add(x.to(dtype))
    factor = factorize(hessian.matrix, "q")
    assert factor.damping == 0.01
    U = factor.upper.double()
    assert relative(U.T @ U, torch.linalg.inv(damp(hessian.matrix.double()))) < tolerance
    with pytest.raises(ValueError, match="Hessian of q is singular"):  # nothing to be made ten times as strong
        factorize(hessian.matrix - 1e-3 * torch.eye(10, dtype=dtype), "q", damping=0.0)
