"""
One decoding step of a settled linear layer in one Triton kernel: what `attend_step` of layer_step.py does in fifty torch
calls, each of which launches a kernel. Where this one does not apply or does not compile, torch does the work.

B batch, H query heads, G key/value heads, R = H / G, d head size, m rows of a feature map's matrix, M features (2 m if
paired, else m), S sinks, W window, N = S + W.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .decode_step import StepWeights
from .feature_map_base import MAX_EXPONENT
from .linear_attention import TINY
from .linear_state import LinearState
from .optional_kernel import OptionalKernel

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr

    jit = triton.jit
    missing = ""
except Exception as error:  # a broken driver raises other things than ImportError

    def jit(function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    constexpr = None
    missing = f"Triton cannot be imported: {error}"

logger = logging.get_logger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
MOST_FEATURES = 2048
# least programs of a launch, where splitting the values allows it: one for each multiprocessor of an H100
PROGRAMS = 132
# least columns of a slice of the values: 64 bytes of a row of the state
SMALLEST_SLICE = 16
# elements of a float32 tile that a program holds at once, a power of two
TILE = 4096
# elements of a tile that four warps of a program hold easily
SMALL_TILE = 2048
kernel = OptionalKernel("decoding steps run on a Triton kernel", "decoding steps run on torch: the Triton kernel fails here")


# the kernels have no types, since Triton gives annotations of parameters a meaning of its own
@jit
def clamp(x, limit):  # type: ignore[no-untyped-def]
    """x within -limit .. limit; lets NaN through, as torch does."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@jit
def features(  # type: ignore[no-untyped-def]
    x, matrix, radii, log_weights, scale, limit, unit,
    m: constexpr, d: constexpr, PAIRS: constexpr, SOFTMAX: constexpr, NB: constexpr, BM: constexpr, BD: constexpr,
):  # fmt: skip
    """
    Features of one row x (BD,) of one head: those of z = scale T (C x), and those of -z if PAIRS. Each is (NB, BM) float32,
    the one of row r of C at [r // BM, r % BM], zero behind the last.
    """
    columns, within = tl.arange(0, BD), tl.arange(0, BM)
    block = tl.arange(0, NB)[:, None]
    z = tl.zeros((NB, BM), tl.float32)
    for i in range(NB):
        rows = i * BM + within
        inside = (rows < m)[:, None] & (columns < d)[None, :]
        tile = tl.load(matrix + rows[:, None] * d + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        z = tl.where(block == i, tl.sum(tile * x[None, :], 1)[None, :], z)
    rows = block * BM + within[None, :]
    inside = rows < m
    z *= scale
    if radii is not None:
        z *= tl.load(radii + rows, mask=inside, other=0.0).to(tl.float32)
    first, second = z, -z
    if log_weights is not None:
        first += tl.load(log_weights + rows, mask=inside, other=0.0).to(tl.float32)
        if PAIRS:
            second += tl.load(log_weights + m + rows, mask=inside, other=0.0).to(tl.float32)
    if SOFTMAX:
        first, second = tl.where(inside, first, -float("inf")), tl.where(inside, second, -float("inf"))
        top = tl.max(tl.maximum(first, second) if PAIRS else first)
        first, second = tl.exp(first - top), tl.exp(second - top)
        total = tl.sum(first + second if PAIRS else first)
        first, second = first / total, second / total
    else:
        first = tl.where(inside, tl.exp(clamp(first, limit)) * unit, 0.0)
        second = tl.where(inside, tl.exp(clamp(second, limit)) * unit, 0.0)
    return first, second


@jit
def shifted(old, token, rows, columns, owned, S: constexpr, N: constexpr, d: constexpr):  # type: ignore[no-untyped-def]
    """`rows` (BN,) of a window after `token` (columns,) came in at its end and the oldest left it, in columns owned."""
    inside = (rows < N - 1)[:, None] & owned[None, :]
    source = tl.where(rows < S, rows, rows + 1)
    shifted_rows = tl.load(old + source[:, None] * d + columns[None, :], mask=inside, other=0.0)
    return tl.where((rows == N - 1)[:, None], token[None, :], shifted_rows)


@jit
def step_kernel(  # type: ignore[no-untyped-def]
    q, k, v, state, window_k, window_v, tokens, new_state, new_window_k, new_window_v, new_tokens, o,
    C_q, T_q, D_q, C_k, T_k, D_k, key_weight, key_bias, branch_weight, branch_bias, log_rate,
    q_stride, k_stride, v_stride, scale, scaling, limit, key_limit, unit, tiny,
    H: constexpr, R: constexpr, d: constexpr, m: constexpr, S: constexpr, W: constexpr, PAIRS: constexpr, SOFTMAX: constexpr,
    SHARED: constexpr, SUMS: constexpr, NB: constexpr, BM: constexpr, BD: constexpr, BV: constexpr, BN: constexpr,
):  # fmt: skip
    """
    Program (b H + h, s): the output of query head h in values s BV .. (s + 1) BV. All programs of one key/value head compute
    the new state; that of the first query head stores it.
    """
    h, s = tl.program_id(0) % H, tl.program_id(1)
    b, g = (tl.program_id(0) // H).to(tl.int64), h // R
    own = b * (H // R) + g
    stores = h % R == 0
    stores_sums = stores & (s == 0)
    N: constexpr = S + W
    M: constexpr = 2 * m if PAIRS else m
    width: constexpr = d + 1 if SUMS else d
    columns, values = tl.arange(0, BD), s * BV + tl.arange(0, BV)
    real, owned = columns < d, values < d
    query = tl.load(q + b * q_stride + h * d + columns, mask=real, other=0.0).to(tl.float32)
    new_key = tl.load(k + b * k_stride + g * d + columns, mask=real, other=0.0)
    new_value = tl.load(v + b * v_stride + g * d + values, mask=owned, other=0.0)
    if W > 0:  # the oldest token of the window leaves it for the state
        oldest = (own * N + S) * d
        key = tl.load(window_k + oldest + columns, mask=real, other=0.0).to(tl.float32)
        value = tl.load(window_v + oldest + values, mask=owned, other=0.0).to(tl.float32)
    else:
        key, value = new_key.to(tl.float32), new_value.to(tl.float32)

    # features of the key, and of the query
    p_first, p_second = features(
        key, C_k if SHARED else C_k + g * m * d, T_k if T_k is None else T_k + g * m, D_k if D_k is None else D_k + g * M,
        scale, limit, unit, m, d, PAIRS, SOFTMAX, NB, BM, BD,
    )  # fmt: skip
    a_first, a_second = features(
        query, C_q if SHARED else C_q + h * m * d, T_q if T_q is None else T_q + h * m, D_q if D_q is None else D_q + h * M,
        scale, limit, unit, m, d, PAIRS, SOFTMAX, NB, BM, BD,
    )  # fmt: skip
    if key_weight is not None:
        u = tl.load(key_weight + g * d + columns, mask=real, other=0.0).to(tl.float32)
        weight = tl.exp(clamp(scale * tl.sum(u * key) + tl.load(key_bias + g).to(tl.float32), key_limit))
        p_first, p_second = p_first * weight, p_second * weight

    # state: S = exp(-rate) S + phi(k) (v, 1)^T, and what the query reads of it
    if log_rate is not None:
        fading = tl.exp(-tl.exp(tl.load(log_rate + g).to(tl.float32)))
    products, weights = tl.zeros((BM, BV), tl.float32), tl.zeros((BM,), tl.float32)
    for i in range(NB):
        chosen = tl.arange(0, NB)[:, None] == i
        rows = i * BM + tl.arange(0, BM)
        inside = rows < m
        for half in tl.static_range(2 if PAIRS else 1):
            p = tl.sum(tl.where(chosen, p_first if half == 0 else p_second, 0.0), 0)
            a = tl.sum(tl.where(chosen, a_first if half == 0 else a_second, 0.0), 0)
            row = (own * M + half * m + rows) * width
            at, mask = row[:, None] + values[None, :], inside[:, None] & owned[None, :]
            tile = tl.load(state + at, mask=mask, other=0.0)
            if log_rate is not None:
                tile *= fading
            tile += p[:, None] * value[None, :]
            if stores:
                tl.store(new_state + at, tile, mask=mask)
            products += a[:, None] * tile
            if SUMS:
                sums = tl.load(state + row + d, mask=inside, other=0.0)
                if log_rate is not None:
                    sums *= fading
                sums += p
                if stores_sums:
                    tl.store(new_state + row + d, sums, mask=inside)
                weights += a * sums
    output = tl.sum(products, 0)
    if SUMS:
        total = tl.sum(weights)
        total = tl.where(total < tiny, tiny, total)
        output /= total

    # the linear branch is one more key of the window's softmax
    if W > 0:
        c = tl.load(branch_weight + h * d + columns, mask=real, other=0.0).to(tl.float32)
        top = tl.log(total) + scale * tl.sum(c * query) + tl.load(branch_bias + h).to(tl.float32)
        norm = tl.full([], 1.0, tl.float32)
        slice_k = real & (columns >= s * BV) & (columns < (s + 1) * BV)
        for start in range(0, N, BN):
            rows = start + tl.arange(0, BN)
            inside = rows < N
            at = (own * N + rows) * d
            keys = shifted(window_k + own * N * d, new_key, rows, columns, real, S, N, d)
            slice_v = shifted(window_v + own * N * d, new_value, rows, values, owned, S, N, d)
            if stores:
                tl.store(new_window_k + at[:, None] + columns[None, :], keys, mask=inside[:, None] & slice_k[None, :])
                tl.store(new_window_v + at[:, None] + values[None, :], slice_v, mask=inside[:, None] & owned[None, :])
            scores = tl.where(inside, scaling * tl.sum(keys.to(tl.float32) * query[None, :], 1), -float("inf"))
            higher = tl.maximum(top, tl.max(scores))
            share, scores = tl.exp(top - higher), tl.exp(scores - higher)
            norm = norm * share + tl.sum(scores)
            output = output * share + tl.sum(scores[:, None] * slice_v.to(tl.float32), 0)
            top = higher
        output /= norm
    tl.store(o + (b * H + h) * d + values, output, mask=owned)
    if (h == 0) & (s == 0):
        tl.store(new_tokens + b, tl.load(tokens + b) + 1)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def launch_sizes(B: int, H: int, d: int, m: int, N: int) -> dict[str, int]:
    """Blocks of `step_kernel` and the warps of a program."""
    BD = power_of_two(max(d, SMALLEST_SLICE))
    rows = max(TILE // BD, 16)
    BM = min(power_of_two(m), rows)
    BN = min(power_of_two(max(N, 16)), 2 * rows)
    BV = BD
    while B * H * -(-d // BV) < PROGRAMS and BV > SMALLEST_SLICE:
        BV //= 2
    NB = power_of_two(-(-m // BM))
    return {"NB": NB, "BM": BM, "BD": BD, "BV": BV, "BN": BN, "num_warps": 8 if max(BM, BN) * BD > SMALL_TILE else 4}


def triton_step(
    weights: StepWeights, q: Tensor, k: Tensor, v: Tensor, state: LinearState
) -> tuple[Tensor, LinearState] | None:
    """
    `attend_step` of a layer with `weights`, with the arguments of `native_step`. No gradients.

    Returns:
        o (B, 1, H, d) float32 and the new state; None off the GPU (unless Triton's interpreter is on), after a failure, and
        where the kernel does not take the dtypes and sizes.
    """
    if (
        not (q.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
        or os.environ.get("DIJIANG_NATIVE") == "0"
        or not kernel.usable
        or not applies(weights, q, k, v, state)
    ):
        return None
    if missing:
        logger.warning_once(f"decoding steps run on torch: {missing}")
        return None
    return kernel.run(lambda: launch(weights, q, k, v, state))


def applies(weights: StepWeights, q: Tensor, k: Tensor, v: Tensor, state: LinearState) -> bool:
    """Whether the kernel takes these sizes and dtypes; torch reports what does not fit together."""
    (B, _, H, d), G = q.shape, k.shape[2]
    dtype = q.dtype
    N = weights.sinks + weights.window
    return (
        d <= LARGEST_HEAD
        and weights.features <= MOST_FEATURES
        and dtype in DTYPES
        and k.dtype == v.dtype == state.window_k.dtype == state.window_v.dtype == dtype
        and q.shape == (B, 1, H, d)
        and k.shape == v.shape == (B, 1, G, d)
        and state.state.shape == (B, G, weights.features, d + weights.normalize)
        and state.window_k.shape == state.window_v.shape == (B, G, N, d)
        and not (weights.window and (weights.branch_scale is None or not weights.normalize))
    )


def launch(weights: StepWeights, q: Tensor, k: Tensor, v: Tensor, state: LinearState) -> tuple[Tensor, LinearState] | None:
    """`triton_step` where it applies; None if a tensor is elsewhere, as offloaded weights are until their module is called."""
    (B, _, H, d), G = q.shape, k.shape[2]
    tensors = weights.tensors()
    contiguous = [x for x in (*tensors, state.state) if x is not None]
    if any(x.device != q.device for x in (*contiguous, k, v, state.window_k, state.window_v, state.tokens)) or not all(
        x.is_contiguous() for x in contiguous
    ):
        return None
    q, k, v = (x if x.stride()[2:] == (d, 1) else x.contiguous() for x in (q, k, v))
    window_k, window_v = state.window_k.contiguous(), state.window_v.contiguous()
    new = replace(
        state,
        tokens=torch.empty_like(state.tokens),
        seen=state.seen + 1,
        state=torch.empty_like(state.state),
        window_k=torch.empty_like(window_k),
        window_v=torch.empty_like(window_v),
    )
    o = q.new_empty(B, 1, H, d, dtype=torch.float32)
    sizes = launch_sizes(B, H, d, weights.rows, weights.sinks + weights.window)
    # Triton launches on the current device
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        step_kernel[(B * H, -(-d // sizes["BV"]))](
            *(q, k, v, state.state, window_k, window_v, state.tokens),
            *(new.state, new.window_k, new.window_v, new.tokens, o),
            *tensors,
            *(q.stride(0), k.stride(0), v.stride(0)),
            *(weights.feature_scale, weights.scaling, MAX_EXPONENT, weights.key_limit, weights.features**-0.5, TINY),
            H=H,
            R=H // G,
            d=d,
            m=weights.rows,
            S=weights.sinks,
            W=weights.window,
            PAIRS=weights.pairs,
            SOFTMAX=weights.softmax,
            SHARED=weights.map_q.V.dim() == 2,
            SUMS=weights.normalize,
            **sizes,
        )
    return o, new
