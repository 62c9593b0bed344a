"""
The exact memory of a linear layer: what tokens that leave the window score, which of them get a slot, and which go on into the
linear branch.

B batch, T tokens, H query heads, G key/value heads, d head size, W window. H and G count the heads that do not keep every
token.
"""

import torch
from torch import Tensor

from .configuration_dijiang import DiJiangConfig
from .exact_attention_native import exact_is_native, native_received
from .exact_memory import HeldKeys, candidates_of, held_keys, lost_keys, memory_after, plan_memory, soft_gate
from .layer_linear_branch import LinearBranchAttention
from .linear_state import EMPTY, LinearState, StateSizes
from .memory_scores import WindowAttentionScore, build_memory_score, rounded
from .window_attention import Sinks, Window, queries_per_block


class ExactMemoryAttention(LinearBranchAttention):
    """
    The linear branch behind an exact memory, which it may lack.

    Attributes:
        sinks: S.
        slots: slots of the exact memory, by linear head.
        gate_temperature: temperature of the soft gate through which the scores of held tokens train; None: no gate.
    """

    def __init__(self, config: DiJiangConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.sinks = config.attention_sinks
        self.slots = tuple(config.memory_slots(layer_idx)[head] for head in self.linear_heads)
        self.gate_temperature: float | None = None
        self.memory_score = build_memory_score(config, self.linear_heads, layer_idx) if any(self.slots) else None

    @property
    def has_memory(self) -> bool:
        """Whether any head has slots of the exact memory."""
        return self.memory_score is not None and any(self.slots)

    @property
    def state_sizes(self) -> StateSizes:
        """Sizes of the layer's state."""
        size = self.feature_map_k.size
        if not self.has_memory:
            return StateSizes(size, self.window, self.sinks, self.sums)
        assert self.memory_score is not None
        carry = self.memory_score.carry_size(size)
        return StateSizes(size, self.window, self.sinks, self.sums, self.slots, carry)

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
            if self.overwrites:  # what a held key would weigh in such a state is not known
                phi_k = torch.zeros_like(phi_k)
            held = held._replace(gate=soft_gate(candidates, plan, held, self.gate_temperature, (phi_q, phi_k)))
        for name, x in memory_after(candidates, plan, self.slots).items():
            setattr(new, name, x)
        lost_k, lost_v, there, lost_rank = lost_keys(candidates, plan)
        return held, lost_k, lost_v, there, lost_rank

    def attends_natively(self, q: Tensor, k: Tensor, v: Tensor, state: LinearState) -> bool:
        """Whether the C code applies to the exact branch and its memory."""
        if self.mode is not None or self.gate_temperature is not None:
            return False
        one_dtype = state.memory_k.dtype == state.memory_v.dtype == k.dtype
        # offloaded weights are on no device until their own module is called
        ready = self.branch_scale is not None and all(x.is_cpu for x in self.branch_scale.parameters())
        return one_dtype and ready and exact_is_native(q, k, v)
