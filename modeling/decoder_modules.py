"""Parts of the decoder that every layer type shares: norm, rotary positions, MLP and the projections around attention."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_dijiang import DiJiangConfig


class DiJiangRMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467), x / rms(x) * weight over the last axis, the statistics in float32."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x.float() * scale).to(x.dtype)


def build_norm(config: DiJiangConfig) -> nn.Module:
    """The norm that `config.norm_type` names, over the hidden size."""
    if config.norm_type == "rms_norm":
        return DiJiangRMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


class DiJiangRotaryEmbedding(nn.Module):
    """
    Rotary positions (arXiv 2104.09864) of any type that transformers offers, on the leading `partial_rotary_factor` of a head.
    `forward(x, position_ids)` with position_ids (B, T) returns cos and sin, (B, T, rotary size) in x's dtype.
    """

    inv_freq: Tensor

    def __init__(self, config: DiJiangConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        default = self.rope_type == "default"
        init_fn = self.compute_default_rope_parameters if default else ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = init_fn(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: DiJiangConfig, device: torch.device | None = None, **kwargs: Any
    ) -> tuple[Tensor, float]:
        """Plain rotary frequencies theta^(-2i / size) and no attention scaling; transformers calls it by this name."""
        rope = config.rope_parameters
        size = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
        exponent = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
        return 1.0 / rope["rope_theta"] ** exponent, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float32)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading features of x (B, T, heads, d) by cos, sin (B, T, rotary size); the rest passes unchanged."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    rotary, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotary.chunk(2, dim=-1)
    rotated = rotary * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


class DiJiangMLP(nn.Module):
    """`gated`: down(act(gate(x)) * up(x)), as LLaMA; `plain`: down(act(up(x))), as GPT-NeoX."""

    def __init__(self, config: DiJiangConfig):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        bias = config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias) if config.mlp_type == "gated" else None
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act_fn(self.up_proj(x)) if self.gate_proj is None else self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inner)


class Projections(NamedTuple):
    """
    What attention reads.

    Attributes:
        q: (B, T, H, d), rotary positions applied.
        k: (B, T, G, d), rotary positions applied.
        v: (B, T, G, d).
        raw_k: (B, T, G, d), k without rotary positions.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    raw_k: Tensor


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention in plain torch: query (B, H, T, d), key and value (B, G, S, d), attention_mask added to the logits."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ProjectedAttention(nn.Module):
    """
    Base of all attention layers: their four projections, under the same names for every source family, and softmax attention
    as `config._attn_implementation` names it.
    """

    is_causal = True  # transformers' attention functions ask the module
    sliding_window: int | None = None

    def __init__(self, config: DiJiangConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, self.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, self.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden, bias=bias)

    def project(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Projections:
        """Queries, keys and values of hidden states (B, T, hidden)."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (proj(hidden_states).view(shape) for proj in (self.q_proj, self.k_proj, self.v_proj))
        rotated = rotate(torch.cat((q, k), dim=2), *position_embeddings)
        rotated_q, rotated_k = rotated.split((self.num_heads, self.num_key_value_heads), dim=2)
        return Projections(rotated_q, rotated_k, v, k)

    def softmax_attention(
        self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """
        Softmax attention of q (B, H, T, d) to k and v (B, G, S, d), H / G as in the layer, under one of transformers' masks:
        (B, T, H, d), and the weights if the implementation has them.
        """
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return attention(
            self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, sliding_window=self.sliding_window, **kwargs
        )
