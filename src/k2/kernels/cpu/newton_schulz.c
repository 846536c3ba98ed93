// Newton-Schulz of small bfloat16 matrices, each from its first product to its last while it is in the caches. Products
// of a matrix with its transpose and of polynomials of one matrix are symmetric: one side of the diagonal is computed
// and then mirrored. A matrix is one thread's work, so that no number of threads changes a result.
//
// Letters in shapes: M matrices, S shorter and L longer side; a matrix is [S, L], or [L, S] if tall.
#include <math.h>
#include "vectors.h"

#ifdef __AVX512BF16__
#include <omp.h>
#include "gemm.h"

#define EPS 1e-7f  // smallest norm that is divided by, as in k2.optim.newton_schulz

enum { GRAM, FIRST, SECOND, OUT, SQUARES };
enum { SUMS = SQUARES, PACKED, PARTS };

// A matrix and what one thread works with: float32 sums, a packed factor, and polynomials of the Gram matrix [S, S].
typedef struct {
    long side, length, tall;
    bf16 *x;
    float *sums;
    pair *packed;
    bf16 *square[SQUARES];
} work;

// Where each part starts in a thread's memory, in values of two bytes, and where the last one ends.
static long starts(long side, long length, long *start) {
    long square = side * side, factor = padded(side, PANEL) * length, other = side * padded(length, PANEL);
    long size[PARTS] = {square, square, square, square, 2 * side * length, factor > other ? factor : other};
    return in_a_row(size, PARTS, start);
}

long newton_schulz_scratch(long side, long length) {
    long start[PARTS];
    return starts(side, length, start);
}

static work own_work(bf16 *memory, long side, long length, long tall) {
    long start[PARTS], size = starts(side, length, start);
    bf16 *mine = memory + omp_get_thread_num() * size;
    work w = {.side = side, .length = length, .tall = tall};
    w.sums = (float *)(mine + start[SUMS]);
    w.packed = (pair *)(mine + start[PACKED]);
    for (int i = 0; i < SQUARES; i++) w.square[i] = mine + start[i];
    return w;
}

// to = alpha sums + beta added, from the sums up to the diagonal; nothing may be added. LANES x LANES values at a time.
static void combine(work w, const bf16 *added, bf16 *to, float alpha, float beta) {
    long side = w.side;
    for (long row = 0; row < side; row += LANES)
        for (long column = 0; column <= row; column += LANES) {
            long rows = lesser(LANES, side - row), columns = lesser(LANES, side - column);
            __m512i block[LANES];
            for (int i = 0; i < LANES; i++) {
                long at = (row + lesser(i, rows - 1)) * side + column;
                floats x = load_wide(w.sums + at, columns) * alpha;
                if (added) x += load(added + at, columns) * beta;
                store(to + at, x, columns);
                block[i] = (__m512i)x;
            }
            if (row == column) continue;
            transpose(block);
            for (int i = 0; i < columns; i++) store(to + (column + i) * side + row, (floats)block[i], rows);
        }
}

// sums = X X^T of [S, L] or X^T X of [L, S], up to the diagonal.
static void gram_sums(work w) {
    matrix x = {w.x, w.tall ? w.side : w.length, 0, NULL};
    right packed = {w.packed, w.length / 2};
    if (w.tall) {
        panels_of_columns(x, w.length, 0, w.side, w.packed);
        return product_of_panels(w.packed, w.side, packed, w.side, w.sums, WIDE, 0, NULL);
    }
    panels_of_rows(x, w.side, w.packed);
    product(rows_of(w.x, w.length), w.side, packed, w.side, w.length / 2, w.sums, WIDE, 0, NULL);
}

// sums = a b up to the diagonal, for polynomials of one Gram matrix.
static void square_sums(work w, const bf16 *a, const bf16 *b) {
    panels_of_columns((matrix){b, w.side, 0, NULL}, w.side, 0, w.side, w.packed);
    product(rows_of(a, w.side), w.side, (right){w.packed, w.side / 2}, w.side, w.side / 2, w.sums, WIDE, 0, NULL);
}

// to = alpha a b + beta added.
static void multiply(work w, const bf16 *a, const bf16 *b, const bf16 *added, bf16 *to, float alpha, float beta) {
    square_sums(w, a, b);
    combine(w, added, to, alpha, beta);
}

// X <- (scale X + P X) factor, from the other side when X is tall.
static void apply(work w, const bf16 *square, float scale, float factor) {
    long count = w.side * w.length;
    const bf16 *from = w.tall ? square : w.x;
    long width = w.tall ? w.side : w.length;
    panels_of_columns((matrix){from, width, 0, NULL}, w.side, 0, width, w.packed);
    EACH(count, store_wide(w.sums + i, load(w.x + i, n) * scale, n);)
    product(rows_of(w.tall ? w.x : square, w.side), w.tall ? w.length : w.side, (right){w.packed, w.side / 2}, width,
            w.side / 2, w.sums, ADDED, EVERYWHERE, NULL);
    EACH(count, store(w.x + i, load_wide(w.sums + i, n) * factor, n);)
}

static float trace(work w) {
    float total = 0;
    for (long i = 0; i < w.side; i++) total += w.sums[i * w.side + i];
    return total;
}

// Frobenius norm of a symmetric matrix of which `sums` has what lies up to the diagonal.
static float norm_of_half(work w) {
    float total = 0;
    for (long row = 0; row < w.side; row++) {
        const float *values = w.sums + row * w.side;
        floats squares = {0};
        EACH(row, floats x = load_wide(values + i, n); squares += x * x;)
        total += 2 * sum(squares) + values[row] * values[row];
    }
    return sqrtf(total);
}

// The first iteration, a b c its polynomial. X has no norm of one yet: its Gram matrix is divided by the Frobenius norm's
// square, powers of it as it comes would underflow; and if `tight` by the Schatten 8-norm's too.
static void first_iteration(work w, const float *p, long tight) {
    gram_sums(w);
    float norm = sqrtf(fmaxf(trace(w), EPS * EPS)), ratio = 1, fourth = 1;
    combine(w, NULL, w.square[GRAM], 1 / norm / norm, 0);
    square_sums(w, w.square[GRAM], w.square[GRAM]);
    if (tight) {
        fourth = fmaxf(norm_of_half(w), EPS);
        ratio = sqrtf(sqrtf(fourth));
    }
    combine(w, w.square[GRAM], w.square[FIRST], p[2] / fourth, p[1] / ratio / ratio);
    apply(w, w.square[FIRST], p[0], 1 / norm / ratio);
}

static void iteration(work w, const float *p) {
    gram_sums(w);
    combine(w, NULL, w.square[GRAM], 1, 0);
    multiply(w, w.square[GRAM], w.square[GRAM], w.square[GRAM], w.square[FIRST], p[2], p[1]);
    apply(w, w.square[FIRST], p[0], 1);
}

// Two iterations on the Gram matrix without looking at X between them: all matrices commute, so the next one is PGP.
static void pair_of_iterations(work w, const float *p) {
    bf16 *gram = w.square[GRAM], *first = w.square[FIRST], *second = w.square[SECOND], *out = w.square[OUT];
    const float *q = p + 3;
    gram_sums(w);
    combine(w, NULL, gram, 1, 0);
    multiply(w, gram, gram, gram, first, p[2], p[1]);
    multiply(w, first, gram, gram, out, 1, p[0]);
    multiply(w, first, out, out, gram, 1, p[0]);
    multiply(w, gram, gram, gram, second, q[2], q[1]);
    multiply(w, second, first, first, out, 1, q[0]);
    EACH(w.side * w.side, store(out + i, load(out + i, n) + load(second + i, n) * p[0], n);)
    apply(w, out, p[0] * q[0], 1);
}

// In place on x [M, S, L], or [M, L, S] if `tall`: polynomials a b c of all iterations, in runs of one or two of them.
void newton_schulz(bf16 *x, const float *polynomials, const int64_t *lengths, bf16 *memory, long matrices, long side,
                   long length, long tall, long runs, long tight, long threads) {
#pragma omp parallel num_threads(threads)
    {
        work w = own_work(memory, side, length, tall);
#pragma omp for schedule(static)
        for (long m = 0; m < matrices; m++) {
            const float *next = polynomials;
            w.x = x + m * side * length;
            first_iteration(w, next, tight);
            for (long run = 1; run < runs; run++) {
                next += 3 * lengths[run - 1];
                if (lengths[run] == 1) iteration(w, next);
                else pair_of_iterations(w, next);
            }
        }
    }
}
#endif
