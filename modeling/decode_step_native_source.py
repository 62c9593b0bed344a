"""The C source of decode_step_native.py, in a Python file because transformers copies no other files with a model."""

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>

struct input {
    const char *x; /* float32 or bfloat16 */
    long steps[3]; /* over B, T and heads, in bytes */
};

/* the factors of a feature map, head after head: matrix (m, d), radii (m) or NULL, log weights (M) or NULL */
struct map {
    const float *matrix, *radii, *log_weights;
};

struct step {
    struct input q, k, v;
    struct map map_q, map_k;
    const char *window_k, *window_v;
    char *new_window_k, *new_window_v;
    const float *state, *key_weight, *key_bias, *branch_weight, *branch_bias, *log_decay;
    float *new_state, *o;
    float feature_scale, scaling, limit, key_limit;
    long B, H, G, d, m, pairs, sinks, window, bf16, softmax, shared;
};

static void load(float *to, const char *from, int n, int bf16)
{
    if (!bf16) {
        memcpy(to, from, n * sizeof(float));
        return;
    }
    const uint16_t *x = (const uint16_t *)from;
    for (int i = 0; i < n; i++) {
        union { uint32_t bits; float value; } y;
        y.bits = (uint32_t)x[i] << 16;
        to[i] = y.value;
    }
}

static float dot(const float *a, const float *b, int n)
{
    float sum = 0;
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* lets NaN through, as torch does */
static float clamp(float x, float limit) { return x < -limit ? -limit : x > limit ? limit : x; }

static void softmax(float *z, int n)
{
    float top = z[0], sum = 0;
    for (int i = 1; i < n; i++) top = z[i] > top ? z[i] : top;
    for (int i = 0; i < n; i++) sum += z[i] = expf(z[i] - top);
    float inverse = 1 / sum;
    for (int i = 0; i < n; i++) z[i] *= inverse;
}

/* features of one row x of one head: z = scale T (C x), then -z if paired, plus log weights */
static void features(float *phi, const float *x, struct map map, long head, const struct step *s)
{
    const int m = s->m, d = s->d, pairs = s->pairs, M = pairs ? 2 * m : m;
    const float scale = s->feature_scale, limit = s->limit;
    const float *C = map.matrix + (s->shared ? 0 : head * m * d);
    const float *T = map.radii ? map.radii + head * m : 0, *D = map.log_weights ? map.log_weights + head * M : 0;
    for (int r = 0; r < m; r++) {
        float z = scale * dot(C + (long)r * d, x, d) * (T ? T[r] : 1);
        phi[r] = z;
        if (pairs)
            phi[m + r] = -z;
    }
    for (int r = 0; D && r < M; r++) phi[r] += D[r];
    if (s->softmax) {
        softmax(phi, M);
        return;
    }
    float unit = 1 / sqrtf(M);
    for (int r = 0; r < M; r++) phi[r] = unit * expf(clamp(phi[r], limit));
}

/* the window of one head after `token` came in at its end and the oldest token left it; the sinks stay in front of it */
static void shift(char *to, const char *from, const char *token, long sinks, long window, long row)
{
    memcpy(to, from, sinks * row);
    memcpy(to + sinks * row, from + (sinks + 1) * row, (window - 1) * row);
    memcpy(to + (sinks + window - 1) * row, token, row);
}

void dijiang_step(const struct step *s)
{
    const int H = s->H, G = s->G, d = s->d, S = s->sinks, W = s->window, bf16 = s->bf16;
    const int R = H / G, M = s->pairs ? 2 * s->m : s->m, N = S + W;
    const float scale = s->feature_scale, scaling = s->scaling;
    const long row_bytes = (long)d * (bf16 ? 2 : 4);
    float row[d], value[d], phi[M], numerator[d], scores[N + 1];
    float window_k[(N ? N : 1) * d], window_v[(N ? N : 1) * d];
    for (int b = 0; b < s->B; b++)
        for (int g = 0; g < G; g++) {
            const long own = (long)b * G + g, window = own * N * row_bytes;
            const char *token_k = s->k.x + b * s->k.steps[0] + g * s->k.steps[2];
            const char *token_v = s->v.x + b * s->v.steps[0] + g * s->v.steps[2];
            const float *state = s->state + own * M * (d + 1);
            float *next = s->new_state + own * M * (d + 1);
            if (W) { /* the oldest token of the window leaves it for the state */
                load(row, s->window_k + window + S * row_bytes, d, bf16);
                load(value, s->window_v + window + S * row_bytes, d, bf16);
                shift(s->new_window_k + window, s->window_k + window, token_k, S, W, row_bytes);
                shift(s->new_window_v + window, s->window_v + window, token_v, S, W, row_bytes);
                load(window_k, s->new_window_k + window, N * d, bf16);
                load(window_v, s->new_window_v + window, N * d, bf16);
            } else {
                load(row, token_k, d, bf16);
                load(value, token_v, d, bf16);
            }
            features(phi, row, s->map_k, g, s);
            float weight = 1, fading = s->log_decay ? expf(s->log_decay[g]) : 1;
            if (s->key_weight)
                weight = expf(clamp(scale * dot(s->key_weight + g * d, row, d) + s->key_bias[g], s->key_limit));
            for (int r = 0; r < M; r++) {
                const float p = phi[r] * weight, *from = state + (long)r * (d + 1);
                float *to = next + (long)r * (d + 1);
                for (int j = 0; j < d; j++) to[j] = fading * from[j] + p * value[j];
                to[d] = fading * from[d] + p;
            }
            for (int h = g * R; h < (g + 1) * R; h++) {
                load(row, s->q.x + b * s->q.steps[0] + h * s->q.steps[2], d, bf16);
                features(phi, row, s->map_q, h, s);
                float total = 0, *result = s->o + ((long)b * H + h) * d;
                memset(numerator, 0, sizeof(numerator));
                for (int r = 0; r < M; r++) {
                    const float *from = next + (long)r * (d + 1);
                    for (int j = 0; j < d; j++) numerator[j] += phi[r] * from[j];
                    total += phi[r] * from[d];
                }
                total = total < 1e-30f ? 1e-30f : total;
                if (!W) {
                    for (int j = 0; j < d; j++) result[j] = numerator[j] / total;
                    continue;
                }
                for (int n = 0; n < N; n++) scores[n] = scaling * dot(window_k + n * d, row, d);
                /* the linear branch is one more key of the softmax */
                scores[N] = logf(total) + scale * dot(s->branch_weight + h * d, row, d) + s->branch_bias[h];
                softmax(scores, N + 1);
                const float share = scores[N] / total;
                for (int j = 0; j < d; j++) result[j] = share * numerator[j];
                for (int n = 0; n < N; n++)
                    for (int j = 0; j < d; j++) result[j] += scores[n] * window_v[n * d + j];
            }
        }
}
"""
