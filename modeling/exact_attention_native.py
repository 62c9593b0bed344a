r"""
The exact branch of a linear layer in C for CPUs: window_attention.py's attention to window, sinks and exact memory with the
linear branch as one more key, and the passing of that memory. No gradients.

A block of 64 queries, all heads of a group together, meets only the keys that one of its queries sees. A row of the window
that gets a slot of the memory when it leaves the window stays the same column.

The source is in exact_attention_native_source.py; native_build.py compiles it at first use.

B batch, T new tokens, W window, S sinks, H query heads, G key/value heads, d head size, M_1 .. M_G slots, N blocks.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .exact_attention_native_source import SOURCE
from .linear_attention_native import BLOCK, Input
from .linear_state import LinearState
from .native_build import load_library, run_on_threads
from .window_attention import Window

PASS, ATTEND, RECEIVE = range(3)  # kinds of calls, as in the source
INPUTS = ("q", "k", "v", "sink_k", "sink_v")
POINTERS = (
    *("valid", "arrival", "memory_k", "memory_v", "memory_score", "score", "memory_rank", "rank"),
    *("holders", "left_slot", "left", "new_k", "new_v", "lost_k", "lost_v", "new_score", "new_rank", "lost_rank", "there"),
    *("total", "branch_weight", "branch_bias", "o", "received", "first"),
)
SIZES = ("B", "T", "H", "G", "d", "W", "S", "bf16", "kind", "tasks", "next")


class Call(ctypes.Structure):
    """`struct call` of the source."""

    _fields_ = [
        *((name, Input) for name in INPUTS),
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_float) for name in ("scale", "branch_factor")),
        *((name, ctypes.c_long) for name in SIZES),
    ]
    memory: object  # the owners of what the pointers point to


@dataclass(kw_only=True, slots=True)
class PassedMemory:
    """
    What becomes of the tokens that leave the window. Candidates of a head are its slots in the state, then the T that leave.

    Attributes:
        slots: of each head.
        memory_k: (B, M_1 + .. + M_G, d), the slots' keys before the first query.
        memory_v: as memory_k, their values.
        holders: (B, N, M_1 + ..) int32, for each head the candidates that hold a slot when each block begins, then -1.
        left_slot: (B, M_1 + ..) int32, the query that drove each slot's token out, T if none did.
        left: (B, G, T) int32, the same of the tokens that leave; their own number if they got no slot.
        lost_k: (B, T, G, d), keys of the tokens that were driven out, one with every query.
        lost_v: as lost_k, their values.
        lost_rank: (B, T, G), how many real tokens came before each, -1 where nothing was driven out.
        there: (B, T, G) bool, whether anything was.
    """

    slots: tuple[int, ...]
    memory_k: Tensor
    memory_v: Tensor
    holders: Tensor
    left_slot: Tensor
    left: Tensor
    lost_k: Tensor
    lost_v: Tensor
    lost_rank: Tensor
    there: Tensor


def exact_is_native(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the compiled code takes inputs of these dtypes and sizes, (B, T, heads, d). The first call compiles it."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    one_dtype = q.dtype == k.dtype == v.dtype and q.dtype in (torch.float32, torch.bfloat16)
    fits = one_dtype and q.shape[3] % 16 == 0 and k.shape == v.shape and q.numel() > 0
    return fits and all(x.is_cpu for x in (q, k, v)) and load_library(SOURCE)[0] is not None


def run(
    kind: int, inputs: dict[str, Tensor], pointers: dict[str, Tensor | None], slots: tuple[int, ...], **numbers: Any
) -> None:
    """Run the compiled code on tensors by the names that they have there."""
    library, reason = load_library(SOURCE)
    if library is None:
        raise RuntimeError(reason)
    first = [sum(slots[:head]) for head in range(len(slots) + 1)]
    inputs = {name: x if x.stride(-1) == 1 else x.contiguous() for name, x in inputs.items()}
    tensors = {name: x for name, x in pointers.items() if x is not None} | {"first": torch.tensor(first)}
    if not all(x.is_contiguous() for x in tensors.values()):
        raise ValueError("the native kernel takes contiguous tensors only")
    k = inputs["k"]
    call = Call(
        **{name: Input.of(x) for name, x in inputs.items()},
        **{name: x.data_ptr() for name, x in tensors.items()},
        B=k.shape[0], G=k.shape[2], d=k.shape[3], bf16=k.dtype == torch.bfloat16, kind=kind, **numbers,
    )  # fmt: skip
    call.memory = inputs, tensors  # the other threads still read them if this one is interrupted
    run_on_threads(library, call, min(torch.get_num_threads(), call.tasks))


@torch.no_grad()
def native_pass_memory(
    state: LinearState, slots: tuple[int, ...], k: Tensor, v: Tensor, score: Tensor, rank: Tensor
) -> tuple[PassedMemory, dict[str, Tensor]]:
    """
    Let the first T rows of k and v, which leave the window, compete for the slots.

    Args:
        state: of the tokens before.
        slots: of each head.
        k: (B, W + T, G, d).
        v: (B, W + T, G, d).
        score: (B, G, T) float32, `EMPTY` for tokens that do not compete.
        rank: (B, T), how many real tokens came before each.

    Returns:
        What becomes of them, and the fields of a `LinearState` that the memory has afterwards.
    """
    (B, _, G, d), T = k.shape, score.shape[2]
    total, N = sum(slots), -(-T // BLOCK)
    old = {name: getattr(state, name).contiguous() for name in ("memory_k", "memory_v", "memory_score", "memory_rank")}
    new = {name: torch.empty_like(x) for name, x in old.items()}
    passed = PassedMemory(
        slots=slots,
        memory_k=old["memory_k"],
        memory_v=old["memory_v"],
        holders=rank.new_empty(B, N, total, dtype=torch.int32),
        left_slot=rank.new_empty(B, total, dtype=torch.int32),
        left=rank.new_empty(B, G, T, dtype=torch.int32),
        lost_k=k.new_empty(B, T, G, d),
        lost_v=v.new_empty(B, T, G, d),
        lost_rank=rank.new_empty(B, T, G),
        there=rank.new_empty(B, T, G, dtype=torch.bool),
    )
    names = ("holders", "left_slot", "left", "lost_k", "lost_v", "lost_rank", "there")
    pointers = (
        old
        | {f"new_{name.removeprefix('memory_')}": x for name, x in new.items()}
        | {"score": score.contiguous(), "rank": rank.contiguous()}
        | {name: getattr(passed, name) for name in names}
    )
    run(PASS, {"k": k, "v": v}, pointers, slots, T=T, tasks=B * G)
    return passed, new


def window_tensors(window: Window) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """The inputs and pointers of a window."""
    k, v, valid, sinks = window
    inputs = {"k": k, "v": v, "sink_k": sinks.k, "sink_v": sinks.v}
    return inputs, {
        "valid": None if valid is None else valid.contiguous(),
        "arrival": None if sinks.arrival is None else sinks.arrival.contiguous(),
    }


@torch.no_grad()
def native_window_attention(
    q: Tensor,
    window: Window,
    numerator: Tensor,
    total: Tensor,
    log_scale: tuple[Tensor, Tensor, float],
    *,
    scale: float,
    memory: PassedMemory | None = None,
) -> Tensor:
    """
    `block_window_attention` of window_attention.py.

    Args:
        q: (B, T, H, d).
        window: of these queries.
        numerator: (B, T, H, d) of the linear branch; overwritten if it is contiguous and float32.
        total: (B, T, H) of the linear branch.
        log_scale: weight (H, d), bias (H) and a factor: the log-scale of the linear branch is factor * w.q + b.
        scale: factor on q.k.
        memory: what became of the tokens that leave the window. None: there is no memory.

    Returns:
        (B, T, H, d) float32.
    """
    (B, T, H, _), (rows, G) = q.shape, window.k.shape[1:3]
    weight, bias, factor = log_scale
    o = numerator.float().contiguous()
    inputs, pointers = window_tensors(window)
    pointers |= {
        "total": total.float().contiguous(),
        "branch_weight": weight.float().contiguous(),
        "branch_bias": bias.float().contiguous(),
        "o": o,
    }
    if memory is not None:
        names = ("memory_k", "memory_v", "holders", "left_slot", "left")
        pointers |= {name: getattr(memory, name) for name in names}
    run(
        ATTEND, {"q": q} | inputs, pointers, () if memory is None else memory.slots, scale=scale, branch_factor=factor / scale,
        T=T, H=H, W=rows - T, S=window.sinks.k.shape[1], tasks=B * G * -(-T // BLOCK),
    )  # fmt: skip
    return o


@torch.no_grad()
def native_received(q: Tensor, window: Window, scale: float) -> Tensor:
    """
    The softmax weights on window and sinks that the rows of the window receive from real queries q (B, T, H, d), summed:
    (B, G, W + T) float32.
    """
    (B, T, H, _), (rows, G) = q.shape, window.k.shape[1:3]
    W, N = rows - T, -(-T // BLOCK)
    inputs, pointers = window_tensors(window)
    blocks = torch.zeros(B, G, N, W + BLOCK)
    run(
        RECEIVE, {"q": q} | inputs, pointers | {"received": blocks}, (), scale=scale,
        T=T, H=H, W=W, S=window.sinks.k.shape[1], tasks=B * G * N,
    )  # fmt: skip
    # each block's rows overlap the next one's
    summed = blocks.new_zeros(B, G, N * BLOCK + W)
    index = torch.arange(N)[:, None] * BLOCK + torch.arange(W + BLOCK)
    return summed.index_add_(2, index.flatten(), blocks.flatten(2))[:, :, :rows]
