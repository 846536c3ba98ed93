// The forward pass of generation: tokens of any rows of the latent cache, each at its slot, through all layers.
//
// What precedes a product is folded into it beforehand, as `k2.model.folding` describes. The residual stream, attention
// over the cache and the router are float32, inputs of products bfloat16. Nothing a token gets depends on the others.
//
// Letters in shapes: T tokens, D hidden, H heads, K latent rank, R rotary, C = R + K, L slots of a cache row.
#include <stdlib.h>
#include "products.h"
#include "attention.h"

typedef struct {
    Matrices joined, q_b, values, output;  // first projections of queries and latents; `q_b` may be missing
    Matrices gate_up, down;                // of every expert; a dense MLP is one shared expert
    const float *router, *bias;            // [D, routed] and [routed], padded to even D and whole HALFs
    long routed, shared;
} Layer;

typedef struct {
    const Layer *layers;
    const bf16 *embedding;
    Matrices head;
    long depth, hidden, heads, rank, rotary, choices, normed, groups, open_groups;
    float eps, latent_eps, scaling;
} Model;

typedef struct {
    float *values;       // [depth, rows, length, C]
    const float *turns;  // [length, R], cosine and sine of each rotary pair
    long rows, length;
} Cache;

// Memory for as many tokens as a call has. Like the cache, it is readable some vectors beyond its end.
typedef struct {
    float *x, *joined, *queries, *weights;
    bf16 *normed, *latents, *mixed, *values, *inner;
    int64_t *chosen, *tokens, *starts;
} Memory;

typedef struct {
    const int64_t *tokens, *rows, *slots;
    long count;
} Batch;

static inline long even(long width) { return (width + 1) / 2 * 2; }

// 1 / sqrt(sum of squares + floor).
static inline float inverse_length(const float *x, long width, float floor) {
    floats squares = {0};
    EACH(width, floats v = load_wide(x + i, n); squares += v * v;)
    return 1.0f / sqrtf(sum(squares) + floor);
}

// x / sqrt(mean(x^2) + eps), up to a factor sqrt(width) that the product that follows has in its weights.
static void normalise(const float *x, long stride, long count, long width, float eps, bf16 *to) {
    for (long t = 0; t < count; t++, x += stride, to += even(width)) {
        float factor = inverse_length(x, width, width * eps);
        EACH(width, store(to + i, load_wide(x + i, n) * factor, n);)
    }
}

static void turn_pairs(float *x, const float *turns, long rotary) {
    for (long i = 0; i < rotary; i += 2) {
        float a = x[i], b = x[i + 1];
        x[i] = a * turns[i] - b * turns[i + 1];
        x[i + 1] = a * turns[i + 1] + b * turns[i];
    }
}

// First projections of queries and latents; the latents, normed and turned, go into the cache.
static void project(const Model *m, const Layer *layer, Memory *w, Batch b, const Cache *c, float *cache) {
    long width = m->rotary + m->rank, outputs = layer->joined.outputs;
    product((Source){.rows = w->normed, .stride = even(m->hidden)}, layer->joined, 0, b.count,
            (Sink){WIDE, .rows = w->joined, .stride = outputs});
    for (long t = 0; t < b.count; t++) {
        const float *latents = w->joined + (t + 1) * outputs - width;
        float *place = cache + (b.rows[t] * c->length + b.slots[t]) * width;
        float factor = inverse_length(latents + m->rotary, m->rank, m->rank * m->latent_eps);
        memcpy(place, latents, m->rotary * sizeof *place);
        turn_pairs(place, c->turns + b.slots[t] * m->rotary, m->rotary);
        EACH(m->rank, store_wide(place + m->rotary + i, load_wide(latents + m->rotary + i, n) * factor, n);)
    }
}

// What every head of every token sees of its row of the cache, up to its own slot.
static void look_back(const Model *m, float *queries, long stride, Memory *w, Batch b, const Cache *c,
                      const float *cache) {
    long width = m->rotary + m->rank;
#pragma omp parallel if (b.count > 1)
    {
        long room = (c->length + LANES - 1) / LANES * LANES;
        float *shares = aligned_alloc(sizeof(floats), HEADS * room * sizeof *shares), factors[HEADS];
#pragma omp for schedule(static) collapse(2)
        for (long t = 0; t < b.count; t++)
            for (long h = 0; h < m->heads; h += HEADS) {
                int heads = lesser(HEADS, m->heads - h);
                long slots = b.slots[t] + 1;
                const float *past = cache + b.rows[t] * c->length * width;
                float *query = queries + t * stride + h * width;
                for (int i = 0; i < heads; i++)
                    turn_pairs(query + i * width, c->turns + b.slots[t] * m->rotary, m->rotary);
                dot_products(query, heads, past, slots, width, shares, room);
                for (int i = 0; i < heads; i++) factors[i] = exponentials(shares + i * room, slots);
                bf16 *to = w->mixed + (t * m->heads + h) * even(m->rank);
                mix(shares, room, factors, heads, past + m->rotary, slots, width, m->rank, to, even(m->rank));
            }
        free(shares);
    }
}

// Adds latent attention to x.
static void attend(const Model *m, const Layer *layer, Memory *w, Batch b, const Cache *c,
                   const float *cache) {
    long latents = layer->joined.outputs - m->rotary - m->rank, room = even(m->rank), values = layer->values.outputs;
    float *queries = w->joined;
    long stride = layer->joined.outputs, all_values = even(m->heads * values);
    if (layer->q_b.packed) {
        normalise(w->joined, stride, b.count, latents, m->latent_eps, w->latents);
        queries = w->queries, stride = layer->q_b.outputs;
        product((Source){.rows = w->latents, .stride = even(latents)}, layer->q_b, 0, b.count,
                (Sink){WIDE, .rows = queries, .stride = stride});
    }
    look_back(m, queries, stride, w, b, c, cache);
    for (long h = 0; h < m->heads; h++)
        product((Source){.rows = w->mixed + h * room, .stride = m->heads * room}, layer->values, h, b.count,
                (Sink){NARROW, .rows = w->values + h * values, .stride = all_values});
    product((Source){.rows = w->values, .stride = all_values}, layer->output, 0, b.count,
            (Sink){ADDED, .rows = w->x, .stride = m->hidden});
}

// Leaves scores of the groups only whose two best ones have the largest sums; the others become -inf.
static void close_groups(float *scores, long groups, long open, long size) {
    float sums[groups];
    char opened[groups];
    memset(opened, 0, sizeof opened);
    for (long g = 0; g < groups; g++) {
        float *group = scores + g * size, best = -INFINITY, second = -INFINITY;
        for (long e = 0; e < size; e++) {
            second = group[e] > best ? best : LARGER(group[e], second);
            best = LARGER(group[e], best);
        }
        sums[g] = best + second;
    }
    for (long i = 0; i < open; i++) {
        long best = best_of(sums, groups);
        sums[best] = -INFINITY, opened[best] = 1;
    }
    for (long e = 0; e < groups * size; e++)
        if (!opened[e / size]) scores[e] = -INFINITY;
}

// The `choices` experts with the largest scores plus bias, lower numbers first among equals, and their weights.
static void route(const Model *m, const Layer *layer, const bf16 *x, int64_t *chosen, float *weights) {
    long room = (layer->routed + HALF - 1) / HALF * HALF;
    float scores[room], open[room], total = 1e-20f;
    for (long e = 0; e < room; e += LANES) {
        floats one = {0}, other = {0};
        for (long d = 0; d < even(m->hidden); d += 2) {
            one += widen_one(x[d]) * load_wide(layer->router + d * room + e, LANES);
            other += widen_one(x[d + 1]) * load_wide(layer->router + (d + 1) * room + e, LANES);
        }
        floats score = sigmoid(one + other);
        store_wide(scores + e, score, LANES);
        store_wide(open + e, score + load_wide(layer->bias + e, LANES), LANES);
    }
    if (m->groups > 1) close_groups(open, m->groups, m->open_groups, layer->routed / m->groups);
    for (long s = 0; s < m->choices; s++) {
        chosen[s] = best_of(open, layer->routed);
        total += weights[s] = scores[chosen[s]];
        open[chosen[s]] = -INFINITY;
    }
    for (long s = 0; s < m->choices; s++) weights[s] *= m->normed ? m->scaling / total : m->scaling;
}

// Tokens ordered by the experts they chose, and their weights: those of expert e begin at starts[e].
static void arrange(const Model *m, const Layer *layer, Memory *w, long count, float *ordered) {
    memset(w->starts, 0, (layer->routed + 1) * sizeof *w->starts);
    for (long pair = 0; pair < count * m->choices; pair++) w->starts[w->chosen[pair] + 1]++;
    for (long e = 0; e < layer->routed; e++) w->starts[e + 1] += w->starts[e];
    for (long pair = 0; pair < count * m->choices; pair++) {
        long place = w->starts[w->chosen[pair]]++;
        w->tokens[place] = pair / m->choices;
        ordered[place] = w->weights[pair];
    }
    memmove(w->starts + 1, w->starts, layer->routed * sizeof *w->starts);
    w->starts[0] = 0;
}

// Adds the outputs of routed experts, which are read once each, then those of shared ones.
static void feed_forward(const Model *m, const Layer *layer, Memory *w, long count) {
    float *weights = w->weights + count * m->choices;
    for (long t = 0; layer->routed && t < count; t++)
        route(m, layer, w->normed + t * even(m->hidden), w->chosen + t * m->choices, w->weights + t * m->choices);
    if (layer->routed) arrange(m, layer, w, count, weights);
    for (long e = 0; e < layer->routed + layer->shared; e++) {
        int routed = e < layer->routed;
        long start = routed ? w->starts[e] : 0, rows = routed ? w->starts[e + 1] - start : count;
        const int64_t *tokens = routed ? w->tokens + start : NULL;
        product((Source){w->normed, even(m->hidden), tokens}, layer->gate_up, e, rows,
                (Sink){GATED, .rows = w->inner, .stride = layer->down.inputs});
        product((Source){.rows = w->inner, .stride = layer->down.inputs}, layer->down, e, rows,
                (Sink){ADDED, w->x, m->hidden, tokens, routed ? weights + start : NULL});
    }
}

// Puts each token into its slot; `logits` [T, V] of those that follow, or NULL if only the cache is wanted.
void decode(const Model *m, const Cache *cache, Memory *w, const int64_t *tokens, const int64_t *rows,
            const int64_t *slots, long count, float *logits) {
    Batch b = {tokens, rows, slots, count};
    long layer_values = cache->rows * cache->length * (m->rotary + m->rank);
    for (long t = 0; t < count; t++)
        EACH(m->hidden, store_wide(w->x + t * m->hidden + i, load(m->embedding + tokens[t] * m->hidden + i, n), n);)
    for (long number = 0; number < m->depth; number++) {
        const Layer *layer = m->layers + number;
        float *values = cache->values + number * layer_values;
        normalise(w->x, m->hidden, count, m->hidden, m->eps, w->normed);
        project(m, layer, w, b, cache, values);
        if (!logits && number == m->depth - 1) return;
        attend(m, layer, w, b, cache, values);
        normalise(w->x, m->hidden, count, m->hidden, m->eps, w->normed);
        feed_forward(m, layer, w, count);
    }
    normalise(w->x, m->hidden, count, m->hidden, m->eps, w->normed);
    product((Source){.rows = w->normed, .stride = even(m->hidden)}, m->head, 0, count,
            (Sink){WIDE, .rows = logits, .stride = m->head.outputs});
}

// One product, for tests and benchmarks.
void packed_product(const bf16 *x, const Matrices *matrices, long number, long rows, float *to) {
    product((Source){.rows = x, .stride = even(matrices->inputs)}, *matrices, number, rows,
            (Sink){WIDE, .rows = to, .stride = matrices->outputs});
}
