// Attention of single queries over the float32 latents of a cache row, a few heads at a time.
#include <math.h>

#define HEADS 4
#define SPAN (LANES / HEADS)  // slots whose dot products with HEADS queries make up a vector

// The first `count` of LANES values whose memory can be read as a whole; the others are zero.
static inline floats load_some(const float *from, long count) {
    floats x = load_wide(from, LANES);
    return count < LANES ? either(NUMBERS < (int32_t)count, x, all(0)) : x;
}

// Lanes i and i ^ half change places.
static inline floats swapped(floats x, int half) {
#ifdef __clang__
    floats y = x;
    for (int i = 0; i < LANES; i++) y[i] = x[i ^ half];
    return y;
#else
    return __builtin_shuffle(x, NUMBERS ^ half);
#endif
}

// The sum of each of LANES vectors.
static inline floats sums_of(floats *x) {
#pragma GCC unroll 8
    for (int half = LANES / 2; half; half /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < half; i++) {
            ints upper = (NUMBERS & half) != 0;
            x[i] = either(upper, x[i + half], x[i]) + swapped(either(upper, x[i], x[i + half]), half);
        }
    return x[0];
}

// Dot products of up to HEADS queries with each latent, `room` apart by head.
static void dot_products(const float *queries, int heads, const float *past, long slots, long width, float *to,
                         long room) {
    for (long slot = 0; slot < slots; slot += SPAN) {
        floats dots[LANES];
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) dots[j] = (floats){0};
        for (long i = 0; i < width; i += LANES) {
            floats latents[SPAN];
#pragma GCC unroll 4
            for (int s = 0; s < SPAN; s++) {
                __builtin_prefetch(past + (slot + LANES + s) * width + i);
                latents[s] = load_some(past + lesser(slot + s, slots - 1) * width + i, width - i);
            }
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) {
                floats query = load_some(queries + lesser(h, heads - 1) * width + i, width - i);
#pragma GCC unroll 4
                for (int s = 0; s < SPAN; s++) dots[h * SPAN + s] += query * latents[s];
            }
        }
        float sums[HEADS][SPAN];
        store_wide(*sums, sums_of(dots), LANES);
        for (int h = 0; h < heads; h++) memcpy(to + h * room + slot, sums[h], sizeof sums[h]);
    }
}

// The first `count` logits become exponentials over the largest; returns 1 / their sum.
static float exponentials(float *logits, long count) {
    floats most = all(-INFINITY), total = {0};
    for (long i = 0; i < count; i += LANES) {
        floats x = load_wide(logits + i, LANES);
        if (i + LANES > count) x = either(NUMBERS < (int32_t)(count - i), x, all(-INFINITY));
        store_wide(logits + i, x, LANES);
        most = larger(x, most);
    }
    float top = largest(most);
    for (long i = 0; i < count; i += LANES) {
        floats x = exponential(load_wide(logits + i, LANES) - top);
        store_wide(logits + i, x, LANES);
        total += x;
    }
    return 1.0f / sum(total);
}

// Sums over slots of their first `rank` values, times the shares of up to HEADS heads, `room` apart, and `factors`.
static void mix(const float *shares, long room, const float *factors, int heads, const float *past, long slots,
                long width, long rank, bf16 *to, long to_room) {
    for (long start = 0; start < rank; start += SPAN * LANES) {
        floats total[HEADS][SPAN] = {0};
        for (long slot = 0; slot < slots; slot++) {
            floats values[SPAN];
#pragma GCC unroll 4
            for (int v = 0; v < SPAN; v++) values[v] = load_wide(past + slot * width + start + v * LANES, LANES);
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
                for (int v = 0; v < SPAN; v++) total[h][v] += shares[h * room + slot] * values[v];
        }
        for (int h = 0; h < heads; h++)
            for (long v = 0, i = start; v < SPAN && i < rank; v++, i += LANES)
                store(to + h * to_room + i, total[h][v] * factors[h], lesser(LANES, rank - i));
    }
}
