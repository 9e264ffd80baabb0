/* The epilogue of a product, which the compiler vectorizes for each instruction set. */
#include "internal.h"

/* bn_products.rescale. */
static inline __attribute__((always_inline)) void bn_rescale(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    const int32_t *acc, int64_t ld, bool add, float *out, int64_t out_ld
) {
    const float *bias = w->bias ? w->bias + n0 : NULL, *scale = w->scale + n0 * w->scale_stride;
    int64_t rows = n1 - n0;
    for (int64_t m = m0; m < m1; m++, acc += ld, out += out_ld) {
        float y[BN_ROWS], s_x = x->scale[m];
        if (w->scale_stride)
            for (int64_t i = 0; i < rows; i++) y[i] = (float)acc[i] * s_x * scale[i];
        else
            for (int64_t i = 0; i < rows; i++) y[i] = (float)acc[i] * s_x * *scale;
        if (bias)
            for (int64_t i = 0; i < rows; i++) y[i] += bias[i];
        if (add)
            for (int64_t i = 0; i < rows; i++) out[i] += y[i];
        else
            for (int64_t i = 0; i < rows; i++) out[i] = y[i];
    }
}
