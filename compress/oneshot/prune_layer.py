"""Pruning the matrices of one decoder layer with the inputs that calibration sequences give them."""

from collections.abc import Sequence

import torch
from torch import nn

from ..streamed_decoder import StreamedDecoder
from .config import PruneConfig
from .hessian import LocalHessian, gather_hessians, input_groups
from .prune_matrix import prune_matrix


@torch.no_grad()
def prune_layer(
    decoder: StreamedDecoder,
    index: int,
    layer: nn.Module,
    hidden: Sequence[torch.Tensor],
    sparsities: dict[str, float],
    row_weights: dict[str, torch.Tensor],
    config: PruneConfig,
) -> dict[str, tuple[torch.Tensor, dict]]:
    """
    Prune the matrices of a loaded layer, in place.

    Args:
        hidden: the layer's inputs, batches (B, T, hidden); not needed if `config` is not calibrated.
        sparsities: share to remove of each matrix, by name in the model.
        row_weights: factors of the scores in each row, by name; empty if they are all 1.

    Returns:
        By name in the model, the weight as it is stored, and facts of it: `rows`, `columns`, `target`, `pruned` (weights
        removed), `zeros` (in the end), `damping` (of its Hessian), and `relative_error` of its output on the calibration text,
        the sum of squares over that of the dense output.
    """
    modules = {name: decoder.model.get_submodule(name) for name in decoder.targets[index]}
    results = {}

    def prune_one(name: str, hessian: LocalHessian | None) -> None:
        dtype = decoder.stored_dtype(f"{name}.weight")
        results[name] = prune_module(name, modules[name], hessian, sparsities[name], dtype, row_weights.get(name), config)

    if not config.calibrated:
        for name in modules:
            prune_one(name, None)
        return results
    groups = input_groups(modules, lambda: decoder.run(layer, index, hidden[0].to(decoder.device)))
    for part in [[group] for group in groups] if config.true_sequential else [groups]:
        with gather_hessians(modules, part) as hessians:
            for batch in hidden:
                decoder.run(layer, index, batch.to(decoder.device))
        for group, hessian in zip(part, hessians, strict=True):
            for name in group:
                prune_one(name, hessian)
    return results


def prune_module(
    name: str,
    module: nn.Linear,
    hessian: LocalHessian | None,
    sparsity: float,
    dtype: torch.dtype,
    row_weights: torch.Tensor | None,
    config: PruneConfig,
) -> tuple[torch.Tensor, dict]:
    """Prune the weight of a module in place, rounded to the dtype it is stored in; returns it with its facts."""
    dense = module.weight.detach()
    if not torch.isfinite(dense).all():
        raise ValueError(f"{name} holds NaN or infinite weights, so it cannot be pruned; check the model")
    pruned = prune_matrix(name, dense, hessian, sparsity, row_weights, config)
    stored = pruned.weight.to(dtype).masked_fill(pruned.mask, 0)
    error = relative_error(dense, stored.to(dense.dtype) - dense, hessian) if hessian else None
    module.weight.copy_(stored)
    factor = hessian.inverse_factor if hessian else None
    facts = {
        "rows": dense.shape[0],
        "columns": dense.shape[1],
        "target": sparsity,
        "pruned": int(pruned.mask.sum()),
        "zeros": int((stored == 0).sum()),
        "relative_error": error,
        "damping": factor.damping if factor else None,
    }
    return stored.cpu(), facts


def relative_error(dense: torch.Tensor, change: torch.Tensor, hessian: LocalHessian) -> float | None:
    """||D X||^2 / ||W X||^2 over all inputs X, D the change and W the dense weight; None if W X is all zero."""
    lost, whole = (((w @ hessian.matrix) * w).sum(dtype=torch.float64).item() for w in (change, dense))
    return lost / whole if whole > 0 else None
