// SwiGLU of a row: silu(gate) * up, gate and up side by side.
#pragma once
#include "vectors.h"

// [2F] -> [F], times a factor.
static inline void gated_row(const bf16 *gate, float factor, bf16 *out, long inner) {
    const bf16 *up = gate + inner;
    EACH(inner,
        floats g = load(gate + i, n);
        store(out + i, g * sigmoid(g) * load(up + i, n) * factor, n);)
}

// Gradients by gate and up, the one by the factor, which is returned, and the output once more.
static inline float gated_row_backward(const bf16 *grad, const bf16 *gate, float factor, bf16 *out, bf16 *grad_gate,
                                       long inner) {
    const bf16 *up = gate + inner;
    bf16 *grad_up = grad_gate + inner;
    floats dots = {0};
    EACH(inner,
        floats g = load(gate + i, n);
        floats u = load(up + i, n);
        floats s = sigmoid(g);
        floats active = g * s;
        floats product = active * u;
        floats scaled = load(grad + i, n);
        dots += scaled * product;
        scaled *= factor;
        store(out + i, product * factor, n);
        store(grad_up + i, scaled * active, n);
        store(grad_gate + i, scaled * u * (s + active - active * s), n);)
    return sum(dots);
}
