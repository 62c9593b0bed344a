"""
The heads of a linear layer that do not keep every token, on any number of tokens: exact softmax on window, sinks and what the
exact memory holds, the linear branch on everything else, one denominator (window and sinks: arXiv 2309.17453, 2410.10254).

B batch, T tokens, H query heads, G key/value heads, d head size, S sinks, W window.
"""

from dataclasses import replace

import torch
from torch import Tensor

from .exact_attention_native import PassedMemory, native_pass_memory, native_window_attention
from .exact_memory import HeldKeys
from .layer_linear_branch import divide
from .layer_step import OneTokenAttention
from .linear_attention_chunk import PIECE, PIECE_ON_GPU
from .linear_state import LinearState
from .packing import PackedGroup
from .window_attention import Sinks, Window
from .window_attention_flex import window_attention

# tokens per piece where all of a layer runs in C: the fastest of 512, 2,048 and 8,192 within noise
PIECE_OF_NATIVE = 2048


class LinearHeadsAttention(OneTokenAttention):
    """The decoding step, and `attend`: any number of tokens, in one go, in pieces or packed."""

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
