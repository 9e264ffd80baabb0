/* The functions that only training needs, over a thread's share: included once per instruction set,
 * by a file that defines TABLE. Plain C; the compiler vectorizes it.
 *
 * Sums have a fixed order: LANES partial sums, each of every LANES-th number, which are then added
 * in ascending order. So neither the instructions nor the number of threads changes a bit.
 */
#include <math.h>
#include <string.h>

#include "internal.h"

#define LANES 16

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static uint32_t largest(const float *x, int64_t n, uint32_t seen) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t magnitude = bits_of(x[i]) & 0x7fffffff;
        seen = magnitude > seen ? magnitude : seen;
    }
    return seen;
}

static void largest_of_columns(
    const float *x, int64_t ld, const float *s, int64_t m, int64_t n, uint32_t *seen
) {
    for (int64_t i = 0; i < m; i++, x += ld)
        for (int64_t j = 0; j < n; j++) {
            uint32_t magnitude = bits_of(x[j] * s[i]) & 0x7fffffff;
            seen[j] = magnitude > seen[j] ? magnitude : seen[j];
        }
}

/* With n = x r and g = dy w: dx = r (g - n mean(g n)), dw += dy n. */
static void norm_backward(
    const float *dy, const float *x, const float *weight, const float *r, int64_t m, int64_t k,
    float *restrict dx, float *restrict dw
) {
    memset(dw, 0, (size_t)k * sizeof *dw);
    for (int64_t i = 0; i < m; i++, x += k, dy += k, dx += k) {
        float lane[LANES] = {0}, inverse = r[i];
        int64_t j = 0;
        for (; j + LANES <= k; j += LANES)
            for (int l = 0; l < LANES; l++)
                lane[l] += (dy[j + l] * weight[j + l]) * (x[j + l] * inverse);
        for (; j < k; j++) lane[0] += (dy[j] * weight[j]) * (x[j] * inverse);
        for (int l = 1; l < LANES; l++) lane[0] += lane[l];
        float mean = lane[0] / (float)k;
        for (j = 0; j < k; j++) {
            float n = x[j] * inverse;
            dx[j] = (dy[j] * weight[j] - n * mean) * inverse;
            dw[j] += dy[j] * n;
        }
    }
}

/* max(x, 0); keeps NaN */
static inline float relu(float x) { return x <= 0 ? 0.0f : x; }

/* dgate = 2 relu(gate) up dy, 0 where gate <= 0, whatever `up` is; dup = relu(gate)^2 dy */
static void gate_backward(
    const float *dy, const float *gate, const float *up, int64_t n, float *restrict dgate,
    float *restrict dup
) {
    for (int64_t i = 0; i < n; i++) {
        float open = relu(gate[i]), slope = ((dy[i] * up[i]) * open) * 2;
        dgate[i] = open <= 0 ? 0.0f : slope;
        dup[i] = (open * open) * dy[i];
    }
}

/* e^x of x <= 0, within 2 units in the last place; 0 below -87, where it would be subnormal. The
 * polynomial is from Cephes' expf. */
static inline float exponential(float x) {
    float round = x * 1.44269504f + 0x1.8p23f; /* the exponent of 2, an integer, in the last bits */
    float whole = round - 0x1.8p23f;
    float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    uint32_t power = (bits_of(round) + 127) << 23;
    float scale;
    memcpy(&scale, &power, sizeof scale);
    return x < -87.0f ? 0.0f : p * scale;
}

static float cross_entropy(float *z, int64_t n, int64_t target) {
    float highest[LANES], lane[LANES] = {0}, logit = z[target];
    int64_t i = 0;
    for (int j = 0; j < LANES; j++) highest[j] = z[0];
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) highest[j] = z[i + j] > highest[j] ? z[i + j] : highest[j];
    for (; i < n; i++) highest[0] = z[i] > highest[0] ? z[i] : highest[0];
    for (int j = 1; j < LANES; j++) highest[0] = highest[j] > highest[0] ? highest[j] : highest[0];
    float top = highest[0];
    for (i = 0; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) {
            z[i + j] = exponential(z[i + j] - top);
            lane[j] += z[i + j];
        }
    for (; i < n; i++) {
        z[i] = exponential(z[i] - top);
        lane[0] += z[i];
    }
    for (int j = 1; j < LANES; j++) lane[0] += lane[j];
    float share = 1.0f / lane[0];
    for (i = 0; i < n; i++) z[i] *= share;
    z[target] -= 1.0f;
    return logf(lane[0]) + (top - logit);
}

static void rescale(
    void *acc, const float *s, const float *scale, int64_t scale_stride, const float *bias,
    int64_t m, int64_t n
) {
    char *row = acc;
    for (int64_t i = 0; i < m; i++, row += n * 4) {
        float token = s[i], one = *scale;
        for (int64_t j = 0; j < n; j++) { /* memcpy: the same memory as int32 and as float */
            int32_t sum;
            memcpy(&sum, row + 4 * j, 4);
            float y = (float)sum * token;
            y *= scale_stride ? scale[j] : one;
            if (bias != NULL) y += bias[j];
            memcpy(row + 4 * j, &y, 4);
        }
    }
}

static int64_t sum_of_units(const float *x, int64_t n, float units) {
    int64_t lane[LANES] = {0}, i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lane[j] += (int64_t)(fabsf(x[i + j]) * units);
    for (; i < n; i++) lane[0] += (int64_t)(fabsf(x[i]) * units);
    for (int j = 1; j < LANES; j++) lane[0] += lane[j];
    return lane[0];
}

static void ternary(const float *x, int64_t n, float threshold, int8_t *codes) {
    for (int64_t i = 0; i < n; i++)
        codes[i] = (int8_t)((x[i] > threshold) - (x[i] < -threshold));
}

/* floor(x / scale + u) within +-127. Adding 1.5 * 2^23 leaves the nearest integer in the last bits,
 * without a conversion, which is undefined for a NaN; the result for a NaN is not used. */
static inline int8_t rounded(float x, float scale, uint64_t row_key, int64_t column) {
    float value = x / scale + bn_uniform(row_key, (uint32_t)column);
    float nearest = value + 0x1.8p23f;
    int32_t code = (int32_t)(bits_of(nearest) - 0x4b400000u);
    code -= nearest - 0x1.8p23f > value;
    code = code > -127 ? code : -127;
    code = code < 127 ? code : 127;
    return (int8_t)code;
}

static void stochastic(const float *x, int64_t n, float scale, uint64_t row_key, int8_t *codes) {
    if (scale != scale) {
        memset(codes, 0, (size_t)n);
        return;
    }
    for (int64_t j = 0; j < n; j++) codes[j] = rounded(x[j], scale, row_key, j);
}

static void stochastic_columns(
    const float *x, int64_t ld, const float *s, int64_t m, int64_t n, const float *scale,
    uint64_t seed, int64_t column, int8_t *codes, int64_t stride
) {
    enum { ROWS = 64, COLUMNS = 512 }; /* of a block, which is transposed in the L1 cache */
    int8_t block[ROWS][COLUMNS + 64]; /* rows of one column in different sets of the cache */
    for (int64_t j0 = 0; j0 < n; j0 += COLUMNS)
        for (int64_t i0 = 0; i0 < m; i0 += ROWS) {
            int64_t rows = m - i0 < ROWS ? m - i0 : ROWS;
            int64_t columns = n - j0 < COLUMNS ? n - j0 : COLUMNS;
            for (int64_t i = 0; i < rows; i++) {
                const float *row = x + (i0 + i) * ld + j0;
                float token = s[i0 + i];
                uint64_t key = bn_row_key(seed, i0 + i);
                for (int64_t j = 0; j < columns; j++)
                    block[i][j] = rounded(row[j] * token, scale[j0 + j], key, column + j0 + j);
            }
            for (int64_t j = 0; j < columns; j++) {
                int8_t *to = codes + (j0 + j) * stride + i0;
                bool finite = scale[j0 + j] == scale[j0 + j];
                for (int64_t i = 0; i < rows; i++) to[i] = finite ? block[i][j] : 0;
            }
        }
}

/* The integer nearest to x / scale, below 2^22, as three digits of base 256, -128 to 127. */
static void digits_of_columns(
    const float *x, int64_t ld, const float *s, int64_t m, int64_t n, const float *scale,
    int8_t *codes, int64_t stride, int64_t plane
) {
    enum { ROWS = 64, COLUMNS = 512 }; /* of a block, which is transposed in the L2 cache */
    int32_t block[ROWS][COLUMNS + 16]; /* rows of one column in different sets of the cache */
    for (int64_t j0 = 0; j0 < n; j0 += COLUMNS)
        for (int64_t i0 = 0; i0 < m; i0 += ROWS) {
            int64_t rows = m - i0 < ROWS ? m - i0 : ROWS;
            int64_t columns = n - j0 < COLUMNS ? n - j0 : COLUMNS;
            for (int64_t i = 0; i < rows; i++) {
                const float *row = x + (i0 + i) * ld + j0;
                float token = s[i0 + i];
                for (int64_t j = 0; j < columns; j++) {
                    float nearest = row[j] * token / scale[j0 + j] + 0x1.8p23f;
                    block[i][j] = (int32_t)(bits_of(nearest) - 0x4b400000u);
                }
            }
            for (int64_t j = 0; j < columns; j++) {
                int8_t *to = codes + (j0 + j) * stride + i0;
                int32_t column[ROWS], keep = scale[j0 + j] == scale[j0 + j] ? -1 : 0;
                for (int64_t i = 0; i < rows; i++) column[i] = block[i][j] & keep;
                for (int64_t i = 0; i < rows; i++) { /* + 128: halves that round up go up */
                    int32_t high = (column[i] + 128) >> 8;
                    to[i] = (int8_t)column[i];
                    to[i + plane] = (int8_t)high;
                    to[i + 2 * plane] = (int8_t)((high + 128) >> 8);
                }
            }
        }
}

/* Numbers of three digits, `plane` apart, times a scale. As integers they are exact. */
static void sum_of_digits(const int32_t *acc, int64_t plane, int64_t n, float scale, float *y) {
    for (int64_t i = 0; i < n; i++) {
        double high = (double)acc[i + 2 * plane] * 65536 + (double)acc[i + plane] * 256;
        y[i] = (float)((high + acc[i]) * scale);
    }
}

const bn_training TABLE = {
    norm_backward,
    gate_backward,
    cross_entropy,
    rescale,
    largest,
    largest_of_columns,
    sum_of_units,
    ternary,
    stochastic,
    stochastic_columns,
    digits_of_columns,
    sum_of_digits,
};
