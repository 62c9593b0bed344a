r"""
Linear attention, feature map included, as one pass in C for CPUs. Torch's matrix products leave every intermediate tensor in
memory; here 64 tokens at a time stay in the processor's cache from the projection to the output. No gradients.

The source below is compiled at first use with the user's C compiler (`CC`, else cc, gcc or clang), kept on disk and called
through ctypes, which lets the threads run at once. DIJIANG_NATIVE=0 turns it off.

B batch, T tokens, H query heads, G key/value heads, R = H // G, M features, d head size, e value size.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

enum { BLOCK = 64, LANES = BLOCK / 16 };  /* tokens per block, and vectors of 16 that hold one number of each */

/* One tile of a product is ROWS x (16 * VECS) sums in registers: 16 of AVX-512's 32, the others can hold four such vectors. */
#ifdef __AVX512F__
enum { ROWS = 4, VECS = 4 };
#else
enum { ROWS = 4, VECS = 1 };
#endif

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));
typedef v16 any_v16 __attribute__((aligned(4), may_alias));
typedef h16 any_h16 __attribute__((aligned(2), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define ZERO ((v16){0})
#define V(p) (*(any_v16 *)(p))
#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (i16){__VA_ARGS__})
#endif

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
    long whole, pieces; /* (b, g) pairs that are one task each, and tasks for each pair after these */
    const long *ends;   /* where the pieces end */
    long next;          /* task to hand out */
};

INLINE v16 load(const char *row, long at, int bf16)
{
    if (!bf16)
        return V((const float *)row + at);
    return (v16)(__builtin_convertvector(*(any_h16 *)((const uint16_t *)row + at), u16) << 16);
}

/* rows of one head, `step` bytes apart */
struct rows { const char *x; long step, n, width; int bf16; };

INLINE struct rows rows_of(struct input from, long b, long t, long head, long n, long width, int bf16)
{
    return (struct rows){from.x + b * from.steps[0] + t * from.steps[1] + head * from.steps[2], from.steps[1], n, width, bf16};
}

/* row i of the next block on its way to the cache: rows lie too far apart for the processor to foresee them */
INLINE void fetch(struct rows r, long i)
{
    for (long byte = 0; byte < (r.width << (r.bf16 ? 1 : 2)); byte += 64)
        __builtin_prefetch(r.x + (BLOCK + i) * r.step + byte, 0, 2);
}

INLINE void store(void *x, long at, v16 value, int bf16)
{
    if (!bf16) {
        V((float *)x + at) = value;
        return;
    }
    u16 bits = (u16)value;
    bits += 0x7fff + (bits >> 16 & 1); /* round to nearest, ties to even */
    *(any_h16 *)((uint16_t *)x + at) = __builtin_convertvector(bits >> 16, h16);
}

/* a where `mask`, else b. Comparisons with NaN are false. */
INLINE v16 choose(i16 mask, v16 a, v16 b)
{
    return (v16)((mask & (i16)a) | (~mask & (i16)b));
}

INLINE v16 at_least(v16 x, v16 low) { return choose(x < low, low, x); }

INLINE v16 at_most(v16 x, v16 high) { return choose(x > high, high, x); }

/* exp(x), relative error below 2e-7; x at most 88. Below -87 it stays at 1e-38, NaN stays NaN. */
INLINE v16 exponential(v16 x)
{
    x = at_least(x, ZERO - 87.0f);
    v16 shifted = x * 0x1.715476p+0f + 0x1.8p+23f; /* rounds: the low bits are now the integer n, x = n log 2 + r */
    v16 n = shifted - 0x1.8p+23f;
    v16 r = x - n * 0.693359375f + n * 2.12194440e-4f; /* log 2 in two parts, the first exact times n */
    v16 p = 0.008312503336352882f * r + 0.04189033460940764f;
    p = p * r + 0.16667115375946315f;
    p = p * r + 0.49999230280142115f;
    p = p * (r * r) + r + 1.0f;
    return (v16)((i16)p + ((i16)shifted << 23)); /* times 2^n */
}

/* c[r][:] += sum_p a[r * row + p * step] * b[p * b_step + :] */
INLINE void multiply(v16 (*c)[VECS], int vecs, const float *a, long row, long step, const float *b, long b_step, long n)
{
    for (long p = 0; p < n; p++, a += step, b += b_step) {
        v16 x[VECS];
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++)
            x[v] = V(b + 16 * v);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vecs; v++)
                c[r][v] += a[r * row] * x[v];
    }
}

/* calls f(..., vecs) with a constant for each width that is left, so that the tile's loops unroll */
#define WIDTHS(f, from, to, ...)                                     \
    for (long at = from, left; (left = ((to)-at) / 16) > 0; at += 16 * (left < VECS ? left : VECS)) \
        switch (left < VECS ? left : VECS) {                         \
        case 1: f(__VA_ARGS__, at, 1); break;                        \
        case 2: f(__VA_ARGS__, at, 2 < VECS ? 2 : VECS); break;      \
        case 3: f(__VA_ARGS__, at, 3 < VECS ? 3 : VECS); break;      \
        default: f(__VA_ARGS__, at, VECS);                           \
        }

/* rows of a block as columns, out (d, BLOCK): with tokens in the lanes softmax needs no sums across lanes. 0 after n rows */
static void load_columns(float *out, struct rows x)
{
    for (long t = 0; t < BLOCK; t += 16)
        for (long c = 0; c < x.width; c += 16) {
            v16 rows[16], other[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                rows[i] = t + i < x.n ? load(x.x + (t + i) * x.step, c, x.bf16) : ZERO;
#pragma GCC unroll 2
            for (int round = 0; round < 2; round++) { /* interleaving the halves log2(16) times transposes */
#define ZIP(to, from)                                                                                      \
    _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) {                                                  \
        to[2 * i] = PICK(from[i], from[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);    \
        to[2 * i + 1] = PICK(from[i], from[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31); \
    }
                ZIP(other, rows)
                ZIP(rows, other)
            }
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                V(out + (c + i) * BLOCK + t) = rows[i];
        }
}

INLINE void project(float *z, const float *x, const float *W, const float *b, long d, v16 *peak, long m, long at, int vecs)
{
    v16 c[ROWS][VECS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < vecs; v++)
            c[r][v] = ZERO + b[m + r];
    multiply(c, vecs, W + m * d, d, 1, x + at, BLOCK, d);
    for (int v = 0; v < vecs; v++)
        for (int r = 0; r < ROWS; r++) {
            V(z + (m + r) * BLOCK + at + 16 * v) = c[r][v];
            v16 *top = peak + at / 16 + v;
            *top = at_least(*top, c[r][v]);
        }
}

/* phi (M, BLOCK) of `rows`, whose successors it fetches; x (d, BLOCK) is its workspace */
static void features(float *phi, float *x, struct rows rows, const float *W, const float *b, long M, int softmax,
                     const float *weight)
{
    const long d = rows.width;
    load_columns(x, rows);
    v16 peak[LANES], sum[LANES] = {0};
    for (int v = 0; v < LANES; v++)
        peak[v] = ZERO - INFINITY;
    for (long m = 0; m < M; m += ROWS) {
        for (long i = m * BLOCK / M; i < (m + ROWS) * BLOCK / M; i++)
            fetch(rows, i);
        WIDTHS(project, 0, BLOCK, phi, x, W, b, d, peak, m)
    }
    for (long m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int v = 0; v < LANES; v++) {
            v16 z = V(phi + m * BLOCK + 16 * v);
            if (softmax)
                z -= peak[v];
            else
                z = at_most(at_least(z, ZERO - 20.0f), ZERO + 20.0f);
            z = exponential(z);
            sum[v] += z;
            V(phi + m * BLOCK + 16 * v) = z;
        }
    for (int v = 0; v < LANES; v++) {
        sum[v] = softmax ? 1.0f / sum[v] : ZERO + 1.0f / sqrtf(M);
        if (weight)
            sum[v] *= V(weight + 16 * v);
    }
    for (long m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int v = 0; v < LANES; v++)
            V(phi + m * BLOCK + 16 * v) *= sum[v];
}

INLINE void score(float *a, const float *phi_k, const float *phi_q, long M, const float *decay, v16 *total, long j, long at, int vecs)
{
    v16 c[ROWS][VECS] = {0};
    multiply(c, vecs, phi_k + j, 1, BLOCK, phi_q + at, BLOCK, M);
    for (int v = 0; v < vecs; v++)
        for (int r = 0; r < ROWS; r++) {
            c[r][v] *= V(decay + at + 16 * v - j - r);
            V(a + (j + r) * BLOCK + at + 16 * v) = c[r][v];
            total[at / 16 + v] += c[r][v];
        }
}

struct place { void *o; long at, step, rows; int bf16; }; /* of a block of outputs */

INLINE void output(struct place to, const float *a, const float *v, const float *phi_q, const float *S, long M, long e,
                   const float *decay, const float *scale, long i, long at, int vecs)
{
    v16 c[ROWS][VECS] = {0};
    multiply(c, vecs, phi_q + i, 1, BLOCK, S + at, e, M);
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < vecs; w++)
            c[r][w] *= decay[i + r + 1];
    multiply(c, vecs, a + i, 1, BLOCK, v + at, e, i + ROWS);
    for (int r = 0; r < ROWS && i + r < to.rows; r++)
        for (int w = 0; w < vecs; w++)
            store(to.o, to.at + (i + r) * to.step + at + 16 * w, c[r][w] * scale[i + r], to.bf16);
}

INLINE void remember(float *S, const float *phi_k, const float *v, long e, float fade, long m, long at, int vecs)
{
    v16 c[ROWS][VECS];
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < vecs; w++)
            c[r][w] = V(S + (m + r) * e + at + 16 * w) * fade;
    multiply(c, vecs, phi_k + m * BLOCK, BLOCK, 1, v + at, e, BLOCK);
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < vecs; w++)
            V(S + (m + r) * e + at + 16 * w) = c[r][w];
}

/* tokens before `start` enter the state only, those up to `end` are attended to */
static void attend(const struct call *c, float *scratch, long b, long g, long start, long end)
{
    const long M = c->M, d = c->d, e = c->e, R = c->H / c->G, columns = e + c->sums;
    float *x = scratch, *phi_q = x + d * BLOCK, *phi_k = phi_q + M * BLOCK, *a = phi_k + M * BLOCK;
    float *v = a + BLOCK * BLOCK, *S = v + BLOCK * e, *key_sum = S + M * e;
    float factors[3 * BLOCK], weight[BLOCK], scale[BLOCK];
    float *decay = factors + BLOCK; /* of a distance between tokens: 0 for those to come, which is the causal mask */
    const float g_decay = c->log_decay ? c->log_decay[g] : 0.0f;
    for (long i = -BLOCK; i < 2 * BLOCK; i++)
        decay[i] = i < 0 ? 0.0f : expf(g_decay * i);
    const float *old = c->state + (b * c->G + g) * M * columns;
    for (long m = 0; m < M; m++) {
        memcpy(S + m * e, old + m * columns, e * sizeof(float));
        key_sum[m] = c->sums ? old[m * columns + e] : 0.0f;
    }
    for (long t = 0; t < end; t += BLOCK) {
        const long n = end - t < BLOCK ? end - t : BLOCK;
        for (long i = 0; i < BLOCK; i++)
            weight[i] = i >= n ? 0.0f : c->key_weight ? c->key_weight[(b * c->T + t + i) * c->G + g] : 1.0f;
        features(phi_k, x, rows_of(c->k, b, t, g, n, d, c->bf16), c->W_k + g * M * d, c->b_k + g * M, M, c->softmax, weight);
        const struct rows values = rows_of(c->v, b, t, g, n, e, c->bf16);
        for (long i = 0; i < BLOCK; i++) {
            for (long j = 0; j < e; j += 16)
                V(v + i * e + j) = i < n ? load(values.x + i * values.step, j, c->bf16) : ZERO;
            fetch(values, i);
        }
        for (long h = g * R; t >= start && h < (g + 1) * R; h++) {
            v16 total[LANES] = {0}, before[LANES] = {0};
            features(phi_q, x, rows_of(c->q, b, t, h, n, d, c->bf16), c->W_q + h * M * d, c->b_q + h * M, M, c->softmax, NULL);
            for (long j = 0; j < BLOCK; j += ROWS)
                WIDTHS(score, j & -16, BLOCK, a, phi_k, phi_q, M, decay, total, j)
            for (long m = 0; c->sums && m < M; m++)
#pragma GCC unroll 4
                for (int w = 0; w < LANES; w++)
                    before[w] += V(phi_q + m * BLOCK + 16 * w) * key_sum[m];
            for (int w = 0; w < LANES; w++)
                total[w] += before[w] * V(decay + 16 * w + 1);
            for (long i = 0; i < BLOCK; i++) {
                float sum = total[i / 16][i % 16];
                scale[i] = c->normalize ? 1.0f / (sum < 1e-30f ? 1e-30f : sum) : 1.0f;
                if (c->total && i < n)
                    c->total[(b * c->T + t + i) * c->H + h] = sum;
            }
            struct place to = {c->o, ((b * c->T + t) * c->H + h) * e, c->H * e, n, c->bf16 && c->normalize};
            for (long i = 0; i < BLOCK; i += ROWS)
                WIDTHS(output, 0, e, to, a, v, phi_q, S, M, e, decay, scale, i)
        }
        for (long m = 0; m < M; m++) {
            v16 sum = {0};
            for (int w = 0; w < LANES; w++) {
                v16 *p = (v16 *)(phi_k + m * BLOCK) + w;
                if (c->log_decay) {
                    for (int i = 0; i < 16; i++)
                        (*p)[i] *= decay[n - 1 - 16 * w - i];
                }
                sum += *p;
            }
            float s = 0.0f;
            for (int i = 0; i < 16; i++)
                s += sum[i];
            key_sum[m] = key_sum[m] * decay[n] + s;
        }
        for (long m = 0; m < M; m += ROWS)
            WIDTHS(remember, 0, e, S, phi_k, v, e, decay[n], m)
    }
    if (end < c->T)
        return;
    float *new = c->new_state + (b * c->G + g) * M * columns;
    for (long m = 0; m < M; m++) {
        memcpy(new + m * columns, S + m * e, e * sizeof(float));
        if (c->sums)
            new[m * columns + e] = key_sum[m];
    }
}

/* works on tasks until none is left; any number of threads may be in here. Returns nonzero if memory ran out */
int dijiang_work(struct call *c)
{
    void *scratch;
    const long size = c->d * BLOCK + 2 * c->M * BLOCK + BLOCK * BLOCK + BLOCK * c->e + c->M * c->e + c->M;
    if (posix_memalign(&scratch, 64, size * sizeof(float)))
        return 1;
#ifdef __SSE__
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040); /* tiny weights become 0: numbers below 1e-38 cost a hundred cycles each */
#endif
    const long pairs = c->B * c->G, tasks = c->whole + (pairs - c->whole) * c->pieces;
    for (long i; (i = __atomic_fetch_add(&c->next, 1, __ATOMIC_RELAXED)) < tasks;) {
        long pair = i, piece = 0, whole = i < c->whole;
        if (!whole) {
            pair = c->whole + (i - c->whole) / c->pieces;
            piece = (i - c->whole) % c->pieces;
        }
        attend(c, scratch, pair / c->G, pair % c->G, piece ? c->ends[piece - 1] : 0, whole ? c->T : c->ends[piece]);
    }
#ifdef __SSE__
    _mm_setcsr(mode);
#endif
    free(scratch);
    return 0;
}
"""

FLAGS = ["-O3", "-fno-math-errno", "-fPIC", "-shared", "-x", "c"]
POINTERS = ("W_q", "b_q", "W_k", "b_k", "key_weight", "log_decay", "state", "o", "total", "new_state")
SIZES = ("B", "T", "H", "G", "M", "d", "e", "bf16", "softmax", "sums", "normalize", "whole", "pieces")
# one block's products need this many tokens before a second thread pays for its start
BLOCK = 64


class Input(ctypes.Structure):
    """`struct input` of the source."""

    _fields_ = [("x", ctypes.c_void_p), ("steps", ctypes.c_long * 3)]

    @classmethod
    def of(cls, x: torch.Tensor) -> "Input":
        return cls(x.data_ptr(), tuple(step * x.element_size() for step in x.stride()[:3]))


class Call(ctypes.Structure):
    """`struct call` of the source."""

    _fields_ = [
        *((name, Input) for name in "qkv"),
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_long) for name in SIZES),
        ("ends", ctypes.c_void_p),
        ("next", ctypes.c_long),
    ]


def find_compiler() -> list[str] | None:
    """The command of the C compiler: `CC`, which may hold options, else the first of the usual names."""
    for command in [shlex.split(os.environ.get("CC", ""))] + [["cc"], ["gcc"], ["clang"]]:
        if command and shutil.which(command[0]):
            return command
    return None


def cache_folders():
    """Where the library may be kept, best first: a place only the user writes to, or a new temporary folder."""
    try:
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dijiang"
    except RuntimeError:  # no home
        pass
    yield Path(tempfile.mkdtemp(prefix="dijiang-"))


def describe_processor() -> str:
    """What `-march=native` depends on: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        found = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    except OSError:
        found = {platform.processor()}
    return "\n".join([platform.system(), platform.machine(), *sorted(found)])


def build(compiler: list[str], folder: Path) -> ctypes.CDLL:
    """The compiled library from `folder`, put there if need be. OSError where the folder, RuntimeError where the code fails."""
    binary = Path(shutil.which(compiler[0])).resolve()
    identity = [SOURCE, *compiler, *FLAGS, str(binary), str(binary.stat().st_mtime_ns), describe_processor()]
    name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:24]
    library = folder / f"native-{name}.so"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / "native.so"
            for tuned in (["-march=native"], []):
                command = [*compiler, *tuned, *FLAGS, "-", "-o", str(made), "-lm"]
                result = subprocess.run(command, input=SOURCE, capture_output=True, text=True, timeout=300)
                if result.returncode == 0:
                    break
            else:
                lines = [line for line in result.stderr.splitlines() if "error" in line] or ["no message"]
                raise RuntimeError(f"{shlex.join(compiler)} cannot compile the native kernel: {lines[0][:200]}")
            os.replace(made, library)  # in one step, so that two processes may do this at once
    return ctypes.CDLL(str(library))


@functools.cache
def load_kernel() -> tuple:
    """The C function and why there is none; one of them is None."""
    compiler = find_compiler()
    if compiler is None:
        return None, "no C compiler found (CC, cc, gcc, clang)"
    reason = "no folder to keep the native kernel in"
    for folder in cache_folders():
        try:
            work = build(compiler, folder).dijiang_work
        except (RuntimeError, subprocess.SubprocessError) as error:
            return None, " ".join(str(error).split())
        except OSError as error:  # not writable, full, or mounted without the right to run what is in it
            reason = f"the native kernel cannot be kept or loaded: {error}"
            continue
        work.argtypes, work.restype = [ctypes.POINTER(Call)], ctypes.c_int
        return work, None
    return None, reason


def native_is_usable() -> tuple[bool, str]:
    """Whether `native_linear_attention` runs here, and why not. The first call compiles it, which takes about a second."""
    if os.environ.get("DIJIANG_NATIVE") == "0":
        return False, "DIJIANG_NATIVE=0 turns the native kernel off"
    work, reason = load_kernel()
    return work is not None, reason or ""


def native_supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, M: int) -> bool:
    """Whether the shapes, dtypes and strides are ones that `native_linear_attention` takes."""
    alike = q.dtype == k.dtype == v.dtype and q.dtype in (torch.float32, torch.bfloat16)
    if not alike or any(x.device.type != "cpu" or x.dim() != 4 or x.stride(3) != 1 for x in (q, k, v)):
        return False
    fits = q.shape[:2] == k.shape[:2] and k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3]
    return fits and q.shape[2] % k.shape[2] == 0 and not (M % 16 or q.shape[3] % 16 or v.shape[3] % 16) and q.numel() > 0


@functools.cache
def helpers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="dijiang")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=helpers.cache_clear)


def plan_pieces(T: int, threads: int, pairs: int, ratio: float) -> tuple[int, list[int]]:
    """
    How many of the (b, g) pairs are one task each, and where to cut the others, which would leave threads idle.

    A piece first runs through the keys before it, at `ratio` of the cost of attending, so that no piece waits for another and
    the numbers do not depend on the cut. Pieces of equal cost get shorter by 1 - ratio each.
    """
    count = threads // (pairs % threads) if pairs % threads else 1
    if count == 1 or T < 4 * BLOCK * count:
        return pairs, []
    ends = [T * (1 - (1 - ratio) ** (i + 1)) / (1 - (1 - ratio) ** count) for i in range(count)]
    return pairs - pairs % threads, [*(round(end / BLOCK) * BLOCK for end in ends[:-1]), T]


@torch.no_grad()
def native_linear_attention(
    q, k, v, W_q, b_q, W_k, b_k, *, activation, key_weight=None, log_decay=None, state, sums: bool, normalize: bool = False
):
    """
    `weighted_sums` of linear_attention.py with the feature map before it: z = W x + b, then phi = softmax(z), or
    exp(clamp(z, -20, 20)) / sqrt(M). Everything is computed in float32.

    Args:
        q: (B, T, H, d); k: (B, T, G, d); v: (B, T, G, e): all float32 or all bfloat16, strided but for the last dimension.
        W_q: (H, M, d); b_q: (H, M); W_k: (G, M, d); b_k: (G, M).
        activation: `softmax` or `exp`.
        key_weight: (B, T, G), multiplies phi(k); 0 hides a key, though it ages the state. Default: 1.
        log_decay: (G,), g <= 0. Default: no decay.
        state: (B, G, M, e), or (B, G, M, e + 1) if `sums`: the last column sums phi(k). Left as it is.
        sums: also return the sums of weights.
        normalize: divide by the sums of weights instead of returning them.

    Returns:
        numerator (B, T, H, e), float32; the sums of weights (B, T, H) or None; the state after the last token. If
        `normalize`: the quotient in v's dtype, None, and the state.

    Raises:
        ValueError: if `native_supports` says no, or on other shapes that do not fit.
        RuntimeError: if `native_is_usable` says no.
    """
    usable, reason = native_is_usable()
    if not usable:
        raise RuntimeError(reason)
    (B, T, H, d), G, e, M = q.shape, k.shape[2], v.shape[3], W_q.shape[1]
    if not native_supports(q, k, v, M):
        raise ValueError(f"the native kernel cannot take q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, M={M}")
    if activation not in ("softmax", "exp") or (normalize and not sums):
        raise ValueError(f"activation={activation!r} is unknown, or normalize=True has no sums to divide by")
    shapes = {"W_q": (H, M, d), "b_q": (H, M), "W_k": (G, M, d), "b_k": (G, M), "state": (B, G, M, e + sums)}
    shapes |= {"key_weight": (B, T, G), "log_decay": (G,)}
    given = {"W_q": W_q, "b_q": b_q, "W_k": W_k, "b_k": b_k, "state": state, "key_weight": key_weight, "log_decay": log_decay}
    given = {name: x.float().contiguous() for name, x in given.items() if x is not None}
    for name, x in given.items():
        if x.shape != shapes[name]:
            raise ValueError(f"{name} is {tuple(x.shape)}, expected {shapes[name]}")

    o = q.new_empty(B, T, H, e, dtype=v.dtype if normalize else torch.float32)
    total = q.new_empty(B, T, H, dtype=torch.float32) if sums and not normalize else None
    new_state = torch.empty_like(given["state"])
    tensors = {"o": o, "total": total, "new_state": new_state} | given
    # per token and group; the mask leaves about half of a block's weights
    of_keys = M * (d + e)
    ratio = of_keys / (of_keys + H // G * (of_keys + BLOCK // 2 * (M + e)))
    threads, pairs = torch.get_num_threads(), B * G
    whole, ends = plan_pieces(T, threads, pairs, ratio)
    numbers = (B, T, H, G, M, d, e, q.dtype == torch.bfloat16, activation == "softmax", sums, normalize, whole, len(ends))
    ends = (ctypes.c_long * len(ends))(*ends)
    inputs = {"q": Input.of(q), "k": Input.of(k), "v": Input.of(v)}
    call = Call(**inputs, **dict(zip(SIZES, numbers, strict=True)), ends=ctypes.addressof(ends))
    for name, x in tensors.items():
        if x is not None:
            setattr(call, name, x.data_ptr())
    work, pointer = load_kernel()[0], ctypes.pointer(call)
    others = min(threads, whole + (pairs - whole) * call.pieces) - 1
    futures = [helpers(others).submit(work, pointer) for _ in range(others)]
    failed = [work(pointer), *(future.result() for future in futures)]
    if any(failed):
        raise MemoryError("the native kernel could not get its scratch memory")
    return o, total, new_state
