"""What the C kernels share: vectors of the processor's size, an exponential, transposition, and threads."""

VECTORS = r"""
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

/* Vectors of the processor's own size: wider ones compile too, into code that is several times slower. */
#ifdef __AVX512F__
enum { WIDTH = 16 };
#elif defined(__AVX__)
enum { WIDTH = 8 };
#else
enum { WIDTH = 4 };
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

INLINE vec load(const char *row, long at, int bf16)
{
    if (!bf16)
        return V((const float *)row + at);
    return (vec)(__builtin_convertvector(*(any_halves *)((const uint16_t *)row + at), bits) << 16);
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

INLINE float sum_lanes(vec x)
{
    float sum = 0.0f;
    for (int i = 0; i < WIDTH; i++)
        sum += x[i];
    return sum;
}

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

#if defined(__clang__) || __GNUC__ >= 12
#define ZIP(to, a, b)                                                                                  \
    to[0] = __builtin_shufflevector(a, b, ZIP_LOW);                                                         \
    to[1] = __builtin_shufflevector(a, b, ZIP_HIGH);
#if defined(__AVX512F__)
#define ZIP_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ZIP_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
#define ZIP_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define ZIP_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define ZIP_LOW 0, 4, 1, 5
#define ZIP_HIGH 2, 6, 3, 7
#endif
#endif

/* rows to columns: interleaving the halves log2(WIDTH) times transposes */
INLINE void transpose(vec *x)
{
    vec y[WIDTH];
#ifdef ZIP
#pragma GCC unroll 4
    for (int width = WIDTH; width > 1; width /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < WIDTH / 2; i++) {
            ZIP((y + 2 * i), x[i], x[i + WIDTH / 2])
        }
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; i++)
            x[i] = y[i];
    }
#else
    for (int i = 0; i < WIDTH; i++)
        for (int k = 0; k < WIDTH; k++)
            y[k][i] = x[i][k];
    memcpy(x, y, sizeof(y));
#endif
}

/* tiny weights become 0: numbers below 1e-38 cost a hundred cycles each. Returns what `restore_tiny` takes. */
INLINE unsigned flush_tiny(void)
{
#ifdef __SSE__
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);
    return mode;
#else
    return 0;
#endif
}

INLINE void restore_tiny(unsigned mode)
{
#ifdef __SSE__
    _mm_setcsr(mode);
#endif
}

/* a large output is new memory; its pages of 4 KB take longer to map than to fill */
INLINE void use_large_pages(const void *x, long bytes)
{
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 2 << 20, from = ((uintptr_t)x + page - 1) & -page, to = ((uintptr_t)x + bytes) & -page;
    if (to > from)
        madvise((void *)from, to - from, MADV_HUGEPAGE);
#endif
}

struct call;

/* works on tasks until none is left, in any number of threads at once. Returns nonzero if memory ran out */
int dijiang_work(struct call *c);

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
