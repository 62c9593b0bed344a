"""The C source of linear_attention_native.py, in a Python file because transformers copies no other files with a model."""

from .native_vectors_source import VECTORS

SOURCE = (
    VECTORS
    + r"""
/* One tile of a product is ROWS x VECS vectors in registers: 16 sums of AVX-512's and NEON's 32 registers, 8 of the 16 of
   others. */
#if defined(__AVX512F__) || defined(__aarch64__)
enum { ROWS = 4, VECS = 4 };
#else
enum { ROWS = 4, VECS = 2 };
#endif

struct call {
    struct input q, k, v;
    const float *W_q, *b_q, *W_k, *b_k, *key_weight, *log_decay, *state;
    void *o;
    float *total, *new_state;
    long B, T, H, G, M, d, e, bf16, softmax, sums, normalize;
    long tasks, most;  /* number of tasks, and the most pairs of one of them */
    const long *table; /* per task its first (b, g) pair, the end of its pairs, its first token, the end of its tokens */
    long next;         /* the next task */
};

/* rows of one head, `step` bytes apart */
struct rows { const char *x; long step, n, width; int bf16; };

INLINE struct rows rows_of(struct input from, long b, long t, long head, long n, long width, int bf16)
{
    return (struct rows){from.x + b * from.steps[0] + t * from.steps[1] + head * from.steps[2], from.steps[1], n, width, bf16};
}

/* Prefetches the share of m .. m + ROWS of M of the next block: rows are too far apart for the processor to predict them, and
   it can wait for no more than a dozen cache lines at once. */
INLINE void fetch(struct rows r, long m, long M)
{
    for (long i = m * BLOCK / M; i < (m + ROWS) * BLOCK / M; i++)
        for (long byte = 0; byte < r.width * (r.bf16 ? 2 : 4); byte += 64)
            __builtin_prefetch(r.x + (BLOCK + i) * r.step + byte, 0, 2);
}

/* c[r][:] += sum_p a[r * row + p * step] * b[p * b_step + :] */
INLINE void multiply(vec (*c)[VECS], int vecs, const float *a, long row, long step, const float *b, long b_step, long n)
{
    for (long p = 0; p < n; p++, a += step, b += b_step) {
        vec x[VECS];
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++)
            x[v] = V(b + WIDTH * v);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vecs; v++)
                c[r][v] += a[r * row] * x[v];
    }
}

/* f(..., at, vecs) along a row of tiles, the width in vectors a constant in each call, so that f's loops unroll */
#define WIDTHS(f, from, to, ...)                                   \
    for (long at = from; at < (to); at += WIDTH * VECS)            \
        switch (((to) - at) / WIDTH) {                             \
        case 1: f(__VA_ARGS__, at, 1); break;                      \
        case 2: f(__VA_ARGS__, at, 2 < VECS ? 2 : VECS); break;    \
        case 3: f(__VA_ARGS__, at, 3 < VECS ? 3 : VECS); break;    \
        default: f(__VA_ARGS__, at, VECS);                         \
        }

/* rows of a block as columns, out (d, BLOCK), 0 after the last: with tokens in the lanes softmax needs no sums across lanes */
static void load_columns(float *out, struct rows x)
{
    for (long t = 0; t < BLOCK; t += WIDTH)
        for (long c = 0; c < x.width; c += WIDTH) {
            vec rows[WIDTH];
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++)
                rows[i] = t + i < x.n ? load(x.x + (t + i) * x.step, c, x.bf16) : ZERO;
            transpose(rows);
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++)
                V(out + (c + i) * BLOCK + t) = rows[i];
        }
}

/* z = W x + b, tokens in the lanes, and the largest of each token */
INLINE void project(float *z, const float *x, const float *W, const float *b, long d, vec *peak, long m, long at, int vecs)
{
    vec c[ROWS][VECS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < vecs; v++)
            c[r][v] = ZERO + b[m + r];
    multiply(c, vecs, W + m * d, d, 1, x + at, BLOCK, d);
    for (int v = 0; v < vecs; v++)
        for (int r = 0; r < ROWS; r++) {
            V(z + (m + r) * BLOCK + at + WIDTH * v) = c[r][v];
            vec *top = peak + at / WIDTH + v;
            *top = at_least(*top, c[r][v]);
        }
}

/* phi (M, BLOCK) of `rows`, whose successors it fetches; x (d, BLOCK) is its workspace */
static void features(float *phi, float *x, struct rows rows, const float *W, const float *b, long M, int softmax,
                     const float *weight)
{
    const long d = rows.width;
    load_columns(x, rows);
    vec peak[LANES], sum[LANES] = {0};
    for (int v = 0; v < LANES; v++)
        peak[v] = ZERO - INFINITY;
    for (long m = 0; m < M; m += ROWS) {
        fetch(rows, m, M);
        WIDTHS(project, 0, BLOCK, phi, x, W, b, d, peak, m)
    }
    for (long m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int v = 0; v < LANES; v++) {
            vec z = V(phi + m * BLOCK + WIDTH * v);
            if (softmax)
                z -= peak[v];
            else
                z = at_most(at_least(z, ZERO - 20.0f), ZERO + 20.0f);
            z = exponential(z);
            sum[v] += z;
            V(phi + m * BLOCK + WIDTH * v) = z;
        }
    for (int v = 0; v < LANES; v++) {
        sum[v] = softmax ? 1.0f / sum[v] : ZERO + 1.0f / sqrtf(M);
        if (weight)
            sum[v] *= V(weight + WIDTH * v);
    }
    for (long m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int v = 0; v < LANES; v++)
            V(phi + m * BLOCK + WIDTH * v) *= sum[v];
}

/* a[j][i] = decay[i - j] phi(k_j).phi(q_i), queries in the lanes; total sums over the keys */
INLINE void score(float *a, const float *phi_k, const float *phi_q, long M, const float *decay, vec *total, long j, long at,
                  int vecs)
{
    vec c[ROWS][VECS] = {0};
    multiply(c, vecs, phi_k + j, 1, BLOCK, phi_q + at, BLOCK, M);
    for (int v = 0; v < vecs; v++)
        for (int r = 0; r < ROWS; r++) {
            c[r][v] *= V(decay + at + WIDTH * v - j - r);
            V(a + (j + r) * BLOCK + at + WIDTH * v) = c[r][v];
            total[at / WIDTH + v] += c[r][v];
        }
}

struct place { void *o; long at, step, rows; int bf16; }; /* of a block of outputs */

/* numerators of queries i .. i + ROWS: of the state first, which decays on the way, then of the keys up to theirs */
INLINE void output(struct place to, const float *a, const float *v, const float *phi_q, const float *S, long M, long e,
                   const float *decay, const float *scale, long i, long at, int vecs)
{
    vec c[ROWS][VECS] = {0};
    multiply(c, vecs, phi_q + i, 1, BLOCK, S + at, e, M);
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < vecs; w++)
            c[r][w] *= decay[i + r + 1];
    multiply(c, vecs, a + i, 1, BLOCK, v + at, e, i + ROWS);
    for (int r = 0; r < ROWS && i + r < to.rows; r++)
        for (int w = 0; w < vecs; w++)
            store(to.o, to.at + (i + r) * to.step + at + WIDTH * w, c[r][w] * scale[i + r], to.bf16);
}

/* S = fade S + phi_k v */
INLINE void remember(float *S, const float *phi_k, const float *v, long e, float fade, long m, long at, int vecs)
{
    vec c[ROWS][VECS];
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < vecs; w++)
            c[r][w] = V(S + (m + r) * e + at + WIDTH * w) * fade;
    multiply(c, vecs, phi_k + m * BLOCK, BLOCK, 1, v + at, e, BLOCK);
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < vecs; w++)
            V(S + (m + r) * e + at + WIDTH * w) = c[r][w];
}

/* the memory of one (b, g) pair from block to block */
struct memory {
    float decay[3 * BLOCK]; /* [BLOCK + i] over a distance of i tokens: 0 for later tokens, which is the causal mask */
    float S[];              /* (M, e), then key_sum (M) */
};

static void start_pair(const struct call *c, struct memory *memory, long pair)
{
    const long M = c->M, e = c->e, columns = e + c->sums;
    const float *old = c->state + pair * M * columns, g = c->log_decay ? c->log_decay[pair % c->G] : 0.0f;
    for (long i = -BLOCK; i < 2 * BLOCK; i++)
        memory->decay[BLOCK + i] = i < 0 ? 0.0f : expf(g * i);
    for (long m = 0; m < M; m++) {
        memcpy(memory->S + m * e, old + m * columns, e * sizeof(float));
        memory->S[M * e + m] = c->sums ? old[m * columns + e] : 0.0f;
    }
}

static void end_pair(const struct call *c, const struct memory *memory, long pair)
{
    const long M = c->M, e = c->e, columns = e + c->sums;
    float *new = c->new_state + pair * M * columns;
    for (long m = 0; m < M; m++) {
        memcpy(new + m * columns, memory->S + m * e, e * sizeof(float));
        if (c->sums)
            new[m * columns + e] = memory->S[M * e + m];
    }
}

/* n tokens from t on of one pair: their outputs if `attended`, and what they add to the memory */
static void block(const struct call *c, float *scratch, struct memory *memory, long pair, long t, long n, int attended)
{
    const long M = c->M, d = c->d, e = c->e, R = c->H / c->G, b = pair / c->G, g = pair % c->G;
    float *x = scratch, *phi_q = x + d * BLOCK, *phi_k = phi_q + M * BLOCK, *a = phi_k + M * BLOCK, *v = a + BLOCK * BLOCK;
    float *S = memory->S, *key_sum = S + M * e, *decay = memory->decay + BLOCK, weight[BLOCK], scale[BLOCK];
    for (long i = 0; i < BLOCK; i++)
        weight[i] = i >= n ? 0.0f : c->key_weight ? c->key_weight[(b * c->T + t + i) * c->G + g] : 1.0f;
    features(phi_k, x, rows_of(c->k, b, t, g, n, d, c->bf16), c->W_k + g * M * d, c->b_k + g * M, M, c->softmax, weight);
    const struct rows values = rows_of(c->v, b, t, g, n, e, c->bf16);
    for (long i = 0; i < BLOCK; i++)
        for (long j = 0; j < e; j += WIDTH)
            V(v + i * e + j) = i < n ? load(values.x + i * values.step, j, c->bf16) : ZERO;
    for (long h = g * R; attended && h < (g + 1) * R; h++) {
        vec total[LANES] = {0}, before[LANES] = {0};
        features(phi_q, x, rows_of(c->q, b, t, h, n, d, c->bf16), c->W_q + h * M * d, c->b_q + h * M, M, c->softmax, NULL);
        for (long j = 0; j < BLOCK; j += ROWS)
            WIDTHS(score, j & -WIDTH, BLOCK, a, phi_k, phi_q, M, decay, total, j)
        for (long m = 0; c->sums && m < M; m++)
#pragma GCC unroll 4
            for (int w = 0; w < LANES; w++)
                before[w] += V(phi_q + m * BLOCK + WIDTH * w) * key_sum[m];
        for (int w = 0; w < LANES; w++)
            total[w] += before[w] * V(decay + WIDTH * w + 1);
        for (long i = 0; i < BLOCK; i++) {
            float sum = total[i / WIDTH][i % WIDTH];
            scale[i] = c->normalize ? 1.0f / (sum < 1e-30f ? 1e-30f : sum) : 1.0f;
            if (c->total && i < n)
                c->total[(b * c->T + t + i) * c->H + h] = sum;
        }
        struct place to = {c->o, ((b * c->T + t) * c->H + h) * e, c->H * e, n, c->bf16 && c->normalize};
        for (long i = 0; i < BLOCK; i += ROWS)
            WIDTHS(output, 0, e, to, a, v, phi_q, S, M, e, decay, scale, i)
    }
    for (long m = 0; m < M; m++) {
        float *row = phi_k + m * BLOCK;
        if (c->log_decay) { /* from the token to the end of the block */
            for (long i = 0; i < BLOCK; i++)
                row[i] *= decay[n - 1 - i];
        }
        vec sum = ZERO;
        for (int w = 0; w < LANES; w++)
            sum += V(row + WIDTH * w);
        key_sum[m] = key_sum[m] * decay[n] + sum_lanes(sum);
    }
    for (long m = 0; m < M; m += ROWS) {
        fetch(values, m, M);
        WIDTHS(remember, 0, e, S, phi_k, v, e, decay[n], m)
    }
}

int dijiang_work(struct call *c)
{
    const long M = c->M, d = c->d, e = c->e, T = c->T;
    const long own = 3 * BLOCK + M * e + M, shared = (d + 2 * M + BLOCK + e) * BLOCK; /* numbers, both multiples of 16 */
    float *scratch;
    if (posix_memalign((void **)&scratch, 64, (shared + c->most * own) * sizeof(float)))
        return 1;
    use_large_pages(c->o, c->B * T * c->H * e * (c->bf16 && c->normalize ? 2 : 4));
    const unsigned mode = flush_tiny();
    for (long i; (i = __atomic_fetch_add(&c->next, 1, __ATOMIC_RELAXED)) < c->tasks;) {
        const long *task = c->table + 4 * i, first = task[0], pairs = task[1] - first, start = task[2], end = task[3];
#define MEMORY(p) ((struct memory *)(scratch + shared + (p) * own))
        for (long p = 0; p < pairs; p++)
            start_pair(c, MEMORY(p), first + p);
        /* heads inside, tokens outside: neighboring heads share pages, whose look-up costs as much as reading the data.
           Tokens before `start` enter the memory only */
        for (long t = 0; t < end; t += BLOCK)
            for (long p = 0; p < pairs; p++)
                block(c, scratch, MEMORY(p), first + p, t, end - t < BLOCK ? end - t : BLOCK, t >= start);
        for (long p = 0; p < pairs && end == T; p++)
            end_pair(c, MEMORY(p), first + p);
    }
    restore_tiny(mode);
    free(scratch);
    return 0;
}
"""
)
