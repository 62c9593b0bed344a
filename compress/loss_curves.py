"""What pruning each matrix would cost, at several sparsities: its output's error, weighed by what the loss makes of it."""

from collections.abc import Callable

import torch

from .layer_pruning import gathered, input_groups, removed
from .loss_allocation import POINTS
from .prune_config import PruneConfig
from .streamed_decoder import StreamedDecoder


@torch.no_grad()
def error_curves(
    decoder: StreamedDecoder, blocks: torch.Tensor, config: PruneConfig, advance: Callable[[float], None]
) -> dict[str, list[float]]:
    """
    tr(D H D^T) of each matrix pruned alone, D the change and H the Hessian of its inputs in the dense model, for every
    sparsity in `POINTS`.

    Args:
        blocks: token ids (N, T).
        config: the score and its settings.
        advance: is told which share of the work was done since.
    """
    found: dict[str, list[float]] = {}
    hidden = [decoder.embed(row) for row in blocks[:, None]]
    for index, names in enumerate(decoder.targets):
        modules = {name: decoder.model.get_submodule(name) for name in names}
        with decoder.layer(index) as layer:
            groups = input_groups(modules, lambda: decoder.run(layer, index, hidden[0]))  # noqa: B023, called at once
            with gathered(modules, groups) as hessians:
                hidden = [decoder.run(layer, index, batch) for batch in hidden]
            for group, hessian in zip(groups, hessians, strict=True):
                for name in group:
                    weight = modules[name].weight
                    found[name] = []
                    for sparsity in POINTS:
                        change = removed(name, weight, hessian, sparsity, config).weight - weight
                        found[name].append(((change @ hessian.matrix) * change).sum(dtype=torch.float64).item())
                    advance(len(weight) * weight.shape[1] / decoder.n_targeted)
    return found
