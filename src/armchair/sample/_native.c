/* One step of drawing in eight bits, of a token a row, from embedded tokens to logits.

   Every weight is read once a step and every row is computed by itself, with the same operations in the same order
   whoever is beside it and however many threads there are: sums of whole numbers are exact, and sums of others stay
   within a row and a thread. What is computed is what armchair/sample/engine.py computes for `int8`; tests compare.

   x86-64 with AVX-512 and VNNI. Elsewhere armchair_supported() is 0 and nothing else may be called. */

#include <stdint.h>
#include <stdlib.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* A matrix in eight bits, less -128 so that none has a sign: by 64 outputs, and of these by 4 inputs. What is filled up,
   to 64 outputs and to 4 inputs, is zeros. */
typedef struct {
    const uint8_t *weight; /* (outputs / 64, inputs / 4, 64, 4) */
    const float *step;     /* (outputs,) */
    const float *bias;     /* (outputs,) */
    int64_t outputs, inputs;
} Matrix;

typedef struct {
    const float *attention_gain, *attention_bias; /* (D,); no bias: by the root mean square alone */
    const float *head_gains;                      /* (2, E) of queries and keys, or none */
    const float *mlp_gain, *mlp_bias;
    Matrix qkv, out, mlp_in, mlp_out;
} Layer;

typedef struct {
    int64_t width, heads, layers, gated; /* gated: SwiGLU, else GELU */
    const float *gain, *bias;
    const float *cosines, *sines; /* (L, 2, E / 2): queries and keys of each position, or none */
    int64_t first;                /* the position of image token 0 */
    const Layer *layer;
    Matrix head;
} Model;

/* What image token j of a layer does. */
typedef struct {
    int64_t size;         /* slots, those of the text among them */
    const int32_t *slot;  /* (N,): where its key and value go */
    const int32_t *count; /* (N,): how many it sees */
    const int64_t *begin; /* (N,): where these begin in `list`; -1: they are the first `count` */
    const int32_t *list;
} Places;

/* Rows that are drawn together: `count` tokens each, from image token j on. */
typedef struct {
    int64_t rows, count, j;
    int8_t *const *kept;  /* a layer: (2, rows, H, size, E), keys and values */
    float *const *steps;  /* a layer: (2, rows, H, size) */
    const Places *places; /* a layer */
} Group;

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

#define FAST __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define INLINE static inline __attribute__((always_inline)) FAST
#define OUTPUTS 64 /* of a block */
#define TILE 6     /* rows that a block is multiplied with at once: 24 sums and 4 parts of the block in 32 registers */
#define TINY 1e-14f
#define EPSILON 1e-5f
#define AHEAD 2048 /* bytes that are asked for before they are needed */

EXPORT int armchair_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}

/* Threads. Workers wait busily while a step goes on, as the next part is microseconds away, and asleep between steps. */

typedef struct Pool Pool;
typedef struct Step Step;
typedef void (*Part)(Step *step, int64_t layer, int64_t item, int worker);

struct Pool {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    pthread_t *threads;
    int workers; /* the caller among them */
    int ending;
    atomic_int awake; /* a step goes on */
    atomic_long turn; /* parts that were begun */
    atomic_int left;  /* workers that are not done with this one */
    Step *step;
    Part part;
    int64_t layer, items;
};

typedef struct {
    Pool *pool;
    int number;
} Seat;

static void share(Pool *pool, int worker) {
    int64_t from = pool->items * worker / pool->workers, to = pool->items * (worker + 1) / pool->workers;
    for (int64_t i = from; i < to; i++) pool->part(pool->step, pool->layer, i, worker);
}

static void *work(void *given) {
    Seat seat = *(Seat *)given;
    Pool *pool = seat.pool;
    free(given);
    long seen = 0;
    for (;;) {
        if (!atomic_load(&pool->awake)) {
            pthread_mutex_lock(&pool->lock);
            while (!atomic_load(&pool->awake) && !pool->ending) pthread_cond_wait(&pool->wake, &pool->lock);
            pthread_mutex_unlock(&pool->lock);
            if (pool->ending) return NULL;
        }
        int spins = 0;
        while (atomic_load_explicit(&pool->turn, memory_order_acquire) == seen && atomic_load(&pool->awake)) {
            _mm_pause();
            if (++spins > 2000) { /* somebody else may need this core for the part that is waited for */
                sched_yield();
                spins = 0;
            }
        }
        if (atomic_load_explicit(&pool->turn, memory_order_acquire) == seen) continue;
        seen++;
        share(pool, seat.number);
        atomic_fetch_sub_explicit(&pool->left, 1, memory_order_release);
    }
}

EXPORT void *armchair_pool(int workers) {
    Pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->threads = calloc(workers, sizeof *pool->threads);
    pool->workers = 1;
    for (int i = 1; pool->threads && i < workers; i++) {
        Seat *seat = malloc(sizeof *seat);
        if (!seat) break;
        *seat = (Seat){pool, i};
        if (pthread_create(&pool->threads[i], NULL, work, seat)) {
            free(seat);
            break;
        }
        pool->workers++;
    }
    return pool;
}

EXPORT void armchair_end(void *given) {
    Pool *pool = given;
    pthread_mutex_lock(&pool->lock);
    pool->ending = 1;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 1; i < pool->workers; i++) pthread_join(pool->threads[i], NULL);
    free(pool->threads);
    free(pool);
}

/* What is held during a step. */

typedef struct {
    const Group *group;
    int64_t row, j; /* of its group, and its image token */
} Row;

struct Step {
    const Model *model;
    Pool *pool;
    int64_t rows, most; /* keys seen */
    Row *row;
    int8_t *whole; /* (rows, stride): what is multiplied next */
    int64_t stride;
    float *size;    /* (rows,): its step */
    int32_t *sum;   /* (rows,): the sum of its whole numbers */
    float *x;       /* (rows, D) */
    float *qkv;     /* (rows, 3 D) */
    float *attended; /* (rows, D) */
    float *hidden;  /* (rows, inputs of the MLP) */
    float *scores;  /* (workers, most) */
    float *logits;
    double *spent; /* (KINDS,) seconds are added to, or none */
};

enum { ROWS, PRODUCTS, KEEPING, ATTENTION, HEAD, KINDS }; /* of parts, for who asks what takes how long */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void together(Step *step, Part part, int64_t layer, int64_t items) {
    Pool *pool = step->pool;
    if (!pool || pool->workers == 1 || items == 1) {
        for (int64_t i = 0; i < items; i++) part(step, layer, i, 0);
        return;
    }
    pool->part = part;
    pool->layer = layer;
    pool->items = items;
    atomic_store(&pool->left, pool->workers - 1);
    atomic_fetch_add_explicit(&pool->turn, 1, memory_order_release);
    share(pool, 0);
    int spins = 0;
    while (atomic_load_explicit(&pool->left, memory_order_acquire)) {
        _mm_pause();
        if (++spins > 2000) {
            sched_yield();
            spins = 0;
        }
    }
}

static void each(Step *step, int kind, Part part, int64_t layer, int64_t items) {
    const double began = step->spent ? now() : 0;
    together(step, part, layer, items);
    if (step->spent) step->spent[kind] += now() - began;
}

/* Parts of a row. */

INLINE __m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.3f)), _mm512_set1_ps(88.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* x (1 + erf(x / sqrt 2)) / 2, erf to 1.5e-7 (Abramowitz and Stegun, 1964, 7.1.26). */
INLINE __m512 gelu(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    __m512 z = _mm512_mul_ps(x, _mm512_set1_ps(0.70710678f)), a = _mm512_abs_ps(z);
    __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(a, _mm512_set1_ps(0.3275911f), one));
    __m512 p = _mm512_set1_ps(1.061405429f);
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
    p = _mm512_mul_ps(p, t);
    __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(a, a)));
    __m512 erf = _mm512_fnmadd_ps(p, e, one); /* of |x| */
    __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(x));
    erf = _mm512_mask_sub_ps(erf, negative, _mm512_setzero_ps(), erf);
    return _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.5f)), _mm512_add_ps(one, erf));
}

INLINE float widest(const float *x, int64_t count) {
    __m512 most = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16) most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
    return _mm512_reduce_max_ps(most);
}

/* Whole numbers from -127 to 127, and their step. */
INLINE float round_to_whole(const float *x, int8_t *whole, int64_t count, int32_t *sum) {
    float size = TINY + widest(x, count) * (1.0f / 127);
    __m512 divisor = _mm512_set1_ps(size);
    __m512i total = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += 16) {
        __m512i n = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_loadu_ps(x + i), divisor));
        total = _mm512_add_epi32(total, n);
        _mm_storeu_si128((__m128i *)(whole + i), _mm512_cvtepi32_epi8(n));
    }
    if (sum) *sum = _mm512_reduce_add_epi32(total);
    return size;
}

FAST static void round_row(Step *step, const float *x, int64_t row, int64_t count) {
    step->size[row] = round_to_whole(x, step->whole + row * step->stride, count, step->sum + row);
}

/* LayerNorm, or by the root mean square where there is no bias; y may be x. */
INLINE void normalise(const float *x, float *y, const float *gain, const float *bias, int64_t count) {
    __m512 shift = _mm512_setzero_ps(), total = _mm512_setzero_ps();
    if (bias) {
        for (int64_t i = 0; i < count; i += 16) total = _mm512_add_ps(total, _mm512_loadu_ps(x + i));
        shift = _mm512_set1_ps(_mm512_reduce_add_ps(total) / count);
        total = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < count; i += 16) {
        __m512 d = _mm512_sub_ps(_mm512_loadu_ps(x + i), shift);
        total = _mm512_fmadd_ps(d, d, total);
    }
    __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(total) / count + EPSILON));
    for (int64_t i = 0; i < count; i += 16) {
        __m512 d = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i), shift), scale);
        d = _mm512_mul_ps(d, _mm512_loadu_ps(gain + i));
        _mm512_storeu_ps(y + i, bias ? _mm512_add_ps(d, _mm512_loadu_ps(bias + i)) : d);
    }
}

/* Products. */

INLINE void multiply(const Matrix *m, int64_t block, const Step *s, int64_t row, const int rows, float *y,
                     int64_t stride, int add) {
    const int64_t quads = (m->inputs + 3) / 4;
    const uint8_t *w = m->weight + block * quads * 4 * OUTPUTS;
    const int8_t *x = s->whole + row * s->stride;
    __m512i sums[TILE][4];
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < 4; k++) sums[r][k] = _mm512_setzero_si512();
    for (int64_t q = 0; q < quads; q++, w += 4 * OUTPUTS) {
        __m512i part[4];
        for (int k = 0; k < 4; k++) {
            part[k] = _mm512_loadu_si512(w + 64 * k);
            _mm_prefetch((const char *)w + AHEAD + 64 * k, _MM_HINT_T0);
        }
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + r * s->stride + 4 * q, 4);
            __m512i given = _mm512_set1_epi32(four);
            for (int k = 0; k < 4; k++) sums[r][k] = _mm512_dpbusd_epi32(sums[r][k], part[k], given);
        }
    }
    for (int k = 0; k < 4; k++) {
        const int64_t first = block * OUTPUTS + 16 * k, left = m->outputs - first;
        if (left <= 0) break;
        const __mmask16 some = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
        const __m512 step = _mm512_maskz_loadu_ps(some, m->step + first);
        const __m512 bias = _mm512_maskz_loadu_ps(some, m->bias + first);
        for (int r = 0; r < rows; r++) {
            /* weights are 128 too large */
            __m512i exact = _mm512_sub_epi32(sums[r][k], _mm512_set1_epi32(128 * s->sum[row + r]));
            __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), step);
            float *to = y + (row + r) * stride + first;
            __m512 found = _mm512_fmadd_ps(product, _mm512_set1_ps(s->size[row + r]), bias);
            if (add) found = _mm512_add_ps(_mm512_maskz_loadu_ps(some, to), found);
            _mm512_mask_storeu_ps(to, some, found);
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
    case 4: multiply(m, block, s, row, 4, y, stride, add); break;
    case 5: multiply(m, block, s, row, 5, y, stride, add); break;
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

INLINE __m512 widened(const int8_t *x) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x)));
}

/* The sum of values by their shares, of 16 `parts` numbers of each. */
INLINE void sum_values(const int8_t *values, const int32_t *list, int64_t count, int64_t size, const float *shares,
                       float scale, float *y, const int parts) {
    __m512 sums[4];
    for (int k = 0; k < parts; k++) sums[k] = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i++) {
        const int8_t *v = values + (list ? list[i] : i) * size;
        const __m512 share = _mm512_set1_ps(shares[i]);
        for (int k = 0; k < parts; k++) sums[k] = _mm512_fmadd_ps(share, widened(v + 16 * k), sums[k]);
    }
    for (int k = 0; k < parts; k++) _mm512_storeu_ps(y + 16 * k, _mm512_mul_ps(sums[k], _mm512_set1_ps(scale)));
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
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < size; k += 16)
            sum = _mm512_fmadd_ps(_mm512_loadu_ps(q + k), widened(keys + slot * size + k), sum);
        scores[i] = _mm512_reduce_add_ps(sum) * key_steps[slot];
    }
    const int64_t filled = (count + 15) / 16 * 16;
    for (int64_t i = count; i < filled; i++) scores[i] = -INFINITY;
    __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int64_t i = 0; i < filled; i += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + i));
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t i = 0; i < filled; i += 16) {
        const __mmask16 some = count - i >= 16 ? 0xffff : (__mmask16)((1u << (count - i)) - 1);
        __m512 e = _mm512_maskz_mov_ps(some, exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + i), most)));
        total = _mm512_add_ps(total, e);
        _mm512_storeu_ps(scores + i, e);
    }
    const float scale = 1.0f / _mm512_reduce_add_ps(total);
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
            _mm512_storeu_ps(h, gelu(_mm512_loadu_ps(h)));
        }
    (void)worker;
}

FAST static void within_mlp(Step *s, int64_t layer, int64_t row, int worker) {
    const Matrix *in = &s->model->layer[layer].mlp_in, *out = &s->model->layer[layer].mlp_out;
    float *h = s->hidden + row * in->outputs;
    const int64_t filled = (out->inputs + 15) / 16 * 16;
    if (s->model->gated) { /* silu(gate) value, which takes the place of the gate */
        for (int64_t i = 0; i < out->inputs; i += 16) {
            __m512 gate = _mm512_loadu_ps(h + i), one = _mm512_set1_ps(1.0f);
            __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate));
            gate = _mm512_div_ps(gate, _mm512_add_ps(one, e));
            _mm512_storeu_ps(h + i, _mm512_mul_ps(gate, _mm512_loadu_ps(h + out->inputs + i)));
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

static void *room(char **at, int64_t bytes) {
    void *here = *at;
    *at += (bytes + 63) / 64 * 64;
    return here;
}

/* x (rows, D): embedded tokens, group after group, of a group token after token, each of all its rows; changed.
   logits (rows, K). `spent`: seconds by kind are added there, where it is not none. Returns 0, or 1 where there is no memory. One step at a time with a pool. */
EXPORT int armchair_step(const Model *model, void *pool, int64_t groups, const Group *group, float *x, float *logits,
                         double *spent) {
    int64_t rows = 0, most = 0, widest_in = model->width, hidden = 0;
    for (int64_t g = 0; g < groups; g++) {
        rows += group[g].rows * group[g].count;
        for (int64_t l = 0; l < model->layers; l++)
            if (group[g].places[l].size > most) most = group[g].places[l].size;
    }
    for (int64_t l = 0; l < model->layers; l++) {
        if (model->layer[l].mlp_in.outputs > hidden) hidden = model->layer[l].mlp_in.outputs;
        if (model->layer[l].mlp_out.inputs > widest_in) widest_in = model->layer[l].mlp_out.inputs;
    }
    most = (most + 31) / 16 * 16;
    const int64_t stride = (widest_in + 63) / 64 * 64, width = model->width;
    const int workers = pool ? ((Pool *)pool)->workers : 1;
    const int64_t floats = rows * (1 + 3 * width + width + hidden) + workers * most;
    char *memory = aligned_alloc(64, (rows * (sizeof(Row) + stride + 4) + 4 * floats + 64 * 16) / 64 * 64 + 64);
    if (!memory) return 1;
    char *at = memory;
    Step s = {.model = model, .pool = pool, .rows = rows, .most = most, .stride = stride, .x = x, .logits = logits,
              .spent = spent};
    s.row = room(&at, rows * sizeof(Row));
    s.whole = room(&at, rows * stride);
    s.size = room(&at, 4 * rows);
    s.sum = room(&at, 4 * rows);
    s.qkv = room(&at, 4 * rows * 3 * width);
    s.attended = room(&at, 4 * rows * width);
    s.hidden = room(&at, 4 * rows * hidden);
    s.scores = room(&at, 4 * workers * most); /* after `hidden`, beyond whose end a last row is read */
    for (int64_t g = 0, n = 0; g < groups; g++)
        for (int64_t c = 0; c < group[g].count; c++)
            for (int64_t r = 0; r < group[g].rows; r++) s.row[n++] = (Row){group + g, r, group[g].j + c};
    Pool *p = pool;
    if (p && p->workers > 1) {
        p->step = &s;
        pthread_mutex_lock(&p->lock);
        atomic_store(&p->awake, 1);
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->lock);
    }
    for (int64_t l = 0; l < model->layers; l++) {
        const Layer *layer = model->layer + l;
        each(&s, ROWS, before_attention, l, rows);
        each(&s, PRODUCTS, queries_keys_values, l, blocks(&layer->qkv));
        each(&s, KEEPING, keep, l, rows * model->heads);
        each(&s, ATTENTION, attend, l, rows * model->heads);
        each(&s, ROWS, after_attention, l, rows);
        each(&s, PRODUCTS, put_out, l, blocks(&layer->out));
        each(&s, ROWS, before_mlp, l, rows);
        each(&s, PRODUCTS, into_mlp, l, blocks(&layer->mlp_in));
        each(&s, ROWS, within_mlp, l, rows);
        each(&s, PRODUCTS, out_of_mlp, l, blocks(&layer->mlp_out));
    }
    each(&s, ROWS, before_head, 0, rows);
    each(&s, HEAD, to_logits, 0, blocks(&model->head));
    if (p) atomic_store(&p->awake, 0);
    free(memory);
    return 0;
}

#else

EXPORT int armchair_supported(void) { return 0; }
EXPORT void *armchair_pool(int workers) { return (void)workers, NULL; }
EXPORT void armchair_end(void *pool) { (void)pool; }
EXPORT int armchair_step(const Model *model, void *pool, int64_t groups, const Group *group, float *x, float *logits,
                         double *spent) {
    return (void)model, (void)pool, (void)groups, (void)group, (void)x, (void)logits, (void)spent, 1;
}

#endif
