"""Squared gradients of the loss on calibration sequences, each sequence's kept so that an interrupted pass goes on."""

import base64
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dijiang.common.result_cache import ResultCache

from ...streamed_decoder import StreamedDecoder
from .fisher import fisher
from .hessian_trace import refuse_not_finite

FLOOR = 1e-4  # of the mean weight: rows without gradients still compete by their scores


@dataclass(frozen=True, slots=True)
class Gradients:
    """
    Of each pruned matrix, by name.

    Attributes:
        weights: the empirical Fisher information of its weights, a number per sequence.
        outputs: squared gradients of its outputs, summed over tokens and sequences, (R,) float64; None if not asked for.
    """

    weights: dict[str, list[float]]
    outputs: dict[str, torch.Tensor] | None

    def row_weights(self, how: str, seed: int) -> dict[str, torch.Tensor]:
        """
        What a matrix's scores are multiplied by in each row, (R,) float32, mean 1.

        Args:
            how: `fisher`, the root mean square gradient of the row's output, not below `FLOOR` of their mean; ones where all
                are zero; `shuffled`, the same in an order drawn by `seed`; `alike`, none.
        """
        if how == "alike":
            return {}
        generator, found = torch.Generator().manual_seed(seed), {}
        for name, energy in self.outputs.items():
            roots = energy.sqrt() if energy.any() else torch.ones_like(energy)
            roots = roots.clamp(min=FLOOR * roots.mean())
            order = torch.randperm(len(roots), generator=generator) if how == "shuffled" else slice(None)
            found[name] = (roots / roots.mean())[order].float()
        return found


def measure_gradients(
    decoder: StreamedDecoder,
    blocks: torch.Tensor,
    facts: dict,
    *,
    by_row: bool,
    cache: ResultCache,
    advance: Callable[[float], None] = lambda share: None,
) -> Gradients:
    """
    Pass every sequence up and down the dense model, unless the cache knows what that gives.

    Args:
        blocks: token ids (N, T).
        facts: what the numbers depend on besides the tokens.
        by_row: also gather those of outputs.
        advance: is told which share of the work was done since.

    Raises:
        ValueError: if a gradient is NaN or infinite.
    """
    names = [name for layer in decoder.targets for name in layer]
    weights: dict[str, list[float]] = {name: [] for name in names}
    outputs = {name: torch.zeros(decoder.model.get_submodule(name).out_features, dtype=torch.float64) for name in names}
    for block in blocks:
        own = facts | {"block": block.tolist()}
        found = cache.get(own)
        if found is None or (by_row and "outputs" not in found):
            of_weights, of_outputs = fisher(decoder, block[None])
            found = {"weights": {name: values[0] for name, values in of_weights.items()}}
            for name, values in of_weights.items():
                refuse_not_finite(name, values)
            if by_row:
                found["outputs"] = {name: packed(rows[0]) for name, rows in of_outputs.items()}
            cache.put(own, found)
        for name in names:
            weights[name].append(found["weights"][name])
            if by_row:
                outputs[name] += unpacked(found["outputs"][name])
        advance(1 / len(blocks))
    return Gradients(weights, outputs if by_row else None)


def packed(values: torch.Tensor) -> str:
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()


def unpacked(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float64))
