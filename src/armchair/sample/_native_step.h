/* The step, in terms of 16 numbers at a time. Who includes this has defined, for its kind of processor:

   FAST, INLINE         of functions, and of those that go into others
   Floats, Wholes       16 numbers of 32 bits
   load16, add16, ...   what is done with them
   TILE, add_products   rows that a block of a matrix is multiplied with at once, at most 6, and the exact sums
   FOR_THIS             what its functions are called

   The order in which numbers are added up is the same everywhere. */

#include "_native.h"

#include <math.h>

#define TINY 1e-14f
#define EPSILON 1e-5f

/* Parts of a row. */

INLINE Floats exponential(Floats x) {
    x = min16(max16(x, all16(-87.3f)), all16(88.0f));
    Floats n = round16(mul16(x, all16(1.44269504f)));
    Floats r = less16(n, all16(0.693359375f), x);
    r = less16(n, all16(-2.12194440e-4f), r);
    Floats p = all16(1.0f / 720);
    p = fma16(p, r, all16(1.0f / 120));
    p = fma16(p, r, all16(1.0f / 24));
    p = fma16(p, r, all16(1.0f / 6));
    p = fma16(p, r, all16(0.5f));
    p = fma16(p, r, all16(1.0f));
    p = fma16(p, r, all16(1.0f));
    return scale16(p, n);
}

/* x (1 + erf(x / sqrt 2)) / 2, erf to 1.5e-7 (Abramowitz and Stegun, 1964, 7.1.26). */
INLINE Floats gelu(Floats x) {
    const Floats one = all16(1.0f);
    Floats z = mul16(x, all16(0.70710678f)), a = abs16(z);
    Floats t = div16(one, fma16(a, all16(0.3275911f), one));
    Floats p = all16(1.061405429f);
    p = fma16(p, t, all16(-1.453152027f));
    p = fma16(p, t, all16(1.421413741f));
    p = fma16(p, t, all16(-0.284496736f));
    p = fma16(p, t, all16(0.254829592f));
    p = mul16(p, t);
    Floats e = exponential(sub16(zero16(), mul16(a, a)));
    Floats erf = less16(p, e, one); /* of |x| */
    return mul16(mul16(x, all16(0.5f)), add16(one, turned16(erf, x)));
}

INLINE float widest(const float *x, int64_t count) {
    Floats most = zero16();
    for (int64_t i = 0; i < count; i += 16) most = max16(most, abs16(load16(x + i)));
    return largest16(most);
}

/* Whole numbers from -127 to 127, and their step. */
INLINE float round_to_whole(const float *x, int8_t *whole, int64_t count, int32_t *sum) {
    float size = TINY + widest(x, count) * (1.0f / 127);
    Floats divisor = all16(size);
    Wholes total = no_whole16();
    for (int64_t i = 0; i < count; i += 16) {
        Wholes n = whole16(div16(load16(x + i), divisor));
        total = add_whole16(total, n);
        store_whole16(whole + i, n);
    }
    if (sum) *sum = sum_of_whole16(total);
    return size;
}

FAST static void round_row(Step *step, const float *x, int64_t row, int64_t count) {
    step->size[row] = round_to_whole(x, step->whole + row * step->stride, count, step->sum + row);
}

/* LayerNorm, or by the root mean square where there is no bias; y may be x. */
INLINE void normalise(const float *x, float *y, const float *gain, const float *bias, int64_t count) {
    Floats shift = zero16(), total = zero16();
    if (bias) {
        for (int64_t i = 0; i < count; i += 16) total = add16(total, load16(x + i));
        shift = all16(sum_of16(total) / count);
        total = zero16();
    }
    for (int64_t i = 0; i < count; i += 16) {
        Floats d = sub16(load16(x + i), shift);
        total = fma16(d, d, total);
    }
    Floats scale = all16(1.0f / sqrtf(sum_of16(total) / count + EPSILON));
    for (int64_t i = 0; i < count; i += 16) {
        Floats d = mul16(sub16(load16(x + i), shift), scale);
        d = mul16(d, load16(gain + i));
        store16(y + i, bias ? add16(d, load16(bias + i)) : d);
    }
}

/* Products. */

/* What `rows` rows, TILE at most, give with a block of a matrix. */
INLINE void multiply(const Matrix *m, int64_t block, const Step *s, int64_t row, const int rows, float *y,
                     int64_t stride, int add) {
    const int64_t quads = (m->inputs + 3) / 4;
    Wholes sums[TILE][4];
    add_products(m->weight + block * quads * 4 * OUTPUTS, quads, s->whole + row * s->stride, s->stride, s->sum + row,
                 rows, sums);
    for (int k = 0; k < 4; k++) {
        const int64_t first = block * OUTPUTS + 16 * k, left = m->outputs - first, some = left >= 16 ? 16 : left;
        if (left <= 0) break;
        const Floats step = load_first16(some, m->step + first), bias = load_first16(some, m->bias + first);
        for (int r = 0; r < rows; r++) {
            float *to = y + (row + r) * stride + first;
            Floats found = fma16(mul16(widened_whole16(sums[r][k]), step), all16(s->size[row + r]), bias);
            if (add) found = add16(load_first16(some, to), found);
            store_first16(some, to, found);
        }
    }
}

/* y (rows, stride) = rounded rows times the block's outputs; or added to it. */
FAST static void product(const Matrix *m, int64_t block, const Step *s, float *y, int64_t stride, int add) {
    int64_t row = 0;
    for (; row + TILE <= s->rows; row += TILE) multiply(m, block, s, row, TILE, y, stride, add);
    switch (s->rows - row) {
    case 1: multiply(m, block, s, row, 1, y, stride, add); break;
    case 2: multiply(m, block, s, row, 2, y, stride, add); break;
    case 3: multiply(m, block, s, row, 3, y, stride, add); break;
#if TILE > 4
    case 4: multiply(m, block, s, row, 4, y, stride, add); break;
    case 5: multiply(m, block, s, row, 5, y, stride, add); break;
#endif
    }
}

/* The parts of a block, each for one item: a row, 64 outputs, or a row's head. */

FAST static void before_attention(Step *s, int64_t layer, int64_t row, int worker) {
    const Model *m = s->model;
    const Layer *l = m->layer + layer;
    float *y = s->attended + row * m->width; /* free until attention */
    normalise(s->x + row * m->width, y, l->attention_gain, l->attention_bias, m->width);
    round_row(s, y, row, m->width);
    (void)worker;
}

FAST static void queries_keys_values(Step *s, int64_t layer, int64_t block, int worker) {
    product(&s->model->layer[layer].qkv, block, s, s->qkv, 3 * s->model->width, 0);
    (void)worker;
}

/* Queries and keys of a head as they are compared, the key and the value in their slot. */
FAST static void keep(Step *s, int64_t layer, int64_t item, int worker) {
    const Model *m = s->model;
    const int64_t row = item / m->heads, head = item % m->heads, size = m->width / m->heads, half = size / 2;
    const Row *at = s->row + row;
    const Places *places = at->group->places + layer;
    for (int kind = 0; kind < 2; kind++) {
        float *x = s->qkv + row * 3 * m->width + kind * m->width + head * size;
        if (m->layer[layer].head_gains) normalise(x, x, m->layer[layer].head_gains + kind * size, NULL, size);
        if (m->cosines) {
            const int64_t place = ((m->first + at->j) * 2 + kind) * half;
            const float *c = m->cosines + place, *n = m->sines + place;
            for (int64_t i = 0; i < half; i++) {
                const float a = x[i], b = x[half + i];
                x[i] = a * c[i] - b * n[i];
                x[half + i] = b * c[i] + a * n[i];
            }
        }
    }
    for (int kind = 0; kind < 2; kind++) {
        const float *x = s->qkv + row * 3 * m->width + (1 + kind) * m->width + head * size;
        const int64_t line = (kind * at->group->rows + at->row) * m->heads + head;
        const int64_t slot = line * places->size + places->slot[at->j];
        at->group->steps[layer][slot] = round_to_whole(x, at->group->kept[layer] + slot * size, size, NULL);
    }
    (void)worker;
}

/* The sum of values by their shares, of 16 `parts` numbers of each. */
INLINE void sum_values(const int8_t *values, const int32_t *list, int64_t count, int64_t size, const float *shares,
                       float scale, float *y, const int parts) {
    Floats sums[4];
    for (int k = 0; k < parts; k++) sums[k] = zero16();
    for (int64_t i = 0; i < count; i++) {
        const int8_t *v = values + (list ? list[i] : i) * size;
        const Floats share = all16(shares[i]);
        for (int k = 0; k < parts; k++) sums[k] = fma16(share, widened16(v + 16 * k), sums[k]);
    }
    for (int k = 0; k < parts; k++) store16(y + 16 * k, mul16(sums[k], all16(scale)));
}

FAST static void attend(Step *s, int64_t layer, int64_t item, int worker) {
    const Model *m = s->model;
    const int64_t row = item / m->heads, head = item % m->heads, size = m->width / m->heads;
    const Row *at = s->row + row;
    const Places *places = at->group->places + layer;
    const int64_t count = places->count[at->j], begin = places->begin[at->j];
    const int32_t *list = begin < 0 ? NULL : places->list + begin;
    const int64_t lines = at->group->rows * m->heads, line = at->row * m->heads + head;
    const int8_t *keys = at->group->kept[layer] + line * places->size * size;
    const int8_t *values = keys + lines * places->size * size;
    const float *key_steps = at->group->steps[layer] + line * places->size;
    const float *value_steps = key_steps + lines * places->size;
    const float *q = s->qkv + row * 3 * m->width + head * size;
    float *scores = s->scores + worker * s->most, *y = s->attended + row * m->width + head * size;
    for (int64_t i = 0; i < count; i++) {
        const int64_t slot = list ? list[i] : i;
        Floats sum = zero16();
        for (int64_t k = 0; k < size; k += 16)
            sum = fma16(load16(q + k), widened16(keys + slot * size + k), sum);
        scores[i] = sum_of16(sum) * key_steps[slot];
    }
    const int64_t filled = (count + 15) / 16 * 16;
    for (int64_t i = count; i < filled; i++) scores[i] = -INFINITY;
    Floats most = all16(-INFINITY), total = zero16();
    for (int64_t i = 0; i < filled; i += 16) most = max16(most, load16(scores + i));
    most = all16(largest16(most));
    for (int64_t i = 0; i < filled; i += 16) {
        Floats e = first16(count - i >= 16 ? 16 : count - i, exponential(sub16(load16(scores + i), most)));
        total = add16(total, e);
        store16(scores + i, e);
    }
    const float scale = 1.0f / sum_of16(total);
    for (int64_t i = 0; i < count; i++) scores[i] *= value_steps[list ? list[i] : i];
    for (int64_t k = 0; k < size; k += 64) switch (size - k >= 64 ? 4 : (size - k) / 16) {
        case 4: sum_values(values + k, list, count, size, scores, scale, y + k, 4); break;
        case 3: sum_values(values + k, list, count, size, scores, scale, y + k, 3); break;
        case 2: sum_values(values + k, list, count, size, scores, scale, y + k, 2); break;
        case 1: sum_values(values + k, list, count, size, scores, scale, y + k, 1); break;
        }
}

FAST static void after_attention(Step *s, int64_t layer, int64_t row, int worker) {
    round_row(s, s->attended + row * s->model->width, row, s->model->width);
    (void)layer, (void)worker;
}

FAST static void put_out(Step *s, int64_t layer, int64_t block, int worker) {
    product(&s->model->layer[layer].out, block, s, s->x, s->model->width, 1);
    (void)worker;
}

FAST static void before_mlp(Step *s, int64_t layer, int64_t row, int worker) {
    const Model *m = s->model;
    float *y = s->attended + row * m->width; /* free by now */
    normalise(s->x + row * m->width, y, m->layer[layer].mlp_gain, m->layer[layer].mlp_bias, m->width);
    round_row(s, y, row, m->width);
    (void)worker;
}

FAST static void into_mlp(Step *s, int64_t layer, int64_t block, int worker) {
    const Matrix *in = &s->model->layer[layer].mlp_in;
    product(in, block, s, s->hidden, in->outputs, 0);
    if (s->model->gated) return;
    const int64_t from = block * OUTPUTS, to = from + OUTPUTS < in->outputs ? from + OUTPUTS : in->outputs;
    for (int64_t row = 0; row < s->rows; row++)
        for (int64_t i = from; i < to; i += 16) {
            float *h = s->hidden + row * in->outputs + i;
            store16(h, gelu(load16(h)));
        }
    (void)worker;
}

FAST static void within_mlp(Step *s, int64_t layer, int64_t row, int worker) {
    const Matrix *in = &s->model->layer[layer].mlp_in, *out = &s->model->layer[layer].mlp_out;
    float *h = s->hidden + row * in->outputs;
    const int64_t filled = (out->inputs + 15) / 16 * 16;
    if (s->model->gated) { /* silu(gate) value, which takes the place of the gate */
        for (int64_t i = 0; i < out->inputs; i += 16) {
            Floats gate = load16(h + i), one = all16(1.0f);
            Floats e = exponential(sub16(zero16(), gate));
            gate = div16(gate, add16(one, e));
            store16(h + i, mul16(gate, load16(h + out->inputs + i)));
        }
        for (int64_t i = out->inputs; i < filled; i++) h[i] = 0.0f; /* what came after the last */
    }
    round_row(s, h, row, filled);
    (void)worker;
}

FAST static void out_of_mlp(Step *s, int64_t layer, int64_t block, int worker) {
    product(&s->model->layer[layer].mlp_out, block, s, s->x, s->model->width, 1);
    (void)worker;
}

FAST static void before_head(Step *s, int64_t layer, int64_t row, int worker) {
    const Model *m = s->model;
    float *y = s->attended + row * m->width;
    normalise(s->x + row * m->width, y, m->gain, m->bias, m->width);
    round_row(s, y, row, m->width);
    (void)layer, (void)worker;
}

FAST static void to_logits(Step *s, int64_t layer, int64_t block, int worker) {
    product(&s->model->head, block, s, s->logits, s->model->head.outputs, 0);
    (void)layer, (void)worker;
}

static int64_t blocks(const Matrix *m) { return (m->outputs + OUTPUTS - 1) / OUTPUTS; }

void FOR_THIS(armchair_through)(Step *s) {
    const Model *m = s->model;
    const int64_t heads = s->rows * m->heads;
    for (int64_t l = 0; l < m->layers; l++) {
        const Layer *layer = m->layer + l;
        armchair_each(s, ROWS, before_attention, l, s->rows);
        armchair_each(s, PRODUCTS, queries_keys_values, l, blocks(&layer->qkv));
        armchair_each(s, KEEPING, keep, l, heads);
        armchair_each(s, ATTENTION, attend, l, heads);
        armchair_each(s, ROWS, after_attention, l, s->rows);
        armchair_each(s, PRODUCTS, put_out, l, blocks(&layer->out));
        armchair_each(s, ROWS, before_mlp, l, s->rows);
        armchair_each(s, PRODUCTS, into_mlp, l, blocks(&layer->mlp_in));
        armchair_each(s, ROWS, within_mlp, l, s->rows);
        armchair_each(s, PRODUCTS, out_of_mlp, l, blocks(&layer->mlp_out));
    }
    armchair_each(s, ROWS, before_head, 0, s->rows);
    armchair_each(s, HEAD, to_logits, 0, blocks(&m->head));
}

/* A product alone. */

FAST static void round_given(Step *s, int64_t layer, int64_t row, int worker) {
    round_row(s, s->x + row * s->given, row, s->given);
    (void)layer, (void)worker;
}

FAST static void multiply_given(Step *s, int64_t layer, int64_t block, int worker) {
    product(s->alone, block, s, s->logits, s->alone->outputs, 0);
    (void)layer, (void)worker;
}

void FOR_THIS(armchair_multiply)(Step *s) {
    armchair_each(s, ROWS, round_given, 0, s->rows);
    armchair_each(s, PRODUCTS, multiply_given, 0, blocks(s->alone));
}
