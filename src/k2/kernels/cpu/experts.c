// Routed experts in training: rows ordered by expert, each expert's products and activation one after the other while
// its rows are in the caches. An expert is one thread's work, so that no number of threads changes a result.
//
// Letters in shapes: T tokens, S choices, E experts, N = T S rows, D hidden, F expert hidden, G = 2F.
#include "vectors.h"

#ifdef __AVX512BF16__
#include <omp.h>
#include "activation.h"
#include "gemm.h"

// What one thread works with, for an expert of so many rows; the forward pass has the first two.
enum { INNER_NF, WEIGHTS, GRAD_INNER_NF, GATE_UP_NG, GRAD_GATE_UP_NG, LEFT, RIGHT, PARTS };

enum { FORWARD = WEIGHTS + 1, BACKWARD = PARTS };

// Where each part starts in a thread's memory, in values of two bytes, and where the last one ends.
static long starts(long rows, long hidden, long inner, long parts, long *start) {
    long wide = padded(hidden, PANEL), middle = padded(2 * inner, PANEL), narrow = padded(inner, PANEL);
    long even = padded(rows, 2);
    long size[PARTS] = {
        rows * inner, wide * middle, rows * inner, rows * 2 * inner, rows * 2 * inner,
        even * (wide > middle ? wide : middle), even * (wide > narrow ? wide : narrow),
    };
    return in_a_row(size, parts, start);
}

static long most_rows(const int64_t *offsets, long experts) {
    long most = 0;
    for (long e = 0; e < experts; e++)
        if (offsets[e + 1] - offsets[e] > most) most = offsets[e + 1] - offsets[e];
    return most;
}

long experts_scratch(const int64_t *offsets, long experts, long hidden, long inner, long backward) {
    long start[PARTS];
    return starts(most_rows(offsets, experts), hidden, inner, backward ? BACKWARD : FORWARD, start);
}

typedef struct {
    void *part[PARTS];
} scratch;

static scratch own_scratch(bf16 *memory, long rows, long hidden, long inner, long parts) {
    long start[PARTS], size = starts(rows, hidden, inner, parts, start);
    scratch mine;
    for (int part = 0; part < parts; part++)
        mine.part[part] = memory + omp_get_thread_num() * size + start[part];
    return mine;
}

static const matrix NOTHING = {0};

// A matrix of so many rows that lie one after the other, then none or some that do not.
static next all_of(matrix m, long rows, matrix others, long count) {
    return (next){m.start, row_of(m, rows), others, 0, count};
}

// out [rows, O] = x [rows, I] times the transpose of weights [O, I].
static void rows_times_transpose(matrix x, long rows, matrix weights, long outputs, scratch s, bf16 *out, next soon) {
    long pairs = weights.width / 2;
    panels_of_rows(weights, outputs, s.part[WEIGHTS]);
    product(factor(x), rows, (right){s.part[WEIGHTS], pairs}, outputs, pairs, out, NARROW, EVERYWHERE, &soon);
}

// out [rows, O] = x [rows, I] times weights [I, O].
static void rows_times(matrix x, long rows, matrix weights, scratch s, bf16 *out, next soon) {
    long pairs = x.width / 2;
    panels_of_columns(weights, x.width, 0, weights.width, s.part[WEIGHTS]);
    product(factor(x), rows, (right){s.part[WEIGHTS], pairs}, weights.width, pairs, out, NARROW, EVERYWHERE, &soon);
}

// out [A, B] = a^T b for matrices of `rows` rows, A and B wide.
static void columns_times(matrix a, matrix b, long rows, scratch s, matrix out, next soon) {
    panels_of_columns(a, rows, 0, a.width, s.part[LEFT]);
    panels_of_columns(b, rows, 0, b.width, s.part[RIGHT]);
    product_of_panels(s.part[LEFT], a.width, (right){s.part[RIGHT], (rows + 1) / 2}, b.width, (void *)out.start,
                      out.wide ? WIDE : NARROW, EVERYWHERE, &soon);
}

// Weights of all experts, or their gradients: gate and up [E, G, D], down [E, D, F].
typedef struct {
    const char *up, *down;
    long experts, hidden, inner, wide;
} tables;

static matrix up_of(tables t, long expert) {
    return below((matrix){t.up, t.hidden, t.wide, NULL}, expert * 2 * t.inner);
}

static matrix down_of(tables t, long expert) {
    return below((matrix){t.down, t.inner, t.wide, NULL}, expert * t.hidden);
}

// Of an expert, or of the last one if there are fewer.
static next up_soon(tables t, long expert, matrix others, long count) {
    return all_of(up_of(t, lesser(expert, t.experts - 1)), 2 * t.inner, others, count);
}

static next down_soon(tables t, long expert, matrix others, long count) {
    return all_of(down_of(t, lesser(expert, t.experts - 1)), t.hidden, others, count);
}

// out [T, D] = sums of each token's rows, which are at `slots` [T, S]; the next token's are fetched meanwhile.
static void sum_rows(const bf16 *rows, const int64_t *slots, bf16 *out, long count, long choices, long width) {
#pragma omp for schedule(static)
    for (long token = 0; token < count; token++) {
        const int64_t *own = slots + token * choices;
        for (long s = choices; s < 2 * choices && token + 1 < count; s++)
            for (long i = 0; i < width; i += LINE / 2)
                _mm_prefetch((const char *)(rows + own[s] * width + i), _MM_HINT_T0);
        EACH(width,
            floats total = {0};
            for (long s = 0; s < choices; s++) total += load(rows + own[s] * width + i, n);
            store(out + token * width + i, total, n);)
    }
}

// `memory` is enough for so many threads, whatever OpenMP would start; rows [N, D] and scales [N] are memory too.
//
// Gate and up of every row [N, G] and tokens' weighted sums of outputs [T, D] from x [T, D], the weights of its choices
// [T, S] and those of experts, [E, G, D] and [E, D, F]. Rows, tokens and offsets are those of `order_by_expert`.
void experts_forward(const bf16 *x, const float *token_weights, const int64_t *slots, const int64_t *tokens,
                     const int64_t *offsets, const char *gate_up_weight, const char *down_weight, bf16 *gate_up, bf16 *out,
                     bf16 *rows_out, float *scale, bf16 *memory, long count, long choices, long experts, long hidden,
                     long inner, long wide, long threads) {
    tables weights = {gate_up_weight, down_weight, experts, hidden, inner, wide};
#pragma omp parallel num_threads(threads)
    {
        scratch s = own_scratch(memory, most_rows(offsets, experts), hidden, inner, FORWARD);
#pragma omp for schedule(static)
        for (long pair = 0; pair < count * choices; pair++) scale[slots[pair]] = token_weights[pair];
#pragma omp for schedule(dynamic)
        for (long e = 0; e < experts; e++) {
            long first = offsets[e], rows = offsets[e + 1] - first;
            matrix x_rows = {x, hidden, 0, tokens + first}, inner_rows = {s.part[INNER_NF], inner, 0, NULL};
            long last = lesser(e + threads, experts - 1);
            matrix after = {x, hidden, 0, tokens + offsets[last]};
            bf16 *middle = gate_up + first * 2 * inner;
            rows_times_transpose(x_rows, rows, up_of(weights, e), 2 * inner, s, middle, down_soon(weights, e, NOTHING, 0));
            for (long row = 0; row < rows; row++)
                gated_row(middle + row * 2 * inner, scale[first + row], (bf16 *)s.part[INNER_NF] + row * inner, inner);
            rows_times_transpose(inner_rows, rows, down_of(weights, e), hidden, s, rows_out + first * hidden,
                                 up_soon(weights, e + threads, after, offsets[last + 1] - offsets[last]));
        }
        sum_rows(rows_out, slots, out, count, choices, hidden);
    }
}

// Gradients by x, by the weights of its choices and by those of experts. `gate_up` is computed again where it is NULL.
void experts_backward(const bf16 *grad, const bf16 *x, const float *token_weights, const int64_t *slots,
                      const int64_t *tokens, const int64_t *offsets, const char *gate_up_weight, const char *down_weight,
                      const bf16 *gate_up, bf16 *grad_x, float *grad_token_weights, char *grad_gate_up_weight,
                      char *grad_down_weight, bf16 *grad_rows, float *scale, float *grad_scale, bf16 *memory,
                      long count, long choices, long experts, long hidden, long inner, long wide, long threads) {
    tables weights = {gate_up_weight, down_weight, experts, hidden, inner, wide};
    tables grads = {grad_gate_up_weight, grad_down_weight, experts, hidden, inner, wide};
#pragma omp parallel num_threads(threads)
    {
        scratch s = own_scratch(memory, most_rows(offsets, experts), hidden, inner, BACKWARD);
#pragma omp for schedule(static)
        for (long pair = 0; pair < count * choices; pair++) scale[slots[pair]] = token_weights[pair];
#pragma omp for schedule(dynamic)
        for (long e = 0; e < experts; e++) {
            long first = offsets[e], rows = offsets[e + 1] - first;
            matrix x_rows = {x, hidden, 0, tokens + first}, grad_out = {grad, hidden, 0, tokens + first};
            long last = lesser(e + threads, experts - 1);
            matrix after = {grad, hidden, 0, tokens + offsets[last]};
            matrix inner_rows = {s.part[INNER_NF], inner, 0, NULL};
            matrix grad_middle = {s.part[GRAD_GATE_UP_NG], 2 * inner, 0, NULL};
            const bf16 *middle = gate_up ? gate_up + first * 2 * inner : s.part[GATE_UP_NG];
            if (!gate_up)
                rows_times_transpose(x_rows, rows, up_of(weights, e), 2 * inner, s, s.part[GATE_UP_NG],
                                     down_soon(weights, e, NOTHING, 0));
            rows_times(grad_out, rows, down_of(weights, e), s, s.part[GRAD_INNER_NF], down_soon(grads, e, x_rows, rows));
            for (long row = 0; row < rows; row++)
                grad_scale[first + row] = gated_row_backward(
                    (bf16 *)s.part[GRAD_INNER_NF] + row * inner, middle + row * 2 * inner, scale[first + row],
                    (bf16 *)s.part[INNER_NF] + row * inner, (bf16 *)s.part[GRAD_GATE_UP_NG] + row * 2 * inner, inner);
            columns_times(grad_out, inner_rows, rows, s, down_of(grads, e), up_soon(grads, e, NOTHING, 0));
            columns_times(grad_middle, x_rows, rows, s, up_of(grads, e), up_soon(weights, e, NOTHING, 0));
            rows_times(grad_middle, rows, up_of(weights, e), s, grad_rows + first * hidden,
                       down_soon(weights, e + threads, after, offsets[last + 1] - offsets[last]));
        }
#pragma omp for schedule(static) nowait
        for (long pair = 0; pair < count * choices; pair++) grad_token_weights[pair] = grad_scale[slots[pair]];
        sum_rows(grad_rows, slots, grad_x, count, choices, hidden);
    }
}
#endif
