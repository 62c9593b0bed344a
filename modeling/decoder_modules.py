"""Parts of the decoder that every layer type shares: norm, rotary positions, MLP and the projections around attention."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

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


class ProjectedAttention(nn.Module):
    """Base of all attention layers: their four projections, under the same names for every source family."""

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

    def project(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, hidden) -> q (B, T, H, d), k and v (B, T, G, d), rotary positions applied to q and k."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (proj(hidden_states).view(shape) for proj in (self.q_proj, self.k_proj, self.v_proj))
        rotated = rotate(torch.cat((q, k), dim=2), *position_embeddings)
        q, k = rotated.split((self.num_heads, self.num_key_value_heads), dim=2)
        return q, k, v
