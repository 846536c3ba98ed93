// Causal attention in training: a few queries at a time against the keys up to the last of them, in a thread's own
// memory. Probabilities are not kept but computed again. A head of a sequence is one thread's work, so that no number
// of threads changes a result.
//
// Letters in shapes: B batch, H heads, L length, X query and key width, V value width, N queries of a block.
#include "vectors.h"

#ifdef __AVX512BF16__
#include <math.h>
#include <omp.h>
#include "gemm.h"

#define QUERIES (8 * TILE)  // of a block: more need fewer passes over the keys and look at more keys in vain

typedef struct {
    long batch, heads, length, width, values;
    float scale;
} sizes;

// What one thread works with; packed factors are called after what they are packed from, by rows or by columns.
enum { KEY_ROWS, KEY_COLUMNS, VALUE_ROWS, VALUE_COLUMNS, LOGITS_NL, SHARES_NL, GRAD_NL, SLOPES_NL, GRAD_NV, LEFT, RIGHT,
       TOTAL_LX, TOTAL_LV, PARTS };

// Where each part starts in a thread's memory, in values of two bytes, and where the last one ends.
static long starts(sizes s, long *start) {
    long even = padded(s.length, 2), long_panels = padded(s.length, PANEL), widest = s.width > s.values ? s.width : s.values;
    long size[PARTS] = {
        long_panels * s.width, even * padded(s.width, PANEL), long_panels * s.values, even * padded(s.values, PANEL),
        2 * QUERIES * even, QUERIES * even, 2 * QUERIES * even, QUERIES * even, QUERIES * s.values,
        QUERIES * long_panels, QUERIES * padded(widest, PANEL), 2 * s.length * s.width, 2 * s.length * s.values,
    };
    return in_a_row(size, PARTS, start);
}

long causal_scratch(long length, long width, long values) {
    long start[PARTS];
    return starts((sizes){.length = length, .width = width, .values = values}, start);
}

typedef struct {
    void *part[PARTS];
} scratch;

static scratch own_scratch(bf16 *memory, sizes s) {
    long start[PARTS], size = starts(s, start);
    scratch mine;
    for (int part = 0; part < PARTS; part++) mine.part[part] = memory + omp_get_thread_num() * size + start[part];
    return mine;
}

// Some queries of one head: the first, how many, and keys up to the last; an even number of them in memory.
typedef struct {
    long matrix, start, rows, stop, room;
    const float *bias;
} block;

static block block_from(sizes s, long matrix, long start, const float *bias) {
    long rows = lesser(QUERIES, s.length - start), stop = start + rows, sequence = matrix / s.heads;
    return (block){matrix, start, rows, stop, padded(stop, 2),
                   bias ? bias + (sequence * s.length + start) * s.length : NULL};
}

// Row `row` of a block in a tensor [B, L, H, V].
static long by_token(sizes s, block b, long row) {
    return ((b.matrix / s.heads * s.length + b.start + row) * s.heads + b.matrix % s.heads) * s.values;
}

// Logits of a block before they are scaled, float32 [N, stop].
static void logits_of(sizes s, block b, const bf16 *q, scratch mine) {
    product(rows_of(q + (b.matrix * s.length + b.start) * s.width, s.width), b.rows,
            (right){mine.part[KEY_ROWS], s.width / 2}, b.stop, s.width / 2, mine.part[LOGITS_NL], WIDE, b.start, NULL);
}

// Exponentials of the first `seen` logits, scaled and plus `bias`, over the largest, as bfloat16 with zeros up to `room`.
// Returns the largest, and the sum of the exponentials.
static float exponentials(float *logits, float scale, const float *bias, long seen, long room, bf16 *to, float *total) {
    floats most = all(-INFINITY), sums = {0};
    EACH(seen,
        floats x = load_wide(logits + i, n) * scale;
        if (bias) x += load_wide(bias + i, n);
        if (n < LANES) x = either(NUMBERS < (int32_t)n, x, all(-INFINITY));
        store_wide(logits + i, x, n);
        most = larger(x, most);)
    float top = largest(most);
    EACH(seen,
        floats x = load_wide(logits + i, n);
        if (n < LANES) x = either(NUMBERS < (int32_t)n, x, all(-INFINITY));
        x = exponential(x - top);
        store(to + i, x, n);
        sums += x;)
    memset(to + seen, 0, (room - seen) * sizeof *to);
    *total = sum(sums);
    return top;
}

// out [N, width] = left [N, room] of a block times columns of keys or values; rows see few more keys than they may.
static void mix(block b, const bf16 *left, const pair *panels, long key_pairs, long width, void *out, int form) {
    for (long row = 0; row < b.rows; row += TILE) {
        long count = lesser(TILE, b.rows - row), keys = b.start + row + count;
        product(rows_of(left + row * b.room, b.room), count, (right){panels, key_pairs}, width, (keys + 1) / 2,
                (char *)out + row * width * (form == NARROW ? 2 : 4), form, EVERYWHERE, NULL);
    }
}

static void narrow_all(const float *from, long count, float factor, bf16 *to) {
    EACH(count, store(to + i, load_wide(from + i, n) * factor, n);)
}

// out [B, L, H, V] of q and k [B, H, L, X] and v [B, H, L, V]; each query's largest logit and the logarithm of the sum
// of its exponentials, both [B, H, L]. `bias` [B, L, L] is added to logits if there is one.
void causal_attention(const bf16 *q, const bf16 *k, const bf16 *v, const float *bias, bf16 *out, float *row_max,
                      float *log_sums, bf16 *memory, long batch, long heads, long length, long width, long values,
                      long threads, float scale) {
    sizes s = {batch, heads, length, width, values, scale};
#pragma omp parallel num_threads(threads)
    {
        scratch mine = own_scratch(memory, s);
        float *logits = mine.part[LOGITS_NL], *mixed = mine.part[TOTAL_LV], totals[QUERIES];
        bf16 *shares = mine.part[SHARES_NL];
#pragma omp for schedule(static)
        for (long m = 0; m < batch * heads; m++) {
            panels_of_rows((matrix){k + m * length * width, width, 0, NULL}, length, mine.part[KEY_ROWS]);
            panels_of_columns((matrix){v + m * length * values, values, 0, NULL}, length, 0, values, mine.part[VALUE_COLUMNS]);
            for (long start = 0; start < length; start += QUERIES) {
                block b = block_from(s, m, start, bias);
                logits_of(s, b, q, mine);
                for (long row = 0; row < b.rows; row++) {
                    const float *allowed = b.bias ? b.bias + row * length : NULL;
                    long seen = start + row + 1, at = m * length + start + row;
                    float top = exponentials(logits + row * b.stop, scale, allowed, seen, b.room, shares + row * b.room,
                                             totals + row);
                    row_max[at] = totals[row] == totals[row] ? top : NAN;
                    log_sums[at] = top + logf(totals[row]);
                }
                mix(b, shares, mine.part[VALUE_COLUMNS], (length + 1) / 2, values, mixed, WIDE);
                for (long row = 0; row < b.rows; row++)
                    narrow_all(mixed + row * values, values, 1.0f / totals[row], out + by_token(s, b, row));
            }
        }
    }
}

// Probabilities [N, room] of a block once more, and the slope of the loss by its logits.
static void slopes_of(sizes s, block b, const float *log_sums, scratch mine) {
    bf16 *shares = mine.part[SHARES_NL], *slopes = mine.part[SLOPES_NL];
    for (long row = 0; row < b.rows; row++) {
        float *logits = (float *)mine.part[LOGITS_NL] + row * b.stop;
        const float *grad = (float *)mine.part[GRAD_NL] + row * b.stop, *bias = b.bias ? b.bias + row * s.length : NULL;
        float log_sum = log_sums[b.matrix * s.length + b.start + row];
        bf16 *share = shares + row * b.room, *slope = slopes + row * b.room;
        long seen = b.start + row + 1, rest = (b.room - seen) * sizeof *share;
        floats dots = {0};
        EACH(seen,
            floats x = load_wide(logits + i, n) * s.scale - log_sum;
            if (bias) x += load_wide(bias + i, n);
            x = exponential(x);
            store_wide(logits + i, x, n);
            store(share + i, x, n);
            dots += x * load_wide(grad + i, n);)
        float mean = sum(dots);
        EACH(seen, store(slope + i, load_wide(logits + i, n) * (load_wide(grad + i, n) - mean) * s.scale, n);)
        memset(share + seen, 0, rest);
        memset(slope + seen, 0, rest);
    }
}

// total [stop, width] += left^T rows, for a left [N, room] of a block and rows [N, width].
static void add_transposed(block b, const bf16 *left, const bf16 *rows, long width, float *total, scratch mine) {
    panels_of_columns((matrix){left, b.room, 0, NULL}, b.rows, 0, b.room, mine.part[LEFT]);
    panels_of_columns((matrix){rows, width, 0, NULL}, b.rows, 0, width, mine.part[RIGHT]);
    product_of_panels(mine.part[LEFT], b.stop, (right){mine.part[RIGHT], (b.rows + 1) / 2}, width, total, ADDED, EVERYWHERE, NULL);
}

// Gradients by q, k and v of the one by out.
void causal_attention_backward(const bf16 *grad, const bf16 *q, const bf16 *k, const bf16 *v, const float *bias,
                               const float *log_sums, bf16 *grad_q, bf16 *grad_k, bf16 *grad_v, bf16 *memory,
                               long batch, long heads, long length, long width, long values, long threads, float scale) {
    sizes s = {batch, heads, length, width, values, scale};
    long key_pairs = (length + 1) / 2;
#pragma omp parallel num_threads(threads)
    {
        scratch mine = own_scratch(memory, s);
        bf16 *grad_rows = mine.part[GRAD_NV];
        float *total_k = mine.part[TOTAL_LX], *total_v = mine.part[TOTAL_LV];
#pragma omp for schedule(static)
        for (long m = 0; m < batch * heads; m++) {
            const bf16 *queries = q + m * length * width;
            matrix keys = {k + m * length * width, width, 0, NULL};
            panels_of_rows(keys, length, mine.part[KEY_ROWS]);
            panels_of_columns(keys, length, 0, width, mine.part[KEY_COLUMNS]);
            panels_of_rows((matrix){v + m * length * values, values, 0, NULL}, length, mine.part[VALUE_ROWS]);
            memset(total_k, 0, length * width * sizeof *total_k);
            memset(total_v, 0, length * values * sizeof *total_v);
            for (long start = 0; start < length; start += QUERIES) {
                block b = block_from(s, m, start, bias);
                for (long row = 0; row < b.rows; row++)
                    memcpy(grad_rows + row * values, grad + by_token(s, b, row), values * sizeof *grad);
                logits_of(s, b, q, mine);
                product(rows_of(grad_rows, values), b.rows, (right){mine.part[VALUE_ROWS], values / 2}, b.stop, values / 2,
                        mine.part[GRAD_NL], WIDE, start, NULL);
                slopes_of(s, b, log_sums, mine);
                mix(b, mine.part[SLOPES_NL], mine.part[KEY_COLUMNS], key_pairs, width, grad_q + (m * length + start) * width,
                    NARROW);
                add_transposed(b, mine.part[SLOPES_NL], queries + start * width, width, total_k, mine);
                add_transposed(b, mine.part[SHARES_NL], grad_rows, values, total_v, mine);
            }
            narrow_all(total_k, length * width, 1, grad_k + m * length * width);
            narrow_all(total_v, length * values, 1, grad_v + m * length * values);
        }
    }
}
#endif
