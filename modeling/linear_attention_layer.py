"""
The linear-attention layer (DiJiang, arXiv 2403.19928): heads with a memory of constant size, beside them heads that keep every
token.

Its class is built up in five files, each on top of the one before: linear branch (layer_linear_branch.py), exact memory
(layer_exact_memory.py), a step of one token (layer_step.py), any number of tokens (layer_linear_heads.py), and here the whole
layer.

B batch, T tokens, H query heads, d head size.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .cache_dijiang import DiJiangCache
from .configuration_dijiang import DiJiangConfig
from .decoder_modules import Projections
from .kept_attention_native import native_attend_to_all
from .kept_heads import LinearMasks, join_heads, take_heads
from .layer_linear_heads import LinearHeadsAttention
from .layer_parts import OutputGate
from .transformers_compat import one_cache

# modules that a linear layer adds to the source's attention, in their order; their parameters have a row for each linear head:
# in feature_map_q and branch_scale for each query head, in the others for each key/value head
ADDED_PARTS = ("feature_map_q", "feature_map_k", "branch_scale", "key_scale", "decay", "memory_score")
OUTPUT_PARTS = ("output_norm", "output_gate")  # after its attention, for a layer whose heads are all linear


def linear_layers(model: nn.Module) -> dict[int, "DiJiangLinearAttention"]:
    """The layers of a model, whatever its head, in which any head has a linear state, by their index."""
    return {module.layer_idx: module for module in model.modules() if isinstance(module, DiJiangLinearAttention)}


class DiJiangLinearAttention(LinearHeadsAttention):
    """
    Attention whose memory per sequence is constant, but for that of kept heads. `window`, `sinks`, `slots`, `gate_temperature`
    and `mode` may be changed on a live layer.

    Attributes:
        full_heads: key/value heads that keep every token.
    """

    def __init__(self, config: DiJiangConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.full_heads = list(config.full_heads[layer_idx])
        width = len(self.linear_heads) * self.num_key_value_groups * self.head_dim
        self.output_norm = nn.GroupNorm(self.head_dim, width) if config.output_norm == "group_norm" else None
        self.output_gate = OutputGate(config.hidden_size, width, bias=False) if config.output_gate else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: LinearMasks | None = None,
        past_key_values: DiJiangCache | None = None,
        cache: DiJiangCache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """
        The layer's output (B, T, hidden), and None for its weights. `kwargs` are the model's, which has checked them; only the
        softmax attention of kept heads needs them.
        """
        masks = attention_mask or LinearMasks(None)
        projected = self.project(hidden_states, position_embeddings)
        caches = one_cache(past_key_values, cache)
        layer_cache: Any = None if caches is None else caches.layers[self.layer_idx]  # a LinearStateLayer
        q, k, v, raw_k = (self.take_linear_heads(x) for x in projected)
        if isinstance(masks.linear, list):
            o = self.attend_packed(q, k, v, masks.linear, raw_k)
        else:
            o, state = self.attend(q, k, v, masks.linear, None if layer_cache is None else layer_cache.state, raw_k)
        if self.full_heads:
            kept = self.attend_to_all(projected, masks.softmax, layer_cache, **kwargs)
            o = join_heads(kept, o, self.full_heads, self.linear_heads, self.num_key_value_groups)
        if layer_cache is not None:
            layer_cache.update_state(state, q.shape[1])
        o = o.flatten(2)
        if self.output_norm is not None:
            o = F.group_norm(
                o.flatten(0, 1),
                self.output_norm.num_groups,
                self.output_norm.weight.float(),
                self.output_norm.bias.float(),
                self.output_norm.eps,
            ).view_as(o)
        o = o.to(hidden_states.dtype)
        if self.output_gate is not None:
            o = o * self.output_gate(hidden_states)
        return self.o_proj(o), None

    def attend_to_all(self, projected: Projections, mask: Any, layer_cache: Any, **kwargs: Any) -> Tensor:
        """Softmax attention of the kept heads to every token, (B, T, their query heads, d)."""
        q = take_heads(projected.q, self.full_heads, self.num_key_value_groups).transpose(1, 2)
        k, v = (take_heads(x, self.full_heads).transpose(1, 2) for x in (projected.k, projected.v))
        if layer_cache is not None:
            k, v = layer_cache.update_kept(k, v)
        if mask is None and q.shape[2] == 1 and self.config._attn_implementation == "sdpa":
            o = native_attend_to_all(q, k, v, self.scaling)
            if o is not None:
                return o
        return self.softmax_attention(q, k, v, mask, **kwargs)[0]

    def take_linear_heads(self, x: Tensor) -> Tensor:
        """The heads of x (B, T, all query or key/value heads, d) that do not keep every token."""
        if not self.full_heads:
            return x
        return take_heads(x, self.linear_heads, x.shape[2] // self.num_key_value_heads)

    def with_kept_heads(self, outputs: Tensor, o: Tensor) -> Tensor:
        """`outputs` (B, T, all query heads, d) with those of the heads that do not keep every token from o (B, T, H, d)."""
        if not self.full_heads:
            return o
        kept = take_heads(outputs, self.full_heads, self.num_key_value_groups)
        return join_heads(kept, o, self.full_heads, self.linear_heads, self.num_key_value_groups)
