/* Everything that is done token by token. The references are those of bitnet_kernels/reference.py
 * where it fixes the order of the operations, and fp64 with a bound where it does not. */
#include "check.h"

#define EPS32 5.97e-8 /* half a unit in the last place of fp32 */

static void spoil(float *x, int64_t count) { /* one time in ten */
    if (below(10) == 0) x[below(count)] = below(2) ? NAN : below(2) ? INFINITY : -INFINITY;
}

/* The codes [k, then zeros up to the stride], scale and sum that quant should have made of x [k]. */
static int differ_quant(const char *what, const float *x, int64_t k, int64_t stride,
                        const int8_t *codes, const float *scale, int32_t sum) {
    int8_t *right = NEW(int8_t, stride);
    float *right_scale = NEW(float, 1);
    memset(right, 0, (size_t)stride);
    int32_t right_sum = quant_of(x, k, right, right_scale);
    return differ(what, scale, right_scale, 1) ||
           differ_bytes(what, codes, right, (size_t)stride) ||
           differ_bytes(what, &sum, &right_sum, sizeof sum);
}

static int check_quant(const bn_rows *table) {
    int64_t k = size_up_to(3000), stride = below(2) ? k : bn_padded(k);
    float *x = NEW(float, k), *scale = NEW(float, 1);
    int8_t *codes = NEW(int8_t, stride);
    int32_t *sum = NEW(int32_t, 1);
    fill(x, k);
    spoil(x, k);
    table->quant(x, k, codes, stride, scale, sum);
    return differ_quant("quant", x, k, stride, codes, scale, *sum);
}

/* bitnet_kernels.reference.exact_sum of the squares. */
static double sum_of_squares(const float *x, int64_t k) {
    double largest = 0, total = 0, grid;
    int exponent, bits = 0;
    for (int64_t i = 0; i < k; i++) {
        if (!isfinite(x[i])) return NAN;
        largest = fmax(largest, (double)x[i] * x[i]);
    }
    if (largest == 0) return 0;
    frexp(largest, &exponent); /* largest < 2^exponent */
    while ((k - 1) >> bits) bits++;
    grid = ldexp(1, exponent + bits);
    for (int64_t i = 0; i < k; i++) {
        volatile double rounded = (double)x[i] * x[i] + grid;
        total += rounded - grid;
    }
    return total;
}

/* The RMSNorm of x [k]; weight NULL: of ones. */
static void rmsnorm_of(const float *x, const float *weight, float eps, int64_t k, float *y) {
    volatile float mean = (float)(sum_of_squares(x, k) / (double)k), shifted = mean + eps;
    float rstd = 1 / (float)sqrt((double)shifted);
    for (int64_t i = 0; i < k; i++) {
        volatile float scaled = x[i] * rstd;
        y[i] = weight ? scaled * weight[i] : scaled;
    }
}

static void relu2_mul_of(const float *gate, const float *up, int64_t k, float *y) {
    for (int64_t i = 0; i < k; i++) {
        volatile float square = gate[i] > 0 || isnan(gate[i]) ? gate[i] * gate[i] : 0;
        y[i] = square * up[i];
    }
}

static int check_norms(const bn_rows *table) {
    int64_t k = size_up_to(3000), stride = below(2) ? k : bn_padded(k);
    float *x = NEW(float, k), *up = NEW(float, k), *y = NEW(float, k), *right = NEW(float, k);
    float *weight = below(4) ? NEW(float, k) : NULL, *scale = NEW(float, 1);
    int8_t *codes = NEW(int8_t, stride);
    int32_t *sum = NEW(int32_t, 1);
    float eps = below(2) ? 1e-5f : 1e-6f;
    fill(x, k);
    spoil(x, k);
    fill(up, k);
    if (weight) fill(weight, k);
    rmsnorm_of(x, weight, eps, k, right);
    table->rmsnorm_quant(x, weight, eps, k, codes, stride, scale, sum);
    if (differ_quant("rmsnorm_quant", right, k, stride, codes, scale, *sum)) return 1;
    if (below(2)) /* in place */
        memcpy(y, x, (size_t)k * sizeof *y), table->rmsnorm(y, weight, eps, k, y);
    else
        table->rmsnorm(x, weight, eps, k, y);
    if (differ("rmsnorm", y, right, k)) return 1;

    relu2_mul_of(x, up, k, y);
    rmsnorm_of(y, weight, eps, k, right);
    table->relu2_mul_rmsnorm_quant(x, up, weight, eps, k, codes, stride, scale, sum);
    return differ_quant("relu2_mul_rmsnorm_quant", right, k, stride, codes, scale, *sum);
}

static int check_gates(const bn_rows *table) {
    int64_t k = size_up_to(3000);
    float *gate = NEW(float, k), *up = NEW(float, k), *y = NEW(float, k), *right = NEW(float, k);
    double *exact = NEW(double, k), *bound = NEW(double, k);
    fill(gate, k);
    fill(up, k);
    spoil(gate, k);
    spoil(up, k);
    relu2_mul_of(gate, up, k, right);
    if (below(2)) /* into the gate */
        memcpy(y, gate, (size_t)k * sizeof *y), table->relu2_mul(y, up, k, y);
    else
        table->relu2_mul(gate, up, k, y);
    if (differ("relu2_mul", y, right, k)) return 1;

    for (int64_t i = 0; i < k; i++) { /* -88 to 88, where exp is normal; beyond, the limits */
        gate[i] = below(8) ? uniform() * 20 : below(2) ? uniform() * 87 : uniform() * 1e4f;
        up[i] = uniform();
        exact[i] = (double)gate[i] / (1 + exp(-(double)gate[i])) * (double)up[i];
        bound[i] = 16 * EPS32 * fabs(exact[i]) + 1e-30;
    }
    table->silu_mul(gate, up, k, y);
    return differ_by("silu_mul", y, exact, bound, k);
}

static int check_rotate(const bn_rows *table) {
    int64_t e = 2 * size_up_to(130);
    float *x = NEW(float, e), *cosine = NEW(float, e), *sine = NEW(float, e);
    float *y = NEW(float, e), *right = NEW(float, e);
    fill(x, e);
    for (int64_t i = 0; i < e; i++) {
        double angle = uniform() * 4;
        cosine[i] = (float)cos(angle), sine[i] = (float)sin(angle);
    }
    for (int64_t i = 0; i < e; i++) {
        volatile float a = x[i] * cosine[i];
        volatile float b = (i < e / 2 ? -x[i + e / 2] : x[i - e / 2]) * sine[i];
        right[i] = a + b;
    }
    if (below(2)) /* in place */
        memcpy(y, x, (size_t)e * sizeof *y), table->rotate(y, cosine, sine, e, y);
    else
        table->rotate(x, cosine, sine, e, y);
    return differ("rotate", y, right, e);
}

/* count numbers x in `dtype` (not int8), as a new array; and what they are after that */
static void *stored(const float *x, int64_t count, bn_dtype dtype, float *after) {
    if (dtype == BN_F32) {
        float *copy = NEW(float, count);
        memcpy(copy, x, (size_t)count * sizeof *x);
        memcpy(after, x, (size_t)count * sizeof *x);
        return copy;
    }
    uint16_t *halves = NEW(uint16_t, count);
    for (int64_t i = 0; i < count; i++) {
        halves[i] = dtype == BN_BF16 ? bf16_of(x[i]) : f16_of(x[i]);
        after[i] = dtype == BN_BF16 ? of_bf16(halves[i]) : of_f16(halves[i]);
    }
    return halves;
}

static const bn_dtype floats[] = {BN_F32, BN_BF16, BN_F16};

static int check_widen(const bn_rows *table) {
    int64_t k = size_up_to(3000);
    float *x = NEW(float, k), *y = NEW(float, k), *right = NEW(float, k);
    bn_dtype dtype = floats[below(3)];
    fill(x, k);
    spoil(x, k);
    table->widen(stored(x, k, dtype, right), dtype, k, y);
    return differ("widen", y, right, k);
}

static size_t bytes_of(bn_dtype dtype) { return dtype == BN_F32 ? 4 : dtype == BN_I8 ? 1 : 2; }

static int check_append(const bn_rows *table) {
    int64_t e = 2 * size_up_to(130), columns = 1 + below(5), column = below(columns);
    bn_dtype dtype = below(4) ? floats[below(3)] : BN_I8;
    size_t bytes = bytes_of(dtype) * (size_t)(columns * e);
    bn_cache cache = {dtype, e, memory(bytes, bytes_of(dtype)), memory(bytes, bytes_of(dtype)),
                      NULL, NULL};
    if (dtype == BN_I8) cache.k_scale = NEW(float, columns), cache.v_scale = NEW(float, columns);
    float *k = NEW(float, e), *v = NEW(float, e), *after = NEW(float, e);
    for (int i = 0; i < 2; i++) {
        fill(i ? v : k, e);
        if (dtype == BN_I8) spoil(i ? v : k, e);
    }
    table->append(&cache, column, k, v);
    for (int i = 0; i < 2; i++) {
        const char *what = i ? "append: values" : "append: keys";
        const float *x = i ? v : k;
        char *got = i ? cache.v : cache.k, *expected = memory(bytes, 1);
        size_t at = bytes_of(dtype) * (size_t)(column * e);
        if (dtype == BN_I8) {
            float *scale = NEW(float, 1);
            quant_of(x, e, (int8_t *)expected + at, scale);
            if (differ(what, (i ? cache.v_scale : cache.k_scale) + column, scale, 1)) return 1;
        } else
            memcpy(expected + at, stored(x, e, dtype, after), bytes_of(dtype) * (size_t)e);
        if (differ_bytes(what, got, expected, bytes)) return 1; /* the other columns too */
    }
    return 0;
}

int check_rows(const bn_rows *table) {
    return check_quant(table) || check_norms(table) || check_gates(table) ||
           check_rotate(table) || check_widen(table) || check_append(table);
}

int check_dense(const bn_rows *table) {
    int64_t m = 1 + below(below(2) ? 4 : 20), n = size_up_to(80), k = size_up_to(900);
    int64_t n0 = below(n), n1 = n0 + 1 + below(n - n0), stride = k + below(3);
    int64_t ld = n1 - n0 + below(3), count = (m - 1) * ld + n1 - n0;
    float *values = NEW(float, n * k), *after = NEW(float, n * k), *got = NEW(float, count);
    float *x = NEW(float, (m - 1) * stride + k);
    double *exact = NEW(double, count), *bound = NEW(double, count);
    for (int64_t i = 0; i < n * k; i++) values[i] = uniform();
    for (int64_t i = 0; i < (m - 1) * stride + k; i++) x[i] = uniform();
    bn_dtype dtype = floats[below(3)];
    bn_dense w = {n, k, dtype, stored(values, n * k, dtype, after), NULL};
    for (int64_t i = 0; i < count; i++) /* 0xa5a5a5a5, between the rows, must stay */
        exact[i] = (double)got[i], bound[i] = 0;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = n0; j < n1; j++) {
            double sum = 0, size = 0;
            for (int64_t l = 0; l < k; l++) {
                double term = (double)x[i * stride + l] * (double)after[j * k + l];
                sum += term, size += fabs(term);
            }
            exact[i * ld + j - n0] = sum;
            bound[i * ld + j - n0] = (double)(k + 2) * EPS32 * size;
        }
    table->dense(&w, x, stride, m, n0, n1, got, ld);
    if (differ_by("dense", got, exact, bound, count)) return 1;

    int8_t *weight = NEW(int8_t, n * k);
    float *scale = NEW(float, n), *right = NEW(float, count);
    bn_tokens tokens = {.stride = bn_padded(k), .codes = NEW(int8_t, m * bn_padded(k)),
                        .scale = NEW(float, m), .sum = NEW(int32_t, m)};
    fill_codes(weight, n * k);
    for (int64_t j = 0; j < n; j++) scale[j] = fabsf(uniform());
    for (int64_t i = 0; i < m; i++) {
        int8_t *row = tokens.codes + i * tokens.stride;
        fill_codes(row, k);
        memset(row + k, 0, (size_t)(tokens.stride - k));
        tokens.scale[i] = fabsf(uniform());
        tokens.sum[i] = 0;
        for (int64_t l = 0; l < k; l++) tokens.sum[i] += row[l];
    }
    memset(got, 0xa5, (size_t)count * sizeof *got);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = n0; j < n1; j++) {
            int32_t acc = 0;
            for (int64_t l = 0; l < k; l++)
                acc += tokens.codes[i * tokens.stride + l] * weight[j * k + l];
            volatile float y = (float)acc * tokens.scale[i];
            right[i * ld + j - n0] = y * scale[j];
        }
    bn_dense w8 = {n, k, BN_I8, weight, scale};
    table->dense_int8(&w8, &tokens, m, n0, n1, got, ld);
    return differ("dense_int8", got, right, count);
}

/* A cache [columns, e] of random keys or values; what stands there, in fp32; NaN after `last`. */
static void *new_cache(bn_dtype dtype, int64_t columns, int64_t e, int64_t last, float *scale,
                       float *after) {
    float *x = NEW(float, columns * e);
    for (int64_t i = 0; i < columns * e; i++) x[i] = i / e > last ? NAN : uniform();
    if (dtype != BN_I8) return stored(x, columns * e, dtype, after);
    int8_t *codes = NEW(int8_t, columns * e);
    for (int64_t c = 0; c < columns; c++) {
        quant_of(x + c * e, e, codes + c * e, scale + c);
        for (int64_t i = c * e; i < (c + 1) * e; i++) after[i] = (float)codes[i] * scale[c];
    }
    return codes;
}

int check_attend(const bn_rows *table) {
    int64_t e = 2 * size_up_to(below(2) ? 64 : BN_HEAD / 2), columns = size_up_to(300);
    int64_t queries = 1 + below(9), q_stride = e + below(4), y_stride = e + below(4), most = 0;
    int64_t *last = NEW(int64_t, queries), count = (queries - 1) * y_stride + e;
    float *q = NEW(float, (queries - 1) * q_stride + e), *y = NEW(float, count);
    float *k = NEW(float, columns * e), *v = NEW(float, columns * e);
    double *exact = NEW(double, count), *bound = NEW(double, count), *p = NEW(double, columns);
    float sharp = below(4) ? 1 : 30; /* one column outweighs all others */
    for (int64_t i = 0; i < queries; i++) {
        last[i] = below(columns);
        if (last[i] > most) most = last[i];
    }
    for (int64_t i = 0; i < (queries - 1) * q_stride + e; i++) q[i] = uniform() * sharp;
    bn_dtype dtype = below(4) ? floats[below(3)] : BN_I8;
    bn_cache cache = {dtype, e, NULL, NULL, NULL, NULL};
    if (dtype == BN_I8) cache.k_scale = NEW(float, columns), cache.v_scale = NEW(float, columns);
    cache.k = new_cache(dtype, columns, e, most, cache.k_scale, k);
    cache.v = new_cache(dtype, columns, e, most, cache.v_scale, v);
    for (int64_t i = 0; i < count; i++) exact[i] = (double)y[i], bound[i] = 0;
    for (int64_t i = 0; i < queries; i++) {
        double largest = -INFINITY, total = 0, error = 0;
        for (int64_t c = 0; c <= last[i]; c++) {
            double size = 0;
            p[c] = 0;
            for (int64_t j = 0; j < e; j++) {
                double term = (double)q[i * q_stride + j] * (double)k[c * e + j];
                p[c] += term, size += fabs(term);
            }
            p[c] /= sqrt((double)e);
            largest = fmax(largest, p[c]);
            error = fmax(error, (double)(e + 4) * EPS32 * size / sqrt((double)e));
        }
        for (int64_t c = 0; c <= last[i]; c++) total += p[c] = exp(p[c] - largest);
        /* Each score is off by `error` at most, so each probability by a factor exp(2 error); then
         * exp itself, two sums over the columns and a division round. */
        double relative = expm1(2 * error) + (double)(2 * last[i] + 40) * EPS32;
        for (int64_t j = 0; j < e; j++) {
            double sum = 0, size = 0;
            for (int64_t c = 0; c <= last[i]; c++) {
                double term = p[c] / total * (double)v[c * e + j];
                sum += term, size += fabs(term);
            }
            exact[i * y_stride + j] = sum;
            bound[i * y_stride + j] = relative * size + 1e-30;
        }
    }
    void *scratch = memory(bn_attend_scratch(columns, queries), 64);
    table->attend(&cache, q, q_stride, last, queries, y, y_stride, scratch);
    return differ_by("attend", y, exact, bound, count);
}
