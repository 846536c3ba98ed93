// Drawing tokens from logits in one pass per row, with nothing but a row of exponentials in between.
#include <math.h>
#include <stdlib.h>
#include "vectors.h"

#define BLOCK 64  // weights whose sum is passed over at once

// Each weight is e^((x - top) / temperature); returns their sum.
static double weigh(const float *x, float top, float temperature, long count, float *to) {
    double total = 0;
    for (long start = 0; start < count; start += BLOCK) {
        floats sums = {0};
        long size = lesser(BLOCK, count - start);
        EACH(size,
            floats scaled = (load_wide(x + start + i, n) - top) / temperature;
            floats value = exponential(either(NUMBERS < (int32_t)n, scaled, all(-INFINITY)));
            store_wide(to + start + i, value, n);
            sums += value;)
        total += sum(sums);
    }
    return total;
}

// The first weight at which the sum of weights passes `target`, which is below the sum of all; never a zero one.
static long passing(const float *weights, long count, double target) {
    double passed = 0;
    long last = count - 1;
    for (long start = 0; start < count; start += BLOCK) {
        floats sums = {0};
        long size = lesser(BLOCK, count - start);
        EACH(size, sums += load_wide(weights + start + i, n);)
        double block = sum(sums);
        if (passed + block > target) {
            for (long i = start; i < start + size; i++) {
                if (weights[i] > 0) last = i;
                if ((passed += weights[i]) > target) break;
            }
            return last;
        }
        passed += block;
    }
    return last;
}

static float top_of(const float *x, long count) {
    floats most = all(-INFINITY);
    EACH(count, most = larger(either(NUMBERS < (int32_t)n, load_wide(x + i, n), all(-INFINITY)), most);)
    return largest(most);
}

static long first(const float *x, long count, float value) {
    long i = 0;
    while (i < count - 1 && x[i] != value) i++;
    return i;
}

// Tokens by `uniform` numbers in [0, 1), or the most likely ones; their log-probabilities as sampled (0 if greedy), and
// at temperature one.
void draw(const float *logits, const float *temperature, const uint8_t *greedy, const double *uniform, int64_t *tokens,
          float *sampled, float *policy, long rows, long vocabulary) {
#pragma omp parallel if (rows > 1)
    {
        float *weights = malloc(vocabulary * sizeof *weights);
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++) {
            const float *x = logits + row * vocabulary;
            float top = top_of(x, vocabulary);
            double total = weigh(x, top, 1.0f, vocabulary, weights), tempered = total;
            if (temperature[row] != 1.0f) tempered = weigh(x, top, temperature[row], vocabulary, weights);
            long token = greedy[row] ? first(x, vocabulary, top)
                                     : passing(weights, vocabulary, uniform[row] * tempered);
            tokens[row] = token;
            policy[row] = x[token] - top - log(total);
            sampled[row] = greedy[row] ? 0.0f : (x[token] - top) / temperature[row] - log(tempered);
        }
        free(weights);
    }
}
