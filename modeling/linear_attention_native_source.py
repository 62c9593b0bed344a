"""The C source of linear_attention_native.py, in a Python file because transformers copies no other files with a model."""

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __SSE__
#include <xmmintrin.h>
#endif

/* Vectors of the processor's own size: wider ones compile too, into code that is several times slower. One tile of a product
   is ROWS x VECS of them in registers: 16 sums of AVX-512's and NEON's 32 registers, 8 of the 16 of others. */
#ifdef __AVX512F__
enum { WIDTH = 16, ROWS = 4, VECS = 4 };
#elif defined(__AVX__)
enum { WIDTH = 8, ROWS = 4, VECS = 2 };
#elif defined(__aarch64__)
enum { WIDTH = 4, ROWS = 4, VECS = 4 };
#else
enum { WIDTH = 4, ROWS = 4, VECS = 2 };
#endif
enum { BLOCK = 64, LANES = BLOCK / WIDTH }; /* tokens per block, and vectors that hold one number of each */

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t bits __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));
typedef vec any_vec __attribute__((aligned(4), may_alias));
typedef halves any_halves __attribute__((aligned(2), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define ZERO ((vec){0})
#define V(p) (*(any_vec *)(p))

struct input {
    const char *x; /* float32 or bfloat16 */
    long steps[3]; /* over B, T and heads, in bytes */
};

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

INLINE vec load(const char *row, long at, int bf16)
{
    if (!bf16)
        return V((const float *)row + at);
    return (vec)(__builtin_convertvector(*(any_halves *)((const uint16_t *)row + at), bits) << 16);
}

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

INLINE void store(void *x, long at, vec value, int bf16)
{
    if (!bf16) {
        V((float *)x + at) = value;
        return;
    }
    bits b = (bits)value;
    b += 0x7fff + (b >> 16 & 1); /* round to nearest, ties to even */
    *(any_halves *)((uint16_t *)x + at) = __builtin_convertvector(b >> 16, halves);
}

/* a where `mask`, else b. Comparisons with NaN are false. */
INLINE vec choose(ints mask, vec a, vec b)
{
    return (vec)((mask & (ints)a) | (~mask & (ints)b));
}

INLINE vec at_least(vec x, vec low) { return choose(x < low, low, x); }

INLINE vec at_most(vec x, vec high) { return choose(x > high, high, x); }

/* exp(x), relative error below 2e-7; x at most 88. Below -87 it stays at 1e-38, NaN stays NaN. */
INLINE vec exponential(vec x)
{
    x = at_least(x, ZERO - 87.0f);
    vec shifted = x * 0x1.715476p+0f + 0x1.8p+23f; /* rounds: the low bits are now the integer n, x = n log 2 + r */
    vec n = shifted - 0x1.8p+23f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f; /* log 2 in two parts, the first exact times n */
    vec p = 0.008312503336352882f * r + 0.04189033460940764f;
    p = p * r + 0.16667115375946315f;
    p = p * r + 0.49999230280142115f;
    p = p * (r * r) + r + 1.0f;
    return (vec)((ints)p + ((ints)shifted << 23)); /* times 2^n */
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

#if defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 12)
#define ZIP(to, a, b)                                                                                            \
    to[0] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);               \
    to[1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#define ZIPS(to, from) _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) { ZIP((to + 2 * i), from[i], from[i + 8]) }
#endif

/* rows of a block as columns, out (d, BLOCK), 0 after the last: with tokens in the lanes softmax needs no sums across lanes */
static void load_columns(float *out, struct rows x)
{
    for (long t = 0; t < BLOCK; t += WIDTH)
        for (long c = 0; c < x.width; c += WIDTH) {
            vec rows[WIDTH];
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++)
                rows[i] = t + i < x.n ? load(x.x + (t + i) * x.step, c, x.bf16) : ZERO;
#ifdef ZIPS
            vec other[WIDTH];
#pragma GCC unroll 2
            for (int round = 0; round < 2; round++) { /* interleaving the halves log2(16) times transposes */
                ZIPS(other, rows)
                ZIPS(rows, other)
            }
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++)
                V(out + (c + i) * BLOCK + t) = rows[i];
#else
            for (int i = 0; i < WIDTH; i++)
                for (int k = 0; k < WIDTH; k++)
                    out[(c + k) * BLOCK + t + i] = rows[i][k];
#endif
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
        float *row = phi_k + m * BLOCK, s = 0.0f;
        if (c->log_decay) { /* from the token to the end of the block */
            for (long i = 0; i < BLOCK; i++)
                row[i] *= decay[n - 1 - i];
        }
        vec sum = ZERO;
        for (int w = 0; w < LANES; w++)
            sum += V(row + WIDTH * w);
        for (int i = 0; i < WIDTH; i++)
            s += sum[i];
        key_sum[m] = key_sum[m] * decay[n] + s;
    }
    for (long m = 0; m < M; m += ROWS) {
        fetch(values, m, M);
        WIDTHS(remember, 0, e, S, phi_k, v, e, decay[n], m)
    }
}

/* works on tasks until none is left, in any number of threads at once. Returns nonzero if memory ran out */
int dijiang_work(struct call *c)
{
    const long M = c->M, d = c->d, e = c->e, T = c->T;
    const long own = 3 * BLOCK + M * e + M, shared = (d + 2 * M + BLOCK + e) * BLOCK; /* numbers, both multiples of 16 */
    float *scratch;
    if (posix_memalign((void **)&scratch, 64, (shared + c->most * own) * sizeof(float)))
        return 1;
#ifdef MADV_HUGEPAGE /* a large output is new memory; its pages of 4 KB take longer to map than to fill */
    const uintptr_t page = 2 << 20, from = ((uintptr_t)c->o + page - 1) & -page;
    const uintptr_t to = ((uintptr_t)c->o + c->B * T * c->H * e * (c->bf16 && c->normalize ? 2 : 4)) & -page;
    if (to > from)
        madvise((void *)from, to - from, MADV_HUGEPAGE);
#endif
#ifdef __SSE__
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040); /* tiny weights become 0: numbers below 1e-38 cost a hundred cycles each */
#endif
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
#ifdef __SSE__
    _mm_setcsr(mode);
#endif
    free(scratch);
    return 0;
}

/* dijiang_work on this number of threads: torch's own if both use one OpenMP library, else they would wait for each other.
   Returns 2 if there is no OpenMP */
int dijiang_run(struct call *c, int threads)
{
#ifdef _OPENMP
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    failed |= dijiang_work(c);
    return failed;
#else
    return 2;
#endif
}
"""
