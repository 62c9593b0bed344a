"""
One decoding step of a linear layer: by the Triton kernel or the C code where they apply, else in torch.

B batch, H query heads, G key/value heads, d head size. H and G count the heads that do not keep every token.
"""

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .decode_step import StepWeights
from .decode_step_native import StepMemory, native_step
from .decode_step_triton import triton_step
from .exact_memory import held_rows, replace_weakest
from .exponential_maps import ExponentialMap
from .layer_exact_memory import ExactMemoryAttention
from .layer_linear_branch import divide
from .linear_attention import WeightedSums, recurrent_step
from .linear_state import LinearState
from .memory_scores import LearnedScore, WindowAttentionScore
from .window_attention import window_attention_step


class OneTokenAttention(ExactMemoryAttention):
    """The exact memory and the linear branch, and `attend_step`: one token behind a state that is settled."""

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
        numerator, total, new.state = self.branch_step(q, old_k, old_v, there, state.state, q_rank, old_rank)
        if not self.window:
            return divide(numerator, total), new
        branch = self.scaled_branch(q, numerator, total)
        return window_attention_step(q, exact_k, exact_v, branch, scale=self.scaling, hidden=hidden), new

    def branch_step(
        self, q: Tensor, k: Tensor, v: Tensor, there: Tensor | None, state: Tensor, q_rank: Tensor, k_rank: Tensor
    ) -> WeightedSums:
        """`linear_branch` of one token with as few operations as it takes; `there` (B, 1, G) or None."""
        if self.overwrites:
            return self.delta_branch(q.float(), k.float(), v.float(), there, state, q_rank, k_rank)
        phi_q = self.feature_map_q(q.float(), q_rank, self.feature_scale)
        phi_k = self.key_features(k.float(), k_rank)
        log_decay = None if self.decay is None else self.decay()
        if there is not None:
            phi_k = phi_k * there.unsqueeze(-1)
            log_decay = None if log_decay is None else log_decay * there
        return recurrent_step(phi_q, phi_k, v.float(), log_decay, state, sums=self.sums)

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
        """The weights that the fused steps read; None for the delta rule and maps that are not exponentials of one matrix."""
        if self.overwrites:
            return None
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
