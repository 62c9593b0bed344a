"""What pruning each matrix would cost, at several sparsities: its outputs' errors, weighed by what the loss makes of them."""

from collections.abc import Callable

import torch

from ..streamed_decoder import StreamedDecoder
from .config import PruneConfig
from .loss_allocation import POINTS
from .prune_layer import gathered, input_groups, removed
from .sensitivity.gradients import Gradients


@torch.no_grad()
def loss_curves(
    decoder: StreamedDecoder,
    blocks: torch.Tensor,
    config: PruneConfig,
    gradients: Gradients,
    advance: Callable[[float], None],
) -> dict[str, list[float]]:
    """
    tr(G D H D^T) of each matrix pruned alone, for every sparsity in `POINTS`: D the change, H the Hessian of its inputs in the
    dense model and G the diagonal of squared gradients of its outputs. That is the Fisher information's quadratic form, up to
    a common factor, inputs and gradients taken to be independent.

    Args:
        blocks: token ids (N, T).
        config: the score and its settings.
        gradients: of the same sequences, by row.
        advance: is told which share of the work was done since.
    """
    found: dict[str, list[float]] = {}
    row_weights = gradients.row_weights(config.row_weights, config.seed)
    hidden = [decoder.embed(row) for row in blocks[:, None]]
    for index, names in enumerate(decoder.targets):
        modules = {name: decoder.model.get_submodule(name) for name in names}
        with decoder.layer(index) as layer:
            groups = input_groups(modules, lambda: decoder.run(layer, index, hidden[0]))  # noqa: B023, called at once
            with gathered(modules, groups) as hessians:
                hidden = [decoder.run(layer, index, batch) for batch in hidden]
            for group, hessian in zip(groups, hessians, strict=True):
                for name in group:
                    weight, energy = modules[name].weight, gradients.outputs[name]
                    found[name] = []
                    for sparsity in POINTS:
                        change = removed(name, weight, hessian, sparsity, row_weights.get(name), config).weight - weight
                        errors = ((change @ hessian.matrix) * change).sum(1, dtype=torch.float64).cpu()
                        found[name].append((errors @ energy).item())
                    advance(len(weight) * weight.shape[1] / decoder.n_targeted)
    return found
