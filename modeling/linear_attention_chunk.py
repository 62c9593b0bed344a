"""
The chunk form of linear attention: quadratic inside a block of C tokens, one state handed from block to block, everything a
matrix product (arXiv 2307.08621, section 2.1; 2312.06635, section 3). Long inputs are computed piece by piece, so that
intermediate results stay in the processor's cache.

B batch, T tokens, G key/value heads, R query heads per key/value head, m features, d value size, N blocks in a piece.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_SIZE = 64
# tokens per piece: the fastest of 128 .. 4096 on CPUs (benchmarks/attention.py --pieces)
PIECE = 512
# on a GPU long pieces are faster; they only bound the memory
PIECE_ON_GPU = 8192


class Workspace:
    """
    Buffers that the pieces of one call share, by name. A call returns a tensor for `out=`, or None, which stands for a new
    tensor, where gradients may need the buffers of earlier pieces.
    """

    def __init__(self, like: Tensor):
        self.like = like
        self.buffers: dict[str, Tensor] = {}
        self.active = not (torch.is_grad_enabled() or torch.compiler.is_compiling())

    def __call__(self, name: str, *shape: int) -> Tensor | None:
        if not self.active:
            return None
        if name not in self.buffers or self.buffers[name].shape != shape:
            self.buffers[name] = self.like.new_empty(shape)
        return self.buffers[name]


@dataclass
class DecayTables:
    """
    Factors between the tokens of a piece, all exp of a difference of log-decays, hence at most 1.

    Attributes (leading sizes may be 1):
        inside: (B, G, N, 1, C, C), from token j to token i of one block, 0 where j > i.
        to_query: (B, G, N, 1, C, 1), from the start of the block to the token.
        to_end: (B, G, N, C, 1), from the token to the end of the block.
        between: (B, G, N + 1, N + 1), from the end of block j to the end of block n; row and column 0 are the initial state.
    """

    inside: Tensor
    to_query: Tensor
    to_end: Tensor
    between: Tensor

    @classmethod
    def of(cls, log_decay: Tensor, blocks: int) -> "DecayTables":
        """From log-decays (B, G, N, C), where N is `blocks`, or 1 if all blocks have the same."""
        total = log_decay.cumsum(-1)
        last = total[..., -1:]
        ends = last.expand(-1, -1, blocks, -1).cumsum(2)
        ends = torch.cat((torch.zeros_like(ends[:, :, :1]), ends), dim=2)
        return cls(
            inside=differences(total).unsqueeze(3),
            to_query=total.exp()[:, :, :, None, :, None],
            to_end=(last - total).exp().unsqueeze(-1),
            between=differences(ends.squeeze(-1)),
        )


def differences(total: Tensor) -> Tensor:
    """exp(total_i - total_j) where j <= i, else 0: (..., n) -> (..., n, n)."""
    n = total.shape[-1]
    causal = torch.ones(n, n, dtype=torch.bool, device=total.device).tril()
    return (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~causal, -torch.inf).exp()


def chunk_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, *, sums: bool, chunk_size: int | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """
    Linear attention in blocks of C tokens.

    Args:
        q: (B, G, R, T, m). Products of q, k and v are computed in their own dtype.
        k: (B, G, T, m).
        v: (B, G, T, d).
        log_decay: (B, G, T) per token, (1, G, 1) constant, or None.
        state: (B, G, m, d), or (B, G, m, d + 1) if `sums`, float32. It and every sum over blocks stay float32.
        sums: also return the sums of weights; the last column of the state then sums the keys.
        chunk_size: C. Default: CHUNK_SIZE.

    Returns:
        numerator (B, G, R, T, d), sums of weights float32 (B, G, R, T) or None, state.
    """
    T, d = v.shape[2:]
    C = min(chunk_size or CHUNK_SIZE, T)
    whole = T - T % C
    step = max((PIECE if q.is_cpu else PIECE_ON_GPU) // C, 1) * C
    pieces = [(start, min(start + step, whole)) for start in range(0, whole, step)] + [(whole, T)] * (whole < T)
    key_sum = state[..., d:] if sums else None
    state = state[..., :d]
    numerators: list[Tensor] = []
    totals: list[Tensor] = []
    work = Workspace(q)
    tables = table_shape = None
    for start, end in pieces:
        size = min(C, end - start)
        blocks = (end - start) // size
        if log_decay is not None and log_decay.shape[2] > 1:
            tables = DecayTables.of(log_decay[:, :, start:end].unflatten(2, (blocks, size)), blocks)
        elif log_decay is not None and table_shape != (blocks, size):
            tables = DecayTables.of(log_decay[..., None].expand(-1, -1, 1, size), blocks)
            table_shape = (blocks, size)
        piece = (q[:, :, :, start:end], k[:, :, start:end], v[:, :, start:end])
        numerator, total, state, key_sum = attend_to_piece(*piece, tables, state, key_sum, blocks, work)
        numerators.append(numerator)
        if total is not None:
            totals.append(total)
    final = state if key_sum is None else torch.cat((state, key_sum), dim=-1)
    if len(pieces) == 1:
        return numerators[0], totals[0] if sums else None, final
    return torch.cat(numerators, dim=3), torch.cat(totals, dim=3) if sums else None, final


def attend_to_piece(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: DecayTables | None,
    state: Tensor,
    key_sum: Tensor | None,
    blocks: int,
    work: Workspace,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """`chunk_linear_attention` of tokens that make up whole blocks; the state and its column of sums are apart."""
    B, G, R, T, m = q.shape
    N = blocks
    C = T // N
    d = v.shape[-1]
    n = B * G * N
    q = q.unflatten(3, (N, C)).transpose(2, 3).reshape(n, R * C, m)
    k = k.reshape(n, C, m)
    v = v.reshape(n, C, d)

    weights = torch.bmm(q, k.transpose(1, 2), out=work("weights", n, R * C, C)).view(B, G, N, R, C, C)
    if decay is None:
        weights = weights.tril_()
        between = q.new_ones(1, N + 1, N + 1, dtype=torch.float32).tril().expand(B * G, -1, -1)
    else:
        weights = weights * decay.inside.to(weights.dtype)
        q = (q.view(B, G, N, R, C, m) * decay.to_query.to(q.dtype)).view(n, R * C, m)
        k = (k.view(B, G, N, C, m) * decay.to_end.to(k.dtype)).view(n, C, m)
        between = decay.between.expand(B, -1, -1, -1).reshape(B * G, N + 1, N + 1)
    weights = weights.view(n, R * C, C)

    def carry(first: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """Sums before each block, (n, m, .) in q's dtype, and after the last, by the factors between blocks."""
        first, added = first.reshape(B * G, 1, -1), added.view(B * G, N, -1).float()
        before = torch.bmm(between[:, :N, 1:].tril(-1), added)
        before = before.add_(first) if decay is None else before.addcmul_(between[:, :N, :1], first)
        last = torch.addcmul(added[:, -1], before[:, -1], between[:, N, N - 1 : N])
        return before.view(n, m, -1).to(q.dtype), last.view(B, G, m, -1)

    before, state = carry(state, torch.bmm(k.transpose(1, 2), v, out=work("added", n, m, d)))
    o = torch.bmm(weights, v).baddbmm_(q, before)
    o = o.view(B, G, N, R, C, d).transpose(2, 3).reshape(B, G, R, T, d)
    if key_sum is None:
        return o, None, state, None
    before, key_sum = carry(key_sum, k.sum(1))
    total = weights.sum(-1).float() + torch.bmm(q, before).squeeze(-1).float()
    return o, total.view(B, G, N, R, C).transpose(2, 3).reshape(B, G, R, T), state, key_sum
