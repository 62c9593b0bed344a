"""
Causal linear attention over features, written three times: `naive` (the formula, quadratic, the oracle), `chunk` (matrix
products, linear, differentiable; linear_attention_chunk.py) and `recurrent` (one token after another, for decoding). On a GPU
flash-linear-attention's kernels replace `chunk` where they are installed.

B batch, T tokens, H query heads, G key/value heads (G divides H; query head h reads key/value head h * G // H), R = H // G,
m features, d value size. State: S_t = exp(g_t) S_{t-1} + k_t v_t^T and o_t = q_t S_t, in float32 whatever the inputs are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from .linear_attention_chunk import chunk_linear_attention
from .linear_attention_fla import fla_is_usable, fla_linear_attention, takes_single_steps
from .packing import group_sequences

logger = logging.get_logger(__name__)

# smaller than any sum of weights that carries information, larger than float32's smallest normal number
TINY = 1e-30
BACKENDS = ("auto", "torch", "fla")
# what `auto` stands for within `prefer_backend`
preferred_backend = "auto"
# numerator, sums of weights or None, state
WeightedSums = tuple[Tensor, Tensor | None, Tensor]


@contextmanager
def prefer_backend(name: str) -> Iterator[None]:
    """Within the block `backend="auto"` stands for `name`: for programs that measured which is faster on their machine."""
    global preferred_backend
    before = preferred_backend
    preferred_backend = name
    try:
        yield
    finally:
        preferred_backend = before


def linear_attention(  # noqa: PLR0913 - the arguments that fla's operations have
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    normalize: bool = True,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    mode: str = "chunk",
    backend: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """
    o_i = sum_{j <= i} a_ij (q_i.k_j) v_j, divided by sum_{j <= i} a_ij (q_i.k_j) if `normalize`, with
    a_ij = exp(sum of the log-decays of j+1 .. i) (DiJiang, arXiv 2403.19928, section 3).

    Products are taken in bfloat16 if q, k and v all are, else in float32; states and sums over blocks are float32 always.

    Args:
        q: (B, T, H, m) features of the queries.
        k: (B, T, G, m) features of the keys; a row of zeros leaves no trace, so that it masks padding.
        v: (B, T, G, d) values.
        log_decay: g <= 0, (G,) constant or (B, T, G) per token. Default: no decay.
        normalize: divide by the sum of the weights.
        initial_state: (B, G, m, d), or (B, G, m, d + 1) if `normalize`: the last column then sums the keys. With
            `cu_seqlens` one per sequence, (N, G, m, d or d + 1).
        output_final_state: also return the state after the last token, or after the last token of each sequence.
        cu_seqlens: (N + 1,) integers, the first token of each of N sequences packed into one row (B = 1), and T at the end.
        mode: of torch's form: `naive`, `chunk` or `recurrent`.
        backend: `torch`, `fla` (flash-linear-attention's Triton kernels) or `auto`: fla on a GPU where it is installed, unless
            it would train token by token.
        chunk_size: tokens per block of `chunk`. Default: CHUNK_SIZE of linear_attention_chunk.py.

    Returns:
        o (B, T, H, d) in v's dtype, and the final state in float32 or None.

    Raises:
        ValueError: on an unknown mode or backend, a backend that cannot run here, or shapes that do not fit.
    """
    o, total, state = weighted_sums(
        q, k, v, log_decay=log_decay, sums=normalize, state=initial_state, cu_seqlens=cu_seqlens, mode=mode, backend=backend,
        chunk_size=chunk_size,
    )  # fmt: skip
    if total is not None:
        o = o / total.clamp_min(TINY).unsqueeze(-1).to(o.dtype)
    return o.to(v.dtype), state if output_final_state else None


def weighted_sums(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    sums: bool = True,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mode: str = "chunk",
    backend: str = "auto",
    chunk_size: int | None = None,
) -> WeightedSums:
    """
    Numerator and denominator of `linear_attention`, whose arguments these are.

    Returns:
        numerator (B, T, H, d); the sum of weights (B, T, H), float32, or None unless `sums`; the final state, float32.
    """
    B, T, H, m = q.shape
    G = k.shape[2]
    d = v.shape[3]
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3] or H % G:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if log_decay is not None and log_decay.shape not in ((G,), k.shape[:3]):
        raise ValueError(f"log_decay is {tuple(log_decay.shape)}, expected {(G,)} or {tuple(k.shape[:3])}")
    if (chunk_size is not None and chunk_size < 1) or not T:
        raise ValueError(f"chunk_size={chunk_size} and {T} tokens: both must be at least 1")
    if cu_seqlens is not None and B != 1:
        raise ValueError(f"cu_seqlens needs one packed row, not a batch of {B}")
    rows = B if cu_seqlens is None else max(len(cu_seqlens) - 1, 0)
    groups = None if cu_seqlens is None else group_sequences(cu_seqlens, T)
    if state is None:
        state = v.new_zeros(rows, G, m, d + sums, dtype=torch.float32)
    elif state.shape != (rows, G, m, d + sums):
        raise ValueError(f"initial_state is {tuple(state.shape)}, expected {(rows, G, m, d + sums)}")
    state = state.float()
    log_decay = None if log_decay is None else log_decay.float()

    backend = preferred_backend if backend == "auto" else backend
    if choose_backend(backend, mode, q, log_decay, cu_seqlens) == "fla":
        values = F.pad(v, (0, 1), value=1.0) if sums else v
        bounds = None if cu_seqlens is None else cu_seqlens.to(q.device, torch.long)
        o, state = fla_linear_attention(q, k, values, log_decay, state, bounds)
        return (o[..., :-1], o[..., -1].float(), state) if sums else (o, None, state)
    options: dict[str, Any] = {"sums": sums, "mode": mode, "chunk_size": chunk_size}
    if groups is None:
        return torch_sums(q, k, v, log_decay, state, **options)
    if log_decay is not None:
        log_decay = log_decay.expand(1, T, G)
    # not divided yet, so float16 could not hold it
    dtype = torch.bfloat16 if all(x.dtype == torch.bfloat16 for x in (q, k, v)) else torch.float32
    o = v.new_zeros(T, H, d, dtype=dtype)
    total = v.new_zeros(T, H, dtype=torch.float32)
    final = torch.zeros_like(state)
    for group in groups:
        group_q, group_k, group_v = (group.unpack(x[0]) for x in (q, k, v))
        real = group.valid[..., None]
        group_k = group_k * real.unsqueeze(-1)
        decay = None if log_decay is None else group.unpack(log_decay[0]) * real
        numerator, weights, last = torch_sums(group_q, group_k, group_v, decay, state[group.sequences], **options)
        o = group.pack_into(o, numerator.to(o.dtype))
        total = total if weights is None else group.pack_into(total, weights)
        final = final.index_put((group.sequences,), last)
    return o[None], total[None] if sums else None, final


def choose_backend(
    backend: str, mode: str, q: Tensor, log_decay: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> str:
    """`torch` or `fla` for queries q. The log says once which was chosen, and why."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "fla":
        usable, reason = fla_is_usable(q.device)
        if not usable:
            raise ValueError(f"backend='fla' cannot run: {reason}; use backend='torch' or 'auto'")
        if mode == "naive":
            raise ValueError("backend='fla' has no mode='naive'; use backend='torch'")
        return "fla"
    if backend == "torch" or mode != "chunk" or not q.is_cuda:
        if backend == "auto" and not torch.compiler.is_compiling():
            logger.info_once("linear attention runs on torch's matrix products: no GPU, or a form asked for by name")
        return "torch"
    usable, reason = fla_is_usable(q.device)
    if usable and takes_single_steps(q, log_decay, cu_seqlens):
        usable, reason = False, "flash-linear-attention has no backward pass in chunks with a decay that trains here"
    if not torch.compiler.is_compiling():
        if usable:
            logger.info_once("linear attention runs on flash-linear-attention's Triton kernels")
        else:
            logger.warning_once(f"linear attention runs on torch's matrix products: {reason}")
    return "fla" if usable else "torch"


def torch_sums(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, *, sums: bool, mode: str, chunk_size: int | None
) -> WeightedSums:
    """`weighted_sums` by torch, one sequence per row, after its checks."""
    (B, T, H, _), G = q.shape, k.shape[2]
    if torch.is_autocast_enabled(q.device.type):  # it would mix the float32 of states with halves
        with torch.autocast(q.device.type, enabled=False):
            return torch_sums(q, k, v, log_decay, state, sums=sums, mode=mode, chunk_size=chunk_size)
    if mode != "chunk" or not all(x.dtype == torch.bfloat16 for x in (q, k, v)):
        q, k, v = (x.float() for x in (q, k, v))
    if T == 1 and mode == "recurrent":
        return recurrent_step(q, k, v, log_decay, state, sums=sums)
    # all R query heads of a group read one state
    q = q.unflatten(2, (G, H // G)).permute(0, 2, 3, 1, 4)
    k = k.permute(0, 2, 1, 3)
    v = v.permute(0, 2, 1, 3)
    if log_decay is not None:
        log_decay = log_decay.view(1, G, 1) if log_decay.dim() == 1 else log_decay.permute(0, 2, 1)
    options = {"chunk_size": chunk_size} if mode == "chunk" else {}
    o, total, state = MODES[mode](q, k, v, log_decay, state, sums=sums, **options)
    o = o.permute(0, 3, 1, 2, 4).reshape(B, T, H, -1)
    return o, None if total is None else total.permute(0, 3, 1, 2).reshape(B, T, H), state


def naive_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, *, sums: bool
) -> WeightedSums:
    """The formula, quadratic in T. Arguments and results as `chunk_linear_attention`."""
    T = k.shape[2]
    if sums:  # the denominator is one more value column, so it decays and is carried over with the rest
        v = F.pad(v, (0, 1), value=1.0)
    total = k.new_zeros(*k.shape[:3]) if log_decay is None else log_decay.expand(*k.shape[:3]).cumsum(-1)
    causal = torch.ones(T, T, dtype=torch.bool, device=k.device).tril()
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    weights = torch.einsum("bgrim,bgjm->bgrij", q, k) * decay.unsqueeze(2)
    o = torch.einsum("bgrij,bgjd->bgrid", weights, v)
    o = o + torch.einsum("bgrim,bgmd->bgrid", q * total.exp()[:, :, None, :, None], state)
    last = total[..., -1:]
    state = state * last[..., None].exp() + torch.einsum("bgjm,bgjd->bgmd", k * (last - total).exp()[..., None], v)
    return (o[..., :-1], o[..., -1], state) if sums else (o, None, state)


def recurrent_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, *, sums: bool
) -> WeightedSums:
    """Token by token. Arguments and results as `chunk_linear_attention`."""
    if sums:
        v = F.pad(v, (0, 1), value=1.0)
    if log_decay is not None:
        log_decay = log_decay.expand(*k.shape[:3])
    outputs = []
    for t in range(k.shape[2]):
        if log_decay is not None:
            state = state * log_decay[:, :, t, None, None].exp()
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append(q[:, :, :, t] @ state)
    o = torch.stack(outputs, dim=3)
    return (o[..., :-1], o[..., -1], state) if sums else (o, None, state)


def recurrent_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, *, sums: bool) -> WeightedSums:
    """`recurrent_linear_attention` of one token with as few operations as it takes. Arguments and results as `torch_sums`."""
    (B, _, H, m), G = q.shape, k.shape[2]
    if sums:
        v = F.pad(v, (0, 1), value=1.0)
    if log_decay is not None:
        state = state * log_decay.exp().view(-1, G, 1, 1)
    state = torch.addcmul(state, k.reshape(B, G, m, 1), v.reshape(B, G, 1, -1))
    o = torch.bmm(q.reshape(B * G, H // G, m), state.flatten(0, 1)).view(B, 1, H, -1)
    return (o[..., :-1], o[..., -1], state) if sums else (o, None, state)


MODES: dict[str, Callable[..., WeightedSums]] = {
    "naive": naive_linear_attention,
    "chunk": chunk_linear_attention,
    "recurrent": recurrent_linear_attention,
}
