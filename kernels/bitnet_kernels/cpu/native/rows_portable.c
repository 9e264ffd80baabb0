#include <string.h>

#include "internal.h"

#define BN_ROWS_TABLE bn_rows_portable
#define LANES 4
#define DENSE_ROWS 2
#define DENSE_TOKENS 4
#define ROWS_AHEAD 0
#define SCORE_COLUMNS 4
#define VALUE_VECTORS 2
typedef float vf __attribute__((vector_size(16)));
#define FMA(a, b, c) ((a) * (b) + (c))

static inline vf MAX(vf a, vf b) {
    for (int i = 0; i < LANES; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
}

static inline vf BF16_LOAD(const void *p) {
    vf y;
    for (int i = 0; i < LANES; i++) {
        uint16_t half;
        memcpy(&half, (const char *)p + 2 * i, 2);
        uint32_t bits = (uint32_t)half << 16;
        float x;
        memcpy(&x, &bits, 4);
        y[i] = x;
    }
    return y;
}

static inline vf I8_LOAD(const void *p) {
    vf y;
    for (int i = 0; i < LANES; i++) y[i] = ((const int8_t *)p)[i];
    return y;
}

/* The 5 bits of fp16's exponent are moved to the place of fp32's 8. A product with a power of 2
 * then corrects the bias and the subnormals. */
static inline vf F16_LOAD(const void *p) {
    vf y;
    for (int i = 0; i < LANES; i++) {
        uint16_t half;
        memcpy(&half, (const char *)p + 2 * i, 2);
        uint32_t bits = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
        float x;
        memcpy(&x, &bits, 4);
        x *= 0x1p112f;
        if ((half & 0x7c00) == 0x7c00) x = bits & 0x7fffff ? __builtin_nanf("") : __builtin_inff();
        memcpy(&bits, &x, 4);
        bits |= sign;
        memcpy(&x, &bits, 4);
        y[i] = x;
    }
    return y;
}

/* Rounds half to even, by adding a number whose last bit has the weight of fp16's last bit. */
static inline void F16_STORE(void *p, vf v) {
    for (int i = 0; i < LANES; i++) {
        float x = v[i];
        uint32_t bits;
        memcpy(&bits, &x, 4);
        uint32_t sign = bits >> 16 & 0x8000;
        bits &= 0x7fffffff;
        uint16_t half;
        if (bits > 0x7f800000) {
            half = 0x7e00;
        } else if (bits >= 0x477ff000) { /* 65520 and more */
            half = 0x7c00;
        } else if (bits < 0x38800000) { /* below 2^-14: a multiple of 2^-24 */
            memcpy(&x, &bits, 4);
            x += 0.5f;
            memcpy(&bits, &x, 4);
            half = (uint16_t)(bits - 0x3f000000);
        } else {
            bits += 0xfff + (bits >> 13 & 1);
            half = (uint16_t)((bits - 0x38000000) >> 13);
        }
        half |= (uint16_t)sign;
        memcpy((char *)p + 2 * i, &half, 2);
    }
}

static inline void sums8(const vf *a, float *out) {
    for (int i = 0; i < 8; i++) out[i] = (a[i][0] + a[i][1]) + (a[i][2] + a[i][3]);
}

#define DOT_BYTES 16
#define DOT_BIAS 0
typedef int32_t vdot __attribute__((vector_size(16)));
static inline vdot DOT(vdot acc, const int8_t *w, const int8_t *x) {
    int32_t total = 0;
    for (int i = 0; i < DOT_BYTES; i++) total += w[i] * x[i];
    acc[0] += total;
    return acc;
}
static inline int32_t dot_sum(vdot acc) { return acc[0]; }

#include "rows.inc.h"
