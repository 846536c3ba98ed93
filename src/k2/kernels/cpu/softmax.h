// Exponentials of a row of float32 logits over its largest one.
#pragma once
#include <math.h>
#include "vectors.h"

// The first `seen` logits times `scale`, plus `bias` if there is one, become exponentials over the largest, in place;
// `room` values may be touched. Returns the largest, and the sum of the exponentials.
static inline float exponentials_over_largest(float *row, float scale, const float *bias, long seen, long room,
                                              float *total) {
    long width = lesser((seen + LANES - 1) / LANES * LANES, room);
    floats most = all(-INFINITY), sums = {0};
    EACH(width,
        floats x = load_wide(row + i, n) * scale;
        if (bias) x += load_wide(bias + i, n);
        if (i + LANES > seen) x = either(NUMBERS < (int32_t)(seen - i), x, all(-INFINITY));
        store_wide(row + i, x, n);
        most = larger(x, most);)
    float top = largest(most);
    EACH(width,
        floats x = load_wide(row + i, n);
        if (n < LANES) x = either(NUMBERS < (int32_t)n, x, all(-INFINITY));
        x = exponential(x - top);
        store_wide(row + i, x, n);
        sums += x;)
    *total = sum(sums);
    return top;
}
