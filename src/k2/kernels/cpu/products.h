// Products of rows with resident bfloat16 matrices, which are packed once into the order they are read in.
//
// A panel is PANEL outputs of a matrix: for every two inputs, the two weights of each output side by side. Every row is
// summed in the same order whatever is in the batch beside it.
#include "vectors.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define PANEL 32
#define HALF (PANEL / 2)
#define VECTORS (PANEL / LANES)
#define TILE (LANES == 16 ? 8 : 2)  // rows whose sums of a panel fit into registers
#define AHEAD (256 * PANEL)         // weights fetched in advance: across pages, processors do not do it by themselves
#define WORTH_THREADS (1L << 21)    // multiplications below which one thread is faster

// Matrices of one shape: packed[number][panel][inputs / 2][PANEL][2]; zeros make inputs even and panels whole.
typedef struct {
    const bf16 *packed;
    long inputs, outputs;
} Matrices;

// Rows `index[0]`, `index[1]`, ... or, without an index, rows 0, 1, ...
typedef struct {
    const bf16 *rows;
    long stride;
    const int64_t *index;
} Source;

// Where sums go: WIDE float32 or NARROW bfloat16; GATED silu(g) * u of panels that hold half a panel of gates, then
// their ups; ADDED to float32 rows, which may have an index, and times `scale` if there is one.
typedef struct {
    enum { WIDE, NARROW, GATED, ADDED } how;
    void *rows;
    long stride;
    const int64_t *index;
    const float *scale;
} Sink;

// sum + the products of two pairs: `pair` with the one in each lane.
static inline floats add_pairs(floats sum, words lanes, uint32_t pair) {
#ifdef __AVX512BF16__
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)lanes, (__m512bh)_mm512_set1_epi32(pair));
#else
    words both = pair - (words){0};
    sum += (floats)(lanes << 16) * (floats)(both << 16);
    return sum + (floats)(lanes & 0xffff0000) * (floats)(both & 0xffff0000);
#endif
}

static inline words load_pairs(const bf16 *from) {
    words x;
    memcpy(&x, from, sizeof x);
    return x;
}

// Inlined with a constant number of rows, so that all sums stay in registers.
static inline __attribute__((always_inline)) void multiply(const int rows, const bf16 *const *x, const bf16 *panel,
                                                           long inputs, float (*sums)[PANEL]) {
    floats total[TILE][VECTORS] = {0};
    for (long i = 0; i < inputs; i += 2, panel += 2 * PANEL) {
        __builtin_prefetch(panel + AHEAD);
        __builtin_prefetch(panel + AHEAD + PANEL);
        words lanes[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) lanes[v] = load_pairs(panel + v * 2 * LANES);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            uint32_t pair;
            memcpy(&pair, x[row] + i, sizeof pair);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) total[row][v] = add_pairs(total[row][v], lanes[v], pair);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) store_wide(sums[row] + v * LANES, total[row][v], LANES);
}

static inline void multiply_some(int rows, const bf16 *const *x, const bf16 *panel, long inputs, float (*sums)[PANEL]) {
#define CASE(n) case n: return multiply(n <= TILE ? n : TILE, x, panel, inputs, sums);
    switch (rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
#undef CASE
}

// The sums of panel number `panel` of one row.
static inline void deliver(Sink sink, long row, long panel, long outputs, const float *sums) {
    long place = sink.index ? sink.index[row] : row, count = lesser(PANEL, outputs - panel * PANEL);
    float *wide = (float *)sink.rows + place * sink.stride + panel * PANEL;
    bf16 *narrow = (bf16 *)sink.rows + place * sink.stride + panel * (sink.how == GATED ? HALF : PANEL);
    if (sink.how == WIDE) memcpy(wide, sums, count * sizeof *wide);
    if (sink.how == NARROW) EACH(count, store(narrow + i, load_wide(sums + i, n), n);)
    if (sink.how == GATED)
        for (long i = 0; i < HALF; i += LANES) {
            floats gate = load_wide(sums + i, LANES), up = load_wide(sums + HALF + i, LANES);
            store(narrow + i, gate * sigmoid(gate) * up, LANES);
        }
    if (sink.how == ADDED) {
        float scale = sink.scale ? sink.scale[row] : 1.0f;
        EACH(count, store_wide(wide + i, load_wide(wide + i, n) + load_wide(sums + i, n) * scale, n);)
    }
}

// Rows times the transpose of one of the matrices. A panel is read once and stays in the first cache for all rows.
static inline void product(Source source, Matrices matrices, long number, long rows, Sink sink) {
    long panels = (matrices.outputs + PANEL - 1) / PANEL, inputs = (matrices.inputs + 1) / 2 * 2;
    const bf16 *packed = matrices.packed + number * panels * PANEL * inputs;
#pragma omp parallel for schedule(static) if (rows * inputs * panels * PANEL > WORTH_THREADS)
    for (long panel = 0; panel < panels; panel++)
        for (long first = 0; first < rows; first += TILE) {
            const bf16 *x[TILE];
            float sums[TILE][PANEL];
            int count = lesser(TILE, rows - first);
            for (int i = 0; i < count; i++)
                x[i] = source.rows + (source.index ? source.index[first + i] : first + i) * source.stride;
            multiply_some(count, x, packed + panel * PANEL * inputs, inputs, sums);
            for (int i = 0; i < count; i++) deliver(sink, first + i, panel, matrices.outputs, sums[i]);
        }
}
