"""
A linear state that can overwrite: before a value is written, what the state holds for its key is taken out (the delta rule;
DeltaNet arXiv 2406.06484, with a decay arXiv 2412.06464). Written three times: `naive` (the formula), `chunk` (matrix products
over blocks, differentiable) and `recurrent` (one token after another, for decoding).

    S_t = exp(g_t) (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,    o_t = q_t S_t

with keys of length 1 and b_t from 0 (nothing is written) to 1 (what the key held is replaced).

B batch, T tokens, H query heads, G key/value heads (G divides H), R = H / G, m features, d value size, C tokens of a block.
States and products are float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .linear_attention_chunk import differences

CHUNK_SIZE = 64


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    *,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    mode: str = "chunk",
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """
    Args:
        q: (B, T, H, m).
        k: (B, T, G, m), of length 1.
        v: (B, T, G, d).
        b: (B, T, G), from 0 to 1; 0 for padding, whose log-decay must be 0 too.
        log_decay: g <= 0, (G,) or (B, T, G). Default: no decay.
        state: (B, G, m, d). Default: zeros.
        mode: `naive`, `chunk` or `recurrent`.
        chunk_size: C.

    Returns:
        o (B, T, H, d) and the state after the last token, float32.

    Raises:
        ValueError: on an unknown mode, or shapes that do not fit.
    """
    (B, T, H, m), (G, d) = q.shape, v.shape[2:]
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}")
    if k.shape != (B, T, G, m) or v.shape[:2] != (B, T) or b.shape != (B, T, G) or H % G:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v), ("b", b)))
        raise ValueError(f"shapes do not fit: {shapes}")
    state = v.new_zeros(B, G, m, d) if state is None else state
    if state.shape != (B, G, m, d):
        raise ValueError(f"state is {tuple(state.shape)}, expected {(B, G, m, d)}")
    if torch.is_autocast_enabled(q.device.type):  # it would mix the float32 of states with halves
        with torch.autocast(q.device.type, enabled=False):
            return delta_rule(q, k, v, b, log_decay=log_decay, state=state, mode=mode, chunk_size=chunk_size)
    q = q.float().unflatten(2, (G, H // G)).permute(0, 2, 3, 1, 4)
    k, v = (x.float().transpose(1, 2) for x in (k, v))
    decay = b.new_zeros(G) if log_decay is None else log_decay
    decay = decay.view(1, 1, G).expand(B, T, G) if decay.dim() == 1 else decay
    b, decay = (x.float().transpose(1, 2) for x in (b, decay))
    options = {"chunk_size": chunk_size} if mode == "chunk" else {}
    o, state = MODES[mode](q, k, v, b, decay, state.float(), **options)
    return o.permute(0, 3, 1, 2, 4).flatten(2, 3), state


def naive_delta_rule(q: Tensor, k: Tensor, v: Tensor, b: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The formula. q (B, G, R, T, m), k (B, G, T, m), v (B, G, T, d), b and decay (B, G, T), state (B, G, m, d)."""
    one = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    outputs = []
    for t in range(k.shape[2]):
        key, write = k[:, :, t, :, None], b[:, :, t, None, None]
        state = decay[:, :, t, None, None].exp() * (one - write * key @ key.mT) @ state + write * key @ v[:, :, t, None, :]
        outputs.append(q[:, :, :, t] @ state)
    return torch.stack(outputs, dim=3), state


def recurrent_delta_rule(q: Tensor, k: Tensor, v: Tensor, b: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token, without a product of matrices. Arguments and results as `naive_delta_rule`."""
    outputs = []
    for t in range(k.shape[2]):
        state = state * decay[:, :, t, None, None].exp()
        key = k[:, :, t].unsqueeze(-2)
        error = v[:, :, t, None] - key @ state
        state = state + (b[:, :, t, None, None] * key).mT * error
        outputs.append(q[:, :, :, t] @ state)
    return torch.stack(outputs, dim=3), state


def chunk_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, decay: Tensor, state: Tensor, *, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """
    Block by block. Inside one, with D_ij the decay from token j to token i, what each token writes, u_i, depends on what the
    tokens before it wrote: (I + A) u = b (v - D_i0 k S), A_ij = b_i D_ij k_i.k_j below the diagonal. That is one triangular
    system for all tokens of a block, and its part that does not depend on the state one for all blocks together. Arguments and
    results as `naive_delta_rule`.
    """
    (B, G, T, m), R = k.shape, q.shape[2]
    C = min(chunk_size, T)
    N = -(-T // C)
    rest = N * C - T  # tokens that write nothing and do not decay
    q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, rest)).unflatten(-2, (N, C)) for x in (q, k, v))
    b, decay = (torch.nn.functional.pad(x, (0, rest)).unflatten(-1, (N, C)) for x in (b, decay))
    total = decay.cumsum(-1)
    inside = differences(total)  # (B, G, N, C, C), 0 above the diagonal
    from_start = total.exp().unsqueeze(-1)
    to_end = (total[..., -1:] - total).exp().unsqueeze(-1)
    system = (b.unsqueeze(-1) * inside * (k @ k.mT)).tril(-1)
    system = system + torch.eye(C, dtype=k.dtype, device=k.device)
    right = torch.cat((v, from_start * k), dim=-1) * b.unsqueeze(-1)
    written, taken = torch.linalg.solve_triangular(system, right, upper=False).split((v.shape[-1], m), dim=-1)
    weights = torch.einsum("bgrnim,bgnjm->bgrnij", q, k) * inside.unsqueeze(2)
    asked = q * from_start.unsqueeze(2)
    outputs = []
    for n in range(N):
        u = written[:, :, n] - taken[:, :, n] @ state
        outputs.append(asked[:, :, :, n] @ state.unsqueeze(2) + weights[:, :, :, n] @ u.unsqueeze(2))
        state = from_start[:, :, n, -1:] * state + (to_end[:, :, n] * k[:, :, n]).mT @ u
    return torch.cat(outputs, dim=3)[:, :, :, :T].view(B, G, R, T, v.shape[-1]), state


MODES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "naive": naive_delta_rule,
    "chunk": chunk_delta_rule,
    "recurrent": recurrent_delta_rule,
}
