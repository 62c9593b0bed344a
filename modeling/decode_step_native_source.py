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

/* the exact memory: slots of all heads, those of one head after another; `first` (G + 1) is where each head's begin */
struct memory {
    const char *k, *v;       /* (B, slots, d) */
    const float *score;      /* (B, slots) */
    const int32_t *rank;     /* (B, slots), negative for an empty slot */
    char *new_k, *new_v;
    float *new_score;
    int32_t *new_rank;
    const long *first;
    const int64_t *tokens;   /* (B), real tokens before this one */
    const float *leaving;    /* (B, G), scores of the tokens that leave the window; NULL: those in `window_score` */
    const float *window_score; /* (B, G, W), scores of the window's tokens so far */
    float *new_window_score;
    /* the network that scores a token on arrival: (G, width, 2 d), (G, width), (G, width), on `raw_k` and v; or NULL */
    const float *W_1, *b_1, *w_2;
    struct input raw_k;
    long width, receives;    /* receives: scores grow by the weights on window and sinks */
};

struct step {
    struct input q, k, v;
    struct map map_q, map_k;
    struct memory memory;
    const char *window_k, *window_v;
    char *new_window_k, *new_window_v;
    const float *state, *key_weight, *key_bias, *branch_weight, *branch_bias, *log_decay;
    float *new_state, *o;
    float feature_scale, scaling, limit, key_limit;
    long B, H, G, d, m, pairs, sinks, window, bf16, softmax, shared, most;
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

/* a row of n numbers as floats, in place or in `space` */
static const float *row_of(float *space, const char *from, int n, int bf16)
{
    if (!bf16)
        return (const float *)from;
    load(space, from, n, 1);
    return space;
}

/* a score to ten bits, as memory_scores.py rounds it; `volatile` keeps the compiler from seeing that nothing is left over */
static float rounded(float x)
{
    volatile float spread = x * 16385.0f, rest = spread - x;
    return spread - rest;
}

/* Of head (b, g): a token of that score leaves the window and competes for the slots; row_k and row_v are its bytes. Returns
   the slot whose token it drove out, -1 if it got none, -2 if it got an empty one. */
static long compete(const struct step *s, long b, long g, float score, const char *row_k, const char *row_v)
{
    const struct memory *m = &s->memory;
    const long all = m->first[s->G], M = m->first[g + 1] - m->first[g], own = b * all + m->first[g];
    const long row = s->d * (s->bf16 ? 2 : 4);
    memcpy(m->new_k + own * row, m->k + own * row, M * row);
    memcpy(m->new_v + own * row, m->v + own * row, M * row);
    memcpy(m->new_score + own, m->score + own, M * sizeof(float));
    memcpy(m->new_rank + own, m->rank + own, M * sizeof(int32_t));
    const float *scores = m->score + own;
    const int32_t *ranks = m->rank + own;
    long slot = 0;
    for (long i = 1; i < M; i++) /* the youngest of the weakest; any empty one */
        if (scores[i] < scores[slot] || (scores[i] == scores[slot] && ranks[i] > ranks[slot]))
            slot = i;
    if (!M || !(score > scores[slot]))
        return -1;
    memcpy(m->new_k + (own + slot) * row, row_k, row);
    memcpy(m->new_v + (own + slot) * row, row_v, row);
    m->new_score[own + slot] = score;
    m->new_rank[own + slot] = m->tokens[b] - s->window;
    return ranks[slot] < 0 ? -2 : slot;
}

/* the score of this token of head (b, g) on arrival: w_2 . gelu(W_1 [k, v] + b_1) */
static float arriving_score(const struct step *s, long b, long g)
{
    const struct memory *m = &s->memory;
    const long d = s->d, width = m->width;
    if (!m->W_1)
        return 0;
    float x[2 * d], score = 0;
    load(x, m->raw_k.x + b * m->raw_k.steps[0] + g * m->raw_k.steps[2], d, s->bf16);
    load(x + d, s->v.x + b * s->v.steps[0] + g * s->v.steps[2], d, s->bf16);
    for (long i = g * width; i < (g + 1) * width; i++) {
        const float z = dot(m->W_1 + i * 2 * d, x, 2 * d) + m->b_1[i];
        score += m->w_2[i] * z * 0.5f * (1 + erff(z * 0.70710678f));
    }
    return score;
}

/* Scores of the window's tokens of head (b, g) after this one came in, whose R queries have scores (R, most) */
static void score_window(const struct step *s, long b, long g, const float *scores)
{
    const long W = s->window, S = s->sinks, R = s->H / s->G, head = b * s->G + g;
    float *new = s->memory.new_window_score + head * W, weights[S + W];
    memcpy(new, s->memory.window_score + head * W + 1, (W - 1) * sizeof(float));
    new[W - 1] = arriving_score(s, b, g);
    for (long r = 0; s->memory.receives && r < R; r++) {
        memcpy(weights, scores + r * s->most, sizeof(weights));
        softmax(weights, S + W);
        for (long w = 0; w < W; w++) new[w] += weights[S + w];
    }
}

void dijiang_step(const struct step *s)
{
    const int H = s->H, G = s->G, d = s->d, S = s->sinks, W = s->window, bf16 = s->bf16;
    const int R = H / G, M = s->pairs ? 2 * s->m : s->m, N = S + W, most = s->most;
    const float scale = s->feature_scale, scaling = s->scaling;
    const long row_bytes = (long)d * (bf16 ? 2 : 4), slots = s->memory.first ? s->memory.first[G] : 0;
    float row[d], value[d], space[d], phi[M], numerator[d], scores[R * most], queries[R * d];
    for (int b = 0; b < s->B; b++)
        for (int g = 0; g < G; g++) {
            const long own = (long)b * G + g, window = own * N * row_bytes;
            const char *token_k = s->k.x + b * s->k.steps[0] + g * s->k.steps[2];
            const char *token_v = s->v.x + b * s->v.steps[0] + g * s->v.steps[2];
            const float *state = s->state + own * M * (d + 1);
            float *next = s->new_state + own * M * (d + 1);
            const char *lost_k = token_k, *lost_v = token_v;
            int lost = 1;
            if (W) { /* the oldest token of the window leaves it for the state */
                lost_k = s->window_k + window + S * row_bytes;
                lost_v = s->window_v + window + S * row_bytes;
                shift(s->new_window_k + window, s->window_k + window, token_k, S, W, row_bytes);
                shift(s->new_window_v + window, s->window_v + window, token_v, S, W, row_bytes);
            }
            /* or for the memory, which loses another one, or none */
            const long first = slots ? b * slots + s->memory.first[g] : 0;
            const int held = slots ? s->memory.first[g + 1] - s->memory.first[g] : 0;
            if (slots) {
                const float score = s->memory.leaving ? s->memory.leaving[own] : rounded(s->memory.window_score[own * W]);
                const long slot = compete(s, b, g, score, lost_k, lost_v);
                lost = slot > -2;
                if (slot >= 0) {
                    lost_k = s->memory.k + (first + slot) * row_bytes;
                    lost_v = s->memory.v + (first + slot) * row_bytes;
                }
            }
            if (lost) {
                load(row, lost_k, d, bf16);
                load(value, lost_v, d, bf16);
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
            } else {
                memcpy(next, state, M * (d + 1) * sizeof(float));
            }
            for (int r = 0; r < R; r++)
                load(queries + r * d, s->q.x + b * s->q.steps[0] + (g * R + r) * s->q.steps[2], d, bf16);
            int keys = 0;
            for (int n = 0; n < N; n++, keys++) {
                const float *key = row_of(space, s->new_window_k + window + n * row_bytes, d, bf16);
                for (int r = 0; r < R; r++) scores[r * most + keys] = scaling * dot(key, queries + r * d, d);
            }
            if (slots && !s->memory.leaving)
                score_window(s, b, g, scores);
            for (int n = 0; n < held; n++) {
                if (s->memory.new_rank[first + n] < 0)
                    continue;
                const float *key = row_of(space, s->memory.new_k + (first + n) * row_bytes, d, bf16);
                for (int r = 0; r < R; r++) scores[r * most + keys] = scaling * dot(key, queries + r * d, d);
                keys++;
            }
            float *results = s->o + own * R * d;
            for (int r = 0; r < R; r++) {
                const int h = g * R + r;
                const float *query = queries + r * d;
                features(phi, query, s->map_q, h, s);
                float total = 0, *result = results + r * d, *own_scores = scores + r * most;
                memset(numerator, 0, sizeof(numerator));
                for (int i = 0; i < M; i++) {
                    const float *from = next + (long)i * (d + 1);
                    for (int j = 0; j < d; j++) numerator[j] += phi[i] * from[j];
                    total += phi[i] * from[d];
                }
                total = total < 1e-30f ? 1e-30f : total;
                if (!W) {
                    for (int j = 0; j < d; j++) result[j] = numerator[j] / total;
                    continue;
                }
                /* the linear branch is one more key of the softmax */
                own_scores[keys] = logf(total) + scale * dot(s->branch_weight + h * d, query, d) + s->branch_bias[h];
                softmax(own_scores, keys + 1);
                const float share = own_scores[keys] / total;
                for (int j = 0; j < d; j++) result[j] = share * numerator[j];
            }
            keys = 0;
            for (int n = 0; n < N; n++, keys++) {
                const float *x = row_of(space, s->new_window_v + window + n * row_bytes, d, bf16);
                for (int r = 0; r < R; r++)
                    for (int j = 0; j < d; j++) results[r * d + j] += scores[r * most + keys] * x[j];
            }
            for (int n = 0; n < held; n++) {
                if (s->memory.new_rank[first + n] < 0)
                    continue;
                const float *x = row_of(space, s->memory.new_v + (first + n) * row_bytes, d, bf16);
                for (int r = 0; r < R; r++)
                    for (int j = 0; j < d; j++) results[r * d + j] += scores[r * most + keys] * x[j];
                keys++;
            }
        }
}
"""
