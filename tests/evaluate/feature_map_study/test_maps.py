"""Frequencies, points and fitted weights of the feature map study against oracles."""

import math

import numpy as np
import pytest
from dijiang_testing.feature_maps import gaussian_rows, random_case
from scipy.optimize import nnls
from scipy.stats import qmc

from dijiang.evaluate.feature_map_study.inputs import Case, normal_radius_limit
from dijiang.evaluate.feature_map_study.maps import (
    FITS,
    MAPS,
    POINTS,
    estimate,
    features,
    lattice_vector,
    normal_equations,
    squared_error,
)


def mean_estimate(name: str, q: np.ndarray, k: np.ndarray, m: int, *, rotate: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean over many seeds of what the map gives for exp(q.k), and its standard error; `rotate` turns q and k by the seed."""
    d, estimates = q.shape[1], []
    for seed in range(300):
        rotation, triangle = np.linalg.qr(np.random.default_rng((9, seed)).standard_normal((d, d)))
        rotation = rotation * np.sign(np.diag(triangle)) if rotate else np.eye(d)
        estimates.append(estimate(q @ rotation, k @ rotation, MAPS[name](m, d, seed)))
    return np.mean(estimates, axis=0), np.std(estimates, axis=0) / math.sqrt(len(estimates))


@pytest.mark.parametrize("d", [3, 6])
@pytest.mark.parametrize("name", [name for name in MAPS if not name.endswith("normal")])
def test_maps_with_the_radius_of_a_normal_vector_are_unbiased(name, d):
    q, k = gaussian_rows(3, d, 0), gaussian_rows(2, d, 1)
    # the directions of WDCF are too few to be uniform, so it is unbiased only on average over directions of q and k
    mean, error = mean_estimate(name, q, k, 11, rotate=name.startswith("wdcf"))
    assert (np.abs(mean - np.exp(q @ k.T)) < 4 * error).all()


@pytest.mark.parametrize("name", [name for name in MAPS if name.endswith("normal")])
def test_maps_with_the_normal_radius_tend_to_the_closed_form(name):
    q, k = gaussian_rows(3, 5, 0, norm=1.5), gaussian_rows(2, 5, 1, norm=1.5)
    mean, error = mean_estimate(name, q, k, 11, rotate=name.startswith("wdcf"))
    case = Case(q, k)
    limit = normal_radius_limit(case) * np.exp(case.log_sum)[:, None]
    assert (np.abs(mean - limit) < 4 * error).all()
    assert (np.abs(mean - np.exp(q @ k.T)) > 10 * error).any()


@pytest.mark.parametrize("name", MAPS)
def test_frequencies_follow_the_seed(name):
    first = MAPS[name](13, 5, 3)
    assert first.shape == (13, 5) and first.dtype == np.float64 and np.isfinite(first).all()
    assert (first == MAPS[name](13, 5, 3)).all() and (first != MAPS[name](13, 5, 4)).any()


@pytest.mark.parametrize("name", ["orf", "wdcf-chi"])
@pytest.mark.parametrize(("m", "d"), [(3, 7), (14, 7), (17, 7)])
def test_blocks_of_d_frequencies_are_orthogonal(name, m, d):
    omega = MAPS[name](m, d, 1)
    directions = omega / np.linalg.norm(omega, axis=1, keepdims=True)
    for block in (directions[start : start + d] for start in range(0, m, d)):
        np.testing.assert_allclose(block @ block.T, np.eye(len(block)), atol=1e-6)


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize(("count", "dim"), [(64, 2), (97, 3), (200, 5)])
def test_points_are_of_low_discrepancy(name, count, dim):
    plain = [qmc.discrepancy(np.random.default_rng(seed).random((count, dim))) for seed in range(10)]
    for seed in range(3):
        points = POINTS[name](count, dim, seed)
        assert points.shape == (count, dim) and (points > 0).all() and (points < 1).all()
        assert qmc.discrepancy(points) < 0.5 * min(plain)


@pytest.mark.parametrize("count", [1, 2, 3, 12, 97])
def test_lattice_fills_every_axis_evenly(count):
    assert all(math.gcd(int(z), count) == 1 for z in lattice_vector(count, 4))
    points = POINTS["lattice"](count, 4, 5)
    assert (np.sort((points * count).astype(int) % count, axis=0) == np.arange(count)[:, None]).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_estimate_is_the_plain_sum(seed):
    case, omega = random_case(5, 7, 3, seed), gaussian_rows(11, 3, seed)
    weights = np.random.default_rng(seed).random(11)

    def phi(x, r):
        return math.exp(omega[r] @ x - x @ x / 2)

    for passed, used in ((weights, weights), (None, [1 / 11] * 11)):
        slow = [[sum(used[r] * phi(q, r) * phi(k, r) for r in range(11)) for k in case.k] for q in case.q]
        np.testing.assert_allclose(estimate(case.q, case.k, omega, passed), slow, rtol=1e-12)
        scaled = estimate(case.q, case.k, omega, passed, -case.log_sum)
        np.testing.assert_allclose(scaled, slow / np.exp(case.q @ case.k.T).sum(1, keepdims=True), rtol=1e-12)


@pytest.mark.parametrize("name", ["prf", "pff-sobol-chi", "pff-sobol-normal", "wdcf-chi", "wdcf-normal"])
@pytest.mark.parametrize(("seed", "norm", "m"), [(0, 0.5, 9), (1, 2.0, 33), (2, 5.0, 20)])
def test_fitted_weights_are_never_worse_than_equal_ones_on_their_own_pairs(name, seed, norm, m):
    case = Case(gaussian_rows(21, 7, seed, norm), gaussian_rows(19, 7, seed + 1, norm))
    omega = MAPS[name](m, 7, seed)
    phi_q, phi_k = features(case.q, omega, -case.log_sum), features(case.k, omega)
    equations = normal_equations(phi_q, phi_k, case.kernel)

    def error(weights: np.ndarray) -> float:
        return float(np.square((phi_q * weights) @ phi_k.T - case.kernel).sum() / np.square(case.kernel).sum())

    equal = np.full(m, 1 / m)
    fitted = {name: fit(*equations) for name, fit in FITS.items()}
    for weights in (equal, *fitted.values()):
        assert squared_error(*equations, weights) == pytest.approx(error(weights), rel=1e-6, abs=1e-9)
    assert (fitted["nnls"] >= 0).all() and (fitted["learnt"] > 0).all()
    assert error(fitted["nnls"]) <= error(fitted["learnt"]) + 1e-9 <= error(equal) + 2e-9
    design = (phi_q[:, None] * phi_k[None]).reshape(-1, m)
    _, residual = nnls(design, case.kernel.ravel())
    assert error(fitted["nnls"]) == pytest.approx(residual**2 / np.square(case.kernel).sum(), rel=1e-4, abs=1e-8)
