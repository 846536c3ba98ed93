// Routed experts in training: rows ordered by expert, each expert's products and activation one after the other while
// its rows are in the caches. An expert is one thread's work, so that no number of threads changes a result.
//
// Letters in shapes: T tokens, E experts, N rows, D hidden, F expert hidden, G = 2F.
#include "vectors.h"

#ifdef __AVX512BF16__
#include <omp.h>
#include "gemm.h"

void gated(const bf16 *gate_up, const float *scale, bf16 *out, long rows, long inner);
void gated_backward(const bf16 *grad, const bf16 *gate_up, const float *scale, bf16 *out, bf16 *grad_gate_up,
                    float *grad_scale, long rows, long inner);

// What one thread works with, for an expert of so many rows.
enum { ROWS_ND, INNER_NF, GRAD_INNER_NF, GATE_UP_NG, GRAD_GATE_UP_NG, LEFT, RIGHT, WEIGHTS, PARTS };

// Where each part starts in a thread's memory, in values of two bytes, and where the last one ends.
static long starts(long rows, long hidden, long inner, long *start) {
    long wide = padded(hidden, PANEL), middle = padded(2 * inner, PANEL), narrow = padded(inner, PANEL);
    long even = padded(rows, 2);
    long size[PARTS] = {
        rows * hidden, rows * inner, rows * inner, rows * 2 * inner, rows * 2 * inner,
        even * (wide > middle ? wide : middle), even * (wide > narrow ? wide : narrow), wide * middle,
    };
    long end = 0;
    for (int part = 0; part < PARTS; part++) {
        start[part] = end;
        end += padded(size[part], 64);
    }
    return end;
}

long experts_scratch(long rows, long hidden, long inner) {
    long start[PARTS];
    return starts(rows, hidden, inner, start);
}

typedef struct {
    void *part[PARTS];
} scratch;

static scratch own_scratch(bf16 *memory, long rows, long hidden, long inner) {
    long start[PARTS], size = starts(rows, hidden, inner, start);
    scratch mine;
    for (int part = 0; part < PARTS; part++)
        mine.part[part] = memory + omp_get_thread_num() * size + start[part];
    return mine;
}

static void gather(matrix m, long rows, bf16 *to) {
    for (long row = 0; row < rows; row++) memcpy(to + row * m.width, row_of(m, row), m.width * sizeof *to);
}

// out [rows, O] = x [rows, I] times the transpose of weights [O, I].
static void rows_times_transpose(const bf16 *x, long rows, matrix weights, long outputs, pair *panels, bf16 *out) {
    panels_of_rows(weights, outputs, panels);
    long pairs = weights.width / 2;
    product(rows_of(x, weights.width), rows, (right){panels, pairs}, outputs, pairs, out, NARROW, EVERYWHERE);
}

// out [rows, O] = x [rows, I] times weights [I, O].
static void rows_times(const bf16 *x, long rows, matrix weights, long inputs, pair *panels, bf16 *out) {
    panels_of_columns(weights, inputs, 0, weights.width, panels);
    long pairs = inputs / 2;
    product(rows_of(x, inputs), rows, (right){panels, pairs}, weights.width, pairs, out, NARROW, EVERYWHERE);
}

// out [A, B] = a^T b for matrices of `rows` rows, A and B wide.
static void columns_times(matrix a, matrix b, long rows, scratch s, void *out, int wide) {
    pair *lefts = s.part[LEFT], *rights = s.part[RIGHT];
    panels_of_columns(a, rows, 0, a.width, lefts);
    panels_of_columns(b, rows, 0, b.width, rights);
    product_of_panels(lefts, a.width, (right){rights, (rows + 1) / 2}, b.width, out, wide ? WIDE : NARROW, EVERYWHERE);
}

// One expert: its rows, the first of all, and its weights.
typedef struct {
    long first, rows;
    matrix up, down;
} expert;

static expert expert_of(long number, const int64_t *offsets, const char *gate_up, const char *down, long hidden,
                        long inner, long wide) {
    long bytes = (wide ? 4 : 2) * hidden * inner, first = offsets[number];
    return (expert){first, offsets[number + 1] - first, {gate_up + 2 * number * bytes, hidden, wide, NULL},
                    {down + number * bytes, inner, wide, NULL}};
}

// `memory` is enough for so many threads, whatever OpenMP would start.
//
// Gate and up of every row [N, G] and the weighted outputs [N, D] from x [T, D] and weights [E, G, D] and [E, D, F].
void experts_forward(const bf16 *x, const int64_t *tokens, const float *scale, const int64_t *offsets,
                     const char *gate_up_weight, const char *down_weight, bf16 *gate_up, bf16 *out, bf16 *memory,
                     long experts, long most_rows, long hidden, long inner, long wide, long threads) {
#pragma omp parallel num_threads(threads)
    {
        scratch s = own_scratch(memory, most_rows, hidden, inner);
#pragma omp for schedule(dynamic)
        for (long e = 0; e < experts; e++) {
            expert mine = expert_of(e, offsets, gate_up_weight, down_weight, hidden, inner, wide);
            long first = mine.first, rows = mine.rows;
            gather((matrix){x, hidden, 0, tokens + first}, rows, s.part[ROWS_ND]);
            bf16 *middle = gate_up + first * 2 * inner;
            rows_times_transpose(s.part[ROWS_ND], rows, mine.up, 2 * inner, s.part[WEIGHTS], middle);
            gated(middle, scale + first, s.part[INNER_NF], rows, inner);
            rows_times_transpose(s.part[INNER_NF], rows, mine.down, hidden, s.part[WEIGHTS], out + first * hidden);
        }
    }
}

// Gradients by the rows of x [N, D], by the scale [N] and by the weights. `gate_up` is computed again where it is NULL.
void experts_backward(const bf16 *grad, const bf16 *x, const int64_t *tokens, const float *scale,
                      const int64_t *offsets, const char *gate_up_weight, const char *down_weight, const bf16 *gate_up,
                      bf16 *grad_rows, float *grad_scale, char *grad_gate_up_weight, char *grad_down_weight,
                      bf16 *memory, long experts, long most_rows, long hidden, long inner, long wide, long threads) {
    long bytes = (wide ? 4 : 2) * hidden * inner;
#pragma omp parallel num_threads(threads)
    {
        scratch s = own_scratch(memory, most_rows, hidden, inner);
#pragma omp for schedule(dynamic)
        for (long e = 0; e < experts; e++) {
            expert mine = expert_of(e, offsets, gate_up_weight, down_weight, hidden, inner, wide);
            long first = mine.first, rows = mine.rows;
            matrix x_rows = {x, hidden, 0, tokens + first}, grad_out = {grad, hidden, 0, tokens + first};
            matrix inner_rows = {s.part[INNER_NF], inner, 0, NULL};
            matrix grad_middle = {s.part[GRAD_GATE_UP_NG], 2 * inner, 0, NULL};
            const bf16 *middle = gate_up ? gate_up + first * 2 * inner : s.part[GATE_UP_NG];
            if (!gate_up) {
                gather(x_rows, rows, s.part[ROWS_ND]);
                rows_times_transpose(s.part[ROWS_ND], rows, mine.up, 2 * inner, s.part[WEIGHTS], s.part[GATE_UP_NG]);
            }
            gather(grad_out, rows, s.part[ROWS_ND]);
            rows_times(s.part[ROWS_ND], rows, mine.down, hidden, s.part[WEIGHTS], s.part[GRAD_INNER_NF]);
            gated_backward(s.part[GRAD_INNER_NF], middle, scale + first, s.part[INNER_NF], s.part[GRAD_GATE_UP_NG],
                           grad_scale + first, rows, inner);
            columns_times(grad_out, inner_rows, rows, s, grad_down_weight + e * bytes, wide);
            columns_times(grad_middle, x_rows, rows, s, grad_gate_up_weight + 2 * e * bytes, wide);
            rows_times(s.part[GRAD_GATE_UP_NG], rows, mine.up, 2 * inner, s.part[WEIGHTS], grad_rows + first * hidden);
        }
    }
}
#endif
