// Products of training between rows and weights. A sum is one thread's work from its first term to its last, so that
// no number of threads changes it.
//
// Letters in shapes: N rows, I inputs, O outputs, A and B columns.
#include "vectors.h"

#ifdef __AVX512BF16__
#include <omp.h>
#include "gemm.h"

void surplus(bf16 *logits, const int64_t *targets, float *log_probs, long tokens, long vocabulary);

#define MANY (32 * TILE)  // rows that a thread multiplies at once

long has_gemm(void) { return 1; }

static void multiply(const bf16 *x, long rows, const pair *panels, long outputs, long pairs, bf16 *out) {
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row += MANY)
        times(x + row * 2 * pairs, lesser(MANY, rows - row), 2 * pairs, panels, outputs, out + row * outputs);
}

// out [N, O] = x [N, I] times the transpose of weights [O, I].
void project(const bf16 *x, const void *weight, bf16 *out, pair *panels, long rows, long inputs, long outputs,
             long wide) {
    matrix weights = {weight, inputs, wide, NULL};
#pragma omp parallel
    {
        pack_rows(weights, outputs, panels);
        multiply(x, rows, panels, outputs, inputs / 2, out);
    }
}

// Each token's log-probability of its target [N], and softmax minus the target's one-hot [N, O], of the logits that x
// [N, I] times the transpose of weights [O, I] gives. Logits are read while they are in the caches.
void log_probabilities(const bf16 *x, const void *weight, const int64_t *targets, bf16 *out, float *log_probs,
                       pair *panels, long rows, long inputs, long outputs, long wide) {
    matrix weights = {weight, inputs, wide, NULL};
#pragma omp parallel
    {
        pack_rows(weights, outputs, panels);
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row += BLOCK) {
            long count = lesser(BLOCK, rows - row);
            bf16 *logits = out + row * outputs;
            times(x + row * inputs, count, inputs, panels, outputs, logits);
            surplus(logits, targets + row, log_probs + row, count, outputs);
        }
    }
}

// out [N, I] = x [N, O] times weights [O, I].
void project_back(const bf16 *x, const void *weight, bf16 *out, pair *panels, long rows, long outputs, long inputs,
                  long wide) {
    matrix weights = {weight, inputs, wide, NULL};
#pragma omp parallel
    {
        pack_columns(weights, outputs, panels);
        multiply(x, rows, panels, inputs, outputs / 2, out);
    }
}

// out [A, B], float32 if `wide` and else bfloat16, = a [N, A] transposed times b [N, B]. A thread has a panel of `lefts`.
void outer(const bf16 *a, const bf16 *b, void *out, pair *lefts, pair *rights, long rows, long a_width, long b_width,
           long wide, long threads) {
    matrix columns = {a, a_width, 0, NULL}, others = {b, b_width, 0, NULL};
    long pairs = (rows + 1) / 2;
#pragma omp parallel num_threads(threads)
    {
        pair *panel = lefts + omp_get_thread_num() * pairs * PANEL;
        pack_columns(others, rows, rights);
#pragma omp for schedule(static)
        for (long column = 0; column < a_width; column += PANEL) {
            long count = lesser(PANEL, a_width - column);
            panels_of_columns(columns, rows, column, count, panel);
            product_of_panels(panel, count, (right){rights, pairs}, b_width,
                              (char *)out + column * b_width * (wide ? 4 : 2), wide ? WIDE : NARROW, EVERYWHERE, NULL);
        }
    }
}
#else
long has_gemm(void) { return 0; }
#endif
