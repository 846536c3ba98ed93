// Products of training between rows and weights. A sum is one thread's work from its first term to its last, so that
// no number of threads changes it.
//
// Letters in shapes: N rows, I inputs, O outputs, A and B columns.
#include "vectors.h"

#ifdef __AVX512BF16__
#include <omp.h>
#include "gemm.h"

void surplus(bf16 *logits, const int64_t *targets, float *log_probs, long tokens, long vocabulary);

#define BLOCK (32 * TILE)  // rows that a thread multiplies at once

long has_gemm(void) { return 1; }

// `panels_of_rows` and `panels_of_columns` by all threads, a panel each.
static void pack_rows(matrix m, long rows, pair *panels) {
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row += PANEL)
        panels_of_rows(below(m, row), lesser(PANEL, rows - row), in_panel(panels, row, m.width / 2));
}

static void pack_columns(matrix m, long rows, pair *panels) {
#pragma omp for schedule(static)
    for (long column = 0; column < m.width; column += PANEL)
        panels_of_columns(m, rows, column, lesser(PANEL, m.width - column), in_panel(panels, column, (rows + 1) / 2));
}

static void multiply(const bf16 *x, long rows, const pair *panels, long outputs, long pairs, bf16 *out) {
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row += BLOCK)
        product(rows_of(x + row * 2 * pairs, 2 * pairs), lesser(BLOCK, rows - row), (right){panels, pairs}, outputs, pairs,
                out + row * outputs, NARROW, EVERYWHERE, NULL);
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
    long pairs = inputs / 2, block = 8 * TILE;
#pragma omp parallel
    {
        pack_rows(weights, outputs, panels);
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row += block) {
            long count = lesser(block, rows - row);
            bf16 *logits = out + row * outputs;
            product(rows_of(x + row * inputs, inputs), count, (right){panels, pairs}, outputs, pairs, logits, NARROW,
                    EVERYWHERE, NULL);
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
