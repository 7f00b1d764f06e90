/* What the parts of the compiled step share: a prior and its caches as Python lays them out, the threads, a step under way. */

#ifndef ARMCHAIR_NATIVE_H
#define ARMCHAIR_NATIVE_H

#include <stdint.h>

#define OUTPUTS 64 /* of a block of a matrix */

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

typedef struct Pool Pool;
typedef struct Step Step;
typedef void (*Part)(Step *step, int64_t layer, int64_t item, int worker);

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
    const Matrix *alone; /* of a product that is no part of a step: of x (rows, given), with `logits` for what it gives */
    int64_t given;
};

enum { ROWS, PRODUCTS, KEEPING, ATTENTION, HEAD, KINDS }; /* of parts, for who asks what takes how long */

/* Do a part for each of its items, by all threads of the step; its time is added to what that kind took. */
void armchair_each(Step *step, int kind, Part part, int64_t layer, int64_t items);

/* By the instructions of a kind of processor: the blocks and the head for the rows of a step, and a product alone. */
void armchair_through_avx512(Step *step);
void armchair_through_avx2(Step *step);
void armchair_multiply_avx512(Step *step);
void armchair_multiply_avx2(Step *step);

#endif
