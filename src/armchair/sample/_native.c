/* One step of drawing in eight bits, of a token a row, from embedded tokens to logits: its threads, and who computes it.

   Every weight is read once a step and every row is computed by itself, with the same operations in the same order
   whoever is beside it and however many threads there are: sums of whole numbers are exact, and sums of others stay
   within a row and a thread. What is computed is what armchair/sample/engine.py computes for `int8`; tests compare.

   The step itself is _native_step.h, which is compiled once for each kind of x86-64 processor that it is for: with
   AVX-512 and VNNI (_native_avx512.c), and with AVX2 and FMA (_native_avx2.c). Elsewhere armchair_supported() is 0 and
   nothing else may be called. */

#include "_native.h"

#include <stdlib.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

enum { NONE, AVX2, AVX512 }; /* kinds of instructions */

/* The best kind that this processor has. It has those before it too. */
EXPORT int armchair_supported(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        return AVX512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? AVX2 : NONE;
}

/* Threads. Workers wait busily while a step goes on, as the next part is microseconds away, and asleep between steps. */

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

void armchair_each(Step *step, int kind, Part part, int64_t layer, int64_t items) {
    const double began = step->spent ? now() : 0;
    together(step, part, layer, items);
    if (step->spent) step->spent[kind] += now() - began;
}

/* Threads are awake from here to `end`. */
static void begin(Step *step) {
    Pool *pool = step->pool;
    if (!pool || pool->workers == 1) return;
    pool->step = step;
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->awake, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
}

static void end(Step *step) {
    if (step->pool) atomic_store(&step->pool->awake, 0);
}

static void *room(char **at, int64_t bytes) {
    void *here = *at;
    *at += (bytes + 63) / 64 * 64;
    return here;
}

/* x (rows, D): embedded tokens, group after group, of a group token after token, each of all its rows; changed.
   logits (rows, K). `spent`: seconds by kind are added there, where it is not none. Returns 0, or 1 where there is no
   memory. One step at a time with a pool. */
EXPORT int armchair_step(const Model *model, void *pool, int kind, int64_t groups, const Group *group, float *x,
                         float *logits, double *spent) {
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
    begin(&s);
    (kind == AVX512 ? armchair_through_avx512 : armchair_through_avx2)(&s);
    end(&s);
    free(memory);
    return 0;
}

/* x (rows, given): rounded to eight bits a number with a step a row, and multiplied: y (rows, outputs). `given` is the
   inputs of the matrix, filled up with zeros to a multiple of 16. As armchair_step. */
EXPORT int armchair_product(const Matrix *matrix, void *pool, int kind, int64_t rows, int64_t given, float *x,
                            float *y) {
    const int64_t stride = (given + 63) / 64 * 64;
    char *memory = aligned_alloc(64, (rows * (stride + 8) + 2 * 64) / 64 * 64 + 64);
    if (!memory) return 1;
    char *at = memory;
    Step s = {.pool = pool, .rows = rows, .stride = stride, .x = x, .logits = y, .alone = matrix, .given = given};
    s.whole = room(&at, rows * stride);
    s.size = room(&at, 4 * rows);
    s.sum = room(&at, 4 * rows);
    begin(&s);
    (kind == AVX512 ? armchair_multiply_avx512 : armchair_multiply_avx2)(&s);
    end(&s);
    free(memory);
    return 0;
}

#else

EXPORT int armchair_supported(void) { return 0; }
EXPORT void *armchair_pool(int workers) { return (void)workers, NULL; }
EXPORT void armchair_end(void *pool) { (void)pool; }
EXPORT int armchair_step(const Model *model, void *pool, int kind, int64_t groups, const Group *group, float *x,
                         float *logits, double *spent) {
    return (void)model, (void)pool, (void)kind, (void)groups, (void)group, (void)x, (void)logits, (void)spent, 1;
}
EXPORT int armchair_product(const Matrix *matrix, void *pool, int kind, int64_t rows, int64_t given, float *x,
                            float *y) {
    return (void)matrix, (void)pool, (void)kind, (void)rows, (void)given, (void)x, (void)y, 1;
}

#endif
