r"""
Linear attention, feature map included, as one pass in C for CPUs. Torch's matrix products leave every intermediate tensor in
memory; here 64 tokens at a time stay in the processor's cache from the projection to the output. No gradients.

The source is in linear_attention_native_source.py; native_build.py compiles it at first use.

B batch, T tokens, H query heads, G key/value heads, R = H // G, M features, d head size, e value size.
"""

import ctypes
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .exponential_maps import Exponents
from .linear_attention_native_source import SOURCE
from .native_build import load_library, run_on_threads

POINTERS = ("W_q", "b_q", "W_k", "b_k", "key_weight", "log_decay", "state", "o", "total", "new_state")
SIZES = ("B", "T", "H", "G", "M", "d", "e", "bf16", "softmax", "sums", "normalize", "tasks", "most")
BLOCK = 64  # tokens, as in the source
# (b, g) pairs that go through the tokens together: their states and matrices must fit the processor's second cache
BUNDLE = 4
# most pieces of one pair: the last one costs no less than `ratio` of the whole, however many there are
PIECES = 4


class Input(ctypes.Structure):
    """`struct input` of the source."""

    _fields_ = [("x", ctypes.c_void_p), ("steps", ctypes.c_long * 3)]

    @classmethod
    def of(cls, x: Tensor) -> "Input":
        """The pointer to a tensor of at least three dimensions, and its steps; the caller keeps the tensor alive."""
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
    memory: object  # the owners of what the pointers point to


def load_kernel() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason why there is none."""
    library, reason = load_library(SOURCE)
    if library is not None:
        library.dijiang_work.argtypes = [ctypes.POINTER(Call)]
        library.dijiang_run.argtypes = [ctypes.POINTER(Call), ctypes.c_int]
    return library, reason


def native_is_usable() -> tuple[bool, str]:
    """Whether `native_linear_attention` runs here, and why not. The first call compiles it, which takes about a second."""
    library, reason = load_kernel()
    return library is not None, reason


def native_supports(q: Tensor, k: Tensor, v: Tensor, M: int) -> bool:
    """Whether the shapes, dtypes and strides are ones that `native_linear_attention` takes."""
    one_dtype = q.dtype == k.dtype == v.dtype and q.dtype in (torch.float32, torch.bfloat16)
    if not one_dtype or any(x.device.type != "cpu" or x.dim() != 4 or x.stride(3) != 1 for x in (q, k, v)):
        return False
    fits = q.shape[:2] == k.shape[:2] and k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3]
    return (
        fits
        and q.shape[2] % k.shape[2] == 0
        and not (M % 16 or q.shape[3] % 16 or v.shape[3] % 16)
        and q.numel() > 0
        and v.numel() > 0
    )


def plan_tasks(T: int, threads: int, pairs: int, ratio: float) -> list[tuple[int, int, int, int]]:
    """
    Tasks of about the same cost for each thread: (first pair, end of the pairs, first token, end of the tokens).

    Every thread gets the same number of whole (b, g) pairs, in bundles. The pairs that remain are cut: a piece first runs
    through the keys before it, at `ratio` of the cost of attending, so that no piece waits for another and the numbers do not
    depend on the cut. Such pieces of equal cost get shorter by a factor of 1 - ratio each.
    """
    share, rest = divmod(pairs, threads)
    count = min(threads // rest, PIECES) if rest else 1
    if count == 1 or 4 * BLOCK * count > T:  # not worth a cut
        share, rest = -(-pairs // threads), 0
    bundles = -(-share // BUNDLE)
    bounds = [thread * share + i * share // bundles for thread in range(threads) for i in range(bundles)] if share else []
    bounds = [bound for bound in bounds if bound < pairs - rest] + [pairs - rest]
    tasks = [(first, last, 0, T) for first, last in pairwise(bounds)]
    left = 1 - ratio
    ends = [round(T * (1 - left**i) / (1 - left**count) / BLOCK) * BLOCK for i in range(count)] + [T]
    return tasks + [(pair, pair + 1, *piece) for pair in range(pairs - rest, pairs) for piece in pairwise(ends)]


class NativeMaps(NamedTuple):
    """
    The feature maps of queries and keys, phi(x) = softmax(W x + b), or exp(clamp(W x + b, -20, 20)) / sqrt(M).

    Attributes:
        q: W (H, M, d) and b (H, M).
        k: W (G, M, d) and b (G, M).
        activation: `softmax` or `exp`.
    """

    q: Exponents
    k: Exponents
    activation: str


@torch.no_grad()
def native_linear_attention(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: NativeMaps,
    *,
    key_weight: Tensor | None = None,
    log_decay: Tensor | None = None,
    state: Tensor,
    sums: bool,
    normalize: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """
    `weighted_sums` of linear_attention.py with the feature maps before it. Everything is computed in float32.

    Args:
        q: (B, T, H, d), float32 or bfloat16, strided but for the last dimension.
        k: (B, T, G, d), the same.
        v: (B, T, G, e), the same.
        maps: the feature maps.
        key_weight: (B, T, G), multiplies phi(k); 0 hides a key, though it ages the state. Default: 1.
        log_decay: (G,), g <= 0. Default: no decay.
        state: (B, G, M, e), or (B, G, M, e + 1) if `sums`: the last column sums phi(k). It is not changed.
        sums: also return the sums of weights.
        normalize: divide by the sums of weights instead of returning them.

    Returns:
        numerator (B, T, H, e), float32; the sums of weights (B, T, H) or None; the state after the last token. If
        `normalize`: the quotient in v's dtype, None, and the state.

    Raises:
        ValueError: if `native_supports` says no, or on other shapes that do not fit.
        RuntimeError: if `native_is_usable` says no.
    """
    library, reason = load_kernel()
    if library is None:
        raise RuntimeError(reason)
    (B, T, H, d), G = q.shape, k.shape[2]
    e = v.shape[3]
    M = maps.q.W.shape[1]
    if not native_supports(q, k, v, M):
        raise ValueError(f"the native kernel cannot take q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, M={M}")
    if maps.activation not in ("softmax", "exp") or (normalize and not sums):
        raise ValueError(f"activation={maps.activation!r} is unknown, or normalize=True has no sums to divide by")
    expected = {
        "W_q": (maps.q.W, (H, M, d)),
        "b_q": (maps.q.b, (H, M)),
        "W_k": (maps.k.W, (G, M, d)),
        "b_k": (maps.k.b, (G, M)),
        "state": (state, (B, G, M, e + sums)),
        "key_weight": (key_weight, (B, T, G)),
        "log_decay": (log_decay, (G,)),
    }
    tensors = {name: x.float().contiguous() for name, (x, _) in expected.items() if x is not None}
    for name, x in tensors.items():
        if x.shape != expected[name][1]:
            raise ValueError(f"{name} is {tuple(x.shape)}, expected {expected[name][1]}")

    o = q.new_empty(B, T, H, e, dtype=v.dtype if normalize else torch.float32)
    total = q.new_empty(B, T, H, dtype=torch.float32) if sums and not normalize else None
    new_state = torch.empty_like(tensors["state"])
    tensors |= {"o": o, "new_state": new_state} | ({} if total is None else {"total": total})
    # costs per token and group; the mask leaves about half of a block's weights
    key_cost = M * (d + e)
    ratio = key_cost / (key_cost + H // G * (key_cost + BLOCK // 2 * (M + e)))
    threads = torch.get_num_threads()
    tasks = plan_tasks(T, threads, B * G, ratio)
    table = (ctypes.c_long * (4 * len(tasks)))(*chain.from_iterable(tasks))
    call = Call(
        q=Input.of(q), k=Input.of(k), v=Input.of(v),
        **{name: x.data_ptr() for name, x in tensors.items()},
        B=B, T=T, H=H, G=G, M=M, d=d, e=e, bf16=q.dtype == torch.bfloat16, softmax=maps.activation == "softmax",
        sums=sums, normalize=normalize,
        tasks=len(tasks), most=max(last - first for first, last, *_ in tasks), table=ctypes.addressof(table),
    )  # fmt: skip
    call.memory = tensors, q, k, v, table  # the other threads still read them if this one is interrupted
    run_on_threads(library, call, min(threads, len(tasks)))
    return o, total, new_state
