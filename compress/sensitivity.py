"""
How much each matrix matters to the loss, by one of several measures, kept so that another sparsity does not pay for it again
(arXiv 2310.09499, section 2.3).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dijiang.convert.provenance import versions
from dijiang.convert.result_cache import ResultCache, hash_of

from .fisher import fisher
from .hessian_trace import finite_difference, hutchinson, split_half_correlation, to_sensitivity
from .layer_statistics import local_traces, outlier_counts
from .prune_config import PruneConfig
from .streamed_decoder import StreamedDecoder

STABLE = 0.7  # split-half rank correlation below which ranks are mostly noise
MEASURING = ("fisher", "hessian_trace", "layer_statistics", "streamed_decoder")  # files that values depend on


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivities:
    """
    Attributes:
        method: the measure.
        values: by name of the matrix, what ranks are made of.
        correlation: Spearman's, between halves of the sequences or probes (None: one sequence, or no such thing).
        negative: matrices whose estimate was negative and counts as 0.
        samples: sequences or probes behind each value.
    """

    method: str
    values: dict[str, float]
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
    identity: str,
    cache: ResultCache,
    advance: Callable[[float], None] = lambda share: None,
) -> Sensitivities:
    """
    Sensitivities of all pruned matrices of the dense model.

    Args:
        blocks: calibration sequences (N, T); the first `config.sensitivity_samples` are used. None for `random`.
        sizes: weights of each matrix, by name.
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
    facts = {"model": identity, "method": method, "code": code_hash(), "versions": versions()}
    if method == "fisher":  # sequence by sequence, so that an interrupted pass goes on
        estimates: dict[str, list[float]] = {name: [] for name in sizes}
        for block in blocks:
            own = facts | {"block": block.tolist()}
            if (found := cache.get(own)) is None:
                found = {name: values[0] for name, values in fisher(decoder, block[None]).items()}
                cache.put(own, found)
            for name in sizes:
                estimates[name].append(found[name])
            advance(1 / len(blocks))
    else:
        probes = config.sensitivity_samples
        facts |= {"blocks": blocks.tolist(), "probes": probes, "seed": config.seed, "owl_m": config.owl_m}
        if (estimates := cache.get(facts)) is None:
            estimates = other_estimates(method, decoder, blocks, config, advance)
            cache.put(facts, estimates)
    by_size = "mean" if method == "owl" and config.granularity == "weight" else config.normalisation
    values, negative = to_sensitivity(estimates, sizes, by_size)
    if config.sensitivity == "reversed":
        values = {name: -value for name, value in values.items()}
    return Sensitivities(
        method=config.sensitivity,
        values=values,
        correlation=split_half_correlation(estimates),
        negative=tuple(negative),
        samples=max(map(len, estimates.values())),
    )


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
    with decoder.whole() as model:
        weights = {name: model.get_parameter(f"{name}.weight") for layer in decoder.targets for name in layer}

        def loss(row: torch.Tensor) -> torch.Tensor:
            tokens = row[None].to(decoder.device)
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

        losses = [lambda row=row: loss(row) for row in blocks]
        try:
            return estimator(losses, weights, probes=probes, seed=config.seed, advance=lambda n: advance(n / probes))
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"{decoder.name} cannot be differentiated twice ({' '.join(str(error).split())[:150]}); use sensitivity fisher"
            ) from None


def code_hash() -> str:
    """Of the code that measures."""
    return hash_of(*((Path(__file__).parent / f"{name}.py").read_bytes() for name in MEASURING))
