// Products of Newton-Schulz: results are symmetric, so that one side of the diagonal is computed and then mirrored. A
// matrix is one thread's work, so that no number of threads changes a result.
//
// Letters in shapes: M matrices, S rows and columns of a result, K the summed axis.
#include "vectors.h"

#ifdef __AVX512BF16__
#include <omp.h>
#include "gemm.h"

// to = alpha sums + beta added, from the sums up to the diagonal; nothing may be added. LANES x LANES values at a time.
static void combine(const float *sums, const bf16 *added, bf16 *to, long side, float alpha, float beta) {
    for (long row = 0; row < side; row += LANES)
        for (long column = 0; column <= row; column += LANES) {
            long rows = lesser(LANES, side - row), columns = lesser(LANES, side - column);
            __m512i block[LANES];
            for (int i = 0; i < LANES; i++) {
                long at = (row + lesser(i, rows - 1)) * side + column;
                floats x = load_wide(sums + at, columns) * alpha;
                if (added) x += load(added + at, columns) * beta;
                store(to + at, x, columns);
                block[i] = (__m512i)x;
            }
            if (row == column) continue;
            transpose(block);
            for (int i = 0; i < columns; i++) store(to + (column + i) * side + row, (floats)block[i], rows);
        }
}

// sums [S, S] = a b up to the diagonal; `a` [S, K] lies as [K, S] if `turned`, and else `b` [K, S] as [S, K] if `own`.
static void half_product(const bf16 *a, const bf16 *b, float *sums, pair *lefts, pair *rights, long side, long inner,
                         long turned, long own) {
    long pairs = (inner + 1) / 2;
    matrix by_rows = {a, side, 0, NULL}, right_factor = {b, own ? inner : side, 0, NULL};
    if (own) panels_of_rows(right_factor, side, rights);
    else panels_of_columns(right_factor, inner, 0, side, rights);
    right packed = {rights, pairs};
    if (!turned) return product(rows_of(a, inner), side, packed, side, pairs, sums, WIDE, 0);
    panels_of_columns(by_rows, inner, 0, side, lefts);
    product_of_panels(lefts, side, packed, side, sums, WIDE, 0);
}

// to [M, S, S] = alpha a b + beta added, all symmetric; factors lie as in `half_product`, K is even unless `turned`.
void symmetric_products(const bf16 *a, const bf16 *b, const bf16 *added, bf16 *to, pair *lefts, pair *rights,
                        float *sums, long matrices, long side, long inner, long turned, long own, long threads,
                        float alpha, float beta) {
    long packed = padded(side, PANEL) * ((inner + 1) / 2), values = side * inner, size = side * side;
#pragma omp parallel num_threads(threads)
    {
        long thread = omp_get_thread_num();
        float *mine = sums + thread * size;
#pragma omp for schedule(static)
        for (long m = 0; m < matrices; m++) {
            half_product(a + m * values, b + m * values, mine, lefts + thread * packed, rights + thread * packed, side,
                         inner, turned, own);
            combine(mine, added ? added + m * size : NULL, to + m * size, side, alpha, beta);
        }
    }
}
#endif
