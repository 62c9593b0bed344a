r"""
Linear attention, feature map included, as one pass in C for CPUs. Torch's matrix products leave every intermediate tensor in
memory; here 64 tokens at a time stay in the processor's cache from the projection to the output. No gradients.

The source, native_kernel_source.py, is compiled at first use with the user's C compiler (`CC`, else cc, gcc or clang), kept on
disk and called through ctypes. DIJIANG_NATIVE=0 turns it off.

B batch, T tokens, H query heads, G key/value heads, R = H // G, M features, d head size, e value size.
"""

import ctypes
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise

import torch

from .linear_attention_native_source import SOURCE
from .native_build import load_library

POINTERS = ("W_q", "b_q", "W_k", "b_k", "key_weight", "log_decay", "state", "o", "total", "new_state")
SIZES = ("B", "T", "H", "G", "M", "d", "e", "bf16", "softmax", "sums", "normalize", "tasks", "most")
BLOCK = 64  # as in the source
WITHOUT_OPENMP = 2  # what dijiang_run says then
# (b, g) pairs that go through the tokens together: their states and matrices must fit the processor's second cache
BUNDLE = 4
# most pieces of one pair: however many there are, the last one costs no less than `ratio` of the whole
PIECES = 4


class Input(ctypes.Structure):
    """`struct input` of the source."""

    _fields_ = [("x", ctypes.c_void_p), ("steps", ctypes.c_long * 3)]

    @classmethod
    def of(cls, x: torch.Tensor) -> "Input":
        return cls(x.data_ptr(), tuple(step * x.element_size() for step in x.stride()[:3]))


class Call(ctypes.Structure):
    """`struct call` of the source."""

    _fields_ = [
        *((name, Input) for name in "qkv"),
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_long) for name in SIZES),
        ("table", ctypes.c_void_p),
        ("next", ctypes.c_long),
    ]


def load_kernel() -> tuple:
    """The library and why there is none; one of them is None."""
    library, reason = load_library(SOURCE)
    if library is None:
        return None, reason
    library.dijiang_work.argtypes = [ctypes.POINTER(Call)]
    library.dijiang_run.argtypes = [ctypes.POINTER(Call), ctypes.c_int]
    return library, None


def native_is_usable() -> tuple[bool, str]:
    """Whether `native_linear_attention` runs here, and why not. The first call compiles it, which takes about a second."""
    work, reason = load_kernel()
    return work is not None, reason or ""


def native_supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, M: int) -> bool:
    """Whether the shapes, dtypes and strides are ones that `native_linear_attention` takes."""
    alike = q.dtype == k.dtype == v.dtype and q.dtype in (torch.float32, torch.bfloat16)
    if not alike or any(x.device.type != "cpu" or x.dim() != 4 or x.stride(3) != 1 for x in (q, k, v)):
        return False
    fits = q.shape[:2] == k.shape[:2] and k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3]
    return (
        fits
        and q.shape[2] % k.shape[2] == 0
        and not (M % 16 or q.shape[3] % 16 or v.shape[3] % 16)
        and q.numel() > 0
        and v.numel() > 0
    )


@functools.cache
def helpers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="dijiang")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=helpers.cache_clear)


def plan_tasks(T: int, threads: int, pairs: int, ratio: float) -> list[tuple[int, int, int, int]]:
    """
    Tasks of about the same cost for each thread: (first pair, end of the pairs, first token, end of the tokens).

    Every thread gets as many whole (b, g) pairs, in bundles. The pairs that remain are cut: a piece first runs through the
    keys before it, at `ratio` of the cost of attending, so that no piece waits for another and the numbers do not depend on
    the cut. Such pieces of equal cost get shorter by a factor of 1 - ratio each.
    """
    share, rest = divmod(pairs, threads)
    count = min(threads // rest, PIECES) if rest else 1
    if count == 1 or T < 4 * BLOCK * count:  # not worth a cut
        share, rest = -(-pairs // threads), 0
    bundles = -(-share // BUNDLE)
    bounds = [thread * share + i * share // bundles for thread in range(threads) for i in range(bundles)] if share else []
    bounds = [bound for bound in bounds if bound < pairs - rest] + [pairs - rest]
    tasks = [(first, last, 0, T) for first, last in pairwise(bounds)]
    left = 1 - ratio
    ends = [round(T * (1 - left**i) / (1 - left**count) / BLOCK) * BLOCK for i in range(count)] + [T]
    return tasks + [(pair, pair + 1, *piece) for pair in range(pairs - rest, pairs) for piece in pairwise(ends)]


@torch.no_grad()
def native_linear_attention(
    q, k, v, W_q, b_q, W_k, b_k, *, activation, key_weight=None, log_decay=None, state, sums: bool, normalize: bool = False
):
    """
    `weighted_sums` of linear_attention.py with the feature map before it: z = W x + b, then phi = softmax(z), or
    exp(clamp(z, -20, 20)) / sqrt(M). Everything is computed in float32.

    Args:
        q: (B, T, H, d); k: (B, T, G, d); v: (B, T, G, e): all float32 or all bfloat16, strided but for the last dimension.
        W_q: (H, M, d); b_q: (H, M); W_k: (G, M, d); b_k: (G, M).
        activation: `softmax` or `exp`.
        key_weight: (B, T, G), multiplies phi(k); 0 hides a key, though it ages the state. Default: 1.
        log_decay: (G,), g <= 0. Default: no decay.
        state: (B, G, M, e), or (B, G, M, e + 1) if `sums`: the last column sums phi(k). Left as it is.
        sums: also return the sums of weights.
        normalize: divide by the sums of weights instead of returning them.

    Returns:
        numerator (B, T, H, e), float32; the sums of weights (B, T, H) or None; the state after the last token. If
        `normalize`: the quotient in v's dtype, None, and the state.

    Raises:
        ValueError: if `native_supports` says no, or on other shapes that do not fit.
        RuntimeError: if `native_is_usable` says no.
    """
    usable, reason = native_is_usable()
    if not usable:
        raise RuntimeError(reason)
    (B, T, H, d), G, e, M = q.shape, k.shape[2], v.shape[3], W_q.shape[1]
    if not native_supports(q, k, v, M):
        raise ValueError(f"the native kernel cannot take q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, M={M}")
    if activation not in ("softmax", "exp") or (normalize and not sums):
        raise ValueError(f"activation={activation!r} is unknown, or normalize=True has no sums to divide by")
    shapes = {"W_q": (H, M, d), "b_q": (H, M), "W_k": (G, M, d), "b_k": (G, M), "state": (B, G, M, e + sums)}
    shapes |= {"key_weight": (B, T, G), "log_decay": (G,)}
    given = {"W_q": W_q, "b_q": b_q, "W_k": W_k, "b_k": b_k, "state": state, "key_weight": key_weight, "log_decay": log_decay}
    given = {name: x.float().contiguous() for name, x in given.items() if x is not None}
    for name, x in given.items():
        if x.shape != shapes[name]:
            raise ValueError(f"{name} is {tuple(x.shape)}, expected {shapes[name]}")

    o = q.new_empty(B, T, H, e, dtype=v.dtype if normalize else torch.float32)
    total = q.new_empty(B, T, H, dtype=torch.float32) if sums and not normalize else None
    new_state = torch.empty_like(given["state"])
    tensors = {"o": o, "total": total, "new_state": new_state} | given
    # per token and group; the mask leaves about half of a block's weights
    of_keys = M * (d + e)
    ratio = of_keys / (of_keys + H // G * (of_keys + BLOCK // 2 * (M + e)))
    threads = torch.get_num_threads()
    tasks = plan_tasks(T, threads, B * G, ratio)
    most = max(last - first for first, last, *_ in tasks)
    numbers = (B, T, H, G, M, d, e, q.dtype == torch.bfloat16, activation == "softmax", sums, normalize, len(tasks), most)
    table = (ctypes.c_long * (4 * len(tasks)))(*chain.from_iterable(tasks))
    inputs = {"q": Input.of(q), "k": Input.of(k), "v": Input.of(v)}
    call = Call(**inputs, **dict(zip(SIZES, numbers, strict=True)), table=ctypes.addressof(table))
    for name, x in tensors.items():
        if x is not None:
            setattr(call, name, x.data_ptr())
    call.kept = tensors, q, k, v, table  # by the threads too, whatever interrupts this one
    library, pointer = load_kernel()[0], ctypes.pointer(call)
    threads = min(threads, len(tasks))
    failed = library.dijiang_run(pointer, threads)
    if failed == WITHOUT_OPENMP:
        futures = [helpers(threads - 1).submit(library.dijiang_work, pointer) for _ in range(threads - 1)]
        failed = any([library.dijiang_work(pointer), *(future.result() for future in futures)])
    if failed:
        raise MemoryError("the native kernel could not get its scratch memory")
    return o, total, new_state
