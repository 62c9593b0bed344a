"""Random cases of the feature map study."""

import math

import numpy as np

from dijiang.evaluate.feature_map_study.inputs import Case


def gaussian_rows(rows: int, d: int, seed: int, norm: float = 1.0) -> np.ndarray:
    return norm * np.random.default_rng(seed).standard_normal((rows, d)) / math.sqrt(d)


def random_case(n: int, T: int, d: int, seed: int, norm: float = 1.0) -> Case:
    q, k, v = gaussian_rows(n, d, seed, norm), gaussian_rows(T, d, seed + 1, norm), gaussian_rows(T, d, seed + 2)
    return Case(q, k, v, np.sort(np.random.default_rng(seed).integers(0, T, n)), gaussian_rows(1, T, seed + 3)[0])
