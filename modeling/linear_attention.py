"""
Causal linear attention over positive features, written three times: `naive` (the formula, quadratic, the oracle), `chunk`
(matrix products, linear, differentiable) and `recurrent` (one step after another, for decoding).

B batch, T tokens, H query heads, G key/value heads (G divides H; query head h reads key/value head h * G // H), m features,
d value size. State: S_t = exp(g_t) S_{t-1} + k_t v_t^T and o_t = q_t S_t, in float32 whatever the inputs are.
"""

import torch
import torch.nn.functional as F

CHUNK_SIZE = 64
# smaller than any sum of weights that carries information, larger than float32's smallest normal number
TINY = 1e-30


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    log_decay: torch.Tensor | None = None,
    normalize: bool = True,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    mode: str = "chunk",
    chunk_size: int = CHUNK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    o_i = sum_{j <= i} a_ij (q_i.k_j) v_j, divided by sum_{j <= i} a_ij (q_i.k_j) if `normalize`, with
    a_ij = exp(sum of the log-decays of j+1 .. i) (DiJiang, arXiv 2403.19928, section 3).

    Args:
        q: (B, T, H, m) features of the queries.
        k: (B, T, G, m) features of the keys; a zero row leaves no trace, which is how padding is masked.
        v: (B, T, G, d) values.
        log_decay: g <= 0, (G,) constant or (B, T, G) per token. Default: no decay.
        normalize: divide by the sum of the weights.
        initial_state: (B, G, m, d), or (B, G, m, d + 1) if `normalize`: the last column then sums the keys.
        output_final_state: also return the state after the last token.
        mode: `naive`, `chunk` or `recurrent`.
        chunk_size: tokens per block of `chunk`.

    Returns:
        o (B, T, H, d) in v's dtype, and the final state in float32 or None.

    Raises:
        ValueError: on an unknown mode or shapes that do not fit.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if log_decay is not None and log_decay.shape not in ((k.shape[2],), k.shape[:3]):
        raise ValueError(f"log_decay is {tuple(log_decay.shape)}, expected {(k.shape[2],)} or {tuple(k.shape[:3])}")
    if chunk_size < 1 or not q.shape[1]:
        raise ValueError(f"chunk_size={chunk_size} and {q.shape[1]} tokens: both must be at least 1")
    dtype, (B, T, H, m), G = v.dtype, q.shape, k.shape[2]
    q, k, v = q.float(), k.float(), v.float()
    if normalize:  # the denominator is one more value column, so it decays and is carried over with the rest
        v = F.pad(v, (0, 1), value=1.0)
    if log_decay is not None:
        log_decay = log_decay.float()
        log_decay = log_decay.expand(B, T, G) if log_decay.dim() == 1 else log_decay
        log_decay = log_decay.permute(0, 2, 1)
    state = v.new_zeros(B, G, m, v.shape[-1]) if initial_state is None else initial_state.float()
    if state.shape != (B, G, m, v.shape[-1]):
        raise ValueError(f"initial_state is {tuple(state.shape)}, expected {(B, G, m, v.shape[-1])}")
    # (B, G, R, T, m) and (B, G, T, .): all R query heads of a group read one state
    q = q.view(B, T, G, H // G, m).permute(0, 2, 3, 1, 4)
    k, v = k.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)
    options = {"chunk_size": chunk_size} if mode == "chunk" else {}
    o, state = MODES[mode](q, k, v, log_decay, state, **options)
    o = o.permute(0, 3, 1, 2, 4).reshape(B, T, H, -1)
    if normalize:
        o = o[..., :-1] / o[..., -1:].clamp_min(TINY)
    return o.to(dtype), state if output_final_state else None


def naive_linear_attention(q, k, v, log_decay, state):
    """The formula. q (B, G, R, T, m), k (B, G, T, m), v (B, G, T, d), log_decay (B, G, T) or None, state (B, G, m, d)."""
    T = k.shape[2]
    total = k.new_zeros(*k.shape[:3]) if log_decay is None else log_decay.cumsum(-1)
    causal = torch.ones(T, T, dtype=torch.bool, device=k.device).tril()
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    weights = torch.einsum("bgrim,bgjm->bgrij", q, k) * decay.unsqueeze(2)
    o = torch.einsum("bgrij,bgjd->bgrid", weights, v)
    o = o + torch.einsum("bgrim,bgmd->bgrid", q * total.exp()[:, :, None, :, None], state)
    last = total[..., -1:]
    state = state * last[..., None].exp() + torch.einsum("bgjm,bgjd->bgmd", k * (last - total).exp()[..., None], v)
    return o, state


def chunk_linear_attention(q, k, v, log_decay, state, chunk_size=CHUNK_SIZE):
    """Blocks of `chunk_size` tokens: quadratic inside a block, one state handed from block to block. Shapes as `naive`."""
    B, G, R, T, m = q.shape
    C = min(chunk_size, T)
    N = -(-T // C)
    pad = N * C - T
    if pad:  # zero keys and zero log-decays change nothing
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        log_decay = None if log_decay is None else F.pad(log_decay, (0, pad))
    q = q.reshape(B, G, R, N, C, m).transpose(2, 3)
    k, v = k.reshape(B, G, N, C, m), v.reshape(B, G, N, C, -1)

    weights = (q.reshape(B, G, N, R * C, m) @ k.transpose(-1, -2)).view(B, G, N, R, C, C)
    causal = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    if log_decay is None:
        weights = weights.masked_fill(~causal, 0.0)
        block_states = (k.transpose(-1, -2) @ v).cumsum(2) + state.unsqueeze(2)
        before = torch.cat((state.unsqueeze(2), block_states[:, :, :-1]), dim=2)
        state = block_states[:, :, -1]
    else:
        total = log_decay.reshape(B, G, N, C).cumsum(-1)
        decay = (total[..., :, None] - total[..., None, :]).masked_fill(~causal, -torch.inf).exp()
        weights = weights * decay.unsqueeze(3)
        last = total[..., -1:]
        added = (k * (last - total).exp().unsqueeze(-1)).transpose(-1, -2) @ v
        kept = last.exp().unsqueeze(-1)
        states = []
        for n in range(N):
            states.append(state)
            state = state * kept[:, :, n] + added[:, :, n]
        before = torch.stack(states, dim=2)
        q = q * total.exp()[:, :, :, None, :, None]
    o = weights.view(B, G, N, R * C, C) @ v + q.reshape(B, G, N, R * C, m) @ before
    return o.view(B, G, N, R, C, -1).transpose(2, 3).reshape(B, G, R, N * C, -1)[:, :, :, :T], state


def recurrent_linear_attention(q, k, v, log_decay, state):
    """Token by token. Shapes as `naive`."""
    outputs = []
    for t in range(k.shape[2]):
        if log_decay is not None:
            state = state * log_decay[:, :, t, None, None].exp()
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append(q[:, :, :, t] @ state)
    return torch.stack(outputs, dim=3), state


MODES = {
    "naive": naive_linear_attention,
    "chunk": chunk_linear_attention,
    "recurrent": recurrent_linear_attention,
}
