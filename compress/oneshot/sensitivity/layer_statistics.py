"""Sensitivities from one pass through the dense model: OWL's outliers (arXiv 2310.05175) and the local Hessian's trace."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from dijiang.common.hooks import hooks

from ...prunable_layers import refuse_uncalled
from ...streamed_decoder import StreamedDecoder


@torch.no_grad()
def input_squares(
    decoder: StreamedDecoder, blocks: torch.Tensor, advance: Callable[[float], None]
) -> Iterator[dict[str, torch.Tensor]]:
    """Load each layer in turn and yield sum x^2 over all tokens for each input of its matrices, (C,) by name."""
    hidden = [decoder.embed(row) for row in blocks[:, None]]
    for index, names in enumerate(decoder.targets):
        squares: dict[str, torch.Tensor] = {}

        def add(name: str, squares: dict[str, torch.Tensor] = squares) -> Callable:
            def hook(module: nn.Module, inputs: tuple) -> None:
                total = inputs[0].flatten(0, -2).square().sum(0, dtype=torch.float64)
                squares[name] = squares.get(name, 0) + total

            return hook

        with decoder.layer(index) as layer:
            with hooks(decoder.model.get_submodule(name).register_forward_pre_hook(add(name)) for name in names):
                hidden = [decoder.run(layer, index, batch) for batch in hidden]
            refuse_uncalled(names, squares)
            yield squares
        advance(1 / len(decoder.layers))


def outlier_counts(
    decoder: StreamedDecoder, blocks: torch.Tensor, multiple: float, advance: Callable[[float], None]
) -> dict[str, list[float]]:
    """Count the weights of each matrix with |w| ||x||_2 above `multiple` times the mean of their decoder layer."""
    counts = {}
    for squares in input_squares(decoder, blocks, advance):
        scores = {
            name: decoder.model.get_parameter(f"{name}.weight").abs() * total.sqrt().float() for name, total in squares.items()
        }
        mean = sum(x.sum(dtype=torch.float64) for x in scores.values()) / sum(x.numel() for x in scores.values())
        counts |= {name: [float((x > multiple * mean).sum())] for name, x in scores.items()}
    return counts


def local_traces(decoder: StreamedDecoder, blocks: torch.Tensor, advance: Callable[[float], None]) -> dict[str, list[float]]:
    """Trace of the layer objective's Hessian per row of the weight, sum over inputs of x^2 on a mean token, times the rows."""
    traces = {}
    for squares in input_squares(decoder, blocks, advance):
        for name, total in squares.items():
            rows = decoder.model.get_submodule(name).out_features
            traces[name] = [float(total.sum()) * rows / blocks.numel()]
    return traces
