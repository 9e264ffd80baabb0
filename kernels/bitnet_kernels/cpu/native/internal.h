/* What the C files share: threads, and one table of functions per instruction set. */
#ifndef BITNET_INTERNAL_H
#define BITNET_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>

#include "bitnet_cpu.h"

/* Functions between BN_TARGET_BEGIN("avx2,fma") and BN_TARGET_END are compiled for those
 * instructions, whatever the command line says. Include the headers of intrinsics before them. */
#define BN_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define BN_TARGET_BEGIN(isa) \
    BN_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define BN_TARGET_END BN_PRAGMA(clang attribute pop)
#else
#define BN_TARGET_BEGIN(isa) BN_PRAGMA(GCC push_options) BN_PRAGMA(GCC target(isa))
#define BN_TARGET_END BN_PRAGMA(GCC pop_options)
#endif

#define BN_CACHE_LINE 64

/* Threads */

/* A team of `size` threads; `index` is that of the running thread, 0 to size - 1. */
typedef struct {
    int32_t index, size;
    struct bn_barrier *barrier;
} bn_team;

/* Run task(team, argument) on up to `threads` threads and wait for all of them. */
void bn_parallel(void (*task)(const bn_team *, void *), void *argument, int32_t threads);

/* Wait until every thread of the team is here. Each then sees what the others wrote before. */
void bn_wait(const bn_team *team);

/* This thread's share [*begin, *end) of `count` items, in multiples of `step`. */
static inline void bn_share(
    const bn_team *team, int64_t count, int64_t step, int64_t *begin, int64_t *end
) {
    int64_t blocks = (count + step - 1) / step, size = team->size, index = team->index;
    *begin = blocks * index / size * step;
    *end = blocks * (index + 1) / size * step;
    if (*begin > count) *begin = count;
    if (*end > count) *end = count;
}

/* Operands */

/* A ternary matrix [n, k]: its codes in one of two layouts (bitnet_kernels/packing.py), with the
 * other NULL; a scale per tensor (scale_stride 0) or per row (1); bias [n] or NULL. */
typedef struct {
    int64_t n, k;
    const uint8_t *packed; /* [n, ceil(k/64) * 16] quarter-planes */
    const uint32_t *planes; /* [n, 2, words]: bits of "not 0", bits of "-1" */
    const float *scale;
    int64_t scale_stride;
    const float *bias;
} bn_ternary;

/* Tokens quantized to int8 by absmax. `stride` is ceil(k/64) * 64; codes from k on are 0. */
typedef struct {
    int64_t stride;
    int8_t *codes; /* [m, stride] */
    float *scale; /* [m] */
    int32_t *sum; /* [m], of the codes */
    /* [m, stride / 64, 8]: the eight bits of 64 codes, one word per bit, lowest first. Only
     * addsub of planes reads them. bn_products.bits makes them from the codes. */
    uint64_t *bits;
} bn_tokens;

static inline int64_t bn_padded(int64_t k) { return (k + 63) / 64 * 64; }
/* Words of a bit plane of a row (packing.plane_words): one bit per column, padded to 128. */
static inline int64_t bn_plane_words(int64_t k) { return (bn_padded(k) + 127) / 128 * 4; }

/* Dtypes of numbers in memory. */
typedef enum {
    BN_F32 = BN_MATRIX_F32,
    BN_BF16 = BN_MATRIX_BF16,
    BN_F16 = BN_MATRIX_F16,
    BN_I8 = BN_MATRIX_I8
} bn_dtype;

/* A matrix [n, k] that is not ternary: an output head, or a layer kept in full precision. int8 has
 * a scale per row. */
typedef struct {
    int64_t n, k;
    bn_dtype dtype;
    const void *weight;
    const float *scale;
} bn_dense;

/* Keys and values of one row and one key-value head: [columns, e] each, int8 with a scale per
 * column. */
typedef struct {
    bn_dtype dtype;
    int64_t e;
    void *k, *v;
    float *k_scale, *v_scale;
} bn_cache;

/* Instruction sets */

/* Most tokens and rows of one call of a product. */
#define BN_TOKENS 128
#define BN_ROWS 64

/* Bytes of scratch for a product; aligned to 64. */
#define BN_PRODUCT_SCRATCH (192 * 1024)

/* Ternary products of tokens m0 to m1 and rows n0 to n1 (at most BN_TOKENS and BN_ROWS of them):
 * acc[(m - m0) * ld + (n - n0)], exact modulo 2^32. */
typedef void bn_product(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    int32_t *acc, int64_t ld, void *scratch
);

typedef struct {
    bn_product *dot; /* with multipliers; takes either layout of the weights */
    bn_product *addsub; /* without multipliers; takes planes and the tokens' bits */
    bool addsub_packed; /* addsub also takes packed weights, then without bits */
    /* Make x->bits of tokens m0 to m1. */
    void (*bits)(const bn_tokens *x, int64_t m0, int64_t m1);
    /* out[(m - m0) * out_ld + (n - n0)] = ((float)acc * x->scale[m]) * w->scale[n] (+ w->bias[n]),
     * or += if `add`. acc as from bn_product. */
    void (*rescale)(
        const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
        const int32_t *acc, int64_t ld, bool add, float *out, int64_t out_ld
    );
} bn_products;

/* The functions of portable C, for tables that have none of their own. */
bn_product bn_dot_portable, bn_addsub_portable;
void bn_addsub_bits_portable(const bn_tokens *x, int64_t m0, int64_t m1);
void bn_rescale_portable(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    const int32_t *acc, int64_t ld, bool add, float *out, int64_t out_ld
);

/* One thread's share of y = x W^T, rescaled: written or added to out[t * ld + n] (product.c).
 * `family` is a function of bn_products; `scratch` has bn_linear_scratch(k) bytes, aligned to
 * 64. It does not wait for the other threads. For addsub of planes the tokens need their bits. */
void bn_linear_share(
    const bn_team *team, bn_product *family, const bn_ternary *w, const bn_tokens *x, int64_t m,
    float *out, int64_t ld, bool add, void *scratch
);
size_t bn_linear_scratch(int64_t k); /* at least a float per token and row of a call */

/* The operations on single tokens, in fp32. Outputs may be the inputs. They follow the formulas of
 * bitnet_kernels/reference.py, and give its exact bits where it fixes the order. */
typedef struct {
    /* absmax_int8 of x [k]: codes [stride], 0 from k on; the scale; the sum of the codes */
    void (*quant)(
        const float *x, int64_t k, int8_t *codes, int64_t stride, float *scale, int32_t *sum
    );
    /* weight [k] or NULL */
    void (*rmsnorm)(const float *x, const float *weight, float eps, int64_t k, float *y);
    /* quant of rmsnorm, whose result is not stored */
    void (*rmsnorm_quant)(
        const float *x, const float *weight, float eps, int64_t k, int8_t *codes, int64_t stride,
        float *scale, int32_t *sum
    );
    /* quant of rmsnorm of relu2_mul */
    void (*relu2_mul_rmsnorm_quant)(
        const float *gate, const float *up, const float *weight, float eps, int64_t k,
        int8_t *codes, int64_t stride, float *scale, int32_t *sum
    );
    void (*relu2_mul)(const float *gate, const float *up, int64_t k, float *y);
    void (*silu_mul)(const float *gate, const float *up, int64_t k, float *y);
    /* rotate_half of one head x [e]; cos, sin [e] */
    void (*rotate)(const float *x, const float *cos, const float *sin, int64_t e, float *y);
    /* x [k] = row [k] of a matrix of that dtype (not int8) */
    void (*widen)(const void *row, bn_dtype dtype, int64_t k, float *x);
    /* Write key and value of one head [e] into a column of the cache. */
    void (*append)(const bn_cache *cache, int64_t column, const float *k, const float *v);
    /* Softmax attention: `count` queries (of several heads or tokens, each `q_stride` after the one
     * before), query i over columns 0 to last[i]; y likewise. e <= BN_HEAD. It is fastest to give
     * together queries that share keys and values: those of one token, or of a block of tokens.
     * `scratch`: bn_attend_scratch bytes, aligned to 64. */
    void (*attend)(
        const bn_cache *cache, const float *q, int64_t q_stride, const int64_t *last, int64_t count,
        float *y, int64_t y_stride, void *scratch
    );
    /* out[m * ld + (n - n0)] = sum_k x[m, k] w[n, k] for rows n0 to n1; x [m, x_stride] */
    void (*dense)(
        const bn_dense *w, const float *x, int64_t x_stride, int64_t m, int64_t n0, int64_t n1,
        float *out, int64_t ld
    );
    /* The same for an int8 matrix and quantized tokens: ((acc * s_x) * scale[n]) */
    void (*dense_int8)(
        const bn_dense *w, const bn_tokens *x, int64_t m, int64_t n0, int64_t n1, float *out,
        int64_t ld
    );
} bn_rows;
/* Bytes for caches of `columns` columns and calls of up to `count` queries. */
size_t bn_attend_scratch(int64_t columns, int64_t count);
#define BN_HEAD 256 /* most channels of a head */
#define BN_ATTEND_FEW 8 /* queries for which all scores are kept */
#define BN_ATTEND_TILE 64 /* columns that more queries take together */

/* Random numbers that depend only on the seed and their place, so that any thread can make any of
 * them: the key of a row, by SplitMix64's output function; then one multiplication round before and
 * one after its upper half (the multipliers of lowbias32). Uniform in [0, 1), in steps of 2^-24. */
static inline uint64_t bn_row_key(uint64_t seed, int64_t row) {
    uint64_t key = seed + 0x9e3779b97f4a7c15 * ((uint64_t)row + 1);
    key = (key ^ (key >> 30)) * 0xbf58476d1ce4e5b9;
    key = (key ^ (key >> 27)) * 0x94d049bb133111eb;
    return key ^ (key >> 31);
}

static inline float bn_uniform(uint64_t row_key, uint32_t column) {
    uint32_t x = column * 0x9e3779b9 + (uint32_t)row_key;
    x = (x ^ (x >> 16)) * 0x21f0aaad;
    x ^= (uint32_t)(row_key >> 32);
    x = (x ^ (x >> 15)) * 0x735a2d97;
    x ^= x >> 15;
    return (float)(int32_t)(x >> 8) * 0x1p-24f;
}

/* Functions that only training needs, in fp32, over a thread's share (train.inc.h). No sum depends
 * on the number of threads or on the instructions. */
typedef struct {
    /* The gradients of RMSNorm: dx [m, k], and dw [k], the sum over these m tokens; r [m] is each
     * token's 1 / rms */
    void (*norm_backward)(
        const float *dy, const float *x, const float *weight, const float *r, int64_t m, int64_t k,
        float *dx, float *dw
    );
    /* The gradients of relu(gate)^2 * up of n numbers */
    void (*gate_backward)(
        const float *dy, const float *gate, const float *up, int64_t n, float *dgate, float *dup
    );
    /* Cross-entropy of one token, in place: logits z [n] become the softmax minus 1 at the target.
     * Returns logsumexp(z) - z[target]. */
    float (*cross_entropy)(float *z, int64_t n, int64_t target);
    /* int32 acc [m, n] to fp32 ((acc * s) * scale) (+ bias), in place; s [m] */
    void (*rescale)(
        void *acc, const float *s, const float *scale, int64_t scale_stride, const float *bias,
        int64_t m, int64_t n
    );
    /* The largest of `seen` and the magnitudes of x [n], as bits: above 0x7f7fffff if any of
     * them is not finite */
    uint32_t (*largest)(const float *x, int64_t n, uint32_t seen);
    /* The same for n columns of x [m, ld] times s [m]; updates seen [n] */
    void (*largest_of_columns)(
        const float *x, int64_t ld, const float *s, int64_t m, int64_t n, uint32_t *seen
    );
    /* Sum of trunc(|x| * units) */
    int64_t (*sum_of_units)(const float *x, int64_t n, float units);
    /* Ternary codes: 1 above the threshold, -1 below its negative */
    void (*ternary)(const float *x, int64_t n, float threshold, int8_t *codes);
    /* floor(x / scale + u) of a row x [n], within +-127; 0 if the scale is NaN */
    void (*stochastic)(const float *x, int64_t n, float scale, uint64_t row_key, int8_t *codes);
    /* The same for n columns of x [m, ld] times s [m], from number `column` on, into the rows of
     * codes [n, stride]; u as for rounding these rows */
    void (*stochastic_columns)(
        const float *x, int64_t ld, const float *s, int64_t m, int64_t n, const float *scale,
        uint64_t seed, int64_t column, int8_t *codes, int64_t stride
    );
    /* x * s / scale rounded to integers below 2^22, for n columns of x [m, ld] and s [m], in
     * three digits of base 256, lowest first, each in a plane of codes [n, stride]; 0 if the
     * scale is NaN */
    void (*digits_of_columns)(
        const float *x, int64_t ld, const float *s, int64_t m, int64_t n, const float *scale,
        int8_t *codes, int64_t stride, int64_t plane
    );
    /* y [n] = (acc + 256 acc' + 256^2 acc'') * scale, of three planes of acc */
    void (*sum_of_digits)(const int32_t *acc, int64_t plane, int64_t n, float scale, float *y);
} bn_training;

typedef struct {
    const char *name;
    bool (*runs)(void); /* whether this CPU has the instructions */
    const bn_products *products;
    const bn_rows *rows;
    const bn_training *training;
} bn_isa;

/* The instruction set in use. */
const bn_isa *bn_isa_current(void);

extern const bn_products bn_products_portable;
extern const bn_rows bn_rows_portable;
extern const bn_training bn_training_portable;
#if defined(__x86_64__)
extern const bn_products bn_products_avx512, bn_products_avx2;
extern const bn_rows bn_rows_avx512, bn_rows_avx2;
extern const bn_training bn_training_avx512, bn_training_avx2;
#elif defined(__aarch64__)
extern const bn_products bn_products_neon;
extern const bn_rows bn_rows_neon;
#endif

#endif
