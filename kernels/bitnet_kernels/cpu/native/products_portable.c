/* Ternary products in plain C, for any CPU. Read this file before the others. */
#include <string.h>

#include "internal.h"
#include "products.inc.h"

/* Columns of a row that are decoded at once. */
#define CHUNK 1024

/* Codes -1, 0, 1 of one row in `parts` runs of at most CHUNK columns each. Run j starts at
 * column + j * step. */
typedef struct {
    int64_t parts, step, length;
    int8_t codes[4][CHUNK];
} decoded;

static void decode_packed(const uint8_t *row, int64_t bytes, int64_t column, decoded *d) {
    d->parts = 4;
    d->step = bytes;
    d->length = bytes - column < CHUNK / 4 ? bytes - column : CHUNK / 4;
    for (int j = 0; j < 4; j++)
        for (int64_t i = 0; i < d->length; i++)
            d->codes[j][i] = (int8_t)(((row[column + i] >> (2 * j)) & 3) - 1);
}

static void decode_planes(const uint8_t *nonzero, const uint8_t *negative, int64_t stride,
                          int64_t column, decoded *d) {
    d->parts = 1;
    d->step = stride;
    d->length = stride - column < CHUNK ? stride - column : CHUNK;
    for (int64_t i = 0; i < d->length; i += 8) {
        unsigned z = nonzero[(column + i) / 8], s = negative[(column + i) / 8];
        for (int b = 0; b < 8; b++)
            d->codes[0][i + b] = (int8_t)(((z >> b) & 1) - 2 * ((s >> b) & 1));
    }
}

/* The sum of a[i] * b[i]. */
static int32_t inner(const int8_t *a, const int8_t *b, int64_t length) {
    int32_t sum = 0;
    for (int64_t i = 0; i < length; i++) sum += (int16_t)a[i] * (int16_t)b[i];
    return sum;
}

void bn_dot_portable(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    int32_t *acc, int64_t ld, void *scratch
) {
    decoded *d = scratch;
    int64_t stride = x->stride, bytes = 4 * bn_plane_words(w->k);
    for (int64_t n = n0; n < n1; n++) {
        const uint8_t *planes = (const uint8_t *)w->planes + 2 * n * bytes;
        int64_t length = w->packed ? stride / 4 : stride;
        for (int64_t m = m0; m < m1; m++) acc[(m - m0) * ld + n - n0] = 0;
        for (int64_t column = 0; column < length; column += d->length) {
            if (w->packed)
                decode_packed(w->packed + n * (stride / 4), stride / 4, column, d);
            else
                decode_planes(planes, planes + bytes, stride, column, d);
            for (int64_t m = m0; m < m1; m++) {
                const int8_t *codes = x->codes + m * stride + column;
                int32_t sum = 0;
                for (int64_t j = 0; j < d->parts; j++)
                    sum += inner(d->codes[j], codes + j * d->step, d->length);
                acc[(m - m0) * ld + n - n0] += sum;
            }
        }
    }
}

/* The number of set bits of each byte, in that byte. */
static uint64_t count_bytes(uint64_t v) {
    v -= (v >> 1) & 0x5555555555555555;
    v = (v & 0x3333333333333333) + ((v >> 2) & 0x3333333333333333);
    return (v + (v >> 4)) & 0x0f0f0f0f0f0f0f0f;
}

/* The sum of the bytes, by shifts, since addsub multiplies nothing. */
static int32_t sum_bytes(uint64_t v) {
    v = (v & 0x00ff00ff00ff00ff) + ((v >> 8) & 0x00ff00ff00ff00ff);
    v += v >> 32;
    return (int32_t)((v + (v >> 16)) & 0xffff);
}

/* One row times one token: counts the bits of ((x ^ negative) & nonzero), one plane of x at a time.
 * ~x is -x - 1, so each weight of -1 adds one. The highest plane counts as negative. */
static int32_t addsub_row(const uint8_t *nonzero, const uint8_t *negative, const uint64_t *bits,
                          int64_t chunks) {
    int32_t sum = 0;
    while (chunks > 0) {
        int64_t some = chunks < 31 ? chunks : 31; /* bytes count to 255 */
        uint64_t count[8] = {0}, ones = 0;
        for (int64_t c = 0; c < some; c++, nonzero += 8, negative += 8, bits += 8) {
            uint64_t z, s;
            memcpy(&z, nonzero, 8);
            memcpy(&s, negative, 8);
            for (int b = 0; b < 8; b++) count[b] += count_bytes((bits[b] ^ s) & z);
            ones += count_bytes(s);
        }
        sum += sum_bytes(ones);
        for (int b = 0; b < 7; b++) sum += sum_bytes(count[b]) << b;
        sum -= sum_bytes(count[7]) << 7;
        chunks -= some;
    }
    return sum;
}

void bn_addsub_portable(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    int32_t *acc, int64_t ld, void *scratch
) {
    (void)scratch;
    int64_t bytes = 4 * bn_plane_words(w->k);
    for (int64_t n = n0; n < n1; n++) {
        const uint8_t *planes = (const uint8_t *)w->planes + 2 * n * bytes;
        for (int64_t m = m0; m < m1; m++)
            acc[(m - m0) * ld + n - n0] =
                addsub_row(planes, planes + bytes, x->bits + m * (x->stride / 8), x->stride / 64);
    }
}

/* Transpose an 8 x 8 matrix of bits: bit c of byte r becomes bit r of byte c (Warren, Hacker's
 * Delight, 7-3). */
static uint64_t transpose8(uint64_t v) {
    uint64_t t = (v ^ (v >> 7)) & 0x00aa00aa00aa00aa;
    v ^= t ^ (t << 7);
    t = (v ^ (v >> 14)) & 0x0000cccc0000cccc;
    v ^= t ^ (t << 14);
    t = (v ^ (v >> 28)) & 0x00000000f0f0f0f0;
    return v ^ t ^ (t << 28);
}

void bn_addsub_bits_portable(const bn_tokens *x, int64_t m0, int64_t m1) {
    for (int64_t c = m0 * (x->stride / 64); c < m1 * (x->stride / 64); c++) {
        uint64_t out[8] = {0};
        for (int i = 0; i < 8; i++) {
            uint64_t v;
            memcpy(&v, x->codes + 64 * c + 8 * i, 8);
            v = transpose8(v);
            for (int b = 0; b < 8; b++) out[b] |= ((v >> (8 * b)) & 0xff) << (8 * i);
        }
        memcpy(x->bits + 8 * c, out, sizeof out);
    }
}

void bn_rescale_portable(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    const int32_t *acc, int64_t ld, bool add, float *out, int64_t out_ld
) {
    bn_rescale(w, x, m0, m1, n0, n1, acc, ld, add, out, out_ld);
}

const bn_products bn_products_portable = {
    .dot = bn_dot_portable,
    .addsub = bn_addsub_portable,
    .bits = bn_addsub_bits_portable,
    .rescale = bn_rescale_portable,
};
