// Products of any bfloat16 matrices by AVX-512's dot products of pairs, for training: what a small product needs beside
// arithmetic is little here, and much in a library that has to find and start its kernel first. (`products.h` is for
// few rows and matrices that were packed long before.)
//
// Pairs are two neighbours along the summed axis. The left factor's are read one by one, each for a whole row of
// lanes; the right one's lie in panels, PANEL columns wide: [panel][pair][column], zero where there is no column.
#pragma once
#include <immintrin.h>
#include "vectors.h"

#define INLINE static inline __attribute__((always_inline))
#define TILE 6  // rows of a tile: with VECTORS columns of lanes the sums fill 24 of 32 registers
#define VECTORS 4
#define PANEL (VECTORS * LANES)
#define LINE 64  // bytes that caches read at once
#define EVERYWHERE (1L << 40)
#define BLOCK (8 * TILE)  // rows that stay in a core's caches: even, so that pairs of rows do not cross its end

typedef uint32_t pair;

// A matrix of float32 or bfloat16 whose rows follow each other, or are those at `index`.
typedef struct {
    const void *start;
    long width;
    int wide;
    const int64_t *index;
} matrix;

// Pairs of one matrix as a left factor: how far the next row and the next pair are. Rows may be those at `index`.
typedef struct {
    const pair *start;
    long row, pair;
    const int64_t *index;
} left;

static inline left rows_of(const bf16 *start, long width) { return (left){(const pair *)start, width / 2, 1, NULL}; }

// A bfloat16 matrix whose width is even.
static inline left factor(matrix m) { return (left){m.start, m.width / 2, 1, m.index}; }

// A packed right factor: how many pairs a panel has in memory.
typedef struct {
    const pair *panels;
    long pairs;
} right;

// What is used after a product, which meanwhile brings it into the caches: memory, a line with each pair of a tile, then
// rows of a matrix, some with each tile.
typedef struct {
    const char *line, *end;
    matrix rows;
    long row, count;
} next;

// What a product becomes: bfloat16, float32, or float32 that is added to what is there.
enum { NARROW, WIDE, ADDED };

static inline long padded(long count, long multiple) { return (count + multiple - 1) / multiple * multiple; }

// Where parts of so many values of two bytes start, one after the other on cache lines of their own, and where they end.
static inline long in_a_row(const long *sizes, int parts, long *starts) {
    long end = 0;
    for (int part = 0; part < parts; part++) {
        starts[part] = end;
        end += padded(sizes[part], LINE / 2);
    }
    return end;
}

INLINE __mmask16 lanes_below(long count) { return count >= LANES ? 0xffff : (1u << lesser(count, LANES)) - 1; }

static inline const void *row_of(matrix m, long row) {
    return (const char *)m.start + (m.index ? m.index[row] : row) * m.width * (m.wide ? 4 : 2);
}

static inline matrix below(matrix m, long row) {
    m.start = row_of(m, row);
    return m;
}

// Where a column, a multiple of LANES, begins.
static inline pair *in_panel(pair *panels, long column, long pairs) {
    return panels + column / PANEL * PANEL * pairs + column % PANEL;
}

// The 2 LANES values of a row from `column` on as bfloat16, zero beyond its end.
INLINE __m512i values_at(matrix m, long row, long column) {
    const char *from = (const char *)row_of(m, row) + column * (m.wide ? 4 : 2);
    long count = m.width - column;
    if (!m.wide) return _mm512_maskz_loadu_epi16(count >= 32 ? 0xffffffff : (1u << count) - 1, from);
    __m512 low = _mm512_maskz_loadu_ps(lanes_below(count), from);
    __m512 high = _mm512_maskz_loadu_ps(count > LANES ? lanes_below(count - LANES) : 0, from + 4 * LANES);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// 16 rows of 16 pairs become 16 rows of the other index, by exchanging ever smaller blocks beside the diagonal.
INLINE void transpose(__m512i *rows) {
    const __m512i lane = (__m512i)NUMBERS;
#pragma GCC unroll 4
    for (int distance = 8; distance; distance /= 2) {
        const __mmask16 odd = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(distance));
        const __m512i there = _mm512_set1_epi32(distance), other = _mm512_set1_epi32(LANES);
        const __m512i from_right = _mm512_add_epi32(_mm512_sub_epi32(lane, there), other);
        const __m512i low = _mm512_mask_blend_epi32(odd, lane, from_right);
        const __m512i high = _mm512_mask_blend_epi32(odd, _mm512_add_epi32(lane, there), _mm512_add_epi32(lane, other));
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & distance) continue;
            __m512i a = rows[i], b = rows[i + distance];
            rows[i] = _mm512_permutex2var_epi32(a, low, b);
            rows[i + distance] = _mm512_permutex2var_epi32(a, high, b);
        }
    }
}

// Panels of the transposed matrix: columns are its rows, pairs are neighbours in a row.
static void panels_of_rows(matrix m, long rows, pair *to) {
    long pairs = m.width / 2;
    for (long row = 0; row < rows; row += LANES) {
        pair *panel = in_panel(to, row, pairs);
        for (long k = 0; k < pairs; k += LANES) {
            __m512i block[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                block[i] = row + i < rows ? values_at(m, row + i, 2 * k) : _mm512_setzero_si512();
            transpose(block);
            for (int i = 0; i < lesser(LANES, pairs - k); i++) _mm512_storeu_si512(panel + (k + i) * PANEL, block[i]);
        }
    }
}

// Panels of `columns` columns of the matrix itself: pairs are neighbours in one; an odd last row is paired with zeros.
static void panels_of_columns(matrix m, long rows, long first, long columns, pair *to) {
    const __m512i lane = (__m512i)NUMBERS, second = _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(32)), 16);
    const __m512i low = _mm512_or_si512(lane, second), high = _mm512_add_epi16(low, _mm512_set1_epi16(LANES));
    long pairs = (rows + 1) / 2;
    for (long k = 0; k < pairs; k++)
        for (long column = 0; column < columns; column += 2 * LANES) {
            pair *panel = in_panel(to, column, pairs) + k * PANEL;
            __m512i even = values_at(m, 2 * k, first + column);
            __m512i odd = 2 * k + 1 < rows ? values_at(m, 2 * k + 1, first + column) : _mm512_setzero_si512();
            _mm512_storeu_si512(panel, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_storeu_si512(panel + LANES, _mm512_permutex2var_epi16(even, high, odd));
        }
}

// `rows` x `vectors` LANES sums over `pairs`, `stride` apart in each row of the left factor, into `out`, whose row has
// `columns` left and `width` in all.
INLINE void tile(const pair *const *a, long stride, const pair *b, long pairs, void *out, int form, long width,
                 long columns, const char *line, long step, const int rows, const int vectors) {
    __m512 sums[TILE][VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sums[r][v] = form == ADDED ? _mm512_maskz_loadu_ps(lanes_below(columns - v * LANES),
                                                               (float *)out + r * width + v * LANES)
                                       : _mm512_setzero_ps();
    for (long k = 0; k < pairs; k++) {
        _mm_prefetch(line + k * step, _MM_HINT_T1);
        __m512i lanes[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) lanes[v] = _mm512_loadu_si512(b + k * PANEL + v * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            __m512i each = _mm512_set1_epi32(a[r][k * stride]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                sums[r][v] = _mm512_dpbf16_ps(sums[r][v], (__m512bh)each, (__m512bh)lanes[v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            __mmask16 mask = lanes_below(columns - v * LANES);
            long at = r * width + v * LANES;
            if (form != NARROW) _mm512_mask_storeu_ps((float *)out + at, mask, sums[r][v]);
            else _mm256_mask_storeu_epi16((bf16 *)out + at, mask, (__m256i)_mm512_cvtneps_pbh(sums[r][v]));
        }
}

#define TILE_OF(rows)                                                                                      \
    case rows:                                                                                             \
        if (vectors == VECTORS) tile(a, stride, b, pairs, out, form, width, columns, line, step, rows, VECTORS); \
        else                                                                                               \
            for (long v = 0; v < vectors; v++)                                                             \
                tile(a, stride, b + v * LANES, pairs, (char *)out + v * LANES * (form == NARROW ? 2 : 4), form,    \
                     width, columns - v * LANES, line, step, rows, 1);                                     \
        break;

// As `tile`, for any number of rows up to TILE and of vectors up to VECTORS.
INLINE void any_tile(const pair *const *a, long stride, const pair *b, long pairs, void *out, int form, long width,
                     long columns, const char *line, long step, long rows) {
    long vectors = lesser(VECTORS, (columns + LANES - 1) / LANES);
    switch (rows) { TILE_OF(1) TILE_OF(2) TILE_OF(3) TILE_OF(4) TILE_OF(5) TILE_OF(6) }
}

static inline const pair *left_row(left a, long row) { return a.start + (a.index ? a.index[row] : row) * a.row; }

// The next rows.
static void fetch_rows(next *soon) {
    for (long last = lesser(soon->row + TILE, soon->count); soon->row < last; soon->row++) {
        const char *line = (const char *)row_of(soon->rows, soon->row);
        for (long at = 0; at < soon->rows.width * 2; at += LINE) _mm_prefetch(line + at, _MM_HINT_T1);
    }
}

// out [rows, columns] in some form from left [rows, pairs] times a packed factor, of which the first `pairs` count. If
// the rows are those from `diagonal` on of a square and not EVERYWHERE is wanted, what lies right of its diagonal is left
// out, up to LANES - 1. `soon` may be NULL.
static void product(left a, long rows, right b, long columns, long pairs, void *out, int form, long diagonal,
                    next *soon) {
    long size = form == NARROW ? 2 : 4;
    for (long column = 0; column < columns; column += PANEL)
        for (long row = column > diagonal ? (column - diagonal) / TILE * TILE : 0; row < rows; row += TILE) {
            const pair *from[TILE];
            for (long r = 0; r < TILE; r++) from[r] = left_row(a, lesser(row + r, rows - 1));
            void *to = (char *)out + (row * columns + column) * size;
            long end = lesser(columns, padded(diagonal + row + TILE, LANES));
            long step = soon && soon->line < soon->end ? LINE : 0;
            if (soon && !step) fetch_rows(soon);
            const char *line = step ? soon->line : (const char *)from[0];
            any_tile(from, a.pair, b.panels + column * b.pairs, pairs, to, form, columns, end - column, line, step,
                     lesser(TILE, rows - row));
            if (step) soon->line += pairs * LINE;
        }
}

// As `product`, of a left factor that lies in panels of columns too, all of whose pairs count.
static void product_of_panels(const pair *lefts, long rows, right b, long columns, void *out, int form, long diagonal,
                              next *soon) {
    for (long row = 0; row < rows; row += PANEL)
        product((left){lefts + row * b.pairs, 1, PANEL, NULL}, lesser(PANEL, rows - row), b, columns, b.pairs,
                (char *)out + row * columns * (form == NARROW ? 2 : 4), form, diagonal + row, soon);
}

// `panels_of_rows` and `panels_of_columns` by all threads, a panel each.
static inline void pack_rows(matrix m, long rows, pair *panels) {
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row += PANEL)
        panels_of_rows(below(m, row), lesser(PANEL, rows - row), in_panel(panels, row, m.width / 2));
}

static inline void pack_columns(matrix m, long rows, pair *panels) {
#pragma omp for schedule(static)
    for (long column = 0; column < m.width; column += PANEL)
        panels_of_columns(m, rows, column, lesser(PANEL, m.width - column), in_panel(panels, column, (rows + 1) / 2));
}

// out [rows, columns] = x [rows, width] times a packed factor.
static inline void times(const bf16 *x, long rows, long width, const pair *panels, long columns, bf16 *out) {
    product(rows_of(x, width), rows, (right){panels, width / 2}, columns, width / 2, out, NARROW, EVERYWHERE, NULL);
}
