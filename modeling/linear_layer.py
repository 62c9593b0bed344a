"""
The linear-attention layer: exact softmax on a window and sinks, DiJiang's features on everything older, one denominator
(arXiv 2403.19928; window and sinks: arXiv 2309.17453, 2410.10254).
"""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .feature_maps import MAX_EXPONENT, build_feature_map
from .layers import ProjectedAttention
from .linear_attention import linear_attention
from .window_attention import merge_branches, window_attention, window_attention_step


@dataclass
class LinearState:
    """
    Everything a linear layer remembers of one batch of sequences; its size does not depend on their length.

    Attributes:
        state: (B, G, M, d + 1) float32, sum of features times (value, 1); (B, G, M, d) without normalisation.
        window_k, window_v: (B, W, G, d), the last W tokens; window_rank: (B, W), how many real tokens came before each, -1 for
            padding.
        sink_k, sink_v: (B, S, G, d); sink_filled: (B, S) bool.
        tokens: (B,), real tokens seen; sinks_full: all of sink_filled, known without asking the device.
    """

    state: torch.Tensor
    window_k: torch.Tensor
    window_v: torch.Tensor
    window_rank: torch.Tensor
    sink_k: torch.Tensor
    sink_v: torch.Tensor
    sink_filled: torch.Tensor
    tokens: torch.Tensor
    sinks_full: bool = False

    def map(self, fn) -> "LinearState":
        """The same state with `fn` applied to every tensor (select rows, move, detach)."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: fn(x) for name, x in values.items() if isinstance(x, torch.Tensor)})

    def compact(self) -> "LinearState":
        """The same state without the longer tensors that some of its own are views of and would keep alive."""
        if torch.compiler.is_compiling():  # which knows no storages
            return self.map(torch.clone)
        return self.map(lambda x: x.clone() if x.untyped_storage().nbytes() > x.nbytes else x)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the state."""
        return [x for f in fields(self) if isinstance(x := getattr(self, f.name), torch.Tensor)]


# longer inputs are mixed piece by piece: the same result, and intermediate tensors that stay in the processor's reach
PIECE = 2048


class LogScale(nn.Module):
    """w.x + b per head, the logarithm of a weight. Input (B, T, heads, d), output float32 (B, T, heads)."""

    def __init__(self, num_heads: int, head_dim: int, start: float):
        super().__init__()
        self.start = float(start)
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.zeros_(self.weight)
        init.constant_(self.bias, self.start)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight.float()).sum(-1) + self.bias.float()


class Decay(nn.Module):
    """
    Per-head log-decay -exp(log_rate), (G,) float32: RetNet's g_h = 1 - exp(linspace(log 1/32, log 1/512, G)) (arXiv
    2307.08621), fixed or, if `learned`, its start.
    """

    def __init__(self, num_heads: int, learned: bool):
        super().__init__()
        self.learned = learned
        self.log_rate = nn.Parameter(torch.empty(num_heads, dtype=torch.float32), requires_grad=learned)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.device("cpu"):
            ends = torch.tensor([1 / 32, 1 / 512], dtype=torch.float64).log()
            gamma = 1 - torch.linspace(ends[0].item(), ends[1].item(), self.log_rate.shape[0], dtype=torch.float64).exp()
        init.copy_(self.log_rate, (-gamma.log()).log().float())

    def forward(self) -> torch.Tensor:
        # loading a checkpoint sets requires_grad on every parameter, so it is not what keeps a fixed decay fixed
        log_rate = self.log_rate if self.learned else self.log_rate.detach()
        return -log_rate.float().exp()


class OutputGate(nn.Linear):
    """SiLU gate on the heads' output, as in RetNet; its start is that of the paper's released code."""

    def reset_parameters(self) -> None:
        init.xavier_uniform_(self.weight, gain=2**-2.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(super().forward(x))


def linear_layers(model: nn.Module) -> dict[int, "DiJiangLinearAttention"]:
    """The linear layers of a model, whatever its head, by their index."""
    return {module.layer_idx: module for module in model.modules() if isinstance(module, DiJiangLinearAttention)}


class DiJiangLinearAttention(ProjectedAttention):
    """Attention whose memory per sequence is constant. `window`, `sinks` and `mode` may be changed on a live layer."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.window, self.sinks = config.attention_window, config.attention_sinks
        self.normalize = config.normalize
        self.feature_scale = self.head_dim**-0.25 if config.scale_features else 1.0
        self.mode: str | None = None  # of linear_attention; default: recurrent for one token, else chunk
        H, G, d = self.num_heads, self.num_key_value_heads, self.head_dim
        # phi(q) and phi(k) start as one map and may drift apart in training
        self.feature_map_q = build_feature_map(config, H, config.feature_seed + layer_idx)
        self.feature_map_k = build_feature_map(config, G, config.feature_seed + layer_idx)
        # features that a softmax keeps below 1 leave the whole range of exponents to the keys' weights
        self.key_exponent_limit = MAX_EXPONENT if config.feature_activation == "exp" else 3 * MAX_EXPONENT
        # c(q): what one unit of the linear branch weighs in the softmax's own units. A scalar per head cannot say it, since
        # log(sum exp(q.k)) - log(phi(q).sum phi(k)) varies with q
        self.branch_scale = LogScale(H, d, config.branch_scale_init) if self.window else None
        self.key_scale = LogScale(G, d, 0.0) if config.key_scale else None
        self.decay = Decay(G, config.decay == "learned") if config.decay != "none" else None
        self.output_norm = nn.GroupNorm(d, H * d) if config.output_norm == "group_norm" else None
        self.output_gate = OutputGate(config.hidden_size, H * d, bias=False) if config.output_gate else None

    def empty_state(self, k: torch.Tensor) -> LinearState:
        """State before the first token, for keys like k (B, T, G, d)."""
        B, _, G, d = k.shape
        M, W, S = self.feature_map_k.size, self.window, self.sinks
        return LinearState(
            state=k.new_zeros(B, G, M, d + int(self.normalize), dtype=torch.float32),
            window_k=k.new_zeros(B, W, G, d),
            window_v=k.new_zeros(B, W, G, d),
            window_rank=k.new_full((B, W), -1, dtype=torch.long),
            sink_k=k.new_zeros(B, S, G, d),
            sink_v=k.new_zeros(B, S, G, d),
            sink_filled=k.new_zeros(B, S, dtype=torch.bool),
            tokens=k.new_zeros(B, dtype=torch.long),
            sinks_full=S == 0,
        )

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        valid: torch.Tensor | None = None,
        state: LinearState | None = None,
    ) -> tuple[torch.Tensor, LinearState]:
        """
        Mix T tokens that follow `state`.

        Args:
            q: (B, T, H, d); k, v: (B, T, G, d), after rotary positions.
            valid: (B, T) bool, False for padding, which no token sees. Default: all real. Padding before or after a sequence
                leaves no trace; padding between its tokens takes up places in the window.
            state: of the tokens before; default none.

        Returns:
            o (B, T, H, d) float32 and the state after the last token.
        """
        state = self.empty_state(k) if state is None else state
        if k.shape[1] <= PIECE:
            return self.attend_piece(q, k, v, valid, state)
        outputs = []
        for start in range(0, k.shape[1], PIECE):
            piece = slice(start, start + PIECE)
            o, state = self.attend_piece(
                q[:, piece], k[:, piece], v[:, piece], None if valid is None else valid[:, piece], state
            )
            outputs.append(o)
        return torch.cat(outputs, dim=1), state

    def attend_piece(self, q, k, v, valid, state: LinearState) -> tuple[torch.Tensor, LinearState]:
        """`attend` in one go."""
        T = k.shape[1]
        if valid is None:
            rank = state.tokens[:, None] + torch.arange(T, device=k.device)
            tokens = state.tokens + T
        else:
            arrived = state.tokens[:, None] + valid.long().cumsum(1)
            rank, tokens = torch.where(valid, arrived - 1, -1), arrived[:, -1]
        # rows t of `all_*` leave the window when query t arrives
        all_k, all_v = torch.cat((state.window_k, k), dim=1), torch.cat((state.window_v, v), dim=1)
        all_rank = torch.cat((state.window_rank, rank), dim=1)
        new = replace(state, window_k=all_k[:, T:], window_v=all_v[:, T:], window_rank=all_rank[:, T:], tokens=tokens)

        q_scaled = q.float() * self.feature_scale
        far, new.state = self.far_branch(q_scaled, all_k[:, :T], all_v[:, :T], all_rank[:, :T] >= self.sinks, state.state)
        if not self.window:
            return far, new
        sink_arrival = self.store_sinks(new, all_k[:, :T], all_v[:, :T], all_rank[:, :T])
        if T == 1:
            sinks_and_window = (torch.cat(pair, 1) for pair in ((new.sink_k, new.window_k), (new.sink_v, new.window_v)))
            visible = torch.cat((new.sink_filled, new.window_rank >= 0), 1)
            near, near_log_sum = window_attention_step(q, *sinks_and_window, visible, scale=self.scaling)
        else:
            near, near_log_sum = window_attention(
                q, all_k, all_v, all_rank >= 0, new.sink_k, new.sink_v, sink_arrival, scale=self.scaling
            )
        return merge_branches(near, near_log_sum, far[..., :-1], far[..., -1], self.branch_scale(q_scaled)), new

    def key_features(self, k: torch.Tensor) -> torch.Tensor:
        """phi(k) exp(u.k + b) of scaled keys k (B, T, G, d): (B, T, G, M), what the state accumulates."""
        phi_k = self.feature_map_k(k)
        if self.key_scale is not None:
            limit = self.key_exponent_limit
            phi_k = phi_k * self.key_scale(k).clamp(-limit, limit).exp().unsqueeze(-1)
        return phi_k

    def far_branch(self, q, k, v, visible, state):
        """
        Linear attention of scaled queries to the keys that left the window, those in `visible` (B, T) alone. Returns
        (B, T, H, d), or with a window (B, T, H, d + 1), not normalised and the sum of weights last; and the new state.
        """
        phi_k = self.key_features(k.float() * self.feature_scale) * visible[..., None, None]
        # a key decays once for every key that enters the state after it, so padding does not age it
        log_decay = None if self.decay is None else self.decay() * visible[..., None]
        v = v.float()
        shares_denominator = bool(self.window)
        return linear_attention(
            self.feature_map_q(q),
            phi_k,
            F.pad(v, (0, 1), value=1.0) if shares_denominator else v,
            log_decay=log_decay,
            normalize=self.normalize and not shares_denominator,
            initial_state=state,
            output_final_state=True,
            mode=self.mode or ("recurrent" if q.shape[1] == 1 else "chunk"),
        )

    def store_sinks(self, new: LinearState, k, v, rank) -> torch.Tensor:
        """Move the first S real tokens into the sinks as they leave the window; returns (B, S), when each became visible."""
        T = k.shape[1]
        arrival = torch.where(new.sink_filled, -1, T)
        if new.sinks_full:
            return arrival
        found = rank[:, :, None] == torch.arange(self.sinks, device=rank.device)
        present, row = found.any(1), found.long().argmax(1)
        index = row[:, :, None, None].expand(-1, -1, *k.shape[2:])
        new.sink_k = torch.where(present[..., None, None], k.gather(1, index), new.sink_k)
        new.sink_v = torch.where(present[..., None, None], v.gather(1, index), new.sink_v)
        new.sink_filled = new.sink_filled | present
        if not torch.compiler.is_compiling():
            new.sinks_full = bool(new.sink_filled.all())
        return torch.where(present, row, arrival)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states (B, T, hidden), attention_mask (B, T) bool or None. Returns (B, T, hidden) and no weights."""
        q, k, v = self.project(hidden_states, position_embeddings)
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        o, state = self.attend(q, k, v, attention_mask, None if cache is None else cache.state)
        if cache is not None:
            cache.update_state(state, hidden_states.shape[1])
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
