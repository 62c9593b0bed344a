"""How much an error in a layer's attention costs the model."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dijiang.common.hooks import hooks
from dijiang.modeling import DiJiangForCausalLM


@torch.enable_grad()
def layer_weights(model: DiJiangForCausalLM, input_ids: Tensor, seed: int = 0) -> list[float]:
    """
    The Fisher information of a relative error in each layer's attention output: the mean squared gradient of the
    log-likelihood of sampled next tokens by the output, times the output's mean square. Divided by the mean over layers.

    Args:
        model: softmax model whose weights need no gradients.
        input_ids: (T,).
        seed: of the sampled tokens.
    """
    offsets: list[Tensor] = []
    squares: list[Tensor] = []

    def offset_output(module: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
        attention = output[0]
        offsets.append(torch.zeros_like(attention, requires_grad=True))
        squares.append(attention.detach().float().square().sum(-1).mean())
        return attention + offsets[-1], *output[1:]

    def handles() -> Iterator[RemovableHandle]:
        for layer in model.model.layers:
            yield layer.self_attn.register_forward_hook(offset_output)

    with hooks(handles()):
        logits = model(input_ids=input_ids[None].to(model.device), use_cache=False).logits[0].float()
    generator = torch.Generator(device=logits.device).manual_seed(seed)
    tokens = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(-1)
    gradients = torch.autograd.grad(F.cross_entropy(logits, tokens, reduction="sum"), offsets)
    weights = torch.stack([g.float().square().sum(-1).mean() * s for g, s in zip(gradients, squares, strict=True)])
    return (weights / weights.mean()).tolist()
