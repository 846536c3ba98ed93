// What training does between matrix products, on a CPU: every loop passes its tensors through the caches once.
//
// Letters in shapes: N rows, D width, F inner width, M matrices, Q queries, K keys, L length, T tokens, V vocabulary.
#include <math.h>
#include <stdlib.h>
#include "activation.h"
#include "vectors.h"

#define ROWS 64  // rows of one partial sum over rows: fixed, so that no number of threads changes a sum

// x / sqrt(mean(x^2) + eps) * weight; keeps the factor of every row.
void rms_norm(const bf16 *x, const float *weight, bf16 *out, float *scale, long rows, long width, float eps) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++) {
        const bf16 *from = x + row * width;
        bf16 *to = out + row * width;
        floats squares = {0};
        EACH(width, floats v = load(from + i, n); squares += v * v;)
        float factor = scale[row] = 1.0f / sqrtf(sum(squares) / width + eps);
        EACH(width, store(to + i, load(from + i, n) * factor * load_wide(weight + i, n), n);)
    }
}

// Gradients by x and by the weight; `partial` is memory for a row of sums for every ROWS rows.
void rms_norm_backward(const bf16 *grad, const bf16 *x, const float *weight, const float *scale, bf16 *grad_x,
                       float *grad_weight, float *partial, long rows, long width) {
#pragma omp parallel for schedule(static)
    for (long first = 0; first < rows; first += ROWS) {
        float *total = partial + first / ROWS * width;
        memset(total, 0, width * sizeof *total);
        for (long row = first; row < lesser(first + ROWS, rows); row++) {
            const bf16 *g = grad + row * width, *v = x + row * width;
            bf16 *to = grad_x + row * width;
            float factor = scale[row];
            floats dots = {0};
            EACH(width,
                floats product = load(g + i, n) * load(v + i, n);
                store_wide(total + i, load_wide(total + i, n) + product * factor, n);
                dots += product * load_wide(weight + i, n);)
            float share = -sum(dots) * factor * factor * factor / width;
            EACH(width,
                floats direct = load(g + i, n) * load_wide(weight + i, n) * factor;
                store(to + i, direct + load(v + i, n) * share, n);)
        }
    }
    EACH(width,
        floats total = {0};
        for (long part = 0; part < (rows + ROWS - 1) / ROWS; part++) total += load_wide(partial + part * width + i, n);
        store_wide(grad_weight + i, total, n);)
}

// Each row times its factor.
void scale_rows(const bf16 *x, const float *scale, bf16 *out, long rows, long width) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++)
        EACH(width, store(out + row * width + i, load(x + row * width + i, n) * scale[row], n);)
}

// silu(first half) * second half of each row, times the row's scale: [N, 2F] -> [N, F].
void gated(const bf16 *gate_up, const float *scale, bf16 *out, long rows, long inner) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++)
        gated_row(gate_up + row * 2 * inner, scale[row], out + row * inner, inner);
}

// Gradients by gate, up and scale, and the output once more.
void gated_backward(const bf16 *grad, const bf16 *gate_up, const float *scale, bf16 *out, bf16 *grad_gate_up,
                    float *grad_scale, long rows, long inner) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++)
        grad_scale[row] = gated_row_backward(grad + row * inner, gate_up + row * 2 * inner, scale[row], out + row * inner,
                                             grad_gate_up + row * 2 * inner, inner);
}

// Softmax of the first `seen` logits of a row of `room`, plus `bias` if there is one, in place; the others become zero.
// Returns the largest logit, or NaN if any is, and the sum of the exponentials; `wide` is memory for the row.
static inline float softmax(bf16 *row, const float *bias, long seen, long room, float *wide, float *total) {
    long width = lesser((seen + LANES - 1) / LANES * LANES, room);
    floats most = all(-INFINITY), sums = {0};
    EACH(width,
        floats x = load(row + i, n);
        if (bias) x += load_wide(bias + i, n);
        if (i + LANES > seen) x = either(NUMBERS < (int32_t)(seen - i), x, all(-INFINITY));
        memcpy(wide + i, &x, sizeof x);
        most = larger(x, most);)
    float top = largest(most);
    for (long i = 0; i < width; i += LANES) {
        floats x;
        memcpy(&x, wide + i, sizeof x);
        x = exponential(x - top);
        memcpy(wide + i, &x, sizeof x);
        sums += x;
    }
    float factor = 1.0f / (*total = sum(sums));
    EACH(width,
        floats x;
        memcpy(&x, wide + i, sizeof x);
        store(row + i, x * factor, n);)
    memset(row + width, 0, (room - width) * sizeof *row);
    return *total == *total ? top : NAN;
}

static float *memory(long width) { return aligned_alloc(sizeof(floats), (width / LANES + 1) * sizeof(floats)); }

// Causal softmax in place: logits [M, Q, K] of the queries from `start` on; query i sees start + i + 1 keys, fewer
// where `bias` [M / heads, L, L] says so. Writes the largest logit of each row into `row_max` [M, L].
void causal_softmax(bf16 *logits, const float *bias, float *row_max, long matrices, long queries, long keys, long start,
                    long heads, long length) {
#pragma omp parallel
    {
        float *wide = memory(keys), total;
#pragma omp for schedule(static)
        for (long row = 0; row < matrices * queries; row++) {
            long matrix = row / queries, query = start + row % queries;
            const float *allowed = bias ? bias + (matrix / heads * length + query) * length : NULL;
            long seen = lesser(query + 1, keys);
            row_max[matrix * length + query] = softmax(logits + row * keys, allowed, seen, keys, wide, &total);
        }
        free(wide);
    }
}

// Gradient by the logits, over the gradient by the probabilities, both [M, Q, K].
void causal_softmax_backward(bf16 *grad, const bf16 *probabilities, long matrices, long queries, long keys, long start) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < matrices * queries; row++) {
        long seen = start + row % queries + 1, width = lesser((seen + LANES - 1) / LANES * LANES, keys);
        bf16 *g = grad + row * keys;
        const bf16 *p = probabilities + row * keys;
        floats dots = {0};
        EACH(width, dots += load(g + i, n) * load(p + i, n);)
        float mean = sum(dots);
        EACH(width, store(g + i, load(p + i, n) * (load(g + i, n) - mean), n);)
        memset(g + width, 0, (keys - width) * sizeof *g);
    }
}

// Each target's log-probability [T]; logits [T, V] become softmax minus the target's one-hot.
void surplus(bf16 *logits, const int64_t *targets, float *log_probs, long tokens, long vocabulary) {
#pragma omp parallel
    {
        float *wide = memory(vocabulary), total;
#pragma omp for schedule(static)
        for (long token = 0; token < tokens; token++) {
            bf16 *row = logits + token * vocabulary, *target = row + targets[token];
            float chosen = load(target, 1)[0], top = softmax(row, NULL, vocabulary, vocabulary, wide, &total);
            log_probs[token] = chosen - top - logf(total);
            store(target, all(wide[targets[token]] / total - 1.0f), 1);
        }
        free(wide);
    }
}

// Momentum of matrices that lie `stride` apart: m <- m + (g - m) share, and what is orthogonalised, g + (m - g) ahead.
void momentum(const float *grad, float *average, bf16 *out, long matrices, long size, long stride, float share,
              float ahead) {
#pragma omp parallel for schedule(static)
    for (long matrix = 0; matrix < matrices; matrix++) {
        const float *from = grad + matrix * stride;
        float *kept = average + matrix * stride;
        bf16 *to = out + matrix * size;
        EACH(size,
            floats g = load_wide(from + i, n);
            floats m = load_wide(kept + i, n);
            m += (g - m) * share;
            store_wide(kept + i, m, n);
            store(to + i, g + (m - g) * ahead, n);)
    }
}

// w <- w decay + u rate for matrices that lie `stride` apart; writes the sum of squares of each matrix of u.
void update(float *weight, const bf16 *change, float *squares, long matrices, long size, long stride, float decay,
            float rate) {
#pragma omp parallel for schedule(static)
    for (long matrix = 0; matrix < matrices; matrix++) {
        float *to = weight + matrix * stride;
        const bf16 *from = change + matrix * size;
        floats total = {0};
        EACH(size,
            floats u = load(from + i, n);
            total += u * u;
            store_wide(to + i, load_wide(to + i, n) * decay + u * rate, n);)
        squares[matrix] = sum(total);
    }
}
