"""Sensitivities from one pass through the dense model: OWL's outliers (arXiv 2310.05175) and the local Hessian's trace."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from ...prunable_layers import refuse_uncalled
from ...streamed_decoder import StreamedDecoder


@torch.no_grad()
def input_squares(
    decoder: StreamedDecoder, blocks: torch.Tensor, advance: Callable[[float], None]
) -> Iterator[tuple[nn.Module, dict[str, torch.Tensor]]]:
    """Every layer in turn, loaded, with sum x^2 over all tokens of each input of its matrices, (C,) by name."""
    hidden = [decoder.embed(row) for row in blocks[:, None]]
    for index in range(len(decoder.layers)):
        with decoder.layer(index) as layer:
            squares: dict[str, torch.Tensor] = {}

            def add(name: str) -> Callable:
                def hook(module: nn.Module, inputs: tuple) -> None:
                    total = inputs[0].flatten(0, -2).square().sum(0, dtype=torch.float64)
                    squares[name] = squares.get(name, 0) + total  # noqa: B023, used within this layer

                return hook

            handles = [decoder.model.get_submodule(x).register_forward_pre_hook(add(x)) for x in decoder.targets[index]]
            try:
                hidden = [decoder.run(layer, index, batch) for batch in hidden]
            finally:
                for handle in handles:
                    handle.remove()
            refuse_uncalled(decoder.targets[index], squares)
            yield layer, squares
        advance(1 / len(decoder.layers))


def outlier_counts(
    decoder: StreamedDecoder, blocks: torch.Tensor, multiple: float, advance: Callable[[float], None]
) -> dict[str, list[float]]:
    """How many weights of each matrix have |w| ||x||_2 above `multiple` times the mean of their decoder layer."""
    found = {}
    for _, squares in input_squares(decoder, blocks, advance):
        scores = {
            name: decoder.model.get_parameter(f"{name}.weight").abs() * norms.sqrt().float() for name, norms in squares.items()
        }
        mean = sum(x.sum(dtype=torch.float64) for x in scores.values()) / sum(x.numel() for x in scores.values())
        found |= {name: [float((x > multiple * mean).sum())] for name, x in scores.items()}
    return found


def local_traces(decoder: StreamedDecoder, blocks: torch.Tensor, advance: Callable[[float], None]) -> dict[str, list[float]]:
    """Trace of the layer objective's Hessian per row of the weight, sum over inputs of x^2 on a mean token, times the rows."""
    found = {}
    for _, squares in input_squares(decoder, blocks, advance):
        for name, total in squares.items():
            rows = decoder.model.get_submodule(name).out_features
            found[name] = [float(total.sum()) * rows / blocks.numel()]
    return found
