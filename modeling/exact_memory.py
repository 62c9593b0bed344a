"""
The exact memory of a linear layer: old tokens that a score holds on to, in a fixed number of slots per key/value head.

A token that leaves the window competes for a slot; it is held as long as fewer than M of the tokens that have left by then
score higher (of equal ones the older wins). What loses leaves the memory for good, so that a token's rank alone decides and no
bound between blocks or pieces matters. Once the slots are full each arriving token drives exactly one out: itself or a holder.

Heads may have different numbers of slots. A state holds all slots of a layer one head after another, M_1 + M_2 + ... of them;
here they are laid side by side, M for each head, those that a head does not have or use empty.

B batch, T arriving tokens, G key/value heads, M slots, C arriving tokens per block, N blocks. Candidates are the M held
tokens, in order of age, and then the T arriving ones.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear_attention import TINY
from .linear_state import EMPTY, LinearState


class Candidates(NamedTuple):
    """
    The M held tokens, in order of age, and the T arriving ones.

    Attributes:
        k: (B, G, M + T, d).
        v: (B, G, M + T, d).
        score: (B, G, M + T) float32, `EMPTY` for those that do not compete.
        rank: (B, G, M + T) int32, how many real tokens came before each; negative for those that are no tokens.
    """

    k: Tensor
    v: Tensor
    score: Tensor
    rank: Tensor


class MemoryPlan(NamedTuple):
    """
    What becomes of the candidates.

    Attributes:
        holders: (B, G, N, M), the candidates that are held when each block begins, in order of age, then -1 for empty slots.
        last: (B, G, M), the same after the last arriving token.
        left: (B, G, M + T), the arriving token that drove each candidate out; T if none did. A candidate that does not
            compete is driven out by itself.
        lost: (B, G, T), the candidate that each arriving token drove out, -1 if none.
    """

    holders: Tensor
    last: Tensor
    left: Tensor
    lost: Tensor


class HeldKeys(NamedTuple):
    """
    The keys that the queries of each block see in the memory, C queries to a block.

    Attributes:
        k: (B, G, N, M + C, d).
        v: (B, G, N, M + C, d).
        hidden: (B, G, N, C, M + C) bool, the keys that each query does not see.
        gate: the soft gate, for training; None if a held key counts in full.
    """

    k: Tensor
    v: Tensor
    hidden: Tensor
    gate: "SoftGate | None" = None


class SoftGate(NamedTuple):
    """
    The parts of a held key that count exactly and through the features of the linear branch.

    Attributes:
        log_exact: (B, G, N, C, M + C), log of the first part, sigmoid((s_j - lowest held score) / temperature).
        log_linear: (B, G, N, R, C, M + C), log of the second part, 1 - sigmoid, times the key's weight in the linear branch.
    """

    log_exact: Tensor
    log_linear: Tensor


def plan_memory(held: Tensor, arriving: Tensor, slots: tuple[int, ...], block_size: int) -> MemoryPlan:
    """
    Args:
        held: (B, G, M), scores of the held tokens in order of age, `EMPTY` where there is none.
        arriving: (B, G, T), scores of the arriving tokens, `EMPTY` for those that do not compete.
        slots: of each head. M may be smaller, but no smaller than what is held after the last arriving token.
        block_size: C.

    Returns:
        The plan. No gradient passes through it.
    """
    held, arriving = held.detach().float(), arriving.detach().float()
    (B, G, M), T = held.shape, arriving.shape[2]
    device = held.device
    left = held.new_full((B, G, M + T + 1), T, dtype=torch.long)  # the last entry takes what empty slots write
    lost = held.new_full((B, G, T + 1), -1, dtype=torch.long)
    limit = torch.tensor(slots, device=device).view(G, 1, 1)
    current = torch.arange(M, device=device).expand(B, G, M)
    scores = held
    holders = []
    for start in range(0, T, block_size):
        new_scores = arriving[:, :, start : start + block_size]
        C = new_scores.shape[2]
        holders.append(torch.where(scores > EMPTY, current, -1))
        candidates = torch.cat((current, torch.arange(M + start, M + start + C, device=device).expand(B, G, C)), dim=2)
        scores = torch.cat((scores, new_scores), dim=2)
        competes = scores > EMPTY
        # how many candidates beat each: first the held ones, then with every arriving token
        j, i = torch.arange(M + C, device=device)[:, None], torch.arange(M, M + C, device=device)
        beaten = torch.where(i > j, new_scores[:, :, None] > scores[..., None], new_scores[:, :, None] >= scores[..., None])
        beaten = beaten & (i != j) & competes[:, :, None, M:]
        best = scores[:, :, :M].sort(dim=-1, descending=True, stable=True)
        among_held = torch.empty_like(best.indices).scatter_(2, best.indices, torch.arange(M, device=device).expand(B, G, M))
        below = torch.searchsorted(best.values.flip(-1).contiguous(), new_scores.contiguous())
        count = torch.cat((among_held, M - below), dim=2).unsqueeze(-1) + beaten.cumsum(-1)
        out = (count >= limit) & (i >= j)
        gone = out.any(-1) & competes
        when = start + out.long().argmax(-1)
        fate = torch.where(gone, when, torch.where(competes, T, candidates - M))
        left.scatter_(2, torch.where(competes | (j.squeeze(-1) >= M), candidates, M + T), fate)
        lost.scatter_(2, torch.where(gone, when, T), candidates)
        # the survivors, still in order of age
        kept = competes & ~gone
        order = torch.where(kept, torch.arange(M + C, device=device), M + C).sort(dim=-1).values[:, :, :M]
        there = order < M + C
        order = order.clamp_max(M + C - 1)
        current = candidates.gather(2, order)
        scores = scores.gather(2, order).masked_fill(~there, EMPTY)
    last = torch.where(scores > EMPTY, current, -1)
    return MemoryPlan(torch.stack(holders, dim=2), last, left[:, :, :-1], lost[:, :, :-1])


def side_by_side(slots: tuple[int, ...], columns: int, device: torch.device) -> Tensor:
    """(G, columns), where each slot of each head lies in a state, -1 for slots that the head does not have."""
    index = torch.full((len(slots), columns), -1, dtype=torch.long)
    first = 0
    for head, count in enumerate(slots):
        used = min(count, columns)
        index[head, :used] = torch.arange(first, first + used)
        first += count
    return index.to(device)


def candidates_of(state: LinearState, slots: tuple[int, ...], k: Tensor, v: Tensor, score: Tensor, rank: Tensor) -> Candidates:
    """
    The tokens that a state holds, and those that arrive.

    Args:
        state: of the tokens before.
        slots: of each head.
        k: (B, T, G, d).
        v: (B, T, G, d).
        score: (B, G, T), `EMPTY` for tokens that do not compete.
        rank: (B, T).
    """
    B, T, G, d = k.shape
    place = side_by_side(slots, max(slots), k.device)
    held = torch.where(place >= 0, state.memory_rank[:, place.clamp_min(0)], -1)
    # tokens in order of age, then empty slots; of these no more than may be filled
    M = min(max(slots), state.seen + T)
    order = torch.where(held >= 0, held, torch.iinfo(held.dtype).max).argsort(dim=-1)[:, :, :M]
    held = held.gather(2, order)
    row = place.clamp_min(0).expand(B, G, -1).gather(2, order)
    held_score = state.memory_score.gather(1, row.flatten(1)).view(B, G, M).masked_fill(held < 0, EMPTY)
    first = torch.arange(B, device=k.device)[:, None] * state.memory_k.shape[1]
    rows = (row.flatten(1) + first).flatten()
    old_k, old_v = (x.flatten(0, 1).index_select(0, rows).view(B, G, M, d) for x in (state.memory_k, state.memory_v))
    return Candidates(
        k=torch.cat((old_k, k.transpose(1, 2)), dim=2),
        v=torch.cat((old_v, v.transpose(1, 2)), dim=2),
        score=torch.cat((held_score, score), dim=2),
        rank=torch.cat((held, rank.int().unsqueeze(1).expand(B, G, T)), dim=2),
    )


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, G, n, d) by index (B, G, ...), which gives (B, G, ..., d). Negative ones stand for any row."""
    B, G, n, d = x.shape
    first = torch.arange(B * G, device=x.device).view(B, G, *(1,) * (index.dim() - 2)) * n
    return x.reshape(B * G * n, d).index_select(0, (index.clamp_min(0) + first).flatten()).view(*index.shape, d)


def block_candidates(plan: MemoryPlan, block_size: int) -> Tensor:
    """The candidates that the queries of each block may see, (B, G, N, M + C), -1 where there is none."""
    B, G, N, M = plan.holders.shape
    arriving = torch.arange(M, M + N * block_size, device=plan.holders.device).view(N, block_size)
    arriving = torch.where(arriving < M + plan.lost.shape[2], arriving, -1)
    return torch.cat((plan.holders, arriving.expand(B, G, N, block_size)), dim=3)


def held_keys(candidates: Candidates, plan: MemoryPlan, block_size: int) -> HeldKeys:
    """
    What the queries that come with the arriving tokens see: query t sees the arriving tokens up to t and the held ones, as
    long as they were not driven out at t or before.
    """
    N, M = plan.holders.shape[2:]
    C = block_size
    index = block_candidates(plan, C)
    flat = index.clamp_min(0).flatten(2)
    left, rank = (x.gather(2, flat).view_as(index) for x in (plan.left, candidates.rank))
    query = torch.arange(N * C, device=index.device).view(N, C, 1)
    seen = (index >= 0).unsqueeze(3) & (rank >= 0).unsqueeze(3) & (index.unsqueeze(3) - M <= query)
    hidden = ~(seen & (query < left.unsqueeze(3)))
    return HeldKeys(take(candidates.k, index), take(candidates.v, index), hidden)


def lost_keys(candidates: Candidates, plan: MemoryPlan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    The tokens that the arriving ones drove out, in that order: k and v (B, T, G, d), whether there is one (B, T, G), and how
    many real tokens came before it (B, T, G).
    """
    k, v = (take(x, plan.lost).transpose(1, 2) for x in (candidates.k, candidates.v))
    rank = candidates.rank.gather(2, plan.lost.clamp_min(0))
    return k, v, (plan.lost >= 0).transpose(1, 2), rank.transpose(1, 2)


def memory_after(candidates: Candidates, plan: MemoryPlan, slots: tuple[int, ...]) -> dict[str, Tensor]:
    """The fields of a `LinearState` that the memory has after the last arriving token."""
    B, G, _, d = candidates.k.shape
    columns = max(slots)
    last = F.pad(plan.last, (0, columns - plan.last.shape[2]), value=-1)
    # of all heads, one after another; lists, since the compiler refuses what depends on the values of tensors
    own = torch.tensor([head * columns + i for head, count in enumerate(slots) for i in range(count)], device=last.device)
    head = torch.tensor([head for head, count in enumerate(slots) for _ in range(count)], device=last.device)
    last = last.flatten(1).index_select(1, own)
    n = candidates.rank.shape[2]
    row = last.clamp_min(0) + head * n
    rows = (row + torch.arange(B, device=last.device)[:, None] * (G * n)).flatten()
    k, v = (x.flatten(0, 2).index_select(0, rows).view(B, -1, d) * (last >= 0).unsqueeze(-1) for x in candidates[:2])
    return {
        "memory_k": k,
        "memory_v": v,
        "memory_score": candidates.score.flatten(1).gather(1, row).masked_fill(last < 0, EMPTY),
        "memory_rank": candidates.rank.flatten(1).gather(1, row).masked_fill(last < 0, -1),
    }


def replace_weakest(
    state: LinearState, slots: tuple[int, ...], k: Tensor, v: Tensor, score: Tensor, rank: Tensor
) -> tuple[dict[str, Tensor], Candidates]:
    """
    One arriving token, which competes: the fields of a `LinearState` after it, and the token that it drove out as the only
    candidate, of negative rank if there was an empty slot.

    Args:
        state: of the tokens before.
        slots: of each head.
        k: (B, G, 1, d).
        v: (B, G, 1, d).
        score: (B, G, 1).
        rank: (B,).
    """
    (B, G, _, d), total = k.shape, sum(slots)
    place = side_by_side(slots, max(slots), k.device)
    here = place.clamp_min(0)
    scores = torch.cat((torch.where(place >= 0, state.memory_score[:, here], torch.inf), score), dim=2)
    ranks = torch.cat((state.memory_rank[:, here], rank.int().view(B, 1, 1).expand(B, G, 1)), dim=2)
    # the youngest of the weakest
    weakest = scores == scores.amin(-1, keepdim=True)
    slot = torch.where(weakest, ranks, -2).argmax(-1, keepdim=True)
    newcomer = slot == max(slots)
    # a row more takes what loses at once
    row = torch.where(newcomer, total, here.expand(B, -1, -1).gather(2, slot.clamp_max(max(slots) - 1))).squeeze(-1)
    of_rows = row.unsqueeze(-1).expand(B, G, d)
    fields = {}
    for name, x in (("memory_k", k), ("memory_v", v)):
        rows = F.pad(getattr(state, name), (0, 0, 0, 1))
        fields[f"lost {name}"] = torch.where(newcomer.unsqueeze(-1), x, rows.gather(1, of_rows).unsqueeze(2))
        fields[name] = rows.scatter(1, of_rows, x.squeeze(2))[:, :total]
    for name, x in (("memory_score", score), ("memory_rank", ranks[:, :, -1:])):
        fields[name] = F.pad(getattr(state, name), (0, 1)).scatter(1, row, x.squeeze(2))[:, :total]
    lost = Candidates(fields.pop("lost memory_k"), fields.pop("lost memory_v"), scores.gather(2, slot), ranks.gather(2, slot))
    return fields, lost


def held_rows(state: LinearState, slots: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The memory side by side: keys and values (B, G, M, d), and which of them are no tokens (B, G, M)."""
    place = side_by_side(slots, max(slots), state.memory_k.device)
    here = place.clamp_min(0)
    return state.memory_k[:, here], state.memory_v[:, here], (state.memory_rank[:, here] < 0) | (place < 0)


def soft_gate(
    candidates: Candidates, plan: MemoryPlan, held: HeldKeys, temperature: float, features: tuple[Tensor, Tensor]
) -> SoftGate:
    """
    The gate of the held keys, sigmoid((s_j - tau_i) / temperature) with tau_i the lowest score that query i sees held.

    Args:
        candidates: as for `held_keys`.
        plan: the same.
        held: its result.
        temperature: of the sigmoid, in units of the score.
        features: of the queries (B, T, H, m), and of the candidates as the linear state has them (B, M + T, G, m).
    """
    phi_q, phi_k = features
    (B, T, H, m), (G, N, C) = phi_q.shape, held.hidden.shape[1:4]
    index = block_candidates(plan, C).clamp_min(0)
    score = candidates.score.gather(2, index.flatten(2)).view_as(index).unsqueeze(3).masked_fill(held.hidden, torch.inf)
    lowest = score.amin(-1, keepdim=True)
    x = torch.where(held.hidden, 0.0, score - torch.where(lowest < torch.inf, lowest, 0.0)) / temperature
    phi_q = torch.cat((phi_q, phi_q.new_zeros(B, N * C - T, H, m)), dim=1)
    phi_q = phi_q.view(B, N, C, G, H // G, m).permute(0, 3, 1, 4, 2, 5)
    weight = phi_q @ take(phi_k.transpose(1, 2), index).unsqueeze(3).transpose(-1, -2)
    return SoftGate(F.logsigmoid(x), F.logsigmoid(-x).unsqueeze(3) + weight.clamp_min(TINY).log())
