"""
The linear-attention layer: exact softmax on a window, sinks and old tokens that a score holds on to, DiJiang's features on
everything else, one denominator (arXiv 2403.19928; window and sinks: arXiv 2309.17453, 2410.10254); and beside that key/value
heads that keep every token.

B batch, T tokens, H query heads, G key/value heads, d head size, M features, S sinks, W window. H and G count the heads that
do not keep every token, except in `forward`.
"""

import functools
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from .cache_dijiang import DiJiangCache
from .configuration_dijiang import DiJiangConfig
from .decode_step import StepWeights
from .decode_step_native import StepMemory, native_step
from .decode_step_triton import triton_step
from .decoder_modules import ProjectedAttention, Projections
from .exact_attention_native import PassedMemory, exact_is_native, native_pass_memory, native_received, native_window_attention
from .exact_memory import (
    HeldKeys,
    candidates_of,
    held_keys,
    held_rows,
    lost_keys,
    memory_after,
    plan_memory,
    replace_weakest,
    soft_gate,
)
from .exponential_maps import ExponentialMap
from .feature_map_base import MAX_EXPONENT
from .feature_maps import build_feature_map
from .kept_attention_native import native_attend_to_all
from .kept_heads import LinearMasks, join_heads, take_heads
from .layer_parts import Decay, LogScale, OutputGate
from .linear_attention import TINY, WeightedSums, recurrent_step, weighted_sums
from .linear_attention_chunk import PIECE, PIECE_ON_GPU
from .linear_attention_native import NativeMaps, native_is_usable, native_linear_attention, native_supports
from .linear_state import EMPTY, LinearState, StateSizes
from .memory_scores import LearnedScore, WindowAttentionScore, build_memory_score, rounded
from .packing import PackedGroup
from .transformers_compat import one_cache
from .window_attention import LinearBranch, Sinks, Window, queries_per_block, window_attention_step
from .window_attention_flex import window_attention

logger = logging.get_logger(__name__)
# tokens per piece where all of a layer runs in C: the fastest of 512, 2,048 and 8,192 within noise
PIECE_OF_NATIVE = 2048


def linear_layers(model: nn.Module) -> dict[int, "DiJiangLinearAttention"]:
    """The layers of a model, whatever its head, in which any head has a linear state, by their index."""
    return {module.layer_idx: module for module in model.modules() if isinstance(module, DiJiangLinearAttention)}


class DiJiangLinearAttention(ProjectedAttention):
    """
    Attention whose memory per sequence is constant, but for that of kept heads. `window`, `sinks`, `slots`, `gate_temperature`
    and `mode` may be changed on a live layer.

    Attributes:
        full_heads: key/value heads that keep every token.
        linear_heads: the others.
        slots: slots of the exact memory, by linear head.
        gate_temperature: temperature of the soft gate through which the scores of held tokens train; None: no gate.
    """

    def __init__(self, config: DiJiangConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.window = config.attention_window
        self.sinks = config.attention_sinks
        self.normalize = config.normalize
        self.feature_scale = self.head_dim**-0.25 if config.scale_features else 1.0
        self.mode: str | None = None  # of linear_attention; None: recurrent for one token, else chunk
        self.full_heads = list(config.full_heads[layer_idx])
        self.linear_heads = config.linear_heads(layer_idx)
        self.slots = tuple(config.memory_slots(layer_idx)[head] for head in self.linear_heads)
        self.gate_temperature: float | None = None
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
        self.memory_score = build_memory_score(config, self.linear_heads, layer_idx) if any(self.slots) else None
        self.output_norm = nn.GroupNorm(d, H * d) if config.output_norm == "group_norm" else None
        self.output_gate = OutputGate(config.hidden_size, H * d, bias=False) if config.output_gate else None

    @property
    def has_memory(self) -> bool:
        """Whether any head has slots of the exact memory."""
        return self.memory_score is not None and any(self.slots)

    @property
    def state_sizes(self) -> StateSizes:
        """Sizes of the layer's state."""
        size = self.feature_map_k.size
        if not self.has_memory:
            return StateSizes(size, self.window, self.sinks, self.normalize)
        assert self.memory_score is not None
        carry = self.memory_score.carry_size(size)
        return StateSizes(size, self.window, self.sinks, self.normalize, self.slots, carry)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None = None,
        state: LinearState | None = None,
        raw_k: Tensor | None = None,
    ) -> tuple[Tensor, LinearState]:
        """
        Mix T tokens that follow `state`, in the heads that do not keep every token.

        Args:
            q: (B, T, H, d), after rotary positions.
            k: (B, T, G, d), after rotary positions.
            v: (B, T, G, d).
            valid: (B, T) bool, False for padding, which no token sees. Default: all real. Padding before or after a sequence
                leaves no trace; padding between its tokens takes up rows of the window.
            state: of the tokens before. Default: there are none.
            raw_k: (B, T, G, d), k before rotary positions, which the exact memory's score reads; needed if there is a memory.

        Returns:
            o (B, T, H, d), float32 or, where the whole layer is linear, q's dtype; and the state after the last token.
        """
        if torch.is_autocast_enabled(q.device.type):  # it would mix the float32 of states with halves
            with torch.autocast(q.device.type, enabled=False):
                return self.attend(q, k, v, valid, state, raw_k)
        sizes = self.state_sizes
        if state is None:
            state = LinearState.empty(k, v, sizes)
        if sizes.slots and raw_k is None:
            raise ValueError("a layer with attention_memory needs raw_k, the keys before rotary positions")
        rows = state.window_k.shape[2]
        if rows != self.sinks + self.window:
            raise ValueError(
                f"the state has {rows} rows for sinks and window, the layer {self.sinks} sinks and a window of {self.window}; "
                "start from a new cache"
            )
        if state.memory_rank.shape[1] != sum(sizes.slots):
            raise ValueError(
                f"the state has {state.memory_rank.shape[1]} slots, the layer {sum(sizes.slots)}; start from a new cache"
            )
        T = k.shape[1]
        if T == 1 and valid is None and state.settled and self.mode is None:
            return self.attend_step(q, k, v, state, raw_k)
        piece_size = PIECE if k.is_cpu else PIECE_ON_GPU
        if self.runs_natively(q, k, v, valid):  # the native kernels cut their own pieces
            if not self.window:
                piece_size = T
            elif self.attends_natively(q, k, v, state):
                piece_size = PIECE_OF_NATIVE
        if piece_size >= T or torch.compiler.is_compiling():  # the compiler would unroll the loop
            return self.attend_piece(q, k, v, valid, state, raw_k)
        outputs = []
        whole = None
        for start in range(0, T, piece_size):
            piece = slice(start, start + piece_size)
            piece_valid = None if valid is None else valid[:, piece]
            piece_raw_k = None if raw_k is None else raw_k[:, piece]
            o, state = self.attend_piece(q[:, piece], k[:, piece], v[:, piece], piece_valid, state, piece_raw_k)
            if torch.is_grad_enabled():
                outputs.append(o)
                continue
            whole = o.new_empty(q.shape) if whole is None else whole
            whole[:, piece] = o  # while it is in the processor's cache
        return torch.cat(outputs, dim=1) if whole is None else whole, state

    @torch.compiler.disable  # it would compile again for the shapes of each batch of rows
    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, groups: list[PackedGroup], raw_k: Tensor | None = None) -> Tensor:
        """`attend` of several sequences that follow one another in the rows of q, k and v, laid end to end."""
        packed = torch.zeros_like(q, dtype=torch.float32).flatten(0, 1)
        for group in groups:
            rows = [group.unpack(x.flatten(0, 1)) for x in (q, k, v)]
            group_raw_k = None if raw_k is None else group.unpack(raw_k.flatten(0, 1))
            o, _ = self.attend(rows[0], rows[1], rows[2], group.valid, raw_k=group_raw_k)
            packed = group.pack_into(packed, o.float())
        return packed.view_as(q)

    def attend_piece(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, state: LinearState, raw_k: Tensor | None = None
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
            new.settled = new.full = True
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
        sinks, new.sink_filled = self.store_sinks(state, all_k[:, :T], all_v[:, :T], leaving)
        new.settled = state.settled and valid is None
        new.full = state.full and new.settled
        window = Window(all_k, all_v, None if new.settled else all_rank >= 0, sinks)
        native = self.attends_natively(q, all_k, all_v, state)
        memory: HeldKeys | PassedMemory | None = None
        old_k, old_v, old_rank = all_k[:, :T], all_v[:, :T], leaving
        visible = None if new.settled else leaving >= S
        if self.has_memory:
            assert raw_k is not None
            scores = self.scores_of_leaving(q, v, raw_k, valid, rank, leaving, window, state, new)
            if native:
                memory, passed = native_pass_memory(state, self.slots, all_k, all_v, scores, leaving)
                for name, x in passed.items():
                    setattr(new, name, x)
                old_k, old_v, visible, old_rank = memory.lost_k, memory.lost_v, memory.there, memory.lost_rank
            else:
                leavers = (old_k, old_v, scores, leaving)
                memory, old_k, old_v, visible, old_rank = self.pass_memory(q, rank, leavers, state, new)
            visible = None if state.full and new.settled else visible
        numerator, total, new.state = self.linear_branch(q, old_k, old_v, visible, state.state, rank, old_rank)
        new.window_k, new.window_v = (
            torch.cat((sink.transpose(1, 2), x[:, T:].transpose(1, 2)), dim=2)
            for sink, x in ((sinks.k, all_k), (sinks.v, all_v))
        )
        assert self.branch_scale is not None and total is not None  # a layer with a window has both
        if native:
            assert not isinstance(memory, HeldKeys)
            log_scale = self.branch_scale.weight, self.branch_scale.bias, self.feature_scale
            o = native_window_attention(q, window, numerator, total, log_scale, scale=self.scaling, memory=memory)
        else:
            assert not isinstance(memory, PassedMemory)
            branch = self.scaled_branch(q, numerator, total)
            o = window_attention(q, window, branch, scale=self.scaling, memory=memory)
        return o, new.settle(S, max(self.slots, default=0))

    def attends_natively(self, q: Tensor, k: Tensor, v: Tensor, state: LinearState) -> bool:
        """Whether the C code applies to the exact branch and its memory."""
        if self.mode is not None or self.gate_temperature is not None:
            return False
        one_dtype = state.memory_k.dtype == state.memory_v.dtype == k.dtype
        # offloaded weights are on no device until their own module is called
        ready = self.branch_scale is not None and all(x.is_cpu for x in self.branch_scale.parameters())
        return one_dtype and ready and exact_is_native(q, k, v)

    def scores_of_leaving(  # noqa: PLR0913
        self,
        q: Tensor,
        v: Tensor,
        raw_k: Tensor,
        valid: Tensor | None,
        rank: Tensor,
        leaving: Tensor,
        window: Window,
        state: LinearState,
        new: LinearState,
    ) -> Tensor:
        """Scores (B, G, T) of the tokens that leave the window; those of the tokens in it are written to `new`."""
        assert self.memory_score is not None
        T = q.shape[1]
        scores, carry = self.memory_score.arriving(raw_k, v, rank, state.score_carry)
        scores = torch.cat((state.window_score, scores), dim=2)
        if self.memory_score.reads_queries:
            native = type(self.memory_score) is WindowAttentionScore and self.attends_natively(q, window.k, window.v, state)
            if native:
                scores = scores + native_received(q, window, self.scaling)
            else:
                scores = scores + self.memory_score.received(q, window, valid, self.scaling)
        competing = torch.where(leaving >= self.sinks, leaving, -1)
        left, new.score_carry = self.memory_score.leaving(
            self.both_features, scores[:, :, :T], window.k[:, :T], window.v[:, :T], competing, carry
        )
        new.window_score = scores[:, :, T:]
        return rounded(left).masked_fill((competing < 0).unsqueeze(1), EMPTY)

    def both_features(self, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """phi(k), and phi(k) exp(u.k + b), of keys k (B, T, G, d)."""
        return self.feature_map_k(k, positions, self.feature_scale), self.key_features(k, positions)

    def pass_memory(
        self,
        q: Tensor,
        q_rank: Tensor,
        old: tuple[Tensor, Tensor, Tensor, Tensor],
        state: LinearState,
        new: LinearState,
    ) -> tuple[HeldKeys, Tensor, Tensor, Tensor, Tensor]:
        """
        Let tokens that leave the window compete for the memory's slots.

        Args:
            q: (B, T, H, d), the queries with which they leave.
            q_rank: (B, T), how many real tokens came before each query.
            old: keys, values (B, T, G, d), scores (B, G, T) and ranks (B, T) of the leaving tokens.
            state: before; `new` gets the memory as it is afterwards.

        Returns:
            What the queries see in the memory; and of the tokens that it lost, one with every query, keys and values
            (B, T, G, d), which are there (B, T, G), and their ranks (B, T, G).
        """
        T = q.shape[1]
        C = min(queries_per_block(self.window), T)
        candidates = candidates_of(state, self.slots, *old)
        plan = plan_memory(candidates.score[:, :, :-T], candidates.score[:, :, -T:], self.slots, C)
        held = held_keys(candidates, plan, C)
        if self.gate_temperature is not None:
            phi_q = self.feature_map_q(q, q_rank, self.feature_scale)
            phi_k = self.key_features(candidates.k.transpose(1, 2), candidates.rank.transpose(1, 2))
            held = held._replace(gate=soft_gate(candidates, plan, held, self.gate_temperature, (phi_q, phi_k)))
        for name, x in memory_after(candidates, plan, self.slots).items():
            setattr(new, name, x)
        lost_k, lost_v, there, lost_rank = lost_keys(candidates, plan)
        return held, lost_k, lost_v, there, lost_rank

    def attend_step(
        self, q: Tensor, k: Tensor, v: Tensor, state: LinearState, raw_k: Tensor | None = None
    ) -> tuple[Tensor, LinearState]:
        """`attend` of one real token to a settled state, with as few operations as it takes."""
        fused = self.fused_step(q, k, v, state, raw_k)
        if fused is not None:
            return fused
        S = self.sinks
        new = replace(state, tokens=state.tokens + 1, seen=state.seen + 1)
        old_k, old_v = k, v
        if self.window:
            old_k, old_v = (x[:, :, S : S + 1].transpose(1, 2) for x in (state.window_k, state.window_v))
            new.window_k, new.window_v = (
                torch.cat((rows[:, :, :S], rows[:, :, S + 1 :], x.transpose(1, 2)), dim=2)
                for rows, x in ((state.window_k, k), (state.window_v, v))
            )
        q_rank, old_rank = state.tokens[:, None], state.tokens[:, None] - self.window
        exact_k, exact_v, hidden, there = new.window_k, new.window_v, None, None
        if self.has_memory:
            assert raw_k is not None
            score = self.score_of_leaving(q, v, raw_k, (old_k, old_v), state, new)
            leaver = (old_k.transpose(1, 2), old_v.transpose(1, 2), score, old_rank[:, 0])
            fields, lost = replace_weakest(state, self.slots, *leaver)
            for name, x in fields.items():
                setattr(new, name, x)
            old_k, old_v, old_rank = (x.transpose(1, 2) for x in (lost.k, lost.v, lost.rank))
            there = None if state.full else old_rank >= 0
            held_k, held_v, empty = held_rows(new, self.slots)
            exact_k, exact_v = torch.cat((exact_k, held_k), dim=2), torch.cat((exact_v, held_v), dim=2)
            hidden = F.pad(empty, (S + self.window, 0))
            new.settle(S, max(self.slots))
        phi_q = self.feature_map_q(q.float(), q_rank, self.feature_scale)
        phi_k = self.key_features(old_k.float(), old_rank)
        log_decay = None if self.decay is None else self.decay()
        if there is not None:
            phi_k = phi_k * there.unsqueeze(-1)
            log_decay = None if log_decay is None else log_decay * there
        numerator, total, new.state = recurrent_step(phi_q, phi_k, old_v.float(), log_decay, state.state, sums=self.normalize)
        if not self.window:
            return divide(numerator, total), new
        branch = self.scaled_branch(q, numerator, total)
        return window_attention_step(q, exact_k, exact_v, branch, scale=self.scaling, hidden=hidden), new

    def score_of_leaving(
        self, q: Tensor, v: Tensor, raw_k: Tensor, old: tuple[Tensor, Tensor], state: LinearState, new: LinearState
    ) -> Tensor:
        """`scores_of_leaving` of the one token that leaves a settled window, keys and values `old` (B, 1, G, d): (B, G, 1)."""
        assert self.memory_score is not None
        S = self.sinks
        rank = state.tokens[:, None]
        arriving, carry = self.memory_score.arriving(raw_k, v, rank, state.score_carry)
        scores = torch.cat((state.window_score, arriving), dim=2)
        if self.memory_score.reads_queries:
            sinks_k, sinks_v = (x[:, :, :S].transpose(1, 2) for x in (new.window_k, new.window_v))
            rows_k = torch.cat((old[0], new.window_k[:, :, S:].transpose(1, 2)), dim=1)
            rows_v = torch.cat((old[1], new.window_v[:, :, S:].transpose(1, 2)), dim=1)
            window = Window(rows_k, rows_v, None, Sinks(sinks_k, sinks_v, None))
            scores = scores + self.memory_score.received(q, window, None, self.scaling)
        score, new.score_carry = self.memory_score.leaving(
            self.both_features, scores[:, :, :1], *old, rank - self.window, carry
        )
        new.window_score = scores[:, :, 1:]
        return rounded(score)

    def fused_step(
        self, q: Tensor, k: Tensor, v: Tensor, state: LinearState, raw_k: Tensor | None = None
    ) -> tuple[Tensor, LinearState] | None:
        """`attend_step` by the Triton kernel or the C code; None where neither applies, and where gradients are wanted."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        weights = self.step_weights()
        if weights is None:
            return None
        if not self.has_memory:
            return triton_step(weights, q, k, v, state) or native_step(weights, q, k, v, state)
        assert raw_k is not None
        exact = self.step_memory(q, v, raw_k, state)
        return None if exact is None else native_step(weights, q, k, v, state, exact)

    def step_memory(self, q: Tensor, v: Tensor, raw_k: Tensor, state: LinearState) -> StepMemory | None:
        """The exact memory as the C code takes it; None for scores that read queries in a way that it does not know."""
        score = self.memory_score
        if type(score) is WindowAttentionScore:
            return StepMemory(self.slots, receives=True)
        if type(score) is LearnedScore and all(x.is_cpu and x.dtype == torch.float32 for x in score.parameters()):
            return StepMemory(self.slots, network=(score.W_1, score.b_1, score.w_2, raw_k))
        if score is None or score.reads_queries:
            return None
        S = self.sinks
        old_k, old_v = (x[:, :, S : S + 1].transpose(1, 2) for x in (state.window_k, state.window_v))
        return StepMemory(self.slots, leaving=functools.partial(self.score_of_leaving, q, v, raw_k, (old_k, old_v), state))

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
        if visible is not None and visible.dim() == 2:
            visible = visible.unsqueeze(-1)
        key_weight = None if visible is None else visible.float().expand(*k.shape[:3])
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
            visible: (B, T) bool or, by head, (B, T, G), False for keys that no query sees. None: all are seen.
            state: (B, G, M, e + 1), or (B, G, M, e) without normalization. None: zeros.
            q_positions: (B, T), for maps that need them.
            k_positions: (B, T) or, by head, (B, T, G), for maps that need them.

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
            visible = visible.unsqueeze(-1) if visible.dim() == 2 else visible
            phi_k = phi_k * visible.unsqueeze(-1)
            # a key decays once for every key that enters the state after it, so padding does not age it
            log_decay = None if log_decay is None else log_decay * visible
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


def divide(numerator: Tensor, total: Tensor | None) -> Tensor:
    """The numerator (B, T, H, d) over the sum of weights (B, T, H), or itself where there is no such sum."""
    return numerator if total is None else numerator / total.clamp_min(TINY).unsqueeze(-1).to(numerator.dtype)
