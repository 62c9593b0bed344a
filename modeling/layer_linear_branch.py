"""
The linear branch of a linear layer: DiJiang's features of queries and keys (arXiv 2403.19928), what each key weighs and how it
decays, and the sum over all keys that queries no longer see exactly.

B batch, T tokens, H query heads, G key/value heads, d head size, M features. H and G count the heads that do not keep every
token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from .configuration_dijiang import DiJiangConfig
from .decoder_modules import ProjectedAttention
from .delta_rule import delta_rule
from .exponential_maps import ExponentialMap
from .feature_map_base import MAX_EXPONENT
from .feature_maps import build_feature_map
from .layer_parts import Decay, LogScale
from .linear_attention import TINY, WeightedSums, weighted_sums
from .linear_attention_native import NativeMaps, native_is_usable, native_linear_attention, native_supports
from .window_attention import LinearBranch

logger = logging.get_logger(__name__)


class LinearBranchAttention(ProjectedAttention):
    """
    Projections and the linear branch of the heads that do not keep every token.

    Attributes:
        window: W; 0: all tokens are in the linear branch.
        normalize: whether outputs are divided by the sum of the weights.
        overwrites: whether the state is updated by the delta rule; the sum of weights is then 1, or 0 while it is empty.
        feature_scale: factor on queries and keys before their maps.
        linear_heads: key/value heads that do not keep every token.
    """

    def __init__(self, config: DiJiangConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.window = config.attention_window
        self.normalize = config.normalize
        self.overwrites = config.state_update == "delta"
        self.sums = config.normalize and not self.overwrites  # whether the state has a sum of weights
        self.feature_scale = self.head_dim**-0.25 if config.scale_features else 1.0
        self.mode: str | None = None  # of linear_attention; None: recurrent for one token, else chunk
        self.linear_heads = config.linear_heads(layer_idx)
        G, d = len(self.linear_heads), self.head_dim
        H = G * self.num_key_value_groups
        # phi(q) and phi(k) start as one map and may drift apart in training
        self.feature_map_q = build_feature_map(config, H, config.feature_seed + layer_idx)
        self.feature_map_k = build_feature_map(config, G, config.feature_seed + layer_idx)
        # features that a softmax keeps below 1 leave the whole range of exponents to the keys' weights
        bounded = config.feature_activation == "softmax" and "feature_activation" in self.feature_map_k.settings
        self.key_exponent_limit = 3 * MAX_EXPONENT if bounded else MAX_EXPONENT
        # c(q): how much the linear branch's weights count in the softmax. A scalar per head would not do, since
        # log(sum exp(q.k)) - log(phi(q).sum phi(k)) varies with q
        self.branch_scale = LogScale(H, d, config.branch_scale_init) if self.window else None
        self.key_scale = LogScale(G, d, 0.0) if config.key_scale else None
        self.decay = None
        if config.decay != "none":
            self.decay = Decay(self.num_key_value_heads, config.decay == "learned", config.decay_spans, self.linear_heads)

    def linear_branch(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Tensor | None,
        state: Tensor | None,
        q_positions: Tensor | None = None,
        k_positions: Tensor | None = None,
    ) -> WeightedSums:
        """
        Linear attention of queries to the keys that left the window.

        Args:
            q: (B, T, H, d).
            k: (B, T, G, d).
            v: (B, T, G, e).
            visible: (B, T) bool or, by head, (B, T, G), False for keys that no query sees. None: all are seen.
            state: (B, G, M, e + 1), or (B, G, M, e) without a sum of weights. None: zeros.
            q_positions: (B, T), for maps that need them.
            k_positions: (B, T) or, by head, (B, T, G), for maps that need them.

        Returns:
            numerator (B, T, H, e), the sum of weights float32 (B, T, H) or None without normalization, and the new state.
        """
        if self.overwrites:
            return self.delta_branch(q, k, v, visible, state, q_positions, k_positions)
        if self.runs_natively(q, k, v, visible):
            return self.native_linear_branch(q, k, v, visible, state)
        # bfloat16 values are mixed by bfloat16 products, sums and states stay float32
        dtype = torch.bfloat16 if v.dtype == torch.bfloat16 and q.shape[1] > 1 else torch.float32
        phi_q = self.feature_map_q(q, q_positions, self.feature_scale).to(dtype)
        phi_k = self.key_features(k, k_positions).to(dtype)
        log_decay = None if self.decay is None else self.decay()
        if visible is not None:
            visible = visible.unsqueeze(-1) if visible.dim() == 2 else visible
            phi_k = phi_k * visible.unsqueeze(-1)
            # a key decays once for every key that enters the state after it, so padding does not age it
            log_decay = None if log_decay is None else log_decay * visible
        mode = self.mode or ("recurrent" if q.shape[1] == 1 else "chunk")
        return weighted_sums(phi_q, phi_k, v.to(dtype), log_decay=log_decay, sums=self.sums, state=state, mode=mode)

    def delta_branch(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Tensor | None,
        state: Tensor | None,
        q_positions: Tensor | None = None,
        k_positions: Tensor | None = None,
    ) -> WeightedSums:
        """`linear_branch` by the delta rule; its state is (B, G, M, e)."""
        phi_q = F.normalize(self.feature_map_q(q, q_positions, self.feature_scale).float(), dim=-1)
        phi_k = F.normalize(self.feature_map_k(k, k_positions, self.feature_scale).float(), dim=-1)
        there = phi_k.new_ones(k.shape[:3])
        if visible is not None:
            there = there * (visible.unsqueeze(-1) if visible.dim() == 2 else visible)
        written = there if self.key_scale is None else there * self.key_scale(k, self.feature_scale).sigmoid()
        log_decay = None if self.decay is None else self.decay() * there
        mode = self.mode or ("recurrent" if q.shape[1] == 1 else "chunk")
        held = there.cumsum(1) > 0  # whether the state holds anything
        if state is not None:
            held = held | (state != 0).flatten(2).any(-1).unsqueeze(1)
        o, state = delta_rule(phi_q, phi_k, v, written, log_decay=log_decay, state=state, mode=mode)
        return o, held.float().repeat_interleave(self.num_key_value_groups, dim=2), state

    def key_features(self, k: Tensor, positions: Tensor | None = None) -> Tensor:
        """phi(k) exp(u.k + b) of keys k (B, T, G, d), scaled first: (B, T, G, M), what the state accumulates."""
        phi_k = self.feature_map_k(k, positions, self.feature_scale)
        return phi_k if self.key_scale is None else phi_k * self.key_weight(k).unsqueeze(-1)

    def both_features(self, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """phi(k), and phi(k) exp(u.k + b), of keys k (B, T, G, d)."""
        return self.feature_map_k(k, positions, self.feature_scale), self.key_features(k, positions)

    def key_weight(self, k: Tensor) -> Tensor:
        """exp(u.k + b), (B, T, G), of keys k (B, T, G, d), scaled first."""
        assert self.key_scale is not None
        limit = self.key_exponent_limit
        return self.key_scale(k, self.feature_scale).clamp(-limit, limit).exp()

    def scaled_branch(self, q: Tensor, numerator: Tensor, total: Tensor | None) -> LinearBranch:
        """The linear branch of queries q (B, T, H, d), with the log-scale c(q) by which it joins the window's softmax."""
        assert self.branch_scale is not None and total is not None  # a layer with a window has both
        return LinearBranch(numerator, total, self.branch_scale(q, self.feature_scale))

    def runs_natively(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> bool:
        """Whether the C kernel applies to `linear_branch` of these. The log says once if it does, or why it cannot."""
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if torch.is_grad_enabled() or traced or self.mode is not None or q.shape[1] == 1:
            return False
        phi = self.feature_map_q
        # it decays with every token, hidden ones included
        fits = (
            not self.overwrites
            and isinstance(phi, ExponentialMap)
            and phi.is_one_matrix
            and (self.decay is None or visible is None)
        )
        # offloaded weights are on no device until their own module is called
        weights = (*phi.parameters(), *self.feature_map_k.parameters())
        if not (fits and native_supports(q, k, v, phi.size) and all(p.is_cpu for p in weights)):
            return False
        usable, reason = native_is_usable()
        logger.info_once("linear layers run on the native CPU kernel" if usable else f"no native CPU kernel: {reason}")
        return usable

    def native_linear_branch(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, state: Tensor | None, normalize: bool = False
    ) -> WeightedSums:
        """`linear_branch` by the C kernel; with `normalize` its quotient, None, and the state."""
        map_q, map_k = self.feature_map_q, self.feature_map_k
        assert isinstance(map_q, ExponentialMap) and isinstance(map_k, ExponentialMap)
        if state is None:
            state = k.new_zeros(k.shape[0], k.shape[2], map_k.size, v.shape[3] + self.sums, dtype=torch.float32)
        if visible is not None and visible.dim() == 2:
            visible = visible.unsqueeze(-1)
        key_weight = None if visible is None else visible.float().expand(*k.shape[:3])
        if self.key_scale is not None:
            key_weight = self.key_weight(k) if key_weight is None else self.key_weight(k) * key_weight
        maps = NativeMaps(map_q.matrix(self.feature_scale), map_k.matrix(self.feature_scale), map_q.activation)
        log_decay = None if self.decay is None else self.decay()
        return native_linear_attention(
            q, k, v, maps, key_weight=key_weight, log_decay=log_decay, state=state, sums=self.sums, normalize=normalize
        )


def divide(numerator: Tensor, total: Tensor | None) -> Tensor:
    """The numerator (B, T, H, d) over the sum of weights (B, T, H), or itself where there is no such sum."""
    return numerator if total is None else numerator / total.clamp_min(TINY).unsqueeze(-1).to(numerator.dtype)
