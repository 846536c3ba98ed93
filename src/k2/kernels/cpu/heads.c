// Heads of attention from what the projections give, and back, positions turned in.
//
// Letters in shapes: B batch, L length, H heads, V value width.
#include "vectors.h"

static inline void copy(bf16 *to, const bf16 *from, long count) { EACH(count, memcpy(to + i, from + i, n * sizeof *to);) }

static inline void add(float *to, const bf16 *from, long count) {
    EACH(count, store_wide(to + i, load_wide(to + i, n) + load(from + i, n), n);)
}

// Every second lane of the one and then the other, from the first or the second lane on.
static inline floats every_second(floats one, floats other, int first) {
#ifdef __clang__
    floats y;
    for (int i = 0; i < LANES; i++) y[i] = 2 * i < LANES ? one[2 * i + first] : other[2 * i + first - LANES];
    return y;
#else
    return __builtin_shuffle(one, other, 2 * NUMBERS + first);
#endif
}

// Cosines and sines of a position, which lie side by side.
typedef struct {
    floats cosines, sines;
} rotation;

static inline rotation rotation_at(const float *angles, long count) {
    floats one = load_wide(angles, lesser(2 * count, LANES));
    floats other = 2 * count > LANES ? load_wide(angles + LANES, 2 * count - LANES) : (floats){0};
    return (rotation){every_second(one, other, 0), every_second(one, other, 1)};
}

// Turn interleaved pairs by the angles of a position: first members, then second ones.
static inline void turn(const bf16 *from, const float *angles, long pairs, bf16 *to) {
    EACH(pairs,
        rotation r = rotation_at(angles + 2 * i, n);
        words both = (words)load_wide((const float *)from + i, n);
        floats a = (floats)(both << 16);
        floats b = (floats)(both & 0xffff0000);
        store(to + i, a * r.cosines - b * r.sines, n);
        store(to + pairs + i, a * r.sines + b * r.cosines, n);)
}

static inline void turn_back(const bf16 *from, const float *angles, long pairs, bf16 *to) {
    EACH(pairs,
        rotation r = rotation_at(angles + 2 * i, n);
        floats a = load(from + i, n);
        floats b = load(from + pairs + i, n);
        words first = (words)widen(narrow(a * r.cosines + b * r.sines));
        words second = (words)widen(narrow(b * r.cosines - a * r.sines));
        store_wide((float *)to + i, (floats)(first >> 16 | second), n);)
}

// Rows [B, L, rope] turned by `angles` of their positions, `turns` apart per sequence, and back.
void turned(const bf16 *x, const float *angles, bf16 *out, long batch, long length, long rope, long turns) {
#pragma omp parallel for schedule(static)
    for (long token = 0; token < batch * length; token++)
        turn(x + token * rope, angles + token / length * turns + token % length * rope, rope / 2, out + token * rope);
}

void turned_back(const bf16 *x, const float *angles, bf16 *out, long batch, long length, long rope, long turns) {
#pragma omp parallel for schedule(static)
    for (long token = 0; token < batch * length; token++)
        turn_back(x + token * rope, angles + token / length * turns + token % length * rope, rope / 2, out + token * rope);
}

// Queries and keys [B, H, L, nope + rope] and values [B, H, L, V] from projections q [B, L, H, nope + rope] and
// kv [B, L, H, nope + V] and one rotary key [B, L, rope]; `angles` are those of each position, `turns` apart per row.
void heads(const bf16 *q, const bf16 *kv, const bf16 *rotary, const float *angles, bf16 *to_q, bf16 *to_k, bf16 *to_v,
           long batch, long length, long number, long nope, long rope, long values, long turns) {
    long width = nope + rope;
#pragma omp parallel for collapse(2) schedule(static)
    for (long b = 0; b < batch; b++)
        for (long h = 0; h < number; h++)
            for (long l = 0; l < length; l++) {
                long token = b * length + l, from = token * number + h, to = (b * number + h) * length + l;
                const bf16 *pair = kv + from * (nope + values);
                copy(to_q + to * width, q + from * width, nope);
                turn(q + from * width + nope, angles + b * turns + l * rope, rope / 2, to_q + to * width + nope);
                copy(to_k + to * width, pair, nope);
                copy(to_k + to * width + nope, rotary + token * rope, rope);
                copy(to_v + to * values, pair + nope, values);
            }
}

// Gradients of what `heads` took from those of what it made.
void heads_backward(const bf16 *grad_q, const bf16 *grad_k, const bf16 *grad_v, const float *angles, bf16 *to_q,
                    bf16 *to_kv, bf16 *to_rotary, long batch, long length, long number, long nope, long rope,
                    long values, long turns) {
    long width = nope + rope;
#pragma omp parallel for schedule(static)
    for (long token = 0; token < batch * length; token++) {
        long b = token / length, l = token % length;
        float total[rope];
        memset(total, 0, sizeof total);
        for (long h = 0; h < number; h++) {
            long to = token * number + h, from = (b * number + h) * length + l;
            const bf16 *key = grad_k + from * width;
            bf16 *pair = to_kv + to * (nope + values);
            copy(to_q + to * width, grad_q + from * width, nope);
            turn_back(grad_q + from * width + nope, angles + b * turns + l * rope, rope / 2, to_q + to * width + nope);
            copy(pair, key, nope);
            copy(pair + nope, grad_v + from * values, values);
            add(total, key + nope, rope);
        }
        EACH(rope, store(to_rotary + token * rope + i, load_wide(total + i, n), n);)
    }
}
