"""
How much each matrix matters to the loss, by the sensitivity that the settings name (arXiv 2310.09499, section 2.3), and for
allocation by loss what pruning it would cost. Estimates are cached, so that another sparsity does not compute them again.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from dijiang.checkpoint.provenance import versions
from dijiang.common.result_cache import ResultCache, code_fingerprint

from ...streamed_decoder import StreamedDecoder
from ..config import POINTS, PruneConfig
from ..hessian import gather_hessians, input_groups
from ..prune_matrix import prune_matrix
from .estimates import Sensitivities
from .gradients import Gradients
from .methods import SENSITIVITIES, Estimates, Inputs

# settings that the costs of pruning a matrix depend on
COST_SETTINGS = ("score", "bits", "block_size", "damping", "row_weights", "comparison", "seed")


def measure(
    decoder: StreamedDecoder,
    blocks: torch.Tensor | None,
    sizes: dict[str, int],
    config: PruneConfig,
    *,
    gradients: Gradients | None,
    identity: str,
    cache: ResultCache,
    advance: Callable[[float], None] = lambda share: None,
) -> Sensitivities:
    """
    Measure the sensitivities of all pruned matrices of the dense model, and their costs for allocation by loss.

    Args:
        blocks: calibration sequences (N, T), of which the first `config.sensitivity_samples` are used; None without text.
        sizes: weights of each matrix, by name.
        gradients: of these sequences, if `config.ranked_by_gradients`.
        identity: hash of the model.
        cache: where estimates are kept and looked up.
        advance: adds a share of the work to the progress.

    Raises:
        ValueError: if the model does not allow the method, or gives estimates that are not finite.
    """
    method = config.sensitivity
    if not SENSITIVITIES[method].text:
        blocks = None
    facts = base_facts(identity)
    if blocks is not None:
        blocks = blocks[: config.sensitivity_samples]
        facts["blocks"] = blocks.tolist()
    settings = {"probes": config.sensitivity_samples, "by_layer": config.probes_by_layer}
    settings |= {"seed": config.seed, "owl_m": config.owl_m}
    inputs = Inputs(
        decoder=decoder,
        blocks=blocks,
        sizes=sizes,
        config=config,
        gradients=gradients,
        cached=lambda compute: cached(cache, facts | {"method": method} | settings, compute),
        advance=advance,
    )
    sensitivities = SENSITIVITIES[method].measure(inputs)
    if config.allocation != "loss":
        return sensitivities
    settings = {name: getattr(config, name) for name in COST_SETTINGS}
    costs = cached(
        cache,
        facts | {"method": "loss", "points": POINTS, "settings": settings},
        lambda: loss_curves(decoder, blocks, config, gradients, advance),
    )
    return replace(sensitivities, costs=costs)


def base_facts(identity: str) -> dict:
    """The model, code and versions, which all measurements depend on."""
    code = code_fingerprint("dijiang.compress", "dijiang.modeling", "dijiang.checkpoint.weights")
    return {"model": identity, "code": code, "versions": versions()}


def cached(cache: ResultCache, facts: dict, compute: Callable[[], Estimates]) -> Estimates:
    """The cached estimates, or else what `compute` returns, which is cached if all of it is finite."""
    estimates = cache.get(facts)
    if estimates is None:
        estimates = compute()
        if all(math.isfinite(x) for values in estimates.values() for x in values):
            cache.put(facts, estimates)
    return estimates


@torch.no_grad()
def loss_curves(
    decoder: StreamedDecoder,
    blocks: torch.Tensor,
    config: PruneConfig,
    gradients: Gradients,
    advance: Callable[[float], None],
) -> dict[str, list[float]]:
    """
    Compute tr(G D H D^T) of each matrix pruned alone, for every sparsity in `POINTS`, with D the change, H the Hessian of its
    inputs in the dense model and G the diagonal of squared gradients of its outputs. Up to a common factor, that is the Fisher
    information's quadratic form if inputs and gradients are independent.

    Args:
        blocks: token ids (N, T).
        config: the score and its settings.
        gradients: of the same sequences, by row.
        advance: adds a share of the work to the progress.
    """
    costs: dict[str, list[float]] = {}
    row_weights = gradients.row_weights(config.row_weights, config.seed)
    hidden = [decoder.embed(row) for row in blocks[:, None]]
    for index, names in enumerate(decoder.targets):
        modules = {name: decoder.model.get_submodule(name) for name in names}
        with decoder.layer(index) as layer:
            groups = input_groups(modules, lambda: decoder.run(layer, index, hidden[0]))  # noqa: B023, called at once
            with gather_hessians(modules, groups) as hessians:
                hidden = [decoder.run(layer, index, batch) for batch in hidden]
            for group, hessian in zip(groups, hessians, strict=True):
                for name in group:
                    weight, energy = modules[name].weight, gradients.outputs[name]
                    costs[name] = []
                    for sparsity in POINTS:
                        pruned = prune_matrix(name, weight, hessian, sparsity, row_weights.get(name), config)
                        change = pruned.weight - weight
                        errors = ((change @ hessian.matrix) * change).sum(1, dtype=torch.float64).cpu()
                        costs[name].append((errors @ energy).item())
                    advance(len(weight) * weight.shape[1] / decoder.n_targeted)
    return costs
