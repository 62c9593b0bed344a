"""
One decoding step of a settled linear layer in C: what `attend_step` of linear_layer.py does in fifty torch calls, whose
launch costs far more than their arithmetic. Without a C compiler torch does the work.
"""

import ctypes
from dataclasses import replace

import torch

from .exponential_maps import ExponentialMap
from .feature_map_base import MAX_EXPONENT
from .linear_state import LinearState
from .native_build import load_library

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>

static void load(float *to, const void *from, long offset, int n, int bf16) {
    if (!bf16) { memcpy(to, (const float *)from + offset, n * sizeof(float)); return; }
    const uint16_t *x = (const uint16_t *)from + offset;
    for (int i = 0; i < n; i++) {
        union { uint32_t bits; float value; } y;
        y.bits = (uint32_t)x[i] << 16;
        to[i] = y.value;
    }
}

static float dot(const float *a, const float *b, int n) {
    float sum = 0;
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* lets NaN through, as torch does */
static float clamp(float x, float limit) { return x < -limit ? -limit : x > limit ? limit : x; }

static void softmax(float *z, int n) {
    float top = z[0], sum = 0;
    for (int i = 1; i < n; i++) top = z[i] > top ? z[i] : top;
    for (int i = 0; i < n; i++) sum += z[i] = expf(z[i] - top);
    float inverse = 1 / sum;
    for (int i = 0; i < n; i++) z[i] *= inverse;
}

/* features of one row: z = scale T (C x), then -z if pairs, plus log weights */
static void features(float *phi, const float *x, const float *C, const float *T, const float *D, int m, int d, int pairs,
                     int normalized, float scale, float limit) {
    int M = pairs ? 2 * m : m;
    for (int r = 0; r < m; r++) {
        float z = scale * dot(C + (long)r * d, x, d) * (T ? T[r] : 1);
        phi[r] = z;
        if (pairs) phi[m + r] = -z;
    }
    if (D) for (int r = 0; r < M; r++) phi[r] += D[r];
    if (normalized) { softmax(phi, M); return; }
    float unit = 1 / sqrtf(M);
    for (int r = 0; r < M; r++) phi[r] = unit * expf(clamp(phi[r], limit));
}

void dijiang_step(const long *sizes, const float *scalars, const void **x, const float **w, void **out) {
    int B = sizes[0], H = sizes[1], G = sizes[2], d = sizes[3], m = sizes[4], pairs = sizes[5], S = sizes[6], W = sizes[7];
    int bf16 = sizes[8], normalized = sizes[9], shared = sizes[10];
    long sq = sizes[11], sk = sizes[12], sv = sizes[13];
    float scale = scalars[0], scaling = scalars[1], limit = scalars[2], key_limit = scalars[3];
    int R = H / G, M = pairs ? 2 * m : m, N = S + W, bytes = bf16 ? 2 : 4;
    float row[d], value[d], phi[M], far[d], scores[N + 1], *o = out[3];
    float near_k[(N ? N : 1) * d], near_v[(N ? N : 1) * d];
    for (int b = 0; b < B; b++) for (int g = 0; g < G; g++) {
        long own = (long)b * G + g, first = own * N * d, size = (long)M * (d + 1);
        const float *state = (const float *)x[5] + own * size;
        float *next = (float *)out[2] + own * size;
        if (W) { /* the oldest token of the window leaves it for the state, the new one takes the last place */
            load(row, x[3], first + (long)S * d, d, bf16);
            load(value, x[4], first + (long)S * d, d, bf16);
            for (int i = 0; i < 2; i++) {
                char *to = (char *)out[i] + first * bytes;
                const char *from = (const char *)x[3 + i] + first * bytes, *token = x[1 + i];
                memcpy(to, from, (long)S * d * bytes);
                memcpy(to + (long)S * d * bytes, from + (long)(S + 1) * d * bytes, (long)(W - 1) * d * bytes);
                memcpy(to + (long)(N - 1) * d * bytes, token + (b * (i ? sv : sk) + g * d) * bytes, (long)d * bytes);
            }
            load(near_k, out[0], first, N * d, bf16);
            load(near_v, out[1], first, N * d, bf16);
        } else {
            load(row, x[1], b * sk + g * d, d, bf16);
            load(value, x[2], b * sv + g * d, d, bf16);
        }
        features(phi, row, w[3] + (shared ? 0 : (long)g * m * d), w[4] ? w[4] + g * m : 0, w[5] ? w[5] + g * M : 0, m, d,
                 pairs, normalized, scale, limit);
        float weight = 1, kept = w[10] ? expf(w[10][g]) : 1;
        if (w[6]) weight = expf(clamp(scale * dot(w[6] + g * d, row, d) + w[7][g], key_limit));
        for (int r = 0; r < M; r++) {
            float p = phi[r] * weight, *to = next + (long)r * (d + 1);
            const float *from = state + (long)r * (d + 1);
            for (int j = 0; j < d; j++) to[j] = kept * from[j] + p * value[j];
            to[d] = kept * from[d] + p;
        }
        for (int h = g * R; h < (g + 1) * R; h++) {
            load(row, x[0], b * sq + h * d, d, bf16);
            features(phi, row, w[0] + (shared ? 0 : (long)h * m * d), w[1] ? w[1] + h * m : 0, w[2] ? w[2] + h * M : 0, m, d,
                     pairs, normalized, scale, limit);
            float total = 0, *result = o + ((long)b * H + h) * d;
            memset(far, 0, sizeof(far));
            for (int r = 0; r < M; r++) {
                const float *from = next + (long)r * (d + 1);
                for (int j = 0; j < d; j++) far[j] += phi[r] * from[j];
                total += phi[r] * from[d];
            }
            total = total < 1e-30f ? 1e-30f : total;
            if (!W) {
                for (int j = 0; j < d; j++) result[j] = far[j] / total;
                continue;
            }
            for (int n = 0; n < N; n++) scores[n] = scaling * dot(near_k + n * d, row, d);
            /* the linear branch is one more key of the softmax */
            scores[N] = logf(total) + scale * dot(w[8] + h * d, row, d) + w[9][h];
            softmax(scores, N + 1);
            float share = scores[N] / total;
            for (int j = 0; j < d; j++) result[j] = share * far[j];
            for (int n = 0; n < N; n++) for (int j = 0; j < d; j++) result[j] += scores[n] * near_v[n * d + j];
        }
    }
}
"""


def step_function():
    """The compiled function, or None where it cannot be had."""
    library, _ = load_library(SOURCE, reordered_sums=True)
    return None if library is None else library.dijiang_step


# what the compiled code keeps on its stack: 512 KB at most
STACK_FLOATS = 131072


def native_step(layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: LinearState):
    """
    `attend_step` of a `DiJiangLinearAttention`, whose arguments and results these are; None where this code does not apply:
    with gradients, off the CPU, for maps that are not exponentials of one matrix, or without normalisation.
    """
    map_q, map_k, window = layer.feature_map_q, layer.feature_map_k, layer.window
    dtype, d = q.dtype, layer.head_dim
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or not (q.is_cpu and layer.normalize and dtype in (torch.float32, torch.bfloat16) and k.dtype == v.dtype == dtype)
        or not (isinstance(map_q, ExponentialMap) and map_q.is_one_matrix and state.near_k.dtype == dtype)
        or 2 * (layer.sinks + window) * d + 2 * map_q.size > STACK_FLOATS
    ):
        return None
    function = step_function()
    if function is None:
        return None
    (B, _, H, _), G = q.shape, k.shape[2]
    near = (B, G, layer.sinks + window, d)
    if (
        state.state.shape != (B, G, map_k.size, d + 1)
        or not state.near_k.shape == state.near_v.shape == near
        or not state.near_k.dtype == state.near_v.dtype == dtype
        or not k.shape == v.shape == (B, 1, G, d)
        or (window and layer.branch_scale is None)
    ):
        return None  # torch says what does not fit
    q, k, v = (x if x.stride()[2:] == (d, 1) else x.contiguous() for x in (q, k, v))
    (matrix_q, T_q, D_q), (matrix_k, T_k, D_k) = map_q.factors(), map_k.factors()
    key_scale, branch_scale = layer.key_scale, layer.branch_scale
    weights = (
        *(matrix_q, T_q, D_q, matrix_k, T_k, D_k),
        *((None, None) if key_scale is None else (key_scale.weight, key_scale.bias)),
        *((None, None) if branch_scale is None else (branch_scale.weight, branch_scale.bias)),
        None if layer.decay is None else layer.decay(),
    )
    # offloaded weights are on no device until their own module is called
    present = [x for x in (*weights, state.state) if x is not None]
    if any(not x.is_cpu or x.dtype != torch.float32 or not x.is_contiguous() for x in present):
        return None
    near_k, near_v = state.near_k.contiguous(), state.near_v.contiguous()
    new = replace(
        state,
        tokens=state.tokens + 1,
        seen=state.seen + 1,
        state=torch.empty_like(state.state),
        near_k=torch.empty_like(near_k),
        near_v=torch.empty_like(near_v),
    )
    o = q.new_empty(B, 1, H, d, dtype=torch.float32)
    sizes = (B, H, G, d, map_q.feature_dim, map_q.pairs, layer.sinks, window, dtype == torch.bfloat16)
    sizes += (map_q.activation == "softmax", matrix_q.dim() == 2, q.stride(0), k.stride(0), v.stride(0))
    scalars = (layer.feature_scale, layer.scaling, MAX_EXPONENT, layer.key_exponent_limit)
    function(
        (ctypes.c_long * len(sizes))(*sizes),
        (ctypes.c_float * len(scalars))(*scalars),
        pointers(q, k, v, near_k, near_v, state.state),
        pointers(*weights),
        pointers(new.near_k, new.near_v, new.state, o),
    )
    return o, new


def pointers(*tensors: torch.Tensor | None):
    return (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))
