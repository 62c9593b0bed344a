"""
Ablations: the same model with one part of its attention taken away for the length of a block. Heads that keep every token
are no part of a linear layer's own memory, so they stay in all of them but `no_attention`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dijiang.common.hooks import hooks
from dijiang.modeling import DiJiangForCausalLM
from dijiang.modeling.linear_attention_layer import linear_layers

NO_WEIGHT = -1e4  # log-scale at which the linear branch has no weight in float32


@contextmanager
def window_only(model: DiJiangForCausalLM) -> Iterator[DiJiangForCausalLM]:
    """
    Take the linear branch away from every linear layer, which leaves softmax on window, sinks and exact memory.

    Raises:
        ValueError: if a linear layer has no window.
    """
    scales = [layer.branch_scale for layer in linear_layers(model).values()]
    if None in scales:
        raise ValueError("a linear layer of this model has attention_window=0, so nothing is left without its linear branch")
    saved = [(scale.weight.detach().clone(), scale.bias.detach().clone()) for scale in scales]
    with torch.no_grad():
        try:
            for scale in scales:
                scale.weight.zero_()
                scale.bias.fill_(NO_WEIGHT)
            yield model
        finally:
            for scale, (weight, bias) in zip(scales, saved, strict=True):
                scale.weight.copy_(weight)
                scale.bias.copy_(bias)


@contextmanager
def linear_only(model: DiJiangForCausalLM) -> Iterator[DiJiangForCausalLM]:
    """
    Take window, sinks and exact memory away from every linear layer, which then attends to all tokens through its feature map.
    """
    with zeroed(model, "window", "sinks", "slots"):
        yield model


@contextmanager
def no_memory(model: DiJiangForCausalLM) -> Iterator[DiJiangForCausalLM]:
    """Take the exact memory away from every linear layer: what leaves the window goes into the linear state at once."""
    with zeroed(model, "slots"):
        yield model


@contextmanager
def zeroed(model: DiJiangForCausalLM, *names: str) -> Iterator[None]:
    """Set these sizes of every linear layer, each a number or a tuple of numbers, to zero."""
    saved = [(layer, name, getattr(layer, name)) for layer in linear_layers(model).values() for name in names]
    try:
        for layer, name, size in saved:
            setattr(layer, name, (0,) * len(size) if isinstance(size, tuple) else 0)
        yield
    finally:
        for layer, name, size in saved:
            setattr(layer, name, size)


@contextmanager
def no_attention(model: DiJiangForCausalLM) -> Iterator[DiJiangForCausalLM]:
    """Let no linear layer add anything to the residual stream, as if its output projection were zero."""
    with hooks(layer.register_forward_hook(zero_output) for layer in linear_layers(model).values()):
        yield model


def zero_output(module: torch.nn.Module, args: tuple, output: tuple) -> tuple:
    return torch.zeros_like(output[0]), *output[1:]
