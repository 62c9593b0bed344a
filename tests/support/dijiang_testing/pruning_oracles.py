"""References for the tests of pruning: slow and plain forms, written from the papers and not from our code."""

from itertools import combinations

import torch


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_inputs(columns: int, *, seed: int = 0, dead: tuple[int, ...] = ()) -> torch.Tensor:
    """X (C, tokens), correlated, each row of another size."""
    mix = torch.eye(columns) + normal(columns, columns, seed=seed) / columns**0.5
    sizes = normal(columns, 1, seed=seed + 1).abs() + 0.3
    X = sizes * (mix @ normal(columns, 3 * columns + 5, seed=seed + 2))
    X[list(dead)] = 0
    return X


def make_problem(rows: int, columns: int, *, seed: int = 0, dtype=torch.float64, dead: tuple[int, ...] = ()):
    """A random weight (R, C) and a Hessian (C, C) of one sequence, 2 X X^T."""
    X = make_inputs(columns, seed=seed, dead=dead)
    return normal(rows, columns, seed=1000 + seed).to(dtype), (2 * X @ X.T).to(dtype)


def damp(hessian: torch.Tensor, share: float = 0.01) -> torch.Tensor:
    """The Hessian that pruning works with: 1 for dead inputs, a share of the mean diagonal added."""
    H, every = hessian.clone(), torch.arange(len(hessian))
    H[every, every] = torch.where(H[every, every] == 0, 1.0, H[every, every])
    H[every, every] += share * H[every, every].mean()
    return H


def first_of_trailing_inverses(H: torch.Tensor) -> torch.Tensor:
    """[(H_{j:,j:})^-1]_00 for each j, (C,)."""
    return torch.stack([torch.linalg.inv(H[j:, j:])[0, 0] for j in range(len(H))])


def importance(score: str, H: torch.Tensor) -> torch.Tensor:
    """What a score multiplies squared weights by, from dense inverses of the damped H."""
    trailing = first_of_trailing_inverses(H)
    return {
        "obs": 1 / trailing,
        "obd": H.diagonal(),
        "isc": H.diagonal() + 1 / trailing,
        "isc-b": H.diagonal() + 1 / torch.linalg.inv(H).diagonal(),
        "isc-c": H.diagonal() + 1 / trailing.sqrt(),
    }[score]


def inverse_factor(H: torch.Tensor) -> torch.Tensor:
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)


def plain_sparsegpt(  # noqa: PLR0913
    weight, hessian, sparsity, *, block, score="obs", exact=False, by_matrix=False, row_weights=None, pattern=None, upper=None
):
    """
    Algorithm 1 of arXiv 2301.00774 row by row, mask by the reference's threshold (or `exact` counts, equal in all blocks or
    `by_matrix`, or N:M); returns weight and mask.
    """
    W = weight.clone()
    W[:, hessian.diagonal() == 0] = 0
    H = damp(hessian)
    U = inverse_factor(H) if upper is None else upper
    per_column = None if score == "obs" else importance(score, H)
    rows, columns = W.shape
    mask, gone = torch.zeros(rows, columns, dtype=torch.bool), 0

    def saliency(part, start, stop):
        per_row = 1 if row_weights is None else row_weights[:, None]
        if per_column is None:
            return part**2 / torch.diag(U)[start:stop] ** 2 * per_row
        return part**2 * per_column[start:stop] * per_row

    first = saliency(W, 0, columns).flatten().sort(stable=True).indices[: round(sparsity * rows * columns)] % columns
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        W1, U1, M1 = W[:, start:stop].clone(), U[start:stop, start:stop], mask[:, start:stop]
        Q, E = torch.zeros_like(W1), torch.zeros_like(W1)
        if pattern is None:
            metric = saliency(W1, start, stop)
            if exact:
                goal = int((first < stop).sum()) if by_matrix else round(sparsity * rows * stop)
                chosen = torch.zeros(metric.numel(), dtype=torch.bool)
                chosen[metric.reshape(-1).sort(stable=True).indices[: goal - gone]] = True
                M1.copy_(chosen.view(metric.shape))
                gone = goal
            else:
                ordered = torch.sort(metric.flatten())[0]
                M1.copy_(metric <= ordered[int(metric.numel() * sparsity)])
        for j in range(stop - start):
            if pattern and j % pattern[1] == 0:
                metric = saliency(W1[:, j : j + pattern[1]], start + j, start + j + pattern[1])
                M1.scatter_(1, j + metric.topk(pattern[0], dim=1, largest=False).indices, True)
            Q[:, j] = W1[:, j]
            Q[M1[:, j], j] = 0
            e = (W1[:, j] - Q[:, j]) / U1[j, j]
            W1[:, j:] -= e[:, None] * U1[j, j:]
            E[:, j] = e
        W[:, start:stop] = Q
        W[:, stop:] -= E @ U[start:stop, stop:]
    return W, mask


def obs_updates(weight: torch.Tensor, H: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Remove the masked weights from left to right, by eq. 3 with the inverse Hessian of its column and those after it."""
    W = weight.clone()
    for j in range(W.shape[1]):
        inverse = torch.linalg.inv(H[j:, j:])
        W[:, j:] -= torch.where(mask[:, j], W[:, j], 0.0)[:, None] * inverse[0] / inverse[0, 0]
        W[mask[:, j], j] = 0
    return W


def least_squares(w: torch.Tensor, X: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The row that is nearest w in output on X and zero where masked, and ||(it - w) X||^2."""
    best = torch.zeros_like(w)
    best[~mask] = torch.linalg.lstsq(X[~mask].T, (w @ X)[:, None]).solution[:, 0]
    return best, (best - w).matmul(X).square().sum().item()


def masks_of(columns: int, zeros: int) -> list[torch.Tensor]:
    """All masks with this many zeros."""
    masks = []
    for removed in combinations(range(columns), zeros):
        masks.append(torch.zeros(columns, dtype=torch.bool))
        masks[-1][list(removed)] = True
    return masks


def half_energy(D: torch.Tensor, H: torch.Tensor) -> float:
    """tr(D H D^T) / 2."""
    return (torch.trace(D.double() @ H.double() @ D.double().T) / 2).item()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, by the largest of b."""
    return ((a - b).abs().max() / b.abs().max()).item()


def below_threshold(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Mask of all scores up to the one at position share * size, that one included, as SparseGPT's code has it."""
    ordered = scores.flatten().sort().values
    return scores <= ordered[int(scores.numel() * share)]
