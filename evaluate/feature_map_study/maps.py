"""
Frequencies of the feature maps that the study compares, and weights fitted to their features.

d head size, m features. A map is a matrix of frequencies omega (m, d), float64; its features are exp(omega_r.x - |x|^2 / 2)
(arXiv 2403.19928, equation 5), and sum_r w_r phi_r(q) phi_r(k) estimates exp(q.k), with w_r = 1 / m unless fitted.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from scipy.optimize import nnls
from scipy.special import ndtri
from scipy.stats import qmc

from dijiang.modeling.frequency import frequency_matrix, low_discrepancy, orthogonal_rows, radii

EDGE = 1e-6  # distance of uniform points from 0 and 1, whose quantiles are infinite
# in the quality of a lattice: the same for all coordinates, and small, so that pairs of coordinates matter most
COORDINATE_WEIGHT = 0.01
LEARNING_RATE, STEPS = 0.05, 300


def sobol(count: int, dim: int, seed: int) -> np.ndarray:
    """Scrambled Sobol points, (count, dim)."""
    return low_discrepancy(count, dim, seed).numpy()


def halton(count: int, dim: int, seed: int) -> np.ndarray:
    """Scrambled Halton points, (count, dim)."""
    return qmc.Halton(dim, scramble=True, rng=seed).random(count).clip(EDGE, 1 - EDGE)


def lattice(count: int, dim: int, seed: int) -> np.ndarray:
    """Points n z / count mod 1 of a good rank-1 lattice, shifted at random, (count, dim)."""
    shift = np.random.default_rng(seed).random(dim)
    steps = np.arange(count)[:, None] * lattice_vector(count, dim) % count
    return ((steps / count + shift) % 1.0).clip(EDGE, 1 - EDGE)


@lru_cache
def lattice_vector(count: int, dim: int) -> np.ndarray:
    """
    Generating vector z (dim,) int64 of a rank-1 lattice, built component by component so that each new entry has the least
    worst-case error (the P_2 criterion) together with the previous entries.
    """
    units = np.array([z for z in range(1, max(count // 2, 1) + 1) if np.gcd(z, count) == 1])  # z and count - z are equivalent
    x = np.arange(count) / count
    bernoulli = 2 * np.pi**2 * (x * x - x + 1 / 6)
    candidates = bernoulli[units[:, None] * np.arange(count) % count]
    product = np.ones(count)
    vector = []
    for _ in range(dim):
        best = (candidates @ product).argmin()
        vector.append(units[best])
        product *= 1 + COORDINATE_WEIGHT * candidates[best]
    return np.array(vector)


def random_frequencies(m: int, d: int, seed: int) -> np.ndarray:
    """Frequencies of PRF: independent rows of N(0, I_d)."""
    return np.random.default_rng(seed).standard_normal((m, d))


def orthogonal_frequencies(m: int, d: int, seed: int) -> np.ndarray:
    """Blocks of d orthogonal directions with independent radii, so that each row is N(0, I_d) (arXiv 2009.14794)."""
    radius = np.linalg.norm(np.random.default_rng(seed).standard_normal((m, d)), axis=1)
    return radius[:, None] * orthogonal_rows(m, d, seed).numpy()


def pff_frequencies(points: Callable, law: str) -> Callable[[int, int, int], np.ndarray]:
    """Frequencies of PFF and WPFF: the first of d + 1 coordinates of a point gives the radius, the others the direction."""

    def frequencies(m: int, d: int, seed: int) -> np.ndarray:
        uniform = points(m, d + 1, seed)
        directions = ndtri(uniform[:, 1:])
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        return radii(torch.from_numpy(uniform[:, 0].copy()), d, law).numpy()[:, None] * directions

    return frequencies


def wdcf_frequencies(law: str) -> Callable[[int, int, int], np.ndarray]:
    """Frequencies of WDCF: rows of the package's DCT matrix times Sobol radii, here with random signs that follow the seed."""

    def frequencies(m: int, d: int, seed: int) -> np.ndarray:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=d)
        radius = radii(low_discrepancy(m, 1, seed)[:, 0], d, law).numpy()
        return radius[:, None] * frequency_matrix(m, d, "forward", seed).double().numpy() * signs

    return frequencies


POINTS = {"sobol": sobol, "halton": halton, "lattice": lattice}
MAPS: dict[str, Callable[[int, int, int], np.ndarray]] = {
    "prf": random_frequencies,
    "orf": orthogonal_frequencies,
    **{f"pff-{name}-{law}": pff_frequencies(points, law) for law in ("chi", "normal") for name, points in POINTS.items()},
    **{f"wdcf-{law}": wdcf_frequencies(law) for law in ("chi", "normal")},
}
WEIGHTED = ("pff-sobol-chi", "pff-sobol-normal", "wdcf-chi", "wdcf-normal")  # the first two with weights are WPFF


def features(x: np.ndarray, omega: np.ndarray, log_scale: np.ndarray | float = 0.0) -> np.ndarray:
    """Features exp(omega_r.x - |x|^2 / 2 + log_scale), (n, m), of rows x (n, d) with log_scale (n,)."""
    return np.exp(x @ omega.T + (log_scale - np.square(x).sum(1) / 2)[:, None])


def estimate(
    q: np.ndarray, k: np.ndarray, omega: np.ndarray, weights: np.ndarray | None = None, log_scale: np.ndarray | float = 0.0
) -> np.ndarray:
    """Estimate (n, T) of exp(q.k + log_scale) by the features of omega (m, d); log_scale (n,), weights (m,) or equal ones."""
    weights = np.full(len(omega), 1 / len(omega)) if weights is None else weights
    return features(q, omega, log_scale) * weights @ features(k, omega).T


def normal_equations(phi_q: np.ndarray, phi_k: np.ndarray, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    G (m, m) and b (m,) such that 1 - 2 b.w + w.G w is the squared error of the weights w over all pairs, relative to the
    squared kernel, for phi_q (n, m), phi_k (T, m) and kernel (n, T).
    """
    scale = np.square(kernel).sum()
    return (phi_q.T @ phi_q) * (phi_k.T @ phi_k) / scale, ((kernel @ phi_k) * phi_q).sum(0) / scale


def squared_error(G: np.ndarray, b: np.ndarray, weights: np.ndarray) -> float:
    return max(float(weights @ (G @ weights) - 2 * b @ weights) + 1.0, 0.0)


def best_weights(G: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The non-negative weights (m,) of least squared error."""
    size = np.sqrt(np.diag(G))
    values, vectors = np.linalg.eigh(G / np.outer(size, size))
    large = values > 1e-13 * values[-1]
    root = np.sqrt(values[large])
    solution, _ = nnls(root[:, None] * vectors[:, large].T, vectors[:, large].T @ (b / size) / root)
    return solution / size


def learnt_weights(G: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The best weights (m,) on the path of Adam on their logarithms, from equal ones; torch's Adam takes ten times as long."""
    best = weights = np.full(len(b), 1 / len(b))
    best_error = np.inf
    log_weights = np.log(weights)
    mean = spread = np.zeros(len(b))
    for step in range(1, STEPS + 1):
        image = G @ weights
        if (error := weights @ (image - 2 * b)) < best_error:
            best = weights
            best_error = error
        gradient = 2 * weights * (image - b)
        mean = 0.9 * mean + 0.1 * gradient
        spread = 0.999 * spread + 0.001 * gradient**2
        log_weights = log_weights - LEARNING_RATE * mean / (1 - 0.9**step) / (np.sqrt(spread / (1 - 0.999**step)) + 1e-30)
        weights = np.exp(log_weights)
    return best


FITS = {"nnls": best_weights, "learnt": learnt_weights}
