"""
Gates between a layer's own attention and full softmax attention, one per key/value head, with gradients
(DuoAttention, arXiv 2410.10819, has them between a window and full attention).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dijiang.modeling.linear_attention_layer import DiJiangLinearAttention, linear_layers

from ..exact_masks import is_masked_softmax, masked_attention

Attend = Callable[..., tuple[Tensor, Any]]


def count_heads(model: nn.Module) -> tuple[int, int]:
    """The layers of a model and the key/value heads of each, which is the shape of its gates."""
    config: Any = model.config
    return config.num_hidden_layers, config.num_key_value_heads


def candidates(model: nn.Module) -> list[tuple[int, int]]:
    """(layer, head) of every key/value head of the linear layers, in order."""
    _, heads = count_heads(model)
    return [(layer, head) for layer in sorted(linear_layers(model)) for head in range(heads)]


@contextmanager
def head_gates(model: nn.Module, gates: Tensor) -> Iterator[None]:
    """
    Let every key/value head of the linear layers attend as a * full softmax attention + (1 - a) * its own attention, both of
    the hidden states that reach the layer, for the length of a `with` block.

    Args:
        model: a DiJiang model whose linear layers keep no heads yet. It must be given whole sequences, without padding,
            packing or cache.
        gates: (layers, G), a of every head; its gradient is computed where it requires one. Rows of softmax layers do nothing.

    Raises:
        ValueError: on gates of another shape or layers that keep heads, and inside the block on padding or a cache.
    """
    if tuple(gates.shape) != count_heads(model):
        raise ValueError(f"gates have shape {tuple(gates.shape)}; the model's heads need {count_heads(model)}")
    if keeping := [i for i, layer in linear_layers(model).items() if layer.full_heads]:
        raise ValueError(f"layer {keeping[0]} keeps heads already; heads are selected on a model without full_heads")
    with wrapped_attention(model, lambda i, layer, attend: gated(layer, attend, gates[i])):
        yield


@contextmanager
def wrapped_attention(model: nn.Module, wrap: Callable[[int, DiJiangLinearAttention, Attend], Attend]) -> Iterator[None]:
    """Replace `attend` of every linear layer by `wrap(index, layer, attend)` for the length of a `with` block."""
    layers = linear_layers(model)
    # a block inside another one wraps what that one put there
    saved = {i: layer.__dict__.get("attend") for i, layer in layers.items()}
    try:
        for i, layer in layers.items():
            layer.__dict__["attend"] = wrap(i, layer, layer.attend)
        yield
    finally:
        for i, layer in layers.items():
            layer.__dict__.pop("attend", None)
            if saved[i] is not None:
                layer.__dict__["attend"] = saved[i]


def gated(layer: DiJiangLinearAttention, own_attend: Attend, gate: Tensor) -> Attend:
    """`own_attend` of a layer, mixed with full attention by the gates (G,) of its heads."""
    # a part that no gate lets through is not computed, unless a gradient asks for it
    constant = None if gate.requires_grad else gate.tolist()
    by_mask = is_masked_softmax(layer)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None, state: Any = None, raw_k: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        if valid is not None or state is not None:
            raise ValueError("gates are for whole sequences; give no padding, no packed rows and no cache")
        with torch.autocast(q.device.type, enabled=False):  # else the layer would call this function again, not its own
            if constant is not None and not any(constant):
                return own_attend(q, k, v, raw_k=raw_k)
            full = full_attention(q, k, v, layer.scaling)
            if constant is not None and all(a == 1 for a in constant):
                return full, None
            own = masked_attention(layer, q, k, v, raw_k) if by_mask else own_attend(q, k, v, raw_k=raw_k)[0]
            a = gate.repeat_interleave(q.shape[2] // k.shape[2]).to(full)[:, None]
            return own + a * (full - own), None

    return attend


def full_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Causal softmax attention of q (B, T, H, d) to k and v (B, T, G, d): (B, T, H, d), float32."""
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True).transpose(1, 2)
