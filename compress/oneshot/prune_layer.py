"""Pruning the matrices of one decoder layer by what calibration sequences bring to them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..prunable_layers import refuse_uncalled
from ..streamed_decoder import StreamedDecoder
from .config import PruneConfig
from .hessian import LocalHessian
from .obs import Pruned, sweep
from .scores import UNCOMPENSATED
from .wanda import prune_uncompensated


@dataclass(frozen=True, slots=True)
class PrunedMatrix:
    """
    What became of one matrix.

    Attributes:
        weight: as it is stored, (R, C).
        facts: `rows`, `columns`, `target`, `pruned` (weights removed), `zeros` (of them all in the end), `relative_error` of
            its output on the calibration text, sum of squares over that of the dense output; `damping` of its Hessian.
    """

    weight: torch.Tensor
    facts: dict


@torch.no_grad()
def prune_layer(
    decoder: StreamedDecoder,
    index: int,
    layer: nn.Module,
    hidden: Sequence[torch.Tensor],
    sparsities: dict[str, float],
    dtypes: dict[str, torch.dtype],
    row_weights: dict[str, torch.Tensor],
    config: PruneConfig,
) -> dict[str, PrunedMatrix]:
    """
    Prune the matrices of a loaded layer, in place.

    Args:
        hidden: what the layer is given, batches (B, T, hidden).
        sparsities: of each matrix, by name in the model; dtypes: in which they are stored; row_weights: of their scores, where
            rows are not alike.

    Returns:
        By name in the model.
    """
    modules = {name: decoder.model.get_submodule(name) for name in decoder.targets[index]}
    results = {}
    if not config.calibrated:
        for name, module in modules.items():
            results[name] = prune_one(name, module, None, sparsities[name], dtypes[name], None, config)
        return results

    def forward() -> None:
        for batch in hidden:
            decoder.run(layer, index, batch.to(decoder.device))

    groups = input_groups(modules, lambda: decoder.run(layer, index, hidden[0].to(decoder.device)))
    for part in ([group] for group in groups) if config.true_sequential else [groups]:
        with gathered(modules, part) as hessians:
            forward()
        for group, hessian in zip(part, hessians, strict=True):
            for name in group:
                settings = (sparsities[name], dtypes[name], row_weights.get(name), config)
                results[name] = prune_one(name, modules[name], hessian, *settings)
    return results


def input_groups(modules: dict[str, nn.Linear], forward: Callable[[], None]) -> list[list[str]]:
    """
    Names of matrices that are given the very same input, such as those of queries, keys and values, in the order in which
    `forward` comes to them.

    Raises:
        ValueError: if it does not come to all of them.
    """
    seen: list[tuple[torch.Tensor, list[str]]] = []

    def before(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple) -> None:
            group = next((names for tensor, names in seen if tensor is inputs[0]), None)
            if group is None:
                seen.append((inputs[0], [name]))
            else:
                group.append(name)

        return hook

    handles = [module.register_forward_pre_hook(before(name)) for name, module in modules.items()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    refuse_uncalled(modules, {name for _, names in seen for name in names})
    return [names for _, names in seen]


@contextmanager
def gathered(modules: dict[str, nn.Linear], groups: Sequence[Sequence[str]]) -> Iterator[list[LocalHessian]]:
    """One Hessian for each group, filled by what its first matrix is given within the block."""

    def adding(hessian: LocalHessian) -> Callable:
        def hook(module: nn.Module, inputs: tuple) -> None:
            x = inputs[0]
            hessian.add(x if x.dim() > 2 else x[None])  # OPT's layers flatten their one sequence

        return hook

    firsts = [modules[group[0]] for group in groups]
    hessians = [LocalHessian(module.in_features, device=module.weight.device) for module in firsts]
    handles = [module.register_forward_pre_hook(adding(hessian)) for module, hessian in zip(firsts, hessians, strict=True)]
    try:
        yield hessians
    finally:
        for handle in handles:
            handle.remove()


def prune_one(
    name: str,
    module: nn.Linear,
    hessian: LocalHessian | None,
    sparsity: float,
    dtype: torch.dtype,
    row_weights: torch.Tensor | None,
    config: PruneConfig,
) -> PrunedMatrix:
    """Prune one matrix in place, rounded to the dtype it is stored in."""
    dense = module.weight.detach()
    if not torch.isfinite(dense).all():
        raise ValueError(f"{name} holds NaN or infinite weights, so it cannot be pruned; check the model")
    found = removed(name, dense, hessian, sparsity, row_weights, config)
    stored = found.weight.to(dtype).masked_fill(found.mask, 0)
    error = relative_error(dense, stored.to(dense.dtype) - dense, hessian) if hessian else None
    module.weight.copy_(stored)
    facts = {
        "rows": dense.shape[0],
        "columns": dense.shape[1],
        "target": sparsity,
        "pruned": int(found.mask.sum()),
        "zeros": int((stored == 0).sum()),
        "relative_error": error,
        "damping": hessian.kept.damping if hessian and hessian.kept else None,
    }
    return PrunedMatrix(stored.cpu(), facts)


def removed(
    name: str,
    dense: torch.Tensor,
    hessian: LocalHessian | None,
    sparsity: float,
    row_weights: torch.Tensor | None,
    config: PruneConfig,
) -> Pruned:
    """The matrix (R, C) as `config` prunes it, by a Hessian unless the score needs none."""
    settings = {"sparsity": sparsity, "pattern": config.zeros_of, "bits": config.bits}
    if config.score in UNCOMPENSATED:
        return prune_uncompensated(dense, hessian.norms if config.calibrated else None, **settings)
    factor = hessian.factor(name, damping=config.damping)
    settings |= {"block_size": config.block_size, "comparison": config.comparison}
    settings["row_weights"] = None if row_weights is None else row_weights.to(dense)
    return sweep(dense, factor, score=config.score, **settings)


def relative_error(dense: torch.Tensor, change: torch.Tensor, hessian: LocalHessian) -> float | None:
    """||D X||^2 / ||W X||^2 over all inputs X; None where W X is all zero."""
    lost, whole = (((w @ hessian.matrix) * w).sum(dtype=torch.float64).item() for w in (change, dense))
    return lost / whole if whole > 0 else None
