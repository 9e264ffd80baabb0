/* Ternary products with NEON and its dot product: dot lays out the codes of some rows as bytes,
 * addsub counts bits. */
#if defined(__aarch64__)
#include <string.h>

#include "neon.h"

BN_NEON_BEGIN
#include "products.inc.h"

#define INLINE static inline __attribute__((always_inline))

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Columns of all rows that are decoded at once. */
#define BLOCK 512

typedef struct {
    int8_t w[BN_ROWS][BLOCK]; /* codes -1, 0, 1 */
    int8_t x[BN_TOKENS][BLOCK]; /* the tokens' codes of these columns; 0 where there are none */
} block;
_Static_assert(sizeof(block) <= BN_PRODUCT_SCRATCH, "the scratch is too small");

/* 128 bytes of packed codes from byte i on: columns j * bytes + i to + 127 become columns 128 j. */
static void block_of_packed(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    int64_t i, block *b
) {
    int64_t bytes = x->stride / 4, length = least(bytes - i, BLOCK / 4);
    for (int64_t n = n0; n < n1; n++)
        for (int64_t c = 0; c < length; c += 16) {
            uint8x16_t v = vld1q_u8(w->packed + n * bytes + i + c);
            for (int j = 0; j < 4; j++) {
                uint8x16_t code = vandq_u8(vshlq_u8(v, vdupq_n_s8((int8_t)(-2 * j))), vdupq_n_u8(3));
                int8_t *to = b->w[n - n0] + BLOCK / 4 * j + c;
                vst1q_s8(to, vsubq_s8(vreinterpretq_s8_u8(code), vdupq_n_s8(1)));
            }
        }
    for (int64_t m = m0; m < m1; m++)
        for (int j = 0; j < 4; j++) {
            int8_t *to = b->x[m - m0] + BLOCK / 4 * j;
            memcpy(to, x->codes + m * x->stride + j * bytes + i, (size_t)length);
            memset(to + length, 0, (size_t)(BLOCK / 4 - length));
        }
}

/* 16 bits as bytes of 0 or -1. */
INLINE int8x16_t spread(const uint8_t *at) {
    static const uint8_t bits[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    uint8x16_t v = vcombine_u8(vdup_n_u8(at[0]), vdup_n_u8(at[1]));
    return vreinterpretq_s8_u8(vtstq_u8(v, vcombine_u8(vld1_u8(bits), vld1_u8(bits))));
}

/* 512 columns of bit planes from column i on. */
static void block_of_planes(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    int64_t i, block *b
) {
    int64_t plane = 4 * bn_plane_words(w->k), length = least(x->stride - i, BLOCK);
    for (int64_t n = n0; n < n1; n++) {
        const uint8_t *row = (const uint8_t *)w->planes + 2 * n * plane + i / 8;
        for (int64_t c = 0; c < length; c += 16) {
            int8x16_t negative = spread(row + plane + c / 8), nonzero = spread(row + c / 8);
            int8x16_t code = vsubq_s8(vaddq_s8(negative, negative), nonzero); /* -2 s + z */
            vst1q_s8(b->w[n - n0] + c, code);
        }
    }
    for (int64_t m = m0; m < m1; m++) {
        memcpy(b->x[m - m0], x->codes + m * x->stride + i, (size_t)length);
        memset(b->x[m - m0] + length, 0, (size_t)(BLOCK - length));
    }
}

/* The products of four rows and two tokens of a block. */
INLINE void multiply(const int8_t *const w[4], const int8_t *x0, const int8_t *x1, int32_t y[2][4]) {
    int32x4_t a[4], b[4];
    for (int r = 0; r < 4; r++) a[r] = b[r] = vdupq_n_s32(0);
    for (int64_t c = 0; c < BLOCK; c += 16) {
        int8x16_t u = vld1q_s8(x0 + c), v = vld1q_s8(x1 + c);
        for (int r = 0; r < 4; r++) {
            int8x16_t code = vld1q_s8(w[r] + c);
            a[r] = bn_dot16(a[r], code, u);
            b[r] = bn_dot16(b[r], code, v);
        }
    }
    vst1q_s32(y[0], vpaddq_s32(vpaddq_s32(a[0], a[1]), vpaddq_s32(a[2], a[3])));
    vst1q_s32(y[1], vpaddq_s32(vpaddq_s32(b[0], b[1]), vpaddq_s32(b[2], b[3])));
}

static void dot_neon(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    int32_t *acc, int64_t ld, void *scratch
) {
    block *b = scratch;
    int64_t end = w->packed ? x->stride / 4 : x->stride, step = w->packed ? BLOCK / 4 : BLOCK;
    for (int64_t i = 0; i < end; i += step) {
        /* if a block is not full, the rest of the previous block meets zeros of x */
        if (w->packed)
            block_of_packed(w, x, m0, m1, n0, n1, i, b);
        else
            block_of_planes(w, x, m0, m1, n0, n1, i, b);
        for (int64_t n = n0; n < n1; n += 4) {
            const int8_t *rows[4];
            for (int r = 0; r < 4; r++) rows[r] = b->w[least(n + r, n1 - 1) - n0];
            for (int64_t m = m0; m < m1; m += 2) {
                int32_t y[2][4];
                multiply(rows, b->x[m - m0], b->x[least(m + 1, m1 - 1) - m0], y);
                for (int t = 0; t < least(m1 - m, 2); t++)
                    for (int r = 0; r < least(n1 - n, 4); r++) {
                        int32_t *at = acc + (m + t - m0) * ld + n + r - n0;
                        *at = i == 0 ? y[t][r] : *at + y[t][r];
                    }
            }
        }
    }
}

/* One row times one token, as in products_portable.c. Two planes of 64 columns are a vector. */
INLINE int32_t addsub_row(
    const uint8_t *nonzero, const uint8_t *negative, const uint64_t *bits, int64_t chunks
) {
    uint64x2_t total[4], negatives = vdupq_n_u64(0);
    for (int p = 0; p < 4; p++) total[p] = vdupq_n_u64(0);
    while (chunks > 0) {
        int64_t some = least(chunks, 31); /* bytes count to 255 */
        uint8x16_t count[4], ones = vdupq_n_u8(0);
        for (int p = 0; p < 4; p++) count[p] = vdupq_n_u8(0);
        for (int64_t c = 0; c < some; c++, nonzero += 8, negative += 8, bits += 8) {
            uint64_t z, s;
            memcpy(&z, nonzero, 8);
            memcpy(&s, negative, 8);
            uint64x2_t set = vdupq_n_u64(z), flip = vdupq_n_u64(s);
            for (int p = 0; p < 4; p++) {
                uint64x2_t v = vandq_u64(veorq_u64(vld1q_u64(bits + 2 * p), flip), set);
                count[p] = vaddq_u8(count[p], vcntq_u8(vreinterpretq_u8_u64(v)));
            }
            ones = vaddq_u8(ones, vcntq_u8(vreinterpretq_u8_u64(flip)));
        }
        for (int p = 0; p < 4; p++)
            total[p] = vaddq_u64(total[p], vpaddlq_u32(vpaddlq_u16(vpaddlq_u8(count[p]))));
        negatives = vaddq_u64(negatives, vpaddlq_u32(vpaddlq_u16(vpaddlq_u8(ones))));
        chunks -= some;
    }
    int64_t sum = (int64_t)vgetq_lane_u64(negatives, 0);
    for (int p = 0; p < 4; p++) {
        int64_t low = (int64_t)vgetq_lane_u64(total[p], 0) << (2 * p);
        int64_t high = (int64_t)vgetq_lane_u64(total[p], 1) << (2 * p + 1);
        sum += p < 3 ? low + high : low - high; /* the highest plane is the sign */
    }
    return (int32_t)sum;
}

static __attribute__((noinline)) void addsub_neon(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    int32_t *acc, int64_t ld, void *scratch
) {
    (void)scratch;
    int64_t bytes = 4 * bn_plane_words(w->k), chunks = x->stride / 64;
    for (int64_t n = n0; n < n1; n++) {
        const uint8_t *planes = (const uint8_t *)w->planes + 2 * n * bytes;
        __builtin_prefetch(planes + 4096);
        for (int64_t m = m0; m < m1; m++)
            acc[(m - m0) * ld + n - n0] =
                addsub_row(planes, planes + bytes, x->bits + 8 * chunks * m, chunks);
    }
}

static void rescale(
    const bn_ternary *w, const bn_tokens *x, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    const int32_t *acc, int64_t ld, bool add, float *out, int64_t out_ld
) {
    bn_rescale(w, x, m0, m1, n0, n1, acc, ld, add, out, out_ld);
}

BN_TARGET_END

const bn_products bn_products_neon = {
    .dot = dot_neon,
    .addsub = addsub_neon,
    .bits = bn_addsub_bits_portable,
    .rescale = rescale,
};
#endif
