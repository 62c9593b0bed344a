"""
The linear-attention layer: exact softmax on a window and sinks, DiJiang's features on everything older, one denominator
(arXiv 2403.19928; window and sinks: arXiv 2309.17453, 2410.10254).

B batch, T tokens, H query heads, G key/value heads, d head size, M features, S sinks, W window.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import logging

from .cache_dijiang import DiJiangCache
from .configuration_dijiang import DiJiangConfig
from .decode_step import StepWeights
from .decode_step_native import native_step
from .decode_step_triton import triton_step
from .decoder_modules import ProjectedAttention
from .exponential_maps import ExponentialMap
from .feature_map_base import MAX_EXPONENT
from .feature_maps import build_feature_map
from .linear_attention import TINY, WeightedSums, recurrent_step, weighted_sums
from .linear_attention_chunk import PIECE, PIECE_ON_GPU
from .linear_attention_native import NativeMaps, native_is_usable, native_linear_attention, native_supports
from .linear_state import LinearState
from .packing import PackedGroup
from .transformers_compat import one_cache
from .window_attention import LinearBranch, Sinks, Window, window_attention_step
from .window_attention_flex import window_attention

logger = logging.get_logger(__name__)


class LogScale(nn.Module):
    """The logarithm of a weight per head, scale * w.x + b. Input (B, T, heads, d), output float32 (B, T, heads)."""

    def __init__(self, num_heads: int, head_dim: int, start: float):
        super().__init__()
        self.start = float(start)
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.zeros_(self.weight)
        init.constant_(self.bias, self.start)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return torch.add(self.bias.float(), (x * self.weight.float()).sum(-1), alpha=scale)


class Decay(nn.Module):
    """
    Per-head log-decay -exp(log_rate), (G,) float32. At the start it is log(1 - 1 / span), where the spans of the heads run
    evenly on a logarithmic scale from the first of `spans` to the last (RetNet, arXiv 2307.08621, has [32, 512]).

    Args:
        num_heads: G.
        learned: whether the decay trains.
        spans: of the first and of the last head, in tokens.
    """

    def __init__(self, num_heads: int, learned: bool, spans: list[float | int]):
        super().__init__()
        self.learned = learned
        self.spans = spans
        self.log_rate = nn.Parameter(torch.empty(num_heads, dtype=torch.float32), requires_grad=learned)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.device("cpu"):
            ends = -torch.tensor(self.spans, dtype=torch.float64).log()
            share = torch.linspace(ends[0].item(), ends[1].item(), self.log_rate.shape[0], dtype=torch.float64).exp()
        init.copy_(self.log_rate, (-torch.log1p(-share)).log().float())  # finite for any span

    def forward(self) -> Tensor:
        # loading a checkpoint sets requires_grad on every parameter, so it is not what keeps a fixed decay fixed
        log_rate = self.log_rate if self.learned else self.log_rate.detach()
        return -log_rate.float().exp()


class OutputGate(nn.Linear):
    """SiLU gate on the heads' output, as in RetNet; it starts as in the paper's released code."""

    def reset_parameters(self) -> None:
        init.xavier_uniform_(self.weight, gain=2**-2.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


def linear_layers(model: nn.Module) -> dict[int, "DiJiangLinearAttention"]:
    """The linear layers of a model, whatever its head, by their index."""
    return {module.layer_idx: module for module in model.modules() if isinstance(module, DiJiangLinearAttention)}


class DiJiangLinearAttention(ProjectedAttention):
    """Attention whose memory per sequence is constant. `window`, `sinks` and `mode` may be changed on a live layer."""

    def __init__(self, config: DiJiangConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.window = config.attention_window
        self.sinks = config.attention_sinks
        self.normalize = config.normalize
        self.feature_scale = self.head_dim**-0.25 if config.scale_features else 1.0
        self.mode: str | None = None  # of linear_attention; None: recurrent for one token, else chunk
        H, G = self.num_heads, self.num_key_value_heads
        d = self.head_dim
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
        self.decay = Decay(G, config.decay == "learned", config.decay_spans) if config.decay != "none" else None
        self.output_norm = nn.GroupNorm(d, H * d) if config.output_norm == "group_norm" else None
        self.output_gate = OutputGate(config.hidden_size, H * d, bias=False) if config.output_gate else None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None, state: LinearState | None = None
    ) -> tuple[Tensor, LinearState]:
        """
        Mix T tokens that follow `state`.

        Args:
            q: (B, T, H, d), after rotary positions.
            k: (B, T, G, d), after rotary positions.
            v: (B, T, G, d).
            valid: (B, T) bool, False for padding, which no token sees. Default: all real. Padding before or after a sequence
                leaves no trace; padding between its tokens takes up rows of the window.
            state: of the tokens before. Default: there are none.

        Returns:
            o (B, T, H, d), float32 or, where the whole layer is linear, q's dtype; and the state after the last token.
        """
        if torch.is_autocast_enabled(q.device.type):  # it would mix the float32 of states with halves
            with torch.autocast(q.device.type, enabled=False):
                return self.attend(q, k, v, valid, state)
        if state is None:
            state = LinearState.empty(k, v, self.feature_map_k.size, self.window, self.sinks, self.normalize)
        rows = state.window_k.shape[2]
        if rows != self.sinks + self.window:
            raise ValueError(
                f"the state has {rows} rows for sinks and window, the layer {self.sinks} sinks and a window of {self.window}; "
                "start from a new cache"
            )
        T = k.shape[1]
        if T == 1 and valid is None and state.settled and self.mode is None:
            return self.attend_step(q, k, v, state)
        piece_size = PIECE if k.is_cpu else PIECE_ON_GPU
        if not self.window and self.runs_natively(q, k, v, valid):
            piece_size = T  # the native kernel cuts its own pieces
        if piece_size >= T or torch.compiler.is_compiling():  # the compiler would unroll the loop
            return self.attend_piece(q, k, v, valid, state)
        outputs = []
        whole = None
        for start in range(0, T, piece_size):
            piece = slice(start, start + piece_size)
            piece_valid = None if valid is None else valid[:, piece]
            o, state = self.attend_piece(q[:, piece], k[:, piece], v[:, piece], piece_valid, state)
            if torch.is_grad_enabled():
                outputs.append(o)
                continue
            whole = o.new_empty(q.shape) if whole is None else whole
            whole[:, piece] = o  # while it is in the processor's cache
        return torch.cat(outputs, dim=1) if whole is None else whole, state

    @torch.compiler.disable  # it would compile again for the shapes of each batch of rows
    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, groups: list[PackedGroup]) -> Tensor:
        """`attend` of several sequences that follow one another in the rows of q, k and v, laid end to end."""
        packed = torch.zeros_like(q, dtype=torch.float32).flatten(0, 1)
        for group in groups:
            rows = [group.unpack(x.flatten(0, 1)) for x in (q, k, v)]
            o, _ = self.attend(rows[0], rows[1], rows[2], group.valid)
            packed = group.pack_into(packed, o.float())
        return packed.view_as(q)

    def attend_piece(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, state: LinearState
    ) -> tuple[Tensor, LinearState]:
        """`attend` in one go."""
        T, S = k.shape[1], self.sinks
        if valid is None:
            rank = state.tokens[:, None] + torch.arange(T, device=k.device)
            tokens = state.tokens + T
        else:
            arrived = state.tokens[:, None] + valid.long().cumsum(1)
            rank = torch.where(valid, arrived - 1, -1)
            tokens = arrived[:, -1]
        new = replace(state, tokens=tokens, seen=state.seen + T, unpadded=state.unpadded and valid is None)
        if not self.window:
            new.settled = True
            if self.runs_natively(q, k, v, valid):
                o, _, new.state = self.native_linear_branch(q, k, v, valid, state.state, normalize=self.normalize)
                return o, new
            numerator, total, new.state = self.linear_branch(q, k, v, valid, state.state, rank, rank)
            return divide(numerator, total), new
        # rows t of `all_*` leave the window when query t arrives
        all_k, all_v = (
            torch.cat((rows[:, :, S:].transpose(1, 2), x), dim=1) for rows, x in ((state.window_k, k), (state.window_v, v))
        )
        all_rank = torch.cat((state.ranks(), rank), dim=1)
        leaving, new.window_rank = all_rank[:, :T], all_rank[:, T:]
        visible = None if state.settled and valid is None else leaving >= S
        numerator, total, new.state = self.linear_branch(q, all_k[:, :T], all_v[:, :T], visible, state.state, rank, leaving)
        sinks, new.sink_filled = self.store_sinks(state, all_k[:, :T], all_v[:, :T], leaving)
        new.window_k, new.window_v = (
            torch.cat((sink.transpose(1, 2), x[:, T:].transpose(1, 2)), dim=2)
            for sink, x in ((sinks.k, all_k), (sinks.v, all_v))
        )
        branch = self.scaled_branch(q, numerator, total)
        new.settled = state.settled and valid is None
        window = Window(all_k, all_v, None if new.settled else all_rank >= 0, sinks)
        return window_attention(q, window, branch, scale=self.scaling), new.settle(S)

    def attend_step(self, q: Tensor, k: Tensor, v: Tensor, state: LinearState) -> tuple[Tensor, LinearState]:
        """`attend` of one real token to a settled state, with as few operations as it takes."""
        fused = self.fused_step(q, k, v, state)
        if fused is not None:
            return fused
        S = self.sinks
        new = replace(state, tokens=state.tokens + 1, seen=state.seen + 1)
        if self.window:
            leaving_k, leaving_v = (x[:, :, S : S + 1].transpose(1, 2) for x in (state.window_k, state.window_v))
            new.window_k, new.window_v = (
                torch.cat((rows[:, :, :S], rows[:, :, S + 1 :], x.transpose(1, 2)), dim=2)
                for rows, x in ((state.window_k, k), (state.window_v, v))
            )
        else:
            leaving_k, leaving_v = k, v
        q_rank = k_rank = None
        if self.feature_map_k.needs_positions:
            q_rank = state.tokens[:, None]
            k_rank = q_rank - self.window
        phi_q = self.feature_map_q(q.float(), q_rank, self.feature_scale)
        phi_k = self.key_features(leaving_k.float(), k_rank)
        log_decay = None if self.decay is None else self.decay()
        numerator, total, new.state = recurrent_step(
            phi_q, phi_k, leaving_v.float(), log_decay, state.state, sums=self.normalize
        )
        if not self.window:
            return divide(numerator, total), new
        branch = self.scaled_branch(q, numerator, total)
        return window_attention_step(q, new.window_k, new.window_v, branch, scale=self.scaling), new

    def fused_step(self, q: Tensor, k: Tensor, v: Tensor, state: LinearState) -> tuple[Tensor, LinearState] | None:
        """`attend_step` by the Triton kernel or the C code; None where neither applies, and where gradients are wanted."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        weights = self.step_weights()
        if weights is None:
            return None
        return triton_step(weights, q, k, v, state) or native_step(weights, q, k, v, state)

    def step_weights(self) -> StepWeights | None:
        """The weights that the fused steps read; None for maps that are not exponentials of one matrix."""
        map_q, map_k = self.feature_map_q, self.feature_map_k
        if not (isinstance(map_q, ExponentialMap) and isinstance(map_k, ExponentialMap) and map_q.is_one_matrix):
            return None
        return StepWeights(
            map_q=map_q.factors(),
            map_k=map_k.factors(),
            key_scale=None if self.key_scale is None else (self.key_scale.weight, self.key_scale.bias),
            branch_scale=None if self.branch_scale is None else (self.branch_scale.weight, self.branch_scale.bias),
            log_rate=None if self.decay is None else self.decay.log_rate,
            rows=map_q.feature_dim,
            pairs=map_q.pairs,
            softmax=map_q.activation == "softmax",
            sinks=self.sinks,
            window=self.window,
            normalize=self.normalize,
            feature_scale=self.feature_scale,
            scaling=self.scaling,
            key_limit=self.key_exponent_limit,
        )

    def runs_natively(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> bool:
        """Whether the C kernel applies to `linear_branch` of these. The log says once if it does, or why it cannot."""
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if torch.is_grad_enabled() or traced or self.mode is not None or q.shape[1] == 1:
            return False
        phi = self.feature_map_q
        # it decays with every token, hidden ones included
        fits = isinstance(phi, ExponentialMap) and phi.is_one_matrix and (self.decay is None or visible is None)
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
            state = k.new_zeros(k.shape[0], k.shape[2], map_k.size, v.shape[3] + self.normalize, dtype=torch.float32)
        key_weight = None if visible is None else visible.float().unsqueeze(-1).expand(*k.shape[:3])
        if self.key_scale is not None:
            key_weight = self.key_weight(k) if key_weight is None else self.key_weight(k) * key_weight
        maps = NativeMaps(map_q.matrix(self.feature_scale), map_k.matrix(self.feature_scale), map_q.activation)
        log_decay = None if self.decay is None else self.decay()
        return native_linear_attention(
            q, k, v, maps, key_weight=key_weight, log_decay=log_decay, state=state, sums=self.normalize, normalize=normalize
        )

    def scaled_branch(self, q: Tensor, numerator: Tensor, total: Tensor | None) -> LinearBranch:
        """The linear branch of queries q (B, T, H, d), with the log-scale c(q) by which it joins the window's softmax."""
        assert self.branch_scale is not None and total is not None  # a layer with a window has both
        return LinearBranch(numerator, total, self.branch_scale(q, self.feature_scale))

    def key_weight(self, k: Tensor) -> Tensor:
        """exp(u.k + b), (B, T, G), of keys k (B, T, G, d), scaled first."""
        assert self.key_scale is not None
        limit = self.key_exponent_limit
        return self.key_scale(k, self.feature_scale).clamp(-limit, limit).exp()

    def key_features(self, k: Tensor, positions: Tensor | None = None) -> Tensor:
        """phi(k) exp(u.k + b) of keys k (B, T, G, d), scaled first: (B, T, G, M), what the state accumulates."""
        phi_k = self.feature_map_k(k, positions, self.feature_scale)
        return phi_k if self.key_scale is None else phi_k * self.key_weight(k).unsqueeze(-1)

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
            visible: (B, T) bool, False for keys that no query sees. None: all are seen.
            state: (B, G, M, e + 1), or (B, G, M, e) without normalization. None: zeros.
            q_positions: (B, T), for maps that need them.
            k_positions: (B, T), for maps that need them.

        Returns:
            numerator (B, T, H, e), the sum of weights float32 (B, T, H) or None without normalization, and the new state.
        """
        if self.runs_natively(q, k, v, visible):
            return self.native_linear_branch(q, k, v, visible, state)
        # bfloat16 values are mixed by bfloat16 products, sums and states stay float32
        dtype = torch.bfloat16 if v.dtype == torch.bfloat16 and q.shape[1] > 1 else torch.float32
        phi_q = self.feature_map_q(q, q_positions, self.feature_scale).to(dtype)
        phi_k = self.key_features(k, k_positions).to(dtype)
        log_decay = None if self.decay is None else self.decay()
        if visible is not None:
            phi_k = phi_k * visible[..., None, None]
            # a key decays once for every key that enters the state after it, so padding does not age it
            log_decay = None if log_decay is None else log_decay * visible[..., None]
        mode = self.mode or ("recurrent" if q.shape[1] == 1 else "chunk")
        return weighted_sums(phi_q, phi_k, v.to(dtype), log_decay=log_decay, sums=self.normalize, state=state, mode=mode)

    def store_sinks(self, state: LinearState, k: Tensor, v: Tensor, rank: Tensor) -> tuple[Sinks, Tensor]:
        """The sinks after the first S real tokens moved there as they left the window, and which are filled (B, S)."""
        T, S = k.shape[1], self.sinks
        stored_k, stored_v = (x[:, :, :S].transpose(1, 2) for x in (state.window_k, state.window_v))
        if state.settled:
            return Sinks(stored_k, stored_v, None), state.sink_filled
        matches = rank[:, :, None] == torch.arange(S, device=rank.device)
        present = matches.any(1)
        row = matches.long().argmax(1)
        index = row[:, :, None, None].expand(-1, -1, *k.shape[2:])
        arrival = torch.where(present, row, torch.where(state.sink_filled, -1, T))
        sink_k, sink_v = (
            torch.where(present[..., None, None], x.gather(1, index), stored) for x, stored in ((k, stored_k), (v, stored_v))
        )
        return Sinks(sink_k, sink_v, arrival), state.sink_filled | present

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | list[PackedGroup] | None = None,
        past_key_values: DiJiangCache | None = None,
        cache: DiJiangCache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """
        The layer's output (B, T, hidden), and None for its weights. attention_mask is (B, T) bool, packed groups or None.
        `kwargs` are the model's, which has checked them; a linear layer needs none of them.
        """
        q, k, v = self.project(hidden_states, position_embeddings)
        caches = one_cache(past_key_values, cache)
        if isinstance(attention_mask, list):
            o = self.attend_packed(q, k, v, attention_mask)
        elif caches is None:
            o, _ = self.attend(q, k, v, attention_mask)
        else:
            layer_cache: Any = caches.layers[self.layer_idx]  # a LinearStateLayer
            o, state = self.attend(q, k, v, attention_mask, layer_cache.state)
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


def divide(numerator: Tensor, total: Tensor | None) -> Tensor:
    """The numerator (B, T, H, d) over the sum of weights (B, T, H), or itself where there is no such sum."""
    return numerator if total is None else numerator / total.clamp_min(TINY).unsqueeze(-1).to(numerator.dtype)
