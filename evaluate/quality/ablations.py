"""Controls: the same model with one part of its attention taken away."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dijiang.modeling import DiJiangForCausalLM
from dijiang.modeling.linear_attention_layer import linear_layers

SILENT = -1e4  # log-scale at which the linear branch has no weight in float32


@contextmanager
def window_only(model: DiJiangForCausalLM) -> Iterator[DiJiangForCausalLM]:
    """
    Within the block no linear layer uses its linear branch: what is left is softmax on window and sinks.

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
                scale.bias.fill_(SILENT)
            yield model
        finally:
            for scale, (weight, bias) in zip(scales, saved, strict=True):
                scale.weight.copy_(weight)
                scale.bias.copy_(bias)


@contextmanager
def linear_only(model: DiJiangForCausalLM) -> Iterator[DiJiangForCausalLM]:
    """Within the block every linear layer attends through its feature map to all tokens, without window and sinks."""
    layers = list(linear_layers(model).values())
    saved = [(layer.window, layer.sinks) for layer in layers]
    try:
        for layer in layers:
            layer.window = layer.sinks = 0
        yield model
    finally:
        for layer, (window, sinks) in zip(layers, saved, strict=True):
            layer.window, layer.sinks = window, sinks


@contextmanager
def no_attention(model: DiJiangForCausalLM) -> Iterator[DiJiangForCausalLM]:
    """Within the block no linear layer adds anything to the residual stream, as if its output projection were zero."""
    hooks = [
        layer.register_forward_hook(lambda module, args, output: (torch.zeros_like(output[0]), *output[1:]))
        for layer in linear_layers(model).values()
    ]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()
