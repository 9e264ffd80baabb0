/* The entry points of functions that only training needs; threads share tokens or numbers.
 *
 * Sums over tokens are taken per block of a fixed size and then over the blocks, so results do not
 * depend on the number of threads.
 */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "internal.h"

#define NORM_BLOCK 32 /* tokens per partial sum of the gradient of the norm's weight */
#define NUMBERS 4096 /* a share is a multiple of this: whole pages */

typedef struct {
    const bn_training *isa;
    const float *dy, *x, *weight, *r;
    int64_t m, k;
    float *dx, *dw, *scratch;
} norm_job;

static void norm_backward_share(const bn_team *team, void *argument) {
    const norm_job *job = argument;
    int64_t begin, end, k = job->k, m = job->m;
    bn_share(team, m, NORM_BLOCK, &begin, &end);
    for (int64_t i = begin; i < end; i += NORM_BLOCK) {
        int64_t rows = end - i < NORM_BLOCK ? end - i : NORM_BLOCK;
        job->isa->norm_backward(
            job->dy + i * k, job->x + i * k, job->weight, job->r + i, rows, k, job->dx + i * k,
            job->scratch + i / NORM_BLOCK * k
        );
    }
    bn_wait(team);
    bn_share(team, k, BN_CACHE_LINE, &begin, &end);
    for (int64_t j = begin; j < end; j++) job->dw[j] = 0;
    for (int64_t i = 0; i < (m + NORM_BLOCK - 1) / NORM_BLOCK; i++)
        for (int64_t j = begin; j < end; j++) job->dw[j] += job->scratch[i * k + j];
}

void bn_train_norm_backward(
    const float *dy, const float *x, const float *weight, const float *r, int64_t m, int64_t k,
    float *dx, float *dw, float *scratch, int32_t threads
) {
    norm_job job = {.isa = bn_isa_current()->training, .dy = dy, .x = x, .weight = weight, .r = r};
    job.m = m, job.k = k, job.dx = dx, job.dw = dw, job.scratch = scratch;
    bn_parallel(norm_backward_share, &job, threads);
}

typedef struct {
    const bn_training *isa;
    const float *dy, *gate, *up;
    int64_t n;
    float *dgate, *dup;
} gate_job;

static void gate_backward_share(const bn_team *team, void *argument) {
    const gate_job *job = argument;
    int64_t i, end;
    bn_share(team, job->n, NUMBERS, &i, &end);
    job->isa->gate_backward(
        job->dy + i, job->gate + i, job->up + i, end - i, job->dgate + i, job->dup + i
    );
}

void bn_train_gate_backward(
    const float *dy, const float *gate, const float *up, int64_t n, float *dgate, float *dup,
    int32_t threads
) {
    gate_job job = {.isa = bn_isa_current()->training, .dy = dy, .gate = gate, .up = up};
    job.n = n, job.dgate = dgate, job.dup = dup;
    bn_parallel(gate_backward_share, &job, threads);
}

typedef struct {
    const bn_training *isa;
    float *z;
    const int64_t *target;
    int64_t m, n;
    float *loss;
} cross_entropy_job;

static void cross_entropy_share(const bn_team *team, void *argument) {
    const cross_entropy_job *job = argument;
    int64_t i, end;
    bn_share(team, job->m, 1, &i, &end);
    for (; i < end; i++)
        job->loss[i] = job->isa->cross_entropy(job->z + i * job->n, job->n, job->target[i]);
}

void bn_cross_entropy(
    float *z, const int64_t *target, int64_t m, int64_t n, float *loss, int32_t threads
) {
    cross_entropy_job job = {bn_isa_current()->training, z, target, m, n, loss};
    bn_parallel(cross_entropy_share, &job, threads);
}

typedef struct {
    const bn_training *isa;
    char *acc;
    const float *s, *scale, *bias;
    int64_t scale_stride, m, n;
} rescale_job;

static void rescale_share(const bn_team *team, void *argument) {
    const rescale_job *job = argument;
    int64_t i, end;
    bn_share(team, job->m, 1, &i, &end);
    job->isa->rescale(
        job->acc + i * job->n * 4, job->s + i, job->scale, job->scale_stride, job->bias, end - i,
        job->n
    );
}

void bn_train_rescale(
    void *acc, const float *s, const float *scale, int64_t scale_stride, const float *bias,
    int64_t m, int64_t n, int32_t threads
) {
    rescale_job job = {bn_isa_current()->training, acc, s, scale, bias, scale_stride, m, n};
    bn_parallel(rescale_share, &job, threads);
}

typedef struct {
    const bn_training *isa;
    const float *weight;
    int64_t n;
    float alpha;
    int8_t *codes;
    float *gamma;
    _Atomic uint32_t largest; /* magnitude, as bits */
    _Atomic int64_t total; /* of all magnitudes, in units */
} absmean_job;

static void raise_to(_Atomic uint32_t *largest, uint32_t bits) {
    uint32_t seen = *largest;
    while (bits > seen && !atomic_compare_exchange_weak(largest, &seen, bits)) {}
}

static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* reference.clamped_mean: each magnitude is truncated to a whole number of units, so that the
 * sum is exact in any order. */
static void absmean_share(const bn_team *team, void *argument) {
    absmean_job *job = argument;
    int64_t i, end;
    bn_share(team, job->n, NUMBERS, &i, &end);
    raise_to(&job->largest, job->isa->largest(job->weight + i, end - i, 0));
    bn_wait(team);
    uint32_t largest = job->largest, least = 67u << 23, bits = 61; /* least: 2^-60 */
    for (uint64_t terms = 1; terms < (uint64_t)job->n; terms *= 2) bits--;
    float gamma = NAN;
    if (largest <= 0x7f7fffff) {
        uint32_t exponent = (largest > least ? largest : least) >> 23;
        float units_per_one = float_of((254 + bits - exponent) << 23);
        float unit = float_of((exponent - bits) << 23);
        job->total += job->isa->sum_of_units(job->weight + i, end - i, units_per_one);
        bn_wait(team);
        gamma = (float)((double)job->total * unit / (double)job->n);
        gamma = gamma > 1e-5f ? gamma : 1e-5f;
    }
    job->isa->ternary(job->weight + i, end - i, job->alpha * gamma, job->codes + i);
    if (team->index == 0) *job->gamma = gamma;
}

void bn_absmean(
    const float *weight, int64_t n, float alpha, int8_t *codes, float *gamma, int32_t threads
) {
    absmean_job job = {bn_isa_current()->training, weight, n, alpha, codes, gamma, 0, 0};
    bn_parallel(absmean_share, &job, threads);
}

typedef struct {
    const bn_training *isa;
    const float *x, *s;
    int64_t m, n;
    uint64_t seed;
    int8_t *codes;
    float *scale;
} stochastic_job;

/* Largest codes: of int8, and of three 8-bit digits. */
#define INT8_CODES 127.0f
#define DIGITS_CODES 4128768.0f /* 63 * 256^2 */

/* The largest magnitude divided by the largest code, at least the smallest normal number; NaN if
 * the magnitude is not finite. */
static float scale_of(uint32_t largest, float codes) {
    float scale = float_of(largest) / codes;
    if (largest > 0x7f7fffff) return NAN;
    return scale > 0x1p-126f ? scale : 0x1p-126f;
}

static void stochastic_share(const bn_team *team, void *argument) {
    const stochastic_job *job = argument;
    int64_t i, end, n = job->n;
    bn_share(team, job->m, 1, &i, &end);
    for (; i < end; i++) {
        const float *row = job->x + i * n;
        job->scale[i] = scale_of(job->isa->largest(row, n, 0), INT8_CODES);
        uint64_t key = bn_row_key(job->seed, i);
        job->isa->stochastic(row, n, job->scale[i], key, job->codes + i * n);
    }
}

void bn_stochastic(
    const float *x, int64_t m, int64_t n, uint64_t seed, int8_t *codes, float *scale,
    int32_t threads
) {
    stochastic_job job = {bn_isa_current()->training, x, NULL, m, n, seed, codes, scale};
    bn_parallel(stochastic_share, &job, threads);
}

/* The scales of this thread's columns [*begin, *end). */
static void scale_columns(
    const bn_team *team, const stochastic_job *job, float codes, int64_t *begin, int64_t *end
) {
    enum { COLUMNS = 512 };
    uint32_t seen[COLUMNS];
    bn_share(team, job->n, 64, begin, end);
    for (int64_t j = *begin; j < *end; j += COLUMNS) {
        int64_t columns = *end - j < COLUMNS ? *end - j : COLUMNS;
        memset(seen, 0, sizeof seen);
        job->isa->largest_of_columns(job->x + j, job->n, job->s, job->m, columns, seen);
        for (int64_t c = 0; c < columns; c++) job->scale[j + c] = scale_of(seen[c], codes);
    }
}

static void stochastic_columns_share(const bn_team *team, void *argument) {
    const stochastic_job *job = argument;
    int64_t j, end, m = job->m, n = job->n;
    scale_columns(team, job, INT8_CODES, &j, &end);
    job->isa->stochastic_columns(
        job->x + j, n, job->s, m, end - j, job->scale + j, job->seed, j, job->codes + j * m, m
    );
}

void bn_stochastic_columns(
    const float *x, const float *s, int64_t m, int64_t n, uint64_t seed, int8_t *codes,
    float *scale, int32_t threads
) {
    stochastic_job job = {bn_isa_current()->training, x, s, m, n, seed, codes, scale};
    bn_parallel(stochastic_columns_share, &job, threads);
}

static void digits_share(const bn_team *team, void *argument) {
    const stochastic_job *job = argument;
    int64_t j, end, m = job->m, n = job->n;
    scale_columns(team, job, DIGITS_CODES, &j, &end);
    job->isa->digits_of_columns(
        job->x + j, n, job->s, m, end - j, job->scale + j, job->codes + j * m, m, n * m
    );
}

void bn_digits_columns(
    const float *x, const float *s, int64_t m, int64_t n, int8_t *codes, float *scale,
    int32_t threads
) {
    stochastic_job job = {bn_isa_current()->training, x, s, m, n, 0, codes, scale};
    bn_parallel(digits_share, &job, threads);
}

typedef struct {
    const bn_training *isa;
    const int32_t *acc;
    const float *scale;
    int64_t m, n;
    float *y;
} digits_job;

static void sum_of_digits_share(const bn_team *team, void *argument) {
    const digits_job *job = argument;
    int64_t i, end, n = job->n;
    bn_share(team, job->m, 1, &i, &end);
    for (; i < end; i++)
        job->isa->sum_of_digits(job->acc + i * n, job->m * n, n, job->scale[i], job->y + i * n);
}

void bn_sum_of_digits(
    const int32_t *acc, const float *scale, int64_t m, int64_t n, float *y, int32_t threads
) {
    digits_job job = {bn_isa_current()->training, acc, scale, m, n, y};
    bn_parallel(sum_of_digits_share, &job, threads);
}
