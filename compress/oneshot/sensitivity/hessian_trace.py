"""
How sharply the loss bends along each weight matrix: the trace of its diagonal block of the loss Hessian H, by Hutchinson's
estimator, Tr H_bb = E[z_b^T (H z)_b] for z of independent entries with mean 0 and variance 1 (arXiv 2310.09499, eqs. 5 and 6).
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...streamed_decoder import StreamedDecoder

Loss = Callable[[], Tensor]
# product(loss, chosen, vectors) -> z_b^T (H z)_b for each chosen parameter and its vector z_b
Product = Callable[[Loss, list[nn.Parameter], list[Tensor]], list[float]]


def model_traces(
    product: Product,
    decoder: StreamedDecoder,
    blocks: Tensor,
    *,
    probes: int,
    seed: int,
    by_layer: bool,
    advance: Callable[[float], None],
) -> dict[str, list[float]]:
    """
    `trace_estimates` of all pruned matrices of a model, which is in memory as a whole meanwhile.

    Args:
        blocks: token ids (N, T).
        by_layer: probe one decoder layer at a time.
        advance: adds a share of the work to the progress.

    Raises:
        ValueError: if the GPU's memory is too small, or the model cannot be differentiated twice.
    """
    groups = decoder.targets if by_layer else [[name for layer in decoder.targets for name in layer]]
    share = 1 / (probes * len(groups))
    with decoder.whole() as model:
        weights = {name: model.get_parameter(f"{name}.weight") for layer in decoder.targets for name in layer}

        def loss(row: Tensor) -> Tensor:
            tokens = row[None].to(decoder.device)
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

        losses = [lambda row=row: loss(row) for row in blocks]
        try:
            return trace_estimates(
                product, losses, weights, probes=probes, seed=seed, groups=groups, advance=lambda n: advance(n * share)
            )
        except torch.OutOfMemoryError:  # of a GPU
            raise ValueError(
                f"the GPU's memory does not hold {decoder.name} with its gradients; probe by layer, or use sensitivity fisher"
            ) from None
        except RuntimeError as error:
            if "derivative for" not in str(error):
                raise
            raise ValueError(f"{decoder.name} cannot be differentiated twice; use sensitivity fisher") from None


def trace_estimates(
    product: Product,
    losses: Sequence[Loss],
    parameters: dict[str, nn.Parameter],
    *,
    probes: int,
    seed: int,
    groups: Sequence[Sequence[str]] | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, list[float]]:
    """
    Estimate the trace of each parameter's block, once per probe, with z of random signs (Rademacher).

    For block b the variance is 2 (||H_bb||_F^2 - sum_i H_ii^2), plus the sum of ||H_bc||_F^2 over the other blocks c of its
    group. Estimates, and the trace, may be negative.

    Args:
        product: `double_backward` or `central_difference`.
        losses: each returns the loss of one calibration sequence, the same at every call; probe k takes number k modulo their
            count.
        parameters: by name. Only those of the current group require gradients meanwhile.
        probes: number of estimates.
        seed: z depends on it, the probe and the parameter's position in `parameters`, not on groups or device.
        groups: names that share a product, each name once. Smaller groups are slower, take less memory and have less variance.
            None: all together.
        advance: is called with 1 after each probe of each group.

    Returns:
        By name, in the order of the probes, the estimated total (not mean) of the diagonal; 0 for a parameter that does not
        affect the loss.

    Raises:
        ValueError: on no losses or probes, a parameter under two names, or groups that leave out a name or repeat one.
    """
    if not losses or probes < 1:
        raise ValueError(f"{probes} probes of {len(losses)} losses estimate nothing; give at least one of each")
    if len({*map(id, parameters.values())}) < len(parameters):
        raise ValueError("a parameter has two names; give each once")
    groups = [list(parameters)] if groups is None else groups
    if sorted(name for group in groups for name in group) != sorted(parameters):
        raise ValueError("the groups must hold the name of every parameter once, and no others")
    positions = {name: i for i, name in enumerate(parameters)}
    estimates: dict[str, list[float]] = {name: [] for name in parameters}
    for k in range(probes):
        for group in filter(None, groups):
            chosen = [parameters[name] for name in group]
            vectors = [draw_signs(parameters[name], seed, k, positions[name]) for name in group]
            with requires_grad_only(chosen, parameters.values()), torch.enable_grad():
                values = product(losses[k % len(losses)], chosen, vectors)
            for name, value in zip(group, values, strict=True):
                estimates[name].append(value)
            advance(1)
    return estimates


def draw_signs(parameter: Tensor, *key: int) -> Tensor:
    """Random -1 and 1 in the parameter's shape, dtype and device; drawn on the CPU, so that they depend on `key` alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))  # it uses no more than 32 bits
    signs = torch.randint(0, 2, parameter.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
    return signs.to(parameter.device, parameter.dtype)


@contextmanager
def requires_grad_only(chosen: Iterable[nn.Parameter], parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block, no other of these parameters requires gradients, so that no graph is kept for them."""
    before = {parameter: parameter.requires_grad for parameter in parameters}
    wanted = {*map(id, chosen)}
    try:
        for parameter in before:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


# --- products ---


def double_backward(loss: Loss, chosen: list[nn.Parameter], vectors: list[Tensor]) -> list[float]:
    """H z as the gradient of g^T z, g the gradient of the loss, which must allow it: eager attention, no cache."""
    gradients = gradients_of(loss(), chosen, create_graph=True)
    # a loss linear in a parameter has a constant gradient, which cannot be differentiated
    curved = [(g, z) for g, z in zip(gradients, vectors, strict=True) if g is not None and g.requires_grad]
    if not curved:
        return [0.0] * len(chosen)
    outputs, weights = zip(*curved, strict=True)
    return dots(vectors, torch.autograd.grad(outputs, chosen, grad_outputs=weights, allow_unused=True))


def central_difference(loss: Loss, chosen: list[nn.Parameter], vectors: list[Tensor]) -> list[float]:
    """
    H z from gradients alone, (g(w + h z) - g(w - h z)) / 2h, up to O(h^2), for weights in float32 or better. They change in
    place meanwhile; afterwards, also after an error, they are bit for bit what they were.
    """
    step = default_step(chosen)
    saved = [weight.detach().clone() for weight in chosen]
    sides = []
    try:
        for h in (step, -step):
            with torch.no_grad():
                for weight, value, z in zip(chosen, saved, vectors, strict=True):
                    weight.copy_(value).add_(z, alpha=h)
            sides.append(dots(vectors, gradients_of(loss(), chosen)))  # numbers, so that these gradients can be freed
    finally:
        with torch.no_grad():
            for weight, value in zip(chosen, saved, strict=True):
                weight.copy_(value)
    return [(plus - minus) / (2 * step) for plus, minus in zip(*sides, strict=True)]


def default_step(weights: Sequence[Tensor]) -> float:
    """
    eps^(1/3) times the root mean square of all weights together, or times 1 if they are all zero, with eps the precision of
    their dtype. It balances the errors of rounding, ~ eps / h, and of the formula, ~ h^2.
    """
    square = sum(w.detach().double().square().sum().item() for w in weights) / sum(w.numel() for w in weights)
    return max(torch.finfo(w.dtype).eps for w in weights) ** (1 / 3) * (math.sqrt(square) or 1.0)


def gradients_of(value: Tensor, chosen: list[nn.Parameter], **options: bool) -> Sequence[Tensor | None]:
    """Gradients of a loss; None for parameters that it does not depend on."""
    if not value.requires_grad:
        return [None] * len(chosen)
    return torch.autograd.grad(value, chosen, allow_unused=True, **options)


def dots(a: list[Tensor], b: Sequence[Tensor | None]) -> list[float]:
    """Dot product of each pair in float64; 0 where there is no gradient."""
    pairs = zip(a, b, strict=True)
    return [0.0 if y is None else torch.dot(x.flatten().double(), y.flatten().double()).item() for x, y in pairs]
