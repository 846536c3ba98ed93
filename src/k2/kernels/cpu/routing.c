// Where tokens go: choice of experts, and rows ordered by expert.
//
// Letters in shapes: T tokens, S choices, E experts, N = T S rows.
#include <stdlib.h>
#include "vectors.h"

// The S experts with the largest scores plus bias, best first, lower numbers first among equals: [T, S] of [T, E].
void choose_experts(const float *scores, const float *bias, int64_t *chosen, long tokens, long experts, long choices) {
#pragma omp parallel
    {
        float *open = malloc(experts * sizeof *open);
#pragma omp for schedule(static)
        for (long token = 0; token < tokens; token++) {
            const float *row = scores + token * experts;
            EACH(experts, store_wide(open + i, load_wide(row + i, n) + load_wide(bias + i, n), n);)
            for (long s = 0; s < choices; s++) {
                long best = chosen[token * choices + s] = best_of(open, experts);
                open[best] = -INFINITY;
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
