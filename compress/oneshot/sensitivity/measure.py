"""
How much each matrix matters to the loss, by one of several measures, kept so that another sparsity does not pay for it again
(arXiv 2310.09499, section 2.3).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dijiang.checkpoint.provenance import versions
from dijiang.common.result_cache import ResultCache, hash_of

from ...streamed_decoder import StreamedDecoder
from ..config import PruneConfig
from ..loss_allocation import POINTS
from ..loss_curves import loss_curves
from .gradients import Gradients
from .hessian_trace import finite_difference, hutchinson, split_half_correlation, to_sensitivity
from .layer_statistics import local_traces, outlier_counts

STABLE = 0.7  # split-half rank correlation below which ranks are mostly noise
# files that values depend on
MEASURING = (
    "counts fisher gradients hessian hessian_trace layer_pruning layer_statistics loss_curves quantiser saliency sensitivity "
    "streamed_decoder sweep targets uncompensated"
).split()


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivities:
    """
    Attributes:
        method: the measure.
        values: by name of the matrix, what ranks are made of.
        costs: by name of the matrix, the loss that its pruning to each of `POINTS` is reckoned to cost, up to a common factor;
            None where ranks decide.
        correlation: Spearman's, between halves of the sequences or probes (None: one sequence, or no such thing).
        negative: matrices whose estimate was negative and counts as 0.
        samples: sequences or probes behind each value.
    """

    method: str
    values: dict[str, float]
    costs: dict[str, list[float]] | None = None
    correlation: float | None = None
    negative: tuple[str, ...] = ()
    samples: int = 0

    def warnings(self) -> list[str]:
        """What a user should know about these ranks, a line each."""
        found = []
        if self.correlation is not None and self.correlation < STABLE:
            found.append(
                f"ranks by {self.method} agree only to {self.correlation:.2f} between halves of the {self.samples} samples: "
                "mostly noise; use fisher or more samples"
            )
        if self.negative:
            found.append(f"{len(self.negative)} of {len(self.values)} {self.method} estimates are negative and count as 0")
        return found


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
    Sensitivities of all pruned matrices of the dense model.

    Args:
        blocks: calibration sequences (N, T); the first `config.sensitivity_samples` are used. None for `random`.
        sizes: weights of each matrix, by name.
        gradients: of these sequences, where `config.ranked_by_gradients`.
        identity: hash of the model.
        cache: where estimates are kept and looked for.
        advance: is told which share of the work was done since.

    Raises:
        ValueError: if the model does not allow the measure, or gives estimates that are not finite.
    """
    method = "fisher" if config.sensitivity == "reversed" else config.sensitivity
    if method == "random":
        generator = torch.Generator().manual_seed(config.seed)
        drawn = torch.rand(len(sizes), generator=generator).tolist()
        return Sensitivities(method=method, values=dict(zip(sizes, drawn, strict=True)))
    blocks = blocks[: config.sensitivity_samples]
    facts = base_facts(identity) | {"method": method, "blocks": blocks.tolist()}
    if method == "fisher":
        estimates = gradients.weights
    else:
        own = facts | {"probes": config.sensitivity_samples, "by_layer": config.probes_by_layer}
        own |= {"seed": config.seed, "owl_m": config.owl_m}
        estimates = kept(cache, own, lambda: other_estimates(method, decoder, blocks, config, advance))
    by_size = "mean" if method == "owl" and config.granularity == "weight" else config.normalisation
    values, negative = to_sensitivity(estimates, sizes, by_size)
    if config.sensitivity == "reversed":
        values = {name: -value for name, value in values.items()}
    costs = None
    if config.allocation == "loss":
        settings = ("score", "bits", "block_size", "damping", "row_weights", "comparison", "seed")
        own = facts | {"method": "loss", "points": POINTS, "settings": {name: getattr(config, name) for name in settings}}
        costs = kept(cache, own, lambda: loss_curves(decoder, blocks, config, gradients, advance))
    return Sensitivities(
        method=config.sensitivity,
        values=values,
        costs=costs,
        correlation=split_half_correlation(estimates),
        negative=tuple(negative),
        samples=max(map(len, estimates.values())),
    )


def base_facts(identity: str) -> dict:
    """What all measures depend on."""
    return {"model": identity, "code": code_hash(), "versions": versions()}


def kept(cache: ResultCache, facts: dict, compute: Callable[[], dict[str, list[float]]]) -> dict[str, list[float]]:
    """What the cache knows, or else what `compute` gives, which is kept if all of it is finite."""
    if (found := cache.get(facts)) is None:
        found = compute()
        if all(math.isfinite(x) for values in found.values() for x in values):
            cache.put(facts, found)
    return found


def other_estimates(
    method: str, decoder: StreamedDecoder, blocks: torch.Tensor, config: PruneConfig, advance: Callable[[float], None]
) -> dict[str, list[float]]:
    """Estimates by name for every measure but fisher."""
    if method == "owl":
        return outlier_counts(decoder, blocks, config.owl_m, advance)
    if method == "local":
        return local_traces(decoder, blocks, advance)
    estimator = hutchinson if method == "hutchinson" else finite_difference
    probes = config.sensitivity_samples
    groups = [[name for layer in decoder.targets for name in layer]] if not config.probes_by_layer else decoder.targets
    share = 1 / (probes * len(groups))
    with decoder.whole() as model:
        weights = {name: model.get_parameter(f"{name}.weight") for layer in decoder.targets for name in layer}

        def loss(row: torch.Tensor) -> torch.Tensor:
            tokens = row[None].to(decoder.device)
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

        losses = [lambda row=row: loss(row) for row in blocks]
        try:
            return estimator(
                losses, weights, probes=probes, seed=config.seed, groups=groups, advance=lambda n: advance(n * share)
            )
        except torch.OutOfMemoryError:  # of a GPU
            raise ValueError(
                f"the GPU's memory does not hold {decoder.name} with its gradients; probe by layer, or use sensitivity fisher"
            ) from None
        except RuntimeError as error:
            if "derivative for" not in str(error):
                raise
            raise ValueError(f"{decoder.name} cannot be differentiated twice; use sensitivity fisher") from None


def code_hash() -> str:
    """Of the code that measures."""
    return hash_of(*((Path(__file__).parent / f"{name}.py").read_bytes() for name in MEASURING))
