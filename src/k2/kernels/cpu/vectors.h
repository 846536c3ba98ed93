// Float32 lanes in GCC's and Clang's portable vectors, read from and written to bfloat16.
//
// Vectors are as wide as the processor's registers: wider ones are pieced together badly by compilers.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef uint16_t bf16;
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

static inline long lesser(long a, long b) { return a < b ? a : b; }

static inline floats all(float x) { return x - (floats){0}; }

static inline floats either(ints mask, floats yes, floats no) {
    return (floats)((mask & (ints)yes) | (~mask & (ints)no));
}

static inline floats larger(floats a, floats b) { return either(a > b, a, b); }

static const ints NUMBERS = {
    0, 1, 2, 3,
#if LANES > 4
    4, 5, 6, 7,
#endif
#if LANES > 8
    8, 9, 10, 11, 12, 13, 14, 15,
#endif
};

static inline floats widen(halves x) {
#ifdef __AVX512F__
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);  // GCC would piece it together from halves
#else
    return (floats)(__builtin_convertvector(x, words) << 16);
#endif
}

static inline halves narrow(floats x) {
#ifdef __AVX512BF16__
    return (halves)_mm512_cvtneps_pbh((__m512)x);
#else
    words bits = (words)x, rounded = bits + 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
    words nan = (words)(x != x);
    return __builtin_convertvector(((nan & 0x7fc00000) | (~nan & rounded)) >> 16, halves);
#endif
}

static inline float widen_one(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

static inline bf16 narrow_one(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

// The first `count` of LANES values; the others are zero, or are not written.
static inline halves some(const bf16 *from, long count) {
    halves x = {0};
    if (count >= LANES) memcpy(&x, from, sizeof x);
#ifdef __AVX512F__
    else x = (halves)_mm256_maskz_loadu_epi16((1u << count) - 1, from);
#else
    else memcpy(&x, from, count * sizeof *from);
#endif
    return x;
}

static inline floats load(const bf16 *from, long count) { return widen(some(from, count)); }

static inline void store(bf16 *to, floats x, long count) {
    halves rounded = narrow(x);
    if (count >= LANES) memcpy(to, &rounded, sizeof rounded);
#ifdef __AVX512F__
    else _mm256_mask_storeu_epi16(to, (1u << count) - 1, (__m256i)rounded);
#else
    else memcpy(to, &rounded, count * sizeof *to);
#endif
}

static inline floats load_wide(const float *from, long count) {
    floats x = {0};
    if (count >= LANES) memcpy(&x, from, sizeof x);
#ifdef __AVX512F__
    else x = (floats)_mm512_maskz_loadu_ps((1u << count) - 1, from);
#else
    else memcpy(&x, from, count * sizeof *from);
#endif
    return x;
}

static inline void store_wide(float *to, floats x, long count) {
    if (count >= LANES) memcpy(to, &x, sizeof x);
#ifdef __AVX512F__
    else _mm512_mask_storeu_ps(to, (1u << count) - 1, (__m512)x);
#else
    else memcpy(to, &x, count * sizeof *to);
#endif
}

// Statements for every LANES values of a row: `i` is the first one and `n` their number, which is less at the end only.
#define EACH(width, ...)                     \
    {                                        \
        long i = 0;                          \
        for (; i + LANES <= width; i += LANES) { \
            enum { n = LANES };              \
            __VA_ARGS__                      \
        }                                    \
        if (i < width) {                     \
            long n = width - i;              \
            __VA_ARGS__                      \
        }                                    \
    }

#define LARGER(a, b) ((a) > (b) ? (a) : (b))

// Lanes combined in halves, in an order that does not depend on the compiler.
#ifdef __AVX512F__
static inline float sum(floats x) { return _mm512_reduce_add_ps((__m512)x); }

static inline float largest(floats x) { return _mm512_reduce_max_ps((__m512)x); }
#else
#define FOLD(x, combine)                               \
    float lanes[LANES];                                \
    memcpy(lanes, &x, sizeof lanes);                   \
    for (int half = LANES / 2; half; half /= 2)        \
        for (int i = 0; i < half; i++) lanes[i] = combine(lanes[i], lanes[i + half]); \
    return lanes[0];
#define ADD(a, b) ((a) + (b))

static inline float sum(floats x) { FOLD(x, ADD) }

static inline float largest(floats x) { FOLD(x, LARGER) }
#endif

// The first of the largest numbers.
static inline long best_of(const float *numbers, long count) {
    floats most = all(-INFINITY);
    ints at = {0};
    EACH(count,
        floats x = load_wide(numbers + i, n);
        ints more = x > most;
        if (n < LANES) more &= NUMBERS < (int32_t)n;
        most = either(more, x, most);
        at = (more & (NUMBERS + (int32_t)i)) | (~more & at);)
    ints top = most == all(largest(most));
    at = (top & at) | (~top & INT32_MAX);
    int32_t lanes[LANES], best = INT32_MAX;
    memcpy(lanes, &at, sizeof lanes);
    for (int lane = 0; lane < LANES; lane++) best = lanes[lane] < best ? lanes[lane] : best;
    return best < count ? best : 0;  // none is largest if all are NaN
}

// e^x to 2 units in the last place; 0 or a denormal below -87.3, where float32 ends, and no less than e^88 above 88.
static inline floats exponential(floats x) {
#ifdef __AVX512F__
    x = (floats)_mm512_max_ps((__m512)all(-104), (__m512)x);  // not minus infinity; a NaN stays
    floats n = (floats)_mm512_roundscale_ps((__m512)(x * 1.44269504f), 0);
#else
    x = either(x > 88, all(88), x);
    const floats shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    floats shifted = x * 1.44269504f + shift, n = shifted - shift;
#endif
    floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats p = all(8.290315239e-3f);  // least relative error of degree 5 that is exact at 0, for |r| <= ln(2) / 2
    p = p * r + 4.189794026e-2f;
    p = p * r + 1.666763628e-1f;
    p = p * r + 4.999914941e-1f;
    p = p * r + 9.999997071e-1f;
    p = p * r + 1.0f;
#ifdef __AVX512F__
    return (floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    floats result = (floats)((ints)p + (((ints)shifted - 0x4b400000) << 23));
    result = either(x < -87.3f, all(0), result);
    return either(x != x, x, result);
#endif
}

// 1 / (1 + e^-x).
static inline floats sigmoid(floats x) { return 1.0f / (1.0f + exponential(-x)); }
