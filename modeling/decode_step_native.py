"""
One decoding step of a settled linear layer in C: what `attend_step` of layer_step.py does in fifty torch calls, whose launch
costs far more than their arithmetic. Without a C compiler torch does the work.

The source is in decode_step_native_source.py; native_build.py compiles it at first use.

B batch, H query heads, G key/value heads, d head size, M features, S sinks, W window, M_1 .. M_G slots.
"""

import ctypes
import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .decode_step import StepWeights
from .decode_step_native_source import SOURCE
from .feature_map_base import MAX_EXPONENT
from .linear_attention_native import Input
from .linear_state import LinearState
from .native_build import load_library

POINTERS = (
    *("window_k", "window_v", "new_window_k", "new_window_v"),
    *("state", "key_weight", "key_bias", "branch_weight", "branch_bias", "log_decay", "new_state", "o"),
)
NUMBERS = ("feature_scale", "scaling", "limit", "key_limit")
MEMORY_FIELDS = ("memory_k", "memory_v", "memory_score", "memory_rank")
SIZES = ("B", "H", "G", "d", "m", "pairs", "sinks", "window", "bf16", "softmax", "shared", "most")
# what the compiled code keeps on its stack: 512 KB at most
STACK_FLOATS = 131072


class StepMemory(NamedTuple):
    """
    A layer's exact memory, and how the tokens get their scores: one of the other fields says it.

    Attributes:
        slots: of each head.
        receives: whether tokens in the window are scored by the weights of queries on window and sinks.
        leaving: gives the score (B, G, 1) of the token that leaves the window, and writes what the memory's score remembers to
            the new state.
        network: W_1 (G, width, 2 d), b_1 (G, width) and w_2 (G, width), which score a token on arrival; raw_k (B, 1, G, d).
    """

    slots: tuple[int, ...]
    receives: bool = False
    leaving: Callable[[LinearState], Tensor] | None = None
    network: tuple[Tensor, Tensor, Tensor, Tensor] | None = None


class Map(ctypes.Structure):
    """`struct map` of the source."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("matrix", "radii", "log_weights")]


class Memory(ctypes.Structure):
    """`struct memory` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in MEMORY_FIELDS),
        *((f"new_{name}", ctypes.c_void_p) for name in MEMORY_FIELDS),
        *((name, ctypes.c_void_p) for name in ("first", "tokens", "leaving", "window_score", "new_window_score")),
        *((name, ctypes.c_void_p) for name in ("W_1", "b_1", "w_2")),
        ("raw_k", Input),
        *((name, ctypes.c_long) for name in ("width", "receives")),
    ]


class Step(ctypes.Structure):
    """`struct step` of the source."""

    _fields_ = [
        *((name, Input) for name in "qkv"),
        *((name, Map) for name in ("map_q", "map_k")),
        ("memory", Memory),
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_float) for name in NUMBERS),
        *((name, ctypes.c_long) for name in SIZES),
    ]


def step_function() -> Callable[..., Any] | None:
    """The compiled function, or None where it cannot be compiled or is turned off."""
    library, _ = load_library(SOURCE, reordered_sums=True)
    return None if library is None else library.dijiang_step


def native_step(
    weights: StepWeights, q: Tensor, k: Tensor, v: Tensor, state: LinearState, exact: StepMemory | None = None
) -> tuple[Tensor, LinearState] | None:
    """
    `attend_step` of a layer with `weights`. No gradients.

    Args:
        weights: of the layer.
        q: (B, 1, H, d).
        k: (B, 1, G, d).
        v: (B, 1, G, d).
        state: a settled one.
        exact: the exact memory. None: there is none.

    Returns:
        o (B, 1, H, d) float32 and the new state; None off the CPU, without normalization or a compiler, for dtypes and sizes
        that the C code does not take, and for tensors that do not fit together, which torch then reports.
    """
    S, W = weights.sinks, weights.window
    M = weights.features
    (B, _, H, d), G = q.shape, k.shape[2]
    dtype = q.dtype
    slots = exact.slots if exact is not None else ()
    most = S + W + max(slots, default=0) + 1
    if (
        not (q.is_cpu and weights.normalize and dtype in (torch.float32, torch.bfloat16))
        or not k.dtype == v.dtype == state.window_k.dtype == state.window_v.dtype == dtype
        or not k.shape == v.shape == (B, 1, G, d)
        or not state.window_k.shape == state.window_v.shape == (B, G, S + W, d)
        or state.state.shape != (B, G, M, d + 1)
        or (W and weights.branch_scale is None)
        or H // G * (most + d) + 2 * M > STACK_FLOATS
        or (slots and not (W and state.memory_k.dtype == state.memory_v.dtype == dtype))
    ):
        return None
    # offloaded weights are on no device until their own module is called
    present = [x for x in (*weights.tensors(), state.state) if x is not None]
    if any(not x.is_cpu or x.dtype != torch.float32 or not x.is_contiguous() for x in present):
        return None
    function = step_function()
    if function is None:
        return None
    q, k, v = (x if x.stride()[2:] == (d, 1) else x.contiguous() for x in (q, k, v))
    window_k, window_v = state.window_k.contiguous(), state.window_v.contiguous()
    new = replace(
        state,
        tokens=state.tokens + 1,
        seen=state.seen + 1,
        state=torch.empty_like(state.state),
        window_k=torch.empty_like(window_k),
        window_v=torch.empty_like(window_v),
    )
    memory, owners = (Memory(), ()) if exact is None else pass_on(exact, state, new)
    o = q.new_empty(B, 1, H, d, dtype=torch.float32)
    log_decay = None if weights.log_rate is None else -weights.log_rate.exp()
    key_weight, key_bias = weights.key_scale or (None, None)
    branch_weight, branch_bias = weights.branch_scale or (None, None)
    step = Step(
        q=Input.of(q), k=Input.of(k), v=Input.of(v),
        map_q=Map(*map(address, weights.map_q)), map_k=Map(*map(address, weights.map_k)), memory=memory,
        window_k=address(window_k), window_v=address(window_v),
        new_window_k=address(new.window_k), new_window_v=address(new.window_v),
        state=address(state.state), new_state=address(new.state), o=address(o),
        key_weight=address(key_weight), key_bias=address(key_bias),
        branch_weight=address(branch_weight), branch_bias=address(branch_bias), log_decay=address(log_decay),
        feature_scale=weights.feature_scale, scaling=weights.scaling, limit=MAX_EXPONENT, key_limit=weights.key_limit,
        B=B, H=H, G=G, d=d, m=weights.rows, pairs=weights.pairs, sinks=S, window=W,
        bf16=dtype == torch.bfloat16, softmax=weights.softmax, shared=weights.map_q.V.dim() == 2, most=most,
    )  # fmt: skip
    function(ctypes.byref(step))
    del owners
    return o, new.settle(S, max(slots)) if slots else new


def pass_on(exact: StepMemory, state: LinearState, new: LinearState) -> tuple[Memory, tuple[Any, ...]]:
    """The memory of `state` and of `new`, whose tensors are made here; and the owners of what it points to."""
    leaving = network = None
    if exact.leaving is None:
        new.window_score = torch.empty_like(state.window_score)
    else:
        leaving = exact.leaving(new).contiguous()
    memory = Memory(receives=exact.receives, leaving=address(leaving))
    if exact.network is not None:
        network = tuple(x.contiguous() for x in exact.network)
        memory.W_1, memory.b_1, memory.w_2 = map(address, network[:3])
        memory.raw_k, memory.width = Input.of(network[3]), network[1].shape[1]
    old = {name: getattr(state, name).contiguous() for name in (*MEMORY_FIELDS, "window_score", "tokens")}
    for name in MEMORY_FIELDS:
        setattr(new, name, torch.empty_like(old[name]))
    for name, x in old.items():
        setattr(memory, name, address(x))
    for name in (*MEMORY_FIELDS, "window_score"):
        setattr(memory, f"new_{name}", address(getattr(new, name)))
    first = first_slots(exact.slots)
    memory.first = ctypes.addressof(first)
    return memory, (old, leaving, network, first)


@functools.cache
def first_slots(slots: tuple[int, ...]) -> ctypes.Array[ctypes.c_long]:
    """Where each head's slots begin, and the number of all."""
    return (ctypes.c_long * (len(slots) + 1))(0, *itertools.accumulate(slots))


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
