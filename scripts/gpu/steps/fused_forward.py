"""
An experiment: the whole op in three Triton kernels, forward only. Features are computed in registers, so that no tensor of the
size of q, k, v or o goes through memory besides these four.

It supports softmax features of one matrix per head (`wdcf`, `ldcf`, `pff`, `wpff`), paired or not, without decay and padding.
The tokens are cut into segments: the first kernel sums the keys' features times (value, 1) over each segment, the second
accumulates the sums over segments, the third starts from them and computes the outputs in blocks. A query's features are not
divided by their sum, which cancels in its output.

B batch, T tokens, H heads, d head size, m directions (paired: 2 m features), S segments.
"""

import torch
import triton
import triton.language as tl

SMALLEST, LARGEST = 64, 1024  # tokens per segment
PROGRAMS = 512  # fewest, if there are enough tokens


@triton.jit
def features(x, W, bias, h, m: tl.constexpr, d: tl.constexpr, PAIRS: tl.constexpr, DIVIDE: tl.constexpr):
    """
    exp(z - max) of z = [W x + b, -W x + b'], (C, m) each, over their sum if DIVIDE. W (2, H, m, d) holds a matrix as the sum
    of two in bfloat16; bias (H, M). They are loaded every time, because they would fill the registers.
    """
    rows, columns = tl.arange(0, m), tl.arange(0, d)
    M = 2 * m if PAIRS else m
    high = tl.load(W + (h * m + rows[None, :]) * d + columns[:, None])
    low = tl.load(W + ((tl.num_programs(2) + h) * m + rows[None, :]) * d + columns[:, None])
    z = tl.dot(x, low, tl.dot(x, high))
    first = z + tl.load(bias + h * M + rows, volatile=True)[None, :]
    second = tl.load(bias + h * M + (M - m) + rows, volatile=True)[None, :] - z
    top = tl.max(first, 1)
    if PAIRS:
        top = tl.maximum(top, tl.max(second, 1))
    first = tl.exp(first - top[:, None])
    second = tl.exp(second - top[:, None])
    if DIVIDE:
        total = tl.sum(first, 1)
        if PAIRS:
            total += tl.sum(second, 1)
        share = 1.0 / total
        first, second = first * share[:, None], second * share[:, None]
    return first.to(tl.bfloat16), second.to(tl.bfloat16)


@triton.jit
def segment_sums(
    k, v, W, bias, states, sums, T, segment, C: tl.constexpr, m: tl.constexpr, d: tl.constexpr, PAIRS: tl.constexpr
):
    """The sum over a segment of phi(k) v^T, (M, d), and of phi(k), (M,)."""
    s, S = tl.program_id(0), tl.num_programs(0)
    h, H = tl.program_id(2), tl.num_programs(2)
    b = tl.program_id(1)
    rows, columns = tl.arange(0, m), tl.arange(0, d)
    tokens = tl.arange(0, C)
    state_first, state_second = tl.zeros((m, d), tl.float32), tl.zeros((m, d), tl.float32)
    sum_first, sum_second = tl.zeros((m, 16), tl.float32), tl.zeros((m, 16), tl.float32)
    for start in range(0, segment, C):
        t = s * segment + start + tokens
        real = t < T
        at = ((b * T + t) * H + h)[:, None].to(tl.int64) * d + columns[None, :]
        key = tl.load(k + at, mask=real[:, None], other=0.0)
        value = tl.load(v + at, mask=real[:, None], other=0.0)
        # values and ones of tokens beyond the end are zero
        ones = tl.where(real[:, None], tl.full((C, 16), 1.0, tl.float32), 0.0).to(tl.bfloat16)
        first, second = features(key, W, bias, h, m, d, PAIRS, True)
        state_first = tl.dot(tl.trans(first), value, state_first)
        sum_first = tl.dot(tl.trans(first), ones, sum_first)
        if PAIRS:
            state_second = tl.dot(tl.trans(second), value, state_second)
            sum_second = tl.dot(tl.trans(second), ones, sum_second)
    M = 2 * m if PAIRS else m
    base_row = ((b * H + h) * S + s).to(tl.int64) * M
    tl.store(states + (base_row + rows[:, None]) * d + columns[None, :], state_first)
    tl.store(sums + base_row + rows, tl.max(sum_first, 1))
    if PAIRS:
        tl.store(states + (base_row + m + rows[:, None]) * d + columns[None, :], state_second)
        tl.store(sums + base_row + m + rows, tl.max(sum_second, 1))


@triton.jit
def running_sums(x, S, size, BLOCK: tl.constexpr):
    """x (B H, S, size): each segment's entry becomes the sum of those before it. Sixteen segments are read at a time."""
    at, offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, 16)
    base = x + tl.program_id(1).to(tl.int64) * S * size
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, S, 16):
        inside = ((start + offset) < S)[:, None] & (at < size)[None, :]
        at_segments = base + (start + offset)[:, None] * size + at[None, :]
        entries = tl.load(at_segments, mask=inside, other=0.0)
        tl.store(at_segments, total[None, :] + tl.cumsum(entries, 0) - entries, mask=inside)
        total += tl.sum(entries, 0)


@triton.jit
def outputs(q, k, v, W_q, bias_q, W_k, bias_k, states, sums, o, T, segment,
            C: tl.constexpr, m: tl.constexpr, d: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """The outputs of a segment's queries."""
    s, S = tl.program_id(0), tl.num_programs(0)
    h, H = tl.program_id(2), tl.num_programs(2)
    b = tl.program_id(1)
    rows, columns = tl.arange(0, m), tl.arange(0, d)
    tokens = tl.arange(0, C)
    same = tl.arange(0, 16)
    M = 2 * m if PAIRS else m
    base_row = ((b * H + h) * S + s).to(tl.int64) * M
    state_first = tl.load(states + (base_row + rows[:, None]) * d + columns[None, :])
    sum_first = tl.load(sums + base_row + rows[:, None] + 0 * same[None, :])  # sixteen equal columns, for the matrix unit
    state_second, sum_second = state_first, sum_first
    if PAIRS:
        state_second = tl.load(states + (base_row + m + rows[:, None]) * d + columns[None, :])
        sum_second = tl.load(sums + base_row + m + rows[:, None] + 0 * same[None, :])
    for start in range(0, segment, C):
        t = s * segment + start + tokens
        real = t < T
        at = ((b * T + t) * H + h)[:, None].to(tl.int64) * d + columns[None, :]
        query = tl.load(q + at, mask=real[:, None], other=0.0)
        a_first, a_second = features(query, W_q, bias_q, h, m, d, PAIRS, False)
        numerator = tl.dot(a_first, state_first.to(tl.bfloat16))
        total = tl.dot(a_first, sum_first.to(tl.bfloat16))
        if PAIRS:
            numerator = tl.dot(a_second, state_second.to(tl.bfloat16), numerator)
            total = tl.dot(a_second, sum_second.to(tl.bfloat16), total)
        key = tl.load(k + at, mask=real[:, None], other=0.0)
        first, second = features(key, W_k, bias_k, h, m, d, PAIRS, True)
        weights = tl.dot(a_first, tl.trans(first))
        if PAIRS:
            weights = tl.dot(a_second, tl.trans(second), weights)
        weights = tl.where((tokens[:, None] >= tokens[None, :]) & real[None, :], weights, 0.0).to(tl.bfloat16)
        ones = tl.where(real[:, None], tl.full((C, 16), 1.0, tl.float32), 0.0).to(tl.bfloat16)
        value = tl.load(v + at, mask=real[:, None], other=0.0)
        numerator = tl.dot(weights, value, numerator)
        total = tl.max(tl.dot(weights, ones, total), 1)
        tl.store(o + at, (numerator / tl.maximum(total, 1e-30)[:, None]).to(tl.bfloat16), mask=real[:, None])
        state_first = tl.dot(tl.trans(first), value, state_first)
        sum_first = tl.dot(tl.trans(first), ones, sum_first)
        if PAIRS:
            state_second = tl.dot(tl.trans(second), value, state_second)
            sum_second = tl.dot(tl.trans(second), ones, sum_second)


def split(matrix: torch.Tensor) -> torch.Tensor:
    """Tensor (2, H, m, d) in bfloat16 whose sum over the first axis is matrix (H, m, d) to 16 bits."""
    high = matrix.bfloat16()
    return torch.stack((high, (matrix - high.float()).bfloat16()))


def fused_forward(layer, q, k, v, *, block: int = 32, warps: int = 4, stages: int = 1) -> torch.Tensor:
    """
    Output o (B, T, H, d) of `DiJiangLinearAttention.attend` without a state.

    q, k and v are contiguous, bfloat16 (B, T, H, d). `block` is the number of tokens computed at a time: with 64 or 128
    Triton 3.6 uses Hopper's warp-group products, and results were wrong or memory was accessed out of bounds (on an H200).
    """
    B, T, H, d = q.shape
    pairs = layer.feature_map_q.pairs
    m = layer.feature_map_q.feature_dim
    scale = layer.feature_scale
    (W_q, bias_q), (W_k, bias_k) = (phi.matrix(scale) for phi in (layer.feature_map_q, layer.feature_map_k))
    M = W_q.shape[1]
    W_q, W_k = (split(W[:, :m]) for W in (W_q, W_k))
    segment = min(max(T * B * H // PROGRAMS // SMALLEST * SMALLEST, SMALLEST), LARGEST)
    segment = -(-segment // block) * block
    S = -(-T // segment)
    states = q.new_empty(B * H, S, M, d, dtype=torch.float32)
    sums = q.new_empty(B * H, S, M, dtype=torch.float32)
    o = torch.empty_like(q)
    sizes = {"C": block, "m": m, "d": d, "PAIRS": pairs, "num_warps": warps, "num_stages": stages}
    segment_sums[(S, B, H)](k, v, W_k, bias_k.contiguous(), states, sums, T, segment, **sizes)
    for x, size in ((states, M * d), (sums, M)):
        running_sums[(triton.cdiv(size, 128), B * H)](x, S, size, BLOCK=128)
    outputs[(S, B, H)](q, k, v, W_q, bias_q.contiguous(), W_k, bias_k.contiguous(), states, sums, o, T, segment, **sizes)
    return o
