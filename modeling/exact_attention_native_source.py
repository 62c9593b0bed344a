"""The C source of exact_attention_native.py, in a Python file because transformers copies no other files with a model."""

from .native_vectors_source import VECTORS

SOURCE = (
    VECTORS
    + r"""
/* One tile of a product is ROWS x VECS vectors in registers; its queries, or numbers of a value, are TILE. */
#ifdef __aarch64__
enum { ROWS = 6, VECS = 4 };
#else
enum { ROWS = 6, VECS = 2 };
#endif
enum { TILE = WIDTH * VECS };
static const float HIDDEN = -1e30f, TINY = 1e-30f;

enum { PASS, ATTEND, RECEIVE }; /* kinds of calls: the memory, attention, the weights that the window's rows receive */

struct call {
    struct input q, k, v, sink_k, sink_v; /* k, v: (B, W + T, G, d), the window before the first query and its tokens */
    const uint8_t *valid;                 /* (B, W + T), or NULL */
    const int64_t *arrival;               /* (B, S), or NULL */
    /* the memory's slots before, those of one head after another; scores and ranks of the tokens that leave the window */
    const char *memory_k, *memory_v;
    const float *memory_score, *score;
    const int32_t *memory_rank;
    const int64_t *rank;
    /* the plan. Candidates of a head are its slots, then the leaving tokens. holders: (B, N, slots), those that are held when
       each block begins, -1 after the last. left_slot: (B, slots), left: (B, G, T), the query that drove each one out */
    int32_t *holders, *left_slot, *left;
    /* what the memory holds and has lost afterwards; there: (B, T, G), whether a query drove out any */
    char *new_k, *new_v, *lost_k, *lost_v;
    float *new_score;
    int32_t *new_rank;
    int64_t *lost_rank;
    uint8_t *there;
    /* the linear branch: sums of weights (B, T, H); factors of its log-scale (H, d) and (H) */
    const float *total, *branch_weight, *branch_bias;
    float *o;        /* (B, T, H, d), the numerator of the linear branch, replaced by the output */
    float *received; /* (B, G, N, W + BLOCK), the weights that rows of each block's window receive */
    const long *first; /* (G + 1), the first slot of each head */
    float scale, branch_factor;
    long B, T, H, G, d, W, S, bf16, kind, tasks, next;
};

/* the held tokens of one head, the weakest first: a heap */
struct holder { float score; long age; int32_t id; };

INLINE int weaker(const struct holder *a, const struct holder *b)
{
    return a->score < b->score || (a->score == b->score && a->age > b->age); /* of equal ones the older wins */
}

static void sink_down(struct holder *heap, long n, long i)
{
    const struct holder moved = heap[i];
    for (long child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && weaker(heap + child + 1, heap + child))
            child++;
        if (!weaker(heap + child, &moved))
            break;
        heap[i] = heap[child];
    }
    heap[i] = moved;
}

static void rise(struct holder *heap, long i)
{
    const struct holder moved = heap[i];
    for (; i && weaker(&moved, heap + (i - 1) / 2); i = (i - 1) / 2)
        heap[i] = heap[(i - 1) / 2];
    heap[i] = moved;
}

INLINE const char *row_of(struct input x, long b, long t, long head)
{
    return x.x + b * x.steps[0] + t * x.steps[1] + head * x.steps[2];
}

/* The memory of one (b, g) pair: who holds a slot when each block begins, whom each token that leaves the window drives out,
   and what is held after the last */
static int pass_memory(const struct call *c, long pair)
{
    const long b = pair / c->G, g = pair % c->G, T = c->T, all = c->first[c->G], M = c->first[g + 1] - c->first[g];
    const long own = b * all + c->first[g], bytes = c->d * (c->bf16 ? 2 : 4);
    const float *score = c->score + pair * T;
    int32_t *left = c->left + pair * T, *left_slot = c->left_slot + own;
    struct holder *heap = malloc((M + 1) * sizeof(*heap));
    if (!heap)
        return 1;
    long n = 0;
    for (long m = 0; m < M; m++) {
        left_slot[m] = T;
        if (c->memory_rank[own + m] >= 0)
            heap[n++] = (struct holder){c->memory_score[own + m], c->memory_rank[own + m], m};
    }
    for (long i = n / 2; i-- > 0;)
        sink_down(heap, n, i);
    for (long t = 0; t < T; t++) {
        if (t % BLOCK == 0) {
            int32_t *holders = c->holders + (b * ((T + BLOCK - 1) / BLOCK) + t / BLOCK) * all + c->first[g];
            for (long m = 0; m < M; m++)
                holders[m] = m < n ? heap[m].id : -1;
        }
        const struct holder newcomer = {score[t], (1L << 40) + t, M + t};
        long out = -1;
        left[t] = T;
        if (!(newcomer.score > -INFINITY)) { /* does not compete */
            left[t] = t;
        } else if (n < M) {
            heap[n] = newcomer;
            rise(heap, n++);
        } else if (M && newcomer.score > heap->score) {
            out = heap->id;
            *(out < M ? left_slot + out : left + out - M) = t;
            heap[0] = newcomer;
            sink_down(heap, n, 0);
        } else {
            out = M + t;
            left[t] = t;
        }
        const long at = (b * T + t) * c->G + g;
        const char *k = out < M ? c->memory_k + (own + out) * bytes : row_of(c->k, b, out - M, g);
        const char *v = out < M ? c->memory_v + (own + out) * bytes : row_of(c->v, b, out - M, g);
        c->there[at] = out >= 0;
        c->lost_rank[at] = out < 0 ? -1 : out < M ? c->memory_rank[own + out] : c->rank[b * T + out - M];
        if (out < 0) {
            memset(c->lost_k + at * bytes, 0, bytes);
            memset(c->lost_v + at * bytes, 0, bytes);
            continue;
        }
        memcpy(c->lost_k + at * bytes, k, bytes);
        memcpy(c->lost_v + at * bytes, v, bytes);
    }
    for (long m = 0; m < M; m++) {
        const long to = own + m, id = m < n ? heap[m].id : -1;
        c->new_score[to] = id < 0 ? -INFINITY : heap[m].score;
        c->new_rank[to] = id < 0 ? -1 : id < M ? c->memory_rank[own + id] : (int32_t)c->rank[b * T + id - M];
        if (id < 0) {
            memset(c->new_k + to * bytes, 0, bytes);
            memset(c->new_v + to * bytes, 0, bytes);
            continue;
        }
        memcpy(c->new_k + to * bytes, id < M ? c->memory_k + (own + id) * bytes : row_of(c->k, b, id - M, g), bytes);
        memcpy(c->new_v + to * bytes, id < M ? c->memory_v + (own + id) * bytes : row_of(c->v, b, id - M, g), bytes);
    }
    free(heap);
    return 0;
}

/* The keys that a block of queries sees, in groups of ROWS. Queries `from` .. `until` - 1 of the block see a key. */
struct block {
    float *keys;    /* (most, d) */
    float *values;  /* (d / TILE, most, TILE) */
    float *queries; /* (BLOCK / TILE, d, TILE) of one head, scaled */
    float *weights; /* (most, TILE) of the groups in `seen`, which some query of the tile sees */
    int32_t *from, *until, *row, *seen;
    long count, most;
};

INLINE long smaller(long a, long b) { return a < b ? a : b; }

static void add_key(const struct call *c, struct block *s, const char *k, const char *v, long from, long until, long row)
{
    if (from >= until)
        return;
    const long i = s->count++;
    s->from[i] = from;
    s->until[i] = until;
    s->row[i] = row;
    for (long j = 0; j < c->d; j += WIDTH)
        V(s->keys + i * c->d + j) = k ? load(k, j, c->bf16) : ZERO;
    for (long j = 0; j < c->d && c->kind == ATTEND; j += WIDTH)
        V(s->values + (j / TILE * s->most + i) * TILE + j % TILE) = v ? load(v, j, c->bf16) : ZERO;
}

/* all keys of the block of queries from t on, those that all of its queries see first */
static void gather_keys(const struct call *c, struct block *s, long b, long g, long t)
{
    const long T = c->T, W = c->W, pair = b * c->G + g, end = smaller(t + BLOCK, T);
    const int32_t *left = c->left ? c->left + pair * T : NULL;
    s->count = 0;
    for (long i = 0; i < c->S; i++) {
        const long from = c->arrival ? c->arrival[b * c->S + i] - t : 0;
        add_key(c, s, row_of(c->sink_k, b, i, g), row_of(c->sink_v, b, i, g), from < 0 ? 0 : from, BLOCK, -1);
    }
    if (left) {
        const long all = c->first[c->G], M = c->first[g + 1] - c->first[g], own = b * all + c->first[g];
        const long bytes = c->d * (c->bf16 ? 2 : 4);
        const int32_t *holders = c->holders + (b * ((T + BLOCK - 1) / BLOCK) + t / BLOCK) * all + c->first[g];
        for (long m = 0; m < M && holders[m] >= 0; m++) {
            const long id = holders[m], gone = id < M ? c->left_slot[own + id] : left[id - M];
            const char *k = id < M ? c->memory_k + (own + id) * bytes : row_of(c->k, b, id - M, g);
            const char *v = id < M ? c->memory_v + (own + id) * bytes : row_of(c->v, b, id - M, g);
            add_key(c, s, k, v, 0, smaller(gone - t, BLOCK), -1);
        }
    }
    /* row r leaves the window with query r; queries after that see it if it gets a slot. Those rows come first */
    for (int held = left ? 1 : 0; held >= 0; held--)
        for (long r = t + !left; r < end + W; r++) {
            const int has_slot = left && r < end && left[r] > r;
            if (has_slot != held || (r == t && !held) || (c->valid && !c->valid[b * (W + T) + r]))
                continue;
            const long until = has_slot ? left[r] : r, from = r - W - t;
            const char *k = row_of(c->k, b, r, g), *v = row_of(c->v, b, r, g);
            add_key(c, s, k, v, from < 0 ? 0 : from, smaller(until - t, BLOCK), r - t);
        }
    while (s->count % ROWS) { /* nobody sees these */
        add_key(c, s, NULL, NULL, 0, 1, -1);
        s->until[s->count - 1] = 0;
    }
}

/* the queries of one head as columns, scaled; 0 after the last */
static void load_queries(const struct call *c, struct block *s, long b, long h, long t)
{
    for (long i = 0; i < BLOCK; i += WIDTH)
        for (long j = 0; j < c->d; j += WIDTH) {
            vec rows[WIDTH];
#pragma GCC unroll 16
            for (int k = 0; k < WIDTH; k++)
                rows[k] = t + i + k < c->T ? load(row_of(c->q, b, t + i + k, h), j, c->bf16) * c->scale : ZERO;
            transpose(rows);
#pragma GCC unroll 16
            for (int k = 0; k < WIDTH; k++)
                V(s->queries + (i / TILE * c->d + j + k) * TILE + i % TILE) = rows[k];
        }
}

/* sums[r][:] += sum_p a[r * row + p * step] * b[p * TILE + :] */
INLINE void multiply(vec (*sums)[VECS], int rows, const float *a, long row, long step, const float *b, long n)
{
    for (long p = 0; p < n; p++, a += step, b += TILE) {
        vec x[VECS];
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++)
            x[v] = V(b + WIDTH * v);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < VECS; v++)
                sums[r][v] += a[r * row] * x[v];
    }
}

/* Scores of the queries from `start` on and the groups of keys that any of them sees, whose number it returns; queries are in
   the lanes, `top` gets their highest. */
static long score_tile(const struct call *c, struct block *s, long start, vec *top)
{
    const float *queries = s->queries + start * c->d;
    const long end = start + TILE;
    long seen = 0;
    for (long i = 0; i < s->count; i += ROWS) {
        int any = 0, all = 1;
        for (int r = 0; r < ROWS; r++) {
            any |= s->from[i + r] < end && s->until[i + r] > start;
            all &= s->from[i + r] <= start && s->until[i + r] >= end;
        }
        if (!any)
            continue;
        vec sums[ROWS][VECS] = {0};
        float *weights = s->weights + seen * ROWS * TILE;
        multiply(sums, ROWS, s->keys + i * c->d, c->d, 1, queries, c->d);
        if (!all) {
            ints lane;
            for (int k = 0; k < WIDTH; k++)
                lane[k] = start + k;
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECS; v++) {
                    const ints query = lane + WIDTH * v;
                    sums[r][v] = choose((query >= s->from[i + r]) & (query < s->until[i + r]), sums[r][v], ZERO + HIDDEN);
                }
        }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECS; v++) {
                top[v] = at_least(top[v], sums[r][v]);
                V(weights + r * TILE + WIDTH * v) = sums[r][v];
            }
        s->seen[seen++] = i;
    }
    return seen;
}

/* scores to exp(score - top), and their sums */
static void weigh(struct block *s, long seen, const vec *top, vec *sum)
{
    for (long i = 0; i < seen * ROWS; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) {
            const vec x = exponential(V(s->weights + i * TILE + WIDTH * v) - top[v]);
            sum[v] += x;
            V(s->weights + i * TILE + WIDTH * v) = x;
        }
}

/* outputs of `rows` queries from `first` of the tile on, of which `there` exist:
   o = o * share + inverse * sum weights values */
INLINE void mix(const struct call *c, const struct block *s, long seen, float *o, const float *share, const float *inverse,
                int first, int rows, long there)
{
    for (long at = 0; at < c->d; at += TILE) {
        vec sums[ROWS][VECS] = {0};
        const float *values = s->values + at * s->most;
        for (long i = 0; i < seen; i++)
            multiply(sums, rows, s->weights + i * ROWS * TILE + first, 1, TILE, values + s->seen[i] * TILE, ROWS);
        for (int r = 0; r < rows && first + r < there; r++)
            for (int v = 0; v < VECS && at + WIDTH * v < c->d; v++) {
                any_vec *to = (any_vec *)(o + (first + r) * c->H * c->d + at + WIDTH * v);
                *to = *to * share[first + r] + sums[r][v] * inverse[first + r];
            }
    }
}

/* TILE queries from `start` of the block on */
static void attend_tile(const struct call *c, struct block *s, long b, long h, long t, long start)
{
    const float *queries = s->queries + start * c->d;
    const long at = (b * c->T + t + start) * c->H + h, there = c->T - t - start;
    float share[TILE], inverse[TILE];
    vec top[VECS], branch[VECS] = {0}, total[VECS], sum[VECS];
    /* the linear branch is one more key, of score c + log total */
    for (long j = 0; j < c->d; j++)
        for (int v = 0; v < VECS; v++)
            branch[v] += V(queries + j * TILE + WIDTH * v) * c->branch_weight[h * c->d + j];
    for (int i = 0; i < TILE; i++) {
        const float x = i < there ? c->total[at + i * c->H] : 0.0f;
        total[i / WIDTH][i % WIDTH] = x > TINY ? x : TINY;
        const float score = branch[i / WIDTH][i % WIDTH] * c->branch_factor + c->branch_bias[h];
        branch[i / WIDTH][i % WIDTH] = x > TINY ? logf(x) + score : HIDDEN;
    }
    memcpy(top, branch, sizeof(top));
    const long seen = score_tile(c, s, start, top);
    for (int v = 0; v < VECS; v++)
        sum[v] = branch[v] = exponential(branch[v] - top[v]);
    weigh(s, seen, top, sum);
    for (int v = 0; v < VECS; v++) {
        V(inverse + WIDTH * v) = 1.0f / sum[v];
        V(share + WIDTH * v) = branch[v] / (sum[v] * total[v]);
    }
    float *o = c->o + at * c->d;
    for (int first = 0; first + ROWS <= TILE; first += ROWS)
        mix(c, s, seen, o, share, inverse, first, ROWS, there);
    if (TILE % ROWS)
        mix(c, s, seen, o, share, inverse, TILE - TILE % ROWS, TILE % ROWS, there);
}

/* adds the weights of TILE queries on window and sinks to the rows of the window that receive them */
static void receive_tile(const struct call *c, struct block *s, long b, long t, long start, float *received)
{
    vec top[VECS], sum[VECS] = {0};
    for (int v = 0; v < VECS; v++)
        top[v] = ZERO + HIDDEN;
    const long seen = score_tile(c, s, start, top);
    weigh(s, seen, top, sum);
    for (int i = 0; i < TILE; i++) {
        const long query = t + start + i;
        const int real = query < c->T && (!c->valid || c->valid[b * (c->W + c->T) + c->W + query]);
        sum[i / WIDTH][i % WIDTH] = real ? 1.0f / sum[i / WIDTH][i % WIDTH] : 0.0f;
    }
    for (long i = 0; i < seen * ROWS; i++) {
        const long key = s->seen[i / ROWS] + i % ROWS;
        vec given = ZERO;
        for (int v = 0; v < VECS; v++)
            given += V(s->weights + i * TILE + WIDTH * v) * sum[v];
        if (s->row[key] >= 0 && s->from[key] < s->until[key])
            received[s->row[key]] += sum_lanes(given);
    }
}

static void attend_block(const struct call *c, struct block *s, long task)
{
    const long N = (c->T + BLOCK - 1) / BLOCK, pair = task / N, t = task % N * BLOCK, R = c->H / c->G;
    const long b = pair / c->G, g = pair % c->G;
    gather_keys(c, s, b, g, t);
    for (long h = g * R; h < (g + 1) * R; h++) {
        load_queries(c, s, b, h, t);
        for (long start = 0; start < BLOCK && t + start < c->T; start += TILE)
            if (c->kind == ATTEND)
                attend_tile(c, s, b, h, t, start);
            else
                receive_tile(c, s, b, t, start, c->received + task * (c->W + BLOCK));
    }
}

int dijiang_work(struct call *c)
{
    struct block s = {0};
    int failed = 0;
    char *scratch = NULL;
    if (c->kind != PASS) {
        long M = 0;
        for (long g = 0; c->left && g < c->G; g++)
            M = c->first[g + 1] - c->first[g] > M ? c->first[g + 1] - c->first[g] : M;
        s.most = (c->S + M + c->W + BLOCK + ROWS) / ROWS * ROWS;
        const long d = c->d, panels = (d + TILE - 1) / TILE * TILE;
        const long floats = s.most * d + s.most * panels + BLOCK * d + s.most * TILE;
        if (posix_memalign((void **)&scratch, 64, floats * 4 + s.most * 4 * 4))
            return 1;
        memset(scratch, 0, floats * 4); /* values are narrower than their last panel */
        s.values = (float *)scratch;
        s.weights = s.values + s.most * panels;
        s.queries = s.weights + s.most * TILE;
        s.keys = s.queries + BLOCK * d;
        s.from = (int32_t *)(s.keys + s.most * d);
        s.until = s.from + s.most;
        s.row = s.until + s.most;
        s.seen = s.row + s.most;
    }
    const unsigned mode = c->kind == PASS ? 0 : flush_tiny();
    for (long i; (i = __atomic_fetch_add(&c->next, 1, __ATOMIC_RELAXED)) < c->tasks;)
        if (c->kind == PASS)
            failed |= pass_memory(c, i);
        else
            attend_block(c, &s, i);
    if (c->kind != PASS)
        restore_tiny(mode);
    free(scratch);
    return failed;
}
"""
)
