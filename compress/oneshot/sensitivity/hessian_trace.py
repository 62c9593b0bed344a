"""
How sharply the loss bends along each weight matrix: the trace of its diagonal block of the loss Hessian H, by Hutchinson's
estimator, Tr H_bb = E[z_b^T (H z)_b] for z of independent entries with mean 0 and variance 1 (arXiv 2310.09499, eqs. 5 and 6).
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

DISTRIBUTIONS = ("rademacher", "gaussian")
NORMALISATIONS = ("total", "mean")


def hutchinson(
    losses: Sequence[Callable[[], Tensor]],
    parameters: dict[str, nn.Parameter],
    *,
    probes: int,
    seed: int,
    distribution: str = "rademacher",
    groups: Sequence[Sequence[str]] | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, list[float]]:
    """
    Estimates of the trace of each parameter's block, one per probe; H z is the gradient of g^T z, g that of the loss.

    For block b the variance is 2 ||H_bb||_F^2 with a Gaussian z and 2 (||H_bb||_F^2 - sum_i H_ii^2) with one of signs
    (Rademacher), plus the sum of ||H_bc||_F^2 over the other blocks c of its group. Estimates, and the trace, may be negative.

    Args:
        losses: each gives the loss of one calibration sequence, the same at every call, and can be differentiated twice
            (eager attention, no cache); probe k takes number k modulo their count.
        parameters: by name. Only those of the group at work ask for gradients meanwhile; what else asks costs memory.
        probes: how many estimates.
        seed: z depends on it, the probe and the parameter's place in `parameters`, not on groups or device.
        distribution: of z, "rademacher" or "gaussian".
        groups: names that share a double backward, each name once: smaller groups are slower, and take less memory and have
            less variance. None: all together.
        advance: is told 1 after each probe of each group.

    Returns:
        By name, in the order of the probes, the estimated total (not mean) of the diagonal; 0 where the loss is independent
        of the parameter.

    Raises:
        ValueError: on no losses or probes, an unknown distribution, a parameter under two names, or groups that leave out a
            name or repeat one.
    """
    return _estimate(_double_backward, losses, parameters, probes, seed, distribution, groups, advance)


def finite_difference(
    losses: Sequence[Callable[[], Tensor]],
    parameters: dict[str, nn.Parameter],
    *,
    probes: int,
    seed: int,
    distribution: str = "rademacher",
    groups: Sequence[Sequence[str]] | None = None,
    advance: Callable[[int], None] = lambda n: None,
    step: float | None = None,
) -> dict[str, list[float]]:
    """
    As `hutchinson`, with the same z, from gradients alone: H z = (g(w + h z) - g(w - h z)) / 2h, up to O(h^2).

    Fused attention and gradient checkpointing will do. Weights change in place meanwhile; afterwards, also after an error,
    they are bit for bit what they were.

    Args:
        step: h. None: eps^(1/3) times the root mean square of the group's weights, eps the precision of their type, which
            balances the errors of rounding, ~ eps / h, and of the formula, ~ h^2 (z has a root mean square of 1). Give a
            larger one where the model is less precise than its weights: norms of transformers are float32 in float64 models.

    Raises:
        ValueError: as `hutchinson`; on a step that is not positive; on weights in less than float32, whose gradients are too
            coarse to subtract.
    """
    if step is not None and not step > 0:
        raise ValueError(f"step={step} must be positive; leave it out for one that suits the weights")
    for name, parameter in parameters.items():
        if torch.finfo(parameter.dtype).eps > torch.finfo(torch.float32).eps:
            raise ValueError(f"{name} is in {parameter.dtype}, too coarse for finite differences; load the model in float32")

    def product(loss, chosen, vectors):
        return _central_difference(loss, chosen, vectors, default_step(chosen) if step is None else step)

    return _estimate(product, losses, parameters, probes, seed, distribution, groups, advance)


def default_step(weights: Sequence[Tensor]) -> float:
    """eps^(1/3) times the root mean square of all weights together, or times 1 should they all be zero."""
    square = sum(w.detach().double().square().sum().item() for w in weights) / sum(w.numel() for w in weights)
    return max(torch.finfo(w.dtype).eps for w in weights) ** (1 / 3) * (math.sqrt(square) or 1.0)


def draw(parameter: Tensor, distribution: str, *key: int) -> Tensor:
    """A z for `parameter`, in its shape, type and device; drawn on the CPU, so that its values depend on `key` alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))  # it heeds no more than 32 bits
    if distribution == "gaussian":
        z = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    else:
        z = torch.randint(0, 2, parameter.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
    return z.to(parameter.device, parameter.dtype)


def split_half_correlation(estimates: dict[str, list[float]]) -> float | None:
    """
    Spearman's rank correlation, over the blocks, of the means of the even and of the odd estimates: how far another run would
    rank alike. None with fewer than 2 estimates or 3 blocks, and where a half is constant or not finite.
    """
    if len(estimates) < 3 or min(map(len, estimates.values())) < 2:
        return None
    halves = [[fmean(values[start::2]) for values in estimates.values()] for start in (0, 1)]
    if any(len(set(half)) < 2 or not all(map(math.isfinite, half)) for half in halves):
        return None
    return float(spearmanr(*halves).statistic)


def to_sensitivity(
    estimates: dict[str, list[float]], sizes: dict[str, int], normalisation: str = "total"
) -> tuple[dict[str, float], list[str]]:
    """
    The mean estimate of each matrix, with "mean" divided by its size, 0 where that is negative; and the names of those.

    Raises:
        ValueError: on an unknown normalisation, or estimates that are NaN or infinite; says of which matrix.
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation {normalisation!r} is unknown; choose from {', '.join(NORMALISATIONS)}")
    means = {}
    for name, values in estimates.items():
        refuse_not_finite(name, values)
        means[name] = fmean(values) / (sizes[name] if normalisation == "mean" else 1)
    return {name: max(mean, 0.0) for name, mean in means.items()}, [name for name, mean in means.items() if mean < 0]


def refuse_not_finite(name: str, values: Sequence[float]) -> None:
    """Raise ValueError if the sensitivity of this matrix is NaN or infinite."""
    if not all(map(math.isfinite, values)):
        raise ValueError(f"the sensitivity of {name} is NaN or infinite; check the model, or load it in float32")


def _estimate(product, losses, parameters, probes, seed, distribution, groups, advance) -> dict[str, list[float]]:
    """z_b^T (H z)_b by parameter and probe; `product(loss, chosen, vectors)` gives those of the chosen parameters."""
    if not losses or probes < 1:
        raise ValueError(f"{probes} probes of {len(losses)} losses estimate nothing; give at least one of each")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution {distribution!r} is unknown; choose from {', '.join(DISTRIBUTIONS)}")
    if len({*map(id, parameters.values())}) < len(parameters):
        raise ValueError("a parameter has two names; give each once")
    groups = [list(parameters)] if groups is None else groups
    if sorted(name for group in groups for name in group) != sorted(parameters):
        raise ValueError("the groups must hold the name of every parameter once, and no others")
    place, found = {name: i for i, name in enumerate(parameters)}, {name: [] for name in parameters}
    for k in range(probes):
        for group in filter(None, groups):
            chosen = [parameters[name] for name in group]
            vectors = [draw(parameters[name], distribution, seed, k, place[name]) for name in group]
            with _asking(parameters, chosen), torch.enable_grad():
                values = product(losses[k % len(losses)], chosen, vectors)
            for name, value in zip(group, values, strict=True):
                found[name].append(value)
            advance(1)
    return found


@contextmanager
def _asking(parameters: dict[str, nn.Parameter], chosen: list[nn.Parameter]) -> Iterator[None]:
    """Of the parameters only the chosen ask for gradients: no graph is kept for the others."""
    before, asking = {p: p.requires_grad for p in parameters.values()}, {*map(id, chosen)}
    try:
        for p in before:
            p.requires_grad_(id(p) in asking)
        yield
    finally:
        for p, asked in before.items():
            p.requires_grad_(asked)


def _gradients(value: Tensor, chosen: list[nn.Parameter], **options) -> Sequence[Tensor | None]:
    if not value.requires_grad:  # nothing chosen is in it
        return [None] * len(chosen)
    return torch.autograd.grad(value, chosen, allow_unused=True, **options)


def _dots(a: list[Tensor], b: Sequence[Tensor | None]) -> list[float]:
    pairs = zip(a, b, strict=True)
    return [0.0 if y is None else torch.dot(x.flatten().double(), y.flatten().double()).item() for x, y in pairs]


def _double_backward(loss, chosen, vectors) -> list[float]:
    gradients = _gradients(loss(), chosen, create_graph=True)
    # a loss linear in a parameter has a constant gradient, which cannot be differentiated
    curved = [(g, z) for g, z in zip(gradients, vectors, strict=True) if g is not None and g.requires_grad]
    if not curved:
        return [0.0] * len(chosen)
    outputs, weights = zip(*curved, strict=True)
    return _dots(vectors, torch.autograd.grad(outputs, chosen, grad_outputs=weights, allow_unused=True))


def _central_difference(loss, chosen, vectors, step) -> list[float]:
    saved = [p.detach().clone() for p in chosen]
    sides = []
    try:
        for h in (step, -step):
            with torch.no_grad():
                for p, w, z in zip(chosen, saved, vectors, strict=True):
                    p.copy_(w).add_(z, alpha=h)
            sides.append(_dots(vectors, _gradients(loss(), chosen)))  # numbers: the first gradients need not stay
    finally:
        with torch.no_grad():
            for p, w in zip(chosen, saved, strict=True):
                p.copy_(w)
    return [(plus - minus) / (2 * step) for plus, minus in zip(*sides, strict=True)]
