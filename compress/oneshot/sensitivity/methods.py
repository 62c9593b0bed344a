"""
Sensitivities: how much each matrix matters to the loss. To add one, write its function and enter it in `SENSITIVITIES`.

Functions import what they compute with, so that settings and their help know the names without loading torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .estimates import Sensitivities, sensitivities_of

if TYPE_CHECKING:
    from torch import Tensor

    from ...streamed_decoder import StreamedDecoder
    from .gradients import Gradients

Estimates = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """
    What a sensitivity is computed from.

    Attributes:
        decoder: the dense model.
        blocks: calibration sequences (N, T); None for a method without text.
        sizes: weights of each matrix, by name.
        config: the `PruneConfig`, whose file imports this one.
        gradients: of the loss on these sequences, for a method that asks for them.
        cached: returns what the cache holds for this method, or else what the function it gets returns.
        advance: adds a share of the work to the progress.
    """

    decoder: StreamedDecoder
    blocks: Tensor | None
    sizes: dict[str, int]
    config: Any
    gradients: Gradients | None
    cached: Callable[[Callable[[], Estimates]], Estimates]
    advance: Callable[[float], None]

    def sensitivities(self, estimates: Estimates, *, by_size: bool = False) -> Sensitivities:
        """Sensitivities from estimates by name, divided by the matrices' sizes if the settings or `by_size` ask for it."""
        by_size = by_size or self.config.normalization == "mean"
        return sensitivities_of(self.config.sensitivity, estimates, self.sizes, by_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """
    A way to measure sensitivities.

    Attributes:
        measure: the function.
        gradients: it needs gradients of the loss.
        probes: it draws random probes, and `probes_by_layer` has an effect.
        text: it needs calibration sequences.
    """

    measure: Callable[[Inputs], Sensitivities]
    gradients: bool = False
    probes: bool = False
    text: bool = True


def fisher(inputs: Inputs) -> Sensitivities:
    """Empirical Fisher information: squared gradients of the loss."""
    return inputs.sensitivities(inputs.gradients.weights)


def reversed_fisher(inputs: Inputs) -> Sensitivities:
    """Baseline: the ranks of `fisher` backwards."""
    forwards = fisher(inputs)
    return replace(forwards, values={name: -value for name, value in forwards.values.items()})


def random(inputs: Inputs) -> Sensitivities:
    """Baseline: random ranks."""
    import torch

    drawn = torch.rand(len(inputs.sizes), generator=torch.Generator().manual_seed(inputs.config.seed)).tolist()
    return Sensitivities(method=inputs.config.sensitivity, values=dict(zip(inputs.sizes, drawn, strict=True)))


def hutchinson(inputs: Inputs) -> Sensitivities:
    """Trace of the loss Hessian's block of the matrix, by random probes."""
    from .hessian_trace import double_backward

    return probed(inputs, double_backward)


def finite_difference(inputs: Inputs) -> Sensitivities:
    """The same trace by differences of gradients."""
    from .hessian_trace import central_difference

    return probed(inputs, central_difference)


def probed(inputs: Inputs, product: Callable) -> Sensitivities:
    """Sensitivities from random probes of the Hessian; `product` as for `trace_estimates`."""
    from .hessian_trace import model_traces

    config = inputs.config
    settings = {"probes": config.sensitivity_samples, "seed": config.seed, "by_layer": config.probes_by_layer}
    return inputs.sensitivities(
        inputs.cached(lambda: model_traces(product, inputs.decoder, inputs.blocks, advance=inputs.advance, **settings))
    )


def owl(inputs: Inputs) -> Sensitivities:
    """OWL's outliers among weight times input (arXiv 2310.05175); of single matrices the share counts, not the number."""
    from .layer_statistics import outlier_counts

    counts = inputs.cached(lambda: outlier_counts(inputs.decoder, inputs.blocks, inputs.config.owl_m, inputs.advance))
    return inputs.sensitivities(counts, by_size=inputs.config.granularity == "weight")


def local(inputs: Inputs) -> Sensitivities:
    """Trace of the Hessian of the layer's own output error."""
    from .layer_statistics import local_traces

    return inputs.sensitivities(inputs.cached(lambda: local_traces(inputs.decoder, inputs.blocks, inputs.advance)))


SENSITIVITIES = {
    "fisher": Method(measure=fisher, gradients=True),
    "hutchinson": Method(measure=hutchinson, probes=True),
    "finite-difference": Method(measure=finite_difference, probes=True),
    "owl": Method(measure=owl),
    "local": Method(measure=local),
    "random": Method(measure=random, text=False),
    "reversed": Method(measure=reversed_fisher, gradients=True),
}
