// A gated MLP in training, a few rows at a time: what they become between its products stays in a thread's caches. A sum
// is one thread's work from its first term to its last, so that no number of threads changes it.
//
// Letters in shapes: N rows, D hidden, F inner width, G = 2F, R rows of a block.
#include "vectors.h"

#ifdef __AVX512BF16__
#include <omp.h>
#include "activation.h"
#include "gemm.h"

// One thread's memory for a block.
typedef struct {
    bf16 *inner_RF, *grad_inner_RF, *gate_up_RG, *grad_gate_up_RG;
} scratch;

long gated_mlp_scratch(long inner) { return BLOCK * 6 * inner; }

static scratch own_scratch(bf16 *memory, long inner) {
    bf16 *mine = memory + omp_get_thread_num() * gated_mlp_scratch(inner);
    return (scratch){mine, mine + BLOCK * inner, mine + 2 * BLOCK * inner, mine + 4 * BLOCK * inner};
}

// Gate and up [N, G] and the output [N, D] of x [N, D] and weights [G, D] and [D, F].
void gated_mlp(const bf16 *x, const void *up_weight, const void *down_weight, bf16 *gate_up, bf16 *out, pair *up_panels,
               pair *down_panels, bf16 *memory, long rows, long hidden, long inner, long wide, long threads) {
#pragma omp parallel num_threads(threads)
    {
        scratch s = own_scratch(memory, inner);
        pack_rows((matrix){up_weight, hidden, wide, NULL}, 2 * inner, up_panels);
        pack_rows((matrix){down_weight, inner, wide, NULL}, hidden, down_panels);
#pragma omp for schedule(static)
        for (long first = 0; first < rows; first += BLOCK) {
            long count = lesser(BLOCK, rows - first);
            bf16 *middle = gate_up + first * 2 * inner;
            times(x + first * hidden, count, hidden, up_panels, 2 * inner, middle);
            for (long row = 0; row < count; row++)
                gated_row(middle + row * 2 * inner, 1, s.inner_RF + row * inner, inner);
            times(s.inner_RF, count, inner, down_panels, hidden, out + first * hidden);
        }
    }
}

// A block's columns as panels: part of those of all rows, of which `first` come before.
static void pack_block(const bf16 *block, long count, long first, long width, long rows, pair *panels) {
    for (long column = 0; column < width; column += PANEL)
        panels_of_columns((matrix){block, width, 0, NULL}, count, column, lesser(PANEL, width - column),
                          in_panel(panels, column, (rows + 1) / 2) + first / 2 * PANEL);
}

// out [A, B] = a^T b of packed columns; while a thread multiplies one panel of a, it brings in the next.
static void panels_times(const pair *a, long a_width, const pair *b, long b_width, long rows, char *out, long wide) {
    long pairs = (rows + 1) / 2;
#pragma omp for schedule(static)
    for (long column = 0; column < a_width; column += PANEL) {
        const pair *after = a + lesser(column + PANEL, padded(a_width, PANEL)) * pairs;
        const pair *end = a + lesser(column + 2 * PANEL, padded(a_width, PANEL)) * pairs;
        next soon = {(const char *)after, (const char *)end, {0}, 0, 0};
        product_of_panels(a + column * pairs, lesser(PANEL, a_width - column), (right){b, pairs}, b_width,
                          out + column * b_width * (wide ? 4 : 2), wide ? WIDE : NARROW, EVERYWHERE, &soon);
    }
}

// Gradients by x and by the weights. `gate_up` is computed again where it is NULL, and only then `up_rows` is used.
void gated_mlp_backward(const bf16 *grad, const bf16 *x, const void *up_weight, const void *down_weight,
                        const bf16 *gate_up, bf16 *grad_x, void *grad_up, void *grad_down, pair *up_rows,
                        pair *up_columns, pair *down_columns, pair *x_panels, pair *grad_panels, pair *middle_panels,
                        pair *inner_panels, bf16 *memory, long rows, long hidden, long inner, long wide, long threads) {
    matrix up = {up_weight, hidden, wide, NULL}, down = {down_weight, inner, wide, NULL};
#pragma omp parallel num_threads(threads)
    {
        scratch s = own_scratch(memory, inner);
        if (!gate_up) pack_rows(up, 2 * inner, up_rows);
        pack_columns(up, 2 * inner, up_columns);
        pack_columns(down, hidden, down_columns);
#pragma omp for schedule(static)
        for (long first = 0; first < rows; first += BLOCK) {
            long count = lesser(BLOCK, rows - first);
            const bf16 *middle = gate_up ? gate_up + first * 2 * inner : s.gate_up_RG;
            if (!gate_up) times(x + first * hidden, count, hidden, up_rows, 2 * inner, s.gate_up_RG);
            times(grad + first * hidden, count, hidden, down_columns, inner, s.grad_inner_RF);
            for (long row = 0; row < count; row++)
                gated_row_backward(s.grad_inner_RF + row * inner, middle + row * 2 * inner, 1, s.inner_RF + row * inner,
                                   s.grad_gate_up_RG + row * 2 * inner, inner);
            times(s.grad_gate_up_RG, count, 2 * inner, up_columns, hidden, grad_x + first * hidden);
            pack_block(s.grad_gate_up_RG, count, first, 2 * inner, rows, middle_panels);
            pack_block(s.inner_RF, count, first, inner, rows, inner_panels);
            pack_block(x + first * hidden, count, first, hidden, rows, x_panels);
            pack_block(grad + first * hidden, count, first, hidden, rows, grad_panels);
        }
        panels_times(grad_panels, hidden, inner_panels, inner, rows, grad_down, wide);
        panels_times(middle_panels, 2 * inner, x_panels, hidden, rows, grad_up, wide);
    }
}
#endif
