/* The operations on single tokens: bn_rows of internal.h, written once for all instruction sets.
 *
 * A rows_*.c includes this file between BN_TARGET_BEGIN and BN_TARGET_END, after it has defined
 * what differs between instruction sets:
 *
 *     BN_ROWS_TABLE          the name of the table
 *     DENSE_ROWS, DENSE_TOKENS  the tile of a dense product with many tokens
 *     ROWS_AHEAD                bytes that a product with one token prefetches; 0: none
 *     LANES                  fp32 numbers of a register
 *     vf                     the type of a register of them
 *     FMA(a, b, c)           a * b + c, rounded once or twice
 *     MAX(a, b)              the larger of each lane; anything if one of them is a NaN
 *     BF16_LOAD, F16_LOAD, I8_LOAD, F16_STORE
 *                            LANES numbers of that dtype, from and to an address
 *     sums8(a, out)          out[i] = the sum of the lanes of a[i], i < 8
 *     DOT_BYTES, DOT_BIAS, vdot, DOT(acc, w, x), dot_sum(acc)
 *                            acc += the products of DOT_BYTES codes at two addresses, w with
 *                            DOT_BIAS added to each
 *
 * Where the reference fixes the order of operations, the loops are plain C in that order, and the
 * compiler vectorizes them. Sums that may be added in any order are written with vector types.
 */
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#if defined(__clang__)
#define IN_PLACE _Pragma("clang loop vectorize(assume_safety)")
#else
#define IN_PLACE _Pragma("GCC ivdep") /* outputs may be the inputs, element by element */
#endif

typedef double vd __attribute__((vector_size(4 * LANES)));
typedef float vf_half __attribute__((vector_size(2 * LANES)));

#define AHEAD 4096 /* bytes of the cache that are prefetched before they are read */
#define AHEAD_DENSE 8192 /* the same for a matrix */
#define FINITE 0x7f7fffff /* the bits of the largest finite fp32 */
#define ROUND 12582912.0f /* 1.5 * 2^23: adding it rounds half to even, to integers */

INLINE int32_t bits_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float from_bits(int32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

INLINE vf all(float x) { return x - (vf){0}; }

/* Quantization and norms */

/* The bits of the largest |x|; above FINITE if there is a NaN or an infinity. */
INLINE int32_t largest(const float *x, int64_t k) {
    int32_t most = 0;
    for (int64_t i = 0; i < k; i++) {
        int32_t bits = bits_of(x[i]) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return most;
}

/* The scale of a token whose largest |x| has the bits `most`. */
INLINE float scale_of(int32_t most) {
    float absmax = from_bits(most);
    if (most > FINITE) return from_bits(0x7fc00000);
    return (absmax < 1e-5f ? 1e-5f : absmax) / 127.0f;
}

INLINE int32_t code_of(float x, float scale) { return bits_of(x / scale + ROUND) - 0x4b400000; }

/* x [k] -> codes [stride] */
static void quant(
    const float *restrict x, int64_t k, int8_t *restrict codes, int64_t stride, float *scale,
    int32_t *sum
) {
    int32_t most = largest(x, k), total = 0;
    float s = scale_of(most);
    *scale = s;
    if (most > FINITE) {
        memset(codes, 0, (size_t)stride);
        *sum = 0;
        return;
    }
    for (int64_t i = 0; i < k; i++) {
        int32_t code = code_of(x[i], s);
        codes[i] = (int8_t)code;
        total += code;
    }
    if (stride > k) memset(codes + k, 0, (size_t)(stride - k));
    *sum = total;
}

/* The input of the norm: x, or relu(x)^2 * up. */
typedef enum { X, RELU2_MUL } source;

INLINE float value_of(const source from, const float *x, const float *up, int64_t i) {
    if (from == X) return x[i];
    float gate = x[i] < 0.0f ? 0.0f : x[i]; /* a NaN stays one */
    return gate * gate * up[i];
}

INLINE vf values_of(const source from, const float *x, const float *up, int64_t i) {
    if (from == X) return load(x + i);
    vf gate = MAX(load(x + i), (vf){0});
    return gate * gate * load(up + i);
}

INLINE int32_t largest_of(const source from, const float *x, const float *up, int64_t k) {
    int32_t most = 0;
    for (int64_t i = 0; i < k; i++) {
        int32_t bits = bits_of(value_of(from, x, up, i)) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return most;
}

INLINE vd squares(vf_half v, vd grid) {
    vd x = __builtin_convertvector(v, vd);
    return (x * x + grid) - grid;
}

/* 1 / sqrt(mean(x^2) + eps) of k values; a NaN if one is a NaN or an infinity. The mean uses the
 * reference's exact_sum: its terms have so few bits that no addition rounds, in any order. */
INLINE float rstd_of(const source from, const float *x, const float *up, int64_t k, float eps) {
    int32_t most = largest_of(from, x, up, k);
    if (most > FINITE) return from_bits(0x7fc00000);
    double top = from_bits(most), grid; /* the largest square is the square of the largest */
    top *= top;
    int64_t exponent;
    memcpy(&exponent, &top, sizeof top);
    exponent &= 0x7ff0000000000000;
    memcpy(&grid, &exponent, sizeof grid);
    grid *= 2;
    for (int64_t rest = k - 1; rest > 0; rest >>= 1) grid *= 2;

    vd grids = grid - (vd){0}, a = {0}, b = {0};
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
        vf v = values_of(from, x, up, i);
        vf_half half[2];
        memcpy(half, &v, sizeof half);
        a += squares(half[0], grids);
        b += squares(half[1], grids);
    }
    a += b;
    double total = 0;
    for (int j = 0; j < LANES / 2; j++) total += a[j];
    for (; i < k; i++) {
        double v = value_of(from, x, up, i);
        total += (v * v + grid) - grid;
    }
    float mean_square = (float)(total / (double)k);
    return 1.0f / (float)__builtin_sqrt((double)(mean_square + eps));
}

/* x, weight, y [k] */
static void rmsnorm(const float *x, const float *weight, float eps, int64_t k, float *y) {
    float rstd = rstd_of(X, x, NULL, k, eps);
    if (weight == NULL) {
        IN_PLACE
        for (int64_t i = 0; i < k; i++) y[i] = x[i] * rstd;
    } else {
        IN_PLACE
        for (int64_t i = 0; i < k; i++) y[i] = x[i] * rstd * weight[i];
    }
}

INLINE void norm_quant(
    const source from, const bool weighted, const float *restrict x, const float *restrict up,
    const float *restrict weight, float eps, int64_t k, int8_t *restrict codes, int64_t stride,
    float *scale, int32_t *sum
) {
    float rstd = rstd_of(from, x, up, k, eps);
    int32_t most = 0, total = 0;
    for (int64_t i = 0; i < k; i++) {
        float y = value_of(from, x, up, i) * rstd;
        int32_t bits = bits_of(weighted ? y * weight[i] : y) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float s = scale_of(most);
    *scale = s;
    if (most > FINITE) {
        memset(codes, 0, (size_t)stride);
        *sum = 0;
        return;
    }
    for (int64_t i = 0; i < k; i++) {
        float y = value_of(from, x, up, i) * rstd;
        int32_t code = code_of(weighted ? y * weight[i] : y, s);
        codes[i] = (int8_t)code;
        total += code;
    }
    if (stride > k) memset(codes + k, 0, (size_t)(stride - k));
    *sum = total;
}

static void rmsnorm_quant(
    const float *x, const float *weight, float eps, int64_t k, int8_t *codes, int64_t stride,
    float *scale, int32_t *sum
) {
    if (weight == NULL)
        norm_quant(X, false, x, NULL, NULL, eps, k, codes, stride, scale, sum);
    else
        norm_quant(X, true, x, NULL, weight, eps, k, codes, stride, scale, sum);
}

static void relu2_mul_rmsnorm_quant(
    const float *gate, const float *up, const float *weight, float eps, int64_t k, int8_t *codes,
    int64_t stride, float *scale, int32_t *sum
) {
    if (weight == NULL)
        norm_quant(RELU2_MUL, false, gate, up, NULL, eps, k, codes, stride, scale, sum);
    else
        norm_quant(RELU2_MUL, true, gate, up, weight, eps, k, codes, stride, scale, sum);
}

/* Gates and rotary positions */

/* y = relu(gate)^2 * up, [k] each; a NaN stays one */
static void relu2_mul(const float *gate, const float *up, int64_t k, float *y) {
    IN_PLACE
    for (int64_t i = 0; i < k; i++) y[i] = value_of(RELU2_MUL, gate, up, i);
}

/* exp(x) of x <= 0 within 2^-22, 0 below 2^-126; a NaN stays one. Cephes' polynomial, without fused
 * operations, so that every instruction set gives the same bits. */
INLINE float exp_of(float x) {
    float n = x * 1.44269504f + ROUND;
    int32_t scale = (int32_t)((uint32_t)(bits_of(n) - 0x4b400000 + 127) << 23);
    n -= ROUND;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * (r * r) + r) + 1.0f;
    return x < -87.0f ? 0.0f : p * from_bits(scale);
}

/* y = gate / (1 + exp(-gate)) * up, [k] each */
static void silu_mul(const float *gate, const float *up, int64_t k, float *y) {
    IN_PLACE
    for (int64_t i = 0; i < k; i++) {
        float g = gate[i], t = exp_of(g < 0.0f ? g : -g);
        y[i] = g * (g < 0.0f ? t : 1.0f) / (1.0f + t) * up[i];
    }
}

/* x, cos, sin, y [e] */
static void rotate(const float *x, const float *cos, const float *sin, int64_t e, float *y) {
    int64_t half = e / 2;
    IN_PLACE
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        y[i] = a * cos[i] - b * sin[i];
        y[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

/* Numbers in memory */

INLINE int64_t size_of(bn_dtype dtype) { return dtype == BN_F32 ? 4 : dtype == BN_I8 ? 1 : 2; }

/* LANES numbers from number i of p on, as fp32. */
INLINE vf load_as(bn_dtype dtype, const void *p, int64_t i) {
    const char *at = (const char *)p + i * size_of(dtype);
    if (dtype == BN_F32) return load((const float *)at);
    if (dtype == BN_F16) return F16_LOAD(at);
    return dtype == BN_BF16 ? BF16_LOAD(at) : I8_LOAD(at);
}

/* `count` < LANES numbers as in load_as, then zeros. */
INLINE vf load_part(bn_dtype dtype, const void *p, int64_t i, int64_t count) {
    float part[LANES] = {0}; /* LANES numbers of any dtype */
    memcpy(part, (const char *)p + i * size_of(dtype), (size_t)(count * size_of(dtype)));
    return load_as(dtype, part, 0);
}

/* LANES numbers from number i on of a row of k; zeros from k on. */
INLINE vf load_up_to(bn_dtype dtype, const void *row, int64_t i, int64_t k) {
    return i + LANES <= k ? load_as(dtype, row, i) : load_part(dtype, row, i, k - i);
}

INLINE void widen_as(bn_dtype dtype, const void *row, int64_t k, float *x) {
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) store(x + i, load_as(dtype, row, i));
    if (i < k) {
        vf last = load_part(dtype, row, i, k - i);
        memcpy(x + i, &last, (size_t)(k - i) * 4);
    }
}

static void widen(const void *row, bn_dtype dtype, int64_t k, float *x) {
    if (dtype == BN_F32)
        memcpy(x, row, (size_t)k * 4);
    else if (dtype == BN_BF16)
        widen_as(BN_BF16, row, k, x);
    else
        widen_as(BN_F16, row, k, x);
}

/* x [e] -> column `column` of `matrix` [columns, e], and its scale if that is int8 */
INLINE void append_one(
    bn_dtype dtype, const float *x, int64_t e, int64_t column, void *matrix, float *scale
) {
    void *at = (char *)matrix + column * e * size_of(dtype);
    if (dtype == BN_F32) {
        memcpy(at, x, (size_t)e * 4);
    } else if (dtype == BN_BF16) {
        uint16_t *half = at;
        for (int64_t i = 0; i < e; i++) {
            uint32_t bits = (uint32_t)bits_of(x[i]);
            uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
            half[i] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
        }
    } else if (dtype == BN_F16) {
        int64_t i = 0;
        for (; i + LANES <= e; i += LANES) F16_STORE((char *)at + i * 2, load(x + i));
        if (i < e) {
            uint16_t part[LANES];
            F16_STORE(part, load_part(BN_F32, x, i, e - i));
            memcpy((char *)at + i * 2, part, (size_t)(e - i) * 2);
        }
    } else {
        int32_t sum;
        quant(x, e, at, e, scale + column, &sum);
    }
}

static void append(const bn_cache *cache, int64_t column, const float *k, const float *v) {
    append_one(cache->dtype, k, cache->e, column, cache->k, cache->k_scale);
    append_one(cache->dtype, v, cache->e, column, cache->v, cache->v_scale);
}

/* Matrices that are not ternary */

/* `rows` rows from w on times `tokens` tokens; rows * tokens is a multiple of 8 */
INLINE void dense_tile(
    bn_dtype dtype, const int rows, const int tokens, const char *w, int64_t k, const float *x,
    int64_t x_stride, float *out, int64_t ld
) {
    int64_t row = k * size_of(dtype), i = 0;
    vf acc[32];
    UNROLL for (int j = 0; j < rows * tokens; j++) acc[j] = (vf){0};
    for (; i + LANES <= k; i += LANES) {
        vf weight[8];
        UNROLL for (int r = 0; r < rows; r++) {
            __builtin_prefetch(w + (rows * i + r * LANES) * size_of(dtype) + AHEAD_DENSE);
            weight[r] = load_as(dtype, w + r * row, i);
        }
        UNROLL for (int m = 0; m < tokens; m++) {
            vf v = load(x + m * x_stride + i);
            UNROLL for (int r = 0; r < rows; r++)
                acc[m * rows + r] = FMA(weight[r], v, acc[m * rows + r]);
        }
    }
    if (i < k)
        for (int r = 0; r < rows; r++) {
            vf weight = load_part(dtype, w + r * row, i, k - i);
            for (int m = 0; m < tokens; m++) {
                vf v = load_part(BN_F32, x + m * x_stride, i, k - i);
                acc[m * rows + r] = FMA(weight, v, acc[m * rows + r]);
            }
        }
    float sums[32];
    UNROLL for (int j = 0; j < rows * tokens; j += 8) sums8(acc + j, sums + j);
    UNROLL for (int m = 0; m < tokens; m++)
        memcpy(out + m * ld, sums + m * rows, (size_t)rows * 4);
}

/* 8 rows from w on times one token, one row after the other. The loop is bound by memory, and
 * some CPUs read sequentially twice as fast as several rows at once. It prefetches ROWS_AHEAD
 * bytes ahead, or nothing if that is 0. */
INLINE void dense_rows(bn_dtype dtype, const char *w, int64_t k, const float *x, float *out) {
    vf acc[8];
    for (int r = 0; r < 8; r++, w += k * size_of(dtype)) {
        vf sum[4] = {{0}}; /* a single sum would wait for each addition, longer than for memory */
        int64_t i = 0;
        for (; i + 4 * LANES <= k; i += 4 * LANES) {
            if (ROWS_AHEAD)
                UNROLL for (int j = 0; j < 4 * LANES * size_of(dtype); j += BN_CACHE_LINE)
                    __builtin_prefetch(w + i * size_of(dtype) + j + ROWS_AHEAD);
            UNROLL for (int j = 0; j < 4; j++)
                sum[j] = FMA(load_as(dtype, w, i + j * LANES), load(x + i + j * LANES), sum[j]);
        }
        for (; i + LANES <= k; i += LANES) sum[0] = FMA(load_as(dtype, w, i), load(x + i), sum[0]);
        if (i < k)
            sum[1] = FMA(load_part(dtype, w, i, k - i), load_part(BN_F32, x, i, k - i), sum[1]);
        acc[r] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
    sums8(acc, out);
}

/* One row and one token. */
INLINE float dense_one(bn_dtype dtype, const char *w, int64_t k, const float *x) {
    vf acc[8] = {{0}};
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) acc[0] = FMA(load_as(dtype, w, i), load(x + i), acc[0]);
    if (i < k)
        acc[0] =
            FMA(load_part(dtype, w, i, k - i), load_part(BN_F32, x, i, k - i), acc[0]);
    float sums[8];
    sums8(acc, sums);
    return sums[0];
}

/* Rows in blocks of 8, which stay in the L1 cache for all tokens. */
INLINE void dense_as(
    bn_dtype dtype, const bn_dense *w, const float *x, int64_t x_stride, int64_t m, int64_t n0,
    int64_t n1, float *out, int64_t ld
) {
    int64_t k = w->k, row = k * size_of(dtype), n = n0;
    for (; n + 8 <= n1; n += 8) {
        const char *rows = (const char *)w->weight + n * row;
        float *to = out + (n - n0);
        int64_t t = 0;
        for (; t + DENSE_TOKENS <= m; t += DENSE_TOKENS)
            for (int r = 0; r < 8; r += DENSE_ROWS)
                dense_tile(
                    dtype, DENSE_ROWS, DENSE_TOKENS, rows + r * row, k, x + t * x_stride, x_stride,
                    to + t * ld + r, ld
                );
        for (; t + 4 <= m; t += 4)
            for (int r = 0; r < 8; r += 2)
                dense_tile(
                    dtype, 2, 4, rows + r * row, k, x + t * x_stride, x_stride, to + t * ld + r, ld
                );
        for (; t + 2 <= m; t += 2)
            for (int r = 0; r < 8; r += 4)
                dense_tile(
                    dtype, 4, 2, rows + r * row, k, x + t * x_stride, x_stride, to + t * ld + r, ld
                );
        if (t < m) dense_rows(dtype, rows, k, x + t * x_stride, to + t * ld);
    }
    for (; n < n1; n++)
        for (int64_t t = 0; t < m; t++)
            out[t * ld + (n - n0)] =
                dense_one(dtype, (const char *)w->weight + n * row, k, x + t * x_stride);
}

static void dense(
    const bn_dense *w, const float *x, int64_t x_stride, int64_t m, int64_t n0, int64_t n1,
    float *out, int64_t ld
) {
    if (w->dtype == BN_F32)
        dense_as(BN_F32, w, x, x_stride, m, n0, n1, out, ld);
    else if (w->dtype == BN_BF16)
        dense_as(BN_BF16, w, x, x_stride, m, n0, n1, out, ld);
    else
        dense_as(BN_F16, w, x, x_stride, m, n0, n1, out, ld);
}

/* `rows` rows from w on times `tokens` tokens from number m on; scale, out: of the first row */
INLINE void dense_int8_tile(
    const int rows, const int tokens, const int8_t *w, const float *scale, int64_t k,
    const bn_tokens *x, int64_t m, float *out, int64_t ld
) {
    vdot acc[16];
    const int8_t *codes = x->codes + m * x->stride;
    int64_t i = 0;
    UNROLL for (int j = 0; j < rows * tokens; j++) acc[j] = (vdot){0};
    UNROLL for (int r = 0; r < rows; r++) /* one row after the other, as in dense_rows */
        for (i = 0; i + DOT_BYTES <= k; i += DOT_BYTES)
            UNROLL for (int t = 0; t < tokens; t++)
                acc[t * rows + r] = DOT(acc[t * rows + r], w + r * k + i, codes + t * x->stride + i);
    if (i < k)
        UNROLL for (int r = 0; r < rows; r++) {
            int8_t part[DOT_BYTES] = {0};
            memcpy(part, w + r * k + i, (size_t)(k - i));
            UNROLL for (int t = 0; t < tokens; t++)
                acc[t * rows + r] = DOT(acc[t * rows + r], part, codes + t * x->stride + i);
        }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) {
            int32_t total = dot_sum(acc[t * rows + r]) - DOT_BIAS * x->sum[m + t];
            out[t * ld + r] = (float)total * x->scale[m + t] * scale[r];
        }
}

static void dense_int8(
    const bn_dense *w, const bn_tokens *x, int64_t m, int64_t n0, int64_t n1, float *out, int64_t ld
) {
    int64_t n = n0;
    for (; n < n1;) {
        const int8_t *rows = (const int8_t *)w->weight + n * w->k;
        float *to = out + (n - n0);
        if (n + 4 <= n1) {
            int64_t t = 0;
            for (; t + 4 <= m; t += 4)
                dense_int8_tile(4, 4, rows, w->scale + n, w->k, x, t, to + t * ld, ld);
            for (; t < m; t++)
                dense_int8_tile(4, 1, rows, w->scale + n, w->k, x, t, to + t * ld, ld);
            n += 4;
        } else {
            for (int64_t t = 0; t < m; t++)
                dense_int8_tile(1, 1, rows, w->scale + n, w->k, x, t, to + t * ld, ld);
            n++;
        }
    }
}

/* Attention */

#define FEW BN_ATTEND_FEW
#define TILE BN_ATTEND_TILE
#define COLUMNS 128 /* columns that groups of few queries take in turn, from the core's cache */

/* A row of a head in registers. */
INLINE int64_t wide(int64_t e) { return (e + LANES - 1) / LANES * LANES; }

/* Few queries: scores with all columns, softmax, then the sum of values. Keys and values are read
 * once for 1, 2 or 4 queries.
 *
 * s[q * ld + c] = q . k[c] for columns 0 to n of k [n, e]; q [queries, width], 0 from e on */
INLINE void score_few(
    const bn_dtype dtype, const int queries, const char *k, int64_t n, int64_t e, const float *q,
    int64_t width, float *s, int64_t ld
) {
    const int together = 8 / queries;
    const int64_t size = size_of(dtype);
    for (int64_t c = 0; c < n; c += together) {
        const char *at[8];
        vf acc[8];
        UNROLL for (int j = 0; j < 8; j++) acc[j] = (vf){0};
        UNROLL for (int j = 0; j < together; j++) {
            at[j] = k + (c + j < n ? c + j : n - 1) * e * size;
        }
        for (int64_t i = 0; i < together * e * size; i += BN_CACHE_LINE)
            __builtin_prefetch(at[0] + i + AHEAD);
        for (int64_t i = 0; i < e; i += LANES) {
            vf query[4];
            UNROLL for (int r = 0; r < queries; r++) query[r] = load(q + r * width + i);
            UNROLL for (int j = 0; j < together; j++) {
                vf key = load_up_to(dtype, at[j], i, e);
                UNROLL for (int r = 0; r < queries; r++)
                    acc[r * together + j] = FMA(query[r], key, acc[r * together + j]);
            }
        }
        float sums[8];
        sums8(acc, sums);
        for (int r = 0; r < queries; r++)
            if (c + together <= n)
                memcpy(s + r * ld + c, sums + r * together, sizeof(float) * (size_t)together);
            else
                memcpy(s + r * ld + c, sums + r * together, sizeof(float) * (size_t)(n - c));
    }
}

/* acc[q, j] += p[q * ld] * value, of `vectors` registers from number i on of one column */
INLINE void add_column(
    const bn_dtype dtype, const int queries, const int vectors, const char *v, int64_t e, int64_t i,
    const float *p, int64_t ld, vf *acc
) {
    const int64_t size = size_of(dtype);
    vf weight[4];
    UNROLL for (int r = 0; r < queries; r++) weight[r] = all(p[r * ld]);
    UNROLL for (int j = 0; j < vectors; j++) {
        if (j * LANES * size % BN_CACHE_LINE == 0)
            __builtin_prefetch(v + (i + j * LANES) * size + AHEAD);
        vf value = vectors > 1 ? load_as(dtype, v, i + j * LANES) : load_up_to(dtype, v, i, e);
        UNROLL for (int r = 0; r < queries; r++)
            acc[r * vectors + j] = FMA(weight[r], value, acc[r * vectors + j]);
    }
}

/* y[q] += sum_c p[q * ld + c] v[c], of `vectors` registers from number i on; y [queries, width] */
INLINE void add_few(
    const bn_dtype dtype, const int queries, const int vectors, const char *v, int64_t n, int64_t e,
    int64_t i, const float *p, int64_t ld, float *y, int64_t width
) {
    const int64_t row = e * size_of(dtype);
    vf acc[16], odd[16]; /* one query has too few sums to hide the latency of additions */
    int64_t c = 0;
    UNROLL for (int j = 0; j < queries * vectors; j++) acc[j] = odd[j] = (vf){0};
    for (; queries == 1 && c + 2 <= n; c += 2) {
        add_column(dtype, queries, vectors, v + c * row, e, i, p + c, ld, acc);
        add_column(dtype, queries, vectors, v + (c + 1) * row, e, i, p + c + 1, ld, odd);
    }
    for (; c < n; c++) add_column(dtype, queries, vectors, v + c * row, e, i, p + c, ld, acc);
    UNROLL for (int r = 0; r < queries; r++)
        UNROLL for (int j = 0; j < vectors; j++) {
            float *to = y + r * width + i + j * LANES;
            store(to, load(to) + (acc[r * vectors + j] + odd[r * vectors + j]));
        }
}

INLINE void add_few_all(
    const bn_dtype dtype, const int queries, const char *v, int64_t n, int64_t e, const float *p,
    int64_t ld, float *y, int64_t width
) {
    int64_t i = 0;
    for (; i + 4 * LANES <= e; i += 4 * LANES)
        add_few(dtype, queries, 4, v, n, e, i, p, ld, y, width);
    for (; i < e; i += LANES) add_few(dtype, queries, 1, v, n, e, i, p, ld, y, width);
}

/* score_few and add_few for 1 to FEW queries and columns c0 to c1 of a cache. s and p [queries, ld]
 * hold all columns. */
#define FEW_OF(name, dtype)                                                                        \
    static __attribute__((noinline)) void score_##name(                                            \
        const bn_cache *cache, int64_t c0, int64_t c1, const float *q, int64_t queries,            \
        int64_t width, float *s, int64_t ld                                                        \
    ) {                                                                                            \
        const char *k = (const char *)cache->k + c0 * cache->e * size_of(dtype);                   \
        int64_t e = cache->e, n = c1 - c0, r = 0;                                                  \
        for (s += c0; r + 4 <= queries; r += 4)                                                    \
            score_few(dtype, 4, k, n, e, q + r * width, width, s + r * ld, ld);                    \
        if (r + 2 <= queries) {                                                                    \
            score_few(dtype, 2, k, n, e, q + r * width, width, s + r * ld, ld);                    \
            r += 2;                                                                                \
        }                                                                                          \
        if (r < queries)                                                                           \
            score_few(dtype, 1, k, n, e, q + r * width, width, s + r * ld, ld);                    \
    }                                                                                              \
    static __attribute__((noinline)) void add_##name(                                              \
        const bn_cache *cache, int64_t c0, int64_t c1, const float *p, int64_t ld,                 \
        int64_t queries, float *y, int64_t width                                                   \
    ) {                                                                                            \
        const char *v = (const char *)cache->v + c0 * cache->e * size_of(dtype);                   \
        int64_t e = cache->e, n = c1 - c0, r = 0;                                                  \
        for (p += c0; r + 4 <= queries; r += 4)                                                    \
            add_few_all(dtype, 4, v, n, e, p + r * ld, ld, y + r * width, width);                  \
        if (r + 2 <= queries) {                                                                    \
            add_few_all(dtype, 2, v, n, e, p + r * ld, ld, y + r * width, width);                  \
            r += 2;                                                                                \
        }                                                                                          \
        if (r < queries) add_few_all(dtype, 1, v, n, e, p + r * ld, ld, y + r * width, width);     \
    }
FEW_OF(f32, BN_F32)
FEW_OF(bf16, BN_BF16)
FEW_OF(f16, BN_F16)
FEW_OF(i8, BN_I8)

/* s [n] -> its softmax. An int8 cache has scales: the keys' scales multiply s before, the values'
 * scales multiply the result. */
static void softmax(float *s, int64_t n, const float *k_scale, const float *v_scale) {
    for (int64_t i = 0; k_scale != NULL && i < n; i++) s[i] *= k_scale[i];
    float top = s[0], total = 0;
    vf most = all(top), sums = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) most = MAX(most, load(s + i));
    for (int j = 0; j < LANES; j++) top = most[j] > top ? most[j] : top;
    for (; i < n; i++) top = s[i] > top ? s[i] : top;
    for (i = 0; i < n; i++) s[i] = exp_of(s[i] - top);
    for (i = 0; i + LANES <= n; i += LANES) sums += load(s + i);
    for (int j = 0; j < LANES; j++) total += sums[j];
    for (; i < n; i++) total += s[i];
    float norm = 1.0f / total;
    if (v_scale == NULL)
        for (i = 0; i < n; i++) s[i] *= norm;
    else
        for (i = 0; i < n; i++) s[i] *= norm * v_scale[i];
}

/* A NaN or an infinity in a value makes the output of the head NaN, as in the reference. */
INLINE void write_head(const float *from, float norm, int64_t e, float *y) {
    for (int64_t i = 0; i < e; i++) y[i] = from[i] * norm;
    if (largest(y, e) > FINITE)
        for (int64_t i = 0; i < e; i++) y[i] = from_bits(0x7fc00000);
}

/* 1 to FEW queries */
static void attend_few(
    const bn_cache *cache, const float *q, int64_t q_stride, const int64_t *last, int64_t count,
    float *y, int64_t y_stride, float *scratch
) {
    static const struct few {
        void (*score)(
            const bn_cache *, int64_t, int64_t, const float *, int64_t, int64_t, float *, int64_t
        );
        void (*add)(
            const bn_cache *, int64_t, int64_t, const float *, int64_t, int64_t, float *, int64_t
        );
    } functions[] = {
        [BN_F32] = {score_f32, add_f32},
        [BN_BF16] = {score_bf16, add_bf16},
        [BN_F16] = {score_f16, add_f16},
        [BN_I8] = {score_i8, add_i8},
    };
    const struct few *of = &functions[cache->dtype];
    int64_t e = cache->e, width = wide(e), every = last[0], most = last[0];
    float *padded = scratch, *sums = padded + FEW * BN_HEAD, *s = sums + FEW * BN_HEAD;
    float norm = (float)(1.0 / __builtin_sqrt((double)e));
    memset(padded, 0, (size_t)(count * width) * 4);
    memset(sums, 0, (size_t)(count * width) * 4);
    for (int64_t r = 0; r < count; r++) {
        for (int64_t i = 0; i < e; i++) padded[r * width + i] = q[r * q_stride + i] * norm;
        every = last[r] < every ? last[r] : every;
        most = last[r] > most ? last[r] : most;
    }
    every++, most++; /* columns that every query sees, and that any query sees */
    int64_t ld = (most + 15) / 16 * 16, block = count > 4 ? COLUMNS : every;
    for (int64_t c = 0; c < every; c += block)
        of->score(cache, c, c + block < every ? c + block : every, padded, count, width, s, ld);
    for (int64_t r = 0; r < count; r++) {
        int64_t n = last[r] + 1;
        if (n > every) of->score(cache, every, n, padded + r * width, 1, width, s + r * ld, ld);
        bool scaled = cache->dtype == BN_I8;
        softmax(s + r * ld, n, scaled ? cache->k_scale : NULL, scaled ? cache->v_scale : NULL);
    }
    for (int64_t c = 0; c < every; c += block)
        of->add(cache, c, c + block < every ? c + block : every, s, ld, count, sums, width);
    for (int64_t r = 0; r < count; r++) {
        int64_t n = last[r] + 1;
        if (n > every) of->add(cache, every, n, s + r * ld, ld, 1, sums + r * width, width);
        write_head(sums + r * width, 1.0f, e, y + r * y_stride);
    }
}

/* Many queries: LANES or 2 * LANES of them side by side in registers, one tile of TILE columns
 * after the other (online softmax, arXiv 2205.14135). Scores are stored as [column, query]. */
/* `n` columns of `matrix` from column c on -> tile [n, width] in fp32 */
INLINE void widen_tile_as(
    const bn_dtype dtype, const void *matrix, const float *scale, int64_t e, int64_t width,
    int64_t c, int64_t n, float *tile
) {
    for (int64_t j = 0; j < n; j++)
        for (int64_t i = 0; i < e; i += LANES) {
            const char *row = (const char *)matrix + (c + j) * e * size_of(dtype);
            vf v = load_up_to(dtype, row, i, e);
            if (dtype == BN_I8) v = v * scale[c + j];
            store(tile + j * width + i, v);
        }
}

static void widen_tile(
    bn_dtype dtype, const void *matrix, const float *scale, int64_t e, int64_t width, int64_t c,
    int64_t n, float *tile
) {
    if (dtype == BN_F32)
        widen_tile_as(BN_F32, matrix, scale, e, width, c, n, tile);
    else if (dtype == BN_BF16)
        widen_tile_as(BN_BF16, matrix, scale, e, width, c, n, tile);
    else if (dtype == BN_F16)
        widen_tile_as(BN_F16, matrix, scale, e, width, c, n, tile);
    else
        widen_tile_as(BN_I8, matrix, scale, e, width, c, n, tile);
}

/* s[c, query] of n columns for `vectors` registers of queries; q [e, vectors * LANES] */
INLINE void score_tile(
    const int vectors, const int columns, const float *q, const float *tile, int64_t e,
    int64_t width, float *s
) {
    vf acc[16];
    UNROLL for (int j = 0; j < columns * vectors; j++) acc[j] = (vf){0};
    for (int64_t i = 0; i < e; i++) {
        vf query[2];
        UNROLL for (int v = 0; v < vectors; v++) query[v] = load(q + (i * vectors + v) * LANES);
        UNROLL for (int c = 0; c < columns; c++) {
            vf key = all(tile[c * width + i]);
            UNROLL for (int v = 0; v < vectors; v++)
                acc[c * vectors + v] = FMA(query[v], key, acc[c * vectors + v]);
        }
    }
    UNROLL for (int j = 0; j < columns * vectors; j++) store(s + j * LANES, acc[j]);
}

/* y[r] = y[r] * alpha[r] + sum_c p[c, r] tile[c], for `queries` rows and `vectors` registers */
INLINE void add_tile(
    const int queries, const int vectors, const float *p, int64_t side, const float *tile,
    int64_t width, int64_t n, const float *alpha, float *y
) {
    vf acc[16];
    UNROLL for (int r = 0; r < queries; r++)
        UNROLL for (int j = 0; j < vectors; j++)
            acc[r * vectors + j] = load(y + r * width + j * LANES) * alpha[r];
    for (int64_t c = 0; c < n; c++) {
        vf value[4];
        UNROLL for (int j = 0; j < vectors; j++) value[j] = load(tile + c * width + j * LANES);
        UNROLL for (int r = 0; r < queries; r++) {
            vf weight = all(p[c * side + r]);
            UNROLL for (int j = 0; j < vectors; j++)
                acc[r * vectors + j] = FMA(weight, value[j], acc[r * vectors + j]);
        }
    }
    UNROLL for (int r = 0; r < queries; r++)
        UNROLL for (int j = 0; j < vectors; j++)
            store(y + r * width + j * LANES, acc[r * vectors + j]);
}

/* 1 to `vectors` * LANES queries */
INLINE void attend_many(
    const int vectors, const bn_cache *cache, const float *q, int64_t q_stride,
    const int64_t *last, int64_t count, float *y, int64_t y_stride, float *scratch
) {
    const int side = vectors * LANES;
    int64_t e = cache->e, width = wide(e), every = last[0], most = last[0];
    float *turned = scratch, *sums = turned + BN_HEAD * side, *tile = sums + BN_HEAD * side;
    float *s = tile + BN_HEAD * TILE, top[2 * LANES], total[2 * LANES], alpha[2 * LANES];
    int64_t ends[2 * LANES];
    float norm = (float)(1.0 / __builtin_sqrt((double)e));
    for (int64_t r = 0; r < count; r++) {
        every = last[r] < every ? last[r] : every;
        most = last[r] > most ? last[r] : most;
    }
    memset(sums, 0, (size_t)(side * width) * 4);
    for (int r = 0; r < side; r++) {
        ends[r] = r < count ? last[r] : every; /* lanes past the queries repeat the first */
        const float *from = q + (r < count ? r : 0) * q_stride;
        for (int64_t i = 0; i < e; i++) turned[i * side + r] = from[i] * norm;
        top[r] = -__builtin_inff();
        total[r] = 0;
    }
    for (int64_t c = 0; c <= most; c += TILE) {
        int64_t n = most + 1 - c < TILE ? most + 1 - c : TILE, j = 0;
        widen_tile(cache->dtype, cache->k, cache->k_scale, e, width, c, n, tile);
        for (; j + SCORE_COLUMNS <= n; j += SCORE_COLUMNS)
            score_tile(vectors, SCORE_COLUMNS, turned, tile + j * width, e, width, s + j * side);
        for (; j < n; j++) score_tile(vectors, 1, turned, tile + j * width, e, width, s + j * side);
        for (j = every + 1 > c ? every + 1 - c : 0; j < n; j++)
            for (int r = 0; r < side; r++)
                s[j * side + r] = c + j > ends[r] ? -__builtin_inff() : s[j * side + r];

        UNROLL for (int v = 0; v < vectors; v++) {
            vf before = load(top + v * LANES), now = before;
            for (j = 0; j < n; j++) now = MAX(now, load(s + j * side + v * LANES));
            store(top + v * LANES, now);
            store(alpha + v * LANES, before - now);
            for (j = 0; j < n; j++) {
                float *at = s + j * side + v * LANES;
                store(at, load(at) - now);
            }
        }
        for (int r = 0; r < side; r++) alpha[r] = exp_of(alpha[r]);
        for (j = 0; j < n * side; j++) s[j] = exp_of(s[j]);
        UNROLL for (int v = 0; v < vectors; v++) {
            vf sum = load(total + v * LANES) * load(alpha + v * LANES);
            for (j = 0; j < n; j++) sum += load(s + j * side + v * LANES);
            store(total + v * LANES, sum);
        }

        widen_tile(cache->dtype, cache->v, cache->v_scale, e, width, c, n, tile);
        /* 0 * NaN is NaN: a column that is not finite must not reach queries that do not see it. */
        for (j = every + 1 > c ? every + 1 - c : 0; j < n; j++)
            if (largest(tile + j * width, e) > FINITE) {
                memset(tile + j * width, 0, (size_t)width * 4);
                for (int r = 0; r < side; r++)
                    if (c + j <= ends[r]) total[r] = from_bits(0x7fc00000);
            }
        for (int r = 0; r < count; r += 4) {
            float *to = sums + r * width;
            int64_t i = 0;
            for (; i + VALUE_VECTORS * LANES <= width; i += VALUE_VECTORS * LANES)
                add_tile(4, VALUE_VECTORS, s + r, side, tile + i, width, n, alpha + r, to + i);
            for (; i < width; i += LANES)
                add_tile(4, 1, s + r, side, tile + i, width, n, alpha + r, to + i);
        }
    }
    for (int64_t r = 0; r < count; r++)
        write_head(sums + r * width, 1.0f / total[r], e, y + r * y_stride);
}

static void attend(
    const bn_cache *cache, const float *q, int64_t q_stride, const int64_t *last, int64_t count,
    float *y, int64_t y_stride, void *scratch
) {
    while (count > 0) {
        int64_t n = count < 2 * LANES ? count : 2 * LANES;
        if (n <= FEW)
            attend_few(cache, q, q_stride, last, n, y, y_stride, scratch);
        else if (n <= LANES)
            attend_many(1, cache, q, q_stride, last, n, y, y_stride, scratch);
        else
            attend_many(2, cache, q, q_stride, last, n, y, y_stride, scratch);
        q += n * q_stride, y += n * y_stride, last += n, count -= n;
    }
}

const bn_rows BN_ROWS_TABLE = {
    .quant = quant,
    .rmsnorm = rmsnorm,
    .rmsnorm_quant = rmsnorm_quant,
    .relu2_mul_rmsnorm_quant = relu2_mul_rmsnorm_quant,
    .relu2_mul = relu2_mul,
    .silu_mul = silu_mul,
    .rotate = rotate,
    .widen = widen,
    .append = append,
    .attend = attend,
    .dense = dense,
    .dense_int8 = dense_int8,
};
