"""
Squared gradients of the loss on calibration sequences: the empirical Fisher information of each matrix, and the energy of its
outputs' gradients. One decoder layer is in memory at a time, forwards and backwards; each sequence's result is cached, so that
an interrupted pass continues.
"""

import base64
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from dijiang.common.hooks import hooks
from dijiang.common.result_cache import ResultCache

from ...prunable_layers import refuse_uncalled
from ...streamed_decoder import StreamedDecoder
from .estimates import refuse_not_finite

FLOOR = 1e-4  # least row weight, as a share of their mean: rows without gradients still compete by their scores

# observe(name, inputs (B, T, C), gradients of the outputs (B, T, R))
Observer = Callable[[str, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class Gradients:
    """
    Squared gradients for each pruned matrix, by name.

    Attributes:
        weights: the empirical Fisher information of its weights, a number per sequence.
        outputs: squared gradients of its outputs, summed over tokens and sequences, (R,) float64; None if not asked for.
    """

    weights: dict[str, list[float]]
    outputs: dict[str, torch.Tensor] | None

    def row_weights(self, how: str, seed: int) -> dict[str, torch.Tensor]:
        """
        Factors of the scores in each row of a matrix, (R,) float32, mean 1.

        Args:
            how: `fisher`, the root mean square gradient of the row's output, not below `FLOOR` times their mean, and 1 if all
                are zero; `shuffled`, the same in an order drawn by `seed`; `alike`, none.
        """
        if how == "alike":
            return {}
        generator = torch.Generator().manual_seed(seed)
        factors = {}
        for name, energy in self.outputs.items():
            roots = energy.sqrt() if energy.any() else torch.ones_like(energy)
            roots = roots.clamp(min=FLOOR * roots.mean())
            order = torch.randperm(len(roots), generator=generator) if how == "shuffled" else slice(None)
            factors[name] = (roots / roots.mean())[order].float()
        return factors


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
    Pass every sequence forwards and backwards through the dense model, unless its result is cached.

    Args:
        blocks: token ids (N, T).
        facts: all that the numbers depend on besides the tokens.
        by_row: gather gradients of outputs as well.
        advance: adds a share of the work to the progress.

    Raises:
        ValueError: if a gradient is NaN or infinite.
    """
    names = [name for layer in decoder.targets for name in layer]
    weights: dict[str, list[float]] = {name: [] for name in names}
    outputs = {name: torch.zeros(decoder.model.get_submodule(name).out_features, dtype=torch.float64) for name in names}
    for block in blocks:
        key = facts | {"block": block.tolist()}
        result = cache.get(key)
        if result is None or (by_row and "outputs" not in result):
            of_weights, of_outputs = fisher(decoder, block[None])
            result = {"weights": {name: values[0] for name, values in of_weights.items()}}
            for name, values in of_weights.items():
                refuse_not_finite(name, values)
            if by_row:
                result["outputs"] = {name: packed(rows[0]) for name, rows in of_outputs.items()}
            cache.put(key, result)
        for name in names:
            weights[name].append(result["weights"][name])
            if by_row:
                outputs[name] += unpacked(result["outputs"][name])
        advance(1 / len(blocks))
    return Gradients(weights, outputs if by_row else None)


def packed(values: torch.Tensor) -> str:
    """Numbers in base64, as float32; they are too many for JSON."""
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()


def unpacked(text: str) -> torch.Tensor:
    """The numbers of `packed`, as float64."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float64))


# --- one pass ---


def fisher(decoder: StreamedDecoder, blocks: torch.Tensor) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """
    Compute ||dL_s/dW||_F^2 for each pruned matrix W and sequence s, L_s the mean next-token cross-entropy of s. Its mean over
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
    Pass token ids (B, T) forwards, and the gradients of each sequence's mean loss backwards. `observe` is called with the
    inputs of every pruned matrix and the gradients of its outputs.
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
    """Call `observe` for the matrices of a layer when gradients pass through them within the block."""

    def by_sequence(x: torch.Tensor) -> torch.Tensor:  # OPT's layers lay all tokens end to end
        return x.reshape(sequences, -1, x.shape[-1])

    def after(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            seen = by_sequence(inputs[0].detach())
            output.register_hook(lambda gradient: observe(name, seen, by_sequence(gradient)))

        return hook

    with hooks(decoder.model.get_submodule(name).register_forward_hook(after(name)) for name in decoder.targets[index]):
        yield
