// Where tokens go: choice of experts, rows ordered by expert, and products with a router's sparse gradient.
//
// Letters in shapes: T tokens, S choices, E experts, N = T S rows, D width.
#include <stdlib.h>
#include "vectors.h"

#define ABOVE (LANES == 16 ? 6 : 4)       // tokens and experts whose scores are summed at once, in registers
#define SIDE ((LANES == 16 ? 4 : 2) * LANES)
#define TOGETHER 4            // tokens whose searches overlap: each waits for its last choice
#define COLUMNS (4 * LANES)  // of a weight's gradient that one thread sums: fixed, though it changes no sum

// Scores [T, E], sigmoid(x weights^T) in float32, of x [T, D] and weights [E, D]; `columns` is memory for their transpose,
// whose rows have whole sides: never wider than a panel of gemm.h.
void router_scores(const bf16 *x, const float *weight, float *scores, float *columns, long tokens, long experts,
                   long width) {
    long room = (experts + SIDE - 1) / SIDE * SIDE;
#pragma omp parallel
    {
        float *rows = malloc(ABOVE * width * sizeof *rows);
#pragma omp for schedule(static)
        for (long i = 0; i < width; i++)
            for (long e = 0; e < room; e++) columns[i * room + e] = e < experts ? weight[e * width + i] : 0.0f;
#pragma omp for schedule(static)
        for (long first = 0; first < tokens; first += ABOVE) {
            long count = lesser(ABOVE, tokens - first);
            for (long t = 0; t < ABOVE; t++) {
                const bf16 *from = x + lesser(first + t, tokens - 1) * width;
                EACH(width, store_wide(rows + t * width + i, load(from + i, n), n);)
            }
            for (long e = 0; e < experts; e += SIDE) {
                floats sums[ABOVE][SIDE / LANES] = {0};
                for (long i = 0; i < width; i++)
#pragma GCC unroll 6
                    for (int t = 0; t < ABOVE; t++)
#pragma GCC unroll 4
                        for (int v = 0; v < SIDE / LANES; v++)
                            sums[t][v] += rows[t * width + i] * load_wide(columns + i * room + e + v * LANES, LANES);
                for (long t = 0; t < count; t++)
                    for (long v = 0; v < SIDE / LANES && e + v * LANES < experts; v++)
                        store_wide(scores + (first + t) * experts + e + v * LANES, sigmoid(sums[t][v]),
                                   lesser(LANES, experts - e - v * LANES));
            }
        }
        free(rows);
    }
}

// The S experts with the largest scores plus bias, best first, lower numbers first among equals: [T, S] of [T, E].
void choose_experts(const float *scores, const float *bias, int64_t *chosen, long tokens, long experts, long choices) {
#pragma omp parallel
    {
        float *open = malloc(TOGETHER * experts * sizeof *open);
#pragma omp for schedule(static)
        for (long first = 0; first < tokens; first += TOGETHER) {
            long count = lesser(TOGETHER, tokens - first);
            for (long t = 0; t < count; t++) {
                const float *row = scores + (first + t) * experts;
                EACH(experts, store_wide(open + t * experts + i, load_wide(row + i, n) + load_wide(bias + i, n), n);)
            }
            for (long s = 0; s < choices; s++)
                for (long t = 0; t < count; t++) {
                    long best = chosen[(first + t) * choices + s] = best_of(open + t * experts, experts);
                    open[t * experts + best] = -INFINITY;
                }
        }
        free(open);
    }
}

// Rows ordered by expert, those of one expert in the order of pairs: the row of each pair of a token and a choice, each
// row's pair and token, and where each expert's rows begin, [E + 1].
void order_by_expert(const int64_t *chosen, int64_t *slots, int64_t *pairs, int64_t *tokens, int64_t *offsets, long rows,
                     long choices, long experts) {
    memset(offsets, 0, (experts + 1) * sizeof *offsets);
    for (long pair = 0; pair < rows; pair++) offsets[chosen[pair] + 1]++;
    for (long e = 0; e < experts; e++) offsets[e + 1] += offsets[e];
    for (long pair = 0; pair < rows; pair++) {
        long row = slots[pair] = offsets[chosen[pair]]++;
        pairs[row] = pair;
        tokens[row] = pair / choices;
    }
    memmove(offsets + 1, offsets, experts * sizeof *offsets);  // each has become the beginning of the next
    offsets[0] = 0;
}

// out [T, D] = a matrix [T, E] times weights [E, D], of which each row has `values` [T, S] in the columns `chosen` only.
void sparse_project_back(const float *values, const int64_t *chosen, const float *weight, bf16 *out, long tokens,
                         long choices, long width) {
#pragma omp parallel for schedule(static)
    for (long token = 0; token < tokens; token++) {
        const float *factors = values + token * choices;
        const int64_t *rows = chosen + token * choices;
        EACH(width,
            floats total = {0};
            for (long s = 0; s < choices; s++) total += factors[s] * load_wide(weight + rows[s] * width + i, n);
            store(out + token * width + i, total, n);)
    }
}

// out [E, D] = the same matrix transposed times x [T, D].
void sparse_outer(const float *values, const int64_t *chosen, const bf16 *x, float *out, long tokens, long choices,
                  long experts, long width) {
#pragma omp parallel for schedule(static)
    for (long first = 0; first < width; first += COLUMNS) {
        long columns = lesser(COLUMNS, width - first);
        for (long e = 0; e < experts; e++) memset(out + e * width + first, 0, columns * sizeof *out);
        for (long pair = 0; pair < tokens * choices; pair++) {
            const bf16 *from = x + pair / choices * width + first;
            float *to = out + chosen[pair] * width + first;
            EACH(columns, store_wide(to + i, load_wide(to + i, n) + load(from + i, n) * values[pair], n);)
        }
    }
}
