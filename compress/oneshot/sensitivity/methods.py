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
    """What a sensitivity is computed from."""

    decoder: StreamedDecoder  # the dense model
    blocks: Tensor | None  # calibration sequences (N, T); None for a method without text
    sizes: dict[str, int]  # weights of each matrix, by name
    config: Any  # the PruneConfig, whose file imports this one
    gradients: Gradients | None  # of the loss on the sequences, for a method that needs them
    cached: Callable[[Callable[[], Estimates]], Estimates]  # cached estimates of this method, or else those of the argument
    advance: Callable[[float], None]  # adds a share of the work to the progress

    def sensitivities(self, estimates: Estimates, *, by_size: bool = False) -> Sensitivities:
        """Sensitivities from estimates by name, divided by the matrices' sizes if the settings or `by_size` ask for it."""
        by_size = by_size or self.config.normalization == "mean"
        return sensitivities_of(self.config.sensitivity, estimates, self.sizes, by_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A way to measure sensitivities, and what it needs."""

    measure: Callable[[Inputs], Sensitivities]
    gradients: bool = False  # needs gradients of the loss
    probes: bool = False  # draws random probes, so that `probes_by_layer` has an effect
    text: bool = True  # needs calibration sequences


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
    from .hessian_trace import double_backward, model_traces

    return inputs.sensitivities(inputs.cached(lambda: model_traces(double_backward, **probes_of(inputs))))


def finite_difference(inputs: Inputs) -> Sensitivities:
    """The same trace by differences of gradients."""
    from .hessian_trace import central_difference, model_traces

    return inputs.sensitivities(inputs.cached(lambda: model_traces(central_difference, **probes_of(inputs))))


def probes_of(inputs: Inputs) -> dict[str, Any]:
    """Arguments of `model_traces`."""
    settings = {"probes": inputs.config.sensitivity_samples, "by_layer": inputs.config.probes_by_layer}
    settings["seed"] = inputs.config.seed
    return settings | {"decoder": inputs.decoder, "blocks": inputs.blocks, "advance": inputs.advance}


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
