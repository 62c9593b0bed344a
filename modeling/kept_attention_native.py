"""
Softmax attention of one query to every token of kept heads, in C for CPUs: decoding reads each key and value once, in place.

B batch, H query heads, G key/value heads, R = H // G, T tokens, d head size.
"""

import ctypes

import torch
from torch import Tensor

from .linear_attention_native import Input
from .native_build import load_library
from .native_vectors_source import VECTORS

CHUNK = 512  # rows, as in the source
# below this number of rows of all heads, waking another thread costs more than it saves
ROWS_PER_THREAD = 4096

SOURCE = (
    VECTORS
    + r"""
enum { CHUNK = 512 }; /* rows that are read at once */

struct call {
    struct input q, k, v; /* q: (B, H, 1, d); k, v: (B, G, T, d) */
    float *o;             /* (B, H, d), and then for each chunk of each head its part: (B, G, chunks, R, d + 2) */
    float scale;
    long B, H, G, T, d, bf16;
};

INLINE const char *row_of(struct input x, long b, long head, long t)
{
    return x.x + b * x.steps[0] + head * x.steps[1] + t * x.steps[2];
}

/* sum of weights times values, highest score and sum of weights of each of R queries over n rows; scores: (R, CHUNK) */
static void attend_chunk(const struct call *c, long b, long g, long t, long n, float *part)
{
    const long R = c->H / c->G, d = c->d;
    float q[R * d], scores[R * CHUNK];
    for (long r = 0; r < R; r++)
        for (long j = 0; j < d; j += WIDTH)
            V(q + r * d + j) = load(row_of(c->q, b, g * R + r, 0), j, c->bf16) * c->scale;
    for (long i = 0; i < n; i++) {
        const char *key = row_of(c->k, b, g, t + i);
        for (long r = 0; r < R; r++) {
            vec sum = ZERO, other = ZERO;
            for (long j = 0; j < d; j += 2 * WIDTH) {
                sum += V(q + r * d + j) * load(key, j, c->bf16);
                if (j + WIDTH < d)
                    other += V(q + r * d + j + WIDTH) * load(key, j + WIDTH, c->bf16);
            }
            scores[r * CHUNK + i] = sum_lanes(sum + other);
        }
    }
    for (long r = 0; r < R; r++) {
        float *own = scores + r * CHUNK, *out = part + r * (d + 2), top = own[0];
        vec sum = ZERO;
        for (long i = 1; i < n; i++)
            top = own[i] > top ? own[i] : top;
        for (long i = n; i % WIDTH; i++)
            own[i] = -INFINITY;
        for (long i = 0; i < n; i += WIDTH) {
            const vec x = exponential(V(own + i) - top);
            V(own + i) = x;
            sum += x;
        }
        memset(out, 0, d * sizeof(float));
        out[d] = top;
        out[d + 1] = sum_lanes(sum);
    }
    for (long i = 0; i < n; i++) {
        const char *value = row_of(c->v, b, g, t + i);
        for (long r = 0; r < R; r++)
            for (long j = 0; j < d; j += WIDTH)
                V(part + r * (d + 2) + j) += scores[r * CHUNK + i] * load(value, j, c->bf16);
    }
}

void dijiang_attend(const struct call *c, int threads)
{
    const long R = c->H / c->G, d = c->d, chunks = (c->T + CHUNK - 1) / CHUNK, heads = c->B * c->G;
    float *parts = c->o + c->B * c->H * d;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long i = 0; i < heads * chunks; i++) {
        const long pair = i / chunks, t = i % chunks * CHUNK, n = c->T - t < CHUNK ? c->T - t : CHUNK;
        attend_chunk(c, pair / c->G, pair % c->G, t, n, parts + i * R * (d + 2));
    }
    for (long i = 0; i < heads * R; i++) {
        const float *part = parts + (i / R * chunks * R + i % R) * (d + 2);
        float *o = c->o + i * d, top = -INFINITY, total = 0.0f;
        for (long n = 0; n < chunks; n++)
            top = part[n * R * (d + 2) + d] > top ? part[n * R * (d + 2) + d] : top;
        memset(o, 0, d * sizeof(float));
        for (long n = 0; n < chunks; n++) {
            const float *own = part + n * R * (d + 2);
            const float weight = expf(own[d] - top);
            total += weight * own[d + 1];
            for (long j = 0; j < d; j++)
                o[j] += weight * own[j];
        }
        for (long j = 0; j < d; j++)
            o[j] /= total;
    }
}

int dijiang_work(struct call *c) { return 0; }
"""
)


class Call(ctypes.Structure):
    """`struct call` of the source."""

    _fields_ = [
        *((name, Input) for name in "qkv"),
        ("o", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_long) for name in ("B", "H", "G", "T", "d", "bf16")),
    ]


def native_attend_to_all(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor | None:
    """
    Softmax attention of q (B, H, 1, d) to all rows of k and v (B, G, T, d): (B, 1, H, d) in q's dtype; None where gradients
    are wanted, off the CPU, without a compiler, and for dtypes and sizes that the C code does not take.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    (B, H, one, d), (G, T) = q.shape, k.shape[1:3]
    if (
        one != 1
        or k.shape != v.shape
        or not q.dtype == k.dtype == v.dtype
        or q.dtype not in (torch.float32, torch.bfloat16)
        or d % 16
        or d * H // G > CHUNK * 16
        or H // G > CHUNK // 16
        or not q.numel()
        or any(not x.is_cpu or x.stride(3) != 1 for x in (q, k, v))
    ):
        return None
    library, _ = load_library(SOURCE)
    if library is None:
        return None
    chunks = -(-T // CHUNK)
    space = q.new_empty(B * H * d + B * G * chunks * (H // G) * (d + 2), dtype=torch.float32)
    call = Call(
        q=Input.of(q), k=Input.of(k), v=Input.of(v), o=space.data_ptr(), scale=scale,
        B=B, H=H, G=G, T=T, d=d, bf16=q.dtype == torch.bfloat16,
    )  # fmt: skip
    library.dijiang_attend(ctypes.byref(call), max(1, min(torch.get_num_threads(), B * G * T // ROWS_PER_THREAD)))
    return space[: B * H * d].view(B, 1, H, d).to(q.dtype)
