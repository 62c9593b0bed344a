"""
The empirical Fisher information of each matrix: sum over its weights of squared loss gradients, per sequence. One layer's
weights are in memory at a time, on the way up and on the way down.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ...prunable_layers import refuse_uncalled
from ...streamed_decoder import StreamedDecoder

# observe(name, inputs (B, T, C), gradients of the outputs (B, T, R))
Observer = Callable[[str, torch.Tensor, torch.Tensor], None]


def fisher(decoder: StreamedDecoder, blocks: torch.Tensor) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """
    ||dL_s/dW||_F^2 for each pruned matrix W and sequence s, L_s the mean next-token cross-entropy of s. Its mean over
    sequences estimates the trace of the Fisher information, and that of the Hessian where the model fits the text.

    Args:
        blocks: token ids (N, T).

    Returns:
        By name of the matrix, N values; and squared gradients of its outputs, summed over tokens, (N, R) float64.
    """
    weights: dict[str, list[float]] = {name: [] for layer in decoder.targets for name in layer}
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in weights}

    def observe(name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        per_sequence = gradients.transpose(1, 2) @ inputs
        weights[name] += per_sequence.square().sum((1, 2), dtype=torch.float64).tolist()
        outputs[name] += gradients.square().sum(1, dtype=torch.float64).cpu()

    for row in blocks[:, None]:
        backpropagate(decoder, row, observe)
    refuse_uncalled(weights, {name for name, values in weights.items() if values})
    return weights, {name: torch.stack(rows) for name, rows in outputs.items()}


def backpropagate(decoder: StreamedDecoder, tokens: torch.Tensor, observe: Observer) -> None:
    """
    Pass token ids (B, T) up and the gradients of their losses, each sequence's its own mean, down again; every pruned matrix's
    inputs and the gradients of its outputs are shown to `observe`.
    """
    states = [decoder.embed(tokens)]
    with torch.no_grad():
        for index in range(len(decoder.layers)):
            with decoder.layer(index) as layer:
                states.append(decoder.run(layer, index, states[-1]))
    with torch.enable_grad():
        top = states.pop().requires_grad_()
        loss = decoder.losses(top, tokens).sum() / (tokens.shape[1] - 1)
        (gradient,) = torch.autograd.grad(loss, top)
        for index in reversed(range(len(decoder.layers))):
            hidden = states.pop().detach().requires_grad_()
            with decoder.layer(index) as layer, observed(decoder, index, observe, len(tokens)):
                (gradient,) = torch.autograd.grad(decoder.run(layer, index, hidden), hidden, gradient)


@contextmanager
def observed(decoder: StreamedDecoder, index: int, observe: Observer, sequences: int) -> Iterator[None]:
    """Within the block, what goes through the matrices of a layer is shown to `observe` on the way back."""

    def by_sequence(x: torch.Tensor) -> torch.Tensor:  # OPT's layers lay all tokens end to end
        return x.reshape(sequences, -1, x.shape[-1])

    def after(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            seen = by_sequence(inputs[0].detach())
            output.register_hook(lambda gradient: observe(name, seen, by_sequence(gradient)))

        return hook

    handles = [decoder.model.get_submodule(name).register_forward_hook(after(name)) for name in decoder.targets[index]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
